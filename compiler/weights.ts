/**
 * Weights on their way from a checkpoint to the weight files of a bundle. Each tensor of the checkpoint is read once, from its first row
 * to its last, in windows of whole rows; every weight that is made of it, on whatever rank, takes its part of each window, converts it,
 * packs it as its kernel wants it and writes it to its place. Memory is a few windows, however large the model is.
 */
import { read as fsRead } from "node:fs";
import { type FileHandle, open } from "node:fs/promises";
import type { Layout } from "../backends/backend.ts";
import { UserError } from "../ir/error.ts";
import type { Slice, Weight, WeightSource } from "../ir/graph.ts";
import { canonicalJson, type Json } from "../ir/json.ts";
import { decode, encode, rounder } from "../ir/round.ts";
import type { Tensor } from "../ir/tensor.ts";
import { type DType, dtypeBytes, type TensorType, typeText } from "../ir/type.ts";
import {
  type Blocks,
  type CodeType,
  type Converter,
  createConverter,
  largestCode,
  quantisedValue,
  type Region,
} from "./convert.ts";
import { type Checkpoint, matrixOf } from "./frontends/checkpoint.ts";
import { dtypeOf, type StoredTensor, safetensorsHeader } from "./frontends/safetensors.ts";
import { createHasher, type Hasher, type HashName } from "./hash.ts";
import { ropeRows } from "./rope.ts";

/** One weight of a rank: where it lies in the data part of the rank's file, and how. `bytes` includes padding. */
export interface PlacedWeight {
  readonly weight: Weight;
  /** absent: row-major */
  readonly layout?: Layout;
  readonly offset: number;
  readonly bytes: number;
}

/** A safetensors file of packed weights, which follow each other without gaps from offset 0. */
export interface WeightsPlan {
  readonly path: string;
  readonly weights: readonly PlacedWeight[];
}

export interface WrittenWeights {
  /** in the order of the plans; `bytes` of the whole file, `digest` in hex */
  readonly files: readonly { readonly path: string; readonly bytes: number; readonly digest: string }[];
  /** identity of the source, where `configuration` was given */
  readonly source?: string;
}

export interface WriteOptions {
  /** hashes the source on the way: its configuration, and every tensor of the checkpoint */
  readonly configuration?: unknown;
  /** digest of the written files */
  readonly digest?: HashName;
  /** bytes to read at a time; more where a block of rows needs it */
  readonly window?: number;
  /** bytes of the checkpoint done and in all */
  readonly progress?: (done: number, total: number) => void;
}

const numbers = (type: TensorType): readonly number[] =>
  type.shape.map((d) => {
    if (typeof d !== "number") throw new Error(`a weight of type ${typeText(type)} has no constant size`);
    return d;
  });

/** Bytes of a weight as it is packed, without padding. */
export const packedBytes = (type: TensorType, layout?: Layout): number => {
  const shape = numbers(type);
  const { rows, matrices, columns } = asMatrices(shape);
  return layout ? matrices * layout.bytes(rows, columns, type.dtype) : matrices * rows * columns * dtypeBytes(type.dtype);
};

/** Whether a weight is computed, so that a bundle without weights still has to contain it. */
export const isConstant = ({ source }: Weight): boolean => source.kind === "rope" || source.kind === "literal";

/** [..., rows, columns] as matrices one after another. */
const asMatrices = (shape: readonly number[]): { matrices: number; rows: number; columns: number } => ({
  matrices: shape.slice(0, -2).reduce((n, d) => n * d, 1),
  rows: shape.at(-2) ?? 1,
  columns: shape.at(-1) ?? 1,
});

// ---- what a weight is made of ------------------------------------------------------------------------------------------------------

/** The part of a stack of matrices that a slice leaves: matrix numbers, and ranges of rows and columns. */
interface Part {
  readonly matrices: readonly number[];
  readonly rows: readonly [number, number];
  readonly columns: readonly [number, number];
}

const partOf = (shape: readonly number[], slice: Slice | undefined): Part => {
  const ranges = shape.map((d, i): readonly [number, number] => {
    const [from, to] = slice?.[i] ?? [0, d];
    if (!(Number.isInteger(from) && Number.isInteger(to) && from >= 0 && from <= to && to <= d))
      throw new Error(`slice [${from},${to}) does not fit axis ${i} of [${shape.join(",")}]`);
    return [from, to];
  });
  if (slice && slice.length !== shape.length)
    throw new Error(`a slice of ${slice.length} axes does not fit [${shape.join(",")}]`);
  let matrices = [0];
  for (let axis = 0; axis < shape.length - 2; axis++) {
    const [from, to] = ranges[axis] as readonly [number, number];
    const size = shape[axis] as number;
    matrices = matrices.flatMap((m) => Array.from({ length: to - from }, (_, i) => m * size + from + i));
  }
  return { matrices, rows: ranges.at(-2) ?? [0, 1], columns: ranges.at(-1) ?? [0, 1] };
};

const slicedShape = (shape: readonly number[], slice: Slice | undefined): readonly number[] =>
  slice ? slice.map(([from, to]) => to - from) : shape;

