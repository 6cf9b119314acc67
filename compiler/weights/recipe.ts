/** What a weight is made of: the part of a checkpoint's tensor that it takes, and what is done to it. */
import type { Slice, Weight, WeightSource } from "../../ir/graph.ts";
import { canonicalJson, type Json } from "../../ir/json.ts";
import { decode } from "../../ir/round.ts";
import type { DType } from "../../ir/type.ts";
import type { Checkpoint } from "../frontends/checkpoint.ts";
import { dtypeOf, type StoredTensor } from "../frontends/safetensors.ts";
import type { CodeType } from "./convert.ts";
import { asMatrices } from "./plan.ts";

/** The part of a stack of matrices that a slice leaves: matrix numbers, and ranges of rows and columns. */
export interface Part {
  readonly matrices: readonly number[];
  readonly rows: readonly [number, number];
  readonly columns: readonly [number, number];
}

export const partOf = (shape: readonly number[], slice: Slice | undefined): Part => {
  const ranges = shape.map((d, i): readonly [number, number] => {
    const [from, to] = slice?.[i] ?? [0, d];
    if (!(Number.isInteger(from) && Number.isInteger(to) && from >= 0 && from <= to && to <= d))
      throw new Error(`slice [${from},${to}) does not fit axis ${i} of [${shape.join(",")}]`);
    return [from, to];
  });
  if (slice && slice.length !== shape.length)
    throw new Error(`a slice of ${slice.length} axes does not fit [${shape.join(",")}]`);
  let matrices = [0];
  for (let axis = 0; axis < shape.length - 2; axis++) {
    const [from, to] = ranges[axis] as readonly [number, number];
    const size = shape[axis] as number;
    matrices = matrices.flatMap((m) => Array.from({ length: to - from }, (_, i) => m * size + from + i));
  }
  return { matrices, rows: ranges.at(-2) ?? [0, 1], columns: ranges.at(-1) ?? [0, 1] };
};

export const slicedShape = (shape: readonly number[], slice: Slice | undefined): readonly number[] =>
  slice ? slice.map(([from, to]) => to - from) : shape;

/** Block scales of a whole tensor, all its matrices. */
interface ScaleTable {
  readonly scales: Float32Array;
  readonly down: number;
  readonly across: number;
  readonly block: readonly [number, number];
}

/** A quantisation of a part of a tensor: its scales, block by block, once they are known. Codes and scales of one weight share it. */
export interface Quantisation extends ScaleTable {
  readonly to: CodeType;
  readonly known: Uint8Array;
}

/** How the elements of a weight come from one tensor of the checkpoint. */
export interface Recipe {
  readonly tensor: StoredTensor;
  /** what is taken of the tensor before anything else is done to it */
  readonly part: Part;
  readonly dequantise?: ScaleTable;
  readonly quantise?: { readonly make: "codes" | "scales"; readonly state: Quantisation; readonly part: Part };
}

export const source = (checkpoint: Checkpoint | undefined, name: string): StoredTensor => {
  const tensor = checkpoint?.tensors.get(name);
  if (!tensor) throw new Error(`the checkpoint has no tensor '${name}', which a weight is made of`);
  return tensor;
};

interface Recipes {
  of(weight: Weight): Recipe | undefined;
}

/** Recipes share the scales that they compute, and the scale tensors that they read. */
export const createRecipes = (checkpoint: Checkpoint | undefined): Recipes => {
  const states = new Map<string, Quantisation>();
  const tables = new Map<string, Float32Array>();

  const plain = (s: WeightSource): Recipe | undefined => {
    if (s.kind !== "tensor" && s.kind !== "dequantised") return undefined;
    const tensor = source(checkpoint, s.tensor);
    const part = partOf(tensor.shape, s.slice);
    if (s.kind === "tensor") return { tensor, part };
    const { rows, columns } = asMatrices(tensor.shape);
    const scaleTensor = source(checkpoint, s.scales);
    const scales =
      tables.get(s.scales) ?? Float32Array.from(decode(dtypeOf(scaleTensor.dtype), (checkpoint as Checkpoint).read(scaleTensor)));
    tables.set(s.scales, scales);
    const table = { scales, down: Math.ceil(rows / s.block[0]), across: Math.ceil(columns / s.block[1]), block: s.block };
    return { tensor, part, dequantise: table };
  };

  return {
    of: (weight) => {
      const s = weight.source;
      if (s.kind !== "codes" && s.kind !== "scales") return plain(s);
      const base = plain(s.of);
      if (!base) throw new Error(`${weight.value.name}: cannot quantise a weight of kind '${s.of.kind}'`);
      const to = codeType(s.to);
      const { matrices, rows, columns } = base.part;
      const [height, width] = [rows[1] - rows[0], columns[1] - columns[0]];
      const [down, across] = [Math.ceil(height / s.block[0]), Math.ceil(width / s.block[1])];
      const key = canonicalJson([s.of, to, s.block] as unknown as Json);
      const state = states.get(key) ?? {
        to,
        down,
        across,
        block: s.block,
        scales: new Float32Array(matrices.length * down * across),
        known: new Uint8Array(matrices.length * down),
      };
      states.set(key, state);
      const whole = slicedShape(base.tensor.shape, "slice" in s.of ? s.of.slice : undefined);
      const shape = s.kind === "codes" ? whole : scalesShapeOf(whole, s.block);
      return { ...base, quantise: { make: s.kind, state, part: partOf(shape, s.slice) } };
    },
  };
};

export const codeType = (to: DType): CodeType => {
  if (to !== "e4m3" && to !== "i8") throw new Error(`weights are quantised to e4m3 or i8, not ${to}`);
  return to;
};

/** A vector is one row, and its scales are a vector. */
export const scalesShapeOf = (shape: readonly number[], block: readonly [number, number]): readonly number[] =>
  shape.map((d, i) => Math.ceil(d / (i === shape.length - 1 ? block[1] : i === shape.length - 2 ? block[0] : 1)));
