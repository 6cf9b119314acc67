/**
 * Conversion and quantisation of weights, over typed arrays: the fast spelling of what `readWeight` (weights.ts) says slowly.
 * A rounding of a value of 16 bits or less is a table look-up; quantisation of bf16 makes one such table per block, because the
 * quotient by the block's scale is monotonic, so that 127 borders decide all codes.
 */
import { decode, encode, floatCode, floatValue, roundTo } from "../ir/round.ts";
import { type DType, dtypeBytes } from "../ir/type.ts";

/** A rectangle of elements in memory: `rows` runs of `columns`, `stride` elements apart; `bytes` begins at its first element. */
export interface Region {
  readonly bytes: Uint8Array;
  readonly dtype: DType;
  readonly rows: number;
  readonly columns: number;
  readonly stride: number;
}

/** Scales of a matrix cut into blocks of [rows, columns]; `firstRow` and `firstColumn` are the region's place in that matrix. */
export interface Blocks {
  readonly scales: Float32Array;
  /** scales of one row of blocks */
  readonly across: number;
  readonly block: readonly [number, number];
  readonly firstRow: number;
  readonly firstColumn: number;
}

/** What the largest magnitude of a block is scaled to. */
export const largestCode = { e4m3: 448, i8: 127 } as const;
export type CodeType = keyof typeof largestCode;

/** Conversions of one conversion run, with the tables that they fill on the way. */
export interface Converter {
  /** elements rounded to `to`, row-major without gaps; a region that is that already is returned as it is */
  convert(x: Region, to: DType): Uint8Array;
  /** e4m3 codes times block scales, rounded once to `to` */
  dequantise(x: Region, blocks: Blocks, to: DType): Uint8Array;
  /** f32(amax / 448) or f32(amax / 127) of a block, 1 where that is 0; NaN when the block holds a value that is not finite */
  scaleOf(x: Region, to: CodeType): number;
  /** to(f32(x / scale)) of every element; x is bf16 or f32 */
  quantise(x: Region, blocks: Blocks, to: CodeType): Uint8Array;
}

type Codes = Uint8Array | Uint16Array | Uint32Array | Float32Array;

const codesOf = (dtype: DType, bytes: Uint8Array): Codes => {
  const size = dtypeBytes(dtype);
  const length = Math.floor(bytes.length / size);
  if (size === 1) return bytes;
  if (size === 2) return new Uint16Array(bytes.buffer, bytes.byteOffset, length);
  if (size === 4) return new Uint32Array(bytes.buffer, bytes.byteOffset, length);
  throw new Error(`${dtype} has no codes of at most 32 bits`);
};

const bytesOf = (codes: Codes): Uint8Array => new Uint8Array(codes.buffer, codes.byteOffset, codes.byteLength);
const floatsOf = (x: Region): Float32Array =>
  new Float32Array(x.bytes.buffer, x.bytes.byteOffset, Math.floor(x.bytes.length / 4));
const isNarrow = (dtype: DType): boolean => dtypeBytes(dtype) <= 2;

export const createConverter = (): Converter => {
  const tables = new Map<string, Codes>();
  const blockTable = new Uint8Array(65536);

  /** code in `to` of every code of `from`, a dtype of at most 16 bits */
  const tableOf = (from: DType, to: DType): Codes => {
    const known = tables.get(`${from} ${to}`);
    if (known) return known;
    const size = dtypeBytes(from);
    const every = size === 1 ? Uint8Array.from({ length: 256 }, (_, i) => i) : Uint16Array.from({ length: 65536 }, (_, i) => i);
    const table = codesOf(to, encode(to, decode(from, bytesOf(every))));
    tables.set(`${from} ${to}`, table);
    return table;
  };

  const convert = (x: Region, to: DType): Uint8Array => {
    if (x.dtype === to) return compact(x);
    if (isNarrow(x.dtype) && dtypeBytes(to) <= 4) return lookUp(x, tableOf(x.dtype, to), to);
    if (x.dtype === "f32" && to === "bf16") return f32ToBf16(x);
    return encode(to, decode(x.dtype, compact(x)));
  };

  const dequantise = (x: Region, blocks: Blocks, to: DType): Uint8Array => {
    const out = codesOf(to, new Uint8Array(x.rows * x.columns * dtypeBytes(to)));
    const table = codesOf(to, new Uint8Array(256 * dtypeBytes(to)));
    eachBlock(x, blocks, (r0, r1, c0, c1, scale) => {
      fillDequantised(table, scale, to);
      for (let r = r0; r < r1; r++) {
        const [from, at] = [r * x.stride, r * x.columns];
        for (let c = c0; c < c1; c++) out[at + c] = table[x.bytes[from + c] as number] as number;
      }
    });
    return bytesOf(out);
  };

  const quantise = (x: Region, blocks: Blocks, to: CodeType): Uint8Array => {
    const out = new Uint8Array(x.rows * x.columns);
    eachBlock(x, blocks, (r0, r1, c0, c1, scale) => {
      const elements = (r1 - r0) * (c1 - c0);
      if (x.dtype === "bf16" && elements >= 2048) {
        fillQuantised(blockTable, amaxBits(x, r0, r1, c0, c1), scale, to);
        lookUpBlock(x, r0, r1, c0, c1, blockTable, out);
      } else if (to === "e4m3") quantiseE4m3(x, r0, r1, c0, c1, scale, out);
      else quantiseI8(x, r0, r1, c0, c1, scale, out);
    });
    return out;
  };

  return { convert, dequantise, scaleOf, quantise };
};

