import { type ConcreteTensor, cost, elements, tensorOf } from "../bind.ts";
import * as expect from "../expect.ts";
import type { Value } from "../graph.ts";
import type { Build, Knowledge, Sample } from "../op.ts";
import { rounder } from "../round.ts";
import type { Tensor } from "../tensor.ts";
import { type DType, isFloat, type TensorType, tensor } from "../type.ts";

const defaultEps = 1e-5;

const infer: Knowledge["infer"] = (inputs, attrs) => {
  expect.count(inputs, ["x", "w", "b"]);
  const x = expect.tensorAt(inputs, 0, "x");
  if (!isFloat(x.dtype)) expect.fail(`x must be a float, got ${x.dtype}`);
  for (const [i, name] of [
    [1, "w"],
    [2, "b"],
  ] as const) {
    const t = expect.tensorAt(inputs, i, name);
    expect.dtype(t, [x.dtype], name);
    expect.rank(t, 1, name);
    expect.sameDim(expect.constantDim(t, 0, name), expect.constantDim(x, -1, "x"), `columns of ${name} and x`);
  }
  expect.real(attrs, "eps", defaultEps);
  return [x];
};

const sample = (name: string, columns: number, dtype: DType, attrs = {}): Sample => ({
  name,
  inputs: [tensor(dtype, ["T", columns]), tensor(dtype, [columns]), tensor(dtype, [columns])],
  attrs,
  symbols: { T: 4 },
});

const cast = (b: Build, x: Value, to: DType): Value => (x.type.dtype === to ? x : b.op("cast", [x], { to }));

export const layerNorm: Knowledge = {
  name: "layer_norm",
  summary:
    "x[..., N], w[N], b[N] -> (x - mean x) / sqrt(mean (x - mean x)^2 + eps) in f32, rounded to x's dtype, times w, plus b",
  attrs: { eps: `added to the variance; ${defaultEps} unless given` },
  inputs: ["x", "w", "b"],
  rowwise: "row",
  infer,
  evaluate(inputs, attrs, [out]) {
    const [x, w, b] = inputs as readonly [Tensor, Tensor, Tensor];
    const type = out as ConcreteTensor;
    const round = rounder(type.dtype);
    const f32 = Math.fround;
    const eps = f32(expect.real(attrs, "eps", defaultEps));
    const n = w.data.length;
    const result = new Float64Array(x.data.length);
    for (let row = 0; row < x.data.length; row += n) {
      const wide = x.data.slice(row, row + n).map(f32);
      const mean = f32(wide.reduce((sum, v) => sum + v, 0) / n);
      const centred = wide.map((v) => f32(v - mean));
      const variance = f32(centred.reduce((sum, v) => sum + f32(v * v), 0) / n);
      const scale = f32(1 / Math.sqrt(f32(variance + eps)));
      centred.forEach((v, c) => {
        result[row + c] = round(round(round(f32(v * scale)) * (w.data[c] as number)) + (b.data[c] as number));
      });
    }
    return [tensorOf(type, result)];
  },
  cost: (inputs, attrs, symbols) =>
    cost(7 * elements(inputs[0] as TensorType, symbols), [...inputs, ...infer(inputs, attrs)], symbols),
  expand(b, op) {
    const [x, w, bias] = op.inputs as readonly [Value, Value, Value];
    const { dtype } = x.type as TensorType;
    const wide = cast(b, x, "f32");
    const centred = b.op("sub", [wide, b.op("reduce", [wide], { fn: "mean" })]);
    const variance = b.op("reduce", [b.op("mul", [centred, centred])], { fn: "mean" });
    const eps = b.op("const", [], { value: expect.real(op.attrs, "eps", defaultEps), dtype: "f32" });
    const normal = b.op("mul", [centred, b.op("rsqrt", [b.op("add", [variance, eps])])]);
    return [b.op("add", [b.op("mul", [cast(b, normal, dtype), w]), bias])];
  },
  samples: [
    sample("f32", 256, "f32"),
    sample("bf16, columns no multiple of 128", 130, "bf16"),
    sample("one column", 1, "f32"),
    sample("f16, large eps", 48, "f16", { eps: 0.5 }),
    {
      name: "rank 3",
      inputs: [tensor("f32", ["T", 2, 33]), tensor("f32", [33]), tensor("f32", [33])],
      attrs: {},
      symbols: { T: 2 },
    },
  ],
};
