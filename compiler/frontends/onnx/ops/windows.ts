/** Operators over windows of the axes after the channels: convolutions and pools. Windows are taken by constant indices, then multiplied or reduced. */
import { type Dim, product } from "../../../../ir/dim.ts";
import { isFloat } from "../../../../ir/type.ts";
import type { Call, Lowering } from "../call.ts";
import type { Item } from "../emitter.ts";
import { binary, inWide } from "./elementwise.ts";

/** One axis: its size, the window's, and what lies before and after the axis. */
interface Axis {
  readonly size: number;
  readonly kernel: number;
  readonly stride: number;
  readonly dilation: number;
  readonly before: number;
  readonly after: number;
  /** windows along it */
  readonly count: number;
}

const axesOf = (c: Call, sizes: readonly Dim[], kernel: readonly number[]): readonly Axis[] => {
  const all = (name: string, otherwise: number): readonly number[] => {
    const given = c.ints(name);
    if (given !== undefined && given.length !== kernel.length * (name === "pads" ? 2 : 1))
      c.fail(`attribute '${name}' has ${given.length} numbers for ${kernel.length} axes`);
    return given ?? kernel.map(() => otherwise);
  };
  const [strides, dilations] = [all("strides", 1), all("dilations", 1)];
  const pads = c.ints("pads") === undefined ? [...kernel, ...kernel].map(() => 0) : all("pads", 0);
  const auto = c.text("auto_pad", "NOTSET");
  const up = c.flag("ceil_mode", false);
  return kernel.map((k, i) => {
    const size = sizes[i] as Dim;
    if (typeof size !== "number") return c.fail(`it goes over an axis of size '${size}'; give that size a number`);
    const [stride, dilation] = [strides[i] as number, dilations[i] as number];
    if (stride < 1 || dilation < 1 || k < 1) c.fail("kernel, strides and dilations must be at least 1");
    const span = (k - 1) * dilation + 1;
    if (auto === "SAME_UPPER" || auto === "SAME_LOWER") {
      const count = Math.ceil(size / stride);
      const missing = Math.max(0, (count - 1) * stride + span - size);
      const small = Math.floor(missing / 2);
      const before = auto === "SAME_UPPER" ? small : missing - small;
      return { size, kernel: k, stride, dilation, before, after: missing - before, count };
    }
    const [before, after] = auto === "VALID" ? [0, 0] : [pads[i] as number, pads[i + kernel.length] as number];
    const exact = (size + before + after - span) / stride;
    let count = (up ? Math.ceil(exact) : Math.floor(exact)) + 1;
    // a window that would begin behind the axis and what lies before it is none
    if (up && (count - 1) * stride >= size + before) count--;
    if (count < 0) c.fail(`a window of ${span} in an axis of ${size + before + after}`);
    return { size, kernel: k, stride, dilation, before, after, count };
  });
};

/** x[N, C, ...] with `beyond` outside its axes -> [N, C, windows..., elements of a window]. */
const windowsOf = (c: Call, x: Item, axes: readonly Axis[], beyond: Item): Item => {
  let item = x;
  axes.forEach((a, i) => {
    const at = 2 + 2 * i;
    const block = (n: number): readonly Item[] => (n <= 0 ? [] : [c.e.broadcast(beyond, item.type.shape.with(at, n))]);
    // as far as the last window reaches
    const reach = (a.count - 1) * a.stride + (a.kernel - 1) * a.dilation + 1;
    item = c.e.concat([...block(a.before), item, ...block(Math.max(a.after, reach - a.before - a.size))], at);
    const places = Array.from(
      { length: a.count * a.kernel },
      (_, p) => Math.floor(p / a.kernel) * a.stride + (p % a.kernel) * a.dilation,
    );
    const index = c.e.constant({ kind: "tensor", dtype: "i64", shape: [a.count, a.kernel], data: Float64Array.from(places) });
    item = c.e.op("take", [item, index], { axis: at });
  });
  const n = axes.length;
  const order = [0, 1, ...axes.map((_, i) => 2 + 2 * i), ...axes.map((_, i) => 3 + 2 * i)];
  const apart = c.e.transpose(item, order);
  return c.e.reshape(apart, [...apart.type.shape.slice(0, 2 + n), axes.reduce((p, a) => p * a.kernel, 1)]);
};

