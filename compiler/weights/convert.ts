/**
 * Conversion and quantisation of weights, over typed arrays: the fast spelling of what `readWeight` (weights.ts) says slowly.
 * A rounding of a value of 16 bits or less is a table look-up; quantisation is vector code (simd.ts), and what is left over of a row is
 * done one by one.
 */
import { decode, encode, floatCode, floatValue, roundTo } from "../../ir/round.ts";
import { type DType, dtypeBytes } from "../../ir/type.ts";
import { createSimd, type Simd } from "./simd.ts";

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

/**
 * Conversions of one conversion run, with the memory and the tables that they use. Elements and codes that they give are in memory of the
 * converter, valid until the next call, or are the region's own.
 */
export interface Converter {
  /** `windows` bytes that quantisation reads fastest, for the caller to divide */
  readonly windows: { readonly buffer: SharedArrayBuffer; readonly from: number };
  /** elements rounded to `to`, row-major without gaps; a region that is that already is returned as it is */
  convert(x: Region, to: DType): Uint8Array;
  /** e4m3 codes times block scales, rounded once to `to` */
  dequantise(x: Region, blocks: Blocks, to: DType): Uint8Array;
  /**
   * For each run of `columns` columns of a region of bf16 or f32, the scale f32(amax / 448) or f32(amax / 127), 1 where that is 0. NaN where
   * the block holds a value that is not finite.
   */
  scales(x: Region, columns: number, to: CodeType): Float32Array;
  /** to(f32(x / scale)) of every element; x is bf16 or f32, and finite */
  quantise(x: Region, blocks: Blocks, to: CodeType): Uint8Array;
}

/** Scratch and tables of one run. */
interface Bench {
  readonly simd: Simd;
  readonly memory: Uint8Array;
  /** a float and its bits */
  readonly word: Float32Array;
  readonly bits: Uint32Array;
  /** values of the e4m3 codes */
  readonly e4m3: Float64Array;
  /** where elements and codes go; two, since codes are made of elements */
  readonly elements: Room;
  readonly codes: Room;
}

/** So many bytes, the same ones each time. */
type Room = (bytes: number) => ArrayBuffer;

/** Fresh memory for every result costs more than the conversion: the system gives it page by page. */
const createRoom = (): Room => {
  let memory = new ArrayBuffer(0);
  return (bytes) => {
    if (memory.byteLength < bytes) memory = new ArrayBuffer(bytes);
    return memory;
  };
};

/** Scratch in the vector module's memory: a vector of results, a band of codes, and a band of elements that lie elsewhere. */
const scratch = { result: 0, codes: 64, codesEnd: 64 + (8 << 20), elements: 64 + (8 << 20), end: 64 + (24 << 20) } as const;

const halves = (bytes: Uint8Array): Uint16Array => new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.length >>> 1);
const words = (bytes: Uint8Array): Uint32Array => new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.length >>> 2);
const signedWords = (bytes: Uint8Array): Int32Array => new Int32Array(bytes.buffer, bytes.byteOffset, bytes.length >>> 2);
const floats = (bytes: Uint8Array): Float32Array => new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length >>> 2);
const halvesIn = (room: Room, { rows, columns }: Region): Uint16Array => {
  const count = rows * columns;
  return new Uint16Array(room(2 * count), 0, count);
};
const wordsIn = (room: Room, { rows, columns }: Region): Uint32Array => {
  const count = rows * columns;
  return new Uint32Array(room(4 * count), 0, count);
};
const bytesOf = (array: Uint16Array | Uint32Array | Float32Array): Uint8Array =>
  new Uint8Array(array.buffer, array.byteOffset, array.byteLength);

