/**
 * The inner loops of quantisation as a small WebAssembly module, assembled here: JavaScript has no vector instructions, and without them
 * converting a checkpoint is slower than reading it. Every function walks `rows` rows of `count` elements and has a variant for bf16 and for
 * f32 elements:
 *
 *   amax_*(source, step, rows, count, result)                    the largest bits of a magnitude in each lane of 16 bytes, to `result`
 *   e4m3_*, i8_*(source, step, target, step, rows, count, scale)  the codes of f32(x / scale), rounded to nearest even
 *
 * Addresses and steps are bytes in the module's memory; `count` is a multiple of 16. Elements are finite.
 */

/** The memory that the functions see: shared, so that files are read into it and other threads hash it where it lies. */
export interface Simd {
  readonly memory: SharedArrayBuffer;
  amax(dtype: "bf16" | "f32", source: number, step: number, rows: number, count: number, result: number): void;
  quantise(
    dtype: "bf16" | "f32",
    to: "e4m3" | "i8",
    source: number,
    sourceStep: number,
    target: number,
    targetStep: number,
    rows: number,
    count: number,
    scale: number,
  ): void;
}

type Code = readonly number[];

/** LEB128, signed and unsigned. */
const signed = (n: number): Code => (n >= -64 && n < 64 ? [n & 0x7f] : [(n & 0x7f) | 0x80, ...signed(n >> 7)]);
const unsigned = (n: number): Code => (n < 128 ? [n] : [(n & 0x7f) | 0x80, ...unsigned(Math.floor(n / 128))]);
const join = (...parts: readonly Code[]): Code => parts.flat();
const list = (items: readonly Code[]): Code => join(unsigned(items.length), ...items);
const sized = (code: Code): Code => join(unsigned(code.length), code);
const name = (text: string): Code => sized([...new TextEncoder().encode(text)]);
const section = (id: number, code: Code): Code => join([id], sized(code));

const [i32, f32, v128] = [0x7f, 0x7d, 0x7b] as const;
const get = (local: number): Code => [0x20, local];
const set = (local: number): Code => [0x21, local];
const tee = (local: number): Code => [0x22, local];
const number = (n: number): Code => [0x41, ...signed(n)];
const [add, sub, mul, below] = [[0x6a], [0x6b], [0x6c], [0x49]] as const;
/** repeats the body while what it leaves is not 0 */
const loop = (...body: readonly Code[]): Code => [0x03, 0x40, ...join(...body), 0x0d, 0, 0x0b];

const vector = (op: number, ...operands: readonly number[]): Code => [0xfd, ...unsigned(op), ...operands];
const load = (op: number, offset: number): Code => vector(op, 0, ...unsigned(offset));
const store: Code = vector(0x0b, 0, 0);
const words = (n: number): Code =>
  vector(0x0c, ...[0, 1, 2, 3].flatMap(() => [n, n >>> 8, n >>> 16, n >>> 24].map((b) => b & 0xff)));
const v = {
  and: vector(0x4e),
  or: vector(0x50),
  select: vector(0x52),
  splatFloat: vector(0x13),
  atLeast: vector(0x3f),
  max16: vector(0x98),
  max32: vector(0xb8),
  min32: vector(0xb6),
  left: vector(0xab),
  right: vector(0xad),
  add32: vector(0xae),
  sub32: vector(0xb1),
  addFloat: vector(0xe4),
  divFloat: vector(0xe7),
  nearest: vector(0x6a),
  truncate: vector(0xf8),
  narrow32: vector(0x85),
  narrow16: vector(0x65),
  narrow16Unsigned: vector(0x66),
} as const;

interface Source {
  readonly name: "bf16" | "f32";
  readonly bytes: number;
  /** four elements at an address on the stack, `index` elements on, as f32 */
  four(index: number): Code;
  /** magnitudes: the mask of one vector, and the op that takes the larger lanes */
  readonly mask: number;
  readonly max: Code;
}

const sources: readonly Source[] = [
  { name: "bf16", bytes: 2, four: (i) => join(load(0x04, 2 * i), number(16), v.left), mask: 0x7fff7fff, max: v.max16 },
  { name: "f32", bytes: 4, four: (i) => load(0x00, 4 * i), mask: 0x7fffffff, max: v.max32 },
];

interface Routine {
  readonly name: string;
  readonly parameters: Code;
  readonly locals: Code;
  readonly body: Code;
}

const amax = (source: Source): Routine => {
  const [from, step, rows, count, result, at, end, most] = [0, 1, 2, 3, 4, 5, 6, 7] as const;
  const vectors = (16 * source.bytes) / 16;
  const lanes = Array.from({ length: vectors }, (_, i) =>
    join(get(most), get(at), load(0x00, 16 * i), words(source.mask), v.and, source.max, set(most)),
  );
  return {
    name: `amax_${source.name}`,
    parameters: [i32, i32, i32, i32, i32],
    locals: [2, 2, i32, 1, v128],
    body: join(
      loop(
        join(get(from), tee(at), get(count), number(source.bytes), mul, add, set(end)),
        loop(...lanes, get(at), number(16 * source.bytes), add, tee(at), get(end), below),
        join(get(from), get(step), add, set(from)),
        join(get(rows), number(1), sub, tee(rows)),
      ),
      join(get(result), get(most), store),
    ),
  };
};