/** Block scales of a whole tensor, all its matrices. */
interface ScaleTable {
  readonly scales: Float32Array;
  readonly down: number;
  readonly across: number;
  readonly block: readonly [number, number];
}

/** A quantisation of a part of a tensor: its scales, block by block, once they are known. Codes and scales of one weight share it. */
interface Quantisation extends ScaleTable {
  readonly to: CodeType;
  readonly known: Uint8Array;
}

/** How the elements of a weight come from one tensor of the checkpoint. */
interface Recipe {
  readonly tensor: StoredTensor;
  /** what is taken of the tensor before anything else is done to it */
  readonly part: Part;
  readonly dequantise?: ScaleTable;
  readonly quantise?: { readonly make: "codes" | "scales"; readonly state: Quantisation; readonly part: Part };
}

const source = (checkpoint: Checkpoint | undefined, name: string): StoredTensor => {
  const tensor = checkpoint?.tensors.get(name);
  if (!tensor) throw new Error(`the checkpoint has no tensor '${name}', which a weight is made of`);
  return tensor;
};

interface Recipes {
  of(weight: Weight): Recipe | undefined;
}

/** Recipes share the scales that they compute, and the scale tensors that they read. */
const createRecipes = (checkpoint: Checkpoint | undefined): Recipes => {
  const states = new Map<string, Quantisation>();
  const tables = new Map<string, Float32Array>();

  const plain = (s: WeightSource): Recipe | undefined => {
    if (s.kind !== "tensor" && s.kind !== "dequantised") return undefined;
    const tensor = source(checkpoint, s.tensor);
    const part = partOf(tensor.shape, s.slice);
    if (s.kind === "tensor") return { tensor, part };
    const { rows, columns } = asMatrices(tensor.shape);
    const scaleTensor = source(checkpoint, s.scales);
    const scales =
      tables.get(s.scales) ?? Float32Array.from(decode(dtypeOf(scaleTensor.dtype), (checkpoint as Checkpoint).read(scaleTensor)));
    tables.set(s.scales, scales);
    const table = { scales, down: Math.ceil(rows / s.block[0]), across: Math.ceil(columns / s.block[1]), block: s.block };
    return { tensor, part, dequantise: table };
  };

  return {
    of: (weight) => {
      const s = weight.source;
      if (s.kind !== "codes" && s.kind !== "scales") return plain(s);
      const base = plain(s.of);
      if (!base) throw new Error(`${weight.value.name}: cannot quantise a weight of kind '${s.of.kind}'`);
      const to = codeType(s.to);
      const { matrices, rows, columns } = base.part;
      const [height, width] = [rows[1] - rows[0], columns[1] - columns[0]];
      const [down, across] = [Math.ceil(height / s.block[0]), Math.ceil(width / s.block[1])];
      const key = canonicalJson([s.of, to, s.block] as unknown as Json);
      const state = states.get(key) ?? {
        to,
        down,
        across,
        block: s.block,
        scales: new Float32Array(matrices.length * down * across),
        known: new Uint8Array(matrices.length * down),
      };
      states.set(key, state);
      const whole = slicedShape(base.tensor.shape, "slice" in s.of ? s.of.slice : undefined);
      const shape = s.kind === "codes" ? whole : scalesShapeOf(whole, s.block);
      return { ...base, quantise: { make: s.kind, state, part: partOf(shape, s.slice) } };
    },
  };
};

const codeType = (to: DType): CodeType => {
  if (to !== "e4m3" && to !== "i8") throw new Error(`weights are quantised to e4m3 or i8, not ${to}`);
  return to;
};

/** A vector is one row, and its scales are a vector. */
const scalesShapeOf = (shape: readonly number[], block: readonly [number, number]): readonly number[] =>
  shape.map((d, i) => Math.ceil(d / (i === shape.length - 1 ? block[1] : i === shape.length - 2 ? block[0] : 1)));

// ---- the slow way, for the interpreter ---------------------------------------------------------------------------------------------

/**
 * The values of a weight, whole, by the plain formulas: what the interpreter uses and what `writeWeights` must agree with.
 * A dequantised value is code times scale, rounded once; a quantised weight takes f32 values x, scale = f32(amax / 448 or 127), 1 where
 * that is 0, and codes of f32(x / scale).
 */
export const readWeight = (checkpoint: Checkpoint | undefined, weight: Weight): Tensor => {
  const { dtype } = weight.value.type;
  const shape = numbers(weight.value.type);
  const values = valuesOf(checkpoint, weight.source);
  if (values.data.length !== shape.reduce((n, d) => n * d, 1))
    throw new Error(
      `${weight.value.name}: its source has shape [${values.shape.join(",")}], its type is ${typeText(weight.value.type)}`,
    );
  return { kind: "tensor", dtype, shape, data: values.data.map(rounder(dtype)) };
};

interface Values {
  readonly shape: readonly number[];
  readonly data: Float64Array;
}