/** A converter with `windows` bytes for the caller. */
export const createConverter = (windows = 0): Converter => {
  const tables = new Map<string, Uint8Array>();
  const word = new Float32Array(1);
  const simd = createSimd(scratch.end + windows);
  const bench: Bench = {
    simd,
    memory: new Uint8Array(simd.memory),
    word,
    bits: new Uint32Array(word.buffer),
    e4m3: Float64Array.from({ length: 256 }, (_, code) => floatValue("e4m3", code)),
    elements: createRoom(),
    codes: createRoom(),
  };
  const { elements } = bench;

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
    windows: { buffer: simd.memory, from: scratch.end },
    convert: (x, to) => {
      if (x.dtype === to) return compact(x, elements);
      if (x.dtype === "bf16" && to === "f32") return bf16ToF32(x, elements);
      if (x.dtype === "f32" && to === "bf16") return f32ToBf16(x, elements);
      const [from, width] = [dtypeBytes(x.dtype), dtypeBytes(to)];
      if (from === 2 && width === 2) return lookUp16to16(x, halves(tableOf(x.dtype, to)), elements);
      if (from === 2 && width === 4) return lookUp16to32(x, words(tableOf(x.dtype, to)), elements);
      return encode(to, decode(x.dtype, compact(x, elements)));
    },
    dequantise: (x, blocks, to) =>
      to === "f32" ? dequantiseToF32(x, blocks, bench) : bytesOf(dequantiseTo16(x, blocks, to, bench)),
    scales: (x, columns, to) => scalesOf(x, columns, to, bench),
    quantise: (x, blocks, to) => quantise(x, blocks, to, bench),
  };
};

/** The elements without gaps. */
const compact = (x: Region, room: Room): Uint8Array => {
  const width = dtypeBytes(x.dtype);
  const [run, step] = [x.columns * width, x.stride * width];
  if (run === step || x.rows === 1) return x.bytes.subarray(0, x.rows * run);
  const out = new Uint8Array(room(x.rows * run), 0, x.rows * run);
  for (let r = 0; r < x.rows; r++) out.set(x.bytes.subarray(r * step, r * step + run), r * run);
  return out;
};

const lookUp16to16 = (x: Region, table: Uint16Array, room: Room): Uint8Array => {
  const source = halves(x.bytes);
  const out = halvesIn(room, x);
  for (let r = 0, at = 0; r < x.rows; r++)
    for (let i = r * x.stride, end = i + x.columns; i < end; i++) out[at++] = table[source[i] as number] as number;
  return bytesOf(out);
};

const lookUp16to32 = (x: Region, table: Uint32Array, room: Room): Uint8Array => {
  const source = halves(x.bytes);
  const out = wordsIn(room, x);
  for (let r = 0, at = 0; r < x.rows; r++)
    for (let i = r * x.stride, end = i + x.columns; i < end; i++) out[at++] = table[source[i] as number] as number;
  return bytesOf(out);
};

const bf16ToF32 = (x: Region, room: Room): Uint8Array => {
  const source = halves(x.bytes);
  const out = wordsIn(room, x);
  for (let r = 0, at = 0; r < x.rows; r++)
    for (let i = r * x.stride, end = i + x.columns; i < end; i++) out[at++] = (source[i] as number) << 16;
  return bytesOf(out);
};

