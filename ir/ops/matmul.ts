import { type ConcreteTensor, cost, elements, tensorOf } from "../bind.ts";
import type { Dim } from "../dim.ts";
import * as expect from "../expect.ts";
import type { Knowledge, Sample } from "../op.ts";
import { rounder } from "../round.ts";
import type { Tensor } from "../tensor.ts";
import { type DType, type TensorType, tensor, typeText } from "../type.ts";

const infer: Knowledge["infer"] = (inputs, attrs) => {
  expect.count(inputs, ["a", "b"]);
  const a = expect.tensorAt(inputs, 0, "a");
  const b = expect.tensorAt(inputs, 1, "b");
  if (a.dtype === "bool") expect.fail("a must be a number, got bool");
  expect.dtype(b, [a.dtype], "b");
  if (a.shape.length < 2 || b.shape.length < 2)
    expect.fail(`a and b must have at least 2 axes, got ${typeText(a)} and ${typeText(b)}`);
  expect.sameDim(a.shape.at(-1) as Dim, b.shape.at(-2) as Dim, "columns of a and rows of b");
  const batch = expect.broadcast([a, b].map((t) => tensor(t.dtype, t.shape.slice(0, -2))));
  return [tensor(expect.dtypeAttr(attrs, "to", a.dtype), [...batch, a.shape.at(-2) as Dim, b.shape.at(-1) as Dim])];
};

const sample = (name: string, dtype: DType, a: readonly Dim[], b: readonly Dim[], attrs: Sample["attrs"] = {}): Sample => ({
  name,
  inputs: [tensor(dtype, a), tensor(dtype, b)],
  attrs,
  symbols: { T: 5 },
});

export const matmul: Knowledge = {
  name: "matmul",
  summary:
    "a[..., M, K], b[..., K, N] -> [..., M, N]: products of matrices, batches broadcast, summed in f32 or better, rounded once",
  attrs: { to: "dtype of the result; a's unless given" },
  inputs: ["a", "b"],
  rowwise: "none",
  infer,
  evaluate(inputs, _, [out]) {
    const [a, b] = inputs as readonly [Tensor, Tensor];
    const type = out as ConcreteTensor;
    const round = rounder(type.dtype);
    const [m, n] = type.shape.slice(-2) as [number, number];
    const k = a.shape.at(-1) as number;
    const batch = type.shape.slice(0, -2);
    const result = new Float64Array(type.shape.reduce((x, y) => x * y, 1));
    const sums = new Float64Array(n);
    /** the matrix of an operand that a matrix of the result is made of */
    const matrix = (t: Tensor, index: number): number => {
      const lead = batch.length - (t.shape.length - 2);
      let [rest, at, stride] = [index, 0, 1];
      for (let axis = batch.length - 1; axis >= 0; axis--) {
        const i = rest % (batch[axis] as number);
        rest = Math.floor(rest / (batch[axis] as number));
        const own = axis < lead ? 1 : (t.shape[axis - lead] as number);
        if (own !== 1) at += i * stride;
        stride *= own;
      }
      return at;
    };
    for (let i = 0; i < result.length; i += m * n) {
      const [fromA, fromB] = [matrix(a, i / (m * n)) * m * k, matrix(b, i / (m * n)) * k * n];
      for (let row = 0; row < m; row++) {
        sums.fill(0);
        for (let c = 0; c < k; c++) {
          const x = a.data[fromA + row * k + c] as number;
          for (let j = 0; j < n; j++) sums[j] = (sums[j] as number) + x * (b.data[fromB + c * n + j] as number);
        }
        for (let j = 0; j < n; j++) result[i + row * n + j] = round(sums[j] as number);
      }
    }
    return [tensorOf(type, result)];
  },
  cost(inputs, attrs, symbols) {
    const outputs = infer(inputs, attrs);
    const k = elements(tensor("u8", [(inputs[0] as TensorType).shape.at(-1) as Dim]), symbols);
    return cost(2 * k * elements(outputs[0] as TensorType, symbols), [...inputs, ...outputs], symbols);
  },
  samples: [
    sample("matrices", "f32", ["T", 9], [9, 7]),
    sample("bf16 to f32", "bf16", [3, 70], [70, 33], { to: "f32" }),
    sample("heads", "f32", [2, 3, "T", 8], [2, 3, 8, "T"]),
    {
      ...sample("scores", "f32", ["B", 2, "S", 8], ["B", 2, 8, "P+S"]),
      symbols: { B: 2, P: 4, S: 3 },
    },
    sample("batches broadcast", "f32", [2, 1, 4, 5], [3, 5, 6]),
    sample("integers", "i32", [3, 4], [4, 2]),
    sample("f64", "f64", [1, 17], [17, 1]),
    sample("f16", "f16", [2, 5, 16], [16, 12]),
    sample("large", "f32", [40, 130], [130, 65]),
    sample("nothing to sum", "f32", [3, 0], [0, 2]),
  ],
};