const valuesOf = (checkpoint: Checkpoint | undefined, s: WeightSource): Values => {
  switch (s.kind) {
    case "literal":
      return { shape: [s.values.length], data: Float64Array.from(s.values) };
    case "rope":
      return { shape: [s.positions, s.dim], data: Float64Array.from(ropeRows(s.theta, s.dim, 0, s.positions)) };
    case "tensor":
      return cut(stored(checkpoint, s.tensor), s.slice);
    case "dequantised": {
      const codes = stored(checkpoint, s.tensor);
      const scales = stored(checkpoint, s.scales);
      const { block } = s;
      const data = codes.data.map((code, i) => code * (scales.data[blockOf(codes.shape, block, i)] as number));
      return cut({ shape: codes.shape, data }, s.slice);
    }
    case "codes":
    case "scales": {
      const to = codeType(s.to);
      const x = valuesOf(checkpoint, s.of);
      const shape = scalesShapeOf(x.shape, s.block);
      const data = new Float64Array(shape.reduce((n, d) => n * d, 1));
      x.data.forEach((value, i) => {
        const b = blockOf(x.shape, s.block, i);
        data[b] = Math.max(data[b] as number, Math.abs(Math.fround(value)));
      });
      const scales = data.map((amax) => {
        const scale = Math.fround(amax / largestCode[to]);
        return scale === 0 ? 1 : scale;
      });
      if (s.kind === "scales") return cut({ shape, data: scales }, s.slice);
      const codes = x.data.map((value, i) => quantisedValue(value, scales[blockOf(x.shape, s.block, i)] as number, to));
      return cut({ shape: x.shape, data: codes }, s.slice);
    }
  }
};

const stored = (checkpoint: Checkpoint | undefined, name: string): Values => {
  const tensor = source(checkpoint, name);
  return { shape: tensor.shape, data: decode(dtypeOf(tensor.dtype), (checkpoint as Checkpoint).read(tensor)) };
};

/** Index, among the block scales of a tensor, of the scale of element i. */
const blockOf = (shape: readonly number[], block: readonly [number, number], i: number): number => {
  const { rows, columns } = asMatrices(shape);
  const [row, column] = [Math.floor(i / columns) % rows, i % columns];
  const [down, across] = [Math.ceil(rows / block[0]), Math.ceil(columns / block[1])];
  return (Math.floor(i / (rows * columns)) * down + Math.floor(row / block[0])) * across + Math.floor(column / block[1]);
};

const cut = (values: Values, slice: Slice | undefined): Values => {
  if (!slice) return values;
  const { rows, columns } = asMatrices(values.shape);
  const part = partOf(values.shape, slice);
  const shape = slicedShape(values.shape, slice);
  const data = new Float64Array(shape.reduce((n, d) => n * d, 1));
  let at = 0;
  for (const m of part.matrices)
    for (let r = part.rows[0]; r < part.rows[1]; r++) {
      const from = (m * rows + r) * columns;
      data.set(values.data.subarray(from + part.columns[0], from + part.columns[1]), at);
      at += part.columns[1] - part.columns[0];
    }
  return { shape, data };
};

// ---- the fast way ------------------------------------------------------------------------------------------------------------------

/** Bytes read at a time unless asked otherwise, and bytes given to the disk and not yet written. */
const windowBytes = 32 << 20;
const mostInFlight = 128 << 20;
/** Elements made at a time. */
const mostElements = 8 << 20;
/** Bytes that a file's digest may lag behind while earlier ones are not there yet. */
const mostDeferred = 64 << 20;
const windowBuffers = 3;

/** Writes packed bytes to their places and digests the file in order. */
interface Output {
  write(position: number, bytes: Uint8Array): Promise<void>;
  finish(): Promise<string>;
  readonly bytes: number;
}

const ioError = (path: string, doing: string, error: unknown): UserError =>
  new UserError(
    `${path}: cannot be ${doing} (${(error as NodeJS.ErrnoException).code ?? String(error)}); check the disk and its free space`,
  );

