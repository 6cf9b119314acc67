/** Digests of byte streams on other threads, so that hashing runs beside reading, converting and writing. */
import { availableParallelism } from "node:os";
import { Worker } from "node:worker_threads";

/**
 * `pieces` is for telling checkpoints apart at several gigabytes a second, not for keeping forgers out: SHA-256 over the CRC-32 (u32, little
 * endian) of every 64 KiB of the stream.
 */
export type HashName = "sha256" | "blake2b512" | "pieces";

export interface Hasher {
  /** Adds bytes to a stream; resolves when they have been read and their memory may be used again. */
  update(stream: string, algorithm: HashName, bytes: Uint8Array): Promise<void>;
  /** As `update`, of memory that nobody needs any more: it is given away where it can be, not copied. */
  consume(stream: string, algorithm: HashName, bytes: Uint8Array): Promise<void>;
  /** The digest of a stream so far, in hex; ends the stream. */
  digest(stream: string, algorithm: HashName): Promise<string>;
  close(): Promise<void>;
}

/** The worker's program. Text, because a module of its own would need another name before and after compilation. */
const program = `
const { parentPort } = require("node:worker_threads");
const { createHash } = require("node:crypto");
const { crc32 } = require("node:zlib");
const piece = 65536;
const pieces = () => {
  const hash = createHash("sha256");
  const word = Buffer.alloc(4);
  let crc = 0;
  let filled = 0;
  const end = () => {
    word.writeUInt32LE(crc);
    hash.update(word);
    crc = filled = 0;
  };
  return {
    update: (bytes) => {
      for (let at = 0; at < bytes.length; ) {
        const part = bytes.subarray(at, at + piece - filled);
        crc = crc32(part, crc);
        filled += part.length;
        at += part.length;
        if (filled === piece) end();
      }
    },
    digest: (form) => {
      if (filled > 0) end();
      return hash.digest(form);
    },
  };
};
const streams = new Map();
parentPort.on("message", ({ id, stream, algorithm, bytes }) => {
  if (!streams.has(stream)) streams.set(stream, algorithm === "pieces" ? pieces() : createHash(algorithm));
  if (bytes) {
    streams.get(stream).update(bytes);
    parentPort.postMessage({ id });
  } else {
    parentPort.postMessage({ id, digest: streams.get(stream).digest("hex") });
    streams.delete(stream);
  }
});
`;

interface Waiting {
  readonly resolve: (digest: string) => void;
  readonly reject: (error: Error) => void;
}

interface HashThread {
  readonly worker: Worker;
  readonly waiting: Map<number, Waiting>;
  /** bytes that it has been given and not yet hashed */
  load: number;
  failure?: Error;
}

/** At most one thread for each processor and no more than four; they start with the first bytes. */
export const createHasher = (): Hasher => {
  const threads: HashThread[] = [];
  const owner = new Map<string, HashThread>();
  let next = 0;

  const start = (): HashThread => {
    const thread: HashThread = { worker: new Worker(program, { eval: true }), waiting: new Map(), load: 0 };
    const fail = (error: Error): void => {
      thread.failure ??= error;
      for (const w of thread.waiting.values()) w.reject(error);
      thread.waiting.clear();
    };
    thread.worker.on("error", fail);
    thread.worker.on("exit", () => fail(new Error("the hash thread ended")));
    thread.worker.on("message", ({ id, digest }: { id: number; digest?: string }) => {
      thread.waiting.get(id)?.resolve(digest ?? "");
      thread.waiting.delete(id);
    });
    thread.worker.unref();
    threads.push(thread);
    return thread;
  };

  /** a stream stays on one thread; a new one goes to the thread with the least to do */
  const threadOf = (stream: string): HashThread => {
    const known = owner.get(stream);
    if (known) return known;
    const idle = threads.find((t) => t.load === 0);
    const most = Math.max(1, Math.min(4, availableParallelism()));
    const least = [...threads].sort((a, b) => a.load - b.load)[0];
    const chosen = idle ?? (threads.length < most || !least ? start() : least);
    owner.set(stream, chosen);
    return chosen;
  };

  const send = async (stream: string, algorithm: HashName, bytes?: Uint8Array, free = false): Promise<string> => {
    const thread = threadOf(stream);
    const id = next++;
    const size = bytes?.length ?? 0;
    thread.load += size;
    try {
      return await new Promise<string>((resolve, reject) => {
        if (thread.failure) throw thread.failure;
        thread.waiting.set(id, { resolve, reject });
        thread.worker.ref();
        // shared memory is seen by the thread; other memory is moved there, or copied
        const shared = bytes === undefined || bytes.buffer instanceof SharedArrayBuffer;
        const message = shared || (free && bytes.length === bytes.buffer.byteLength) ? bytes : new Uint8Array(bytes);
        thread.worker.postMessage({ id, stream, algorithm, bytes: message }, shared ? [] : [message?.buffer as ArrayBuffer]);
      });
    } finally {
      thread.load -= size;
      if (thread.waiting.size === 0) thread.worker.unref();
    }
  };

  return {
    update: async (stream, algorithm, bytes) => void (await send(stream, algorithm, bytes)),
    consume: async (stream, algorithm, bytes) => void (await send(stream, algorithm, bytes, true)),
    digest: async (stream, algorithm) => {
      const digest = await send(stream, algorithm);
      owner.delete(stream);
      return digest;
    },
    close: async () => void (await Promise.all(threads.map((t) => t.worker.terminate()))),
  };
};
