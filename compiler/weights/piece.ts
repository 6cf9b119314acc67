/** One weight while it is made: it takes its part of every window, converts it, packs it and hands it on. */
import { UserError } from "../../ir/error.ts";
import { decode, encode } from "../../ir/round.ts";
import { type DType, dtypeBytes, typeText } from "../../ir/type.ts";
import { dtypeOf, type StoredTensor } from "../frontends/safetensors.ts";
import type { Buffers, Lent } from "./buffers.ts";
import type { Blocks, Converter, Region } from "./convert.ts";
import type { Output } from "./output.ts";
import { asMatrices, numbers, type PlacedWeight } from "./plan.ts";
import type { Quantisation, Recipe } from "./recipe.ts";

/** Elements made at a time: what comes of them is digested and written while the processor's cache still has it. */
const mostElements = 2 << 20;

/** Rows [first, end) of a tensor in memory, counted through its matrices; `bytes` begins at row `first`. */
export interface Window {
  readonly tensor: StoredTensor;
  readonly bytes: Uint8Array;
  readonly first: number;
  readonly end: number;
}

/** A weight that is being made: takes what it can from each window, in order. */
export interface Piece {
  /** makes all rows that the window allows; gives the first row of the tensor that it still needs, infinity when it is done */
  take(window: Window): number;
}

/** Hands bytes on; `lent` is the memory that they are in, where that is to be given back. */
export type Emit = (output: Output, position: number, bytes: Uint8Array, lent?: Lent) => void;

/** Rows of the tensor that must be in one window for a piece to go on. */
export const reachOf = ({ quantise }: Recipe, { layout }: PlacedWeight): number => {
  const rowBlock = layout?.rowBlock ?? 1;
  const band = quantise?.state.block[0] ?? 1;
  return 1 + (quantise?.make === "scales" ? rowBlock * band : rowBlock + 2 * band);
};

export const createPiece = (
  recipe: Recipe,
  placed: PlacedWeight,
  output: Output,
  converter: Converter,
  buffers: Buffers,
  emit: Emit,
): Piece => {
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
        // row-major elements of the window itself are written from there
        const lent =
          layout || bytes.buffer !== window.bytes.buffer
            ? buffers.lend(layout?.bytes(to - row, width, dtype) ?? bytes.length)
            : undefined;
        const packed = layout
          ? layout.pack({ bytes, dtype, rows: to - row, columns: width }, lent?.bytes)
          : (lent?.bytes ?? bytes);
        if (lent && !layout) lent.bytes.set(bytes);
        emit(output, placed.offset + matrix * matrixBytes + written, packed, lent);
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