const createOutput = async (
  plan: WeightsPlan,
  hasher: Hasher,
  algorithm: HashName,
): Promise<Output & { close(): Promise<void> }> => {
  let handle: FileHandle;
  try {
    handle = await open(plan.path, "w+");
  } catch (error) {
    throw ioError(plan.path, "written", error);
  }
  const stream = `file ${plan.path}`;
  interface Hashable {
    readonly bytes: Uint8Array;
    /** when nobody else needs its memory any more */
    readonly free: Promise<void>;
  }
  const waiting = new Map<number, Hashable>();
  let [digested, deferred, late] = [0, 0, false];
  /** the digest's turns follow each other in the file's order */
  let turn: Promise<void> = Promise.resolve();

  const hash = ({ bytes, free }: Hashable): Promise<void> => {
    const before = turn;
    const sent = Promise.all([before, free]).then(() => ({ done: hasher.consume(stream, algorithm, bytes) }));
    turn = sent.then(
      () => {},
      () => {},
    );
    return sent.then(({ done }) => done);
  };
  const digest = async (position: number, piece: Hashable): Promise<void> => {
    if (late) return;
    if (position !== digested) {
      deferred += piece.bytes.length;
      late = deferred > mostDeferred;
      if (late) waiting.clear();
      // the memory of a window is used again before the turn comes
      else if (piece.bytes.buffer instanceof SharedArrayBuffer)
        waiting.set(position, { ...piece, bytes: new Uint8Array(piece.bytes) });
      else waiting.set(position, piece);
      return;
    }
    const done: Promise<void>[] = [];
    for (let next: Hashable | undefined = piece; next; next = waiting.get(digested)) {
      if (waiting.delete(digested)) deferred -= next.bytes.length;
      digested += next.bytes.length;
      done.push(hash(next));
    }
    await Promise.all(done);
  };
  const put = async (position: number, bytes: Uint8Array): Promise<void> => {
    try {
      for (let done = 0; done < bytes.length; )
        done += (await handle.write(bytes, done, bytes.length - done, position + done)).bytesWritten;
    } catch (error) {
      throw ioError(plan.path, "written", error);
    }
  };
  const both = async (position: number, bytes: Uint8Array): Promise<void> => {
    if (bytes.length === 0) return;
    const free = put(position, bytes);
    await Promise.all([digest(position, { bytes, free }), free]);
  };

  const header = headerOf(plan);
  const start = header.length;
  const total = start + plan.weights.reduce((n, w) => n + w.bytes, 0);
  await both(0, header);
  return {
    bytes: total,
    write: (position, bytes) => both(start + position, bytes),
    finish: async () => {
      if (!late && digested === total) return hasher.digest(stream, algorithm);
      // pieces came too far out of order: read the file again, from its beginning
      const again = `${stream} again`;
      const buffer = new Uint8Array(new SharedArrayBuffer(8 << 20));
      for (let at = 0; at < total; ) {
        const { bytesRead } = await handle.read(buffer, 0, buffer.length, at);
        if (bytesRead === 0) throw new Error(`${plan.path}: ${total - at} bytes were never written`);
        await hasher.update(again, algorithm, buffer.subarray(0, bytesRead));
        at += bytesRead;
      }
      return hasher.digest(again, algorithm);
    },
    close: () => handle.close(),
  };
};

/** Tensors are U8 of the packed bytes; the metadata says what each was. */
const headerOf = (plan: WeightsPlan): Uint8Array => {
  let end = 0;
  for (const w of plan.weights) {
    const needed = packedBytes(w.weight.value.type, w.layout);
    if (w.offset !== end || w.bytes < needed)
      throw new Error(`${plan.path}: ${w.weight.value.name} has ${w.bytes} bytes at ${w.offset}; it needs ${needed} at ${end}`);
    end += w.bytes;
  }
  const about = plan.weights.map((w): readonly [string, string] => {
    const { dtype, shape } = w.weight.value.type;
    return [w.weight.value.name, JSON.stringify({ dtype, shape, layout: w.layout?.name ?? "rows" })];
  });
  return safetensorsHeader(
    plan.weights.map((w) => ({ name: w.weight.value.name, dtype: "U8", shape: [w.bytes] })),
    new Map(about),
  );
};

/** Rows [first, end) of a tensor in memory, counted through its matrices; `bytes` begins at row `first`. */
interface Window {
  readonly tensor: StoredTensor;
  readonly bytes: Uint8Array;
  readonly first: number;
  readonly end: number;
}

/** A weight that is being made: takes what it can from each window, in order. */
interface Piece {
  /** makes all rows that the window allows; gives the first row of the tensor that it still needs, infinity when it is done */
  take(window: Window): number;
}

type Emit = (output: Output, position: number, bytes: Uint8Array) => void;

/** Rows of the tensor that must be in one window for a piece to go on. */
const reachOf = ({ quantise }: Recipe, { layout }: PlacedWeight): number => {
  const rowBlock = layout?.rowBlock ?? 1;
  const band = quantise?.state.block[0] ?? 1;
  return 1 + (quantise?.make === "scales" ? rowBlock * band : rowBlock + 2 * band);
};

