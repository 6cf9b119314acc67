/**
 * How weights of contractions lie in memory for matrix units: as contract_hopper.cuh and contract_ampere.cuh copy them to shared memory.
 *
 * A matrix [N, K] is tiles of 128 rows by 128 bytes, tiles along K following each other, then the next 128 rows. A row of a tile is its 128
 * bytes with the eight pieces of 16 bytes exchanged: piece i is at i xor (row mod 8), the 128-byte swizzle of the matrix units. What lies past
 * N or K is zero.
 */
import { type DType, dtypeBytes } from "../../ir/type.ts";
import type { Layout } from "../backend.ts";

export const tileRows = 128;
export const lineBytes = 128;

/** Lines of 128 bytes that hold a row of `columns` elements. */
export const linesOf = (columns: number, dtype: DType): number => Math.ceil((columns * dtypeBytes(dtype)) / lineBytes);

const pieceBytes = 16;

export const tiles: Layout = {
  name: "tiles128x128_swizzled",
  rowBlock: tileRows,
  bytes: (rows, columns, dtype) => Math.ceil(rows / tileRows) * linesOf(columns, dtype) * tileRows * lineBytes,
  pack: ({ bytes, dtype, rows, columns }) => {
    const rowBytes = columns * dtypeBytes(dtype);
    const lines = linesOf(columns, dtype);
    const out = new Uint8Array(Math.ceil(rows / tileRows) * lines * tileRows * lineBytes);
    for (let row = 0; row < rows; row++) {
      const block = Math.floor(row / tileRows) * lines;
      for (let at = 0; at < rowBytes; at += pieceBytes) {
        const line = Math.floor(at / lineBytes);
        const piece = ((at % lineBytes) / pieceBytes) ^ (row % 8);
        const from = row * rowBytes + at;
        const to = ((block + line) * tileRows + (row % tileRows)) * lineBytes + piece * pieceBytes;
        out.set(bytes.subarray(from, from + Math.min(pieceBytes, rowBytes - at)), to);
      }
    }
    return out;
  },
};
