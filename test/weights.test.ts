import { createHash } from "node:crypto";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { crc32 } from "node:zlib";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import type { Layout } from "../backends/backend.ts";
import { type Checkpoint, openCheckpoint } from "../compiler/frontends/checkpoint.ts";
import { readSafetensors, type StoredDType, writeSafetensors } from "../compiler/frontends/safetensors.ts";
import { createConverter, largestCode, quantisedValue } from "../compiler/weights/convert.ts";
import { createHasher, type HashName } from "../compiler/weights/hash.ts";
import { inverseFrequencies, ropeRows } from "../compiler/weights/rope.ts";
import { type PlacedWeight, packedBytes, readWeight, seededSource, type WeightsPlan, writeWeights } from "../compiler/weights.ts";
import type { Slice, StoredSource, Weight, WeightSource } from "../ir/graph.ts";
import { decode, encode, floatCode, floatValue } from "../ir/round.ts";
import { type DType, dtypeBytes, tensor } from "../ir/type.ts";
import { random } from "./checkpoint.ts";

let directory = "";
let checkpoint: Checkpoint;

/** Values of many magnitudes, with zeros, ties and a block of zeros among them. */
const values = (count: number, seed: number): Float64Array => {
  const draw = random(seed);
  return Float64Array.from({ length: count }, (_, i) => {
    if (draw() < 0.05 || (i >= 64 && i < 96)) return draw() < 0.5 ? 0 : -0;
    return (draw() - 0.5) * 2 ** Math.floor(draw() * 24 - 16);
  });
};

const irOf: Readonly<Record<string, DType>> = { BF16: "bf16", F16: "f16", F32: "f32", F8_E4M3: "e4m3" };

const stored = (name: string, dtype: StoredDType, shape: readonly number[], seed: number) => {
  const count = shape.reduce((n, d) => n * d, 1);
  const scaled = name.includes("scale") ? values(count, seed).map((v) => Math.abs(v) + 0.01) : values(count, seed);
  return { name, dtype, shape, data: [encode(irOf[dtype] as DType, scaled)] };
};

beforeAll(() => {
  directory = mkdtempSync(join(tmpdir(), "weights-"));
  writeSafetensors(join(directory, "model.safetensors"), [
    stored("bf", "BF16", [37, 50], 1),
    stored("half", "F16", [37, 50], 2),
    stored("single", "F32", [37, 50], 3),
    stored("experts", "BF16", [5, 19, 33], 4),
    stored("vector", "BF16", [70], 5),
    stored("codes", "F8_E4M3", [3, 37, 50], 6),
    stored("codes_scale", "F32", [3, 5, 7], 7),
    stored("wide", "BF16", [130, 300], 8),
    stored("even", "BF16", [64, 512], 10),
    stored("even_codes", "F8_E4M3", [2, 64, 512], 11),
    stored("even_codes_scale", "F32", [2, 4, 8], 12),
    stored("unused", "F32", [3, 3], 9),
  ]);
  checkpoint = openCheckpoint(directory);
});
afterAll(() => {
  checkpoint.close();
  rmSync(directory, { recursive: true });
});

/** Rows in groups of `rowBlock`, columns first within a group: needs whole groups, as kernels' panels do. */
const panels = (rowBlock: number): Layout => ({
  name: `panel${rowBlock}`,
  rowBlock,
  bytes: (rows, columns, dtype) => rows * columns * dtypeBytes(dtype),
  pack: ({ bytes, dtype, rows, columns }) => {
    const width = dtypeBytes(dtype);
    const out = new Uint8Array(bytes.length);
    let at = 0;
    for (let r = 0; r < rows; r += rowBlock)
      for (let c = 0; c < columns; c++)
        for (let i = r; i < Math.min(rows, r + rowBlock); i++, at += width)
          out.set(bytes.subarray((i * columns + c) * width, (i * columns + c + 1) * width), at);
    return out;
  },
});

