/** The registry: every op there is. A new op is one file here and one line in `allKnowledge`. */
import type { Attrs } from "../attr.ts";
import { UserError } from "../error.ts";
import type { Graph } from "../graph.ts";
import type { Knowledge } from "../op.ts";
import type { Type } from "../type.ts";
import { bitcast } from "./bitcast.ts";
import { attention, kvAppend } from "./cache.ts";
import { constant } from "./const.ts";
import { cumulate } from "./cumulate.ts";
import { elementwise } from "./elementwise.ts";
import { collect, dispatch } from "./exchange.ts";
import { fusedWith } from "./fused.ts";
import { gather } from "./gather.ts";
import { combine, groupedLinear, scaledGroupedLinear } from "./grouped.ts";
import { iota, size } from "./iota.ts";
import { layerNorm } from "./layer_norm.ts";
import { linear } from "./linear.ts";
import { matmul } from "./matmul.ts";
import { broadcast, concat, reshape, slice, transpose } from "./movement.ts";
import { quantise } from "./quantise.ts";
import { reduce } from "./reduce.ts";
import { rmsNorm } from "./rms_norm.ts";
import { rope } from "./rope.ts";
import { rotary } from "./rotary.ts";
import { sample } from "./sample.ts";
import { scaledLinear } from "./scaled_linear.ts";
import { sdpa } from "./sdpa.ts";
import { softmax } from "./softmax.ts";
import { sort } from "./sort.ts";
import { spread } from "./spread.ts";
import { put, take } from "./take.ts";
import { topk } from "./topk.ts";

export const allKnowledge: readonly Knowledge[] = [
  ...elementwise,
  constant,
  reduce,
  spread,
  rmsNorm,
  layerNorm,
  softmax,
  quantise,
  gather,
  linear,
  scaledLinear,
  groupedLinear,
  scaledGroupedLinear,
  combine,
  topk,
  matmul,
  reshape,
  transpose,
  slice,
  broadcast,
  concat,
  iota,
  size,
  take,
  put,
  cumulate,
  sort,
  bitcast,
  rotary,
  rope,
  sdpa,
  kvAppend,
  attention,
  sample,
  dispatch,
  collect,
  fusedWith((kind) => knowledge(kind)),
];

const byName: ReadonlyMap<string, Knowledge> = new Map(allKnowledge.map((k) => [k.name, k]));

/** Edits (insert, delete, replace) from a to b. */
const distance = (a: string, b: string): number => {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++)
      next[j] = Math.min(
        (row[j] as number) + 1,
        (next[j - 1] as number) + 1,
        (row[j - 1] as number) + (a[i - 1] === b[j - 1] ? 0 : 1),
      );
    row = next;
  }
  return row[b.length] as number;
};

/** The one of `words` that `word` most resembles. */
export const nearestWord = (word: string, words: readonly string[]): string | undefined => {
  // a long word is a mistake of another kind, and the distance is quadratic
  const short = word.slice(0, 64);
  let best: string | undefined;
  let least = Number.POSITIVE_INFINITY;
  for (const w of words) {
    const d = distance(short, w);
    if (d < least) [best, least] = [w, d];
  }
  return best;
};

/** What is known of an op; throws a UserError naming the nearest op there is. */
export const knowledge = (kind: string): Knowledge => {
  const found = byName.get(kind);
  if (found) return found;
  throw new UserError(`there is no op '${kind.slice(0, 64)}'; the nearest is '${nearestWord(kind, [...byName.keys()])}'`);
};

/** The types of an op's results; throws a UserError, with the op's name in front, when attributes or inputs do not fit. */
export const inferTypes = (kind: string, inputs: readonly Type[], attrs: Attrs, body?: Graph): readonly Type[] => {
  const op = knowledge(kind);
  const known = Object.keys(op.attrs);
  for (const name of Object.keys(attrs))
    if (!known.includes(name))
      throw new UserError(
        `${kind}: no attribute '${name}'${known.length === 0 ? "; it takes none" : `; it takes ${known.join(", ")}`}`,
      );
  if (body !== undefined && kind !== "fused") throw new UserError(`${kind}: only 'fused' has a body`);
  try {
    return op.infer(inputs, attrs, body);
  } catch (error) {
    if (error instanceof UserError) throw error.at(kind);
    throw error;
  }
};
