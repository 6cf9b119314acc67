/** Operators that make and move elements without computing on them: shapes, slices, patterns of indices. */
import { addDim, type Dim, dimText, mulDim, product, subDim } from "../../../../ir/dim.ts";
import { unequal } from "../../../../ir/expect.ts";
import { type DType, isFloat } from "../../../../ir/type.ts";
import type { Call, Lowering } from "../call.ts";
import type { Emitter, Item } from "../emitter.ts";
import { irDType } from "../types.ts";
import { binary, typeOf, wrap } from "./elementwise.ts";

/** a / b of sizes, where b's factors are a's. */
const quotient = (c: Call, a: readonly Dim[], b: readonly Dim[]): Dim => {
  const rest = [...a];
  let divisor = 1;
  for (const d of b) {
    const at = typeof d === "number" ? -1 : rest.indexOf(d);
    if (at >= 0) rest.splice(at, 1);
    else if (typeof d === "number") divisor *= d;
    else return c.fail(`cannot tell how often [${b.map(dimText).join(", ")}] fits in [${a.map(dimText).join(", ")}]`);
  }
  const number = rest.filter((d) => typeof d === "number").reduce((x, y) => x * y, 1);
  const symbols = rest.filter((d) => typeof d !== "number");
  if (divisor === 0) return c.fail("a size of -1 beside a size of 0");
  if (number % divisor !== 0)
    return c.fail(`[${a.map(dimText).join(", ")}] elements do not fit in [${b.map(dimText).join(", ")}] and one more size`);
  return mulDim(product(symbols), number / divisor);
};

const reshape: Lowering = (c) => {
  const x = c.x0;
  const asked = c.opset < 5 ? (c.ints("shape") ?? c.fail("attribute 'shape' is missing")) : c.sizes(1);
  const zeros = c.flag("allowzero", false);
  const shape = asked.map((d, i) =>
    d === 0 && !zeros ? (x.type.shape[i] ?? c.fail(`size 0 at ${i}, where data has no axis`)) : d,
  );
  const inferred = shape.indexOf(-1);
  if (shape.some((d, i) => typeof d === "number" && (d < -1 || (d === -1 && i !== inferred))))
    c.fail(`sizes [${asked.map(dimText).join(", ")}]: one of them may be -1, the others not negative`);
  if (inferred < 0) return c.e.reshape(x, shape);
  const others = shape.filter((_, i) => i !== inferred);
  return c.e.reshape(x, shape.with(inferred, quotient(c, x.type.shape, others)));
};

/** The axes that an operator has as an attribute in old opsets and as an input in new ones. */
export const axesOf = (c: Call, since: number, input: number): readonly number[] | undefined =>
  c.opset < since ? c.ints("axes") : c.has(input) ? c.numbers(input) : undefined;

const squeeze: Lowering = (c) => {
  const x = c.x0;
  const given = axesOf(c, 13, 1);
  const axes = given
    ? c.axes(given, x.type.shape.length)
    : x.type.shape.flatMap((d, i) =>
        d === 1 ? [i] : typeof d === "number" ? [] : c.fail("axes are needed where sizes are not numbers"),
      );
  const wrong = axes.find((a) => x.type.shape[a] !== 1);
  if (wrong !== undefined) c.fail(`axis ${wrong} has size ${dimText(x.type.shape[wrong] as Dim)}, not 1`);
  return c.e.reshape(
    x,
    x.type.shape.filter((_, i) => !axes.includes(i)),
  );
};

const unsqueeze: Lowering = (c) => {
  const x = c.x0;
  const given = axesOf(c, 13, 1) ?? c.fail("axes are missing");
  const rank = x.type.shape.length + given.length;
  const axes = c.axes(given, rank);
  const own = [...x.type.shape];
  return c.e.reshape(
    x,
    Array.from({ length: rank }, (_, i) => (axes.includes(i) ? 1 : (own.shift() as Dim))),
  );
};