const conv: Lowering = (c) =>
  inWide(c.e, [c.x(0), c.x(1), ...(c.has(2) ? [c.x(2)] : [])], (x, w, bias) => {
    const [batch, channels, ...sizes] = x.type.shape;
    const [outputs, inGroup, ...kernel] = w.type.shape as readonly number[];
    const groups = c.int("group", 1);
    if (
      typeof channels !== "number" ||
      typeof outputs !== "number" ||
      typeof inGroup !== "number" ||
      kernel.length !== sizes.length
    )
      return c.fail("it takes [N, C, ...] and weights [M, C / group, ...] of as many axes");
    if (channels !== inGroup * groups || outputs % groups !== 0)
      c.fail(`${groups} groups of ${inGroup} channels are not the ${channels} of its input, or do not divide ${outputs} outputs`);
    const axes = axesOf(c, sizes, kernel);
    const places = axes.map((a) => a.count);
    const area = kernel.reduce((a, b) => a * b, 1);
    const count = places.reduce((a, b) => a * b, 1);
    const windows = windowsOf(c, x, axes, c.e.number(0, x.type.dtype));
    const rows = c.e.transpose(c.e.reshape(windows, [batch as Dim, groups, inGroup, count, area]), [0, 1, 3, 2, 4]);
    const left = c.e.reshape(rows, [batch as Dim, groups, count, inGroup * area]);
    const right = c.e.transpose(c.e.reshape(w, [groups, outputs / groups, inGroup * area]), [0, 2, 1]);
    const sums = c.e.transpose(c.e.op("matmul", [left, right]), [0, 1, 3, 2]);
    const all = c.e.reshape(sums, [batch as Dim, outputs, ...places]);
    return bias === undefined ? all : binary(c.e, "add", all, c.e.reshape(bias, [outputs, ...places.map((): Dim => 1)]));
  });

const kernelOf = (c: Call): readonly number[] => c.ints("kernel_shape") ?? c.fail("attribute 'kernel_shape' is missing");

const maxPool: Lowering = (c) => {
  if (c.wants(1)) c.fail("places of the largest elements are not made");
  const work = (x: Item): Item => {
    const axes = axesOf(c, x.type.shape.slice(2), kernelOf(c));
    const least = isFloat(x.type.dtype) ? Number.NEGATIVE_INFINITY : x.type.dtype.startsWith("u") ? 0 : -128;
    const windows = windowsOf(c, x, axes, c.e.number(least, x.type.dtype));
    return c.e.reshape(c.e.op("reduce", [windows], { fn: "max" }), windows.type.shape.slice(0, -1));
  };
  return isFloat(c.dtype(0)) ? inWide(c.e, [c.x0], work) : work(c.x0);
};

const averagePool: Lowering = (c) =>
  inWide(c.e, [c.x0], (x) => {
    const axes = axesOf(c, x.type.shape.slice(2), kernelOf(c));
    const sumOf = (of: Item): Item => {
      const windows = windowsOf(c, of, axes, c.e.number(0, of.type.dtype));
      return c.e.reshape(c.e.op("reduce", [windows], { fn: "sum" }), windows.type.shape.slice(0, -1));
    };
    // elements that count: those of the axes, with count_include_pad those between pads too, never those beyond
    const inside = c.flag("count_include_pad", false);
    const sizes = axes.map((a) => (inside ? a.before + a.size + a.after : a.size));
    const ones = c.e.broadcast(c.e.number(1, x.type.dtype), [1, 1, ...sizes]);
    const counted = inside
      ? countsOf(
          c,
          ones,
          axes.map((a, i) => ({ ...a, size: sizes[i] as number, before: 0, after: 0 })),
        )
      : sumOf(ones);
    return binary(c.e, "div", sumOf(x), counted);
  });
/** How many of `ones` lie in each window. */
const countsOf = (c: Call, ones: Item, axes: readonly Axis[]): Item => {
  const windows = windowsOf(c, ones, axes, c.e.number(0, ones.type.dtype));
  return c.e.reshape(c.e.op("reduce", [windows], { fn: "sum" }), windows.type.shape.slice(0, -1));
};

const globalPool =
  (fn: "mean" | "max"): Lowering =>
  (c) =>
    inWide(c.e, [c.x0], (x) => {
      const { shape } = x.type;
      const rows = c.e.reshape(x, [...shape.slice(0, 2), product(shape.slice(2))]);
      return c.e.reshape(c.e.op("reduce", [rows], { fn }), [...shape.slice(0, 2), ...shape.slice(2).map((): Dim => 1)]);
    });

/** Blocks of a matrix of pixels and channels, one into the other: [N, C, H, W]. */
const blocks =
  (toSpace: boolean): Lowering =>
  (c) => {
    const [n, channels, height, width] = c.shape(0) as readonly [Dim, number, number, number];
    const size = c.int("blocksize");
    if (toSpace) {
      const deep = channels / (size * size);
      const crd = c.text("mode", "DCR") === "CRD";
      const apart = c.e.reshape(c.x0, crd ? [n, deep, size, size, height, width] : [n, size, size, deep, height, width]);
      const near = c.e.transpose(apart, crd ? [0, 1, 4, 2, 5, 3] : [0, 3, 4, 1, 5, 2]);
      return c.e.reshape(near, [n, deep, height * size, width * size]);
    }
    const apart = c.e.reshape(c.x0, [n, channels, height / size, size, width / size, size]);
    return c.e.reshape(c.e.transpose(apart, [0, 3, 5, 1, 2, 4]), [n, channels * size * size, height / size, width / size]);
  };

export const windows: Readonly<Record<string, Lowering>> = {
  Conv: conv,
  MaxPool: maxPool,
  AveragePool: averagePool,
  GlobalAveragePool: globalPool("mean"),
  GlobalMaxPool: globalPool("max"),
  DepthToSpace: blocks(true),
  SpaceToDepth: blocks(false),
};
