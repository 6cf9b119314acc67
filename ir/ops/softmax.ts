import { type ConcreteTensor, cost, elements, tensorOf } from "../bind.ts";
import * as expect from "../expect.ts";
import type { Value } from "../graph.ts";
import type { Knowledge, Sample } from "../op.ts";
import { rounder } from "../round.ts";
import type { Tensor } from "../tensor.ts";
import { type DType, isFloat, type TensorType, tensor } from "../type.ts";

const infer: Knowledge["infer"] = (inputs) => {
  expect.count(inputs, ["x"]);
  const x = expect.tensorAt(inputs, 0, "x");
  if (!isFloat(x.dtype)) expect.fail(`x must be a float, got ${x.dtype}`);
  if (expect.dimAt(x, -1) === 0) expect.fail("softmax of an axis of no elements");
  return [x];
};

const sample = (name: string, columns: number, dtype: DType): Sample => ({
  name,
  inputs: [tensor(dtype, ["T", columns])],
  attrs: {},
  symbols: { T: 4 },
});

export const softmax: Knowledge = {
  name: "softmax",
  summary: "[..., N] -> e^(x - max x) / sum e^(x - max x) over the last axis, in f32, rounded to x's dtype",
  attrs: {},
  inputs: ["x"],
  rowwise: "row",
  infer,
  evaluate([input], _, [out]) {
    const x = input as Tensor;
    const type = out as ConcreteTensor;
    const round = rounder(type.dtype);
    const f32 = Math.fround;
    const n = type.shape.at(-1) as number;
    const result = new Float64Array(x.data.length);
    for (let row = 0; row < x.data.length; row += n) {
      let max = Number.NEGATIVE_INFINITY;
      for (let c = 0; c < n; c++) max = Math.max(max, f32(x.data[row + c] as number));
      let sum = 0;
      for (let c = 0; c < n; c++) {
        const e = f32(Math.exp(f32(f32(x.data[row + c] as number) - max)));
        result[row + c] = e;
        sum += e;
      }
      for (let c = 0; c < n; c++) result[row + c] = round(f32((result[row + c] as number) / f32(sum)));
    }
    return [tensorOf(type, result)];
  },
  cost: (inputs, attrs, symbols) =>
    cost(5 * elements(inputs[0] as TensorType, symbols), [...inputs, ...infer(inputs, attrs)], symbols),
  expand(b, op) {
    const x = op.inputs[0] as Value;
    const { dtype } = x.type as TensorType;
    const wide = dtype === "f32" ? x : b.op("cast", [x], { to: "f32" });
    const powers = b.op("exp", [b.op("sub", [wide, b.op("reduce", [wide], { fn: "max" })])]);
    const result = b.op("div", [powers, b.op("reduce", [powers], { fn: "sum" })]);
    return [dtype === "f32" ? result : b.op("cast", [result], { to: dtype })];
  },
  samples: [
    sample("router", 48, "f32"),
    sample("ragged", 131, "f32"),
    sample("one column", 1, "f32"),
    sample("bf16", 64, "bf16"),
    { name: "rank 3", inputs: [tensor("f32", ["T", 3, 5])], attrs: {}, symbols: { T: 2 } },
  ],
};
