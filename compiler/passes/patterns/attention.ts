/**
 * Attention in pieces: softmax(scale q k + mask) v. The scale may be on q, on k or on their product; heads of k and v may have been repeated
 * for groups of heads of q; masks are added, or choose between a score and a very negative number. Where a mask hides all keys of a row the
 * pieces give NaN, and the op zeros.
 */
import type { Builder } from "../../../ir/build.ts";
import { type Dim, mulDim, product, subDim } from "../../../ir/dim.ts";
import { UserError } from "../../../ir/error.ts";
import type { Op, Value } from "../../../ir/graph.ts";
import { inferTypes } from "../../../ir/ops/index.ts";
import { type DType, type TensorType, tensor, typeText } from "../../../ir/type.ts";
import { cast, type Look, miss, near, type Pattern, pattern, reshaped, shapeOf, typeOf } from "./look.ts";

/** What is added to scores; or where they are kept, or where they are not, others being `fill`. */
interface Mask {
  readonly does: "add" | "keep" | "hide";
  readonly value: Value;
  readonly fill: number;
}

/** A value with its axes in another order. */
interface Moved {
  readonly x: Value;
  readonly perm?: readonly number[];
}

interface Scores {
  readonly q: Value;
  /** of the scores as masks and the softmax see them: [..., queries, keys] */
  readonly shape: readonly Dim[];
  readonly k: Moved;
  readonly scale: number;
  readonly softcap: number;
  readonly masks: readonly Mask[];
}

/** Scores that are filled with less count as hidden. */
const hidden = -1e4;

/** The axes of k when those of its transpose come from axes `perm` of x. */
const swapped = (perm: readonly number[]): readonly number[] => [...perm.slice(0, -2), ...perm.slice(-2).reverse()];

/** k of its transpose, and a number that it is multiplied by. */
const keys = (g: Look, v: Value): { readonly k: Moved; readonly by: number } => {
  const outer = g.scaled(v);
  const op = g.maker(g.bare(outer.x));
  const own = shapeOf(outer.x).map((_, i) => i);
  if (op?.kind !== "transpose") return { k: { x: outer.x, perm: swapped(own) }, by: outer.by };
  const perm = swapped(op.attrs.perm as readonly number[]);
  if (perm.some((p, i) => p !== i)) return { k: { x: op.inputs[0] as Value, perm }, by: outer.by };
  const inner = g.scaled(op.inputs[0] as Value);
  return { k: { x: inner.x }, by: outer.by * inner.by };
};

const products = (g: Look, op: Op): Scores => {
  const [a, b] = op.inputs as readonly [Value, Value];
  const q = g.scaled(a);
  const { k, by } = keys(g, b);
  return { q: q.x, shape: shapeOf(op.outputs[0] as Value), k, scale: q.by * by, softcap: 0, masks: [] };
};

/** Heads that share a head of k are rows of one matrix for the product, and apart again after it. */
const apart = (g: Look, found: Scores, shape: readonly Dim[]): Scores => {
  const { q } = found;
  const [batch, heads, rows, columns] = found.shape as readonly [Dim, Dim, Dim, Dim];
  const isForm = shape.length === 4 && found.shape.length === 4 && shape[0] === batch && shape[3] === columns;
  if (!isForm || found.masks.length > 0 || product(shape.slice(1, 3)) !== mulDim(heads, rows)) return miss("scores are reshaped");
  const wanted = [...shape.slice(0, 3), shapeOf(q).at(-1) as Dim];
  const from = g.maker(q);
  const before = from?.kind === "reshape" ? from.inputs[0] : undefined;
  if (before === undefined || String(shapeOf(before)) !== String(wanted)) return { ...found, shape };
  const { by, x } = g.scaled(before);
  return { ...found, shape, q: x, scale: found.scale * by };
};

