/** Work under way, so that there is never too much of it. */

/** Work that has begun and not ended, measured in bytes; remembers the first failure. */
export const createFlight = (): {
  add(work: Promise<void>, bytes: number): void;
  /** waits until at most so many bytes are left; throws the first failure */
  below(bytes: number): Promise<void>;
  settled(): Promise<void>;
} => {
  const active = new Set<Promise<void>>();
  let [flying, failed, failure] = [0, false, undefined as unknown];
  return {
    add: (work, bytes) => {
      flying += bytes;
      const tracked: Promise<void> = work
        .catch((error: unknown) => {
          if (!failed) failure = error;
          failed = true;
        })
        .then(() => {
          flying -= bytes;
          active.delete(tracked);
        });
      active.add(tracked);
    },
    below: async (bytes) => {
      while (!failed && flying > bytes) await Promise.race(active);
      if (bytes === 0) await Promise.all(active);
      if (failed) throw failure;
    },
    settled: async () => void (await Promise.all(active)),
  };
};
