/** The choice of experts: the first of a row of probabilities in descending order are its `topk`. */
import { type Dim, product } from "../../../ir/dim.ts";
import type { Value } from "../../../ir/graph.ts";
import { cast, miss, near, type Pattern, pattern, reshaped, shapeOf, typeOf } from "./look.ts";

interface Choice {
  readonly p: Value;
  readonly k: number;
}

export const topk: Pattern = pattern<Choice>({
  name: "topk",
  roots: ["sort"],
  match(op, g) {
    const p = g.operand(op.inputs[0] as Value);
    const [values] = op.outputs as readonly [Value, Value];
    if (op.attrs.count === undefined || op.attrs.descending !== true) miss("all of a row is put in order, or from the least up");
    const scores = g.maker(g.bare(p));
    // probabilities, or scores that are normalised after the choice
    if (scores === undefined || !["softmax", "sigmoid", "linear", "reshape"].includes(scores.kind))
      miss(`what is chosen from is ${scores === undefined ? `'${p.name}'` : `made by ${scores.kind}`}, no scores of a router`);
    return near(() => {
      const k = shapeOf(values).at(-1);
      if (typeOf(values).dtype !== "f32") miss(`probabilities are ${typeOf(values).dtype}`);
      if (typeof k !== "number" || k === 0) return miss("how many is not known");
      if (typeof shapeOf(p).at(-1) !== "number") miss("how many there are to choose from is not known");
      return { p, k };
    });
  },
  build(b, { p, k }, op) {
    const lead = shapeOf(p).slice(0, -1);
    const rows: readonly Dim[] = [product(lead), shapeOf(p).at(-1) as Dim];
    const chosen = b.ops("topk", [cast(b, reshaped(b, p, rows), "f32")], { k });
    return chosen.map((v, i) => reshaped(b, v, shapeOf(op.outputs[i] as Value)));
  },
});