/** What scores are made of, from the softmax back to the product. */
const scores = (g: Look, v: Value): Scores => {
  const op = g.maker(g.bare(v));
  const [x, y, z] = (op?.inputs ?? []) as [Value, Value, Value];
  switch (op?.kind) {
    case "matmul":
      return products(g, op);
    case "reshape":
      return apart(g, scores(g, x), shapeOf(op.outputs[0] as Value));
    case "add":
      return g.both(op, (inner, value) => {
        const found = scores(g, inner);
        return { ...found, masks: [...found.masks, { does: "add", value, fill: 0 }] };
      });
    case "where": {
      const kept = g.number(z) !== undefined;
      const fill = g.number(kept ? z : y);
      const found = scores(g, kept ? y : z);
      if (fill === undefined || fill > hidden) return miss(`scores are replaced by ${fill ?? `'${(kept ? z : y).name}'`}`);
      return { ...found, masks: [...found.masks, { does: kept ? "keep" : "hide", value: x, fill }] };
    }
    case "mul":
    case "div": {
      const { by, x: inner } = g.scaled(v);
      if (by === 1 && g.same(inner, v)) return miss(`scores are scaled by '${y.name}', which is no constant`);
      const curve = g.maker(g.bare(inner));
      if (curve?.kind === "tanh") {
        const found = scores(g, curve.inputs[0] as Value);
        if (found.masks.length > 0) miss("the mask is within the tanh");
        return { ...found, scale: found.scale * by, softcap: by };
      }
      const found = scores(g, inner);
      if (found.masks.length > 0 || found.softcap !== 0) miss("the mask is scaled with the scores");
      return { ...found, scale: found.scale * by };
    }
    case "maximum":
      // keeps scores finite
      return g.both(op, (inner, least) => {
        const number = g.number(least);
        return number !== undefined && number < -1e30 ? scores(g, inner) : miss("scores have a lower limit");
      });
    default:
      return miss(op === undefined ? `'${v.name}' is no score` : `scores are made by ${op.kind}`);
  }
};

/** The softmax behind probabilities, which nothing but the product with v may use; and what is true for rows that are set to 0. */
const softmaxOf = (g: Look, v: Value, reader: Op): { readonly softmax: Op; readonly blind?: Value } => {
  let [value, users, blind, elsewhere] = [v, [reader], undefined as Value | undefined, undefined as Value | undefined];
  for (;;) {
    const op = g.maker(value) ?? miss(`'${value.name}' is no probability`);
    const [x, , rest] = op.inputs as readonly [Value, Value, Value];
    const isGuard = op.kind === "where" && g.number(op.inputs[1]) === 0;
    if (!isGuard && !["softmax", "cast", "reshape"].includes(op.kind))
      miss(`the product's first operand is made by ${op.kind}, not softmax`);
    if (g.isOutput(value) || g.users(value).some((u) => !users.includes(u))) elsewhere ??= value;
    const name = elsewhere?.name;
    if (op.kind === "softmax" && name !== undefined) near(() => miss(`the probabilities '${name}' are used elsewhere`));
    if (op.kind === "softmax") return { softmax: op, ...(blind ? { blind } : {}) };
    users = [op];
    if (isGuard) {
      // NaN, which rows without a key to see give, become 0; or such rows are found by their masks
      const not = g.maker(x);
      const itself = not?.kind === "not" ? g.maker(not.inputs[0]) : undefined;
      if (itself?.kind === "equal" && itself.inputs.every((i) => i === rest)) users = [op, itself];
      else if (g.number(x) !== 0) blind = x;
    }
    value = isGuard ? rest : x;
  }
};

/** Whether rows are set to 0 just where the masks leave no key: the largest of what is added to scores is -infinity. */
const isBlind = (g: Look, value: Value, masks: readonly Mask[]): boolean => {
  const is = g.maker(value);
  const largest = g.maker(is?.inputs[0]);
  if (is?.kind !== "equal" || g.number(is.inputs[1]) !== Number.NEGATIVE_INFINITY) return false;
  if (largest?.kind !== "reduce" || largest.attrs.fn !== "max" || largest.attrs.group !== undefined) return false;
  const added = (v: Value): boolean => g.number(v) === 0 || masks.some((m) => m.does === "add" && g.same(m.value, v));
  const open = largest.inputs[0] as Value;
  const where = g.maker(open);
  if (where?.kind !== "where") return masks.length === 1 && added(open);
  const [seen, bias, none] = where.inputs as readonly [Value, Value, Value];
  const counted = masks.filter(
    (m) => (m.does === "keep" && g.same(m.value, seen)) || (m.does === "add" && g.same(m.value, bias)),
  );
  return g.number(none) === Number.NEGATIVE_INFINITY && added(bias) && counted.length === masks.length;
};

