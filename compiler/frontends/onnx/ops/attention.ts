/** Attention, positions, caches and recurrences. Formulas are those of ONNX's definitions of the operators. */
import { type Dim, divDim, mulDim, product, subDim } from "../../../../ir/dim.ts";
import type { DType } from "../../../../ir/type.ts";
import type { Call, Lowering } from "../call.ts";
import type { Emitter, Item } from "../emitter.ts";
import { irDType } from "../types.ts";
import { binary, inWide, typeOf, wide } from "./elementwise.ts";
import { softmaxOfRows } from "./normalise.ts";

// --- heads ---

const dimsOf = (x: Item): readonly Dim[] => x.type.shape;
export const dimAt = (x: Item, axis: number): Dim => x.type.shape.at(axis) as Dim;

/** x[B, S, heads * D] -> [B, heads, S, D] */
export const headsFirst = (e: Emitter, x: Item, heads: number): Item => {
  const [batch, rows, columns] = dimsOf(x) as [Dim, Dim, Dim];
  return e.transpose(e.reshape(x, [batch, rows, heads, divDim(columns, heads)]), [0, 2, 1, 3]);
};
/** x[B, heads, S, D] -> [B, S, heads * D] */
export const headsLast = (e: Emitter, x: Item): Item => {
  const [batch, heads, rows, columns] = dimsOf(x) as [Dim, Dim, Dim, Dim];
  return e.reshape(e.transpose(x, [0, 2, 1, 3]), [batch, rows, mulDim(heads, columns)]);
};

/** Rows of heads that share a matrix, one after another: x[B, H, S, D] -> [B, heads, H / heads * S, D]. */
const grouped = (e: Emitter, x: Item, heads: Dim): Item => {
  const [batch, own, rows, columns] = dimsOf(x) as [Dim, Dim, Dim, Dim];
  if (own === heads) return x;
  return e.reshape(x, [batch, heads, divDim(mulDim(own, rows), heads as number), columns]);
};
/** x[B, H, S, M] times m[B, K, M, N] -> [B, H, S, N]; H / K heads after another share a matrix. */
const perHead = (e: Emitter, x: Item, m: Item): Item => {
  const [batch, heads, rows] = dimsOf(x) as [Dim, Dim, Dim];
  const product = e.op("matmul", [grouped(e, x, dimAt(m, 1)), m]);
  return e.reshape(product, [batch, heads, rows, dimAt(m, 3)]);
};
/** q[B, H, S, D], k[B, K, T, D] -> q times k transposed [B, H, S, T] */
export const scoresOf = (e: Emitter, q: Item, k: Item): Item => perHead(e, q, e.transpose(k, [0, 1, 3, 2]));
/** p[B, H, S, T], v[B, K, T, D] -> [B, H, S, D] */
export const mixed = (e: Emitter, p: Item, v: Item): Item => perHead(e, p, v);

export const sharedHeads = (c: Call, heads: Dim, shared: Dim): void => {
  if (typeof heads !== "number" || typeof shared !== "number") c.fail("how many heads there are must be known");
  else if (shared < 1 || heads % shared !== 0) c.fail(`${heads} heads of queries do not share ${shared} heads of keys evenly`);
};

// --- masks and softmax ---

/** Which keys a query sees, and what is added to the score. */
export interface Mask {
  readonly allowed: Item | undefined;
  readonly bias: Item | undefined;
}
export const both = (e: Emitter, a: Item | undefined, b: Item | undefined): Item | undefined =>
  a && b ? binary(e, "and", a, b) : (a ?? b);