/** Codes of the quotients in local `q`, one to a word. `m` is free. */
const encoders: Readonly<Record<"e4m3" | "i8", (q: number, m: number) => Code>> = {
  i8: (q) => join(get(q), v.nearest, v.truncate),
  e4m3: (q, m) => {
    const magnitude = join(get(q), words(0x7fffffff), v.and, tee(m));
    const odd = join(get(m), number(20), v.right, words(1), v.and);
    // from 2^-6 on codes are normal: three bits of significand stay, the exponent's bias goes from 127 to 7, and 448 is the largest
    const normal = join(
      magnitude,
      words(0x7ffff),
      v.add32,
      odd,
      v.add32,
      number(20),
      v.right,
      words(960),
      v.sub32,
      words(126),
      v.min32,
    );
    // below, multiples of 2^-9: the last bit of a float from 2^14 on
    const small = join(get(m), words(0x46800000), v.addFloat, words(0x46800000), v.sub32);
    const choose = join(get(m), words(0x3c800000), v.atLeast, v.select);
    return join(normal, small, choose, get(q), number(24), v.right, words(0x80), v.and, v.or);
  },
};

const quantise = (source: Source, to: "e4m3" | "i8"): Routine => {
  const [from, fromStep, target, targetStep, rows, count, scale, at, out, end, divisor, q, m] = [
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
  ] as const;
  const four = (i: number): Code => join(get(at), source.four(4 * i), get(divisor), v.divFloat, set(q), encoders[to](q, m));
  const narrow16 = to === "i8" ? v.narrow16 : v.narrow16Unsigned;
  return {
    name: `${to}_${source.name}`,
    parameters: [i32, i32, i32, i32, i32, i32, f32],
    locals: [2, 3, i32, 3, v128],
    body: join(
      join(get(scale), v.splatFloat, set(divisor)),
      loop(
        join(get(target), set(out)),
        join(get(from), tee(at), get(count), number(source.bytes), mul, add, set(end)),
        loop(
          join(get(out), four(0), four(1), v.narrow32, four(2), four(3), v.narrow32, narrow16, store),
          join(get(out), number(16), add, set(out)),
          join(get(at), number(16 * source.bytes), add, tee(at), get(end), below),
        ),
        join(get(from), get(fromStep), add, set(from)),
        join(get(target), get(targetStep), add, set(target)),
        join(get(rows), number(1), sub, tee(rows)),
      ),
    ),
  };
};

/** The module: its only import is the shared memory of `pages` pages. */
const assemble = (routines: readonly Routine[], pages: number): Uint8Array<ArrayBuffer> =>
  Uint8Array.from(
    join(
      [0, 0x61, 0x73, 0x6d, 1, 0, 0, 0],
      section(1, list(routines.map((r) => join([0x60], sized(r.parameters), [0])))),
      section(2, list([join(name("env"), name("memory"), [2, 3], unsigned(pages), unsigned(pages))])),
      section(3, list(routines.map((_, i) => unsigned(i)))),
      section(7, list(routines.map((r, i) => join(name(r.name), [0], unsigned(i))))),
      section(10, list(routines.map((r) => sized(join(r.locals, r.body, [0x0b]))))),
    ),
  );

const pageBytes = 65536;

/** What is used of the standard interface, whose types come only with those of browsers. */
declare const WebAssembly: {
  readonly Memory: new (limits: { initial: number; maximum: number; shared: true }) => { readonly buffer: SharedArrayBuffer };
  readonly Module: new (bytes: Uint8Array<ArrayBuffer>) => object;
  readonly Instance: new (module: object, imports: object) => { readonly exports: Readonly<Record<string, unknown>> };
};

/** A module with a memory of at least so many bytes. */
export const createSimd = (bytes: number): Simd => {
  const pages = Math.max(1, Math.ceil(bytes / pageBytes));
  const memory = new WebAssembly.Memory({ initial: pages, maximum: pages, shared: true });
  const routines = sources.flatMap((s) => [amax(s), quantise(s, "e4m3"), quantise(s, "i8")]);
  const module = new WebAssembly.Module(assemble(routines, pages));
  const { exports } = new WebAssembly.Instance(module, { env: { memory } });
  const run = exports as Readonly<Record<string, (...values: number[]) => void>>;
  return {
    memory: memory.buffer,
    amax: (dtype, source, step, rows, count, result) => run[`amax_${dtype}`]?.(source, step, rows, count, result),
    quantise: (dtype, to, source, sourceStep, target, targetStep, rows, count, scale) =>
      run[`${to}_${dtype}`]?.(source, sourceStep, target, targetStep, rows, count, scale),
  };
};