const unpacked = (bytes: Uint8Array, rows: number, columns: number, width: number, rowBlock: number): Uint8Array => {
  const out = new Uint8Array(rows * columns * width);
  let at = 0;
  for (let r = 0; r < rows; r += rowBlock)
    for (let c = 0; c < columns; c++)
      for (let i = r; i < Math.min(rows, r + rowBlock); i++, at += width)
        out.set(bytes.subarray(at, at + width), (i * columns + c) * width);
  return out;
};

const sliced = (shape: readonly number[], slice?: Slice): number[] => (slice ? slice.map(([a, b]) => b - a) : [...shape]);
const blocked = (shape: readonly number[], block: readonly [number, number]): number[] =>
  shape.map((d, i) => Math.ceil(d / (i === shape.length - 1 ? block[1] : i === shape.length - 2 ? block[0] : 1)));

const weight = (name: string, dtype: DType, shape: readonly number[], source: WeightSource): Weight => ({
  value: { name, type: tensor(dtype, shape) },
  source,
});

/** Weights of every kind, dtype and slice. */
const cases = (): Weight[] => {
  const all: Weight[] = [];
  const add = (dtype: DType, shape: readonly number[], source: WeightSource): void =>
    void all.push(weight(`w${all.length}`, dtype, shape, source));
  const matrix: Slice = [
    [3, 30],
    [7, 41],
  ];
  const stack: Slice = [
    [1, 3],
    [5, 37],
    [0, 50],
  ];
  for (const name of ["bf", "half", "single"])
    for (const dtype of ["bf16", "f16", "f32"] as const)
      for (const slice of [undefined, matrix])
        add(dtype, sliced([37, 50], slice), { kind: "tensor", tensor: name, ...(slice ? { slice } : {}) });
  add("bf16", [2, 19, 33], {
    kind: "tensor",
    tensor: "experts",
    slice: [
      [2, 4],
      [0, 19],
      [0, 33],
    ],
  });
  add("f32", [5, 4, 33], {
    kind: "tensor",
    tensor: "experts",
    slice: [
      [0, 5],
      [15, 19],
      [0, 33],
    ],
  });
  add("bf16", [70], { kind: "tensor", tensor: "vector" });
  add("f32", [9], { kind: "tensor", tensor: "vector", slice: [[60, 69]] });
  add("e4m3", [3, 37, 50], { kind: "tensor", tensor: "codes" });
  const dequantised = { kind: "dequantised", tensor: "codes", scales: "codes_scale", block: [8, 8] } as const;
  for (const dtype of ["bf16", "f32", "f16"] as const)
    for (const slice of [undefined, stack])
      add(dtype, sliced([3, 37, 50], slice), { ...dequantised, ...(slice ? { slice } : {}) });
  const quantised = (
    of: WeightSource,
    shape: readonly number[],
    to: DType,
    block: readonly [number, number],
    cut: (s: number[]) => Slice | undefined,
  ) => {
    for (const kind of ["codes", "scales"] as const) {
      const whole = kind === "codes" ? [...shape] : blocked(shape, block);
      const slice = cut(whole);
      add(kind === "codes" ? to : "f32", sliced(whole, slice), { kind, of, to, block, ...(slice ? { slice } : {}) });
    }
  };
  const whole = (): undefined => undefined;
  const middle = (s: number[]): Slice => s.map((d) => (d > 2 ? [1, d - 1] : [0, d]));
  for (const to of ["e4m3", "i8"] as const)
    for (const cut of [whole, middle]) {
      for (const name of ["bf", "half", "single"]) quantised({ kind: "tensor", tensor: name }, [37, 50], to, [8, 16], cut);
      quantised({ kind: "tensor", tensor: "bf", slice: matrix }, [27, 34], to, [8, 16], cut);
      quantised({ kind: "tensor", tensor: "experts" }, [5, 19, 33], to, [8, 8], cut);
      quantised(
        {
          kind: "tensor",
          tensor: "experts",
          slice: [
            [1, 4],
            [2, 18],
            [0, 33],
          ],
        },
        [3, 16, 33],
        to,
        [1, 33],
        cut,
      );
      quantised(dequantised, [3, 37, 50], to, [16, 16], cut);
      quantised({ kind: "tensor", tensor: "wide" }, [130, 300], to, [128, 128], cut);
      quantised({ kind: "tensor", tensor: "wide" }, [130, 300], to, [1, 300], cut);
    }
  const evenly = { kind: "dequantised", tensor: "even_codes", scales: "even_codes_scale", block: [16, 64] } as const;
  add("bf16", [2, 64, 512], evenly);
  add("bf16", [1, 30, 256], {
    ...evenly,
    slice: [
      [1, 2],
      [3, 33],
      [128, 384],
    ],
  });
  for (const cut of [
    whole,
    (s: number[]): Slice => [
      [0, s[0] as number],
      [0, (s[1] as number) / 2],
    ],
  ])
    for (const to of ["e4m3", "i8"] as const)
      for (const block of [
        [32, 64],
        [1, 512],
      ] as const) {
        if (block[0] === 1 && cut !== whole) continue;
        quantised({ kind: "tensor", tensor: "even" }, [64, 512], to, block, cut);
      }
  const rows: Slice = [
    [3, 30],
    [0, 50],
  ];
  const [bf, single] = ["bf", "single"].map((tensor): StoredSource => ({ kind: "tensor", tensor })) as [
    StoredSource,
    StoredSource,
  ];
  for (const dtype of ["bf16", "f32"] as const) {
    add(dtype, [3, 37, 50], { kind: "stacked", of: [bf, single, bf] });
    add(dtype, [2, 27, 50], { kind: "stacked", of: [single, bf].map((s) => ({ ...s, slice: rows })) });
  }
  add("bf16", [2, 64, 512], {
    kind: "stacked",
    of: [
      { kind: "tensor", tensor: "even" },
      { kind: "tensor", tensor: "even" },
    ],
  });
  for (const to of ["e4m3", "i8"] as const)
    for (const kind of ["codes", "scales"] as const) {
      const of = [single, bf].map((of): StoredSource => ({ kind, of, to, block: [8, 16] }));
      add(kind === "codes" ? to : "f32", kind === "codes" ? [2, 37, 50] : [2, 5, 4], { kind: "stacked", of });
    }
  add("f32", [40, 16], { kind: "rope", theta: 10000, positions: 40, dim: 16 });
  add("bf16", [2, 3], { kind: "literal", values: [1, -2, 3.1, 4, 5e-9, -0] });
  return all;
};

