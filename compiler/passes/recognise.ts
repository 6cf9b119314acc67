/**
 * Finds in graphs that were exported in pieces what the pieces were: norms, activations, softmax, rotary embeddings, attention. Results are
 * the same within the rounding of their dtype: an op rounds once where pieces rounded several times.
 */
import { type Builder, rewrite } from "../../ir/build.ts";
import type { Graph, Op, Value } from "../../ir/graph.ts";
import type { Pass } from "../pass.ts";
import { withoutDead } from "./dead.ts";
import { fold } from "./fold.ts";
import { patterns } from "./patterns/index.ts";
import { Look, Miss, type Pattern } from "./patterns/look.ts";

/** What a pattern is at an op: how to make it, or why it is not. */
type Outcome = { readonly make: (b: Builder) => readonly Value[] } | { readonly miss: Miss };

const outcomeAt = (p: Pattern, op: Op, look: Look): Outcome => {
  try {
    return { make: p.at(op, look) };
  } catch (error) {
    if (error instanceof Miss) return { miss: error };
    throw error;
  }
};

/** The graph with one pattern's op wherever it is found and `apply` allows it. */
const replaced = (g: Graph, p: Pattern, apply: (op: Op, outcome: Outcome) => boolean): Graph => {
  const look = new Look(g);
  let found = 0;
  const result = rewrite(g, (seen, b) => {
    const [out] = seen.outputs;
    const op = look.maker(out);
    if (op === undefined || !p.roots.includes(op.kind)) return undefined;
    const outcome = outcomeAt(p, op, look);
    if (!apply(op, outcome) || "miss" in outcome) return undefined;
    found++;
    return outcome.make(b);
  });
  return found === 0 ? g : withoutDead(result);
};

/** `--explain NAME`, NAME an op that a pattern makes or a value: where patterns are, and where and why they are not quite. */
const explained = (source: Graph, name: string): string | undefined => {
  const lines: string[] = [];
  patterns.reduce((g, p) => {
    return replaced(g, p, (op, outcome) => {
      const out = op.outputs[0]?.name;
      const found = "make" in outcome;
      if (out === name || (p.name === name && (found || outcome.miss.near)))
        lines.push(`${p.name} at ${out}: ${found ? "found" : outcome.miss.message}`);
      return found;
    });
  }, source);
  return lines.length === 0 ? undefined : `${lines.join("\n")}\n`;
};

export const recognise: Pass = {
  name: "recognise",
  after: ["fold"],
  run(g, context) {
    const result = patterns.reduce((now, p) => replaced(now, p, (_, outcome) => "make" in outcome && context.apply()), g);
    // conversions there and back between ops that take each other's results as they are
    return result === g ? g : fold.run(result, context);
  },
  explain: explained,
};
