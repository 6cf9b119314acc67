/** Where buffers lie: permanent ones one after another, scratch by live range in program order, all at their maxima. */
import type { MemoryReport } from "../ir/bundle.ts";
import type { Buffer, RankProgram, Schedule, Step } from "../ir/schedule.ts";

/** A buffer before it has a place. */
export type Unplaced = Omit<Buffer, "offset">;

/** Every buffer starts at a multiple of this, bytes; packed weights are padded to it. */
export const alignment = 64;

export const align = (bytes: number): number => Math.ceil(bytes / alignment) * alignment;

const regions = ["weights", "state", "exchange", "scratch", "input", "output"] as const;

/**
 * Gives every buffer its offset in its region. Weights, states and the memory that peers or the host touch keep their place for the whole
 * round, in the order given. A scratch buffer lives from its first write to its last use; the smallest hole that holds it is taken.
 * Throws when a step names a scratch buffer that nothing wrote before.
 */
export const planMemory = (
  buffers: readonly Unplaced[],
  steps: readonly Step[],
): { readonly buffers: readonly Buffer[]; readonly memory: RankProgram["memory"] } => {
  const memory: Record<Buffer["region"], number> = { weights: 0, state: 0, exchange: 0, scratch: 0, input: 0, output: 0 };
  const scratch = scratchOffsets(buffers, steps);
  memory.scratch = scratch.bytes;
  const placed = buffers.map((buffer): Buffer => {
    if (buffer.region === "scratch") return place(buffer, scratch.offsets.get(buffer.name) ?? 0);
    const offset = memory[buffer.region];
    memory[buffer.region] = offset + align(buffer.bytes);
    return place(buffer, offset);
  });
  return { buffers: placed, memory };
};

const place = (b: Unplaced, offset: number): Buffer => ({
  name: b.name,
  region: b.region,
  dtype: b.dtype,
  shape: b.shape,
  segments: b.segments,
  offset,
  bytes: b.bytes,
  ...(b.slot === undefined ? {} : { slot: b.slot }),
  ...(b.binds === undefined ? {} : { binds: b.binds }),
});

const scratchOffsets = (
  buffers: readonly Unplaced[],
  steps: readonly Step[],
): { readonly offsets: ReadonlyMap<string, number>; readonly bytes: number } => {
  const sizes = new Map<string, number>();
  for (const b of buffers) if (b.region === "scratch") sizes.set(b.name, align(b.bytes));
  const lastUse = new Map<string, number>();
  for (const [at, step] of steps.entries())
    if (step.op === "launch")
      for (const names of [step.in, step.inout ?? [], step.out]) for (const name of names) lastUse.set(name, at);

  const offsets = new Map<string, number>();
  const space = new Space();
  for (const [at, step] of steps.entries()) {
    if (step.op !== "launch") continue;
    for (const name of step.in)
      if (sizes.has(name) && !offsets.has(name)) throw new Error(`step ${at} reads ${name}, which nothing has written`);
    // results get their memory while the operands still have theirs: a kernel never writes over what it reads
    for (const name of step.out) {
      const size = sizes.get(name);
      if (size !== undefined && !offsets.has(name)) offsets.set(name, space.take(size));
    }
    for (const names of [step.in, step.inout ?? [], step.out])
      for (const name of names) {
        const size = sizes.get(name);
        if (size === undefined || lastUse.get(name) !== at) continue;
        space.free(offsets.get(name) as number, size);
        lastUse.delete(name); // an operand may be named twice
      }
  }
  return { offsets, bytes: space.top };
};

/** A growing block with holes. */
class Space {
  top = 0;
  /** [offset, size], by offset, never touching one another */
  private readonly holes: [number, number][] = [];

  take(size: number): number {
    let best = -1;
    let room = Number.POSITIVE_INFINITY;
    for (let i = 0; i < this.holes.length; i++) {
      const hole = this.holes[i] as [number, number];
      if (hole[1] < size || hole[1] >= room) continue;
      best = i;
      room = hole[1];
    }
    if (best >= 0) {
      const hole = this.holes[best] as [number, number];
      const offset = hole[0];
      hole[0] += size;
      hole[1] -= size;
      if (hole[1] === 0) this.holes.splice(best, 1);
      return offset;
    }
    const last = this.holes.at(-1);
    const offset = last && last[0] + last[1] === this.top ? (this.holes.pop() as [number, number])[0] : this.top;
    this.top = offset + size;
    return offset;
  }

  free(offset: number, size: number): void {
    const at = this.holes.findIndex(([start]) => start > offset);
    const index = at < 0 ? this.holes.length : at;
    this.holes.splice(index, 0, [offset, size]);
    const hole = this.holes[index] as [number, number];
    const next = this.holes[index + 1];
    if (next && hole[0] + hole[1] === next[0]) {
      hole[1] += next[1];
      this.holes.splice(index + 1, 1);
    }
    const before = this.holes[index - 1];
    if (before && before[0] + before[1] === hole[0]) {
      before[1] += hole[1];
      this.holes.splice(index, 1);
    }
  }
}

/**
 * Bytes each rank allocates to run these schedules, one at a time: weights and KV are shared by all schedules, the other regions belong to
 * one schedule each. `kernelScratch` is the largest scratch of a kernel of that side, which the device allocates once.
 */
export const memoryReport = (
  schedules: readonly Schedule[],
  kernelScratch: (role: "attention" | "ffn") => number = () => 0,
): readonly MemoryReport[] => {
  const programs = schedules[0]?.programs ?? [];
  return programs.map(({ rank }, i) => {
    const of = schedules.map((s) => (s.programs[i] as RankProgram).memory);
    const most = (region: (typeof regions)[number]): number => Math.max(...of.map((m) => m[region]));
    const all = (region: (typeof regions)[number]): number => of.reduce((sum, m) => sum + m[region], 0);
    const report = {
      rank: rank.name,
      weights: most("weights"),
      kv: most("state"),
      exchange: all("exchange"),
      scratch: all("scratch") + kernelScratch(rank.role),
      io: all("input") + all("output"),
    };
    return { ...report, total: report.weights + report.kv + report.exchange + report.scratch + report.io };
  });
};
