/** The key/value cache: kv_append writes rows into pages, attention reads them. */
import type { Attrs } from "../attr.ts";
import { bytesOf, type ConcreteTensor, elements, type Symbols, tensorOf } from "../bind.ts";
import { UserError } from "../error.ts";
import * as expect from "../expect.ts";
import type { Cost, Datum, Knowledge, KvRow, KvState, Sample } from "../op.ts";
import { rounder } from "../round.ts";
import type { Tensor } from "../tensor.ts";
import { type DType, dtypeBytes, isFloat, type KvType, type TensorType, type Type, tensor } from "../type.ts";

const plainNames = ["state", "k", "v", "pages", "position"];
const quantisedNames = ["state", "k", "k scales", "v", "v scales", "pages", "position"];
const isQuantised = (kv: KvType): boolean => kv.dtype === "e4m3" || kv.dtype === "i8";

const pageInputs = (pages: TensorType, position: TensorType, rows: TensorType): void => {
  expect.rank(pages, 2, "pages");
  expect.dtype(pages, ["i32"], "pages");
  expect.rank(position, 1, "position");
  expect.dtype(position, ["i32"], "position");
  expect.sameDim(expect.dimAt(pages, 0), expect.dimAt(rows, 0), "rows of pages and of tokens");
  expect.sameDim(expect.dimAt(position, 0), expect.dimAt(rows, 0), "rows of position and of tokens");
};

const inferAppend: Knowledge["infer"] = (inputs) => {
  const kv = expect.kvAt(inputs, 0, "state");
  const names = isQuantised(kv) ? quantisedNames : plainNames;
  expect.count(inputs, names);
  const at = (name: string): TensorType => expect.tensorAt(inputs, names.indexOf(name), name);
  const k = at("k");
  for (const name of ["k", "v"]) {
    const rows = at(name);
    expect.rank(rows, 2, name);
    expect.dtype(rows, [kv.dtype], name);
    expect.sameDim(expect.dimAt(rows, 0), expect.dimAt(k, 0), `rows of ${name} and k`);
    expect.sameDim(expect.dimAt(rows, 1), kv.heads * kv.dim, `columns of ${name} and ${kv.heads} heads of ${kv.dim}`);
    if (!isQuantised(kv)) continue;
    const scales = at(`${name} scales`);
    expect.rank(scales, 2, `${name} scales`);
    expect.dtype(scales, ["f32"], `${name} scales`);
    expect.sameDim(expect.dimAt(scales, 0), expect.dimAt(k, 0), `rows of ${name} scales and k`);
    expect.sameDim(expect.dimAt(scales, 1), kv.heads, `columns of ${name} scales and heads`);
  }
  pageInputs(at("pages"), at("position"), k);
  return [kv];
};

/** Where the cached token of a position lies: a key of KvState.rows. */
const place = (state: KvState, pages: Tensor, row: number, position: number, op: string): string => {
  const columns = pages.shape[1] as number;
  const column = Math.floor(position / state.pageTokens);
  if (position < 0 || column >= columns)
    throw new UserError(`${op}: position ${position} of row ${row} is outside ${columns} pages of ${state.pageTokens} tokens`);
  return `${pages.data[row * columns + column]}:${position % state.pageTokens}`;
};

/** Pages, of at least 4 tokens, of one sequence of `T` rows at positions 0..T-1, and these. */
const oneSequence = (tokens: number): readonly [TensorType, TensorType] => [
  tensor("i32", ["T", Math.max(4, Math.ceil(tokens / 4))]),
  tensor("i32", ["T"]),
];

const appendSample = (name: string, dtype: KvType["dtype"], heads: number, dim: number): Sample => {
  const rows = tensor(dtype, ["T", heads * dim]);
  const scales = tensor("f32", ["T", heads]);
  const quantised = dtype === "e4m3" || dtype === "i8";
  return {
    name,
    inputs: [{ kind: "kv", dtype, heads, dim }, ...(quantised ? [rows, scales, rows, scales] : [rows, rows]), ...oneSequence(5)],
    attrs: {},
    values: quantised
      ? ["normal", "normal", "positive", "normal", "positive", "column", "row"]
      : ["normal", "normal", "normal", "column", "row"],
    symbols: { T: 5 },
  };
};

