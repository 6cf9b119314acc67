import { type ConcreteTensor, cost, elements, tensorOf } from "../bind.ts";
import * as expect from "../expect.ts";
import type { Value } from "../graph.ts";
import type { Build, Knowledge, Sample } from "../op.ts";
import { rounder } from "../round.ts";
import type { Tensor } from "../tensor.ts";
import { type DType, isFloat, type TensorType, tensor } from "../type.ts";

const defaultEps = 1e-5;

const infer: Knowledge["infer"] = (inputs) => {
  expect.count(inputs, ["x", "w"]);
  const x = expect.tensorAt(inputs, 0, "x");
  const w = expect.tensorAt(inputs, 1, "w");
  if (!isFloat(x.dtype)) expect.fail(`x must be a float, got ${x.dtype}`);
  expect.dtype(w, [x.dtype], "w");
  expect.rank(w, 1, "w");
  expect.sameDim(expect.constantDim(w, 0, "w"), expect.constantDim(x, -1, "x"), "columns of w and x");
  return [x];
};

const toF32 = (b: Build, x: Value): Value =>
  x.type.kind === "tensor" && x.type.dtype === "f32" ? x : b.op("cast", [x], { to: "f32" });

const sample = (name: string, columns: number, dtype: DType, attrs = {}): Sample => ({
  name,
  inputs: [tensor(dtype, ["T", columns]), tensor(dtype, [columns])],
  attrs,
  values: ["normal", "positive"],
  symbols: { T: 4 },
});

export const rmsNorm: Knowledge = {
  name: "rms_norm",
  summary: "x[..., N], w[N] -> x / sqrt(mean x^2 + eps) in f32, rounded to x's dtype, times w",
  attrs: { eps: `added to the mean of squares; ${defaultEps} unless given` },
  inputs: ["x", "w"],
  rowwise: "row",
  infer(inputs, attrs) {
    expect.real(attrs, "eps", defaultEps);
    return infer(inputs, attrs);
  },
  evaluate(inputs, attrs, [out]) {
    const [x, w] = inputs as readonly [Tensor, Tensor];
    const type = out as ConcreteTensor;
    const round = rounder(type.dtype);
    const f32 = Math.fround;
    const eps = f32(expect.real(attrs, "eps", defaultEps));
    const n = w.data.length;
    const result = new Float64Array(x.data.length);
    for (let row = 0; row < x.data.length; row += n) {
      let sum = 0;
      for (let c = 0; c < n; c++) sum += f32(f32(x.data[row + c] as number) ** 2);
      const scale = f32(1 / Math.sqrt(f32(f32(sum / n) + eps)));
      for (let c = 0; c < n; c++)
        result[row + c] = round(round(f32(f32(x.data[row + c] as number) * scale)) * (w.data[c] as number));
    }
    return [tensorOf(type, result)];
  },
  cost: (inputs, attrs, symbols) =>
    cost(4 * elements(inputs[0] as TensorType, symbols), [...inputs, ...infer(inputs, attrs)], symbols),
  expand(b, op) {
    const [x, w] = op.inputs as readonly [Value, Value];
    const wide = toF32(b, x);
    const mean = b.op("reduce", [b.op("mul", [wide, wide])], { fn: "mean" });
    const eps = b.op("const", [], { value: expect.real(op.attrs, "eps", defaultEps), dtype: "f32" });
    const normal = b.op("mul", [wide, b.op("rsqrt", [b.op("add", [mean, eps])])]);
    const dtype = (x.type as TensorType).dtype;
    return [b.op("mul", [dtype === "f32" ? normal : b.op("cast", [normal], { to: dtype }), w])];
  },
  samples: [
    sample("bf16", 256, "bf16"),
    sample("f32, columns no multiple of 128", 130, "f32"),
    sample("one column", 1, "bf16"),
    sample("large eps", 48, "bf16", { eps: 0.5 }),
    sample("f16", 77, "f16", { eps: 1e-6 }),
    { name: "rank 3", inputs: [tensor("f32", ["T", 2, 33]), tensor("f32", [33])], attrs: {}, symbols: { T: 2 } },
  ],
};
