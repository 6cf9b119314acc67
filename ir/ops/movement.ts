/** Ops that move elements without changing them: reshape, transpose, slice, broadcast, concat. Tensors of any rank and dtype. */
import { type ConcreteTensor, cost, tensorOf } from "../bind.ts";
import { addDim, type Dim, dimText, product } from "../dim.ts";
import * as expect from "../expect.ts";
import type { Knowledge, Sample } from "../op.ts";
import type { Tensor } from "../tensor.ts";
import { type DType, type TensorType, tensor, typeText } from "../type.ts";

/** Elements from one index of an axis to the next, row-major. */
export const stridesOf = (shape: readonly number[]): number[] => {
  const strides = shape.map(() => 1);
  for (let i = shape.length - 2; i >= 0; i--) strides[i] = (strides[i + 1] as number) * (shape[i + 1] as number);
  return strides;
};

/** Elements of `shape`, row-major, read from x where index 0 is at `start` and each axis goes on by its stride. */
export const gatherStrided = (
  x: Float64Array,
  shape: readonly number[],
  strides: readonly number[],
  start: number = 0,
): Float64Array => {
  const result = new Float64Array(shape.reduce((a, b) => a * b, 1));
  const index = shape.map(() => 0);
  let at = start;
  for (let i = 0; i < result.length; i++) {
    result[i] = x[at] as number;
    for (let axis = shape.length - 1; axis >= 0; axis--) {
      const n = (index[axis] as number) + 1;
      const wraps = n === shape[axis];
      index[axis] = wraps ? 0 : n;
      at += (wraps ? 1 - n : 1) * (strides[axis] as number);
      if (!wraps) break;
    }
  }
  return result;
};

const moves = (infer: Knowledge["infer"]): Pick<Knowledge, "infer" | "cost" | "rowwise"> => ({
  infer,
  rowwise: "none",
  cost: (inputs, attrs, symbols) => cost(0, [...inputs, ...infer(inputs, attrs)], symbols),
});
const only = (inputs: Parameters<Knowledge["infer"]>[0]): TensorType => {
  expect.count(inputs, ["x"]);
  return expect.tensorAt(inputs, 0, "x");
};
const sample = (
  name: string,
  dtype: DType,
  shape: readonly Dim[],
  attrs: Sample["attrs"],
  symbols: Sample["symbols"] = { T: 5 },
): Sample => ({
  name,
  inputs: [tensor(dtype, shape)],
  attrs,
  symbols,
});

export const reshape: Knowledge = {
  name: "reshape",
  summary: "x -> the same elements in row-major order in another shape",
  attrs: { shape: "dims of the result, as many elements as x has" },
  inputs: ["x"],
  ...moves((inputs, attrs) => {
    const x = only(inputs);
    const shape = expect.dims(attrs, "shape");
    const [from, to] = [product(x.shape), product(shape)];
    if (typeof from === "number" && typeof to === "number" && from !== to)
      expect.fail(`${typeText(x)} has ${from} elements, shape [${shape.map(dimText).join(",")}] has ${to}`);
    return [tensor(x.dtype, shape)];
  }),
  evaluate([input], _, [out]) {
    const x = input as Tensor;
    const type = out as ConcreteTensor;
    const count = type.shape.reduce((a, b) => a * b, 1);
    if (count !== x.data.length) expect.fail(`reshape: ${x.data.length} elements do not make the ${count} of ${typeText(type)}`);
    return [tensorOf(type, x.data)];
  },
  samples: [
    sample("rows of heads", "bf16", ["T", 12], { shape: ["T", "3", "4"] }),
    sample("heads joined", "f32", ["T", 3, 5], { shape: ["T", "15"] }),
    sample("flat", "i8", [2, 3, 4], { shape: [24] }),
    sample("a scalar", "f64", [1, 1], { shape: [] }),
    sample("tokens of two axes", "i64", ["T", 2, 3], { shape: ["2*T", "3"] }),
  ],
};