const plan = (path: string, weights: readonly Weight[], layout?: Layout): WeightsPlan => {
  let offset = 0;
  const placed = weights.map((w): PlacedWeight => {
    const bytes = Math.ceil(packedBytes(w.value.type, layout) / 64) * 64;
    const here = { weight: w, offset, bytes, ...(layout ? { layout } : {}) };
    offset += bytes;
    return here;
  });
  return { path, weights: placed };
};

const checkFile = (written: WeightsPlan, rowBlock: number): void => {
  const file = readSafetensors(written.path);
  const bytes = readFileSync(written.path);
  for (const { weight: w } of written.weights) {
    const entry = file.tensors.find((t) => t.name === w.value.name);
    if (!entry) throw new Error(`${w.value.name} is not in the file`);
    expect(entry.offset % 64).toBe(0);
    const { dtype, shape } = w.value.type;
    const [rows, columns] = [(shape.at(-2) ?? 1) as number, shape.at(-1) as number];
    const size = rows * columns * dtypeBytes(dtype);
    const expected = encode(dtype, readWeight(checkpoint, w).data);
    for (let m = 0; m * size < expected.length; m++) {
      const packed = bytes.subarray(entry.offset + m * size, entry.offset + (m + 1) * size);
      const got = rowBlock === 1 ? packed : unpacked(packed, rows, columns, dtypeBytes(dtype), rowBlock);
      const want = expected.subarray(m * size, (m + 1) * size);
      if (Buffer.compare(got, want) !== 0) {
        const at = got.findIndex((b, i) => b !== want[i]);
        throw new Error(
          `${w.value.name} ${dtype} ${JSON.stringify(w.source)}: matrix ${m} differs at byte ${at} of ${got.length}: ${[...got].map((b, i) => (b === want[i] ? -1 : i)).filter((i) => i >= 0).length} bytes, last ${got.findLastIndex((b, i) => b !== want[i])}, file ${entry.offset + m * size + at}: ${got[at]} for ${want[at]}`,
        );
      }
    }
  }
};