export const masked = (e: Emitter, scores: Item, { allowed, bias }: Mask): Item => {
  const added = bias ? binary(e, "add", scores, bias) : scores;
  return allowed ? e.op("where", [allowed, added, e.number(-Infinity, scores.type.dtype)]) : added;
};
/** Queries that see no key, [..., S, 1]: all that is added to their scores is -infinity. */
const blind = (e: Emitter, { allowed, bias }: Mask, dtype: DType): Item => {
  const none = e.number(-Infinity, dtype);
  const open = allowed ? e.op("where", [allowed, bias ?? e.number(0, dtype), none]) : (bias as Item);
  return e.op("equal", [e.op("reduce", [open], { fn: "max" }), none]);
};
/** softmax over the last axis, in f32 or f64, rounded to x's dtype */
export const softmax = (c: Call, x: Item): Item => c.e.cast(softmaxOfRows(c, wide(c.e, x)), x.type.dtype);
/** limit * tanh(x / limit), for a limit above 0 */
export const softcapped = (e: Emitter, x: Item, limit: number): Item => {
  if (limit <= 0) return x;
  const cap = e.number(limit, x.type.dtype);
  return e.op("mul", [e.op("tanh", [e.op("div", [x, cap])]), cap]);
};

/**
 * The keys that query i of `queries` sees among `keys`, [..., S, T]: with its own place p = offset + i, those from p - left to p + right, where
 * a bound of undefined does not bound.
 */
export const band = (
  e: Emitter,
  queries: Dim,
  keys: Dim,
  offset: Item | undefined,
  left: number | undefined,
  right: number | undefined,
): Item | undefined => {
  const own = e.iota([queries, 1], 0);
  const place = offset === undefined ? own : queries === 1 ? offset : binary(e, "add", own, offset);
  const key = e.iota([1, keys], 1);
  const from = (by: number): Item => (by === 0 ? place : binary(e, "add", place, e.number(by, "i64")));
  const upper = right === undefined ? undefined : e.op("less_equal", [key, from(right)]);
  const lower = left === undefined ? undefined : e.op("less_equal", [from(-left), key]);
  return both(e, upper, lower);
};

/** x where its sizes have other names than those of `shape`, aligned at the last axis, but are the same; axes of 1 stay. */
export const fitted = (e: Emitter, x: Item, shape: readonly Dim[]): Item => {
  const lead = shape.length - x.type.shape.length;
  const one = (d: Dim, i: number): Dim => {
    const other = shape[lead + i] ?? d;
    return d === 1 || (typeof d === "number" && typeof other === "number") ? d : other;
  };
  return e.reshape(x, x.type.shape.map(one));
};
/** A mask [..., queries, keys] whose last axis may be shorter than the keys are, with `rest` for the others. */
export const padded = (e: Emitter, mask: Item, queries: Dim, keys: Dim, rest: number): Item => {
  const own = dimAt(mask, -1);
  if (typeof own !== "number" || typeof keys !== "number" || own >= keys) return fitted(e, mask, [queries, keys]);
  const others = e.broadcast(e.number(rest, mask.type.dtype), [...dimsOf(mask).slice(0, -1), keys - own]);
  return e.concat([mask, others], mask.type.shape.length - 1);
};

// --- Attention ---

/** dtype that products and sums are made in */
const widest = (xs: readonly Item[]): DType => (xs.some((x) => x.type.dtype === "f64") ? "f64" : "f32");

