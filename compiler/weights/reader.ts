/** Reads the tensors of a checkpoint in windows of whole rows, ahead of their use. */
import { read as fsRead } from "node:fs";
import { UserError } from "../../ir/error.ts";
import { type Checkpoint, matrixOf } from "../frontends/checkpoint.ts";
import type { StoredTensor } from "../frontends/safetensors.ts";
import type { Converter } from "./convert.ts";
import { ioError } from "./output.ts";
import type { Window } from "./piece.ts";

export const windowBuffers = 3;

/** Rows of a tensor to read next. */
export interface Reading {
  readonly tensor: StoredTensor;
  readonly first: number;
  readonly end: number;
  /** bytes of a row, and of the room for rows of the window before that are needed again */
  readonly rowBytes: number;
  readonly room: number;
}

export const slotBytesOf = ({ first, end, rowBytes, room }: Reading): number =>
  Math.ceil((room + (end - first) * rowBytes) / 64) * 64;

/** Windows over all rows of a tensor, of which a weight may need up to `reach` at once. */
export const readingsOf = (tensor: StoredTensor, reach: number, atOnce: number): Reading[] => {
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

/** Reads windows into a few buffers that are used in turn; each has room before the new rows for rows of the window before. */
export const createReader = (
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
