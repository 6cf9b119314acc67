/** Attention of com.microsoft, ONNX Runtime's own operators. Formulas are those of its CPU kernels. */
import { addDim, type Dim, divDim, product, subDim } from "../../../../ir/dim.ts";
import type { Call, Lowering } from "../call.ts";
import type { Emitter, Item } from "../emitter.ts";
import {
  band,
  dimAt,
  fitted,
  headsFirst,
  headsLast,
  masked,
  mixed,
  padded,
  scoresOf,
  sharedHeads,
  softcapped,
  softmax,
  turned,
  turnedAsIs,
  written,
} from "./attention.ts";
import { binary, wide } from "./elementwise.ts";
import { matmul } from "./products.ts";

const plus = (e: Emitter, x: Item, d: Dim): Item => (d === 0 ? x : binary(e, "add", x, e.dims([d], "i64", [])));
const scaleOf = (c: Call, width: Dim): number => c.float("scale", 0) || 1 / Math.sqrt(width as number);

/** What position_ids of shape [B, S], or the first token's in one element, are. */
const positions = (e: Emitter, ids: Item, rows: Dim): Item => {
  if (ids.type.shape.length === 2) return ids;
  return binary(e, "add", e.reshape(ids, [1, 1]), e.iota([1, rows], 1));
};

const rotary: Lowering = (c) => {
  const { e } = c;
  if (c.int("is_packed_batching", 0) !== 0) c.fail("is_packed_batching is not supported");
  const flat = c.rank(0) === 3;
  const rows = dimAt(c.x0, flat ? 1 : 2);
  const size = (dimAt(c.x(2), 1) as number) * 2;
  const heads = flat ? c.int("num_heads", 0) || (divDim(dimAt(c.x0, 2), size) as number) : (dimAt(c.x0, 1) as number);
  const ids = positions(e, c.x(1), rows);
  const [cos, sin] = [2, 3].map((i) => e.op("take", [c.x(i), ids], { axis: 0 })) as [Item, Item];
  return turnedAsIs(e, c.x0, cos, sin, heads, size, c.flag("interleaved", false));
};

/** Keys or values of the past, then new ones: of batch b, from place past[b, 0] on. new[B, K, S, D] -> [B, K, T, D] */
const extended = (e: Emitter, old: Item | undefined, fresh: Item, past: Item, total: Dim): Item => {
  if (old === undefined || dimAt(old, 2) === 0) return fresh;
  const [batch, heads, rows, width] = fresh.type.shape as [Dim, Dim, Dim, Dim];
  const capacity = dimAt(old, 2);
  if (batch === 1 && total === addDim(capacity, rows)) return e.concat([old, fresh], 2);
  if (capacity === total || (typeof capacity === "number" && typeof total === "number" && capacity > total))
    return written(e, old, fresh, 2, e.reshape(past, [batch]), false);
  // place t is the past's t, then what is new, then 0
  const all = e.concat([old, fresh], 2);
  const length = addDim(capacity, rows);
  const n = (d: Dim): Item => e.dims([d], "i64", []);
  const t = e.iota([1, total], 1);
  const since = binary(e, "sub", t, past);
  const used = e.op("less", [since, n(rows)]);
  const ofNew = e.op("where", [used, plus(e, since, capacity), n(0)]);
  const place = e.reshape(e.op("where", [e.op("less", [t, past]), t, ofNew]), [batch, 1, total]);
  const head = binary(e, "add", binary(e, "mul", e.iota([batch, 1, 1], 0), n(heads)), e.iota([1, heads, 1], 1));
  const index = binary(e, "add", binary(e, "mul", head, n(length)), place);
  const taken = e.op("take", [e.reshape(all, [product([batch, heads, length]), width]), index], { axis: 0 });
  return e.op("where", [e.reshape(used, [batch, 1, total, 1]), taken, e.number(0, taken.type.dtype)]);
};

