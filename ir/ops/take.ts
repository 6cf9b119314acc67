/** Elements chosen by indices, and elements put where indices say. */
import { type ConcreteTensor, cost, tensorOf } from "../bind.ts";
import * as expect from "../expect.ts";
import type { Knowledge, Sample } from "../op.ts";
import { rounder } from "../round.ts";
import type { Tensor } from "../tensor.ts";
import { type DType, tensor, typeText } from "../type.ts";

const indexTypes: readonly DType[] = ["i32", "i64"];

const inferTake: Knowledge["infer"] = (inputs, attrs) => {
  expect.count(inputs, ["x", "index"]);
  const x = expect.tensorAt(inputs, 0, "x");
  const index = expect.tensorAt(inputs, 1, "index");
  expect.dtype(index, indexTypes, "index");
  const axis = expect.axis(attrs, "axis", x);
  return [tensor(x.dtype, [...x.shape.slice(0, axis), ...index.shape, ...x.shape.slice(axis + 1)])];
};

const takes = (
  name: string,
  dtype: DType,
  shape: readonly (number | string)[],
  index: readonly (number | string)[],
  axis: number,
): Sample => ({
  name,
  inputs: [tensor(dtype, shape), tensor("i64", index)],
  attrs: { axis },
  values: ["normal", { below: typeof shape[axis] === "number" ? (shape[axis] as number) : 1 }],
  symbols: { T: 4 },
});

/** The index, or an error: indices are checked by the interpreter, kernels clamp them to the axis. */
const checked = (index: number, extent: number): number =>
  index >= 0 && index < extent ? index : expect.fail(`index ${index} of an axis of ${extent}`);

export const take: Knowledge = {
  name: "take",
  summary: "x, index -> x with the axis replaced by index's: elements at the indices, which are at least 0 and within the axis",
  attrs: { axis: "the axis of x" },
  inputs: ["x", "index"],
  rowwise: "none",
  infer: inferTake,
  evaluate(inputs, attrs, [out]) {
    const [x, index] = inputs as readonly [Tensor, Tensor];
    const type = out as ConcreteTensor;
    const axis = expect.axis(attrs, "axis", x);
    const extent = x.shape[axis] as number;
    const inner = x.shape.slice(axis + 1).reduce((a, b) => a * b, 1);
    const outer = x.shape.slice(0, axis).reduce((a, b) => a * b, 1);
    const result = new Float64Array(outer * index.data.length * inner);
    let at = 0;
    for (let o = 0; o < outer; o++)
      for (const i of index.data) {
        const from = (o * extent + checked(i, extent)) * inner;
        result.set(x.data.subarray(from, from + inner), at);
        at += inner;
      }
    return [tensorOf(type, result)];
  },
  cost: (inputs, attrs, symbols) => cost(0, [...inputs, ...inferTake(inputs, attrs)], symbols),
  samples: [
    takes("rows", "f32", [9, 5], ["T"], 0),
    takes("columns", "bf16", ["T", 8], [3], 1),
    takes("in between, a matrix of indices", "i64", [2, 6, 3], [2, 2], 1),
    takes("one, its axis gone", "f64", [4, 3], [], 0),
    takes("elements", "u8", [300], ["T", 2], 0),
  ],
};

const functions = ["set", "add", "mul", "max", "min"] as const;

const inferPut: Knowledge["infer"] = (inputs, attrs) => {
  expect.count(inputs, ["x", "index", "updates"]);
  const x = expect.tensorAt(inputs, 0, "x");
  const index = expect.tensorAt(inputs, 1, "index");
  const updates = expect.tensorAt(inputs, 2, "updates");
  expect.rank(x, 1, "x");
  expect.rank(index, 1, "index");
  expect.dtype(index, indexTypes, "index");
  expect.dtype(updates, [x.dtype], "updates");
  if (updates.shape.length !== 1 || updates.shape[0] !== index.shape[0])
    expect.fail(`updates must have the shape of index, got ${typeText(updates)} and ${typeText(index)}`);
  const fn = expect.word(attrs, "fn", functions, "set");
  if (x.dtype === "bool" && fn !== "set") expect.fail(`bools cannot be combined by ${fn}`);
  return [x];
};

const puts = (name: string, dtype: DType, size: number, count: number, fn: string, below: number = size): Sample => ({
  name,
  inputs: [tensor(dtype, [size]), tensor("i64", [count]), tensor(dtype, [count])],
  attrs: { fn },
  values: ["normal", { below }, "normal"],
});

export const put: Knowledge = {
  name: "put",
  summary:
    "x[N], index[M], updates[M] -> [N]: x with the updates at the indices, in order; `fn` of what is there and the update, rounded each time",
  attrs: { fn: "`set` (the default: the last one stays), `add`, `mul`, `max` or `min`" },
  inputs: ["x", "index", "updates"],
  rowwise: "none",
  infer: inferPut,
  evaluate(inputs, attrs, [out]) {
    const [x, index, updates] = inputs as readonly [Tensor, Tensor, Tensor];
    const fn = expect.word(attrs, "fn", functions, "set");
    const round = rounder(x.dtype);
    const result = x.data.slice();
    index.data.forEach((i, m) => {
      const at = checked(i, result.length);
      const [old, update] = [result[at] as number, updates.data[m] as number];
      if (fn === "set") result[at] = update;
      else if (fn === "add") result[at] = round(old + update);
      else if (fn === "mul") result[at] = round(old * update);
      else result[at] = fn === "max" ? Math.max(old, update) : Math.min(old, update);
    });
    return [tensorOf(out as ConcreteTensor, result)];
  },
  cost: (inputs, attrs, symbols) => cost(0, [...inputs, ...inferPut(inputs, attrs)], symbols),
  samples: [
    puts("the last stays", "f32", 12, 20, "set"),
    puts("sums", "f32", 5, 40, "add"),
    puts("sums, bf16", "bf16", 7, 9, "add"),
    puts("products", "f64", 6, 8, "mul"),
    puts("largest", "i32", 9, 12, "max"),
    puts("smallest", "f16", 9, 4, "min"),
    puts("all at one place", "i64", 3, 5, "add", 1),
  ],
};
