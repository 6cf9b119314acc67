/**
 * A Hugging Face checkpoint directory: config.json, and tensors in model.safetensors or in the shards that
 * model.safetensors.index.json names. Opening reads headers only; tensor data is read by position when asked for.
 */
import { closeSync, openSync, readFileSync, realpathSync, statSync } from "node:fs";
import { basename, dirname, isAbsolute, join, relative, sep } from "node:path";
import { UserError } from "../../ir/error.ts";
import { isObject, type JsonObject, parseJson, shown } from "./json.ts";
import { decodeUtf8, readExactly, readSafetensors, type StoredDType, type StoredTensor } from "./safetensors.ts";

export interface Checkpoint {
  readonly directory: string;
  readonly tensors: ReadonlyMap<string, StoredTensor>;
  /**
   * Bytes of rows [from, to) of a tensor, or of all of it. A row is one run along the last axis; rows of a tensor of shape
   * [..., R, C] are numbered through its matrices, so row r of matrix m is m * R + r. A vector is one row.
   */
  read(tensor: StoredTensor, rows?: readonly [number, number]): Uint8Array;
  /** as `read`, into a buffer of exactly the bytes wanted */
  readInto(tensor: StoredTensor, from: number, into: Uint8Array): void;
  /** an open descriptor of the tensor's file, for readers that overlap their reads; belongs to the checkpoint */
  descriptor(tensor: StoredTensor): number;
  close(): void;
}

/** Rows of a tensor as `Checkpoint.read` counts them, and elements of one. A scalar is one row of one. */
export const matrixOf = (shape: readonly number[]): { readonly rows: number; readonly columns: number } => ({
  rows: shape.slice(0, -1).reduce((n, d) => n * d, 1),
  columns: shape.at(-1) ?? 1,
});

const single = "model.safetensors";
const indexName = "model.safetensors.index.json";
/** Configurations and indices are far smaller; a larger one is some other file. */
const longestJson = 256 << 20;

/** Reads a JSON object from a file of a checkpoint. Throws a UserError that names the file. */
export const readJsonObject = (path: string): JsonObject => {
  const entry = statSync(path, { throwIfNoEntry: false });
  if (!entry) throw new UserError(`${path}: no such file; give a Hugging Face checkpoint directory`);
  if (!entry.isFile()) throw new UserError(`${path}: not a regular file; expected JSON`);
  if (entry.size > longestJson) throw new UserError(`${path}: ${entry.size} bytes are too many for a JSON file of a checkpoint`);
  let bytes: Uint8Array;
  try {
    bytes = readFileSync(path);
  } catch (error) {
    throw new UserError(`${path}: cannot be read (${(error as NodeJS.ErrnoException).code}); check its permissions`);
  }
  const value = parseJson(decodeUtf8(bytes, path), path, "correct it or download it again");
  if (!isObject(value)) throw new UserError(`${path}: not a JSON object; correct it or download it again`);
  return value;
};

/** Whether a directory holds tensors, as opposed to a configuration alone. */
export const hasTensors = (directory: string): boolean =>
  existing(join(directory, single)) || existing(join(directory, indexName));

const existing = (path: string): boolean => statSync(path, { throwIfNoEntry: false }) !== undefined;

/**
 * Opens the tensors of a checkpoint. Tensors whose names begin with one of `ignore` are left out, and shards that hold nothing else are
 * not opened. Throws a UserError that names file and tensor.
 */
export const openCheckpoint = (directory: string, ignore: readonly string[] = []): Checkpoint => {
  if (!statSync(directory, { throwIfNoEntry: false })?.isDirectory())
    throw new UserError(`${directory}: no such directory; give a Hugging Face checkpoint directory`);
  const [one, index] = [join(directory, single), join(directory, indexName)];
  if (existing(one) && existing(index))
    throw new UserError(`${directory}: has both ${single} and ${indexName}; remove the one that is stale`);
  if (!existing(one) && !existing(index))
    throw new UserError(
      `${directory}: has neither ${single} nor ${indexName}; download the weights, or compile with --no-weights`,
    );
  const ignored = (name: string): boolean => ignore.some((prefix) => name.startsWith(prefix));
  const found = existing(index) ? readSharded(directory, index, ignored) : readSafetensors(inside(directory, one)).tensors;
  return checkpointOf(directory, new Map(found.filter((t) => !ignored(t.name)).map((t) => [t.name, t])));
};