const createPiece = (recipe: Recipe, placed: PlacedWeight, output: Output, converter: Converter, emit: Emit): Piece => {
  const { tensor, part, quantise } = recipe;
  const { layout } = placed;
  const { dtype } = placed.weight.value.type;
  const stacked = asMatrices(tensor.shape);
  const result = asMatrices(numbers(placed.weight.value.type));
  const outer = quantise ? quantise.part : part;
  const height = outer.rows[1] - outer.rows[0];
  const width = outer.columns[1] - outer.columns[0];
  if (outer.matrices.length * height !== result.matrices * result.rows || width !== result.columns)
    throw new Error(
      `${placed.weight.value.name}: its source gives ${outer.matrices.length} matrices of ${height}x${width}, its type is ${typeText(placed.weight.value.type)}`,
    );
  const rowBlock = layout?.rowBlock ?? 1;
  const matrixBytes = layout ? layout.bytes(height, width, dtype) : height * width * dtypeBytes(dtype);
  /** rows of the part that share a scale, and rows of the part that one row of the result is made of */
  const band = quantise ? quantise.state.block[0] : 1;
  /** the first row of the result, among those of the quantised part */
  const offset = quantise ? quantise.part.rows[0] : 0;
  const scalesOnly = quantise?.make === "scales";

  /** rows to make at a time, so that results on the way to the disk stay small */
  const most = Math.max(rowBlock, Math.floor(mostElements / Math.max(1, width)));

  /** rows of the tensor's matrix that result rows [from, to) need */
  const needs = (from: number, to: number): readonly [number, number] => {
    const partHeight = part.rows[1] - part.rows[0];
    const [a, b] = [offset + from, offset + to];
    const [begin, end] = scalesOnly ? [a * band, b * band] : [Math.floor(a / band) * band, Math.ceil(b / band) * band];
    return [part.rows[0] + begin, part.rows[0] + Math.min(partHeight, end)];
  };

  const region = (
    window: Window,
    matrix: number,
    rows: readonly [number, number],
    columns: readonly [number, number],
  ): Region => {
    const size = dtypeBytes(dtypeOf(tensor.dtype));
    if (matrix * stacked.rows + rows[0] < window.first || matrix * stacked.rows + rows[1] > window.end)
      throw new Error(
        `${tensor.name}: rows ${rows.join(" to ")} of matrix ${matrix} are outside window ${window.first} to ${window.end}`,
      );
    const begin = ((matrix * stacked.rows + rows[0] - window.first) * stacked.columns + columns[0]) * size;
    return {
      bytes: window.bytes.subarray(begin),
      dtype: dtypeOf(tensor.dtype),
      rows: rows[1] - rows[0],
      columns: columns[1] - columns[0],
      stride: stacked.columns,
    };
  };

  /** elements of part rows and columns, dequantised where the recipe says so, as `to` */
  const plain = (
    window: Window,
    matrix: number,
    rows: readonly [number, number],
    columns: readonly [number, number],
    to: DType,
  ): Uint8Array => {
    const x = region(window, matrix, rows, columns);
    const table = recipe.dequantise;
    if (!table) return converter.convert(x, to);
    const perMatrix = table.down * table.across;
    const scales = table.scales.subarray(matrix * perMatrix, (matrix + 1) * perMatrix);
    return converter.dequantise(x, { ...table, scales, firstRow: rows[0], firstColumn: columns[0] }, to);
  };

  /** the region as bf16 or f32, what the quantisation reads */
  const wide = (window: Window, matrix: number, rows: readonly [number, number], columns: readonly [number, number]): Region => {
    const x = region(window, matrix, rows, columns);
    if (!recipe.dequantise && (x.dtype === "bf16" || x.dtype === "f32")) return x;
    return {
      bytes: plain(window, matrix, rows, columns, "f32"),
      dtype: "f32",
      rows: x.rows,
      columns: x.columns,
      stride: x.columns,
    };
  };

  /** computes the scales of bands [from, to) of a matrix of the part, those that are not known yet */
  const learn = (state: Quantisation, window: Window, index: number, from: number, to: number): void => {
    const matrix = part.matrices[index] as number;
    for (let b = from; b < to; b++) {
      if (state.known[index * state.down + b] === 1) continue;
      const rows = [part.rows[0] + b * band, Math.min(part.rows[1], part.rows[0] + (b + 1) * band)] as const;
      const x = wide(window, matrix, rows, part.columns);
      const scales = converter.scales(x, state.block[1], state.to);
      if (scales.some(Number.isNaN))
        throw new UserError(
          `${tensor.file}: tensor '${tensor.name}' has a value that is not finite in rows ${rows[0]} to ${rows[1] - 1}${stacked.matrices > 1 ? ` of matrix ${matrix}` : ""}; the checkpoint is damaged, or use --precision bf16`,
        );
      state.scales.set(scales, (index * state.down + b) * state.across);
      state.known[index * state.down + b] = 1;
    }
  };

  /** result rows [from, to) of the k-th matrix, row-major in the weight's dtype */
  const make = (window: Window, k: number, from: number, to: number): Uint8Array => {
    const index = outer.matrices[k] as number;
    if (!quantise) {
      const rows = [part.rows[0] + from, part.rows[0] + to] as const;
      return plain(window, index, rows, part.columns, dtype);
    }
    const { state } = quantise;
    const matrix = part.matrices[index] as number;
    const [a, b] = [offset + from, offset + to];
    learn(state, window, index, scalesOnly ? a : Math.floor(a / band), scalesOnly ? b : Math.ceil(b / band));
    const perMatrix = state.down * state.across;
    const scales = state.scales.subarray(index * perMatrix, (index + 1) * perMatrix);
    const columns = outer.columns;
    if (scalesOnly) {
      const bytes = new Uint8Array(scales.buffer, scales.byteOffset + (a * state.across + columns[0]) * 4);
      return converter.convert({ bytes, dtype: "f32", rows: b - a, columns: width, stride: state.across }, dtype).slice();
    }
    const x = wide(
      window,
      matrix,
      [part.rows[0] + a, part.rows[0] + b],
      [part.columns[0] + columns[0], part.columns[0] + columns[1]],
    );
    const blocks: Blocks = { ...state, scales, firstRow: a, firstColumn: columns[0] };
    const codes = converter.quantise(x, blocks, state.to);
    return dtype === state.to ? codes : encode(dtype, decode(state.to, codes));
  };

  let [matrix, row, written] = [0, 0, 0];
  const tensorMatrix = (k: number): number => part.matrices[quantise ? (outer.matrices[k] as number) : k] as number;

  return {
    take: (window) => {
      while (matrix < outer.matrices.length) {
        const base = tensorMatrix(matrix) * stacked.rows;
        const available = window.end - base;
        // as many rows as the window has whole bands for, in whole row blocks but for the last
        const bands = Math.floor((available - part.rows[0]) / band);
        const possible = available >= part.rows[1] ? height : Math.min(height, (scalesOnly ? bands : bands * band) - offset);
        const end = Math.min(possible, row + most);
        const to = end === height ? height : row + Math.floor((end - row) / rowBlock) * rowBlock;
        if (to <= row) return base + needs(row, row + 1)[0];
        const bytes = make(window, matrix, row, to);
        const packed = layout ? layout.pack({ bytes, dtype, rows: to - row, columns: width }) : bytes;
        emit(output, placed.offset + matrix * matrixBytes + written, packed);
        written += packed.length;
        row = to;
        if (row < height) continue;
        if (written !== matrixBytes)
          throw new Error(
            `layout '${layout?.name}' packed ${written} bytes of ${placed.weight.value.name} where it said ${matrixBytes}`,
          );
        [row, written] = [0, 0];
        matrix++;
      }
      return Number.POSITIVE_INFINITY;
    },
  };
};