/** The elements without gaps. */
const compact = (x: Region): Uint8Array => {
  const width = dtypeBytes(x.dtype);
  const [run, step] = [x.columns * width, x.stride * width];
  if (run === step || x.rows === 1) return x.bytes.subarray(0, x.rows * run);
  const out = new Uint8Array(x.rows * run);
  for (let r = 0; r < x.rows; r++) out.set(x.bytes.subarray(r * step, r * step + run), r * run);
  return out;
};

const lookUp = (x: Region, table: Codes, to: DType): Uint8Array => {
  const source = codesOf(x.dtype, x.bytes);
  const out = codesOf(to, new Uint8Array(x.rows * x.columns * dtypeBytes(to)));
  for (let r = 0; r < x.rows; r++) {
    const [from, at] = [r * x.stride, r * x.columns];
    for (let c = 0; c < x.columns; c++) out[at + c] = table[source[from + c] as number] as number;
  }
  return bytesOf(out);
};

/** Round to nearest even by adding to the bits; a NaN becomes the quiet one. */
const f32ToBf16 = (x: Region): Uint8Array => {
  const source = codesOf("f32", x.bytes) as Uint32Array;
  const out = new Uint16Array(x.rows * x.columns);
  for (let r = 0; r < x.rows; r++) {
    const [from, at] = [r * x.stride, r * x.columns];
    for (let c = 0; c < x.columns; c++) {
      const bits = source[from + c] as number;
      out[at + c] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
    }
  }
  return bytesOf(out);
};

/** Calls `visit` with the row and column range in the region, and the scale, of every block that the region meets. */
const eachBlock = (
  x: Region,
  { scales, across, block: [rows, columns], firstRow, firstColumn }: Blocks,
  visit: (r0: number, r1: number, c0: number, c1: number, scale: number) => void,
): void => {
  for (let r0 = 0; r0 < x.rows; ) {
    const band = Math.floor((firstRow + r0) / rows);
    const r1 = Math.min(x.rows, (band + 1) * rows - firstRow);
    for (let c0 = 0; c0 < x.columns; ) {
      const column = Math.floor((firstColumn + c0) / columns);
      const c1 = Math.min(x.columns, (column + 1) * columns - firstColumn);
      visit(r0, r1, c0, c1, scales[band * across + column] as number);
      c0 = c1;
    }
    r0 = r1;
  }
};

const fillDequantised = (table: Codes, scale: number, to: DType): void => {
  if (to === "f32") {
    const floats = new Float32Array(table.buffer);
    for (let code = 0; code < 256; code++) floats[code] = floatValue("e4m3", code) * scale;
  } else if (to === "bf16" || to === "f16" || to === "e4m3" || to === "e5m2") {
    for (let code = 0; code < 256; code++) table[code] = floatCode(to, floatValue("e4m3", code) * scale);
  } else throw new Error(`a dequantised weight cannot be ${to}`);
};

/** Bits of the largest magnitude of a block of bf16 or f32: magnitudes are ordered as their bits are. */
const amaxBits = (x: Region, r0: number, r1: number, c0: number, c1: number): number => {
  let largest = 0;
  if (x.dtype === "bf16") {
    const source = codesOf("bf16", x.bytes);
    for (let r = r0; r < r1; r++)
      for (let i = r * x.stride + c0, end = r * x.stride + c1; i < end; i++) {
        const bits = (source[i] as number) & 0x7fff;
        if (bits > largest) largest = bits;
      }
    return largest;
  }
  const source = new Int32Array(x.bytes.buffer, x.bytes.byteOffset, Math.floor(x.bytes.length / 4));
  for (let r = r0; r < r1; r++)
    for (let i = r * x.stride + c0, end = r * x.stride + c1; i < end; i++) {
      const bits = (source[i] as number) & 0x7fffffff;
      if (bits > largest) largest = bits;
    }
  return largest;
};

