/** Drops what nothing needs. */
import type { Graph, Op } from "../../ir/graph.ts";
import type { Pass } from "../pass.ts";

/** Ops that lead to an output or change a state, and the weights and states those use. Inputs stay: they are the graph's interface. */
export const withoutDead = (g: Graph, spare: (op: Op) => boolean = () => false): Graph => {
  const needed = new Set(g.outputs.map((v) => v.name));
  const kept: Op[] = [];
  for (const op of [...g.ops].reverse()) {
    const lives = op.outputs.some((v) => needed.has(v.name) || v.type.kind === "kv");
    if (!lives && !spare(op)) continue;
    kept.push(op);
    for (const v of op.inputs) needed.add(v.name);
  }
  const weights = g.weights.filter((w) => needed.has(w.value.name));
  const states = g.states.filter((s) => needed.has(s.name));
  const same = kept.length === g.ops.length && weights.length === g.weights.length && states.length === g.states.length;
  return same ? g : { ...g, ops: kept.reverse(), weights, states };
};

export const dead: Pass = {
  name: "dead",
  run: (g, context) => withoutDead(g, () => !context.apply()),
};
