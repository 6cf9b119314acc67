import { type ConcreteTensor, cost, elements, tensorOf } from "../bind.ts";
import * as expect from "../expect.ts";
import type { Knowledge, Sample } from "../op.ts";
import { rounder } from "../round.ts";
import type { Tensor } from "../tensor.ts";
import { type DType, isFloat, type TensorType, tensor } from "../type.ts";

const infer: Knowledge["infer"] = (inputs, attrs) => {
  expect.count(inputs, ["x", "w"]);
  const x = expect.tensorAt(inputs, 0, "x");
  const w = expect.tensorAt(inputs, 1, "w");
  expect.rank(x, 2, "x");
  expect.rank(w, 2, "w");
  if (!isFloat(x.dtype)) expect.fail(`x must be a float, got ${x.dtype}`);
  expect.dtype(w, [x.dtype], "w");
  expect.sameDim(expect.constantDim(w, 1, "w"), expect.constantDim(x, 1, "x"), "columns of w and x");
  expect.flag(attrs, "keep", false);
  return [tensor(expect.dtypeAttr(attrs, "to", x.dtype), [expect.dimAt(x, 0), expect.constantDim(w, 0, "w")])];
};

const sample = (name: string, n: number, k: number, dtype: DType, attrs = {}, rows = 5): Sample => ({
  name,
  inputs: [tensor(dtype, ["T", k]), tensor(dtype, [n, k])],
  attrs,
  symbols: { T: rows },
});

export const linear: Knowledge = {
  name: "linear",
  summary: "x[R, K], w[N, K] -> [R, N]: x times w transposed, accumulated in f32 or better, rounded once",
  attrs: { to: "dtype of the result; x's unless given", keep: "true: precision policies leave it as it is (router, lm_head)" },
  inputs: ["x", "w"],
  rowwise: "row",
  infer,
  evaluate(inputs, _, [out]) {
    const [x, w] = inputs as readonly [Tensor, Tensor];
    const type = out as ConcreteTensor;
    const [rows, columns] = type.shape as readonly [number, number];
    const k = x.shape[1] as number;
    const round = rounder(type.dtype);
    const result = new Float64Array(rows * columns);
    for (let r = 0; r < rows; r++)
      for (let n = 0; n < columns; n++) {
        let sum = 0;
        for (let i = 0; i < k; i++) sum += (x.data[r * k + i] as number) * (w.data[n * k + i] as number);
        result[r * columns + n] = round(sum);
      }
    return [tensorOf(type, result)];
  },
  cost(inputs, attrs, symbols) {
    const outputs = infer(inputs, attrs);
    const k = (inputs[0] as TensorType).shape[1] as number;
    return cost(2 * k * elements(outputs[0] as TensorType, symbols), [...inputs, ...outputs], symbols);
  },
  samples: [
    sample("bf16 to f32", 48, 256, "bf16", { to: "f32" }),
    sample("bf16", 128, 128, "bf16"),
    sample("ragged", 37, 131, "bf16", { to: "f32" }),
    sample("f32", 20, 65, "f32"),
    sample("one output", 1, 300, "bf16", { to: "f32" }),
    sample("one column", 9, 1, "f32"),
    sample("f16", 16, 40, "f16", { to: "f32" }),
    // large enough for matrix units
    sample("large", 520, 256, "bf16", { to: "f32" }),
    sample("large, many rows", 300, 448, "bf16", {}, 150),
    sample("large, ragged", 515, 261, "bf16", { to: "f32" }, 37),
    {
      name: "rows of a batch",
      inputs: [tensor("f32", ["B*S", 24]), tensor("f32", [17, 24])],
      attrs: {},
      symbols: { B: 2, S: 3 },
    },
    {
      name: "large, rows of a batch",
      inputs: [tensor("bf16", ["B*S", 256]), tensor("bf16", [520, 256])],
      attrs: { to: "f32" },
      symbols: { B: 3, S: 7 },
    },
    { name: "pairs", inputs: [tensor("bf16", ["3*T", 64]), tensor("bf16", [24, 64])], attrs: {}, symbols: { T: 2 } },
    { name: "two rows for certain", inputs: [tensor("f32", [2, 8]), tensor("f32", [3, 8])], attrs: {} },
  ],
};
