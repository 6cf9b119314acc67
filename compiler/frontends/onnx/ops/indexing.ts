/** Operators that read and write where indices say. All come down to `take` and `put` with indices into the elements of a tensor. */
import { type Dim, product } from "../../../../ir/dim.ts";
import type { Call, Lowering } from "../call.ts";
import type { Item } from "../emitter.ts";
import { binary } from "./elementwise.ts";

/** Indices as i64 from 0: those below 0 count from the end of the axis. */
export const fromZero = (c: Call, index: Item, extent: Dim): Item => {
  const known = c.e.tensorOf(index);
  const wide = c.e.cast(index, "i64");
  if (known && !index.runs && typeof extent === "number") {
    const wrong = known.data.find((i) => i < -extent || i >= extent);
    if (wrong !== undefined) c.fail(`index ${wrong} of an axis of ${extent}`);
    if (known.data.every((i) => i >= 0)) return wide;
  }
  const negative = binary(c.e, "less", wide, c.e.number(0, "i64"));
  return c.e.op("where", [negative, binary(c.e, "add", wide, c.e.dims([extent], "i64", [])), wide]);
};

const times = (c: Call, x: Item, by: Dim): Item => (by === 1 ? x : binary(c.e, "mul", x, c.e.dims([by], "i64", [])));

/** For each axis how many elements it is from one index to the next. */
const strides = (shape: readonly Dim[]): readonly Dim[] => shape.map((_, i) => product(shape.slice(i + 1)));

const gather: Lowering = (c) => {
  const axis = c.axis(c.int("axis", 0), c.rank(0));
  return c.e.op("take", [c.x0, fromZero(c, c.x(1), c.shape(0)[axis] as Dim)], { axis });
};

/** Places in a flat tensor of `shape` that elements of `index` mean along an axis, all other axes counting as index's own. */
const elementPlaces = (c: Call, index: Item, shape: readonly Dim[], axis: number): Item => {
  const steps = strides(shape);
  let at = times(c, fromZero(c, index, shape[axis] as Dim), steps[axis] as Dim);
  index.type.shape.forEach((size, i) => {
    if (i === axis || size === 1) return;
    const own = index.type.shape.map((d, j): Dim => (j === i ? d : 1));
    at = binary(c.e, "add", at, times(c, c.e.iota(own, i), steps[i] as Dim));
  });
  return c.e.broadcast(at, index.type.shape);
};

const flat = (c: Call, x: Item): Item => c.e.reshape(x, [product(x.type.shape)]);

const gatherElements: Lowering = (c) => {
  const axis = c.axis(c.int("axis", 0), c.rank(0));
  if (c.rank(1) !== c.rank(0)) c.fail(`indices must have ${c.rank(0)} axes, got ${c.rank(1)}`);
  return c.e.op("take", [flat(c, c.x0), elementPlaces(c, c.x(1), c.shape(0), axis)], { axis: 0 });
};

/** Where the tuples of the last axis of `index` point: the first element of each slice, in a flat tensor of `shape`. */
const tuplePlaces = (c: Call, index: Item, shape: readonly Dim[], batch: number): Item => {
  const tuple = index.type.shape.at(-1) ?? c.fail("indices must have an axis");
  if (typeof tuple !== "number") return c.fail("the last axis of indices must be a number");
  if (batch + tuple > shape.length) c.fail(`indices of ${tuple} for ${shape.length - batch} axes`);
  const steps = strides(shape);
  const lead = index.type.shape.slice(0, -1);
  let at: Item = c.e.number(0, "i64");
  for (let i = 0; i < tuple; i++) {
    const part = c.e.reshape(c.e.slice(index, index.type.shape.length - 1, i, 1), lead);
    at = binary(c.e, "add", at, times(c, fromZero(c, part, shape[batch + i] as Dim), steps[batch + i] as Dim));
  }
  for (let i = 0; i < batch; i++) {
    const own = lead.map((d, j): Dim => (j === i ? d : 1));
    at = binary(c.e, "add", at, times(c, c.e.iota(own, i), steps[i] as Dim));
  }
  return c.e.broadcast(at, lead);
};

/** Every element of the slices that begin at `at`: [..., elements of a slice]. */
const sliceElements = (c: Call, at: Item, size: Dim): Item =>
  binary(c.e, "add", c.e.reshape(at, [...at.type.shape, 1]), c.e.iota([size], 0));

const gatherNd: Lowering = (c) => {
  const batch = c.int("batch_dims", 0);
  const [x, index] = [c.x(0), c.x(1)];
  if (!(batch >= 0 && batch < Math.min(c.rank(0), c.rank(1))))
    c.fail(`batch_dims ${batch} for ${c.rank(0)} and ${c.rank(1)} axes`);
  const at = tuplePlaces(c, index, x.type.shape, batch);
  const rest = x.type.shape.slice(batch + (index.type.shape.at(-1) as number));
  const places = sliceElements(c, at, product(rest));
  return c.e.reshape(c.e.op("take", [flat(c, x), places], { axis: 0 }), [...index.type.shape.slice(0, -1), ...rest]);
};

const functions: Readonly<Record<string, string>> = { none: "set", add: "add", mul: "mul", max: "max", min: "min" };
const functionOf = (c: Call): string => {
  const name = c.text("reduction", "none");
  return functions[name] ?? c.fail(`reduction '${name}' is not known`);
};

/** x with updates where `places`, of the updates' shape, point in its elements. */
export const scattered = (c: Call, x: Item, places: Item, updates: Item, fn: string): Item => {
  const to = flat(c, x);
  const result = c.e.op("put", [to, flat(c, places), flat(c, updates)], { fn });
  return c.e.reshape(result, x.type.shape);
};

const scatterElements: Lowering = (c) => {
  const axis = c.axis(c.int("axis", 0), c.rank(0));
  if (c.rank(1) !== c.rank(0)) c.fail(`indices must have ${c.rank(0)} axes, got ${c.rank(1)}`);
  return scattered(c, c.x0, elementPlaces(c, c.x(1), c.shape(0), axis), c.x(2), functionOf(c));
};

const scatterNd: Lowering = (c) => {
  const [x, index, updates] = [c.x(0), c.x(1), c.x(2)];
  const at = tuplePlaces(c, index, x.type.shape, 0);
  const size = product(x.type.shape.slice(index.type.shape.at(-1) as number));
  return scattered(c, x, sliceElements(c, at, size), updates, functionOf(c));
};

export const indices: Readonly<Record<string, Lowering>> = {
  Gather: gather,
  GatherElements: gatherElements,
  GatherND: gatherNd,
  ScatterElements: scatterElements,
  Scatter: scatterElements,
  ScatterND: scatterNd,
};
