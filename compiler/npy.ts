/** NumPy's .npy files, versions 1 to 3, C order, little endian: the format of numpy.lib.format. */
import { readFileSync, writeFileSync } from "node:fs";
import { UserError } from "../ir/error.ts";
import { decode, encode } from "../ir/round.ts";
import type { Tensor } from "../ir/tensor.ts";
import { type DType, dtypeBytes } from "../ir/type.ts";

/** `descr` of each dtype that NumPy has; others travel as their bits in the unsigned type of their width. */
const descriptors: Readonly<Record<DType, string>> = {
  f64: "<f8",
  f32: "<f4",
  f16: "<f2",
  bf16: "<u2",
  e4m3: "|u1",
  e5m2: "|u1",
  i64: "<i8",
  i32: "<i4",
  i16: "<i2",
  i8: "|i1",
  u64: "<u8",
  u32: "<u4",
  u16: "<u2",
  u8: "|u1",
  bool: "|b1",
};

const magic = "\u0093NUMPY";

/** Reads a tensor that must be of `dtype`. Throws a UserError that names the file. */
export const readNpy = (path: string, dtype: DType): Tensor => {
  let bytes: Uint8Array;
  try {
    bytes = new Uint8Array(readFileSync(path));
  } catch (error) {
    throw new UserError(`${path}: ${(error as Error).message}`);
  }
  const fail = (what: string): never => {
    throw new UserError(`${path}: ${what}; write it with numpy.save`);
  };
  const view = new DataView(bytes.buffer);
  if (bytes.length < 12 || Buffer.from(bytes.subarray(0, 6)).toString("latin1") !== magic) fail("is not a .npy file");
  const version = bytes[6] as number;
  const start = version === 1 ? 10 : 12;
  const length = version === 1 ? view.getUint16(8, true) : view.getUint32(8, true);
  if (version < 1 || version > 3 || start + length > bytes.length) fail("has a header that does not fit it");
  const header = Buffer.from(bytes.subarray(start, start + length)).toString("utf8");
  const descr = /'descr':\s*'([^']+)'/.exec(header)?.[1];
  const order = /'fortran_order':\s*(True|False)/.exec(header)?.[1];
  const shapeText = /'shape':\s*\(([\d\s,]*)\)/.exec(header)?.[1];
  if (descr === undefined || order === undefined || shapeText === undefined)
    return fail("has a header that names no descr, order and shape");
  const shape = shapeText.split(",").flatMap((d) => (d.trim() === "" ? [] : [Number(d)]));
  if (order === "True" && shape.length > 1) fail("is in Fortran order; use numpy.ascontiguousarray first");
  if (descr !== descriptors[dtype]) fail(`has elements ${descr}, the graph wants ${dtype} (${descriptors[dtype]})`);
  const count = shape.reduce((n, d) => n * d, 1);
  const data = bytes.slice(start + length);
  if (data.length !== count * dtypeBytes(dtype)) fail(`has ${data.length} bytes of data for shape (${shape.join(", ")})`);
  return { kind: "tensor", dtype, shape, data: decode(dtype, data) };
};

/** Writes a tensor, version 1.0, header padded so that the data starts at a multiple of 64 as NumPy does. */
export const writeNpy = (path: string, { dtype, shape, data }: Tensor): void => {
  const shapeText = shape.length === 1 ? `${shape[0]},` : shape.join(", ");
  const text = `{'descr': '${descriptors[dtype]}', 'fortran_order': False, 'shape': (${shapeText}), }`;
  const padded = `${text}${" ".repeat((64 - ((text.length + 11) % 64)) % 64)}\n`;
  const head = Buffer.alloc(10);
  head.write(magic, "latin1");
  head[6] = 1;
  head.writeUInt16LE(padded.length, 8);
  writeFileSync(path, Buffer.concat([head, Buffer.from(padded, "latin1"), encode(dtype, data)]));
};
