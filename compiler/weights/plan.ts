/** Which weights go where, and how many bytes they take there. */
import type { Layout } from "../../backends/backend.ts";
import type { Weight } from "../../ir/graph.ts";
import { dtypeBytes, type TensorType, typeText } from "../../ir/type.ts";

/** One weight of a rank: where it lies in the data part of the rank's file, and how. `bytes` includes padding. */
export interface PlacedWeight {
  readonly weight: Weight;
  /** absent: row-major */
  readonly layout?: Layout;
  readonly offset: number;
  readonly bytes: number;
}

/** A safetensors file of packed weights, which follow each other without gaps from offset 0. */
export interface WeightsPlan {
  readonly path: string;
  readonly weights: readonly PlacedWeight[];
}

export const numbers = (type: TensorType): readonly number[] =>
  type.shape.map((d) => {
    if (typeof d !== "number") throw new Error(`a weight of type ${typeText(type)} has no constant size`);
    return d;
  });

/** Bytes of a weight as it is packed, without padding. */
export const packedBytes = (type: TensorType, layout?: Layout): number => {
  const shape = numbers(type);
  const { rows, matrices, columns } = asMatrices(shape);
  return layout ? matrices * layout.bytes(rows, columns, type.dtype) : matrices * rows * columns * dtypeBytes(type.dtype);
};

/** The matrices of a stack, each where it lies; any other weight as it is. */
export const separate = (placed: PlacedWeight): readonly PlacedWeight[] => {
  const { value, source } = placed.weight;
  if (source.kind !== "stacked") return [placed];
  const type = { ...value.type, shape: value.type.shape.slice(1) };
  const bytes = packedBytes(type, placed.layout);
  return source.of.map((of, i) => ({
    ...placed,
    weight: { value: { ...value, type }, source: of },
    offset: placed.offset + i * bytes,
    bytes,
  }));
};

/** Whether a weight is computed, so that a bundle without weights still has to contain it. */
export const isConstant = ({ source }: Weight): boolean => source.kind === "rope" || source.kind === "literal";

/** [..., rows, columns] as matrices one after another. */
export const asMatrices = (shape: readonly number[]): { matrices: number; rows: number; columns: number } => ({
  matrices: shape.slice(0, -2).reduce((n, d) => n * d, 1),
  rows: shape.at(-2) ?? 1,
  columns: shape.at(-1) ?? 1,
});
