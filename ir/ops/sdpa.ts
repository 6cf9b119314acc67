import { type ConcreteTensor, cost, elements, tensorOf } from "../bind.ts";
import type { Dim } from "../dim.ts";
import * as expect from "../expect.ts";
import type { Knowledge, Sample } from "../op.ts";
import { rounder } from "../round.ts";
import type { Tensor } from "../tensor.ts";
import { type DType, type TensorType, tensor, typeText } from "../type.ts";
import { stridesOf } from "./movement.ts";

/** Which keys a query sees: all of them; up to its own place from the front; or up to its place when the last query is the last key. */
const causes = ["none", "first", "last"] as const;

const infer: Knowledge["infer"] = (inputs, attrs) => {
  expect.count(inputs, inputs.length > 3 ? ["q", "k", "v", "bias"] : ["q", "k", "v"]);
  const [q, k, v] = ["q", "k", "v"].map((name, i) => expect.tensorAt(inputs, i, name)) as [TensorType, TensorType, TensorType];
  expect.dtype(q, ["f32", "bf16", "f16"], "q");
  for (const [t, name] of [
    [q, "q"],
    [k, "k"],
    [v, "v"],
  ] as const) {
    expect.rank(t, 4, name);
    expect.dtype(t, [q.dtype], name);
  }
  const [batch, heads, queries] = q.shape as readonly [Dim, Dim, Dim];
  const kvHeads = expect.constantDim(k, 1, "k");
  if (typeof heads !== "number" || kvHeads === 0 || heads % kvHeads !== 0)
    expect.fail(`${typeText(q)} has heads that do not divide over the ${kvHeads} of ${typeText(k)}`);
  expect.sameDim(expect.constantDim(k, 3, "k"), expect.constantDim(q, 3, "q"), "elements of a head of k and q");
  expect.sameDim(expect.dimAt(k, 0), batch, "batches of k and q");
  expect.sameDim(expect.dimAt(v, 0), batch, "batches of v and q");
  expect.sameDim(expect.constantDim(v, 1, "v"), kvHeads, "heads of v and k");
  expect.sameDim(expect.dimAt(v, 2), expect.dimAt(k, 2), "rows of v and k");
  expect.real(attrs, "scale");
  expect.word(attrs, "causal", causes, "none");
  if (expect.real(attrs, "softcap", 0) < 0) expect.fail(`attribute 'softcap' must not be negative`);
  if (inputs.length > 3) {
    const bias = expect.tensorAt(inputs, 3, "bias");
    expect.dtype(bias, ["f32", "bool"], "bias");
    const scores = [batch, heads, queries, expect.dimAt(k, 2)];
    const lead = scores.length - bias.shape.length;
    if (lead < 0 || bias.shape.some((d, i) => d !== 1 && d !== scores[lead + i]))
      expect.fail(`${typeText(bias)} does not broadcast to the scores, ${typeText(tensor("f32", scores))}`);
  }
  return [tensor(expect.dtypeAttr(attrs, "to", q.dtype), [batch, heads, queries, expect.constantDim(v, 3, "v")])];
};

interface Sizes {
  readonly dtype?: DType;
  readonly heads: readonly [q: number, kv: number];
  readonly dim: number;
  readonly out?: number;
  readonly bias?: TensorType;
  readonly attrs?: Sample["attrs"];
  /** queries and keys */
  readonly rows?: readonly [number, number];
}

const sample = (
  name: string,
  { dtype = "f32", heads: [hq, hkv], dim, out = dim, bias, attrs, rows = [5, 9] }: Sizes,
): Sample => ({
  name,
  inputs: [
    tensor(dtype, ["B", hq, "S", dim]),
    tensor(dtype, ["B", hkv, "L", dim]),
    tensor(dtype, ["B", hkv, "L", out]),
    ...(bias ? [bias] : []),
  ],
  attrs: { scale: 1 / Math.sqrt(dim), ...attrs },
  values: ["normal", "normal", "normal", bias?.dtype === "bool" ? { below: 2 } : "normal"],
  symbols: { B: 2, S: rows[0], L: rows[1] },
});