const attention: Lowering = (c) => {
  const { e } = c;
  const flat = c.rank(0) === 3;
  const inHeads = (i: number, heads: string): Item => (flat ? headsFirst(e, c.x(i), c.int(heads)) : c.x(i));
  const [q, newK, newV] = [inHeads(0, "q_num_heads"), inHeads(1, "kv_num_heads"), inHeads(2, "kv_num_heads")];
  for (const x of [q, newK, newV]) if (x.type.shape.length !== 4) c.fail("Q, K and V must have 3 axes each, or 4");
  if (c.has(4) !== c.has(5)) c.fail("past_key and past_value must be given together");
  if (c.has(6) && c.has(4)) c.fail("nonpad_kv_seqlen and past_key must not both be given");
  const k = c.has(4) ? e.concat([c.x(4), newK], 2) : newK;
  const v = c.has(5) ? e.concat([c.x(5), newV], 2) : newV;
  sharedHeads(c, dimAt(q, 1), dimAt(k, 1));
  const work = widest([q, k, v]);
  const [queries, keys] = [dimAt(q, 2), dimAt(k, 2)];

  const scale = c.hasAttribute("scale") ? c.float("scale") : 1 / Math.sqrt(dimAt(q, 3) as number);
  const root = e.number(Math.sqrt(scale), work);
  const [scaledQ, scaledK] = [q, k].map((x) => e.op("mul", [e.cast(x, work), root])) as [Item, Item];
  const raw = scoresOf(e, scaledQ, scaledK);
  const capped = softcapped(e, raw, c.float("softcap", 0));

  const mask = attentionMask(c, queries, keys, work);
  const scores = masked(e, capped, mask);
  const precision = c.hasAttribute("softmax_precision") ? irDType(typeOf(c, c.int("softmax_precision"))) : work;
  const free = softmax(c, e.cast(scores, precision));
  // without a mask of the model's, key 0 is seen by all
  const guarded = c.has(3) || c.has(6) || c.int("left_window_size", -1) >= 0 || c.int("right_window_size", -1) >= 0;
  const p = guarded && (mask.allowed || mask.bias) ? e.op("where", [blind(e, mask, work), e.number(0, precision), free]) : free;
  const y = e.cast(mixed(e, e.cast(p, work), e.cast(v, work)), q.type.dtype);
  const shown =
    [raw, capped, scores, p][c.int("qk_matmul_output_mode", 0)] ?? c.fail("qk_matmul_output_mode must be 0, 1, 2 or 3");
  return [flat ? headsLast(e, y) : y, k, v, c.wants(3) ? e.cast(shown, q.type.dtype) : undefined];
};

const attentionMask = (c: Call, queries: Dim, keys: Dim, work: DType): Mask => {
  const { e } = c;
  const nonpad = c.optional(6);
  const length = nonpad && e.reshape(e.cast(nonpad, "i64"), [dimAt(nonpad, 0), 1, 1, 1]);
  const past = c.optional(4);
  const offset = length ? e.op("sub", [length, e.dims([queries], "i64", [])]) : past && e.dims([dimAt(past, 2)], "i64", []);
  const bound = (name: string): number | undefined => {
    const size = c.int(name, -1);
    return size < 0 ? undefined : size;
  };
  const [left, right] = [bound("left_window_size"), bound("right_window_size")];
  const causal = c.flag("is_causal", false);
  const bounded = left !== undefined || right !== undefined || causal;
  const seen = bounded ? band(e, queries, keys, offset, left, causal ? 0 : right) : undefined;
  const filled = length && e.op("less", [e.iota([1, 1, 1, keys], 3), length]);
  const given = c.optional(3);
  const mask = given && padded(e, given, queries, keys, given.type.dtype === "bool" ? 0 : -Infinity);
  const isBool = mask?.type.dtype === "bool";
  return {
    allowed: both(e, both(e, seen, filled), isBool ? mask : undefined),
    bias: mask && !isBool ? e.cast(mask, work) : undefined,
  };
};

/** ai.onnx.preview */
const flexAttention: Lowering = (c) => {
  const { e } = c;
  const [q, k, v] = [c.x(0), c.x(1), c.x(2)];
  sharedHeads(c, dimAt(q, 1), dimAt(k, 1));
  const own = q.type.dtype;
  const precision = c.hasAttribute("softmax_precision")
    ? irDType(typeOf(c, c.int("softmax_precision")))
    : own === "f64"
      ? "f64"
      : "f32";
  const work = widest([q]);
  const scale = c.hasAttribute("scale") ? c.float("scale") : 1 / Math.sqrt(dimAt(q, 3) as number);
  const root = e.number(Math.fround(Math.sqrt(Math.fround(scale))), work);
  const [scaledQ, scaledK] = [q, k].map((x) => e.op("mul", [e.cast(x, work), root])) as [Item, Item];
  const changed = (name: string, x: Item): Item => {
    if (!c.hasAttribute(name)) return x;
    const results = c.run(c.graph(name), [x]);
    return e.cast(results[0] ?? c.fail(`${name} has no result`), precision);
  };
  const scores = changed("score_mod", e.cast(scoresOf(e, scaledQ, scaledK), precision));
  const p = changed("prob_mod", softmax(c, scores));
  return e.cast(mixed(e, wide(e, p), e.cast(v, wide(e, p).type.dtype)), own);
};