/** What a mask is when it compares places alone: key j is seen by query i when j <= i, or j <= i + keys - queries. */
const causalOf = (g: Look, { does, value, fill }: Mask, shape: readonly Dim[]): "first" | "last" | undefined => {
  const op = g.maker(value);
  const [queries, keys] = shape.slice(-2) as [Dim, Dim];
  /** 0, 1, 2 ... along the last axis but `back` */
  const counts = (v: Value, size: Dim, back: number): boolean => {
    const iota = g.maker(v);
    const own = shapeOf(v);
    const axis = own.length - 1 - back;
    return iota?.kind === "iota" && iota.attrs.axis === axis && own.every((d, i) => d === (i === axis ? size : 1));
  };
  const offset = (v: Value): Dim | undefined => {
    const from = g.maker(v);
    const [x] = from?.inputs ?? [];
    if (from?.kind === "size") return shapeOf(x as Value)[from.attrs.axis as number];
    return from?.kind === "reshape" ? offset(x as Value) : g.number(v);
  };
  if (op?.kind !== "less_equal" || does !== "keep" || fill !== Number.NEGATIVE_INFINITY) return undefined;
  const [key, place] = op.inputs as readonly [Value, Value];
  if (!counts(key, keys, 0)) return undefined;
  if (counts(place, queries, 1)) return "first";
  const sum = g.maker(place);
  const [x, y] = sum?.inputs ?? [];
  const isLast = (a?: Value, b?: Value): boolean =>
    a !== undefined && b !== undefined && counts(a, queries, 1) && offset(b) === subDim(keys, queries);
  return sum?.kind === "add" && (isLast(x, y) || isLast(y, x)) ? "last" : undefined;
};

/** x of x with each of its heads (axis 1) repeated in place, and how often. */
const unrepeated = (g: Look, v: Value): { readonly x: Value; readonly times: number } => {
  const wide = g.maker(v);
  const repeated = g.maker(wide?.inputs[0]);
  const apart = g.maker(repeated?.inputs[0]);
  const x = apart?.inputs[0];
  const isForm = wide?.kind === "reshape" && repeated?.kind === "broadcast" && apart?.kind === "reshape";
  if (!isForm || x === undefined || shapeOf(v).length !== 4 || shapeOf(x).length !== 4) return { x: v, times: 1 };
  const [batch, heads, rows, columns] = shapeOf(x) as readonly [Dim, Dim, Dim, Dim];
  const times = shapeOf(repeated.outputs[0] as Value)[2];
  if (typeof times !== "number" || typeof heads !== "number") return { x: v, times: 1 };
  const expected: readonly (readonly [readonly Dim[], Value])[] = [
    [[batch, heads, 1, rows, columns], apart.outputs[0] as Value],
    [[batch, heads, times, rows, columns], repeated.outputs[0] as Value],
    [[batch, heads * times, rows, columns], v],
  ];
  return expected.every(([shape, value]) => String(shape) === String(shapeOf(value))) ? { x, times } : { x: v, times: 1 };
};

interface Attention extends Scores {
  readonly causal: "none" | "first" | "last";
  readonly v: Value;
  readonly dtype: DType;
  readonly to: DType;
}

const permuted = (shape: readonly Dim[], { perm }: Moved): readonly Dim[] => (perm ? perm.map((p) => shape[p] as Dim) : shape);
/** One batch more in front of what has none. */
const ofFour = (shape: readonly Dim[]): readonly Dim[] => (shape.length === 3 ? [1, ...shape] : shape);
/** q with the heads that scores have. */
const shapeOfQ = ({ q, shape }: Scores): readonly Dim[] => [...shape.slice(0, -1), shapeOf(q).at(-1) as Dim];

