import { type ConcreteTensor, cost, elements, tensorOf } from "../bind.ts";
import * as expect from "../expect.ts";
import type { Knowledge, Sample } from "../op.ts";
import { rounder } from "../round.ts";
import type { Tensor } from "../tensor.ts";
import { type DType, type TensorType, tensor } from "../type.ts";

const functions = ["sum", "prod", "max", "min"] as const;

const infer: Knowledge["infer"] = (inputs, attrs) => {
  expect.count(inputs, ["x"]);
  const x = expect.tensorAt(inputs, 0, "x");
  if (x.dtype === "bool") expect.fail("x must be a number, got bool");
  expect.word(attrs, "fn", functions, "sum");
  expect.flag(attrs, "exclusive", false);
  expect.flag(attrs, "reverse", false);
  if (x.shape.length === 0) expect.fail("x must have an axis");
  return [x];
};

const sample = (name: string, dtype: DType, attrs: Sample["attrs"], columns: number = 12): Sample => ({
  name,
  inputs: [tensor(dtype, ["T", columns])],
  attrs,
  symbols: { T: 3 },
});

export const cumulate: Knowledge = {
  name: "cumulate",
  summary:
    "[..., N] -> [..., N]: a function of all elements of the last axis up to each, in f64 for f64, else f32 or better, rounded",
  attrs: {
    fn: "`sum` (the default), `prod`, `max` or `min`",
    exclusive: "true: without the element itself, starting at what changes nothing",
    reverse: "true: from the last element to each",
  },
  inputs: ["x"],
  rowwise: "row",
  infer,
  evaluate([input], attrs, [out]) {
    const x = input as Tensor;
    const n = x.shape.at(-1) as number;
    const fn = expect.word(attrs, "fn", functions, "sum");
    const exclusive = expect.flag(attrs, "exclusive", false);
    const reverse = expect.flag(attrs, "reverse", false);
    const round = rounder(x.dtype);
    const start = { sum: 0, prod: 1, max: Number.NEGATIVE_INFINITY, min: Number.POSITIVE_INFINITY }[fn];
    const step = (a: number, b: number): number =>
      fn === "sum" ? a + b : fn === "prod" ? a * b : fn === "max" ? Math.max(a, b) : Math.min(a, b);
    const result = new Float64Array(x.data.length);
    for (let row = 0; row < result.length; row += n) {
      let so = start;
      for (let i = 0; i < n; i++) {
        const at = row + (reverse ? n - 1 - i : i);
        const next = step(so, x.data[at] as number);
        result[at] = round(exclusive ? so : next);
        so = next;
      }
    }
    return [tensorOf(out as ConcreteTensor, result)];
  },
  cost: (inputs, attrs, symbols) =>
    cost(elements(inputs[0] as TensorType, symbols), [...inputs, ...infer(inputs, attrs)], symbols),
  samples: [
    sample("sums", "f32", {}),
    sample("sums before", "f32", { exclusive: true }),
    sample("sums from the end", "i64", { reverse: true }),
    sample("sums after", "f64", { exclusive: true, reverse: true }),
    sample("products", "f32", { fn: "prod" }, 5),
    sample("largest so far", "bf16", { fn: "max" }),
    sample("one column", "i32", {}, 1),
  ],
};
