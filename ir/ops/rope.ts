import { type ConcreteTensor, cost, elements, tensorOf } from "../bind.ts";
import * as expect from "../expect.ts";
import type { Knowledge, Sample } from "../op.ts";
import { rounder } from "../round.ts";
import type { Tensor } from "../tensor.ts";
import { type DType, isFloat, type TensorType, tensor, typeText } from "../type.ts";
import { stridesOf } from "./movement.ts";

const names = ["x", "cos", "sin"];

const infer: Knowledge["infer"] = (inputs) => {
  expect.count(inputs, names);
  const x = expect.tensorAt(inputs, 0, "x");
  if (!isFloat(x.dtype)) expect.fail(`x must be a float, got ${x.dtype}`);
  if (expect.constantDim(x, -1, "x") % 2 !== 0) expect.fail(`the last axis of x must be even, got ${typeText(x)}`);
  for (const i of [1, 2]) {
    const t = expect.tensorAt(inputs, i, names[i] as string);
    expect.dtype(t, [x.dtype], names[i] as string);
    const lead = x.shape.length - t.shape.length;
    const fits = lead >= 0 && t.shape.every((d, axis) => d === x.shape[lead + axis] || d === 1);
    if (!fits || t.shape.at(-1) !== x.shape.at(-1))
      expect.fail(`${typeText(t)} of ${names[i]} does not broadcast to ${typeText(x)} with all of its last axis`);
  }
  return [x];
};

const sample = (name: string, dtype: DType, x: TensorType["shape"], turns: TensorType["shape"]): Sample => ({
  name,
  inputs: [tensor(dtype, x), tensor(dtype, turns), tensor(dtype, turns)],
  attrs: {},
  symbols: { B: 2, S: 5 },
});

export const rope: Knowledge = {
  name: "rope",
  summary:
    "x[..., D], cos, sin [..., D] broadcast to x -> per row (a, b) -> (a, b) cos + (-b, a) sin, a the first and b the second half; in f32 " +
    "or better, rounded once",
  attrs: {},
  inputs: names,
  rowwise: "none",
  infer,
  evaluate(inputs, _, [out]) {
    const [x, cos, sin] = inputs as readonly [Tensor, Tensor, Tensor];
    const type = out as ConcreteTensor;
    const round = rounder(type.dtype);
    const strides = stridesOf(x.shape);
    const dim = x.shape.at(-1) as number;
    /** the element of a table that belongs to element i of x */
    const at = (t: Tensor, i: number): number => {
      const own = stridesOf(t.shape);
      const lead = x.shape.length - t.shape.length;
      const place = t.shape.reduce((sum, d, axis) => {
        const index = Math.floor(i / (strides[lead + axis] as number)) % (x.shape[lead + axis] as number);
        return d === 1 ? sum : sum + index * (own[axis] as number);
      }, 0);
      return t.data[place] as number;
    };
    const result = x.data.map((v, i) => {
      const first = i % dim < dim / 2;
      const other = x.data[first ? i + dim / 2 : i - dim / 2] as number;
      return round(v * at(cos, i) + (first ? -other : other) * at(sin, i));
    });
    return [tensorOf(type, result)];
  },
  cost: (inputs, attrs, symbols) =>
    cost(3 * elements(inputs[0] as TensorType, symbols), [...inputs, ...infer(inputs, attrs)], symbols),
  samples: [
    sample("heads before tokens", "f32", ["B", 3, "S", 8], ["B", 1, "S", 8]),
    sample("tokens before heads, bf16", "bf16", ["B", "S", 3, 64], ["S", 1, 64]),
    sample("one row of turns, f16", "f16", [3, 22], [22]),
    sample("two elements", "f32", ["S", 2], ["S", 2]),
  ],
};