/** Sizes of x's axes from `start` to `end`, as a vector. */
const shapeOf: Lowering = (c) => {
  const { shape } = c.x0.type;
  const limit = (v: number): number => Math.min(shape.length, Math.max(0, v < 0 ? v + shape.length : v));
  return c.e.dims(shape.slice(limit(c.int("start", 0)), limit(c.int("end", shape.length))));
};

const transpose: Lowering = (c) => {
  const rank = c.rank(0);
  const perm = c.ints("perm") ?? Array.from({ length: rank }, (_, i) => rank - 1 - i);
  if (perm.length !== rank) c.fail(`perm [${perm.join(", ")}] for a tensor of ${rank} axes`);
  return c.e.transpose(c.x0, c.axes(perm, rank));
};

const concat: Lowering = (c) => {
  const parts = c.inputs.map((_, i) => c.x(i));
  const axis = c.axis(c.int("axis"), c.rank(0));
  // an empty part of another rank is what some exporters begin a list with
  const full = parts.filter((p) => !(p.type.shape.length === 1 && p.type.shape[0] === 0 && c.rank(0) !== 1));
  return c.e.concat(full.length === 0 ? parts : full, axis);
};

const split: Lowering = (c) => {
  const x = c.x0;
  const axis = c.axis(c.int("axis", 0), x.type.shape.length);
  const extent = x.type.shape[axis] as Dim;
  const given = c.opset < 13 ? c.ints("split") : c.has(1) ? c.numbers(1) : undefined;
  const outputs = c.node.outputs.length;
  const parts = c.opset >= 18 ? c.int("num_outputs", outputs) : outputs;
  if (parts !== outputs) c.fail(`num_outputs is ${parts}, and the node has ${outputs}`);
  const sizes =
    given ??
    (typeof extent === "number" ? evenly(extent, parts) : c.fail(`axis ${axis} has size '${extent}', and split is not given`));
  if (sizes.length !== outputs) c.fail(`${sizes.length} sizes for ${outputs} outputs`);
  const whole = sizes.reduce((a, b) => a + b, 0);
  if (typeof extent === "number" && whole !== extent) c.fail(`sizes [${sizes.join(", ")}] are not the ${extent} of axis ${axis}`);
  let start = 0;
  return sizes.map((size) => {
    const part = c.e.slice(x, axis, start, size);
    start += size;
    return part;
  });
};
const evenly = (extent: number, parts: number): readonly number[] => {
  const size = Math.ceil(extent / parts);
  return Array.from({ length: parts }, (_, i) => Math.max(0, Math.min(size, extent - i * size)));
};

/**
 * One axis of a slice: elements from `start` to before `end` by `step`, numbered as in Python, but for a start before the first element with a
 * step back: there ONNX begins at the first.
 */
const sliceAxis = (c: Call, x: Item, axis: number, start: Dim, end: Dim, step: number): Item => {
  const extent = x.type.shape[axis] as Dim;
  if (step === 0) c.fail("a step of 0");
  if (typeof start === "number" && typeof end === "number" && typeof extent === "number") {
    const [low, high] = step > 0 ? [0, extent] : [-1, extent - 1];
    const limit = (v: number, least: number): number => Math.min(high, Math.max(least, v < 0 ? v + extent : v));
    const first = limit(start, 0);
    const size = extent === 0 ? 0 : Math.max(0, Math.ceil((limit(end, low) - first) / step));
    return size === 0 ? c.e.slice(x, axis, 0, 0) : c.e.slice(x, axis, first, size, step);
  }
  if (step !== 1) {
    if (step === -1 && start === -1 && typeof end === "number" && end < -(2 ** 31) + 2) return c.e.slice(x, axis, -1, extent, -1);
    return c.fail(`a step of ${step} along an axis of size '${dimText(extent)}'`);
  }
  const place = (v: Dim): Dim => {
    if (typeof v !== "number") return v;
    if (c.e.atMost(Math.abs(v), extent) === true) return v < 0 ? addDim(extent, v) : v;
    if (c.e.atMost(extent, Math.abs(v)) === true) return v < 0 ? 0 : extent;
    return c.fail(
      `${v} may lie within an axis of size '${dimText(extent)}' or beyond it; give its symbols limits (--dim NAME=MIN..MAX)`,
    );
  };
  const [from, to] = [place(start), place(end)];
  const size = typeof from === "number" && typeof to === "number" ? Math.max(0, to - from) : subDim(to, from);
  // what may end beyond the axis is taken by indices, which kernels keep within it
  if (c.e.atMost(to, extent) === true) {
    if (typeof from === "number") return c.e.slice(x, axis, from, size);
    if (typeof start === "number" && start < 0) return c.e.slice(x, axis, start, size);
  }
  return c.e.op("take", [x, binary(c.e, "add", c.e.iota([size], 0), c.e.dims([from], "i64", []))], { axis });
};

