/**
 * Attention in pieces: softmax(scale q k + mask) v. The scale may be on q, on k or on their product; heads of k and v may have been repeated
 * for groups of heads of q; masks are added, or choose between a score and a very negative number. Where a mask hides all keys of a row the
 * pieces give NaN, and the op zeros.
 */
import type { Builder } from "../../../ir/build.ts";
import type { Dim } from "../../../ir/dim.ts";
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
  return { q: q.x, k, scale: q.by * by, softcap: 0, masks: [] };
};

/** What scores are made of, from the softmax back to the product. */
const scores = (g: Look, v: Value): Scores => {
  const op = g.maker(g.bare(v));
  const [x, y, z] = (op?.inputs ?? []) as [Value, Value, Value];
  switch (op?.kind) {
    case "matmul":
      return products(g, op);
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

/** The softmax behind probabilities, which nothing but the product with v may use. */
const softmaxOf = (g: Look, v: Value, reader: Op): Op => {
  const only = (value: Value, users: readonly Op[]): void => {
    if (g.isOutput(value) || g.users(value).some((u) => !users.includes(u)))
      near(() => miss(`the probabilities '${value.name}' are used elsewhere`));
  };
  let [value, user] = [v, reader];
  for (;;) {
    const op = g.maker(value) ?? miss(`'${value.name}' is no probability`);
    if (op.kind === "where" && g.number(op.inputs[1]) === 0) {
      // rows without a key to see: NaN become 0
      const [condition, , rest] = op.inputs as readonly [Value, Value, Value];
      const is = g.made(g.made(condition, "not").inputs[0] as Value, "equal");
      if (is.inputs[0] !== rest || is.inputs[1] !== rest) miss("probabilities are replaced by 0");
      only(value, [user]);
      only(rest, [op, is]);
      const made = g.maker(rest);
      if (made?.kind === "softmax") return made;
      [value, user] = [rest, op];
      continue;
    }
    only(value, [user]);
    if (op.kind === "softmax") return op;
    if (op.kind !== "cast") return miss(`the product's first operand is made by ${op.kind}, not softmax`);
    [value, user] = [op.inputs[0] as Value, op];
  }
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

interface Attention extends Omit<Scores, "k"> {
  readonly k: Moved;
  readonly v: Value;
  readonly dtype: DType;
  readonly to: DType;
}

const permuted = (shape: readonly Dim[], { perm }: Moved): readonly Dim[] => (perm ? perm.map((p) => shape[p] as Dim) : shape);
/** One batch more in front of what has none. */
const ofFour = (shape: readonly Dim[]): readonly Dim[] => (shape.length === 3 ? [1, ...shape] : shape);

/** Types that the op gets; a Miss says why it would not take them. */
const fitting = (found: Attention, result: Value): Attention => {
  const { q, k, v, dtype, masks } = found;
  const shapes = [shapeOf(q), permuted(shapeOf(k.x), k), shapeOf(v)];
  if (new Set(shapes.map((s) => s.length)).size > 1 || ![3, 4].includes(shapeOf(q).length))
    miss(`heads of ${[q, k.x, v].map((x) => typeText(x.type)).join(", ")} are not apart`);
  const types = shapes.map((shape) => tensor(dtype, ofFour(shape)));
  try {
    const [out] = inferTypes("sdpa", types, { scale: found.scale }) as readonly [TensorType];
    for (const { value } of masks) inferTypes("sdpa", [...types, tensor("f32", shapeOf(value))], { scale: found.scale });
    if (String(out.shape) !== String(ofFour(shapeOf(result)))) miss(`the result is ${typeText(result.type)}`);
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
    const softmax = softmaxOf(g, p, op);
    return near(() => {
      const found = scores(g, softmax.inputs[0] as Value);
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
      return fitting({ ...found, ...operands, dtype: dtype as DType, to: g.usedAs(op) }, op.outputs[0] as Value);
    });
  },
  build(b, { q, k, v, scale, softcap, masks, dtype, to }, op) {
    const [out] = op.outputs as readonly [Value];
    const straight = k.perm === undefined ? k.x : b.op("transpose", [k.x], { perm: k.perm });
    const operands = [q, straight, v].map((x) => cast(b, reshaped(b, x, ofFour(shapeOf(x))), dtype));
    const more = bias(b, masks);
    const attrs = { scale, ...(softcap === 0 ? {} : { softcap }), ...(to === dtype ? {} : { to }) };
    const result = b.op("sdpa", more ? [...operands, more] : operands, attrs);
    return cast(b, reshaped(b, result, shapeOf(out)), typeOf(out).dtype);
  },
});
