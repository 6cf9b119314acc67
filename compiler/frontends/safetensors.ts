/**
 * Safetensors files: a u64 header length, a JSON header {name: {dtype, shape, data_offsets}}, then the bytes of all tensors, without gaps.
 * Everything in a header is checked against the file before a byte of data is used. Data is read by position; no file is ever held whole.
 */
import { closeSync, fstatSync, openSync, readSync, renameSync, rmSync, statSync, writeSync } from "node:fs";
import { UserError } from "../../ir/error.ts";
import type { DType } from "../../ir/type.ts";
import { isObject, type Json, parseJson, shown } from "./json.ts";

export type StoredDType =
  | "F64"
  | "F32"
  | "F16"
  | "BF16"
  | "F8_E4M3"
  | "F8_E5M2"
  | "I64"
  | "I32"
  | "I16"
  | "I8"
  | "U64"
  | "U32"
  | "U16"
  | "U8"
  | "BOOL";

/** Element types of the format, and what they are here; those that the IR lacks have no dtype. */
const stored: Readonly<Record<StoredDType, { readonly bytes: number; readonly dtype: DType }>> = {
  F64: { bytes: 8, dtype: "f64" },
  F32: { bytes: 4, dtype: "f32" },
  F16: { bytes: 2, dtype: "f16" },
  BF16: { bytes: 2, dtype: "bf16" },
  F8_E4M3: { bytes: 1, dtype: "e4m3" },
  F8_E5M2: { bytes: 1, dtype: "e5m2" },
  I64: { bytes: 8, dtype: "i64" },
  I32: { bytes: 4, dtype: "i32" },
  I16: { bytes: 2, dtype: "i16" },
  I8: { bytes: 1, dtype: "i8" },
  U64: { bytes: 8, dtype: "u64" },
  U32: { bytes: 4, dtype: "u32" },
  U16: { bytes: 2, dtype: "u16" },
  U8: { bytes: 1, dtype: "u8" },
  BOOL: { bytes: 1, dtype: "bool" },
};

/** The IR's name of a stored dtype. */
export const dtypeOf = (name: StoredDType): DType => stored[name].dtype;
export const storedBytes = (name: StoredDType): number => stored[name].bytes;
/** The stored name of a dtype. */
export const storedName = (dtype: DType): StoredDType =>
  (Object.keys(stored) as StoredDType[]).find((name) => stored[name].dtype === dtype) as StoredDType;

/** One tensor of a file: `offset` is its first byte's position in the file. */
export interface StoredTensor {
  readonly name: string;
  readonly file: string;
  readonly dtype: StoredDType;
  readonly shape: readonly number[];
  readonly offset: number;
  readonly bytes: number;
}

export interface SafetensorsFile {
  readonly path: string;
  readonly tensors: readonly StoredTensor[];
  readonly metadata: ReadonlyMap<string, string>;
}

/** The format's own limit on the header. */
const longestHeader = 100_000_000;
const damaged = "the file is damaged or not complete, download it again";

/** Reads and checks the header of a file. Throws a UserError that names file and tensor. */
export const readSafetensors = (path: string): SafetensorsFile => {
  // stat first: opening a pipe would wait for a writer
  const entry = statSync(path, { throwIfNoEntry: false });
  if (!entry) throw new UserError(`${path}: no such file; download the whole checkpoint`);
  if (!entry.isFile()) throw new UserError(`${path}: not a regular file; expected a safetensors file`);
  const descriptor = openFile(path);
  try {
    const size = fstatSync(descriptor).size;
    if (size < 8) throw new UserError(`${path}: ${size} bytes are too few for a safetensors file; ${damaged}`);
    const prefix = Buffer.alloc(8);
    readExactly(descriptor, prefix, 0, path);
    const length = prefix.readBigUInt64LE(0);
    if (length > BigInt(longestHeader))
      throw new UserError(`${path}: header length ${length} is above the format's limit of ${longestHeader}; ${damaged}`);
    const headerBytes = Number(length);
    if (headerBytes > size - 8)
      throw new UserError(`${path}: header length ${headerBytes} is more than the file's ${size - 8} bytes; ${damaged}`);
    const header = Buffer.alloc(headerBytes);
    readExactly(descriptor, header, 8, path);
    return parseHeader(path, header, size);
  } finally {
    closeSync(descriptor);
  }
};