const slice: Lowering = (c) => {
  const x = c.x0;
  const rank = x.type.shape.length;
  const [starts, ends] = c.opset < 10 ? [c.ints("starts"), c.ints("ends")] : [c.sizes(1), c.sizes(2)];
  if (!starts || !ends || starts.length !== ends.length) return c.fail("starts and ends must be of one length");
  const axes = c.opset < 10 ? c.ints("axes") : c.has(3) ? c.numbers(3) : undefined;
  const steps = c.opset >= 10 && c.has(4) ? c.numbers(4) : starts.map(() => 1);
  const own = c.axes(axes ?? starts.map((_, i) => i), rank);
  if (own.length !== starts.length || steps.length !== starts.length)
    c.fail("starts, ends, axes and steps must be of one length");
  return own.reduce((y, axis, i) => sliceAxis(c, y, axis, starts[i] as Dim, ends[i] as Dim, steps[i] as number), x);
};

/** The shape that two shapes broadcast to. */
export const broadcastShapes = (a: readonly Dim[], b: readonly Dim[]): readonly Dim[] => {
  const rank = Math.max(a.length, b.length);
  return Array.from({ length: rank }, (_, i) => {
    const [x, y] = [a[i - (rank - a.length)] ?? 1, b[i - (rank - b.length)] ?? 1];
    return x === 1 || x === y ? y : y === 1 ? x : unequal(`sizes ${dimText(x)} and ${dimText(y)} do not broadcast`, x, y);
  });
};

const tile: Lowering = (c) => {
  const x = c.x0;
  const { shape } = x.type;
  const repeats = c.sizes(1);
  if (repeats.length !== shape.length) c.fail(`${repeats.length} repeats for ${shape.length} axes`);
  // every axis after one of its repeats
  const apart = c.e.reshape(
    x,
    shape.flatMap((d) => [1, d]),
  );
  const wide = c.e.broadcast(
    apart,
    shape.flatMap((d, i) => [repeats[i] as Dim, d]),
  );
  return c.e.reshape(
    wide,
    shape.map((d, i) => mulDim(d, repeats[i] as Dim)),
  );
};

/** The index within an axis that a place before, in or after it repeats. */
const mirrored: Readonly<Record<string, (i: number, n: number) => number>> = {
  edge: (i, n) => Math.min(n - 1, Math.max(0, i)),
  reflect: (i, n) => {
    if (n === 1) return 0;
    const period = 2 * (n - 1);
    const at = ((i % period) + period) % period;
    return at < n ? at : period - at;
  },
  wrap: (i, n) => ((i % n) + n) % n,
};

/** Indices that are written out. */
const mostPlaces = 2 ** 24;

/** A vector of indices. */
export const indexVector = (e: Emitter, indices: readonly number[]): Item =>
  e.constant({ kind: "tensor", dtype: "i64", shape: [indices.length], data: Float64Array.from(indices) });

