/** Contractions of activations with weights as kernels see them: operands, what follows elementwise, and where the elements of that lie. */
import type { Dim } from "../ir/dim.ts";
import type { Graph, Op, Value } from "../ir/graph.ts";
import { knowledge } from "../ir/ops/index.ts";
import { type DType, type TensorType, typeText } from "../ir/type.ts";
import type { Target } from "./backend.ts";

/** Operands of each kind, in order. */
const operandNames: Readonly<Record<string, readonly string[]>> = {
  linear: ["x", "w"],
  scaled_linear: ["x", "xs", "w", "ws"],
  grouped_linear: ["x", "w", "ids"],
  scaled_grouped_linear: ["x", "xs", "w", "ws", "ids"],
};

const shapeOf = (v: Value): readonly Dim[] => (v.type as TensorType).shape;
export const dtypeOf = (v: Value): DType => v.type.dtype;

/** An op seen as a contraction and what follows it elementwise: a body whose inputs are the op's inputs. */
export interface Contraction {
  readonly contraction: Op;
  readonly rest: readonly Op[];
  readonly inputs: readonly Value[];
  readonly outputs: readonly Value[];
}

export const contractionOf = (op: Op): Contraction | undefined => {
  if (op.kind in operandNames) return { contraction: op, rest: [], inputs: op.inputs, outputs: op.outputs };
  const [first, ...rest] = op.body?.ops ?? [];
  if (op.kind !== "fused" || first === undefined || !(first.kind in operandNames)) return undefined;
  if (!rest.every((o) => knowledge(o.kind).scalar !== undefined || o.kind === "const")) return undefined;
  const body = op.body as Graph;
  return { contraction: first, rest, inputs: body.inputs, outputs: body.outputs };
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
  const values = [...work.rest.flatMap((o) => [...o.inputs, ...o.outputs]), ...work.outputs];
  const misfit = values.find((v) => placeOf(v, rows, columns) === undefined);
  if (misfit) target.decline(`${typeText(misfit.type)} does not lie along the contraction's result`);
  else if (work.outputs.every((v) => placeOf(v, rows, columns) === "at")) return true;
  else target.decline("an epilogue has results of the shape of the contraction's");
  return false;
};

/** One line for reports: `linear bf16[T,256] x bf16[1024,256] -> f32[T,1024], then add, cast` */
export const aboutContraction = (work: Contraction, x: Value, w: Value): string => {
  const kinds = [...new Set(work.rest.map((o) => o.kind))].filter((k) => k !== "const");
  const results = work.outputs.map((v) => typeText(v.type)).join(", ");
  return `${work.contraction.kind} ${typeText(x.type)} x ${typeText(w.type)} -> ${results}${kinds.length > 0 ? `, then ${kinds.join(", ")}` : ""}`;
};
