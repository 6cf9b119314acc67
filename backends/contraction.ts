/** Contractions of activations with weights as kernels see them: operands, what follows elementwise, and where the elements of that lie. */
import type { Dim } from "../ir/dim.ts";
import type { Graph, Op, Value } from "../ir/graph.ts";
import { knowledge } from "../ir/ops/index.ts";
import { type DType, type TensorType, typeText } from "../ir/type.ts";
import type { Target } from "./backend.ts";
import { producersOf, recognise } from "./recognise.ts";

/** Operands of each kind, in order. */
const operandNames: Readonly<Record<string, readonly string[]>> = {
  linear: ["x", "w"],
  scaled_linear: ["x", "xs", "w", "ws"],
  grouped_linear: ["x", "w", "ids"],
  scaled_grouped_linear: ["x", "xs", "w", "ws", "ids"],
};

const shapeOf = (v: Value): readonly Dim[] => (v.type as TensorType).shape;
export const dtypeOf = (v: Value): DType => v.type.dtype;

/** Columns of a result that share a scale where the result is quantised. */
export const quantisedColumns = 128;

/** A value of a body, and its codes and scales in groups of `quantisedColumns`. */
export interface Quantised {
  readonly from: Value;
  readonly codes: Value;
  readonly scales: Value;
}

/** An op seen as a contraction and what follows it: a body whose inputs are the op's inputs. */
export interface Contraction {
  readonly contraction: Op;
  /** a second one, whose result meets that of the first */
  readonly partner: Op | undefined;
  /** elementwise */
  readonly rest: readonly Op[];
  /** sums over experts' results, all of them inputs, that elementwise ops use */
  readonly combines: readonly Op[];
  /** what the body quantises in the end */
  readonly quantised: Quantised | undefined;
  readonly inputs: readonly Value[];
  readonly outputs: readonly Value[];
}

/** The quantisation that a body ends in. */
const quantisedOf = (body: Graph): Quantised | undefined => {
  const makers = producersOf(body);
  const codes = body.outputs.find((v) => dtypeOf(v) === "e4m3");
  if (codes === undefined) return undefined;
  for (const scales of body.outputs.filter((v) => dtypeOf(v) === "f32"))
    for (const dtype of ["bf16", "f16", "f32"] as const) {
      const type: TensorType = { kind: "tensor", dtype, shape: shapeOf(codes) };
      const from = recognise(makers, [codes, scales], "quantise", [type], { to: "e4m3", group: quantisedColumns })?.[0];
      if (from !== undefined) return { from, codes, scales };
    }
  return undefined;
};

/** An op seen as one contraction and what follows it; undefined where it is none, or several. */
export const contractionOf = (op: Op): Contraction | undefined => {
  const [only, ...others] = contractionsOf(op) ?? [];
  return others.length === 0 && only?.partner === undefined ? only : undefined;
};

/**
 * An op seen as contractions, each with what follows it, or as one whose result meets a partner's in every result. Undefined where a result is of
 * none of them, and where several have something other than elementwise ops behind them.
 */
export const contractionsOf = (op: Op): readonly Contraction[] | undefined => {
  const alone = { partner: undefined, rest: [], combines: [], quantised: undefined };
  if (op.kind in operandNames) return [{ contraction: op, ...alone, inputs: op.inputs, outputs: op.outputs }];
  const { body } = op;
  if (op.kind !== "fused" || body === undefined) return undefined;
  const found = quantisedOf(body);
  const given = new Set(body.inputs.map((v) => v.name));
  const ofInputs = (o: Op): boolean => o.inputs.every((v) => given.has(v.name));
  const contracts = (o: Op): boolean => o.kind in operandNames && ofInputs(o);
  const combines = (o: Op): boolean => o.kind === "combine" && ofInputs(o);
  const elementwise = (o: Op): boolean => knowledge(o.kind).scalar !== undefined || o.kind === "const";
  const isQuantised = (v: Value): boolean => v.name === found?.codes.name || v.name === found?.scales.name;
  const makers = producersOf(body);
  const opsOf = (v: Value): ReadonlySet<Op> => {
    const ops = new Set<Op>();
    const add = (value: Value): void => {
      const maker = makers.get(value.name);
      if (maker === undefined || ops.has(maker)) return;
      ops.add(maker);
      maker.inputs.forEach(add);
    };
    add(v);
    return ops;
  };
  const needs = new Map(body.outputs.map((v) => [v, opsOf(isQuantised(v) && found ? found.from : v)]));
  const used = new Set([...needs.values()].flatMap((ops) => [...ops]));
  if (![...used].every((o) => elementwise(o) || contracts(o) || combines(o))) return undefined;
  const [first, second, ...more] = body.ops.filter(contracts);
  const met = [...needs.values()].map((ops) => [...ops].filter(contracts).length);
  if (first !== undefined && second !== undefined && more.length === 0 && met.every((n) => n === 2))
    return [
      {
        contraction: first,
        partner: second,
        rest: body.ops.filter((o) => used.has(o) && elementwise(o)),
        combines: body.ops.filter((o) => used.has(o) && combines(o)),
        quantised: found,
        inputs: body.inputs,
        outputs: body.outputs,
      },
    ];
  if (met.some((n) => n !== 1)) return undefined;
  const contractions = body.ops.filter(contracts).map((contraction): Contraction => {
    const outputs = body.outputs.filter((v) => needs.get(v)?.has(contraction));
    const ops = body.ops.filter((o) => outputs.some((v) => needs.get(v)?.has(o)));
    const quantised = outputs.some(isQuantised) ? found : undefined;
    return {
      contraction,
      partner: undefined,
      rest: ops.filter(elementwise),
      combines: ops.filter(combines),
      quantised,
      inputs: body.inputs,
      outputs,
    };
  });
  const plain = contractions.every((w) => w.combines.length === 0 && w.quantised === undefined);
  return contractions.every((w) => w.outputs.length > 0) && (contractions.length === 1 || plain) ? contractions : undefined;
};

