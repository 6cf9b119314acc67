import { type Dim, dimText } from "./dim.ts";

/** Element types. `e4m3` is float8 e4m3fn (no infinities, saturating conversion); `e5m2` is float8 e5m2. */
export const dtypes = [
  "f64",
  "f32",
  "f16",
  "bf16",
  "e4m3",
  "e5m2",
  "i64",
  "i32",
  "i16",
  "i8",
  "u64",
  "u32",
  "u16",
  "u8",
  "bool",
] as const;
export type DType = (typeof dtypes)[number];

const widths: Readonly<Record<DType, number>> = {
  f64: 8,
  f32: 4,
  f16: 2,
  bf16: 2,
  e4m3: 1,
  e5m2: 1,
  i64: 8,
  i32: 4,
  i16: 2,
  i8: 1,
  u64: 8,
  u32: 4,
  u16: 2,
  u8: 1,
  bool: 1,
};

/** Bytes of one element. */
export const dtypeBytes = (dtype: DType): number => widths[dtype];
export const isFloat = (dtype: DType): boolean => /^(f|bf|e)/.test(dtype);

/** A dense row-major tensor; rank 0 is a scalar. */
export interface TensorType {
  readonly kind: "tensor";
  readonly dtype: DType;
  readonly shape: readonly Dim[];
}

/**
 * The key/value cache of one layer, `heads` KV heads of `dim` elements for K and as many for V, stored as `dtype`.
 * Codes (`e4m3`, `i8`) carry one f32 scale per token and head for K and one for V.
 * Pages and packing belong to the backend that runs attention; the Graph never sees them.
 */
export interface KvType {
  readonly kind: "kv";
  readonly dtype: "bf16" | "f32" | "e4m3" | "i8";
  readonly heads: number;
  readonly dim: number;
}

export type Type = TensorType | KvType;

export const tensor = (dtype: DType, shape: readonly Dim[]): TensorType => ({ kind: "tensor", dtype, shape });

/** `bf16[T,256]`, `f32[]`, `kv<e4m3,1x256>`: the textual form of a type. */
export const typeText = (t: Type): string =>
  t.kind === "kv" ? `kv<${t.dtype},${t.heads}x${t.dim}>` : `${t.dtype}[${t.shape.map(dimText).join(",")}]`;

export const sameType = (a: Type, b: Type): boolean => {
  if (a.dtype !== b.dtype) return false;
  if (a.kind === "kv" || b.kind === "kv") return a.kind === "kv" && b.kind === "kv" && a.heads === b.heads && a.dim === b.dim;
  return a.shape.length === b.shape.length && a.shape.every((d, i) => d === b.shape[i]);
};