const openFile = (path: string): number => {
  try {
    return openSync(path, "r");
  } catch (error) {
    throw new UserError(`${path}: cannot be opened (${(error as NodeJS.ErrnoException).code}); check its permissions`);
  }
};

const parseHeader = (path: string, header: Uint8Array, size: number): SafetensorsFile => {
  const root = parseJson(decodeUtf8(header, path), `${path}: header`, damaged);
  if (!isObject(root)) throw new UserError(`${path}: the header is not a JSON object; ${damaged}`);
  const dataStart = 8 + header.length;
  const tensors: StoredTensor[] = [];
  let metadata: ReadonlyMap<string, string> = new Map();
  for (const [name, info] of root)
    if (name === "__metadata__") metadata = parseMetadata(path, info);
    else tensors.push(parseTensor(path, name, info, dataStart));
  checkPlacement(path, tensors, dataStart, size);
  return { path, tensors, metadata };
};

export const decodeUtf8 = (bytes: Uint8Array, path: string): string => {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new UserError(`${path}: not UTF-8 text where JSON is expected; ${damaged}`);
  }
};

const parseMetadata = (path: string, info: Json): ReadonlyMap<string, string> => {
  const ok = isObject(info) && [...info.values()].every((v) => typeof v === "string");
  if (!ok) throw new UserError(`${path}: __metadata__ must be an object of strings; ${damaged}`);
  return info as ReadonlyMap<string, string>;
};

const parseTensor = (path: string, name: string, info: Json, dataStart: number): StoredTensor => {
  const fail = (what: string): never => {
    throw new UserError(`${path}: tensor ${shown(name)}: ${what}; ${damaged}`);
  };
  if (!isObject(info)) return fail("its header entry is not an object");
  const other = [...info.keys()].find((k) => k !== "dtype" && k !== "shape" && k !== "data_offsets");
  if (other !== undefined) return fail(`unknown field ${shown(other)}`);
  const dtype = info.get("dtype");
  if (typeof dtype !== "string" || !Object.hasOwn(stored, dtype)) return fail(`unknown dtype ${shown(dtype)}`);
  const shape = info.get("shape");
  if (!isSizes(shape)) return fail(`shape ${shown(shape)} is not a list of sizes`);
  const offsets = info.get("data_offsets");
  if (!isSizes(offsets) || offsets.length !== 2) return fail(`data_offsets ${shown(offsets)} is not [begin, end]`);
  const [begin, end] = offsets as readonly [number, number];
  const bytes = shape.reduce((n, d) => n * d, stored[dtype as StoredDType].bytes);
  if (!Number.isSafeInteger(bytes)) return fail(`shape ${shown(shape)} is too large`);
  if (end < begin || end - begin !== bytes)
    return fail(`data_offsets ${shown(offsets)} hold ${end - begin} bytes, but ${dtype} ${shown(shape)} needs ${bytes}`);
  return { name, file: path, dtype: dtype as StoredDType, shape, offset: dataStart + begin, bytes };
};

const isSizes = (value: Json | undefined): value is readonly number[] =>
  Array.isArray(value) && value.every((n) => Number.isSafeInteger(n) && n >= 0);

