/** Softmax and normalisations. */
import { type Dim, product } from "../../../../ir/dim.ts";
import type { Call, Lowering } from "../call.ts";
import type { Item } from "../emitter.ts";
import { irDType } from "../types.ts";
import { binary, inWide, typeOf } from "./elementwise.ts";

/** softmax over an axis; before opset 13 over all axes from it on, as one. */
const overAxis = (c: Call, work: (rows: Item) => Item): Item =>
  inWide(c.e, [c.x0], (x) => {
    const { shape } = x.type;
    const axis = c.axis(c.int("axis", c.opset < 13 ? 1 : -1), shape.length);
    if (product(shape) === 0) return x;
    if (c.opset >= 13) {
      const { x: last, back } = c.e.toLast(x, axis);
      return back(work(last));
    }
    const rows = c.e.reshape(x, [product(shape.slice(0, axis)), product(shape.slice(axis))]);
    return c.e.reshape(work(rows), shape);
  });

/** e^(x - max x) / sum of these, over the last axis, in x's dtype */
export const softmaxOfRows = (c: Call, x: Item): Item => {
  if (x.type.dtype === "f32") return c.e.op("softmax", [x]);
  const powers = c.e.op("exp", [c.e.op("sub", [x, c.e.op("reduce", [x], { fn: "max" })])]);
  return c.e.op("div", [powers, c.e.op("reduce", [powers], { fn: "sum" })]);
};
/** x - max x - log sum e^(x - max x) */
const logSoftmaxOfRows = (c: Call, x: Item): Item => {
  const shifted = c.e.op("sub", [x, c.e.op("reduce", [x], { fn: "max" })]);
  return c.e.op("sub", [shifted, c.e.op("log", [c.e.op("reduce", [c.e.op("exp", [shifted])], { fn: "sum" })])]);
};

/** x / sqrt(mean x^2 + epsilon) over the axes from `axis` on, and the reciprocal of the root, one for each row */
export const normalised = (
  c: Call,
  x: Item,
  axis: number,
  epsilon: number,
  centred: boolean,
): { readonly y: Item; readonly mean: Item; readonly inverse: Item } => {
  const { shape } = x.type;
  const lead = shape.slice(0, axis);
  const rows = c.e.reshape(x, [...lead, product(shape.slice(axis))]);
  const mean = c.e.op("reduce", [rows], { fn: "mean" });
  const from = centred ? c.e.op("sub", [rows, mean]) : rows;
  const variance = c.e.op("reduce", [c.e.op("mul", [from, from])], { fn: "mean" });
  const inverse = c.e.op("rsqrt", [binary(c.e, "add", variance, c.e.number(epsilon, x.type.dtype))]);
  const ones = [...lead, ...shape.slice(axis).map((): Dim => 1)];
  return {
    y: c.e.reshape(c.e.op("mul", [from, inverse]), shape),
    mean: c.e.reshape(mean, ones),
    inverse: c.e.reshape(inverse, ones),
  };
};

/** The type that a normalisation computes in: `stash_type`, f32 unless given. */
const stash = (c: Call): ReturnType<typeof irDType> => irDType(typeOf(c, c.int("stash_type", 1)));

const layerNorm: Lowering = (c) => {
  const { dtype } = c.x0.type;
  const work = dtype === "f64" ? "f64" : stash(c);
  const axis = c.axis(c.int("axis", -1), c.rank(0));
  const { y, mean, inverse } = normalised(c, c.e.cast(c.x0, work), axis, c.float("epsilon", 1e-5), true);
  // scale and bias are applied in the operands' dtype
  const scaled = binary(c.e, "mul", c.e.cast(y, dtype), c.e.cast(c.x(1), dtype));
  return [c.has(2) ? binary(c.e, "add", scaled, c.e.cast(c.x(2), dtype)) : scaled, mean, inverse];
};

const rmsNorm: Lowering = (c) => {
  const { dtype } = c.x0.type;
  const work = dtype === "f64" ? "f64" : stash(c);
  const axis = c.axis(c.int("axis", -1), c.rank(0));
  const { y } = normalised(c, c.e.cast(c.x0, work), axis, c.float("epsilon", 1e-5), false);
  return binary(c.e, "mul", c.e.cast(y, dtype), c.e.cast(c.x(1), dtype));
};

