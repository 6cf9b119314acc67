/** The ops that contract activations with a weight, seen alike: dense or grouped, plain or scaled. */
import type { Op, Value } from "../../ir/graph.ts";

export interface Contraction {
  readonly x: Value;
  /** scales of `x` */
  readonly xs?: Value;
  /** [N,K], grouped [E,N,K] */
  readonly w: Value;
  /** scales of `w` */
  readonly ws?: Value;
  /** grouped: i32[T,J], which expert each row of the result takes */
  readonly ids?: Value;
}

/** Operand names in input order, by op kind. */
const operands: Readonly<Record<string, readonly (keyof Contraction)[]>> = {
  linear: ["x", "w"],
  scaled_linear: ["x", "xs", "w", "ws"],
  grouped_linear: ["x", "w", "ids"],
  scaled_grouped_linear: ["x", "xs", "w", "ws", "ids"],
};

export const isContraction = (op: Op): boolean => op.kind in operands;

export const contraction = (op: Op): Contraction | undefined => {
  const names = operands[op.kind];
  if (names === undefined) return undefined;
  return Object.fromEntries(names.map((name, i) => [name, op.inputs[i]])) as unknown as Contraction;
};

/** What a value is to a contraction that takes it, `x` before `ids`; undefined when it takes it not at all. */
export const operandOf = (op: Op, v: Value): keyof Contraction | undefined => {
  const at = op.inputs.findIndex((input) => input.name === v.name);
  return at < 0 ? undefined : operands[op.kind]?.[at];
};