export const kvAppend: Knowledge = {
  name: "kv_append",
  summary:
    "state, k[T, heads*dim], v[T, heads*dim], pages i32[T, P], position i32[T] -> state with the rows at their positions; " +
    "quantised: state, k codes, k scales f32[T, heads], v codes, v scales, pages, position",
  attrs: {},
  inputs: plainNames,
  rowwise: "state",
  infer: inferAppend,
  /** Changes the state in place: a graph never uses a version that has been changed. */
  evaluate(inputs) {
    const state = inputs[0] as KvState;
    const [k, v, kScale, vScale] = (inputs.length === 7 ? [1, 3, 2, 4] : [1, 2]).map((i) => inputs[i] as Tensor) as [
      Tensor,
      Tensor,
      Tensor?,
      Tensor?,
    ];
    const [pages, position] = inputs.slice(-2) as readonly Datum[] as readonly [Tensor, Tensor];
    const rowOf = (x: Tensor, t: number): Float64Array => {
      const columns = x.shape[1] as number;
      return x.data.slice(t * columns, (t + 1) * columns);
    };
    position.data.forEach((p, t) => {
      const row: KvRow = {
        k: rowOf(k, t),
        v: rowOf(v, t),
        ...(kScale && vScale ? { kScale: rowOf(kScale, t), vScale: rowOf(vScale, t) } : {}),
      };
      state.rows.set(place(state, pages, t, p, "kv_append"), row);
    });
    return [state];
  },
  cost(inputs, _, symbols) {
    const tensors = inputs.slice(1);
    const written = tensors.slice(0, -2).reduce((n, t) => n + bytesOf(t, symbols), 0);
    return { flops: 0, bytes: tensors.reduce((n, t) => n + bytesOf(t, symbols), 0) + written };
  },
  samples: [
    appendSample("bf16, one head", "bf16", 1, 64),
    appendSample("f32, two heads", "f32", 2, 22),
    appendSample("fp8", "e4m3", 1, 64),
    appendSample("int8, two heads", "i8", 2, 32),
  ],
};

const attentionNames = ["q", "state", "pages", "position"];

const inferAttention: Knowledge["infer"] = (inputs, attrs) => {
  expect.count(inputs, attentionNames);
  const q = expect.tensorAt(inputs, 0, "q");
  const kv = expect.kvAt(inputs, 1, "state");
  expect.rank(q, 2, "q");
  if (!isFloat(q.dtype)) expect.fail(`q must be a float, got ${q.dtype}`);
  const heads = expect.int(attrs, "heads", 1);
  expect.real(attrs, "scale");
  if (heads % kv.heads !== 0) expect.fail(`${heads} query heads do not divide over ${kv.heads} KV heads`);
  expect.sameDim(expect.dimAt(q, 1), heads * kv.dim, `columns of q and ${heads} heads of ${kv.dim}`);
  pageInputs(expect.tensorAt(inputs, 2, "pages"), expect.tensorAt(inputs, 3, "position"), q);
  return [q];
};

/** Cached tokens that a row of attention reads, for costs: the entry `context` of the symbols, else 1. */
const contextOf = (symbols: Symbols): number => symbols.get("context") ?? 1;

const attentionCost = (inputs: readonly Type[], symbols: Symbols): Cost => {
  const [q, kv, pages, position] = inputs as readonly [TensorType, KvType, TensorType, TensorType];
  const rows = elements(position, symbols);
  const scales = isQuantised(kv) ? 8 * kv.heads : 0;
  const cached = rows * contextOf(symbols) * (2 * kv.heads * kv.dim * dtypeBytes(kv.dtype) + scales);
  return {
    flops: 4 * elements(q, symbols) * contextOf(symbols),
    bytes: 2 * bytesOf(q, symbols) + bytesOf(pages, symbols) + bytesOf(position, symbols) + cached,
  };
};