// --- rotary ---

/**
 * Positions turned into x: per head, pairs (a, b) -> (a cos - b sin, a sin + b cos), halves of the first `size` elements or neighbours
 * (`interleaved`); the rest stays. x[B, S, heads * D], cos and sin [B or 1, S, size / 2].
 */
export const turned = (e: Emitter, x: Item, cos: Item, sin: Item, heads: number, size: number, interleaved: boolean): Item => {
  const [batch, rows, columns] = dimsOf(x) as [Dim, Dim, Dim];
  const half = size / 2;
  const [cosines, sines] = [cos, sin].map((t) => fitted(e, t, [batch, rows, half])) as [Item, Item];
  if (divDim(columns, heads) === size && !interleaved && x.type.dtype !== "f64") {
    const count = mulDim(batch, rows);
    const [c, s] = [cosines, sines].map((t) => e.reshape(e.broadcast(e.cast(t, "f32"), [batch, rows, half]), [count, half]));
    const table = e.concat([c as Item, s as Item], 1);
    const turnedRows = e.op("rotary", [e.reshape(x, [count, columns]), table, e.iota([count], 0, "i32")], { heads, dim: size });
    return e.reshape(turnedRows, [batch, rows, columns]);
  }
  const { dtype } = x.type;
  const parts = e.reshape(x, [batch, rows, heads, divDim(columns, heads)]);
  const rest = subDim(divDim(columns, heads), size);
  const head = wide(e, e.slice(parts, 3, 0, size));
  const step = interleaved ? 2 : 1;
  const [a, b] = [e.slice(head, 3, 0, half, step), e.slice(head, 3, interleaved ? 1 : half, half, step)];
  const [c, s] = [cosines, sines].map((t) => e.cast(e.reshape(t, [dimAt(t, 0), dimAt(t, 1), 1, half]), head.type.dtype)) as [
    Item,
    Item,
  ];
  const times = (u: Item, w: Item): Item => binary(e, "mul", u, w);
  const real = e.op("sub", [times(a, c), times(b, s)]);
  const imaginary = e.op("add", [times(a, s), times(b, c)]);
  const joined = interleaved
    ? e.reshape(
        e.concat(
          [real, imaginary].map((y) => e.reshape(y, [batch, rows, heads, half, 1])),
          4,
        ),
        [batch, rows, heads, size],
      )
    : e.concat([real, imaginary], 3);
  const back = e.cast(joined, dtype);
  const whole = rest === 0 ? back : e.concat([back, e.slice(parts, 3, size, rest)], 3);
  return e.reshape(whole, [batch, rows, columns]);
};

/** As `turned`, of x[B, S, heads * D] or [B, heads, S, D]. */
export const turnedAsIs = (
  e: Emitter,
  x: Item,
  cos: Item,
  sin: Item,
  heads: number,
  size: number,
  interleaved: boolean,
): Item => {
  if (x.type.shape.length === 3) return turned(e, x, cos, sin, heads, size, interleaved);
  return headsFirst(e, turned(e, headsLast(e, x), cos, sin, heads, size, interleaved), heads);
};

