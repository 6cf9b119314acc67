/**
 * The numbers of each dtype. A double is rounded to a dtype in one step (never through another dtype), to nearest, ties to even.
 * `f16`, `bf16`, `f32`, `e5m2` overflow to infinity; `e4m3` (e4m3fn, no infinities) saturates to +-448 and keeps NaN;
 * integers are clamped to their range and NaN becomes 0; `bool` is 1 for anything but 0. Integers of 64 bits are exact to 2^53.
 */
import { type DType, dtypeBytes } from "./type.ts";

/** A binary float format: significand bits with the hidden one, exponent of the smallest normal, largest finite value. */
interface FloatFormat {
  readonly precision: number;
  readonly minExponent: number;
  readonly max: number;
  readonly saturates: boolean;
  /** bits of the whole, of the stored significand, and of the canonical NaN */
  readonly bits: number;
  readonly nan: number;
}

type SmallFloat = "f16" | "bf16" | "e4m3" | "e5m2";

const formats: Readonly<Record<SmallFloat, FloatFormat>> = {
  f16: { precision: 11, minExponent: -14, max: 65504, saturates: false, bits: 16, nan: 0x7e00 },
  bf16: { precision: 8, minExponent: -126, max: 255 * 2 ** 120, saturates: false, bits: 16, nan: 0x7fc0 },
  e4m3: { precision: 4, minExponent: -6, max: 448, saturates: true, bits: 8, nan: 0x7f },
  e5m2: { precision: 3, minExponent: -14, max: 57344, saturates: false, bits: 8, nan: 0x7e },
};

/** 2^e for e in -1074..1023, exact: built by doubling and halving. */
const powers: Float64Array = ((): Float64Array => {
  const table = new Float64Array(2098);
  table[1074] = 1;
  for (let e = 1; e <= 1023; e++) table[1074 + e] = (table[1073 + e] as number) * 2;
  for (let e = -1; e >= -1074; e--) table[1074 + e] = (table[1075 + e] as number) / 2;
  return table;
})();

/** 2^e, exact, for e in -1074..1023. */
export const powerOfTwo = (e: number): number => powers[e + 1074] as number;

/** floor(log2 a) for finite a > 0. */
type Exponent = (a: number) => number;

/** Math.log2 may be off by one next to a power of two. */
const exponentOf: Exponent = (a) => {
  const guess = Math.min(1023, Math.max(-1074, Math.floor(Math.log2(a))));
  if (powerOfTwo(guess) > a) return guess - 1;
  return guess < 1023 && powerOfTwo(guess + 1) <= a ? guess + 1 : guess;
};

/** The same from the bits of the double, ten times as fast; for loops, as it has to have memory of its own. */
const exponentByBits = (): Exponent => {
  const value = new Float64Array(1);
  const words = new Uint32Array(value.buffer);
  const high = new Uint8Array(new Uint16Array([1]).buffer)[0] === 1 ? 1 : 0;
  return (a) => {
    value[0] = a;
    const field = (words[high] as number) >>> 20;
    return field === 0 ? exponentOf(a) : field - 1023;
  };
};

/** Adding it to a number below 2^51 leaves no bits after the point, and the processor rounds to nearest even. */
const integerMagic = 1.5 * 2 ** 52;

/** To the nearest integer, ties to even; keeps NaN, infinities and the sign of zero. */
export const nearestEven = (x: number): number => {
  const a = Math.abs(x);
  if (!(a < 2 ** 51)) return x;
  const n = a + integerMagic - integerMagic;
  return x < 0 || Object.is(x, -0) ? -n : n;
};

const roundFloat = (f: FloatFormat, x: number, exponent: Exponent): number => {
  if (x === 0 || Number.isNaN(x)) return x;
  const a = Math.abs(x);
  if (a === Infinity) return f.saturates ? Math.sign(x) * f.max : x;
  const unit = Math.max(exponent(a), f.minExponent) - (f.precision - 1);
  // both scalings are by powers of two and exact: a/2^unit is below 2^precision
  const rounded = (a * powerOfTwo(-unit) + integerMagic - integerMagic) * powerOfTwo(unit);
  const limited = rounded > f.max ? (f.saturates ? f.max : Infinity) : rounded;
  return x < 0 ? -limited : limited;
};

const clamp =
  (min: number, max: number) =>
  (x: number): number => {
    if (Number.isNaN(x)) return 0;
    const n = nearestEven(x);
    return n < min ? min : n > max ? max : n === 0 ? 0 : n;
  };

const rounders: Readonly<Record<DType, (x: number) => number>> = {
  f64: (x) => x,
  f32: Math.fround,
  f16: (x) => roundFloat(formats.f16, x, exponentOf),
  bf16: (x) => roundFloat(formats.bf16, x, exponentOf),
  e4m3: (x) => roundFloat(formats.e4m3, x, exponentOf),
  e5m2: (x) => roundFloat(formats.e5m2, x, exponentOf),
  // the largest doubles below 2^63 and 2^64: their neighbours above are outside the range
  i64: clamp(-(2 ** 63), 2 ** 63 - 1024),
  u64: clamp(0, 2 ** 64 - 2048),
  i32: clamp(-(2 ** 31), 2 ** 31 - 1),
  u32: clamp(0, 2 ** 32 - 1),
  i16: clamp(-32768, 32767),
  u16: clamp(0, 65535),
  i8: clamp(-128, 127),
  u8: clamp(0, 255),
  bool: (x) => (x === 0 ? 0 : 1),
};

