import { type ConcreteTensor, cost, elements, tensorOf } from "../bind.ts";
import * as expect from "../expect.ts";
import type { Knowledge, Sample } from "../op.ts";
import { rounder } from "../round.ts";
import type { Tensor } from "../tensor.ts";
import { type DType, type TensorType, tensor } from "../type.ts";

const names = ["x", "xs", "w", "ws"];

const infer: Knowledge["infer"] = (inputs, attrs) => {
  expect.count(inputs, names);
  const [x, xs, w, ws] = names.map((n, i) => expect.tensorAt(inputs, i, n)) as unknown as readonly [
    TensorType,
    TensorType,
    TensorType,
    TensorType,
  ];
  [x, xs, w, ws].forEach((t, i) => {
    expect.rank(t, 2, names[i] as string);
  });
  expect.dtype(x, ["e4m3", "i8"], "x");
  expect.dtype(w, [x.dtype], "w");
  expect.dtype(xs, ["f32"], "xs");
  expect.dtype(ws, ["f32"], "ws");
  const [bn, bk] = expect.pair(attrs, "block");
  const n = expect.constantDim(w, 0, "w");
  const k = expect.constantDim(w, 1, "w");
  expect.sameDim(k, expect.constantDim(x, 1, "x"), "columns of w and x");
  expect.sameDim(expect.dimAt(xs, 0), expect.dimAt(x, 0), "rows of xs and x");
  expect.sameDim(expect.dimAt(xs, 1), Math.ceil(k / bk), `columns of xs, one for ${bk} columns of x`);
  expect.sameDim(expect.dimAt(ws, 0), Math.ceil(n / bn), `rows of ws, one for ${bn} rows of w`);
  expect.sameDim(expect.dimAt(ws, 1), Math.ceil(k / bk), `columns of ws, one for ${bk} columns of w`);
  return [tensor(expect.dtypeAttr(attrs, "to"), [expect.dimAt(x, 0), n])];
};

const sample = (
  name: string,
  n: number,
  k: number,
  codes: DType,
  block: readonly [number, number],
  to: DType = "f32",
  rows = 5,
): Sample => ({
  name,
  inputs: [
    tensor(codes, ["T", k]),
    tensor("f32", ["T", Math.ceil(k / block[1])]),
    tensor(codes, [n, k]),
    tensor("f32", [Math.ceil(n / block[0]), Math.ceil(k / block[1])]),
  ],
  attrs: { to, block },
  values: ["normal", "positive", "normal", "positive"],
  symbols: { T: rows },
});

export const scaledLinear: Knowledge = {
  name: "scaled_linear",
  summary:
    "x codes[R, K], xs f32[R, ceil(K/bk)], w codes[N, K], ws f32[ceil(N/bn), ceil(K/bk)] -> [R, N]: " +
    "sum over blocks g of xs[r, g] ws[n/bn, g] times the sum in g of x w",
  attrs: { to: "dtype of the result", block: "[bn, bk]: rows and columns of w that share a scale" },
  inputs: names,
  rowwise: "row",
  infer,
  evaluate(inputs, attrs, [out]) {
    const [x, xs, w, ws] = inputs as readonly [Tensor, Tensor, Tensor, Tensor];
    const type = out as ConcreteTensor;
    const [rows, columns] = type.shape as readonly [number, number];
    const k = x.shape[1] as number;
    const [bn, bk] = expect.pair(attrs, "block");
    const blocks = Math.ceil(k / bk);
    const round = rounder(type.dtype);
    const result = new Float64Array(rows * columns);
    for (let r = 0; r < rows; r++)
      for (let n = 0; n < columns; n++) {
        let sum = 0;
        for (let g = 0; g < blocks; g++) {
          let dot = 0;
          for (let i = g * bk; i < Math.min(k, (g + 1) * bk); i++)
            dot += (x.data[r * k + i] as number) * (w.data[n * k + i] as number);
          sum += dot * (xs.data[r * blocks + g] as number) * (ws.data[Math.floor(n / bn) * blocks + g] as number);
        }
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
    sample("fp8 blocks", 256, 256, "e4m3", [128, 128]),
    sample("fp8, ragged both ways", 130, 200, "e4m3", [128, 128], "bf16"),
    sample("fp8, smaller than a block", 20, 40, "e4m3", [128, 128]),
    sample("int8 channels", 48, 256, "i8", [1, 256]),
    sample("int8, ragged", 37, 131, "i8", [1, 131], "bf16"),
    // large enough for matrix units
    sample("large, fp8", 520, 256, "e4m3", [128, 128]),
    sample("large, fp8, many rows", 300, 448, "e4m3", [128, 128], "f32", 150),
    sample("large, fp8, ragged", 515, 261, "e4m3", [128, 128], "bf16", 37),
    sample("large, int8, many rows", 300, 448, "i8", [1, 448], "f32", 150),
    sample("large, int8, ragged", 515, 261, "i8", [1, 261], "bf16", 37),
  ],
};