describe("streamed weights", () => {
  test.each([
    [1, 32 << 20],
    [1, 500],
    [4, 32 << 20],
    [4, 700],
    [16, 3000],
    [7, 100],
  ])("equal the plain formulas: row blocks of %i, windows of %i bytes", async (rowBlock, window) => {
    const layout = rowBlock === 1 ? undefined : panels(rowBlock);
    const written = plan(join(directory, "out.safetensors"), cases(), layout);
    const seen: number[] = [];
    const { files } = await writeWeights(checkpoint, [written], { window, progress: (done, total) => seen.push(done / total) });
    checkFile(written, rowBlock);
    expect(files[0]?.digest).toBe(createHash("sha256").update(readFileSync(written.path)).digest("hex"));
    expect(files[0]?.bytes).toBe(readFileSync(written.path).length);
    expect(seen.at(-1)).toBe(1);
  });

  test("several ranks from one reading, in other orders, and the source's identity with and without them", async () => {
    const all = cases();
    const plans = [
      plan(join(directory, "a.safetensors"), all.slice(0, 30)),
      plan(join(directory, "b.safetensors"), all.slice(20).reverse(), panels(4)),
      plan(
        join(directory, "c.safetensors"),
        all.filter((_, i) => i % 3 === 0),
      ),
    ];
    const configuration = { hidden: 3, eos: [1] };
    const { files, source } = await writeWeights(checkpoint, plans, { configuration, window: 900, digest: "blake2b512" });
    plans.forEach((p, i) => {
      checkFile(p, i === 1 ? 4 : 1);
      expect(files[i]?.digest).toBe(createHash("blake2b512").update(readFileSync(p.path)).digest("hex"));
    });
    expect(source).toMatch(/^[0-9a-f]{64}$/);
    expect((await writeWeights(checkpoint, [], { configuration })).source).toBe(source);
    expect((await writeWeights(checkpoint, [], { configuration: { ...configuration, hidden: 4 } })).source).not.toBe(source);
    expect(await seededSource(configuration, 1)).not.toBe(await seededSource(configuration, 2));
  });

  test("a value that is not finite is refused where it would be quantised, and kept where not", async () => {
    const bad = mkdtempSync(join(tmpdir(), "weights-"));
    const data = values(64 * 40, 3);
    data[1000] = Number.NaN;
    writeSafetensors(join(bad, "model.safetensors"), [
      { name: "w", dtype: "BF16", shape: [64, 40], data: [encode("bf16", data)] },
    ]);
    const broken = openCheckpoint(bad);
    const of: WeightSource = { kind: "tensor", tensor: "w" };
    const codes = weight("w", "e4m3", [64, 40], { kind: "codes", of, to: "e4m3", block: [8, 8] });
    await expect(writeWeights(broken, [plan(join(bad, "o"), [codes])])).rejects.toThrow(
      /model\.safetensors: tensor 'w' has a value that is not finite in rows 24 to 31; /,
    );
    await writeWeights(broken, [plan(join(bad, "o"), [weight("w", "f32", [64, 40], of)])]);
    broken.close();
    rmSync(bad, { recursive: true });
  });

  test("a checkpoint that shrinks while it is read, and a disk that cannot be written, are errors with the file's name", async () => {
    const shrunk = mkdtempSync(join(tmpdir(), "weights-"));
    const path = join(shrunk, "model.safetensors");
    writeSafetensors(path, [{ name: "w", dtype: "BF16", shape: [64, 40], data: [new Uint8Array(64 * 40 * 2)] }]);
    const opened = openCheckpoint(shrunk);
    writeFileSync(path, readFileSync(path).subarray(0, 1000));
    const w = weight("w", "bf16", [64, 40], { kind: "tensor", tensor: "w" });
    await expect(writeWeights(opened, [plan(join(shrunk, "o"), [w])])).rejects.toThrow(
      /model\.safetensors: the file ended inside tensor 'w'/,
    );
    opened.close();
    await expect(writeWeights(undefined, [plan(join(shrunk, "no", "o"), [])])).rejects.toThrow(
      /no\/o: cannot be written \(ENOENT\)/,
    );
    if (process.platform === "linux") {
      const rope = weight("rope", "f32", [4096, 256], { kind: "rope", theta: 10000, positions: 4096, dim: 256 });
      await expect(writeWeights(undefined, [plan("/dev/full", [rope])])).rejects.toThrow(
        /\/dev\/full: cannot be written \(ENOSPC\)/,
      );
    }
    rmSync(shrunk, { recursive: true });
  });
});