/** Types that the op gets; a Miss says why it would not take them. */
const fitting = (found: Attention, result: Value): Attention => {
  const { q, k, v, dtype, masks } = found;
  const shapes = [shapeOfQ(found), permuted(shapeOf(k.x), k), shapeOf(v)];
  if (new Set(shapes.map((s) => s.length)).size > 1 || ![3, 4].includes(found.shape.length))
    miss(`heads of ${[q, k.x, v].map((x) => typeText(x.type)).join(", ")} are not apart`);
  const types = shapes.map((shape) => tensor(dtype, ofFour(shape)));
  try {
    const [out] = inferTypes("sdpa", types, { scale: found.scale }) as readonly [TensorType];
    for (const { value } of masks) inferTypes("sdpa", [...types, tensor("f32", shapeOf(value))], { scale: found.scale });
    const own = ofFour(shapeOf(result));
    if (String(out.shape) !== String(own) && (out.shape[0] !== own[0] || product(out.shape) !== product(own)))
      miss(`the result is ${typeText(result.type)}`);
  } catch (error) {
    throw error instanceof UserError ? miss(error.message) : error;
  }
  return found;
};

const bias = (b: Builder, masks: readonly Mask[]): Value | undefined => {
  const flags = masks.filter((m) => m.does !== "add" && m.fill === Number.NEGATIVE_INFINITY);
  const numbers = masks.filter((m) => !flags.includes(m));
  const seen = flags.map((m) => (m.does === "hide" ? b.op("not", [m.value]) : m.value));
  const constant = (value: number): Value => b.op("const", [], { value, dtype: "f32" });
  if (numbers.length === 0) return seen.length === 0 ? undefined : seen.reduce((x, y) => b.op("and", [x, y]));
  const filled = (value: Value, does: Mask["does"], fill: number): Value =>
    b.op("where", does === "hide" ? [value, constant(fill), constant(0)] : [value, constant(0), constant(fill)]);
  return [
    ...numbers.map((m) => (m.does === "add" ? cast(b, m.value, "f32") : filled(m.value, m.does, m.fill))),
    ...seen.map((value) => filled(value, "keep", Number.NEGATIVE_INFINITY)),
  ].reduce((x, y) => b.op("add", [x, y]));
};

export const sdpa: Pattern = pattern<Attention>({
  name: "sdpa",
  roots: ["matmul"],
  match(op, g) {
    const [p, values] = op.inputs as readonly [Value, Value];
    const { softmax, blind } = softmaxOf(g, p, op);
    return near(() => {
      const found = scores(g, softmax.inputs[0] as Value);
      if (blind && !isBlind(g, blind, found.masks)) miss(`'${blind.name}' says where probabilities are 0`);
      const places = found.masks.map((m) => causalOf(g, m, found.shape));
      const causal = places.find((c) => c !== undefined);
      const masks = found.masks.filter((_, i) => causal === undefined || i !== places.indexOf(causal));
      const v = g.operand(values);
      const [fewK, fewV] = [unrepeated(g, found.k.x), unrepeated(g, v)];
      const isGrouped = found.k.perm === undefined && fewK.times === fewV.times;
      const operands = {
        q: found.q,
        k: isGrouped ? { x: g.operand(fewK.x) } : found.k,
        v: isGrouped ? g.operand(fewV.x) : v,
      };
      const dtypes = new Set([operands.q, operands.k.x, operands.v].map((x) => typeOf(x).dtype));
      const [dtype] = dtypes.size === 1 ? dtypes : (["f32"] as const);
      return fitting(
        { ...found, ...operands, causal: causal ?? "none", masks, dtype: dtype as DType, to: g.usedAs(op) },
        op.outputs[0] as Value,
      );
    });
  },
  build(b, found, op) {
    const { k, v, scale, causal, softcap, masks, dtype, to } = found;
    const [out] = op.outputs as readonly [Value];
    const straight = k.perm === undefined ? k.x : b.op("transpose", [k.x], { perm: k.perm });
    const q = reshaped(b, found.q, ofFour(shapeOfQ(found)));
    const operands = [q, ...[straight, v].map((x) => reshaped(b, x, ofFour(shapeOf(x))))].map((x) => cast(b, x, dtype));
    const more = bias(b, masks);
    const attrs = {
      scale,
      ...(causal === "none" ? {} : { causal }),
      ...(softcap === 0 ? {} : { softcap }),
      ...(to === dtype ? {} : { to }),
    };
    const result = b.op("sdpa", more ? [...operands, more] : operands, attrs);
    return cast(b, reshaped(b, result, shapeOf(out)), typeOf(out).dtype);
  },
});
