/** Operators over whole axes: reductions, places of extremes, running sums, order. */
import { type Dim, product } from "../../../../ir/dim.ts";
import { isFloat } from "../../../../ir/type.ts";
import type { Call, Lowering } from "../call.ts";
import type { Item } from "../emitter.ts";
import { binary, inWide, wide, wrap } from "./elementwise.ts";
import { axesOf } from "./shape.ts";

/** Axes to reduce, put last and joined into one; and the shape of the result with and without them. */
interface Reduction {
  readonly x: Item;
  readonly shape: readonly Dim[];
}

const joined = (c: Call, x: Item, axes: readonly number[], keep: boolean): Reduction => {
  const { shape } = x.type;
  const kept = shape.map((_, i) => i).filter((i) => !axes.includes(i));
  const moved = c.e.transpose(x, [...kept, ...axes]);
  const lead = kept.map((i) => shape[i] as Dim);
  const one = c.e.reshape(moved, [...lead, product(axes.map((a) => shape[a] as Dim))]);
  return { x: one, shape: keep ? shape.map((d, i) => (axes.includes(i) ? 1 : d)) : lead };
};

/** What the reduction of no elements is. */
const ofNothing: Readonly<Record<string, number>> = { sum: 0, prod: 1, max: -Infinity, min: Infinity, mean: Number.NaN };

const reduced = (c: Call, x: Item, fn: string, axes: readonly number[], keep: boolean): Item => {
  const r = joined(c, x, axes, keep);
  if (r.x.type.shape.at(-1) === 0) {
    const empty = ofNothing[fn] ?? 0;
    const limit = isFloat(x.type.dtype) || Number.isFinite(empty) ? empty : empty > 0 ? 2 ** 53 : -(2 ** 53);
    return c.e.broadcast(c.e.number(limit, x.type.dtype), r.shape);
  }
  return c.e.reshape(c.e.op("reduce", [r.x], { fn }), r.shape);
};

/** Steps before and after the reduction. */
interface Steps {
  readonly fn: "sum" | "mean" | "max" | "min" | "prod";
  readonly since: number;
  readonly before?: (c: Call, x: Item) => Item;
  readonly after?: (c: Call, x: Item) => Item;
}

const reduce =
  ({ fn, since, before, after }: Steps): Lowering =>
  (c) => {
    const x = c.x0;
    const rank = x.type.shape.length;
    const given = axesOf(c, since, 1);
    const keep = c.flag("keepdims", true);
    const none = given === undefined || given.length === 0;
    const noop = none && c.flag("noop_with_empty_axes", false);
    const axes = none ? x.type.shape.map((_, i) => i) : [...c.axes(given, rank)].sort((a, b) => a - b);
    const work = (from: Item): Item => {
      const ready = before ? before(c, from) : from;
      const result = noop ? ready : reduced(c, ready, fn, axes, keep);
      return after ? after(c, result) : result;
    };
    if (x.type.dtype === "bool") return c.e.cast(work(c.e.cast(x, "u8")), "bool");
    if (isFloat(x.type.dtype)) return inWide(c.e, [x], work);
    return fn === "max" || fn === "min" ? work(x) : wrap(c.e, c.e.op("trunc", [work(c.e.cast(x, "f64"))]), x.type.dtype);
  };

const op =
  (kind: string) =>
  (c: Call, x: Item): Item =>
    c.e.op(kind, [x]);
const square = (c: Call, x: Item): Item => c.e.op("mul", [x, x]);