const rotaryEmbedding: Lowering = (c) => {
  const { e } = c;
  const x = c.x0;
  const flat = c.rank(0) === 3;
  const heads = flat ? c.int("num_heads") : (dimAt(x, 1) as number);
  const width = flat ? divDim(dimAt(x, 2), heads) : dimAt(x, 3);
  const size = c.int("rotary_embedding_dim", 0) || (width as number);
  const position = c.optional(3);
  const rows = (i: number): Item => (position ? e.op("take", [c.x(i), position], { axis: 0 }) : c.x(i));
  const [cos, sin] = [rows(1), rows(2)];
  for (const t of [cos, sin])
    if (t.type.shape.length !== 3 || dimAt(t, 2) !== size / 2)
      c.fail(`caches must have ${size / 2} columns and, without position_ids, a row for each token`);
  return turnedAsIs(e, x, cos, sin, heads, size, c.flag("interleaved", false));
};

// --- caches ---

/** past[B, ..., M, ...] with update[B, ..., S, ...] from place from[b] of the axis on; `circular`: places beyond M start at 0 again. */
export const written = (e: Emitter, past: Item, update: Item, axis: number, from: Item | undefined, circular: boolean): Item => {
  const { shape } = update.type;
  const start = from && e.reshape(from, [dimAt(from, 0), ...shape.slice(1).map((): Dim => 1)]);
  const places = shape.map((d, i) => {
    const own = e.iota(
      shape.map((_, j): Dim => (j === i ? d : 1)),
      i,
    );
    if (i !== axis || start === undefined) return own;
    const at = binary(e, "add", own, start);
    return circular ? binary(e, "remainder", at, e.dims([dimAt(past, axis)], "i64", [])) : at;
  });
  const index = places
    .map((at, i) => binary(e, "mul", at, e.dims([product(past.type.shape.slice(i + 1))], "i64", [])))
    .reduce((x, y) => binary(e, "add", x, y));
  const flat = (x: Item): Item => e.reshape(x, [product(x.type.shape)]);
  return e.reshape(e.op("put", [flat(past), flat(e.broadcast(index, shape)), flat(update)]), past.type.shape);
};

const tensorScatter: Lowering = (c) => {
  const mode = c.text("mode", "linear");
  if (mode !== "linear" && mode !== "circular") c.fail(`mode must be linear or circular, got '${mode}'`);
  return written(c.e, c.x(0), c.x(1), c.axis(c.int("axis", -2), c.rank(0)), c.optional(2), mode === "circular");
};

// --- recurrences ---

/** S[B, K, d, m] of each token from the one before; what the queries read of it. Tokens are unrolled. */
const linearAttention: Lowering = (c) => {
  const { e } = c;
  const [heads, shared] = [c.int("q_num_heads"), c.int("kv_num_heads")];
  sharedHeads(c, heads, shared);
  const rule = c.text("update_rule", "gated_delta");
  if (!["linear", "gated", "delta", "gated_delta"].includes(rule)) c.fail(`update_rule is '${rule}'`);
  const [gated, delta] = [rule.startsWith("gated"), rule.endsWith("delta")];
  if (c.has(4) !== gated) c.fail(`update_rule ${rule} ${gated ? "needs" : "has no"} decay`);
  if (c.has(5) !== delta) c.fail(`update_rule ${rule} ${delta ? "needs" : "has no"} beta`);
  const [batch, tokens] = c.shape(0) as [Dim, Dim];
  if (typeof tokens !== "number") return c.fail("how many tokens there are must be a number: they are put one after another");
  const x = [c.x(0), c.x(1), c.x(2)].map((t) => e.cast(t, "f32")) as [Item, Item, Item];
  const [dk, dv] = [divDim(dimAt(x[0], 2), heads), divDim(dimAt(x[2], 2), shared)];
  const scale = c.float("scale", 0) || 1 / Math.sqrt(dk as number);
  /** token t of a packed input, in the shape of a state's */
  const at = (packed: Item, t: number, shape: readonly Dim[]): Item => e.reshape(e.slice(packed, 1, t, 1), [batch, ...shape]);
  const factor = (packed: Item, t: number): Item => {
    const columns = dimAt(packed, 2);
    if (columns === shared) return at(packed, t, [shared, 1, 1]);
    return columns === 1 ? at(packed, t, [1, 1, 1]) : at(packed, t, [shared, dk, 1]);
  };
  const decay = c.optional(4) && e.op("exp", [e.cast(c.x(4), "f32")]);
  const beta = c.optional(5) && e.cast(c.x(5), "f32");
  let state = c.has(3) ? e.cast(c.x(3), "f32") : e.broadcast(e.number(0, "f32"), [batch, shared, dk, dv]);
  const read: Item[] = [];
  for (let t = 0; t < tokens; t++) {
    const key = at(x[1], t, [shared, 1, dk]);
    let value = at(x[2], t, [shared, 1, dv]);
    if (decay) state = binary(e, "mul", state, factor(decay, t));
    if (beta) value = binary(e, "mul", factor(beta, t), e.op("sub", [value, e.op("matmul", [key, state])]));
    state = e.op("add", [state, binary(e, "mul", e.reshape(key, [batch, shared, dk, 1]), value)]);
    const y = e.op("matmul", [at(x[0], t, [shared, heads / shared, dk]), state]);
    read.push(e.reshape(e.op("mul", [y, e.number(scale, "f32")]), [batch, 1, mulDim(heads, dv)]));
  }
  const output = e.cast(e.concat(read, 1), c.dtype(0));
  return [output, e.cast(state, c.has(3) ? c.dtype(3) : c.dtype(0))];
};

