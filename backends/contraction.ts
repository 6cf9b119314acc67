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

/** The quantisation that results of a body end in. */
const quantisedOf = (body: Graph, outputs: readonly Value[]): Quantised | undefined => {
  const makers = producersOf(body);
  const codes = outputs.find((v) => dtypeOf(v) === "e4m3");
  if (codes === undefined) return undefined;
  for (const scales of outputs.filter((v) => dtypeOf(v) === "f32"))
    for (const dtype of ["bf16", "f16", "f32"] as const) {
      const type: TensorType = { kind: "tensor", dtype, shape: shapeOf(codes) };
      const from = recognise(makers, [codes, scales], "quantise", [type], { to: "e4m3", group: quantisedColumns })?.[0];
      if (from !== undefined) return { from, codes, scales };
    }
  return undefined;
};

/** Whether an op needs all of what it reads, not the elements beside its own. */
const needsAll = (o: Op): boolean => o.kind in operandNames || o.kind === "combine";

/**
 * The ops of a body in groups, each of which makes its results without those of the others being complete before; in the order of their first ops.
 * Constants are in none.
 */
const together = (body: Graph): readonly (readonly Op[])[] => {
  const makers = producersOf(body);
  const groupOf = new Map<Op, Op[]>();
  for (const op of body.ops.filter((o) => o.kind !== "const")) {
    const before = needsAll(op) ? [] : op.inputs.flatMap((v) => makers.get(v.name) ?? []);
    const group = [...new Set(before.flatMap((o) => groupOf.get(o) ?? [])), op];
    for (const o of group) groupOf.set(o, group);
  }
  const at = (group: readonly Op[]): number => Math.min(...group.map((o) => body.ops.indexOf(o)));
  return [...new Set(groupOf.values())].sort((x, y) => at(x) - at(y));
};

/**
 * A body of contractions that need each other's results, as bodies to be done one after the other: each needs what those before it give, and nothing
 * else that is not an input. Undefined when there is only one. Values keep their names.
 */
export const stagesOf = (body: Graph): readonly Graph[] | undefined => {
  const makers = producersOf(body);
  const groups = together(body);
  const groupOf = new Map(groups.flatMap((group) => group.map((o) => [o, group] as const)));
  const depths = new Map<readonly Op[], number>();
  const depthOf = (group: readonly Op[]): number => {
    const known = depths.get(group);
    if (known !== undefined) return known;
    const before = group.flatMap((o) => o.inputs).map((v) => groupOf.get(makers.get(v.name) as Op) ?? group);
    const depth = Math.max(0, ...before.filter((other) => other !== group).map((other) => 1 + depthOf(other)));
    depths.set(group, depth);
    return depth;
  };
  const count = 1 + Math.max(...groups.map(depthOf));
  if (count === 1) return undefined;
  const results = new Set(body.outputs.map((v) => v.name));
  return Array.from({ length: count }, (_, depth): Graph => {
    const own = new Set(groups.filter((group) => depthOf(group) === depth).flat());
    const read = new Set([...own].flatMap((o) => o.inputs.map((v) => v.name)));
    const ops = body.ops.filter((o) => own.has(o) || (o.kind === "const" && read.has((o.outputs[0] as Value).name)));
    const made = new Set(ops.flatMap((o) => o.outputs.map((v) => v.name)));
    const used = new Set(body.ops.filter((o) => !ops.includes(o)).flatMap((o) => o.inputs.map((v) => v.name)));
    const unique = (values: readonly Value[]): readonly Value[] => [...new Map(values.map((v) => [v.name, v])).values()];
    return {
      ...body,
      inputs: unique(ops.flatMap((o) => o.inputs).filter((v) => !made.has(v.name))),
      ops,
      outputs: ops.flatMap((o) => o.outputs).filter((v) => used.has(v.name) || results.has(v.name)),
    };
  });
};

/** An op seen as one contraction and what follows it; undefined where it is none, or several. */
export const contractionOf = (op: Op): Contraction | undefined => {
  const [only, ...others] = contractionsOf(op) ?? [];
  return others.length === 0 && only?.partner === undefined ? only : undefined;
};

/**
 * An op seen as contractions, each with what follows it, or with a partner whose result meets its own in every result. Undefined where a result is of
 * none of them, and where contractions need each other's results.
 */
export const contractionsOf = (op: Op): readonly Contraction[] | undefined => {
  if (op.kind in operandNames) {
    const alone = { partner: undefined, rest: [], combines: [], quantised: undefined };
    return [{ contraction: op, ...alone, inputs: op.inputs, outputs: op.outputs }];
  }
  const { body } = op;
  if (op.kind !== "fused" || body === undefined) return undefined;
  const given = new Set(body.inputs.map((v) => v.name));
  if (!body.ops.filter(needsAll).every((o) => o.inputs.every((v) => given.has(v.name)))) return undefined;
  const makers = producersOf(body);
  const elementwise = (o: Op): boolean => knowledge(o.kind).scalar !== undefined || o.kind === "const";
  /** ops that a value is made of */
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
  const found: Contraction[] = [];
  for (const group of together(body)) {
    const outputs = body.outputs.filter((v) => group.includes(makers.get(v.name) as Op));
    if (outputs.length === 0) continue; // what nobody uses
    const quantised = quantisedOf(body, outputs);
    const isQuantised = (v: Value): boolean => v.name === quantised?.codes.name || v.name === quantised?.scales.name;
    const needs = outputs.map((v) => opsOf(isQuantised(v) && quantised ? quantised.from : v));
    const used = new Set(needs.flatMap((ops) => [...ops]));
    if (![...used].every((o) => elementwise(o) || needsAll(o))) return undefined;
    const [contraction, partner, ...more] = group.filter((o) => o.kind in operandNames);
    if (contraction === undefined || more.length > 0) return undefined;
    if (!needs.every((ops) => ops.has(contraction) && (partner === undefined || ops.has(partner)))) return undefined;
    found.push({
      contraction,
      partner,
      rest: body.ops.filter((o) => used.has(o) && elementwise(o)),
      combines: body.ops.filter((o) => used.has(o) && o.kind === "combine"),
      quantised,
      inputs: body.inputs,
      outputs,
    });
  }
  return found.length > 0 && found.flatMap((w) => w.outputs).length === body.outputs.length ? found : undefined;
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
