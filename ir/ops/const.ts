import { type ConcreteTensor, tensorOf } from "../bind.ts";
import * as expect from "../expect.ts";
import type { Knowledge } from "../op.ts";
import { roundTo } from "../round.ts";
import { lit } from "../scalar.ts";
import { tensor } from "../type.ts";

export const constant: Knowledge = {
  name: "const",
  summary: "a number: rank 0",
  attrs: { value: "the number, rounded to dtype", dtype: "dtype of the result" },
  inputs: [],
  rowwise: "row",
  infer(inputs, attrs) {
    expect.count(inputs, []);
    expect.real(attrs, "value");
    return [tensor(expect.dtypeAttr(attrs, "dtype"), [])];
  },
  scalar: (_, attrs) => lit(roundTo(expect.dtypeAttr(attrs, "dtype"), expect.real(attrs, "value"))),
  evaluate(_, attrs, [out]) {
    const t = out as ConcreteTensor;
    return [tensorOf(t, Float64Array.of(roundTo(t.dtype, expect.real(attrs, "value"))))];
  },
  cost: () => ({ flops: 0, bytes: 0 }),
  samples: [
    { name: "f32", inputs: [], attrs: { value: 1e-5, dtype: "f32" } },
    { name: "bf16, rounded", inputs: [], attrs: { value: 0.1, dtype: "bf16" } },
    { name: "i32", inputs: [], attrs: { value: -7, dtype: "i32" } },
    { name: "infinite", inputs: [], attrs: { value: Number.NEGATIVE_INFINITY, dtype: "f32" } },
    { name: "negative zero", inputs: [], attrs: { value: -0, dtype: "f32" } },
  ],
};