/** softmax with one more key that has a score, of each head, and no value. */
const withSink = (c: Call, scores: Item, sink: Item | undefined): Item => {
  if (sink === undefined) return softmax(c, scores);
  const { shape, dtype } = scores.type;
  const column = c.e.broadcast(c.e.reshape(c.e.cast(sink, dtype), [dimAt(sink, 0), 1, 1]), [...shape.slice(0, -1), 1]);
  return c.e.slice(softmax(c, c.e.concat([scores, column], 3)), 3, 0, shape[3] as Dim);
};

const groupQuery: Lowering = (c) => {
  const { e } = c;
  const [heads, shared] = [c.int("num_heads"), c.int("kv_num_heads")];
  sharedHeads(c, heads, shared);
  if (c.int("sliding_window_cache", 0) !== 0) c.fail("sliding_window_cache is not supported");
  for (const name of ["k_quant_type", "v_quant_type"]) if (c.text(name, "NONE") !== "NONE") c.fail(`${name} must be NONE`);
  const { dtype } = c.x0.type;
  const [batch, rows, columns] = c.shape(0) as [Dim, Dim, Dim];
  const parts = c.has(1) ? heads : heads + 2 * shared;
  const width = divDim(columns, parts) as number;
  const part = (from: number, count: number): Item => e.slice(c.x0, 2, from * width, count * width);
  const [q, k, v] = c.has(1) ? [c.x0, c.x(1), c.x(2)] : [part(0, heads), part(heads, shared), part(heads + shared, shared)];

  // tokens before these, of each batch: none in a prompt, even where its end is padded
  const last = e.reshape(e.cast(c.x(5), "i64"), [batch, 1]);
  const past = binary(e, "maximum", plus(e, last, subDim(1, rows)), e.number(0, "i64"));
  const normed = (x: Item, i: number, own: number): Item => {
    if (!c.has(i)) return x;
    const apart = e.reshape(x, [batch, rows, own, width]);
    return e.reshape(e.op("rms_norm", [apart, e.cast(c.x(i), dtype)], { eps: c.float("qk_norm_epsilon", 1e-6) }), x.type.shape);
  };
  const turns = c.flag("do_rotary", false);
  const ids = c.optional(9) ?? (rows === 1 ? past : binary(e, "add", past, e.iota([1, rows], 1)));
  const [cos, sin] = turns ? [7, 8].map((i) => e.op("take", [c.x(i), ids], { axis: 0 })) : [];
  const turn = (x: Item, own: number): Item => {
    if (cos === undefined || sin === undefined) return x;
    return turned(e, x, cos, sin, own, 2 * (dimAt(cos, 2) as number), c.flag("rotary_interleaved", false));
  };
  const inHeads = headsFirst(e, turn(normed(q, 14, heads), heads), heads);
  const total = c.has(3) ? c.size(6) : rows;
  const present = (old: number, x: Item): Item => {
    const cache = c.optional(old);
    const fresh = headsFirst(e, x, shared);
    return extended(e, cache, cache ? e.cast(fresh, cache.type.dtype) : fresh, past, total);
  };
  const [keys, values] = [present(3, turn(normed(k, 15, shared), shared)), present(4, v)];

  const raw = scoresOf(e, wide(e, inHeads), wide(e, keys));
  const scaled = binary(e, "mul", raw, e.number(scaleOf(c, width), raw.type.dtype));
  const capped = softcapped(e, scaled, c.float("softcap", 0));
  const count = dimAt(keys, 2);
  const window = c.int("local_window_size", -1);
  const from = e.reshape(past, [batch, 1, 1, 1]);
  const filled = (): Item => e.op("less_equal", [e.iota([1, 1, 1, count], 3), e.reshape(last, [batch, 1, 1, 1])]);
  const allowed = c.flag("causal", true) ? band(e, rows, count, from, window > 0 ? window - 1 : undefined, 0) : filled();
  const bias = c.optional(10);
  const biased = bias ? binary(e, "add", capped, padded(e, wide(e, bias), rows, count, 0)) : capped;
  const sink = c.optional(11) ?? (c.int("smooth_softmax", -1) === 1 ? e.broadcast(e.number(0, "f32"), [heads]) : undefined);
  const p = withSink(c, masked(e, biased, { allowed, bias: undefined }), sink);
  const y = e.cast(headsLast(e, mixed(e, p, wide(e, values))), dtype);
  // before softmax: 0 where a key is not seen
  const scores = (): Item => (allowed ? e.op("where", [allowed, biased, e.number(0, "f32")]) : biased);
  const shown = c.wants(3) ? [undefined, scores(), p][c.int("qk_output", 0)] : undefined;
  return [y, keys, values, shown && e.cast(shown, dtype)];
};