/**
 * Writes weight files, reading each tensor once. The files appear under the paths given while they are written; the caller puts the
 * finished bundle in place. Throws a UserError when the checkpoint cannot be read or holds values that cannot be quantised.
 */
export const writeWeights = async (
  checkpoint: Checkpoint | undefined,
  plans: readonly WeightsPlan[],
  options: WriteOptions = {},
): Promise<WrittenWeights> => {
  const hasher = createHasher();
  const outputs: Awaited<ReturnType<typeof createOutput>>[] = [];
  try {
    for (const plan of plans) outputs.push(await createOutput(plan, hasher, options.digest ?? "sha256"));
    const digests = await convertAll(checkpoint, plans, outputs, hasher, options);
    const files = await Promise.all(
      outputs.map(async (output, i) => ({
        path: (plans[i] as WeightsPlan).path,
        bytes: output.bytes,
        digest: await output.finish(),
      })),
    );
    if (options.configuration === undefined) return { files };
    return { files, source: await sourceHash(hasher, options.configuration, checkpoint, digests) };
  } finally {
    await Promise.allSettled([...outputs.map((o) => o.close()), hasher.close()]);
  }
};

/** The identity of a source without weights: its configuration and the seed that stands for them. SHA-256, hex. */
export const seededSource = async (configuration: unknown, seed: number): Promise<string> => {
  const hasher = createHasher();
  try {
    return await textHash(hasher, canonicalJson({ configuration, seed } as Json));
  } finally {
    await hasher.close();
  }
};

/** SHA-256 over the canonical JSON of configuration and tensors, each with its name, dtype, shape and the `pieces` digest of its bytes. */
const sourceHash = (
  hasher: Hasher,
  configuration: unknown,
  checkpoint: Checkpoint | undefined,
  digests: ReadonlyMap<string, string>,
): Promise<string> => {
  const tensors = [...(checkpoint?.tensors.values() ?? [])]
    .map(({ name, dtype, shape }) => ({ name, dtype, shape, bytes: digests.get(name) }))
    .sort((a, b) => (a.name < b.name ? -1 : 1));
  return textHash(hasher, canonicalJson({ configuration, tensors } as Json));
};

const textHash = async (hasher: Hasher, text: string): Promise<string> => {
  await hasher.update("text", "sha256", new TextEncoder().encode(text));
  return hasher.digest("text", "sha256");
};

/** Rows of a tensor to read next. */
interface Reading {
  readonly tensor: StoredTensor;
  readonly first: number;
  readonly end: number;
  /** bytes of a row, and of the room for rows of the window before that are needed again */
  readonly rowBytes: number;
  readonly room: number;
}

const slotBytesOf = ({ first, end, rowBytes, room }: Reading): number => Math.ceil((room + (end - first) * rowBytes) / 64) * 64;

