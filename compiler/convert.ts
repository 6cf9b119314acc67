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

/** Scratch and tables of one run; typed arrays in fields of fixed types keep the loops fast. */
interface Bench {
  /** a float and its bits */
  readonly word: Float32Array;
  readonly bits: Uint32Array;
  /** code of every bf16 value of the block at hand */
  readonly codes: Uint8Array;
  /** values of the e4m3 codes */
  readonly e4m3: Float64Array;
  /** the values half way between a magnitude's code and the next */
  readonly middles: Readonly<Record<CodeType, Float64Array>>;
}

const halves = (bytes: Uint8Array): Uint16Array => new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.length >>> 1);
const words = (bytes: Uint8Array): Uint32Array => new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.length >>> 2);
const floats = (bytes: Uint8Array): Float32Array => new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length >>> 2);
const bytesOf = (array: Uint16Array | Uint32Array | Float32Array): Uint8Array =>
  new Uint8Array(array.buffer, array.byteOffset, array.byteLength);

export const createConverter = (): Converter => {
  const tables = new Map<string, Uint8Array>();
  const word = new Float32Array(1);
  const e4m3 = Float64Array.from({ length: 256 }, (_, code) => floatValue("e4m3", code));
  const bench: Bench = {
    word,
    bits: new Uint32Array(word.buffer),
    codes: new Uint8Array(65536),
    e4m3,
    middles: {
      e4m3: Float64Array.from({ length: 126 }, (_, c) => ((e4m3[c] as number) + (e4m3[c + 1] as number)) / 2),
      i8: Float64Array.from({ length: 127 }, (_, c) => c + 0.5),
    },
  };

  /** bytes of the code in `to` of every code of `from`, a dtype of at most 16 bits */
  const tableOf = (from: DType, to: DType): Uint8Array => {
    const known = tables.get(`${from} ${to}`);
    if (known) return known;
    const every =
      dtypeBytes(from) === 1
        ? Uint8Array.from({ length: 256 }, (_, i) => i)
        : bytesOf(Uint16Array.from({ length: 65536 }, (_, i) => i));
    const table = encode(to, decode(from, every));
    tables.set(`${from} ${to}`, table);
    return table;
  };

  return {
    convert: (x, to) => {
      if (x.dtype === to) return compact(x);
      if (x.dtype === "bf16" && to === "f32") return bf16ToF32(x);
      if (x.dtype === "f32" && to === "bf16") return f32ToBf16(x);
      const [from, width] = [dtypeBytes(x.dtype), dtypeBytes(to)];
      if (from === 2 && width === 2) return lookUp16to16(x, halves(tableOf(x.dtype, to)));
      if (from === 2 && width === 4) return lookUp16to32(x, words(tableOf(x.dtype, to)));
      return encode(to, decode(x.dtype, compact(x)));
    },
    dequantise: (x, blocks, to) =>
      to === "f32" ? dequantiseToF32(x, blocks, bench) : bytesOf(dequantiseTo16(x, blocks, to, bench)),
    scaleOf: (x, to) => scaleOf(x, to, bench),
    quantise: (x, blocks, to) => {
      const out = new Uint8Array(x.rows * x.columns);
      eachBlock(x, blocks, (r0, r1, c0, c1, scale) => {
        // a table pays when enough elements are looked up in it
        if (x.dtype === "bf16" && (r1 - r0) * (c1 - c0) >= 2048) {
          fillCodes(bench, scale, to);
          lookUpCodes(halves(x.bytes), x.stride, r0, r1, c0, c1, bench.codes, out, x.columns);
        } else if (to === "e4m3") quantiseE4m3(x, r0, r1, c0, c1, scale, out, bench);
        else quantiseI8(x, r0, r1, c0, c1, scale, out);
      });
      return out;
    },
  };
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

const lookUp16to16 = (x: Region, table: Uint16Array): Uint8Array => {
  const source = halves(x.bytes);
  const out = new Uint16Array(x.rows * x.columns);
  for (let r = 0, at = 0; r < x.rows; r++)
    for (let i = r * x.stride, end = i + x.columns; i < end; i++) out[at++] = table[source[i] as number] as number;
  return bytesOf(out);
};

const lookUp16to32 = (x: Region, table: Uint32Array): Uint8Array => {
  const source = halves(x.bytes);
  const out = new Uint32Array(x.rows * x.columns);
  for (let r = 0, at = 0; r < x.rows; r++)
    for (let i = r * x.stride, end = i + x.columns; i < end; i++) out[at++] = table[source[i] as number] as number;
  return bytesOf(out);
};

const bf16ToF32 = (x: Region): Uint8Array => {
  const source = halves(x.bytes);
  const out = new Int32Array(x.rows * x.columns);
  for (let r = 0, at = 0; r < x.rows; r++)
    for (let i = r * x.stride, end = i + x.columns; i < end; i++) out[at++] = (source[i] as number) << 16;
  return new Uint8Array(out.buffer);
};

/** Round to nearest even by adding to the bits; a NaN becomes the quiet one. */
const f32ToBf16 = (x: Region): Uint8Array => {
  const source = new Int32Array(x.bytes.buffer, x.bytes.byteOffset, x.bytes.length >>> 2);
  const out = new Uint16Array(x.rows * x.columns);
  for (let r = 0, at = 0; r < x.rows; r++)
    for (let i = r * x.stride, end = i + x.columns; i < end; i++) {
      const bits = source[i] as number;
      out[at++] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
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

const dequantiseToF32 = (x: Region, blocks: Blocks, { e4m3 }: Bench): Uint8Array => {
  const out = new Float32Array(x.rows * x.columns);
  const source = x.bytes;
  eachBlock(x, blocks, (r0, r1, c0, c1, scale) => {
    for (let r = r0; r < r1; r++) {
      const from = r * x.stride;
      const at = r * x.columns;
      for (let c = c0; c < c1; c++) out[at + c] = (e4m3[source[from + c] as number] as number) * scale;
    }
  });
  return bytesOf(out);
};

/** To a float of 16 bits, through a table of the 256 codes of each block: rounded once, from the exact product. */
const dequantiseTo16 = (x: Region, blocks: Blocks, to: DType, bench: Bench): Uint16Array => {
  if (to !== "bf16" && to !== "f16") throw new Error(`a dequantised weight cannot be ${to}`);
  const out = new Uint16Array(x.rows * x.columns);
  const table = new Uint16Array(256);
  const source = x.bytes;
  eachBlock(x, blocks, (r0, r1, c0, c1, scale) => {
    if (to === "bf16") fillProducts(table, scale, bench);
    else for (let code = 0; code < 256; code++) table[code] = floatCode(to, (bench.e4m3[code] as number) * scale);
    for (let r = r0; r < r1; r++) {
      const from = r * x.stride;
      const at = r * x.columns;
      for (let c = c0; c < c1; c++) out[at + c] = table[source[from + c] as number] as number;
    }
  });
  return out;
};

/** bf16 of every e4m3 code times a scale. The product is exact in double; f32 on the way would round it a second time at a tie. */
const fillProducts = (table: Uint16Array, scale: number, { word, bits, e4m3 }: Bench): void => {
  for (let code = 0; code < 256; code++) {
    const product = (e4m3[code] as number) * scale;
    word[0] = product;
    let b = bits[0] as number;
    const rounded = word[0] as number;
    if ((b & 0xffff) === 0x8000 && product !== rounded) b += Math.abs(product) > Math.abs(rounded) ? 1 : -1;
    table[code] = Number.isNaN(product) ? 0x7fc0 : (b + 0x7fff + ((b >>> 16) & 1)) >>> 16;
  }
};

/** Bits of the largest magnitude of a block of bf16 or f32: magnitudes are ordered as their bits are. */
const amaxBits = (x: Region, r0: number, r1: number, c0: number, c1: number): number =>
  x.dtype === "bf16"
    ? amaxBits16(halves(x.bytes), x.stride, r0, r1, c0, c1)
    : amaxBits32(words(x.bytes), x.stride, r0, r1, c0, c1);

const amaxBits16 = (source: Uint16Array, stride: number, r0: number, r1: number, c0: number, c1: number): number => {
  let largest = 0;
  for (let r = r0; r < r1; r++)
    for (let i = r * stride + c0, end = r * stride + c1; i < end; i++) {
      const bits = (source[i] as number) & 0x7fff;
      if (bits > largest) largest = bits;
    }
  return largest;
};

const amaxBits32 = (source: Uint32Array, stride: number, r0: number, r1: number, c0: number, c1: number): number => {
  let largest = 0;
  for (let r = r0; r < r1; r++)
    for (let i = r * stride + c0, end = r * stride + c1; i < end; i++) {
      const bits = (source[i] as number) & 0x7fffffff;
      if (bits > largest) largest = bits;
    }
  return largest;
};

const scaleOf = (x: Region, to: CodeType, { word, bits }: Bench): number => {
  const largest = amaxBits(x, 0, x.rows, 0, x.columns) * (x.dtype === "bf16" ? 65536 : 1);
  if (largest >= 0x7f800000) return Number.NaN;
  bits[0] = largest;
  const scale = Math.fround((word[0] as number) / largestCode[to]);
  return scale === 0 ? 1 : scale;
};

/**
 * Codes of all bf16 values under a scale: the code of a magnitude grows with it, so the table is at most 128 runs, whose borders are
 * guessed from the middle between two codes' values and then settled by the formula itself.
 */
const fillCodes = ({ word, bits, codes, middles }: Bench, scale: number, to: CodeType): void => {
  const middle = middles[to];
  const negative = to === "e4m3" ? 0x80 : 0;
  const sign = to === "e4m3" ? 1 : -1;
  const infinity = 0x7f80;
  let from = 0;
  for (let code = 0; code < middle.length && from < infinity; code++) {
    const border = middle[code] as number;
    word[0] = border * scale;
    let end = Math.min(infinity, (bits[0] as number) >>> 16);
    // up to the first magnitude whose quotient is above the middle; at the middle, the even code wins
    for (; end > from; end--) {
      bits[0] = (end - 1) << 16;
      const q = Math.fround((word[0] as number) / scale);
      if (q < border || (q === border && code % 2 === 0)) break;
    }
    for (end = Math.max(end, from); end < infinity; end++) {
      bits[0] = end << 16;
      const q = Math.fround((word[0] as number) / scale);
      if (q > border || (q === border && code % 2 === 1)) break;
    }
    fillRun(codes, from, end, code, negative + sign * code);
    from = end;
  }
  fillRun(codes, from, infinity, middle.length, negative + sign * middle.length);
};

const fillRun = (codes: Uint8Array, from: number, end: number, code: number, opposite: number): void => {
  if (end - from > 256) {
    codes.fill(code, from, end);
    codes.fill(opposite, from + 0x8000, end + 0x8000);
    return;
  }
  for (let m = from; m < end; m++) {
    codes[m] = code;
    codes[m + 0x8000] = opposite;
  }
};

const lookUpCodes = (
  source: Uint16Array,
  stride: number,
  r0: number,
  r1: number,
  c0: number,
  c1: number,
  codes: Uint8Array,
  out: Uint8Array,
  columns: number,
): void => {
  for (let r = r0; r < r1; r++) {
    const from = r * stride;
    const at = r * columns;
    for (let c = c0; c < c1; c++) out[at + c] = codes[source[from + c] as number] as number;
  }
};

/** Elements [c0, c1) of a row as f32, from either dtype. */
const rowFloats = (x: Region, r: number, c0: number, c1: number, into: Float32Array): Float32Array => {
  const from = r * x.stride;
  if (x.dtype === "f32") return floats(x.bytes).subarray(from + c0, from + c1);
  const source = halves(x.bytes);
  const bits = new Int32Array(into.buffer);
  for (let c = c0; c < c1; c++) bits[c - c0] = (source[from + c] as number) << 16;
  return into;
};

/** Adding it to a number below 2^51 leaves no bits after the point, and the processor rounds to nearest even. */
const integerMagic = 1.5 * 2 ** 52;

const quantiseE4m3 = (
  x: Region,
  r0: number,
  r1: number,
  c0: number,
  c1: number,
  scale: number,
  out: Uint8Array,
  { word, bits }: Bench,
): void => {
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
          : Math.abs(word[0] as number) * 512 + integerMagic - integerMagic;
      out[at + c] = (b >>> 31) * 128 + code;
    }
  }
};

const quantiseI8 = (x: Region, r0: number, r1: number, c0: number, c1: number, scale: number, out: Uint8Array): void => {
  const scratch = new Float32Array(x.dtype === "f32" ? 0 : c1 - c0);
  for (let r = r0; r < r1; r++) {
    const row = rowFloats(x, r, c0, c1, scratch);
    const at = r * x.columns + c0;
    for (let c = 0; c < row.length; c++) {
      const n = Math.fround((row[c] as number) / scale) + integerMagic - integerMagic;
      out[at + c] = Math.max(-128, Math.min(127, n));
    }
  }
};

/** The same as `Converter.quantise` for one value, as slowly and plainly as the formula: for `readWeight` and tests. */
export const quantisedValue = (x: number, scale: number, to: CodeType): number =>
  roundTo(to, Math.fround(Math.fround(x) / scale));