const pad: Lowering = (c) => {
  let x = c.x0;
  const rank = x.type.shape.length;
  const pads = c.opset < 11 ? (c.ints("pads") ?? c.fail("attribute 'pads' is missing")) : c.numbers(1);
  const axes = c.opset >= 18 && c.has(3) ? c.axes(c.numbers(3), rank) : x.type.shape.map((_, i) => i);
  if (pads.length !== 2 * axes.length) c.fail(`${pads.length} pads for ${axes.length} axes`);
  const mode = c.text("mode", "constant");
  const value =
    c.opset < 11
      ? c.e.number(c.float("value", 0), x.type.dtype)
      : c.has(2)
        ? c.e.reshape(c.x(2), [])
        : c.e.number(0, x.type.dtype);
  for (const [i, axis] of axes.entries()) {
    const [before, after] = [pads[i] as number, pads[i + axes.length] as number];
    if (before === 0 && after === 0) continue;
    const extent = x.type.shape[axis] as Dim;
    if (mode === "constant") {
      // negative pads take away
      const cut = c.e.slice(x, axis, Math.max(0, -before), addDim(extent, Math.min(0, before) + Math.min(0, after)));
      const block = (size: number): readonly Item[] => (size <= 0 ? [] : [c.e.broadcast(value, cut.type.shape.with(axis, size))]);
      x = c.e.concat([...block(before), cut, ...block(after)], axis);
      continue;
    }
    const index = mirrored[mode] ?? c.fail(`mode '${mode}' is not known`);
    if (typeof extent !== "number") return c.fail(`mode '${mode}' along an axis of size '${extent}'`);
    if (extent === 0) return c.fail(`mode '${mode}' along an axis of no elements`);
    const size = Math.max(0, before + extent + after);
    if (size > mostPlaces) c.fail(`mode '${mode}' to ${size} elements, more than ${mostPlaces}`);
    const places = Array.from({ length: size }, (_, p) => index(p - before, extent));
    x = c.e.op("take", [x, indexVector(c.e, places)], { axis });
  }
  return x;
};

const range: Lowering = (c) => {
  const [start, limit, delta] = [c.x(0), c.x(1), c.x(2)];
  const { dtype } = start.type;
  const step = c.constant(2).data[0] as number;
  if (step === 0) c.fail("a delta of 0");
  const known = [start, limit].map((x) => c.e.tensorOf(x)?.data[0]);
  let size: Dim;
  if (known.every((k) => k !== undefined)) {
    const exact = ((known[1] as number) - (known[0] as number)) / step;
    size = Math.max(0, Math.ceil(exact));
  } else {
    if (isFloat(dtype)) for (const i of [0, 1]) c.constant(i);
    const length = subDim(c.size(1), c.size(0));
    size = step === 1 ? length : c.fail(`a delta of ${step} between sizes`);
  }
  const scalar = (x: Item): Item => c.e.reshape(x, []);
  // integers are exact; floats of 16 bits are rounded once
  const work: DType = isFloat(dtype) && dtype !== "f64" ? "f32" : dtype === "f64" ? "f64" : "i64";
  const places = c.e.iota([size], 0, work);
  const scaled = step === 1 && !delta.runs ? places : binary(c.e, "mul", places, c.e.cast(scalar(delta), work));
  const zero = known[0] === 0 && !start.runs;
  return c.e.cast(zero ? scaled : binary(c.e, "add", scaled, c.e.cast(scalar(start), work)), dtype);
};

const constant: Lowering = (c) => {
  const tensor = c.tensor("value");
  if (tensor) return tensor;
  if (c.hasAttribute("value_float")) return c.e.number(c.float("value_float"), "f32");
  if (c.hasAttribute("value_int")) return c.e.number(c.int("value_int"), "i64");
  const ints = c.hasAttribute("value_ints") ? c.ints("value_ints") : undefined;
  const values = ints ?? (c.hasAttribute("value_floats") ? c.floats("value_floats") : undefined);
  if (values === undefined) return c.fail("its value is a string or sparse, which is not supported");
  return c.e.constant({
    kind: "tensor",
    dtype: ints ? "i64" : "f32",
    shape: [values.length],
    data: Float64Array.from(values),
  });
};