const convertAll = async (
  checkpoint: Checkpoint | undefined,
  plans: readonly WeightsPlan[],
  outputs: readonly Output[],
  hasher: Hasher,
  { configuration, progress, window: atOnce = windowBytes }: WriteOptions,
): Promise<ReadonlyMap<string, string>> => {
  const recipes = createRecipes(checkpoint);
  const flight = createFlight();
  /** what uses the memory of the window at hand */
  let users: Promise<void>[] = [];
  const emit: Emit = (output, position, bytes) => {
    const written = output.write(position, bytes);
    flight.add(written, bytes.length);
    if (bytes.buffer instanceof SharedArrayBuffer) users.push(written);
  };

  interface Group {
    readonly tensor: StoredTensor;
    readonly parts: { readonly recipe: Recipe; readonly placed: PlacedWeight; readonly output: Output }[];
  }
  const groups = new Map<string, Group>();
  const groupOf = (tensor: StoredTensor): Group => {
    const group = groups.get(tensor.name) ?? { tensor, parts: [] };
    groups.set(tensor.name, group);
    return group;
  };
  const constants: (() => Promise<void>)[] = [];
  for (const [i, plan] of plans.entries())
    for (const placed of plan.weights) {
      const output = outputs[i] as Output;
      const recipe = recipes.of(placed.weight);
      const used = packedBytes(placed.weight.value.type, placed.layout);
      if (placed.bytes > used) emit(output, placed.offset + used, new Uint8Array(placed.bytes - used));
      if (!recipe) constants.push(() => writeConstant(placed, output, emit, flight));
      else if (used > 0) groupOf(recipe.tensor).parts.push({ recipe, placed, output });
    }
  if (configuration !== undefined) for (const tensor of checkpoint?.tensors.values() ?? []) groupOf(tensor);

  const readings = [...groups.values()].flatMap(({ tensor, parts }) =>
    readingsOf(tensor, Math.max(0, ...parts.map((p) => reachOf(p.recipe, p.placed))), atOnce),
  );
  const total = [...groups.values()].reduce((n, g) => n + g.tensor.bytes, 0);
  const slotBytes = Math.max(0, ...readings.map(slotBytesOf));
  const converter = createConverter(windowBuffers * slotBytes);
  const piecesOf = ({ tensor }: Reading): Piece[] =>
    groupOf(tensor).parts.map((p) => createPiece(p.recipe, p.placed, p.output, converter, emit));
  const digests = new Map<string, string>();
  const reader = createReader(checkpoint, converter.windows, slotBytes);
  let done = 0;
  let previous: { readonly window: Window; readonly keep: number } | undefined;
  let pieces: Piece[] = [];
  try {
    for (const write of constants) await write();
    let pending = readings[0] ? reader.read(readings[0]) : undefined;
    for (const [i, reading] of readings.entries()) {
      const fresh = await (pending as ReturnType<typeof reader.read>);
      const next = readings[i + 1];
      const going = previous?.window.tensor === reading.tensor ? previous : undefined;
      if (!going) pieces = piecesOf(reading);
      const window = fresh.withRowsOf(going);
      pending = next ? reader.read(next) : undefined;
      // its failure is met when it is awaited
      pending?.catch(() => {});
      users = [];
      if (configuration !== undefined) users.push(hasher.update(`tensor ${reading.tensor.name}`, "pieces", fresh.bytes));
      let keep = Number.POSITIVE_INFINITY;
      for (const piece of pieces) keep = Math.min(keep, piece.take(window));
      previous = { window, keep };
      if (next?.tensor !== reading.tensor && keep !== Number.POSITIVE_INFINITY)
        throw new Error(`${reading.tensor.name}: a weight still needs row ${keep} after the last one`);
      fresh.release(users);
      await flight.below(mostInFlight);
      if (configuration !== undefined && next?.tensor !== reading.tensor)
        digests.set(reading.tensor.name, await hasher.digest(`tensor ${reading.tensor.name}`, "pieces"));
      done += fresh.bytes.length;
      progress?.(done, total);
    }
    await flight.below(0);
    return digests;
  } finally {
    await flight.settled();
    await reader.settled();
  }
};

/** Windows over all rows of a tensor, of which a weight may need up to `reach` at once. */
const readingsOf = (tensor: StoredTensor, reach: number, atOnce: number): Reading[] => {
  const { rows } = matrixOf(tensor.shape);
  const rowBytes = rows === 0 ? 0 : tensor.bytes / rows;
  const kept = Math.min(rows, reach);
  const step = Math.max(kept, 1, Math.floor(atOnce / Math.max(1, rowBytes)));
  return Array.from({ length: Math.max(1, Math.ceil(rows / step)) }, (_, i) => ({
    tensor,
    first: i * step,
    end: Math.min(rows, (i + 1) * step),
    rowBytes,
    room: i === 0 ? 0 : Math.ceil((kept * rowBytes) / 64) * 64,
  }));
};

/** Work that has begun and not ended, measured in bytes; remembers the first failure. */
const createFlight = (): {
  add(work: Promise<void>, bytes: number): void;
  /** waits until at most so many bytes are left; throws the first failure */
  below(bytes: number): Promise<void>;
  settled(): Promise<void>;
} => {
  const active = new Set<Promise<void>>();
  let [flying, failed, failure] = [0, false, undefined as unknown];
  return {
    add: (work, bytes) => {
      flying += bytes;
      const tracked: Promise<void> = work
        .catch((error: unknown) => {
          if (!failed) failure = error;
          failed = true;
        })
        .then(() => {
          flying -= bytes;
          active.delete(tracked);
        });
      active.add(tracked);
    },
    below: async (bytes) => {
      while (!failed && flying > bytes) await Promise.race(active);
      if (bytes === 0) await Promise.all(active);
      if (failed) throw failure;
    },
    settled: async () => void (await Promise.all(active)),
  };
};