/** Round to nearest even by adding to the bits; a NaN becomes the quiet one. */
const f32ToBf16 = (x: Region, room: Room): Uint8Array => {
  const source = signedWords(x.bytes);
  const out = halvesIn(room, x);
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

const dequantiseToF32 = (x: Region, blocks: Blocks, { e4m3, elements }: Bench): Uint8Array => {
  const count = x.rows * x.columns;
  const out = new Float32Array(elements(4 * count), 0, count);
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
  const out = halvesIn(bench.elements, x);
  const outWords = new Int32Array(out.buffer, 0, out.length >>> 1);
  const table = new Uint16Array(256);
  const source = x.bytes;
  const aligned = source.byteOffset % 4 === 0 && x.stride % 4 === 0 && x.columns % 2 === 0;
  eachBlock(x, blocks, (r0, r1, c0, c1, scale) => {
    if (to === "bf16") fillProducts(table, scale, bench);
    else for (let code = 0; code < 256; code++) table[code] = floatCode(to, (bench.e4m3[code] as number) * scale);
    if (aligned && c0 % 4 === 0 && c1 % 4 === 0) {
      lookUpProducts(signedWords(source), x.stride >>> 2, r0, r1, c0 >>> 2, c1 >>> 2, table, outWords, x.columns >>> 1);
      return;
    }
    for (let r = r0; r < r1; r++) {
      const from = r * x.stride;
      const at = r * x.columns;
      for (let c = c0; c < c1; c++) out[at + c] = table[source[from + c] as number] as number;
    }
  });
  return out;
};

/** Four codes at a time; `stride`, `c0` and `c1` count words of four codes, `columns` words of two results. */
const lookUpProducts = (
  source: Int32Array,
  stride: number,
  r0: number,
  r1: number,
  c0: number,
  c1: number,
  table: Uint16Array,
  out: Int32Array,
  columns: number,
): void => {
  for (let r = r0; r < r1; r++) {
    let at = r * columns + 2 * c0;
    for (let i = r * stride + c0, end = r * stride + c1; i < end; i++) {
      const four = source[i] as number;
      out[at++] = (table[four & 0xff] as number) | ((table[(four >>> 8) & 0xff] as number) << 16);
      out[at++] = (table[(four >>> 16) & 0xff] as number) | ((table[four >>> 24] as number) << 16);
    }
  }
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

/** A region that the vector module can see: where its first element is. */
interface Placed {
  readonly dtype: "bf16" | "f32";
  readonly address: number;
  readonly step: number;
}

/** Rows [r0, r1) of a region in the module's memory, copied there when they lie elsewhere; undefined when they do not fit. */
const place = (x: Region, r0: number, r1: number, { memory }: Bench): Placed | undefined => {
  if (x.dtype !== "bf16" && x.dtype !== "f32") throw new Error(`${x.dtype} is quantised by way of f32`);
  const { dtype } = x;
  const width = dtypeBytes(dtype);
  const step = x.stride * width;
  if (x.bytes.buffer === memory.buffer) return { dtype, address: x.bytes.byteOffset + r0 * step, step };
  const length = (r1 - r0 - 1) * step + x.columns * width;
  if (scratch.elements + length > scratch.end) return undefined;
  memory.set(x.bytes.subarray(r0 * step, r0 * step + length), scratch.elements);
  return { dtype, address: scratch.elements, step };
};

/** Elements that vectors take at a time. */
const lanes = 16;

const scalesOf = (x: Region, columns: number, to: CodeType, bench: Bench): Float32Array => {
  const placed = place(x, 0, x.rows, bench);
  return Float32Array.from({ length: Math.ceil(x.columns / columns) }, (_, i) => {
    const [c0, c1] = [i * columns, Math.min(x.columns, (i + 1) * columns)];
    const whole = placed ? c0 + Math.floor((c1 - c0) / lanes) * lanes : c0;
    let largest = scalarAmax(x, whole, c1);
    if (placed && whole > c0) largest = Math.max(largest, vectorAmax(placed, x.rows, c0, whole, bench));
    if (largest >= 0x7f800000) return Number.NaN;
    bench.bits[0] = largest;
    const scale = Math.fround((bench.word[0] as number) / largestCode[to]);
    return scale === 0 ? 1 : scale;
  });
};

/** f32 bits of the largest magnitude in columns [c0, c1): magnitudes are ordered as their bits are. */
const vectorAmax = ({ dtype, address, step }: Placed, rows: number, c0: number, c1: number, { simd, memory }: Bench): number => {
  simd.amax(dtype, address + c0 * dtypeBytes(dtype), step, rows, c1 - c0, scratch.result);
  if (dtype === "f32") return new Uint32Array(memory.buffer, scratch.result, 4).reduce((a, b) => Math.max(a, b), 0);
  return new Uint16Array(memory.buffer, scratch.result, 8).reduce((a, b) => Math.max(a, b), 0) * 65536;
};

const scalarAmax = (x: Region, c0: number, c1: number): number => {
  let largest = 0;
  for (let r = 0; r < x.rows && c0 < c1; r++) {
    const row = rowFloats(x, r, c0, c1);
    const bits = new Uint32Array(row.buffer, row.byteOffset, row.length);
    for (let c = 0; c < bits.length; c++) largest = Math.max(largest, (bits[c] as number) & 0x7fffffff);
  }
  return largest;
};

const quantise = (x: Region, blocks: Blocks, to: CodeType, bench: Bench): Uint8Array => {
  const count = x.rows * x.columns;
  const out = new Uint8Array(bench.codes(count), 0, count);
  const { simd, memory } = bench;
  let band = { from: -1, placed: undefined as Placed | undefined };
  eachBlock(x, blocks, (r0, r1, c0, c1, scale) => {
    const codes = (r1 - r0) * x.columns;
    if (band.from !== r0)
      band = { from: r0, placed: codes > scratch.codesEnd - scratch.codes ? undefined : place(x, r0, r1, bench) };
    const { placed } = band;
    const whole = placed ? c0 + Math.floor((c1 - c0) / lanes) * lanes : c0;
    if (placed && whole > c0) {
      const { dtype, address, step } = placed;
      const source = address + c0 * dtypeBytes(dtype);
      simd.quantise(dtype, to, source, step, scratch.codes + c0, x.columns, r1 - r0, whole - c0, scale);
    }
    if (whole < c1)
      scalarQuantise(
        x,
        r0,
        r1,
        whole,
        c1,
        scale,
        to,
        placed ? memory.subarray(scratch.codes) : out.subarray(r0 * x.columns),
        bench,
      );
    if (placed && c1 === x.columns) out.set(memory.subarray(scratch.codes, scratch.codes + codes), r0 * x.columns);
  });
  return out;
};

/** Adding it to a number below 2^51 leaves no bits after the point, and the processor rounds to nearest even. */
const integerMagic = 1.5 * 2 ** 52;

/** Columns [c0, c1) of rows [r0, r1), one element at a time; `out` begins with row r0. */
const scalarQuantise = (
  x: Region,
  r0: number,
  r1: number,
  c0: number,
  c1: number,
  scale: number,
  to: CodeType,
  out: Uint8Array,
  { word, bits }: Bench,
): void => {
  for (let r = r0; r < r1; r++) {
    const row = rowFloats(x, r, c0, c1);
    const at = (r - r0) * x.columns + c0;
    for (let c = 0; c < row.length; c++) {
      word[0] = (row[c] as number) / scale;
      const q = word[0] as number;
      if (to === "i8") {
        out[at + c] = Math.max(-128, Math.min(127, q + integerMagic - integerMagic));
        continue;
      }
      const b = bits[0] as number;
      const magnitude = b & 0x7fffffff;
      // from 2^-6 on codes are normal: 3 bits of significand stay; below, multiples of 2^-9
      const code =
        magnitude >= 0x3c800000
          ? Math.min(0x7e, ((magnitude + 0x7ffff + ((magnitude >>> 20) & 1)) >>> 20) - 960)
          : Math.abs(q) * 512 + integerMagic - integerMagic;
      out[at + c] = (b >>> 31) * 128 + code;
    }
  }
};

/** Elements [c0, c1) of a row as f32, from either dtype. */
const rowFloats = (x: Region, r: number, c0: number, c1: number): Float32Array => {
  const from = r * x.stride;
  if (x.dtype === "f32") return floats(x.bytes).subarray(from + c0, from + c1);
  const source = halves(x.bytes);
  const bits = new Int32Array(c1 - c0);
  for (let c = c0; c < c1; c++) bits[c - c0] = (source[from + c] as number) << 16;
  return new Float32Array(bits.buffer);
};

/** The same as `Converter.quantise` for one value, as slowly and plainly as the formula: for `readWeight` and tests. */
export const quantisedValue = (x: number, scale: number, to: CodeType): number =>
  roundTo(to, Math.fround(Math.fround(x) / scale));
