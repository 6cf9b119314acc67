/** Who makes and who uses each value of a graph. Passes that look at more than one op at a time start from this. */
import type { Graph, Op, Value } from "../../ir/graph.ts";

export interface Flow {
  /** the op that makes a value, by the value's name; none for inputs, states and weights */
  readonly producer: ReadonlyMap<string, Op>;
  /** the ops that use a value, each once, in order */
  readonly consumers: ReadonlyMap<string, readonly Op[]>;
  /** place of an op in the graph's order */
  readonly index: ReadonlyMap<Op, number>;
  readonly outputs: ReadonlySet<string>;
}

export const flowOf = (g: Graph): Flow => {
  const producer = new Map<string, Op>();
  const consumers = new Map<string, Op[]>();
  const index = new Map<Op, number>();
  for (const [i, op] of g.ops.entries()) {
    index.set(op, i);
    for (const v of op.outputs) producer.set(v.name, op);
    for (const v of new Set(op.inputs)) {
      const users = consumers.get(v.name);
      if (users === undefined) consumers.set(v.name, [op]);
      else if (users.at(-1) !== op) users.push(op);
    }
  }
  return { producer, consumers, index, outputs: new Set(g.outputs.map((v) => v.name)) };
};

export const usesOf = (flow: Flow, v: Value): readonly Op[] => flow.consumers.get(v.name) ?? [];

/** Values whose content depends on the rows of this round: everything but weights, constants and what is computed of those alone. */
export const rowDependent = (g: Graph): ReadonlySet<string> => {
  const dependent = new Set([...g.inputs, ...g.states].map((v) => v.name));
  for (const op of g.ops) if (op.inputs.some((v) => dependent.has(v.name))) for (const v of op.outputs) dependent.add(v.name);
  return dependent;
};

export const touchesState = (op: Op): boolean => [...op.inputs, ...op.outputs].some((v) => v.type.kind === "kv");

/** Whether tokens meet each other in an op: it reads or changes a state, or multiplies rows with rows. */
export const meetsTokens = (op: Op, dependent: ReadonlySet<string>): boolean =>
  touchesState(op) || ((op.kind === "matmul" || op.kind === "sdpa") && op.inputs.filter((v) => dependent.has(v.name)).length > 1);

/** Gives names that the graph does not have yet: `wanted`, or `wanted_2`, `wanted_3` ... */
export const freshNames = (g: Graph): ((wanted: string) => string) => {
  const taken = new Set<string>();
  for (const v of [...g.inputs, ...g.states, ...g.weights.map((w) => w.value), ...g.ops.flatMap((op) => op.outputs)])
    taken.add(v.name);
  return (wanted) => {
    let name = wanted;
    for (let n = 2; taken.has(name); n++) name = `${wanted}_${n}`;
    taken.add(name);
    return name;
  };
};
