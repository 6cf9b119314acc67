import { type ConcreteTensor, cost, tensorOf } from "../bind.ts";
import * as expect from "../expect.ts";
import type { Knowledge } from "../op.ts";
import { rounder } from "../round.ts";
import type { Tensor } from "../tensor.ts";
import { type TensorType, tensor } from "../type.ts";
import { stridesOf } from "./movement.ts";

const inferIota: Knowledge["infer"] = (inputs, attrs) => {
  expect.count(inputs, []);
  const type = tensor(expect.dtypeAttr(attrs, "dtype"), expect.dims(attrs, "shape"));
  if (type.dtype === "bool") expect.fail("dtype must be a number's");
  expect.axis(attrs, "axis", type);
  return [type];
};

export const iota: Knowledge = {
  name: "iota",
  summary: "a tensor whose elements are their own index along an axis",
  attrs: { shape: "dims of the result", axis: "the axis that counts", dtype: "dtype of the result" },
  inputs: [],
  rowwise: "none",
  infer: inferIota,
  evaluate(_, attrs, [out]) {
    const type = out as ConcreteTensor;
    const axis = expect.axis(attrs, "axis", type);
    const stride = stridesOf(type.shape)[axis] as number;
    const extent = type.shape[axis] as number;
    const round = rounder(type.dtype);
    const count = type.shape.reduce((a, b) => a * b, 1);
    return [
      tensorOf(
        type,
        Float64Array.from({ length: count }, (_, i) => round(Math.floor(i / stride) % extent)),
      ),
    ];
  },
  cost: (inputs, attrs, symbols) => cost(0, inferIota(inputs, attrs), symbols),
  samples: [
    { name: "positions", inputs: [], attrs: { shape: [9], axis: 0, dtype: "i64" } },
    { name: "rows", inputs: [], attrs: { shape: [3, 4, 2], axis: 0, dtype: "i32" } },
    { name: "in between", inputs: [], attrs: { shape: [2, 5, 3], axis: 1, dtype: "f32" } },
    { name: "columns, bf16", inputs: [], attrs: { shape: [2, 300], axis: 1, dtype: "bf16" } },
  ],
};

const inferSize: Knowledge["infer"] = (inputs, attrs) => {
  expect.count(inputs, ["x"]);
  expect.axis(attrs, "axis", expect.tensorAt(inputs, 0, "x"));
  return [tensor("i64", [])];
};

export const size: Knowledge = {
  name: "size",
  summary: "x -> i64[]: how many elements an axis of x has",
  attrs: { axis: "the axis" },
  inputs: ["x"],
  rowwise: "none",
  infer: inferSize,
  evaluate([input], attrs, [out]) {
    const x = input as Tensor;
    return [tensorOf(out as ConcreteTensor, Float64Array.of(x.shape[expect.axis(attrs, "axis", x)] as number))];
  },
  cost: () => ({ flops: 0, bytes: 8 }),
  samples: [
    { name: "tokens", inputs: [tensor("f32", ["T", 3])], attrs: { axis: 0 }, symbols: { T: 6 } },
    { name: "columns", inputs: [tensor("bool", [2, 7] as TensorType["shape"])], attrs: { axis: 1 } },
  ],
};