const attentionSample = (
  name: string,
  dtype: KvType["dtype"],
  heads: number,
  kvHeads: number,
  dim: number,
  q: DType = "bf16",
  tokens = 5,
): Sample => ({
  name,
  inputs: [tensor(q, ["T", heads * dim]), { kind: "kv", dtype, heads: kvHeads, dim }, ...oneSequence(tokens)],
  attrs: { heads, scale: 1 / Math.sqrt(dim) },
  values: ["normal", "normal", "column", "row"],
  symbols: { T: tokens },
});

export const attention: Knowledge = {
  name: "attention",
  summary:
    "q[T, heads*dim], state, pages i32[T, P], position i32[T] -> [T, heads*dim]: softmax(scale q k) v over cache positions 0..position[t]; " +
    "query head h uses KV head floor(h * KV heads / heads)",
  attrs: { heads: "query heads", scale: "what q k is multiplied by" },
  inputs: attentionNames,
  rowwise: "state",
  infer: inferAttention,
  evaluate(inputs, attrs, [out]) {
    const [q, state, pages, position] = inputs as readonly [Tensor, KvState, Tensor, Tensor];
    const type = out as ConcreteTensor;
    const result = new Float64Array(q.data.length);
    const round = rounder(type.dtype);
    position.data.forEach((p, t) => {
      const cached: (KvRow | undefined)[] = [];
      for (let i = 0; i <= p; i++) cached.push(state.rows.get(place(state, pages, t, i, "attention")));
      attendRow(q, t, cached, attrs, result);
    });
    return [tensorOf(type, result.map(round))];
  },
  cost: (inputs, _, symbols) => attentionCost(inputs, symbols),
  samples: [
    attentionSample("one KV head", "bf16", 8, 1, 32),
    attentionSample("grouped heads", "bf16", 6, 2, 22),
    attentionSample("f32, as many KV heads", "f32", 3, 3, 16, "f32"),
    attentionSample("fp8 cache", "e4m3", 4, 1, 64),
    // more rows than processors, which kernels may take some at a time
    attentionSample("a chunk", "bf16", 8, 1, 64, "bf16", 139),
    attentionSample("a chunk, two KV heads", "bf16", 20, 2, 128, "bf16", 75),
    attentionSample("a chunk, fp8 cache", "e4m3", 8, 1, 64, "bf16", 67),
    attentionSample("a chunk, int8 cache", "i8", 8, 1, 64, "bf16", 67),
    attentionSample("int8 cache", "i8", 4, 2, 32),
  ],
};

/** Attention of all heads of row t, in double. A token that was never written is zero, as fresh pages are. */
const attendRow = (q: Tensor, t: number, cached: readonly (KvRow | undefined)[], attrs: Attrs, result: Float64Array): void => {
  const heads = expect.int(attrs, "heads", 1);
  const scale = expect.real(attrs, "scale");
  const columns = q.shape[1] as number;
  const dim = columns / heads;
  const kvHeads = (cached.find((row) => row !== undefined)?.k.length ?? dim) / dim;
  for (let h = 0; h < heads; h++) {
    const head = Math.floor((h * kvHeads) / heads);
    const from = t * columns + h * dim;
    const scores = cached.map((row) => {
      let dot = 0;
      if (row) for (let i = 0; i < dim; i++) dot += (q.data[from + i] as number) * (row.k[head * dim + i] as number);
      return scale * dot * (row?.kScale?.[head] ?? 1);
    });
    const max = scores.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
    const powers = scores.map((s) => Math.exp(s - max));
    const sum = powers.reduce((a, b) => a + b, 0);
    cached.forEach((row, j) => {
      if (!row) return;
      const weight = ((powers[j] as number) / sum) * (row.vScale?.[head] ?? 1);
      for (let i = 0; i < dim; i++) result[from + i] = (result[from + i] as number) + weight * (row.v[head * dim + i] as number);
    });
  }
};