export const transpose: Knowledge = {
  name: "transpose",
  summary: "x -> its axes in another order: axis i of the result is axis perm[i] of x",
  attrs: { perm: "every axis of x once" },
  inputs: ["x"],
  ...moves((inputs, attrs) => {
    const x = only(inputs);
    const perm = expect.ints(attrs, "perm");
    if (perm.length !== x.shape.length || [...perm].sort((a, b) => a - b).some((p, i) => p !== i))
      expect.fail(`attribute 'perm' must name each axis of ${typeText(x)} once, got [${perm.join(",")}]`);
    return [
      tensor(
        x.dtype,
        perm.map((p) => x.shape[p] as Dim),
      ),
    ];
  }),
  evaluate([input], attrs, [out]) {
    const x = input as Tensor;
    const type = out as ConcreteTensor;
    const strides = stridesOf(x.shape);
    const perm = expect.ints(attrs, "perm");
    return [
      tensorOf(
        type,
        gatherStrided(
          x.data,
          type.shape,
          perm.map((p) => strides[p] as number),
        ),
      ),
    ];
  },
  samples: [
    sample("matrix", "f32", ["T", 7], { perm: [1, 0] }),
    sample("heads before tokens", "bf16", [2, "T", 3, 8], { perm: [0, 2, 1, 3] }),
    sample("last axis kept", "i64", ["T", 3, 4], { perm: [1, 0, 2] }),
    sample("cycle", "f64", [2, 3, 4], { perm: [2, 0, 1] }),
    sample("bytes", "bool", [65, 70], { perm: [1, 0] }),
    sample("keys of a batch", "f32", ["B", "S", 24], { perm: [0, 2, 1] }, { B: 2, S: 35 }),
    sample("as it is", "f16", [4], { perm: [0] }),
  ],
};

export const slice: Knowledge = {
  name: "slice",
  summary: "x -> along one axis, element i of the result is element start + i * step of x",
  attrs: {
    axis: "the axis",
    start: "index of the first element; below 0: counted from the axis's end",
    size: "dim of the result's axis",
    step: "from one element to the next, below 0 to go back; 1 unless given",
  },
  inputs: ["x"],
  ...moves((inputs, attrs) => {
    const x = only(inputs);
    const axis = expect.axis(attrs, "axis", x);
    const size = expect.dims(attrs, "size")[0] ?? expect.fail("attribute 'size' must be one dim");
    const start = expect.integer(attrs, "start");
    const step = expect.integer(attrs, "step", 1);
    const extent = x.shape[axis] as Dim;
    if (typeof size === "number" && typeof extent === "number" && size > 0) {
      const first = start < 0 ? start + extent : start;
      const last = first + (size - 1) * step;
      if (Math.min(first, last) < 0 || Math.max(first, last) >= extent)
        expect.fail(`elements ${first} to ${last} of axis ${axis} of ${typeText(x)}, which has ${extent}`);
    }
    return [tensor(x.dtype, x.shape.with(axis, size))];
  }),
  evaluate([input], attrs, [out]) {
    const x = input as Tensor;
    const type = out as ConcreteTensor;
    const axis = expect.axis(attrs, "axis", x);
    const strides = stridesOf(x.shape);
    const stride = strides[axis] as number;
    const start = expect.integer(attrs, "start");
    const extent = x.shape[axis] as number;
    const first = start < 0 ? start + extent : start;
    const step = expect.integer(attrs, "step", 1);
    const last = first + ((type.shape[axis] as number) - 1) * step;
    if (type.shape[axis] !== 0 && (Math.min(first, last) < 0 || Math.max(first, last) >= extent))
      expect.fail(`slice: elements ${first} to ${last} of an axis of ${extent}`);
    return [tensorOf(type, gatherStrided(x.data, type.shape, strides.with(axis, stride * step), first * stride))];
  },
  samples: [
    sample("columns", "f32", ["T", 12], { axis: 1, start: 3, size: ["5"] }),
    sample("the last row", "bf16", ["T", 6], { axis: 0, start: -1, size: [1] }),
    sample("every second", "i32", [3, 9, 2], { axis: 1, start: 1, size: [4], step: 2 }),
    sample("backwards", "f64", [2, 5], { axis: 1, start: -1, size: [5], step: -1 }),
    sample("all", "u8", [7], { axis: 0, start: 0, size: [7] }),
    sample("the last of a sequence", "bf16", ["B", "S", 6], { axis: 1, start: -1, size: [1] }, { B: 3, S: 4 }),
    sample("rows by a symbol", "f16", ["2*T", 3], { axis: 0, start: 0, size: ["T"] }),
  ],
};