const constantOfShape: Lowering = (c) => {
  const shape = c.sizes(0);
  if (shape.some((d) => typeof d === "number" && d < 0))
    c.fail(`sizes [${shape.map(dimText).join(", ")}] are not all at least 0`);
  const value = c.tensor("value") ?? c.e.number(0, "f32");
  return c.e.broadcast(c.e.reshape(value, []), shape);
};

/** Row and column numbers of the last two axes, for matrices of a shape. */
const places = (c: Call, rows: Dim, columns: Dim): { readonly row: Item; readonly column: Item } => ({
  row: c.e.iota([rows, 1], 0),
  column: c.e.iota([columns], 0),
});

const trilu: Lowering = (c) => {
  const x = c.x0;
  if (x.type.shape.length < 2) c.fail(`needs matrices, got ${x.type.shape.length} axes`);
  const { row, column } = places(c, x.type.shape.at(-2) as Dim, x.type.shape.at(-1) as Dim);
  const shifted = c.has(1) ? binary(c.e, "add", row, c.e.reshape(c.x(1), [])) : row;
  const keep = c.flag("upper", true) ? binary(c.e, "less_equal", shifted, column) : binary(c.e, "less_equal", column, shifted);
  return c.e.op("where", [keep, x, c.e.number(0, x.type.dtype)]);
};

const eyeLike: Lowering = (c) => {
  const { shape, dtype } = c.x0.type;
  if (shape.length !== 2) c.fail(`needs a matrix, got ${shape.length} axes`);
  const to = c.hasAttribute("dtype") ? irDType(typeOf(c, c.int("dtype"))) : dtype;
  const { row, column } = places(c, shape[0] as Dim, shape[1] as Dim);
  const on = binary(c.e, "equal", binary(c.e, "add", row, c.e.number(c.int("k", 0), "i64")), column);
  return c.e.cast(on, to);
};

const oneHot: Lowering = (c) => {
  const indices = c.x(0);
  const depth: Dim = isFloat(c.dtype(1)) ? (c.constant(1).data[0] as number) : c.size(1);
  const values = c.x(2);
  const rank = indices.type.shape.length + 1;
  const axis = c.axis(c.int("axis", -1), rank);
  const wide = wrap(c.e, indices, "i64");
  const apart = c.e.reshape(wide, [...wide.type.shape.slice(0, axis), 1, ...wide.type.shape.slice(axis)]);
  const negative = binary(c.e, "less", apart, c.e.number(0, "i64"));
  const from0 = c.e.op("where", [negative, binary(c.e, "add", apart, c.e.dims([depth], "i64", [])), apart]);
  const shape: readonly Dim[] = Array.from({ length: rank }, (_, i) => (i === axis ? depth : 1));
  const on = binary(c.e, "equal", from0, c.e.iota(shape, axis));
  const value = (i: number): Item => c.e.reshape(c.e.slice(values, 0, i, 1), []);
  return c.e.op("where", [on, value(1), value(0)]);
};

export const shape: Readonly<Record<string, Lowering>> = {
  Constant: constant,
  ConstantOfShape: constantOfShape,
  Shape: shapeOf,
  Size: (c) => c.e.dims([product(c.shape(0))], "i64", []),
  Reshape: reshape,
  Flatten: (c) => {
    const rank = c.rank(0);
    const axis = c.int("axis", 1);
    const at = axis === rank ? rank : c.axis(axis, Math.max(rank, 1));
    return c.e.reshape(c.x0, [product(c.shape(0).slice(0, at)), product(c.shape(0).slice(at))]);
  },
  Squeeze: squeeze,
  Unsqueeze: unsqueeze,
  Transpose: transpose,
  Concat: concat,
  Split: split,
  Slice: slice,
  Expand: (c) => c.e.broadcast(c.x0, broadcastShapes(c.shape(0), c.sizes(1))),
  Tile: tile,
  Pad: pad,
  Range: range,
  Trilu: trilu,
  EyeLike: eyeLike,
  OneHot: oneHot,
};
