import { type ConcreteTensor, cost, elements, tensorOf } from "../bind.ts";
import * as expect from "../expect.ts";
import type { Knowledge, Sample } from "../op.ts";
import type { Tensor } from "../tensor.ts";
import { type TensorType, tensor } from "../type.ts";
import { descending } from "./topk.ts";

const names = ["logits", "temperature", "top_p", "seed", "position"];

const infer: Knowledge["infer"] = (inputs) => {
  expect.count(inputs, names);
  const logits = expect.tensorAt(inputs, 0, "logits");
  expect.rank(logits, 2, "logits");
  expect.dtype(logits, ["f32"], "logits");
  if (expect.constantDim(logits, 1, "logits") === 0) expect.fail("logits must have at least one column");
  const rows = expect.dimAt(logits, 0);
  (["f32", "f32", "u32", "i32"] as const).forEach((dtype, i) => {
    const name = names[i + 1] as string;
    const t = expect.tensorAt(inputs, i + 1, name);
    expect.rank(t, 1, name);
    expect.dtype(t, [dtype], name);
    expect.sameDim(expect.dimAt(t, 0), rows, `rows of ${name} and logits`);
  });
  return [tensor("i32", [rows])];
};

/** The finaliser of MurmurHash3's 32-bit variant. */
const fmix32 = (hash: number): number => {
  let h = hash;
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
};

/**
 * The random number of (seed, position), in [0, 1): kernels spell it the same, in 32-bit integers:
 * h = seed; h ^= position * 0x9E3779B1; h = fmix32(h); h += 0x85EBCA6B; h = fmix32(h); u = (h >>> 8) * 2^-24
 */
export const sampleUniform = (seed: number, position: number): number => {
  let h = (seed ^ Math.imul(position, 0x9e3779b1)) >>> 0;
  h = fmix32(h);
  h = fmix32((h + 0x85ebca6b) >>> 0);
  return (h >>> 8) * 2 ** -24;
};

/** The index drawn from one row of logits. */
const draw = (logits: Float64Array, temperature: number, topP: number, u: number): number => {
  const order = descending(logits);
  const best = order[0] as number;
  if (!(temperature > 0)) return best;
  const powers = order.map((i) => Math.exp(((logits[i] as number) - (logits[best] as number)) / temperature));
  const sum = powers.reduce((a, b) => a + b, 0);
  let kept = 0;
  let mass = 0;
  while (kept < order.length && (kept === 0 || mass < topP * sum)) mass += powers[kept++] as number;
  let cumulative = 0;
  for (let i = 0; i < kept; i++) {
    cumulative += powers[i] as number;
    if (cumulative > u * mass) return order[i] as number;
  }
  return order[kept - 1] as number;
};

const sampleCase = (name: string, vocabulary: number, temperature: "unit" | { below: number }): Sample => ({
  name,
  inputs: [
    tensor("f32", ["T", vocabulary]),
    tensor("f32", ["T"]),
    tensor("f32", ["T"]),
    tensor("u32", ["T"]),
    tensor("i32", ["T"]),
  ],
  attrs: {},
  values: ["normal", temperature, "unit", { below: 1000 }, { below: 64 }],
  symbols: { T: 6 },
});

export const sample: Knowledge = {
  name: "sample",
  summary:
    "logits f32[T, V], temperature f32[T], top_p f32[T], seed u32[T], position i32[T] -> i32[T]: temperature 0 takes the largest " +
    "(the lower index on ties); else a draw from softmax(logits / temperature), kept to the smallest prefix of descending order that reaches top_p",
  attrs: {},
  inputs: names,
  rowwise: "row",
  infer,
  evaluate(inputs, _, [out]) {
    const [logits, temperature, topP, seed, position] = inputs as readonly [Tensor, Tensor, Tensor, Tensor, Tensor];
    const type = out as ConcreteTensor;
    const columns = logits.shape[1] as number;
    const result = temperature.data.map((t, row) =>
      draw(
        logits.data.subarray(row * columns, (row + 1) * columns),
        t,
        topP.data[row] as number,
        sampleUniform(seed.data[row] as number, position.data[row] as number),
      ),
    );
    return [tensorOf(type, result)];
  },
  cost: (inputs, attrs, symbols) =>
    cost(6 * elements(inputs[0] as TensorType, symbols), [...inputs, ...infer(inputs, attrs)], symbols),
  samples: [
    sampleCase("greedy", 131, { below: 1 }),
    sampleCase("drawn", 64, "unit"),
    sampleCase("one token", 1, "unit"),
    {
      name: "ties",
      inputs: [tensor("f32", ["T", 9]), tensor("f32", ["T"]), tensor("f32", ["T"]), tensor("u32", ["T"]), tensor("i32", ["T"])],
      attrs: {},
      values: [{ below: 2 }, { below: 1 }, "unit", { below: 9 }, "row"],
      symbols: { T: 6 },
    },
  ],
};