export const broadcast: Knowledge = {
  name: "broadcast",
  summary: "x -> repeated along axes where it has 1, and along new ones in front, as numpy does",
  attrs: { shape: "dims of the result" },
  inputs: ["x"],
  ...moves((inputs, attrs) => {
    const x = only(inputs);
    const shape = expect.dims(attrs, "shape");
    const lead = shape.length - x.shape.length;
    const why = `${typeText(x)} does not broadcast to [${shape.map(dimText).join(",")}]`;
    if (lead < 0) expect.fail(why);
    const other = x.shape.findIndex((d, i) => d !== 1 && d !== shape[lead + i]);
    if (other >= 0) expect.unequal(why, x.shape[other] as Dim, shape[lead + other] as Dim);
    return [tensor(x.dtype, shape)];
  }),
  evaluate([input], _, [out]) {
    const x = input as Tensor;
    const type = out as ConcreteTensor;
    const own = stridesOf(x.shape);
    const lead = type.shape.length - x.shape.length;
    const strides = type.shape.map((_, i) => (i < lead || x.shape[i - lead] === 1 ? 0 : (own[i - lead] as number)));
    return [tensorOf(type, gatherStrided(x.data, type.shape, strides))];
  },
  samples: [
    sample("heads repeated", "bf16", ["T", 2, 1, 8], { shape: ["T", 2, 3, 8].map(String) }),
    sample("a scalar", "f32", [], { shape: [3, 4] }),
    sample("a row", "i64", [5], { shape: [3, 2, 5] }),
    sample("a column", "bool", [4, 1], { shape: [4, 6] }),
  ],
};

export const concat: Knowledge = {
  name: "concat",
  summary: "inputs... -> one after another along an axis, equal in all other axes",
  attrs: { axis: "the axis" },
  inputs: ["inputs..."],
  ...moves((inputs, attrs) => {
    const [first, ...rest] = inputs.map((_, i) => expect.tensorAt(inputs, i, `input ${i}`));
    if (first === undefined) return expect.fail("takes inputs");
    const axis = expect.axis(attrs, "axis", first);
    let size = first.shape[axis] as Dim;
    for (const t of rest) {
      expect.dtype(t, [first.dtype], "every input");
      const why = `${typeText(t)} does not go on ${typeText(first)} along axis ${axis}`;
      if (t.shape.length !== first.shape.length) expect.fail(why);
      const other = t.shape.findIndex((d, i) => i !== axis && d !== first.shape[i]);
      if (other >= 0) expect.unequal(why, first.shape[other] as Dim, t.shape[other] as Dim);
      size = addDim(size, t.shape[axis] as Dim);
    }
    return [tensor(first.dtype, first.shape.with(axis, size))];
  }),
  evaluate(inputs, attrs, [out]) {
    const type = out as ConcreteTensor;
    const axis = expect.axis(attrs, "axis", type);
    const result = new Float64Array(type.shape.reduce((a, b) => a * b, 1));
    const inner = type.shape.slice(axis + 1).reduce((a, b) => a * b, 1);
    const row = (type.shape[axis] as number) * inner;
    let at = 0;
    for (const x of inputs as readonly Tensor[]) {
      const own = (x.shape[axis] as number) * inner;
      for (let i = 0; i * own < x.data.length && own > 0; i++) result.set(x.data.subarray(i * own, (i + 1) * own), i * row + at);
      at += own;
    }
    return [tensorOf(type, result)];
  },
  samples: [
    {
      name: "halves",
      inputs: [tensor("f32", ["T", 4]), tensor("f32", ["T", 3])],
      attrs: { axis: 1 },
      symbols: { T: 5 },
    },
    {
      name: "tokens after a cache",
      inputs: [tensor("bf16", [2, 6, 4]), tensor("bf16", [2, "T", 4])],
      attrs: { axis: 1 },
      symbols: { T: 3 },
    },
    {
      name: "a batch's tokens after its cache",
      inputs: [tensor("f32", ["B", 2, "P", 4]), tensor("f32", ["B", 2, "S", 4])],
      attrs: { axis: 2 },
      symbols: { B: 2, P: 3, S: 2 },
    },
    { name: "three scalars' vectors", inputs: [1, 1, 2].map((n) => tensor("i64", [n])), attrs: { axis: 0 } },
    { name: "one", inputs: [tensor("u16", [2, 2])], attrs: { axis: 0 } },
  ],
};