/** Q, K and V as [B, S, H * D], or K and V as they are where they have heads; `bias` is added to each. */
const separated = (c: Call, heads: number): { q: Item; k: Item; v: Item } => {
  const { e } = c;
  const of = (packed: Item, i: number): Item => {
    const [batch, rows, , , width] = packed.type.shape as [Dim, Dim, Dim, Dim, Dim];
    return e.reshape(e.slice(packed, 3, i, 1), [batch, rows, (width as number) * heads]);
  };
  let [q, k, v] = [c.x0, c.optional(1) ?? c.x0, c.optional(2) ?? c.x0];
  if (!c.has(1) && c.rank(0) !== 5) c.fail("query without key must have the axes [B, S, heads, 3, D]");
  if (!c.has(1)) [q, k, v] = [of(c.x0, 0), of(c.x0, 1), of(c.x0, 2)];
  else if (c.rank(1) === 5) [k, v] = [of(c.x(1), 0), of(c.x(1), 1)];
  else if (!c.has(2)) c.fail("value is missing");
  const bias = c.optional(3);
  if (bias === undefined) return { q, k, v };
  const sizes = [q, k, v].map((x) => dimAt(x, -1) as number) as [number, number, number];
  const added = (x: Item, start: number, size: number): Item =>
    x.type.shape.length === 3 ? binary(e, "add", x, e.slice(bias, 0, start, size)) : x;
  const start = [0, sizes[0], sizes[0] + sizes[1]] as const;
  return { q: added(q, 0, sizes[0]), k: added(k, start[1], sizes[1]), v: added(v, start[2], sizes[2]) };
};

/** What a padding mask adds to the scores: nothing, or `mask_filter_value`. */
const paddingBias = (c: Call, mask: Item, keys: Dim): Item => {
  const { e } = c;
  const { shape } = mask.type;
  const [n] = shape as [Dim];
  const whole = e.cast(mask, "i64");
  let seen: Item;
  if (shape.length === 1 && n === c.shape(0)[0])
    seen = e.op("less", [e.iota([1, 1, 1, keys], 3), e.reshape(whole, [n, 1, 1, 1])]);
  else if (shape.length === 1) return c.fail("a key_padding_mask of starts and ends is not supported");
  else {
    const axes: readonly Dim[] = shape.length === 2 ? [n, 1, 1, shape[1] as Dim] : [n, 1, shape[1] as Dim, shape[2] as Dim];
    seen = e.op("less", [e.number(0, "i64"), e.reshape(whole, axes)]);
  }
  return e.op("where", [seen, e.number(0, "f32"), e.number(c.float("mask_filter_value", -10000), "f32")]);
};

