/** Weights the slow way, by the plain formulas, for the interpreter. */
import type { Slice, Weight, WeightSource } from "../../ir/graph.ts";
import { decode, rounder } from "../../ir/round.ts";
import type { Tensor } from "../../ir/tensor.ts";
import { typeText } from "../../ir/type.ts";
import type { Checkpoint } from "../frontends/checkpoint.ts";
import { dtypeOf } from "../frontends/safetensors.ts";
import { type CodeType, largestCode, quantisedValue } from "./convert.ts";
import { asMatrices, numbers } from "./plan.ts";
import { codeType, partOf, scalesShapeOf, slicedShape, source } from "./recipe.ts";
import { ropeRows } from "./rope.ts";

/**
 * The values of a weight, whole, by the plain formulas: what the interpreter uses and what `writeWeights` must agree with.
 * A dequantised value is code times scale, rounded once; a quantised weight takes f32 values x, scale = f32(amax / 448 or 127), 1 where
 * that is 0, and codes of f32(x / scale).
 */
export const readWeight = (checkpoint: Checkpoint | undefined, weight: Weight): Tensor => {
  const { dtype } = weight.value.type;
  const shape = numbers(weight.value.type);
  const values = valuesOf(checkpoint, weight.source);
  if (values.data.length !== shape.reduce((n, d) => n * d, 1))
    throw new Error(
      `${weight.value.name}: its source has shape [${values.shape.join(",")}], its type is ${typeText(weight.value.type)}`,
    );
  return { kind: "tensor", dtype, shape, data: values.data.map(rounder(dtype)) };
};

interface Values {
  readonly shape: readonly number[];
  readonly data: Float64Array;
}

const valuesOf = (checkpoint: Checkpoint | undefined, s: WeightSource): Values => {
  switch (s.kind) {
    case "literal":
      return { shape: [s.values.length], data: Float64Array.from(s.values) };
    case "rope":
      return { shape: [s.positions, s.dim], data: Float64Array.from(ropeRows(s.theta, s.dim, 0, s.positions)) };
    case "stacked": {
      const parts = s.of.map((of) => valuesOf(checkpoint, of));
      const first = parts[0] as Values;
      const data = new Float64Array(parts.length * first.data.length);
      for (const [i, part] of parts.entries()) data.set(part.data, i * first.data.length);
      return { shape: [parts.length, ...first.shape], data };
    }
    case "tensor":
      return cut(stored(checkpoint, s.tensor), s.slice);
    case "dequantised": {
      const codes = stored(checkpoint, s.tensor);
      const scales = stored(checkpoint, s.scales);
      const { block } = s;
      const data = codes.data.map((code, i) => code * (scales.data[blockOf(codes.shape, block, i)] as number));
      return cut({ shape: codes.shape, data }, s.slice);
    }
    case "codes":
    case "scales": {
      const to = codeType(s.to);
      return cut(quantisedValues(valuesOf(checkpoint, s.of), to, s.block)[s.kind], s.slice);
    }
  }
};

/** The codes and the scales of values, in blocks [rows, columns] of each matrix. */
export const quantisedValues = (
  x: Values,
  to: CodeType,
  block: readonly [number, number],
): { readonly codes: Values; readonly scales: Values } => {
  const shape = scalesShapeOf(x.shape, block);
  const most = new Float64Array(shape.reduce((n, d) => n * d, 1));
  x.data.forEach((value, i) => {
    const b = blockOf(x.shape, block, i);
    most[b] = Math.max(most[b] as number, Math.abs(Math.fround(value)));
  });
  const scales = most.map((amax) => {
    const scale = Math.fround(amax / largestCode[to]);
    return scale === 0 ? 1 : scale;
  });
  const codes = x.data.map((value, i) => quantisedValue(value, scales[blockOf(x.shape, block, i)] as number, to));
  return { codes: { shape: x.shape, data: codes }, scales: { shape, data: scales } };
};

const stored = (checkpoint: Checkpoint | undefined, name: string): Values => {
  const tensor = source(checkpoint, name);
  return { shape: tensor.shape, data: decode(dtypeOf(tensor.dtype), (checkpoint as Checkpoint).read(tensor)) };
};

/** Index, among the block scales of a tensor, of the scale of element i. */
const blockOf = (shape: readonly number[], block: readonly [number, number], i: number): number => {
  const { rows, columns } = asMatrices(shape);
  const [row, column] = [Math.floor(i / columns) % rows, i % columns];
  const [down, across] = [Math.ceil(rows / block[0]), Math.ceil(columns / block[1])];
  return (Math.floor(i / (rows * columns)) * down + Math.floor(row / block[0])) * across + Math.floor(column / block[1]);
};

const cut = (values: Values, slice: Slice | undefined): Values => {
  if (!slice) return values;
  const { rows, columns } = asMatrices(values.shape);
  const part = partOf(values.shape, slice);
  const shape = slicedShape(values.shape, slice);
  const data = new Float64Array(shape.reduce((n, d) => n * d, 1));
  let at = 0;
  for (const m of part.matrices)
    for (let r = part.rows[0]; r < part.rows[1]; r++) {
      const from = (m * rows + r) * columns;
      data.set(values.data.subarray(from + part.columns[0], from + part.columns[1]), at);
      at += part.columns[1] - part.columns[0];
    }
  return { shape, data };
};
