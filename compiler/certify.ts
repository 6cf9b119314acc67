/** Writes the certificate of a schedule: the evidence that ir/check.ts verifies step by step. */
import type { Certificate, Reuse } from "../ir/check.ts";
import type { RankProgram, Schedule } from "../ir/schedule.ts";

/**
 * The certificate of a schedule: vector clocks, and for each scratch buffer the buffers whose memory it takes over. Throws when the ranks
 * would wait for one another forever, which no schedule of compiler/schedule.ts does.
 */
export const certify = (schedule: Schedule): Certificate => {
  const reuse: (readonly Reuse[])[] = [];
  for (const [r, p] of schedule.programs.entries()) {
    // attention ranks share their program
    const same = schedule.programs.findIndex((q) => q.steps === p.steps && q.buffers === p.buffers);
    reuse.push(same < r ? (reuse[same] as readonly Reuse[]) : reuseOf(p));
  }
  return {
    format: 1,
    schedule: schedule.name,
    wire: schedule.wire,
    clocks: clocksOf(schedule),
    reuse,
  };
};

/** What one rank tells others, by message: post s e of rank r to all FFN ranks, reply s e of rank f to rank a. */
const clocksOf = ({ programs, exchanges, slots }: Schedule): readonly (readonly number[])[] => {
  const ranks = programs.length;
  const attention = programs.filter((p) => p.rank.role === "attention").length;
  const ffn = ranks - attention;
  const count = exchanges.length * slots;
  const clocks = programs.map(() => [] as number[]);
  const at = programs.map(() => 0);
  const sent = new Map<number, readonly number[]>();
  const message = (slot: number, exchange: number, from: number, to: number): number =>
    ((slot * exchanges.length + exchange) * ranks + from) * ranks + to;
  const now = programs.map(() => programs.map(() => 0));
  let left = programs.reduce((n, p) => n + p.steps.length, 0);

  for (let moved = true; moved; ) {
    moved = false;
    programs.forEach(({ steps, rank }, r) => {
      const mine = now[r] as number[];
      const clock = clocks[r] as number[];
      for (let i = at[r] as number; i < steps.length; i++) {
        const step = steps[i];
        if (!step) break;
        const inbox: number[] = [];
        if (step.op === "accept") inbox.push(message(step.slot, step.exchange, step.from, r));
        if (step.op === "wait") for (let f = 0; f < ffn; f++) inbox.push(message(step.slot, step.exchange, attention + f, r));
        if (inbox.some((m) => !sent.has(m))) break;
        for (const m of inbox) {
          const theirs = sent.get(m) as readonly number[];
          for (let k = 0; k < ranks; k++) mine[k] = Math.max(mine[k] as number, theirs[k] as number);
        }
        mine[r] = i + 1;
        for (let k = 0; k < ranks; k++) clock.push(mine[k] as number);
        if (step.op === "post") {
          const stamp = mine.slice();
          for (let f = 0; f < ffn; f++) sent.set(message(step.slot, step.exchange, rank.index, attention + f), stamp);
        }
        if (step.op === "reply") sent.set(message(step.slot, step.exchange, r, step.to), mine.slice());
        at[r] = i + 1;
        left--;
        moved = true;
      }
    });
  }
  if (left > 0) throw new Error(`schedule of ${count} exchanges: ${left} steps wait for one another forever`);
  return clocks;
};

/** One edge for each buffer that was last in memory which a new one takes: its last use comes before the first write of the new one. */
const reuseOf = ({ buffers, steps }: RankProgram): readonly Reuse[] => {
  const scratch = new Map<string, { id: number; start: number; end: number; first: number; last: number }>();
  buffers.forEach((b, id) => {
    // a value without elements takes nobody's memory
    if (b.region === "scratch" && b.bytes > 0)
      scratch.set(b.name, { id, start: b.offset, end: b.offset + b.bytes, first: -1, last: -1 });
  });
  const order: { id: number; start: number; end: number; first: number; last: number }[] = [];
  steps.forEach((step, i) => {
    if (step.op !== "launch") return;
    for (const names of [step.in, step.inout ?? [], step.out])
      for (const name of names) {
        const b = scratch.get(name);
        if (!b) continue;
        if (b.first < 0) {
          b.first = i;
          order.push(b);
        }
        b.last = i;
      }
  });
  const edges: Reuse[] = [];
  let owners: { start: number; end: number; of: (typeof order)[number] }[] = []; // by start, disjoint
  for (const b of order) {
    const before = new Set<(typeof order)[number]>();
    const rest: typeof owners = [];
    for (const o of owners) {
      if (o.end <= b.start || o.start >= b.end) {
        rest.push(o);
        continue;
      }
      before.add(o.of);
      if (o.start < b.start) rest.push({ start: o.start, end: b.start, of: o.of });
      if (o.end > b.end) rest.push({ start: b.end, end: o.end, of: o.of });
    }
    rest.push({ start: b.start, end: b.end, of: b });
    owners = rest;
    for (const o of before) edges.push([o.last, b.first, o.id, b.id]);
  }
  return edges;
};
