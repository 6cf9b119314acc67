import { type ConcreteTensor, cost, tensorOf } from "../bind.ts";
import * as expect from "../expect.ts";
import type { Knowledge, Sample } from "../op.ts";
import type { Tensor } from "../tensor.ts";
import { type DType, tensor } from "../type.ts";

const infer: Knowledge["infer"] = (inputs, attrs) => {
  expect.count(inputs, ["x"]);
  const x = expect.tensorAt(inputs, 0, "x");
  const groups = expect.constantDim(x, -1, "x");
  const group = expect.int(attrs, "group", 1);
  const size = expect.int(attrs, "size", 1);
  if (Math.ceil(size / group) !== groups)
    expect.fail(`${size} elements in groups of ${group} are ${Math.ceil(size / group)} groups, x has ${groups}`);
  return [tensor(x.dtype, [...x.shape.slice(0, -1), size])];
};

const sample = (name: string, groups: number, group: number, size: number, dtype: DType = "f32"): Sample => ({
  name,
  inputs: [tensor(dtype, ["T", groups])],
  attrs: { group, size },
  symbols: { T: 3 },
});

export const spread: Knowledge = {
  name: "spread",
  summary: "[..., G] -> [..., size]: element c is x's element floor(c / group) of the last axis",
  attrs: { group: "elements that share one of x", size: "elements of the result's last axis" },
  inputs: ["x"],
  rowwise: "row",
  infer,
  evaluate([input], attrs, [out]) {
    const x = input as Tensor;
    const type = out as ConcreteTensor;
    const group = expect.int(attrs, "group", 1);
    const size = type.shape.at(-1) as number;
    const groups = x.shape.at(-1) as number;
    const result = new Float64Array(type.shape.reduce((a, b) => a * b, 1));
    for (let i = 0; i < result.length; i++)
      result[i] = x.data[Math.floor(i / size) * groups + Math.floor((i % size) / group)] as number;
    return [tensorOf(type, result)];
  },
  cost: (inputs, attrs, symbols) => cost(0, [...inputs, ...infer(inputs, attrs)], symbols),
  samples: [
    sample("whole groups", 2, 128, 256),
    sample("a short last group", 3, 128, 300),
    sample("one to a row", 1, 77, 77),
    sample("identity", 9, 1, 9, "bf16"),
    sample("integers", 4, 3, 10, "i32"),
  ],
};
