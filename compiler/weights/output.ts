/** A weight file while it is written: pieces go to their places in any order, the digest follows the file's order. */
import { type FileHandle, open } from "node:fs/promises";
import { UserError } from "../../ir/error.ts";
import { safetensorsHeader } from "../frontends/safetensors.ts";
import type { Hasher, HashName } from "./hash.ts";
import { packedBytes, type WeightsPlan } from "./plan.ts";

/** Bytes that a file's digest may lag behind while earlier ones are not there yet. */
const mostDeferred = 64 << 20;

/** Writes packed bytes to their places and digests the file in order. */
export interface Output {
  write(position: number, bytes: Uint8Array): Promise<void>;
  finish(): Promise<string>;
  readonly bytes: number;
  close(): Promise<void>;
}

export const ioError = (path: string, doing: string, error: unknown): UserError =>
  new UserError(
    `${path}: cannot be ${doing} (${(error as NodeJS.ErrnoException).code ?? String(error)}); check the disk and its free space`,
  );

export const createOutput = async (plan: WeightsPlan, hasher: Hasher, algorithm: HashName): Promise<Output> => {
  const header = headerOf(plan);
  let handle: FileHandle;
  try {
    handle = await open(plan.path, "w+");
  } catch (error) {
    throw ioError(plan.path, "written", error);
  }
  const stream = `file ${plan.path}`;
  interface Hashable {
    readonly bytes: Uint8Array;
    /** when nobody else needs its memory any more; absent when it may be digested beside other uses */
    readonly free?: Promise<void>;
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
      // shared memory is used again before the turn comes
      else if (piece.bytes.buffer instanceof SharedArrayBuffer) waiting.set(position, { bytes: new Uint8Array(piece.bytes) });
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
  /** one write at a time: the system lets only one write into a file, and the others would burn a processor as they wait */
  let writing: Promise<void> = Promise.resolve();
  const put = (position: number, bytes: Uint8Array): Promise<void> => {
    const written = writing.then(() => putNow(position, bytes));
    writing = written.catch(() => {});
    return written;
  };
  const putNow = async (position: number, bytes: Uint8Array): Promise<void> => {
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
    const piece = bytes.buffer instanceof SharedArrayBuffer ? { bytes } : { bytes, free };
    await Promise.all([digest(position, piece), free]);
  };

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