/** What is multiplied: operands by name, and sizes. */
export interface Operands {
  readonly names: readonly string[];
  /** as the contraction has it */
  readonly operand: (name: string) => Value;
  /** which input of the op it is; -1 when there is none of that name */
  readonly indexOf: (name: string) => number;
  readonly x: Value;
  readonly w: Value;
  readonly result: Value;
  readonly scaled: boolean;
  /** of the result */
  readonly rows: Dim;
  readonly columns: number;
  /** values that are summed over */
  readonly inner: number;
  /** weights among which a row chooses, and how many it chooses; 1 and 1 when there is no choice */
  readonly matrices: number;
  readonly choices: number;
  /** x has a row for each token, not for each of its choices */
  readonly rowPerToken: boolean;
}

export const operandsOf = ({ contraction, inputs }: Contraction): Operands => {
  const names = operandNames[contraction.kind] as readonly string[];
  const operand = (name: string): Value => contraction.inputs[names.indexOf(name)] as Value;
  const [x, w, result] = [operand("x"), operand("w"), contraction.outputs[0] as Value];
  const [columns, inner] = shapeOf(w).slice(-2) as unknown as readonly [number, number];
  const ids = names.includes("ids") ? shapeOf(operand("ids")) : undefined;
  return {
    names,
    operand,
    indexOf: (name) => (names.includes(name) ? inputs.findIndex((v) => v.name === operand(name).name) : -1),
    x,
    w,
    result,
    scaled: names.includes("ws"),
    rows: shapeOf(result)[0] as Dim,
    columns,
    inner,
    matrices: ids === undefined ? 1 : (shapeOf(w)[0] as number),
    choices: ids === undefined ? 1 : (ids[1] as number),
    rowPerToken: ids !== undefined && shapeOf(x)[0] === ids[0],
  };
};

/** As an index of the value's memory: its one element, the row's, the column's, or its own. */
export type Place = "0" | "row" | "column" | "at";

/** Where the element of a value lies that belongs to element [row, column] of the result; undefined when it has none. */
export const placeOf = (v: Value, rows: Dim, columns: number): Place | undefined => {
  const shape = shapeOf(v);
  if (v.type.kind !== "tensor" || shape.length > 2) return undefined;
  const [row, column] = [shape.length === 2 ? shape[0] : 1, shape.at(-1) ?? 1];
  if ((row !== rows && row !== 1) || (column !== columns && column !== 1)) return undefined;
  if (row === 1) return column === 1 ? "0" : "column";
  return column === 1 && columns !== 1 ? "row" : "at";
};

/** Whether everything after the contraction lies along its result [rows, columns], and the op's results are of that shape; else it declines. */
export const fitsResult = (work: Contraction, rows: Dim, columns: number, target: Target): boolean => {
  const { quantised } = work;
  const results = work.outputs.filter((v) => v.name !== quantised?.codes.name && v.name !== quantised?.scales.name);
  const ends = quantised === undefined ? results : [...results, quantised.from];
  const sums = work.partner?.outputs ?? [];
  const values = [...work.rest.flatMap((o) => [...o.inputs, ...o.outputs]), ...sums, ...ends];
  const misfit = values.find((v) => placeOf(v, rows, columns) === undefined);
  if (misfit) target.decline(`${typeText(misfit.type)} does not lie along the contraction's result`);
  else if ([...sums, ...ends].every((v) => placeOf(v, rows, columns) === "at")) return true;
  else target.decline("an epilogue has results of the shape of the contraction's");
  return false;
};

/** One line for reports: `linear bf16[T,256] x bf16[1024,256] -> f32[T,1024], then add, cast` */
export const aboutContraction = (work: Contraction, x: Value, w: Value): string => {
  const kinds = [...new Set([...work.combines, ...work.rest].map((o) => o.kind))].filter((k) => k !== "const");
  if (work.quantised !== undefined) kinds.push("quantise");
  const results = work.outputs.map((v) => typeText(v.type)).join(", ");
  const times = work.partner === undefined ? "x" : "x 2";
  return `${work.contraction.kind} ${typeText(x.type)} ${times} ${typeText(w.type)} -> ${results}${kinds.length > 0 ? `, then ${kinds.join(", ")}` : ""}`;
};