export const sdpa: Knowledge = {
  name: "sdpa",
  summary:
    "q[B, H, S, D], k[B, G, L, D], v[B, G, L, E], bias -> [B, H, S, E]: softmax(scale q k + bias) v in f32, rounded once; query head h " +
    "uses head floor(h * G / H) of k and v; bias f32, or bool: true where a key is seen, broadcast to [B, H, S, L]; zeros where no key is seen",
  attrs: {
    scale: "what q k is multiplied by",
    causal: "`none` (the default); `first`: query i sees keys 0..i; `last`: keys 0..i + L - S",
    softcap: "c: scores are c tanh(scale q k / c) before the bias; 0, the default: as they are",
    to: "dtype of the result; q's unless given",
  },
  inputs: ["q", "k", "v", "bias..."],
  rowwise: "none",
  infer,
  evaluate(inputs, attrs, [out]) {
    const [q, k, v, bias] = inputs as readonly [Tensor, Tensor, Tensor, Tensor?];
    const type = out as ConcreteTensor;
    const [batch, heads, queries, dim] = q.shape as readonly [number, number, number, number];
    const [, kvHeads, keys, outDim] = v.shape as readonly [number, number, number, number];
    const scale = expect.real(attrs, "scale");
    const cap = expect.real(attrs, "softcap", 0);
    const causal = expect.word(attrs, "causal", causes, "none");
    const f32 = Math.fround;
    const round = rounder(type.dtype);
    const own = bias === undefined ? [] : stridesOf(bias.shape);
    const lead = 4 - (bias?.shape.length ?? 0);
    const step = [0, 1, 2, 3].map((axis) => (axis < lead || bias?.shape[axis - lead] === 1 ? 0 : (own[axis - lead] as number)));
    const result = new Float64Array(batch * heads * queries * outDim);
    const scores = new Float64Array(keys);
    for (let row = 0; row < batch * heads * queries; row++) {
      const [b, h, i] = [Math.floor(row / (heads * queries)), Math.floor(row / queries) % heads, row % queries];
      const head = b * kvHeads + Math.floor((h * kvHeads) / heads);
      const seen = causal === "none" ? keys : Math.min(keys, i + 1 + (causal === "last" ? keys - queries : 0));
      let max = Number.NEGATIVE_INFINITY;
      for (let j = 0; j < keys; j++) {
        let dot = 0;
        for (let c = 0; c < dim; c++) dot += (q.data[row * dim + c] as number) * (k.data[(head * keys + j) * dim + c] as number);
        const plain = cap === 0 ? scale * dot : cap * Math.tanh((scale * dot) / cap);
        const at = [b, h, i, j].reduce((sum, index, axis) => sum + index * (step[axis] as number), 0);
        const more = bias?.data[at] ?? 0;
        const hidden = j >= seen || (bias?.dtype === "bool" && more === 0);
        scores[j] = hidden ? Number.NEGATIVE_INFINITY : f32(f32(plain) + (bias?.dtype === "f32" ? more : 0));
        max = Math.max(max, scores[j] as number);
      }
      if (max === Number.NEGATIVE_INFINITY) continue;
      let sum = 0;
      for (let j = 0; j < keys; j++) {
        scores[j] = Math.exp((scores[j] as number) - max);
        sum += scores[j] as number;
      }
      for (let j = 0; j < keys; j++) {
        const weight = (scores[j] as number) / sum;
        // a key that is not seen counts for nothing, whatever its value is
        if (weight === 0) continue;
        for (let c = 0; c < outDim; c++)
          result[row * outDim + c] =
            (result[row * outDim + c] as number) + weight * (v.data[(head * keys + j) * outDim + c] as number);
      }
    }
    return [tensorOf(type, result.map(round))];
  },
  cost(inputs, attrs, symbols) {
    const outputs = infer(inputs, attrs);
    const [q, k, v] = inputs as readonly [TensorType, TensorType, TensorType];
    const scores = elements(tensor("f32", [...q.shape.slice(0, 3), k.shape[2] as Dim]), symbols);
    const perScore = 2 * ((q.shape[3] as number) + (v.shape[3] as number));
    return cost(perScore * scores, [...inputs, ...outputs], symbols);
  },
  samples: [
    sample("as many heads of k", { heads: [3, 3], dim: 16 }),
    sample("grouped heads, bf16", { dtype: "bf16", heads: [6, 2], dim: 22, rows: [7, 7], attrs: { causal: "last" } }),
    sample("one head of k, f16, longer values", { dtype: "f16", heads: [4, 1], dim: 8, out: 40, attrs: { causal: "first" } }),
    sample("a bias for each score", { heads: [2, 1], dim: 33, bias: tensor("f32", ["B", 2, "S", "L"]) }),
    sample("a bias for each key", { heads: [2, 2], dim: 4, bias: tensor("f32", ["L"]) }),
    sample("a mask that heads share", { dtype: "bf16", heads: [4, 2], dim: 32, bias: tensor("bool", ["B", 1, "S", "L"]) }),
    sample("rows that see nothing", { heads: [2, 2], dim: 5, rows: [9, 4], attrs: { causal: "last" } }),
    sample("many rows, softcap, bf16 to f32", {
      dtype: "bf16",
      heads: [4, 2],
      dim: 64,
      rows: [70, 133],
      attrs: { softcap: 5, causal: "last", to: "f32" },
    }),
    sample("one row of many keys", { heads: [8, 2], dim: 64, rows: [1, 300] }),
  ],
};