const logSumExp: Lowering = (c) => {
  const given = axesOf(c, 18, 1);
  const { shape } = c.x0.type;
  const none = given === undefined || given.length === 0;
  if (none && c.flag("noop_with_empty_axes", false)) return c.x0;
  const axes = none ? shape.map((_, i) => i) : [...c.axes(given, shape.length)].sort((a, b) => a - b);
  const work = (from: Item): Item => {
    if (product(axes.map((a) => shape[a] as Dim)) === 0)
      return c.e.op("log", [reduced(c, from, "sum", axes, c.flag("keepdims", true))]);
    // the largest is taken out, so that nothing overflows; where it is infinite there is nothing to take out
    const most = reduced(c, from, "max", axes, true);
    const finite = binary(c.e, "less", c.e.op("abs", [most]), c.e.number(Infinity, from.type.dtype));
    const shift = c.e.op("where", [finite, most, c.e.number(0, from.type.dtype)]);
    const sum = reduced(c, c.e.op("exp", [binary(c.e, "sub", from, shift)]), "sum", axes, true);
    const result = binary(c.e, "add", c.e.op("log", [sum]), shift);
    const lead = shape.filter((_, i) => !axes.includes(i));
    return c.flag("keepdims", true) ? result : c.e.reshape(result, lead);
  };
  const { dtype } = c.x0.type;
  return isFloat(dtype) ? inWide(c.e, [c.x0], work) : wrap(c.e, work(c.e.cast(c.x0, "f64")), dtype);
};

/** The place of the largest or smallest: the first one, or the last. */
const argOf =
  (fn: "max" | "min"): Lowering =>
  (c) => {
    const axis = c.axis(c.int("axis", 0), c.rank(0));
    const extent = c.shape(0)[axis] as Dim;
    const { x, back } = c.e.toLast(wide(c.e, c.x0), axis);
    const best = c.e.op("reduce", [x], { fn });
    const equal = binary(c.e, "equal", x, best);
    // one that is no number is what numpy finds
    const is = isFloat(x.type.dtype) ? binary(c.e, "or", equal, c.e.op("not", [binary(c.e, "equal", x, x)])) : equal;
    const place = c.e.iota([extent], 0, "i64");
    const last = c.flag("select_last_index", false);
    const never = last ? c.e.number(-1, "i64") : c.e.dims([extent], "i64", []);
    const found = c.e.op("reduce", [c.e.op("where", [is, place, never])], { fn: last ? "max" : "min" });
    const kept = back(found);
    return c.flag("keepdims", true)
      ? kept
      : c.e.reshape(
          kept,
          c.shape(0).filter((_, i) => i !== axis),
        );
  };

const cumulate =
  (fn: "sum" | "prod"): Lowering =>
  (c) => {
    const axis = c.axis(c.numbers(1)[0] ?? c.fail("axis is missing"), c.rank(0));
    const attrs = { fn, exclusive: c.flag("exclusive", false), reverse: c.flag("reverse", false) };
    const { x, back } = c.e.toLast(wide(c.e, c.x0), axis);
    return c.e.cast(back(c.e.op("cumulate", [x], attrs)), c.dtype(0));
  };

const topK: Lowering = (c) => {
  const axis = c.axis(c.int("axis", -1), c.rank(0));
  const k = c.opset < 10 ? c.int("k") : c.size(1);
  const { x, back } = c.e.toLast(c.x0, axis);
  const count = [String(k)];
  const [values, places] = c.e.ops("sort", [x], { descending: c.flag("largest", true), count }) as readonly [Item, Item];
  return [back(values), c.e.cast(back(places), "i64")];
};

export const reductions: Readonly<Record<string, Lowering>> = {
  ReduceSum: reduce({ fn: "sum", since: 13 }),
  ReduceMean: reduce({ fn: "mean", since: 18 }),
  ReduceMax: reduce({ fn: "max", since: 18 }),
  ReduceMin: reduce({ fn: "min", since: 18 }),
  ReduceProd: reduce({ fn: "prod", since: 18 }),
  ReduceL1: reduce({ fn: "sum", since: 18, before: op("abs") }),
  ReduceL2: reduce({ fn: "sum", since: 18, before: square, after: op("sqrt") }),
  ReduceLogSum: reduce({ fn: "sum", since: 18, after: op("log") }),
  ReduceSumSquare: reduce({ fn: "sum", since: 18, before: square }),
  ReduceLogSumExp: logSumExp,
  ArgMax: argOf("max"),
  ArgMin: argOf("min"),
  CumSum: cumulate("sum"),
  CumProd: cumulate("prod"),
  TopK: topK,
};
