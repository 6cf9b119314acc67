import type { DType } from "./type.ts";

export type UnaryScalar =
  | "neg"
  | "abs"
  | "exp"
  | "log"
  | "sqrt"
  | "rsqrt"
  | "tanh"
  | "erf"
  | "sin"
  | "cos"
  | "tan"
  | "asin"
  | "acos"
  | "atan"
  | "sinh"
  | "cosh"
  | "asinh"
  | "acosh"
  | "atanh"
  | "floor"
  | "ceil"
  | "trunc"
  | "nearest"
  | "not";
export type BinaryScalar =
  | "add"
  | "sub"
  | "mul"
  | "div"
  | "fmod"
  | "min"
  | "max"
  | "pow"
  | "lt"
  | "le"
  | "eq"
  | "and"
  | "or"
  | "bit_and"
  | "bit_or"
  | "bit_xor";

/**
 * The arithmetic of one element. Fusible ops are made of these; one renderer spells them for every target.
 * Comparisons give 1 or 0. `nearest` rounds to an integer, ties to even. `min` and `max` give NaN when an operand is NaN.
 * `fmod` is what is left of x when y is taken away as often as it fits, with x's sign. Bit operations are on integers in two's complement.
 * `round` converts to a dtype and back: the only place where precision is lost.
 */
export type Scalar =
  | { readonly op: "const"; readonly value: number }
  | { readonly op: "arg"; readonly index: number }
  | { readonly op: UnaryScalar; readonly x: Scalar }
  | { readonly op: BinaryScalar; readonly x: Scalar; readonly y: Scalar }
  | { readonly op: "select"; readonly if: Scalar; readonly x: Scalar; readonly y: Scalar }
  | { readonly op: "round"; readonly dtype: DType; readonly x: Scalar };

export const arg = (index: number): Scalar => ({ op: "arg", index });
export const lit = (value: number): Scalar => ({ op: "const", value });
export const un = (op: UnaryScalar, x: Scalar): Scalar => ({ op, x });
export const bin = (op: BinaryScalar, x: Scalar, y: Scalar): Scalar => ({ op, x, y });