describe("digests", () => {
  test("the same however the stream is cut; of a checkpoint, other for every changed byte and place", async () => {
    const draw = random(8);
    const bytes = Uint8Array.from({ length: 300_000 }, () => Math.floor(draw() * 256));
    const hasher = createHasher();
    const digest = async (name: string, algorithm: HashName, data: Uint8Array, cut: () => number): Promise<string> => {
      for (let at = 0; at < data.length; ) {
        const length = Math.min(cut(), data.length - at);
        await hasher.update(name, algorithm, data.subarray(at, at + length));
        at += length;
      }
      return hasher.digest(name, algorithm);
    };
    const pieces = createHash("sha256");
    for (let at = 0; at < bytes.length; at += 65536) {
      const word = Buffer.alloc(4);
      word.writeUInt32LE(crc32(bytes.subarray(at, at + 65536)));
      pieces.update(word);
    }
    expect(await digest("whole", "pieces", bytes, () => bytes.length)).toBe(pieces.digest("hex"));
    const whole = await digest("whole", "pieces", bytes, () => bytes.length);
    expect(await digest("cut", "pieces", bytes, () => 1 + Math.floor(draw() * 99_000))).toBe(whole);
    for (const at of [0, 65535, 65536, 299_999]) {
      const changed = bytes.slice();
      changed[at] = (changed[at] as number) ^ 4;
      expect(await digest("changed", "pieces", changed, () => 70_000)).not.toBe(whole);
    }
    const swapped = new Uint8Array(bytes);
    swapped.copyWithin(0, 65536, 131072);
    expect(await digest("swapped", "pieces", swapped, () => 70_000)).not.toBe(whole);
    for (const algorithm of ["sha256", "blake2b512"] as const)
      expect(await digest("known", algorithm, bytes, () => 1000)).toBe(createHash(algorithm).update(bytes).digest("hex"));
    await hasher.close();
  });
});

