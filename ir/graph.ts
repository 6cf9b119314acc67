import type { Attrs } from "./attr.ts";
import type { DimSymbol } from "./dim.ts";
import type { DType, TensorType, Type } from "./type.ts";

/** A value has one definition and never changes; its name is unique in its graph and is an identifier. */
export interface Value {
  readonly name: string;
  readonly type: Type;
}

/** Where an op runs: unset before the partition; `ffn` before the shard; `ffn0`, `ffn1` ... after it. */
export type Place = "attention" | "ffn" | `ffn${number}`;

export interface Op {
  /** the name of its Knowledge in ir/ops/index.ts */
  readonly kind: string;
  readonly inputs: readonly Value[];
  readonly attrs: Attrs;
  readonly outputs: readonly Value[];
  /** `fused` only: the ops in it, a graph whose inputs are this op's inputs and whose outputs are its outputs, in order */
  readonly body?: Graph;
  readonly place?: Place;
  /** where it came from: a model node (`layers.3.self_attn.q_proj`) or a source line (`file.step3:12`) */
  readonly origin?: string;
}

/** Half-open index ranges, one per axis of the tensor as it is before slicing. */
export type Slice = readonly (readonly [number, number])[];

/** What a checkpoint's tensor becomes. */
export type StoredSource =
  /** a tensor of the checkpoint, converted to the weight's dtype when the dtypes differ (floats only) */
  | { readonly kind: "tensor"; readonly tensor: string; readonly slice?: Slice }
  /** checkpoint codes times block scales, rounded to the weight's dtype; block is [rows, columns] of the last two axes */
  | {
      readonly kind: "dequantised";
      readonly tensor: string;
      readonly scales: string;
      readonly block: readonly [number, number];
      readonly slice?: Slice;
    }
  /** the codes, or the scales, of `of` quantised to `to` in blocks [rows, columns] (DESIGN "Numbers"); slice is in the axes of the codes or scales themselves */
  | {
      readonly kind: "codes" | "scales";
      readonly of: WeightSource;
      readonly to: DType;
      readonly block: readonly [number, number];
      readonly slice?: Slice;
    };

/** Where the bytes of a weight come from. Evaluated tile by tile, never in a Graph. */
export type WeightSource =
  | StoredSource
  /** [E, rows, columns]: E matrices one after another, each from its own place. Slices, codes and scales are those of the matrices */
  | { readonly kind: "stacked"; readonly of: readonly StoredSource[] }
  /** f32 [positions, dim]: cos in the first half of the columns, sin in the second, of f32(position * f32 inv_freq) */
  | { readonly kind: "rope"; readonly theta: number; readonly positions: number; readonly dim: number }
  /** values written in the text of a graph, row-major */
  | { readonly kind: "literal"; readonly values: readonly number[] };

export const isStored = (s: WeightSource): s is StoredSource => s.kind !== "stacked" && s.kind !== "rope" && s.kind !== "literal";

export interface Weight {
  readonly value: Value & { readonly type: TensorType };
  readonly source: WeightSource;
}

/**
 * A model, or a part of one. Ops are in an order in which every value is defined before it is used.
 * States (`kv` values) are threaded: an op that changes one takes the old version and gives the new one, and each version is changed at most once.
 */
export interface Graph {
  readonly name: string;
  readonly symbols: readonly DimSymbol[];
  readonly inputs: readonly Value[];
  readonly states: readonly Value[];
  readonly weights: readonly Weight[];
  readonly ops: readonly Op[];
  readonly outputs: readonly Value[];
}
