/**
 * Weights on their way from a checkpoint to the weight files of a bundle. Each tensor of the checkpoint is read once, from its first row
 * to its last, in windows of whole rows; every weight that is made of it, on whatever rank, takes its part of each window, converts it,
 * packs it as its kernel wants it and writes it to its place. Memory is a few windows, however large the model is.
 */
import { canonicalJson, type Json } from "../ir/json.ts";
import { encode } from "../ir/round.ts";
import { typeText } from "../ir/type.ts";
import type { Checkpoint } from "./frontends/checkpoint.ts";
import type { StoredTensor } from "./frontends/safetensors.ts";
import { createBuffers } from "./weights/buffers.ts";
import { createConverter } from "./weights/convert.ts";
import { createFlight } from "./weights/flight.ts";
import { createHasher, type Hasher, type HashName } from "./weights/hash.ts";
import { createOutput, type Output } from "./weights/output.ts";
import { createPiece, type Emit, type Piece, reachOf, type Window } from "./weights/piece.ts";
import { asMatrices, numbers, type PlacedWeight, packedBytes, separate, type WeightsPlan } from "./weights/plan.ts";
import { createReader, type Reading, readingsOf, slotBytesOf, windowBuffers } from "./weights/reader.ts";
import { createRecipes, type Recipe } from "./weights/recipe.ts";
import { ropeRows } from "./weights/rope.ts";

export type { PlacedWeight, WeightsPlan } from "./weights/plan.ts";
export { isConstant, packedBytes } from "./weights/plan.ts";
export { readWeight } from "./weights/values.ts";

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

/** Bytes read at a time unless asked otherwise, and bytes given to the disk and not yet written. */
const windowBytes = 8 << 20;
const mostInFlight = 64 << 20;

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
  const emit: Emit = (output, position, bytes, lent) => {
    const written = output.write(position, bytes);
    flight.add(
      written.finally(() => lent?.giveBack()),
      bytes.length,
    );
    if (!lent && bytes.buffer instanceof SharedArrayBuffer) users.push(written);
  };
  const buffers = createBuffers();

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
    for (const whole of plan.weights) {
      const output = outputs[i] as Output;
      const used = packedBytes(whole.weight.value.type, whole.layout);
      if (whole.bytes > used) emit(output, whole.offset + used, new Uint8Array(whole.bytes - used));
      for (const placed of separate(whole)) {
        const recipe = recipes.of(placed.weight);
        if (!recipe) constants.push(() => writeConstant(placed, output, emit, flight));
        else if (used > 0) groupOf(recipe.tensor).parts.push({ recipe, placed, output });
      }
    }
  if (configuration !== undefined) for (const tensor of checkpoint?.tensors.values() ?? []) groupOf(tensor);

  const readings = [...groups.values()].flatMap(({ tensor, parts }) =>
    readingsOf(tensor, Math.max(0, ...parts.map((p) => reachOf(p.recipe, p.placed))), atOnce),
  );
  const total = [...groups.values()].reduce((n, g) => n + g.tensor.bytes, 0);
  const slotBytes = Math.max(0, ...readings.map(slotBytesOf));
  const converter = createConverter(windowBuffers * slotBytes);
  const piecesOf = ({ tensor }: Reading): Piece[] =>
    groupOf(tensor).parts.map((p) => createPiece(p.recipe, p.placed, p.output, converter, buffers, emit));
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