/** The tensors that an index lists: each must be in the shard that it names, and each tensor of a shard must be listed for that shard. */
const readSharded = (directory: string, index: string, ignored: (name: string) => boolean): StoredTensor[] => {
  const map = readJsonObject(index).get("weight_map");
  if (!isObject(map) || map.size === 0)
    throw new UserError(`${index}: "weight_map" must be an object of tensor names and files; download it again`);
  const shards = new Map<string, Set<string>>();
  for (const [name, file] of map) {
    if (typeof file !== "string")
      throw new UserError(`${index}: the file of tensor ${shown(name)} is not a string; download it again`);
    shards.set(file, (shards.get(file) ?? new Set()).add(name));
  }
  // all paths before any file: a wrong index is reported as that
  const paths = [...shards].map(([file, names]) => {
    const path = plainPath(directory, file, index);
    return { names, path: [...names].every(ignored) ? undefined : inside(directory, path, index) };
  });
  const tensors: StoredTensor[] = [];
  for (const { names, path } of paths) {
    if (path === undefined) continue;
    const shard = readSafetensors(path);
    const present = new Set(shard.tensors.map((t) => t.name));
    const missing = [...names].find((name) => !present.has(name));
    if (missing !== undefined)
      throw new UserError(`${path}: tensor ${shown(missing)}, which ${indexName} says is here, is missing; download both again`);
    const extra = shard.tensors.find((t) => !names.has(t.name) && !ignored(t.name));
    if (extra)
      throw new UserError(
        `${path}: tensor ${shown(extra.name)} is not listed for this file in ${indexName}; download both again`,
      );
    tensors.push(...shard.tensors);
  }
  return tensors;
};

const outside = (where: string, file: string, how: string): never => {
  throw new UserError(`${where}: file ${shown(file)} ${how}; files of a checkpoint must be inside its directory`);
};

/** The path of a file that an index names. */
const plainPath = (directory: string, file: string, index: string): string => {
  const parts = file.split("/");
  const plain = !isAbsolute(file) && !/[\\\0]/.test(file) && parts.every((p) => p !== "" && p !== "." && p !== "..");
  return plain ? join(directory, ...parts) : outside(index, file, "is not a plain file name");
};

/**
 * The same path, of a file that is there and in the directory. A symbolic link may leave it only for the blobs of the same snapshot, as in
 * the Hugging Face cache (snapshots/REVISION/FILE -> ../../blobs/HASH).
 */
const inside = (directory: string, path: string, index?: string): string => {
  const lists = index === undefined ? "" : `, but ${indexName} lists it`;
  if (!existing(path)) throw new UserError(`${path}: no such file${lists}; download the whole checkpoint`);
  const root = realpathSync(directory);
  const roots = basename(dirname(root)) === "snapshots" ? [root, join(dirname(dirname(root)), "blobs")] : [root];
  const real = realpathSync(path);
  if (roots.some((r) => real.startsWith(r + sep))) return path;
  return outside(index ?? directory, relative(directory, path), "is a link that leaves the directory");
};