const multiHead: Lowering = (c) => {
  const { e } = c;
  const heads = c.int("num_heads");
  if (c.has(8) || c.has(9)) c.fail("past_sequence_length and cache_indirection are not supported");
  const { q, k, v } = separated(c, heads);
  const inHeads = (x: Item): Item => (x.type.shape.length === 4 ? x : headsFirst(e, x, heads));
  const query = inHeads(q);
  const grown = (old: number, x: Item): Item => (c.has(old) ? e.concat([c.x(old), inHeads(x)], 2) : inHeads(x));
  const [keys, values] = [grown(6, k), grown(7, v)];
  const raw = scoresOf(e, wide(e, query), wide(e, keys));
  const scaled = binary(e, "mul", raw, e.number(scaleOf(c, dimAt(query, 3)), raw.type.dtype));
  const count = dimAt(keys, 2);
  const offset = c.has(6) ? e.dims([dimAt(c.x(6), 2)], "i64", []) : undefined;
  const allowed = c.flag("unidirectional", false) ? band(e, dimAt(query, 2), count, offset, undefined, 0) : undefined;
  const own = c.optional(5) && fitted(e, wide(e, c.x(5)), raw.type.shape);
  const biases = [c.optional(4) && paddingBias(c, c.x(4), count), own].filter((b) => b !== undefined);
  const bias = biases.length === 0 ? undefined : biases.reduce((a, b) => binary(e, "add", a, b));
  const p = softmax(c, masked(e, scaled, { allowed, bias }));
  const y = headsLast(e, mixed(e, p, wide(e, values)));
  return [e.cast(y, c.dtype(0)), keys, values, e.cast(p, c.dtype(0))];
};

/** One projection for q, k and v; the past and the present hold keys and values together: [2, B, heads, T, D]. */
const packedAttention: Lowering = (c) => {
  const { e } = c;
  if (c.flag("do_rotary", false) || c.has(6)) c.fail("do_rotary and past_sequence_length are not supported");
  const heads = c.int("num_heads");
  const { dtype } = c.x0.type;
  const columns = dimAt(c.x(1), 1) as number;
  const sizes = c.ints("qkv_hidden_sizes") ?? [columns / 3, columns / 3, columns / 3];
  if (sizes.length !== 3 || sizes.reduce((a, b) => a + b, 0) !== columns || sizes.some((n) => n % heads !== 0))
    c.fail(`weights of ${columns} columns are not q, k and v of ${heads} heads`);
  const product = matmul(c, wide(e, c.x0), wide(e, c.x(1)));
  const projected = c.has(2) ? binary(e, "add", product, wide(e, c.x(2))) : product;
  let start = 0;
  const [q, k, v] = sizes.map((size) => {
    const part = e.cast(e.slice(projected, 2, start, size), dtype);
    start += size;
    return headsFirst(e, part, heads);
  }) as [Item, Item, Item];
  const grown = (i: number, x: Item): Item => {
    if (!c.has(4)) return x;
    const past = e.slice(c.x(4), 0, i, 1);
    return e.concat([e.reshape(past, past.type.shape.slice(1)), x], 2);
  };
  const [keys, values] = [grown(0, k), grown(1, v)];
  const raw = scoresOf(e, wide(e, q), wide(e, keys));
  const scaled = binary(e, "mul", raw, e.number(scaleOf(c, dimAt(q, 3)), raw.type.dtype));
  const count = dimAt(keys, 2);
  const offset = c.has(4) ? e.dims([dimAt(c.x(4), 3)], "i64", []) : undefined;
  const allowed = c.flag("unidirectional", false) ? band(e, dimAt(q, 2), count, offset, undefined, 0) : undefined;
  const own = c.optional(5) && fitted(e, wide(e, c.x(5)), raw.type.shape);
  const biases = [c.optional(3) && paddingBias(c, c.x(3), count), own].filter((b) => b !== undefined);
  const bias = biases.length === 0 ? undefined : biases.reduce((a, b) => binary(e, "add", a, b));
  const p = softmax(c, masked(e, scaled, { allowed, bias }));
  const apart = (x: Item): Item => e.reshape(x, [1, ...x.type.shape]);
  const present = c.wants(1) ? e.concat([apart(keys), apart(values)], 0) : undefined;
  return [e.cast(headsLast(e, mixed(e, p, wide(e, values))), dtype), present];
};

export const contribAttention: Readonly<Record<string, Lowering>> = {
  RotaryEmbedding: rotary,
  GroupQueryAttention: groupQuery,
  MultiHeadAttention: multiHead,
  Attention: packedAttention,
};
