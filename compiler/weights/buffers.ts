/** Memory for packed bytes on their way to the disk and the digest, used again: the pages of fresh memory cost more than the packing. */

/** Bytes of shared memory, the caller's until it is given back. */
export interface Lent {
  readonly bytes: Uint8Array;
  giveBack(): void;
}

export interface Buffers {
  lend(bytes: number): Lent;
}

/** Bytes kept for later, and the least of a kept buffer; what is much smaller is not worth keeping. */
const mostKept = 128 << 20;
const leastBytes = 4 << 20;
const smallBytes = 256 << 10;

/** Buffers of few sizes, powers of two, so that one that was given back fits what comes next. */
export const createBuffers = (): Buffers => {
  const free = new Map<number, SharedArrayBuffer[]>();
  let kept = 0;
  return {
    lend: (bytes) => {
      if (bytes < smallBytes) return { bytes: new Uint8Array(bytes), giveBack: () => {} };
      let size = leastBytes;
      while (size < bytes) size *= 2;
      const known = free.get(size)?.pop();
      if (known) kept -= size;
      const memory = known ?? new SharedArrayBuffer(size);
      return {
        bytes: new Uint8Array(memory, 0, bytes),
        giveBack: () => {
          if (kept + size > mostKept) return;
          kept += size;
          free.set(size, [...(free.get(size) ?? []), memory]);
        },
      };
    },
  };
};