const checkpointOf = (directory: string, tensors: ReadonlyMap<string, StoredTensor>): Checkpoint => {
  const descriptors = new Map<string, number>();
  const descriptor = (tensor: StoredTensor): number => {
    const known = descriptors.get(tensor.file);
    if (known !== undefined) return known;
    const opened = openSync(tensor.file, "r");
    descriptors.set(tensor.file, opened);
    return opened;
  };
  const rowBytes = (tensor: StoredTensor): number => {
    const { rows } = matrixOf(tensor.shape);
    return rows === 0 ? 0 : tensor.bytes / rows;
  };
  const readInto = (tensor: StoredTensor, from: number, into: Uint8Array): void =>
    readExactly(descriptor(tensor), into, tensor.offset + from * rowBytes(tensor), tensor.file);
  return {
    directory,
    tensors,
    readInto,
    read: (tensor, [from, to] = [0, matrixOf(tensor.shape).rows]) => {
      const bytes = new Uint8Array((to - from) * rowBytes(tensor));
      readInto(tensor, from, bytes);
      return bytes;
    },
    descriptor,
    close: () => {
      for (const d of descriptors.values()) closeSync(d);
      descriptors.clear();
    },
  };
};

/** A tensor that a model needs: `scaled` ones may be stored as F8_E4M3 with a tensor of block scales beside them. */
export interface Expected {
  readonly name: string;
  readonly shape: readonly number[];
  readonly scaled: boolean;
}

const plain: readonly StoredDType[] = ["BF16", "F16", "F32"];

/** The name of the block scales of an F8_E4M3 tensor. */
export const scalesName = (tensor: string): string => `${tensor}_scale_inv`;

/** Shape of the scales of a tensor whose last two axes are scaled in blocks. */
export const scalesShape = (shape: readonly number[], block: readonly [number, number]): readonly number[] =>
  shape.map((d, i) => Math.ceil(d / (i === shape.length - 1 ? block[1] : i === shape.length - 2 ? block[0] : 1)));

/**
 * Checks that a checkpoint has the tensors a model needs, with their shapes and dtypes, and no others.
 * Throws a UserError that names the first at fault and counts the rest.
 */
export const checkTensors = (checkpoint: Checkpoint, expected: readonly Expected[], block: readonly [number, number]): void => {
  const missing: string[] = [];
  const known = new Set<string>();
  for (const { name, shape, scaled } of expected) {
    const tensor = checkpoint.tensors.get(name);
    known.add(name);
    if (!tensor) {
      missing.push(name);
      continue;
    }
    sameShape(tensor, shape, "config.json says");
    if (plain.includes(tensor.dtype)) continue;
    if (tensor.dtype !== "F8_E4M3" || !scaled)
      throw new UserError(
        `${tensor.file}: tensor ${shown(name)} is ${tensor.dtype}; it must be ${plain.join(", ")}${scaled ? " or F8_E4M3 with scales" : ""}`,
      );
    const scales = checkpoint.tensors.get(scalesName(name));
    known.add(scalesName(name));
    if (!scales) {
      missing.push(scalesName(name));
      continue;
    }
    if (scales.dtype !== "F32")
      throw new UserError(`${scales.file}: tensor ${shown(scales.name)} is ${scales.dtype}; scales must be F32`);
    sameShape(scales, scalesShape(shape, block), `blocks of ${block.join("x")} need`);
  }
  if (missing.length > 0) {
    const more = missing.length > 1 ? ` (and ${missing.length - 1} more tensors)` : "";
    throw new UserError(
      `${checkpoint.directory}: tensor ${shown(missing[0])} is missing${more}; download the whole checkpoint or correct config.json`,
    );
  }
  const extra = [...checkpoint.tensors.values()].filter((t) => !known.has(t.name));
  if (extra[0]) {
    const more = extra.length > 1 ? ` (nor are ${extra.length - 1} more)` : "";
    throw new UserError(
      `${extra[0].file}: tensor ${shown(extra[0].name)} is not a part of the model that config.json describes${more}; correct config.json or remove it`,
    );
  }
};

const sameShape = (tensor: StoredTensor, shape: readonly number[], why: string): void => {
  if (tensor.shape.length === shape.length && tensor.shape.every((d, i) => d === shape[i])) return;
  throw new UserError(
    `${tensor.file}: tensor ${shown(tensor.name)} has shape [${tensor.shape.join(",")}], ${why} [${shape.join(",")}]; correct config.json or the tensor`,
  );
};