/** Tensors fill the data part one after another: no overlap, no gap, nothing beyond the end, nothing left over. */
const checkPlacement = (path: string, tensors: readonly StoredTensor[], dataStart: number, size: number): void => {
  const placed = [...tensors].sort((a, b) => a.offset - b.offset || a.bytes - b.bytes);
  let end = dataStart;
  let previous = "";
  for (const t of placed) {
    const name = shown(t.name);
    if (t.offset < end) throw new UserError(`${path}: tensor ${name} overlaps tensor ${previous}; ${damaged}`);
    if (t.offset > end)
      throw new UserError(`${path}: ${t.offset - end} bytes before tensor ${name} belong to no tensor; ${damaged}`);
    end = t.offset + t.bytes;
    if (end > size)
      throw new UserError(`${path}: tensor ${name} is truncated: it ends at byte ${end}, the file has ${size}; ${damaged}`);
    previous = name;
  }
  if (end < size) throw new UserError(`${path}: ${size - end} bytes after the last tensor belong to no tensor; ${damaged}`);
};

/** Fills `into` from position `at`. A file that ends before is an error of the file. */
export const readExactly = (descriptor: number, into: Uint8Array, at: number, path: string): void => {
  let done = 0;
  while (done < into.length) {
    let got: number;
    try {
      got = readSync(descriptor, into, done, Math.min(into.length - done, 1 << 30), at + done);
    } catch (error) {
      throw new UserError(`${path}: cannot be read (${(error as NodeJS.ErrnoException).code}); check the disk`);
    }
    if (got === 0)
      throw new UserError(`${path}: the file ended at byte ${at + done} while it was read; do not change it meanwhile`);
    done += got;
  }
};

/** What a header says of one tensor; tensors lie in the order given. */
export interface HeaderEntry {
  readonly name: string;
  readonly dtype: StoredDType;
  readonly shape: readonly number[];
}

const entryBytes = (e: HeaderEntry): number => e.shape.reduce((n, d) => n * d, stored[e.dtype].bytes);

/** Length and JSON of the header, padded with spaces so that the data begins at a multiple of 64. */
export const safetensorsHeader = (
  entries: readonly HeaderEntry[],
  metadata: ReadonlyMap<string, string> = new Map(),
): Uint8Array => {
  let offset = 0;
  const fields: [string, unknown][] = metadata.size > 0 ? [["__metadata__", Object.fromEntries(metadata)]] : [];
  for (const e of entries) {
    const end = offset + entryBytes(e);
    fields.push([e.name, { dtype: e.dtype, shape: e.shape, data_offsets: [offset, end] }]);
    offset = end;
  }
  const json = Buffer.from(`{${fields.map(([name, value]) => `${JSON.stringify(name)}:${JSON.stringify(value)}`).join(",")}}`);
  const padded = Math.ceil((8 + json.length) / 64) * 64;
  const header = Buffer.alloc(padded, " ");
  header.writeBigUInt64LE(BigInt(padded - 8), 0);
  json.copy(header, 8);
  return header;
};

/** A tensor to write: its bytes come in pieces, so that no tensor need be whole in memory. */
export interface TensorToWrite extends HeaderEntry {
  readonly data: Iterable<Uint8Array>;
}

/** Writes a file piece by piece; it appears under its name only when complete. */
export const writeSafetensors = (
  path: string,
  tensors: readonly TensorToWrite[],
  metadata: ReadonlyMap<string, string> = new Map(),
): void => {
  const temporary = `${path}.partial-${process.pid}`;
  const descriptor = openSync(temporary, "w");
  try {
    writeAll(descriptor, safetensorsHeader(tensors, metadata));
    for (const tensor of tensors) {
      let written = 0;
      for (const piece of tensor.data) {
        writeAll(descriptor, piece);
        written += piece.length;
      }
      if (written !== entryBytes(tensor))
        throw new Error(`${tensor.name}: ${written} bytes given, ${entryBytes(tensor)} declared`);
    }
    closeSync(descriptor);
    renameSync(temporary, path);
  } catch (error) {
    rmSync(temporary, { force: true });
    throw error;
  }
};

const writeAll = (descriptor: number, bytes: Uint8Array): void => {
  for (let done = 0; done < bytes.length; ) done += writeSync(descriptor, bytes, done, bytes.length - done);
};
