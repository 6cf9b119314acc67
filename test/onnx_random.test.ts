/** ONNX models held to ONNX Runtime: random ones, and the small ones that random ones shrank to when they found a fault. */
import { expect, test } from "vitest";
import { type DType, rounder, type Tensor } from "../ir/index.ts";
import { compare, countText, onInterpreter, rejections } from "./onnx_differential.ts";
import type { Attribute, MadeModel } from "./onnx_maker.ts";

const models = 2500;

test(`${models} random models give on the interpreter what they give on ONNX Runtime`, async () => {
  const started = performance.now();
  const count = await compare(1, models, 2);
  process.stdout.write(`${countText(count)}\n${((performance.now() - started) / 1000).toFixed(1)} s\n`);
  expect(count.different).toEqual([]);
  expect(rejections(count)).toBeLessThan(0.15 * models);
});

const tensor = (dtype: DType, shape: readonly number[], values: readonly number[]): Tensor => ({
  kind: "tensor",
  dtype,
  shape,
  data: Float64Array.from(values, rounder(dtype)),
});
/** One node on these operands: inputs of the graph, or constants. */
const nodeOf = (
  op: string,
  opset: number,
  operands: readonly Tensor[],
  attributes: Readonly<Record<string, Attribute>> = {},
  dtype: DType = operands[0]?.dtype ?? "f32",
  fixed: boolean = false,
): MadeModel => ({
  opset,
  ir: 8,
  inputs: fixed ? [] : operands.map((t, i) => ({ name: `x${i}`, tensor: t, dims: t.shape })),
  constants: fixed ? operands.map((t, i) => ({ name: `x${i}`, tensor: t, raw: true })) : [],
  nodes: [{ op, inputs: operands.map((_, i) => `x${i}`), outputs: ["y"], attributes }],
  outputs: [{ name: "y", dtype }],
});
const vector = (...values: readonly number[]): Tensor => tensor("i64", [values.length], values);
const f32 = (...values: readonly number[]): Tensor => tensor("f32", [values.length], values);

/** What ONNX Runtime 1.30 makes of each. */
const found: readonly (readonly [what: string, model: MadeModel, shape: readonly number[], data: readonly number[]])[] = [
  ["the smallest i8 has no magnitude", nodeOf("Abs", 13, [tensor("i8", [2], [-128, -5])]), [2], [-128, 5]],
  ["nor has the smallest i32", nodeOf("Abs", 13, [tensor("i32", [1], [-(2 ** 31)])]), [1], [-(2 ** 31)]],
  [
    "a slice back from before the start begins at the first element",
    nodeOf("Slice", 13, [f32(7), vector(-2), vector(-(2 ** 31)), vector(0), vector(-1)]),
    [1],
    [7],
  ],
  [
    "a slice back over an axis of no elements",
    nodeOf("Slice", 13, [tensor("f32", [0], []), vector(-1), vector(-(2 ** 31)), vector(0), vector(-1)]),
    [0],
    [],
  ],
  [
    "scale and bias of groups before opset 21",
    nodeOf("GroupNormalization", 18, [tensor("f32", [1, 4, 1], [1, 3, 2, 6]), f32(1, 2), f32(0, 1)], {
      num_groups: { i: 2 },
      epsilon: { f: 0 },
    }),
    [1, 4, 1],
    [-1, 1, -1, 3],
  ],
  [
    "neither infinity is looked for",
    nodeOf("IsInf", 20, [f32(Number.NaN, Infinity, 1)], { detect_negative: { i: 0 }, detect_positive: { i: 0 } }, "bool"),
    [3],
    [0, 0, 0],
  ],
  [
    "a square whose exponent has an axis more",
    nodeOf("Pow", 13, [tensor("f64", [], [3]), tensor("f64", [1], [2])], {}, "f64", true),
    [1],
    [9],
  ],
  [
    "an attribute is an f32 where elements are f64",
    nodeOf("LeakyRelu", 16, [tensor("f32", [1], [-1])]),
    [1],
    [-Math.fround(0.01)],
  ],
  ["logarithms of sums of integers", nodeOf("ReduceLogSumExp", 17, [tensor("i32", [1], [5])], { keepdims: { i: 0 } }), [], [5]],
  [
    "a reduction that leaves integers as they are",
    nodeOf("ReduceL2", 18, [tensor("i64", [1], [6])], { noop_with_empty_axes: { i: 1 } }),
    [1],
    [6],
  ],
  ["the mean of no elements", nodeOf("ReduceMean", 18, [tensor("f32", [0], [])], { keepdims: { i: 0 } }), [], [Number.NaN]],
  ["what is no number is the largest", nodeOf("ArgMax", 13, [f32(1, Number.NaN, 3)], { keepdims: { i: 0 } }, "i64"), [], [1]],
];
test.each(found)("%s", (_, model, shape, data) => {
  const y = onInterpreter(model).get("y") as Tensor;
  expect([y.shape, [...y.data]]).toEqual([shape, data]);
});

test("a slice of a symbol's axis is taken where the symbol's limits allow it, and refused where they do not settle it", () => {
  const sliced = (start: number, end: number): MadeModel => {
    const m = nodeOf("Slice", 13, [f32(1, 2, 3, 4), vector(start), vector(end)]);
    const [x, ...rest] = m.inputs;
    const constants = rest.map(({ name, tensor: t }) => ({ name, tensor: t, raw: true }));
    return { ...m, inputs: x === undefined ? [] : [{ ...x, dims: ["n4"] }], constants };
  };
  // n4 is from 1 to 16
  const y = (start: number, end: number): readonly number[] => [
    ...(onInterpreter(sliced(start, end), true).get("y") as Tensor).data,
  ];
  expect(y(-1, 2 ** 40)).toEqual([4]);
  expect(y(1, 100)).toEqual([2, 3, 4]);
  expect(y(-(2 ** 40), -1)).toEqual([1, 2, 3]);
  expect(y(0, 1)).toEqual([1]);
  expect(() => y(0, 3)).toThrow("3 may lie within an axis of size 'n4' or beyond it");
  expect(() => y(-2, 100)).toThrow("-2 may lie within an axis of size 'n4' or beyond it");
});