/** The function that rounds to `dtype`; for loops. */
export const rounder = (dtype: DType): ((x: number) => number) => {
  if (dtype !== "f16" && dtype !== "bf16" && dtype !== "e4m3" && dtype !== "e5m2") return rounders[dtype];
  const format = formats[dtype];
  const exponent = exponentByBits();
  return (x) => roundFloat(format, x, exponent);
};
/** The value of `dtype` nearest to x. */
export const roundTo = (dtype: DType, x: number): number => rounders[dtype](x);

/** The bits of a value that `format` can hold. */
const codeOf = (f: FloatFormat, x: number): number => {
  if (Number.isNaN(x)) return f.nan;
  const sign = x < 0 || Object.is(x, -0) ? 2 ** (f.bits - 1) : 0;
  const a = Math.abs(x);
  const stored = f.precision - 1;
  if (a === 0) return sign;
  // only IEEE formats come here with infinity: all exponent bits set
  if (a === Infinity) return sign + 2 ** (f.bits - 1) - 2 ** stored;
  const exponent = exponentOf(a);
  if (exponent < f.minExponent) return sign + a * powerOfTwo(stored - f.minExponent);
  const significand = a * powerOfTwo(-exponent) * 2 ** stored;
  return sign + (exponent - f.minExponent) * 2 ** stored + significand;
};

const codeValue = (f: FloatFormat, code: number): number => {
  const stored = f.precision - 1;
  const sign = code >= 2 ** (f.bits - 1) ? -1 : 1;
  const magnitude = code % 2 ** (f.bits - 1);
  const field = Math.floor(magnitude / 2 ** stored);
  const fraction = magnitude % 2 ** stored;
  if (f.saturates) {
    if (magnitude === f.nan) return NaN;
  } else if (field === 2 ** (f.bits - 1 - stored) - 1) return fraction === 0 ? sign * Infinity : NaN;
  if (field === 0) return sign * fraction * powerOfTwo(f.minExponent - stored);
  return sign * (fraction + 2 ** stored) * powerOfTwo(field - 1 + f.minExponent - stored);
};

/** Bits of x in a float dtype of at most 16 bits, x rounded first. NaN gives the canonical quiet NaN. */
export const floatCode = (dtype: SmallFloat, x: number): number => codeOf(formats[dtype], roundTo(dtype, x));
/** Value of the bits of a float dtype of at most 16 bits. */
export const floatValue = (dtype: SmallFloat, code: number): number => codeValue(formats[dtype], code);

/** Little-endian bytes of `values`, each rounded to `dtype` first. */
export const encode = (dtype: DType, values: ArrayLike<number>): Uint8Array => {
  const width = dtypeBytes(dtype);
  const bytes = new Uint8Array(values.length * width);
  const view = new DataView(bytes.buffer);
  const round = rounder(dtype);
  for (let i = 0; i < values.length; i++) {
    const x = round(values[i] as number);
    const at = i * width;
    switch (dtype) {
      case "f64":
        view.setFloat64(at, x, true);
        break;
      case "f32":
        view.setFloat32(at, x, true);
        break;
      case "f16":
      case "bf16":
        view.setUint16(at, codeOf(formats[dtype], x), true);
        break;
      case "e4m3":
      case "e5m2":
        bytes[at] = codeOf(formats[dtype], x);
        break;
      case "i64":
        view.setBigInt64(at, BigInt(x), true);
        break;
      case "u64":
        view.setBigUint64(at, BigInt(x), true);
        break;
      case "i32":
        view.setInt32(at, x, true);
        break;
      case "u32":
        view.setUint32(at, x, true);
        break;
      case "i16":
        view.setInt16(at, x, true);
        break;
      case "u16":
        view.setUint16(at, x, true);
        break;
      case "i8":
        view.setInt8(at, x);
        break;
      case "u8":
      case "bool":
        bytes[at] = x;
        break;
    }
  }
  return bytes;
};

/** The values of little-endian bytes; a rest shorter than an element is an error of the caller. 64-bit integers lose bits past 2^53. */
export const decode = (dtype: DType, bytes: Uint8Array): Float64Array => {
  const width = dtypeBytes(dtype);
  if (bytes.length % width !== 0) throw new Error(`${bytes.length} bytes are not whole elements of ${dtype}`);
  const values = new Float64Array(bytes.length / width);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const read = reader(dtype, view);
  for (let i = 0; i < values.length; i++) values[i] = read(i * width);
  return values;
};

const reader = (dtype: DType, view: DataView): ((at: number) => number) => {
  switch (dtype) {
    case "f64":
      return (at) => view.getFloat64(at, true);
    case "f32":
      return (at) => view.getFloat32(at, true);
    case "f16":
    case "bf16":
      return (at) => codeValue(formats[dtype], view.getUint16(at, true));
    case "e4m3":
    case "e5m2":
      return (at) => codeValue(formats[dtype], view.getUint8(at));
    case "i64":
      return (at) => Number(view.getBigInt64(at, true));
    case "u64":
      return (at) => Number(view.getBigUint64(at, true));
    case "i32":
      return (at) => view.getInt32(at, true);
    case "u32":
      return (at) => view.getUint32(at, true);
    case "i16":
      return (at) => view.getInt16(at, true);
    case "u16":
      return (at) => view.getUint16(at, true);
    case "i8":
      return (at) => view.getInt8(at);
    case "u8":
      return (at) => view.getUint8(at);
    case "bool":
      return (at) => (view.getUint8(at) === 0 ? 0 : 1);
  }
};
