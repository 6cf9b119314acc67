import { type ConcreteTensor, cost, elements, tensorOf } from "../bind.ts";
import * as expect from "../expect.ts";
import type { Knowledge, Sample } from "../op.ts";
import { rounder } from "../round.ts";
import type { Tensor } from "../tensor.ts";
import { type TensorType, tensor } from "../type.ts";

const functions = ["sum", "max", "min", "mean", "amax", "prod"] as const;

/** Reduces xs[from..to): sums in double, left to right; max, min and amax give NaN when an element is NaN. */
const reduceGroup = (fn: (typeof functions)[number], xs: Float64Array, from: number, to: number): number => {
  let r = fn === "max" ? Number.NEGATIVE_INFINITY : fn === "min" ? Number.POSITIVE_INFINITY : fn === "prod" ? 1 : 0;
  for (let i = from; i < to; i++) {
    const x = xs[i] as number;
    if (fn === "max") r = Math.max(r, x);
    else if (fn === "min") r = Math.min(r, x);
    else if (fn === "prod") r *= x;
    else if (fn === "amax") r = Math.max(r, Math.abs(x));
    else r += x;
  }
  return fn === "mean" ? r / (to - from) : r;
};

const infer: Knowledge["infer"] = (inputs, attrs) => {
  expect.count(inputs, ["x"]);
  const x = expect.tensorAt(inputs, 0, "x");
  if (x.dtype === "bool") expect.fail(`x must be a number, got ${x.dtype}`);
  const fn = expect.word(attrs, "fn", functions);
  // a whole axis may be of any size, groups are of one that is known
  const whole = expect.int(attrs, "group", 0, 0) === 0;
  if (whole && typeof x.shape.at(-1) === "string") return [tensor(x.dtype, [...x.shape.slice(0, -1), 1])];
  const n = expect.constantDim(x, -1, "x");
  if (n === 0) expect.fail(`cannot reduce an axis of no elements by ${fn}`);
  const group = expect.int(attrs, "group", 0, 0) || n;
  return [tensor(x.dtype, [...x.shape.slice(0, -1), Math.ceil(n / group)])];
};

const sample = (name: string, fn: string, columns: number, group: number, dtype: "f32" | "bf16" | "i32" = "f32"): Sample => ({
  name,
  inputs: [tensor(dtype, ["T", columns])],
  attrs: { fn, ...(group === 0 ? {} : { group }) },
  symbols: { T: 4 },
});

export const reduce: Knowledge = {
  name: "reduce",
  summary: "[..., N] -> [..., ceil(N/group)]: a function of each group of consecutive elements of the last axis, in x's dtype",
  attrs: {
    fn: "`sum`, `max`, `min`, `mean`, `prod`, or `amax`: the largest magnitude",
    group: "elements of a group, fewer in the last one; 0, the default, is the whole axis",
  },
  inputs: ["x"],
  rowwise: "row",
  infer,
  evaluate([input], attrs, [out]) {
    const x = input as Tensor;
    const type = out as ConcreteTensor;
    const n = x.shape.at(-1) as number;
    const group = expect.int(attrs, "group", 0, 0) || n;
    const groups = type.shape.at(-1) as number;
    const fn = expect.word(attrs, "fn", functions);
    const round = rounder(type.dtype);
    const result = new Float64Array(type.shape.reduce((a, b) => a * b, 1));
    for (let i = 0; i < result.length; i++) {
      const start = Math.floor(i / groups) * n;
      const first = (i % groups) * group;
      result[i] = round(reduceGroup(fn, x.data, start + first, start + Math.min(n, first + group)));
    }
    return [tensorOf(type, result)];
  },
  cost: (inputs, attrs, symbols) =>
    cost(elements(inputs[0] as TensorType, symbols), [...inputs, ...infer(inputs, attrs)], symbols),
  samples: [
    ...functions.map((fn) => sample(`${fn} of rows`, fn, 130, 0)),
    ...functions.map((fn) => sample(`${fn} of groups, the last short`, fn, 130, 64)),
    sample("sum, bf16", "sum", 257, 0, "bf16"),
    sample("max, i32", "max", 9, 0, "i32"),
    sample("mean of one column", "mean", 1, 0),
    sample("amax, bf16 groups of 128", "amax", 300, 128, "bf16"),
    { name: "sum of rank 1", inputs: [tensor("f32", [17])], attrs: { fn: "sum" } },
    { name: "mean of a batch's rows", inputs: [tensor("f32", ["B", "S", 40])], attrs: { fn: "mean" }, symbols: { B: 2, S: 3 } },
    ...functions.map((fn) => ({
      name: `${fn} of rows of any length`,
      inputs: [tensor("f32", [3, "L"])],
      attrs: { fn },
      symbols: { L: 45 },
    })),
    { name: "max, rows of tokens, f64", inputs: [tensor("f64", ["T", 2, "L"])], attrs: { fn: "max" }, symbols: { T: 3, L: 7 } },
    { name: "max of rank 3", inputs: [tensor("f32", ["T", 3, 5])], attrs: { fn: "max" }, symbols: { T: 2 } },
  ],
};