/** y[b, c, t] = bias[c] + sum over i of weight[c, i] * x[b, c, t - k + 1 + i], with past_state in front of x. */
const causalConv: Lowering = (c) => {
  const { e } = c;
  const [x, weight] = [c.x(0), c.x(1)];
  const activation = c.text("activation", "none");
  if (!["none", "silu", "swish"].includes(activation)) c.fail(`activation must be none, silu or swish, got '${activation}'`);
  const [batch, channels, length] = c.shape(0) as [Dim, Dim, Dim];
  const taps = dimAt(weight, 2);
  if (typeof taps !== "number") return c.fail("the weight's last axis must be a number");
  const past = c.optional(3) ?? e.broadcast(e.number(0, x.type.dtype), [batch, channels, taps - 1]);
  const all = taps === 1 ? x : e.concat([past, x], 2);
  const [input, w] = [wide(e, all), wide(e, weight)];
  const terms = Array.from({ length: taps }, (_, i) =>
    binary(e, "mul", e.slice(input, 2, i, length), e.reshape(e.slice(w, 2, i, 1), [channels, 1])),
  );
  const sum = terms.reduce((a, b) => e.op("add", [a, b]));
  const biased = c.has(2) ? binary(e, "add", sum, e.reshape(wide(e, c.x(2)), [channels, 1])) : sum;
  const y = e.cast(biased, x.type.dtype);
  const state = taps === 1 ? past : e.slice(all, 2, 1 - taps, taps - 1);
  return [activation === "none" ? y : inWide(e, [y], (a) => e.op("silu", [a])), state];
};

/** a sigmoid(alpha a) b */
const swiglu: Lowering = (c) => {
  const alpha = c.float("alpha", 1);
  return inWide(c.e, [c.x(0), c.x(1)], (a, b) => {
    const gate =
      alpha === 1
        ? c.e.op("silu", [a])
        : c.e.op("mul", [a, c.e.op("sigmoid", [c.e.op("mul", [a, c.e.number(alpha, a.type.dtype)])])]);
    return c.e.op("mul", [gate, b]);
  });
};

/** ONNX Runtime has them too. */
export const recurrences: Readonly<Record<string, Lowering>> = {
  LinearAttention: linearAttention,
  CausalConvWithState: causalConv,
};
export const attentionOps: Readonly<Record<string, Lowering>> = {
  ...recurrences,
  Attention: attention,
  RotaryEmbedding: rotaryEmbedding,
  TensorScatter: tensorScatter,
  SwiGLU: swiglu,
};
export const previewOps: Readonly<Record<string, Lowering>> = { FlexAttention: flexAttention };
