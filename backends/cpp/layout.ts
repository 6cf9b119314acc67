/**
 * How weights of contractions lie in memory: panels of 16 output columns (16 rows of the weight), as panels.h reads them.
 *
 * A matrix [N, K] is ceil(N/16) panels; a panel is a run of cells, each for 16 columns and 1 (f32) or 2 (others) values of k. Absent rows
 * and values of k are zero. With scales whose groups have an odd number of k, each group starts a new cell.
 *
 * - `f32`: cell = 16 floats. f16 and e5m2 weights are stored as the floats they are.
 * - `bf16`: cell = 16 pairs (k, k+1), the order matrix units take.
 * - `e4m3`, `i8`: cell = 16 codes of k, then 16 of k+1.
 */
import { decode } from "../../ir/round.ts";
import { type DType, dtypeBytes } from "../../ir/type.ts";
import type { Layout, Tile } from "../backend.ts";

export const panelColumns = 16;

/** Cells of one kind of panel: element type in memory and in panels.h, values of k, bytes. */
export interface Cell {
  readonly element: DType;
  readonly panel: string;
  readonly step: number;
  readonly bytes: number;
}

const f32Cell: Cell = { element: "f32", panel: "f32_panel", step: 1, bytes: 64 };

/** The cells that hold weights of a dtype; undefined for those no contraction takes. */
export const cellOf = (dtype: DType): Cell | undefined => {
  switch (dtype) {
    case "f32":
    case "f16":
    case "e5m2":
      return f32Cell;
    case "bf16":
      return { element: "bf16", panel: "bf16_panel", step: 2, bytes: 64 };
    case "e4m3":
      return { element: "e4m3", panel: "e4m3_panel", step: 2, bytes: 32 };
    case "i8":
      return { element: "i8", panel: "i8_panel", step: 2, bytes: 32 };
    default:
      return undefined;
  }
};

/** Cells of a panel over K values in groups of `group`, each of which starts a new cell. */
export const cellsOf = (columns: number, group: number, step: number): number =>
  Math.floor(columns / group) * Math.ceil(group / step) + Math.ceil((columns % group) / step);

/** The layout of a weight [N, K] of `dtype` whose scales, if it has any, each cover `group` values of k. */
export const panels = (dtype: DType, group: number = Number.POSITIVE_INFINITY): Layout => {
  const cell = cellOf(dtype);
  if (!cell) throw new Error(`no panels for ${dtype}`);
  const odd = Number.isFinite(group) && group % cell.step !== 0;
  const groupOf = (columns: number): number => (odd && group < columns ? group : columns);
  const bytes = (rows: number, columns: number): number =>
    Math.ceil(rows / panelColumns) * cellsOf(columns, groupOf(columns), cell.step) * cell.bytes;
  const asFloats = cell.element === dtype ? undefined : new Float32Array(decode(dtype, allCodes(dtype)));
  return {
    name: `panels16_${cell.element}${odd ? `_by${group}` : ""}`,
    rowBlock: panelColumns,
    bytes,
    pack: (tile, into) => {
      const size = bytes(tile.rows, tile.columns);
      const out = into?.subarray(0, size) ?? new Uint8Array(size);
      // only whole panels without gaps fill all of it
      if (into && (tile.rows % panelColumns !== 0 || tile.columns % cell.step !== 0 || groupOf(tile.columns) !== tile.columns))
        out.fill(0);
      const source = asFloats ? widened(tile, asFloats) : tile.bytes;
      const panelBytes = bytes(panelColumns, tile.columns);
      for (let row = 0; row < tile.rows; row += panelColumns) {
        const rows = Math.min(panelColumns, tile.rows - row);
        const rowBytes = tile.columns * dtypeBytes(cell.element);
        const from = source.subarray(row * rowBytes, (row + rows) * rowBytes);
        packPanel(cell, from, rows, tile.columns, groupOf(tile.columns), out.subarray((row / panelColumns) * panelBytes));
      }
      return out;
    },
  };
};

/** Every code of a one- or two-byte float, in order. */
const allCodes = (dtype: DType): Uint8Array =>
  dtypeBytes(dtype) === 1
    ? Uint8Array.from({ length: 256 }, (_, i) => i)
    : new Uint8Array(Uint16Array.from({ length: 65536 }, (_, i) => i).buffer);

