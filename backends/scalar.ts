/** C++ and its kin with the functions of scalar.h, which a target puts beside its kernels. */
import type { DType } from "../ir/type.ts";
import type { Dialect } from "./c_family.ts";
import { loadText } from "./template.ts";

/** The text of scalar.h; a target's own `formats.h` must lie beside it. */
export const scalarHeader = (): string => loadText(new URL("./scalar.h", import.meta.url));

/** Element types in memory, as scalar.h has them. */
export const storage: Readonly<Record<DType, string>> = {
  f64: "double",
  f32: "float",
  f16: "f16",
  bf16: "bf16",
  e4m3: "e4m3",
  e5m2: "e5m2",
  i64: "int64_t",
  i32: "int32_t",
  i16: "int16_t",
  i8: "int8_t",
  u64: "uint64_t",
  u32: "uint32_t",
  u16: "uint16_t",
  u8: "uint8_t",
  bool: "uint8_t",
};

/** The shortest decimal that reads back as the same float or double, as a C++ literal. */
const literal = (value: number, wide: boolean): string => {
  const suffix = wide ? "" : "f";
  if (Number.isNaN(value)) return wide ? "(double)not_a_number" : "not_a_number";
  const x = wide ? value : Math.fround(value);
  if (!Number.isFinite(x)) return `${x < 0 ? "(-" : ""}${wide ? "(double)" : ""}infinity${x < 0 ? ")" : ""}`;
  let digits = String(x);
  if (!wide)
    for (let n = 1; n <= 9; n++) {
      digits = String(Number(x.toPrecision(n)));
      if (Math.fround(Number(digits)) === x) break;
    }
  const decimal = /[.e]/.test(digits) ? digits : `${digits}.0`;
  const text = `${Object.is(x, -0) ? "-0.0" : decimal}${suffix}`;
  return text.startsWith("-") ? `(${text})` : text;
};

export const dialect: Dialect = {
  name: "C++",
  narrow: "float",
  wide: "double",
  literal,
  unary: {
    neg: "(-$0)",
    abs: "magnitude($0)",
    exp: "exponential_of($0)",
    log: "logarithm_of($0)",
    sqrt: "square_root($0)",
    rsqrt: "(1 / square_root($0))",
    tanh: "hyperbolic_tangent($0)",
    erf: "error_function($0)",
    sin: "sine($0)",
    cos: "cosine($0)",
    tan: "tangent($0)",
    asin: "arc_sine($0)",
    acos: "arc_cosine($0)",
    atan: "arc_tangent($0)",
    sinh: "hyperbolic_sine($0)",
    cosh: "hyperbolic_cosine($0)",
    asinh: "area_sine($0)",
    acosh: "area_cosine($0)",
    atanh: "area_tangent($0)",
    floor: "floor_of($0)",
    ceil: "ceil_of($0)",
    trunc: "trunc_of($0)",
    nearest: "nearest($0)",
    not: "($0 == 0 ? 1.0f : 0.0f)",
  },
  binary: {
    add: "($0 + $1)",
    sub: "($0 - $1)",
    mul: "($0 * $1)",
    div: "($0 / $1)",
    fmod: "remainder_of($0, $1)",
    min: "smaller_of($0, $1)",
    max: "larger_of($0, $1)",
    pow: "power($0, $1)",
    lt: "($0 < $1 ? 1.0f : 0.0f)",
    le: "($0 <= $1 ? 1.0f : 0.0f)",
    eq: "($0 == $1 ? 1.0f : 0.0f)",
    and: "($0 != 0 && $1 != 0 ? 1.0f : 0.0f)",
    or: "($0 != 0 || $1 != 0 ? 1.0f : 0.0f)",
    bit_and: "bits_of_both($0, $1)",
    bit_or: "bits_of_either($0, $1)",
    bit_xor: "bits_that_differ($0, $1)",
  },
  select: "($0 != 0 ? $1 : $2)",
  storage,
  load: (dtype) => (dtype === "f32" || dtype === "f64" ? "$0[$1]" : dtype === "bool" ? "truth($0[$1])" : "value($0[$1])"),
  round: (dtype) => `round_${dtype}($0)`,
  store: (dtype) => (dtype === "f32" || dtype === "f64" ? "$0[$1] = $2;" : `$0[$1] = to_${dtype}($2);`),
};
