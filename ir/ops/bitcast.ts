import { type ConcreteTensor, cost, tensorOf } from "../bind.ts";
import { type Dim, mulDim } from "../dim.ts";
import * as expect from "../expect.ts";
import type { Knowledge, Sample } from "../op.ts";
import { decode, encode } from "../round.ts";
import type { Tensor } from "../tensor.ts";
import { type DType, dtypeBytes, tensor, typeText } from "../type.ts";

const infer: Knowledge["infer"] = (inputs, attrs) => {
  expect.count(inputs, ["x"]);
  const x = expect.tensorAt(inputs, 0, "x");
  const to = expect.dtypeAttr(attrs, "to");
  const [from, width] = [dtypeBytes(x.dtype), dtypeBytes(to)];
  if (from === width) return [tensor(to, x.shape)];
  const last = x.shape.at(-1) ?? expect.fail(`a scalar of ${x.dtype} does not have the bytes of a ${to}`);
  if (from > width) return [tensor(to, [...x.shape.slice(0, -1), mulDim(last, from / width)])];
  if (typeof last !== "number" || (last * from) % width !== 0)
    expect.fail(`the last axis of ${typeText(x)} is not whole elements of ${to}`);
  return [tensor(to, [...x.shape.slice(0, -1), ((last as number) * from) / width])];
};

const sample = (name: string, dtype: DType, shape: readonly Dim[], to: DType): Sample => ({
  name,
  inputs: [tensor(dtype, shape)],
  attrs: { to },
  symbols: { T: 3 },
});

export const bitcast: Knowledge = {
  name: "bitcast",
  summary: "x -> its bytes, little endian, as elements of another dtype; the last axis has more or fewer when the widths differ",
  attrs: { to: "dtype of the result" },
  inputs: ["x"],
  rowwise: "none",
  infer,
  evaluate([input], _, [out]) {
    const x = input as Tensor;
    const type = out as ConcreteTensor;
    return [tensorOf(type, decode(type.dtype, encode(x.dtype, x.data)))];
  },
  cost: (inputs, attrs, symbols) => cost(0, [...inputs, ...infer(inputs, attrs)], symbols),
  samples: [
    sample("f32 as i32", "f32", ["T", 4], "i32"),
    sample("i32 as f32", "i32", [7], "f32"),
    sample("bytes of f16", "f16", ["T", 3], "u8"),
    sample("i8 as u8", "i8", [5], "u8"),
    { ...sample("i64 as u64", "i64", [2, 2], "u64"), values: [{ below: 1000 }] },
    sample("bytes as i32", "u8", [2, 8], "i32"),
  ],
};