/** The bytes where typed arrays can see them: they may start anywhere in a buffer. */
const aligned = (bytes: Uint8Array, width: number): Uint8Array => (bytes.byteOffset % width === 0 ? bytes : bytes.slice());
const words = (bytes: Uint8Array): Uint32Array => {
  const at = aligned(bytes, 4);
  return new Uint32Array(at.buffer, at.byteOffset, at.byteLength >> 2);
};
const halves = (bytes: Uint8Array): Uint16Array => {
  const at = aligned(bytes, 2);
  return new Uint16Array(at.buffer, at.byteOffset, at.byteLength >> 1);
};

const widened = (tile: Tile, table: Float32Array): Uint8Array => {
  const codes = dtypeBytes(tile.dtype) === 1 ? tile.bytes : halves(tile.bytes);
  const out = new Float32Array(tile.rows * tile.columns);
  for (let i = 0; i < out.length; i++) out[i] = table[codes[i] as number] as number;
  return new Uint8Array(out.buffer);
};

/** One panel: up to 16 rows of the weight. `out` starts at a multiple of 32 bytes and is zero. */
const packPanel = (cell: Cell, from: Uint8Array, rows: number, columns: number, group: number, out: Uint8Array): void => {
  if (cell.element === "f32") {
    packWords(words(from), rows, columns, words(out));
    return;
  }
  // a pair of bf16 is moved as one word, four rows of four codes as a 4 x 4 matrix of bytes
  if (cell.element === "bf16" && columns % 2 === 0 && group === columns) {
    packWords(words(from), rows, columns / 2, words(out));
    return;
  }
  if (cell.bytes === 32 && columns % 4 === 0 && group === columns && rows === panelColumns) {
    packCodes(words(from), columns / 4, words(out));
    return;
  }
  const source = cell.element === "bf16" ? halves(from) : from;
  const target = cell.element === "bf16" ? halves(out) : out;
  const [perRow, perSlot] = cell.element === "bf16" ? [cell.step, 1] : [1, panelColumns];
  const cellElements = cell.step * panelColumns;
  for (let k = 0; k < columns; k++) {
    const inGroup = k % group;
    const index = Math.floor(k / group) * Math.ceil(group / cell.step) + Math.floor(inGroup / cell.step);
    const at = index * cellElements + (inGroup % cell.step) * perSlot;
    for (let r = 0; r < rows; r++) target[at + r * perRow] = source[r * columns + k] as number;
  }
};

/** `out[j][r] = from[r][j]`, 16 r to each j; four rows at a time, since more streams at once are slower to read */
const packWords = (from: Uint32Array, rows: number, width: number, out: Uint32Array): void => {
  const fours = rows - (rows % 4);
  for (let r = 0; r < fours; r += 4) {
    const [a, b, c, d] = [r * width, (r + 1) * width, (r + 2) * width, (r + 3) * width];
    for (let j = 0, at = r; j < width; j++, at += panelColumns) {
      out[at] = from[a + j] as number;
      out[at + 1] = from[b + j] as number;
      out[at + 2] = from[c + j] as number;
      out[at + 3] = from[d + j] as number;
    }
  }
  for (let r = fours; r < rows; r++)
    for (let j = 0, at = r; j < width; j++, at += panelColumns) out[at] = from[r * width + j] as number;
};

/** Bytes: out[k][r] = from[r][k], 16 r to each k; `width` words of four k in a row of `from`. */
const packCodes = (from: Uint32Array, width: number, out: Uint32Array): void => {
  for (let j = 0; j < width; j++)
    for (let q = 0; q < 4; q++) {
      const a = from[q * 4 * width + j] as number;
      const b = from[(q * 4 + 1) * width + j] as number;
      const c = from[(q * 4 + 2) * width + j] as number;
      const d = from[(q * 4 + 3) * width + j] as number;
      const at = j * 16 + q;
      out[at] = (a & 0xff) | ((b & 0xff) << 8) | ((c & 0xff) << 16) | (d << 24);
      out[at + 4] = ((a >>> 8) & 0xff) | (b & 0xff00) | ((c & 0xff00) << 8) | ((d & 0xff00) << 16);
      out[at + 8] = ((a >>> 16) & 0xff) | ((b >>> 8) & 0xff00) | (c & 0xff0000) | ((d & 0xff0000) << 8);
      out[at + 12] = (a >>> 24) | ((b >>> 16) & 0xff00) | ((c >>> 8) & 0xff0000) | (d & 0xff000000);
    }
};