describe("conversion", () => {
  /** every bf16 value against scales that make ties, saturation and underflow */
  test.each(["e4m3", "i8"] as const)("%s codes of every finite bf16 value, by vectors and one by one", (to) => {
    for (const scale of [1, 0.25, 1.37e-3, 3.3e33, 1e-40, 2 ** -126]) {
      // quotients may be beyond the largest code by any amount: codes saturate
      const most = Number.POSITIVE_INFINITY;
      const bits = Uint16Array.from({ length: 65536 }, (_, i) => i).filter(
        (b) => (b & 0x7fff) < 0x7f80 && Math.abs(floatValue("bf16", b)) <= most,
      );
      const bytes = new Uint8Array(bits.buffer, 0, bits.length * 2);
      const wide = new Uint8Array(Float32Array.from(bits, (b) => floatValue("bf16", b)).buffer);
      const blocks = { scales: Float32Array.of(scale), across: 1, block: [1, bits.length] as const, firstRow: 0, firstColumn: 0 };
      const region = { rows: 1, columns: bits.length, stride: bits.length };
      const s = blocks.scales[0] as number;
      const want = encode(
        to,
        Float64Array.from(bits, (b) => quantisedValue(floatValue("bf16", b), s, to)),
      );
      const converter = createConverter();
      expect(Buffer.compare(converter.quantise({ ...region, bytes, dtype: "bf16" }, blocks, to), want)).toBe(0);
      expect(Buffer.compare(converter.quantise({ ...region, bytes: wide, dtype: "f32" }, blocks, to), want)).toBe(0);
    }
  });

  test("a block's scale is f32(amax / 448), or 1", () => {
    const converter = createConverter();
    const draw = random(5);
    for (let i = 0; i < 200; i++) {
      const x = Float32Array.from({ length: 40 }, () => (draw() - 0.5) * 2 ** Math.floor(draw() * 280 - 150));
      if (i === 0) x.fill(0);
      const amax = x.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
      const region = { bytes: new Uint8Array(x.buffer), dtype: "f32", rows: 1, columns: 40, stride: 40 } as const;
      for (const to of ["e4m3", "i8"] as const) {
        expect([...converter.scales(region, 40, to)]).toEqual([Math.fround(amax / largestCode[to]) || 1]);
        const halves = [x.subarray(0, 23), x.subarray(23)].map((h) => h.reduce((a, b) => Math.max(a, Math.abs(b)), 0));
        expect([...converter.scales(region, 23, to)]).toEqual(halves.map((a) => Math.fround(a / largestCode[to]) || 1));
      }
    }
  });

  test("f32 to bf16 is rounded as the interpreter rounds", () => {
    const bits = Uint32Array.of(
      0x3f808000,
      0x3f818000,
      0x3f808001,
      0x7f7fffff,
      0x7f800000,
      0x7fc00001,
      0xff800001,
      0x00008000,
      0x80000001,
      1,
    );
    const draw = random(9);
    const words = Uint32Array.from({ length: 20000 }, (_, i) => bits[i] ?? Math.floor(draw() * 2 ** 32));
    const x = {
      bytes: new Uint8Array(words.buffer),
      dtype: "f32",
      rows: 1,
      columns: words.length,
      stride: words.length,
    } as const;
    const got = createConverter().convert(x, "bf16");
    expect(Buffer.compare(got, encode("bf16", decode("f32", x.bytes)))).toBe(0);
  });

  test("a dequantised value is rounded once", () => {
    // 1.0625 * (1 + 2^-5 ...): f32 first would land on a tie of bf16
    const draw = random(3);
    const codes = Uint8Array.from({ length: 256 }, (_, i) => i);
    for (let i = 0; i < 100; i++) {
      const scale = Math.fround(draw() * 2 ** Math.floor(draw() * 40 - 20));
      const blocks = { scales: Float32Array.of(scale), across: 1, block: [1, 256] as const, firstRow: 0, firstColumn: 0 };
      const got = createConverter().dequantise(
        { bytes: codes, dtype: "e4m3", rows: 1, columns: 256, stride: 256 },
        blocks,
        "bf16",
      );
      const want = Uint16Array.from(codes, (c) => floatCode("bf16", floatValue("e4m3", c) * scale));
      expect(Buffer.compare(got, new Uint8Array(want.buffer))).toBe(0);
    }
  });
});

describe("rotary table", () => {
  test.each([
    [500000, 256, 0, 3000],
    [10000, 64, 130000, 131072],
    [500000, 22, 16_000_000, 16_000_500],
  ])("theta %i, %i columns, positions %i to %i: cos and sin of the f32 angle, correctly rounded", (theta, dim, from, to) => {
    const frequencies = inverseFrequencies(theta, dim);
    frequencies.forEach((f, j) => {
      expect(f).toBe(Math.fround(1 / Math.fround(theta ** Math.fround((2 * j) / dim))));
    });
    const table = ropeRows(theta, dim, from, to);
    let different = 0;
    for (let p = from; p < to; p++)
      for (let j = 0; j < dim / 2; j++) {
        const angle = Math.fround(p * (frequencies[j] as number));
        const at = (p - from) * dim + j;
        if (table[at] !== Math.fround(Math.cos(angle))) different++;
        if (table[at + dim / 2] !== Math.fround(Math.sin(angle))) different++;
      }
    expect(different).toBe(0);
  });
});
