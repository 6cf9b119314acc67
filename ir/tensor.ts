import type { DType } from "./type.ts";

/** A tensor of the interpreter: concrete shape, row-major, every element a double that `dtype` can hold (integers exact to 2^53). */
export interface Tensor {
  readonly kind: "tensor";
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly data: Float64Array;
}