/** Reads windows into a few buffers that are used in turn; each has room before the new rows for rows of the window before. */
const createReader = (
  checkpoint: Checkpoint | undefined,
  { buffer, from }: Converter["windows"],
  slotBytes: number,
): {
  read(reading: Reading): Promise<{
    /** the new rows */
    readonly bytes: Uint8Array;
    withRowsOf(previous: { readonly window: Window; readonly keep: number } | undefined): Window;
    release(users: readonly Promise<void>[]): void;
  }>;
  settled(): Promise<void>;
} => {
  interface Slot {
    readonly at: number;
    users: readonly Promise<void>[];
  }
  const slots = Array.from({ length: windowBuffers }, (_, i): Slot => ({ at: from + i * slotBytes, users: [] }));
  let turn = 0;
  let last: Promise<unknown> = Promise.resolve();
  const read = async (reading: Reading, slot: Slot) => {
    await Promise.allSettled(slot.users);
    const { tensor, first, end, rowBytes, room } = reading;
    const length = (end - first) * rowBytes;
    const bytes = new Uint8Array(buffer, slot.at + room, length);
    await readFully(checkpoint as Checkpoint, tensor, tensor.offset + first * rowBytes, bytes);
    return {
      bytes,
      withRowsOf: (previous: { readonly window: Window; readonly keep: number } | undefined): Window => {
        const kept = previous ? Math.max(0, first - Math.max(previous.keep, previous.window.first)) : 0;
        if (kept * rowBytes > room) throw new Error(`${tensor.name}: ${kept} rows are kept where room is for ${room / rowBytes}`);
        const start = slot.at + room - kept * rowBytes;
        if (previous && kept > 0) {
          const from = (first - kept - previous.window.first) * rowBytes;
          new Uint8Array(buffer, start, kept * rowBytes).set(previous.window.bytes.subarray(from, from + kept * rowBytes));
        }
        return { tensor, first: first - kept, end, bytes: new Uint8Array(buffer, start, kept * rowBytes + length) };
      },
      release: (users: readonly Promise<void>[]): void => {
        slot.users = users;
      },
    };
  };
  return {
    read: (reading) => {
      const result = read(reading, slots[turn++ % windowBuffers] as (typeof slots)[number]);
      last = result;
      return result;
    },
    settled: async () => void (await Promise.allSettled([last])),
  };
};

const readFully = async (checkpoint: Checkpoint, tensor: StoredTensor, position: number, into: Uint8Array): Promise<void> => {
  const descriptor = checkpoint.descriptor(tensor);
  for (let done = 0; done < into.length; ) {
    const got = await new Promise<number>((resolve, reject) => {
      fsRead(descriptor, into, done, into.length - done, position + done, (error, bytes) =>
        error ? reject(ioError(tensor.file, "read", error)) : resolve(bytes),
      );
    });
    if (got === 0)
      throw new UserError(
        `${tensor.file}: the file ended inside tensor '${tensor.name}' while it was read; do not change it meanwhile`,
      );
    done += got;
  }
};

/** Weights that are computed, a few megabytes at a time. */
const writeConstant = async (
  placed: PlacedWeight,
  output: Output,
  emit: Emit,
  flight: ReturnType<typeof createFlight>,
): Promise<void> => {
  const { weight, layout } = placed;
  const { dtype } = weight.value.type;
  const { matrices, rows, columns } = asMatrices(numbers(weight.value.type));
  const s = weight.source;
  if (s.kind === "rope" && (s.positions !== rows * matrices || s.dim !== columns))
    throw new Error(`${weight.value.name}: a rotary table of ${s.positions}x${s.dim} is not ${typeText(weight.value.type)}`);
  if (s.kind === "literal" && s.values.length !== matrices * rows * columns)
    throw new Error(`${weight.value.name}: ${s.values.length} values are not ${typeText(weight.value.type)}`);
  const part = (from: number, to: number): ArrayLike<number> => {
    if (s.kind === "rope") return ropeRows(s.theta, s.dim, from, to);
    if (s.kind === "literal") return s.values.slice(from * columns, to * columns);
    throw new Error(`'${s.kind}' is not a constant`);
  };
  const rowBlock = layout?.rowBlock ?? 1;
  const step = Math.max(1, Math.floor((4 << 20) / Math.max(1, columns * 4 * rowBlock))) * rowBlock;
  let position = placed.offset;
  for (let m = 0; m < matrices; m++)
    for (let r = 0; r < rows; r += step) {
      const end = Math.min(rows, r + step);
      const bytes = encode(dtype, part(m * rows + r, m * rows + end));
      const packed = layout ? layout.pack({ bytes, dtype, rows: end - r, columns }) : bytes;
      emit(output, position, packed);
      position += packed.length;
      await flight.below(mostInFlight);
    }
};