const scaleOf = (x: Region, to: CodeType): number => {
  const bits = amaxBits(x, 0, x.rows, 0, x.columns) * (x.dtype === "bf16" ? 65536 : 1);
  if (bits >= 0x7f800000) return Number.NaN;
  const word = new Float32Array(1);
  new Uint32Array(word.buffer)[0] = bits;
  const scale = Math.fround((word[0] as number) / largestCode[to]);
  return scale === 0 ? 1 : scale;
};

/**
 * Codes of all bf16 values up to a block's largest: the code of a magnitude grows with it, so the table is 127 runs, whose borders are
 * guessed from the middle between two codes' values and then settled by the formula itself.
 */
const fillQuantised = (table: Uint8Array, amax: number, scale: number, to: CodeType): void => {
  const word = new Float32Array(1);
  const bits = new Uint32Array(word.buffer);
  const quotient = (magnitude: number): number => {
    bits[0] = magnitude * 65536;
    return Math.fround((word[0] as number) / scale);
  };
  const last = to === "e4m3" ? 126 : 127;
  let from = 0;
  for (let code = 0; code <= last && from <= amax; code++) {
    let end = amax + 1;
    if (code < last) {
      const middle = to === "e4m3" ? (floatValue("e4m3", code) + floatValue("e4m3", code + 1)) / 2 : code + 0.5;
      // a quotient just between two codes goes to the even one
      const above = (magnitude: number): boolean => {
        const q = quotient(magnitude);
        return q > middle || (q === middle && code % 2 === 1);
      };
      word[0] = middle * scale;
      end = Math.max(from, Math.min(amax + 1, (bits[0] as number) >>> 16));
      while (end > from && above(end - 1)) end--;
      while (end <= amax && !above(end)) end++;
    }
    const negative = to === "e4m3" ? code | 0x80 : -code;
    for (let m = from; m < end; m++) {
      table[m] = code;
      table[m | 0x8000] = negative;
    }
    from = end;
  }
};

const lookUpBlock = (x: Region, r0: number, r1: number, c0: number, c1: number, table: Uint8Array, out: Uint8Array): void => {
  const source = codesOf("bf16", x.bytes);
  for (let r = r0; r < r1; r++) {
    const [from, at] = [r * x.stride, r * x.columns];
    for (let c = c0; c < c1; c++) out[at + c] = table[source[from + c] as number] as number;
  }
};

/** The f32 elements of a row range, from either dtype. */
const rowFloats = (x: Region, r: number, c0: number, c1: number, into: Float32Array): Float32Array => {
  if (x.dtype === "f32") return floatsOf(x).subarray(r * x.stride + c0, r * x.stride + c1);
  const source = codesOf("bf16", x.bytes);
  const bits = new Uint32Array(into.buffer);
  const from = r * x.stride;
  for (let c = c0; c < c1; c++) bits[c - c0] = (source[from + c] as number) * 65536;
  return into.subarray(0, c1 - c0);
};

/** Adding it to a number below 2^51 leaves no bits after the point, and the processor rounds to nearest even. */
const integerMagic = 1.5 * 2 ** 52;

const quantiseE4m3 = (x: Region, r0: number, r1: number, c0: number, c1: number, scale: number, out: Uint8Array): void => {
  const word = new Float32Array(1);
  const bits = new Uint32Array(word.buffer);
  const scratch = new Float32Array(x.dtype === "f32" ? 0 : c1 - c0);
  for (let r = r0; r < r1; r++) {
    const row = rowFloats(x, r, c0, c1, scratch);
    const at = r * x.columns + c0;
    for (let c = 0; c < row.length; c++) {
      word[0] = (row[c] as number) / scale;
      const b = bits[0] as number;
      const magnitude = b & 0x7fffffff;
      // from 2^-6 on codes are normal: 3 bits of significand stay; below, multiples of 2^-9
      const code =
        magnitude >= 0x3c800000
          ? Math.min(0x7e, ((magnitude + 0x7ffff + ((magnitude >>> 20) & 1)) >>> 20) - 960)
          : Math.abs(word[0]) * 512 + integerMagic - integerMagic;
      out[at + c] = (b >>> 31) * 128 + code;
    }
  }
};

const quantiseI8 = (x: Region, r0: number, r1: number, c0: number, c1: number, scale: number, out: Uint8Array): void => {
  const scratch = new Float32Array(x.dtype === "f32" ? 0 : c1 - c0);
  for (let r = r0; r < r1; r++) {
    const row = rowFloats(x, r, c0, c1, scratch);
    const at = r * x.columns + c0;
    for (let c = 0; c < row.length; c++)
      out[at + c] = Math.max(-128, Math.min(127, Math.fround((row[c] as number) / scale) + integerMagic - integerMagic));
  }
};

/** The same as `Converter.quantise` for one value, as slowly and plainly as the formula: for `readWeight` and tests. */
export const quantisedValue = (x: number, scale: number, to: CodeType): number =>
  roundTo(to, Math.fround(Math.fround(x) / scale));