/** Over all axes after the channels', one mean and variance for each group of channels. */
const groupNorm: Lowering = (c) => {
  const x = c.x0;
  const { shape, dtype } = x.type;
  const channels = shape[1] ?? c.fail(`needs a batch and channels, got ${shape.length} axes`);
  if (typeof channels !== "number") return c.fail(`the number of channels must be known, got '${channels}'`);
  const groups = c.node.op === "InstanceNormalization" ? channels : c.int("num_groups");
  if (groups < 1 || channels % groups !== 0) c.fail(`${channels} channels in ${groups} groups`);
  const rest = shape.slice(2);
  const apart = c.e.reshape(c.e.cast(x, dtype === "f64" ? "f64" : "f32"), [shape[0] as Dim, groups, channels / groups, ...rest]);
  const { y } = normalised(c, apart, 2, c.float("epsilon", 1e-5), true);
  const ones = rest.map((): Dim => 1);
  // before opset 21 scale and bias are of groups
  const perChannel = (v: Item): Item => {
    const own = c.e.cast(v, y.type.dtype);
    if (c.node.op !== "GroupNormalization" || c.opset >= 21) return c.e.reshape(own, [channels, ...ones]);
    const repeated = c.e.broadcast(c.e.reshape(own, [groups, 1]), [groups, channels / groups]);
    return c.e.reshape(repeated, [channels, ...ones]);
  };
  const back = c.e.reshape(y, shape);
  return c.e.cast(binary(c.e, "add", binary(c.e, "mul", back, perChannel(c.x(1))), perChannel(c.x(2))), dtype);
};

const lpNorm: Lowering = (c) =>
  inWide(c.e, [c.x0], (x) => {
    const { x: rows, back } = c.e.toLast(x, c.axis(c.int("axis", -1), x.type.shape.length));
    const p = c.int("p", 2);
    const sum = c.e.op("reduce", [p === 1 ? c.e.op("abs", [rows]) : c.e.op("mul", [rows, rows])], { fn: "sum" });
    const norm = p === 1 ? sum : c.e.op("sqrt", [sum]);
    const zero = c.e.number(0, x.type.dtype);
    return back(c.e.op("where", [c.e.op("equal", [norm, zero]), zero, c.e.op("div", [rows, norm])]));
  });

/** (x - mean) / sqrt(variance + epsilon) scale + bias, of channels, with what training left */
const batchNorm: Lowering = (c) => {
  if (c.flag("training_mode", false)) c.fail("training_mode is set; export the model for inference");
  return inWide(
    c.e,
    [0, 1, 2, 3, 4].map((i) => c.x(i)),
    (x, scale, bias, mean, variance) => {
      const dtype = (x as Item).type.dtype;
      const ofChannels = (v: Item): Item =>
        c.e.reshape(c.e.cast(v, dtype), [v.type.shape[0] as Dim, ...(x as Item).type.shape.slice(2).map((): Dim => 1)]);
      const [s, b, m, v] = [scale, bias, mean, variance].map((y) => ofChannels(y as Item)) as [Item, Item, Item, Item];
      const root = c.e.op("sqrt", [binary(c.e, "add", v, c.e.number(c.float("epsilon", 1e-5), dtype))]);
      const normal = binary(c.e, "div", binary(c.e, "sub", x as Item, m), root);
      return binary(c.e, "add", binary(c.e, "mul", normal, s), b);
    },
  );
};

/** (x - mean) / (deviation + 1e-9) over axes */
const meanVariance: Lowering = (c) =>
  inWide(c.e, [c.x0], (x) => {
    const rank = x.type.shape.length;
    const axes = c.axes(c.ints("axes") ?? [0, 2, 3], rank);
    const kept = x.type.shape.map((_, i) => i).filter((i) => !axes.includes(i));
    const order = [...kept, ...axes];
    const moved = c.e.transpose(x, order);
    const rows = c.e.reshape(moved, [
      ...kept.map((i) => x.type.shape[i] as Dim),
      product(axes.map((i) => x.type.shape[i] as Dim)),
    ]);
    const centred = c.e.op("sub", [rows, c.e.op("reduce", [rows], { fn: "mean" })]);
    const deviation = c.e.op("sqrt", [c.e.op("reduce", [c.e.op("mul", [centred, centred])], { fn: "mean" })]);
    const normal = c.e.op("div", [centred, binary(c.e, "add", deviation, c.e.number(1e-9, x.type.dtype))]);
    return c.e.transpose(
      c.e.reshape(normal, moved.type.shape),
      order.map((_, i) => order.indexOf(i)),
    );
  });

/** 1 at the first of the largest elements of each row, 0 elsewhere */
const firstLargest = (c: Call, x: Item): Item => {
  const extent = x.type.shape.at(-1) as Dim;
  const place = c.e.iota([extent], 0, "i64");
  const is = c.e.op("equal", [x, c.e.op("reduce", [x], { fn: "max" })]);
  const first = c.e.op("reduce", [c.e.op("where", [is, place, c.e.dims([extent], "i64", [])])], { fn: "min" });
  return c.e.cast(c.e.op("equal", [place, first]), x.type.dtype);
};

export const normalisations: Readonly<Record<string, Lowering>> = {
  Softmax: (c) => overAxis(c, (x) => softmaxOfRows(c, x)),
  LogSoftmax: (c) => overAxis(c, (x) => logSoftmaxOfRows(c, x)),
  LayerNormalization: layerNorm,
  RMSNormalization: rmsNorm,
  GroupNormalization: groupNorm,
  InstanceNormalization: groupNorm,
  LpNormalization: lpNorm,
  BatchNormalization: batchNorm,
  MeanVarianceNormalization: meanVariance,
  Hardmax: (c) => overAxis(c, (x) => firstLargest(c, x)),
};
