/**
 * The independent checker of schedules. It knows the language of schedules and the contracts of the exchange (slots are memory plus a
 * notification, K1 to K17), and nothing of how schedules are made. It reads a schedule, its certificate and a few facts of the manifest,
 * trusts none of them, and costs O((steps + reuse edges) * ranks).
 */
import type { Manifest } from "./bundle.ts";
import { takesOf } from "./check_memory.ts";
import { examine, type Local, Memory, type Uses } from "./check_rank.ts";
import {
  type CheckRule,
  type Context,
  isIndex,
  peerOf,
  placeText,
  Rejected,
  readContext,
  sameWire,
  shortest,
  stepText,
} from "./check_wire.ts";
import type { Buffer, RankProgram, Schedule } from "./schedule.ts";

export type { CheckRule } from "./check_wire.ts";

/** `[last use of the earlier buffer, first write of the later one, earlier, later]`: steps, then indices into the rank's buffers. */
export type Reuse = readonly [lastUse: number, firstWrite: number, earlier: number, later: number];

/** Evidence that goes with a schedule. */
export interface Certificate {
  readonly format: 1;
  readonly schedule: string;
  readonly wire: string;
  /** by rank, step after step, one number for each rank: how many of its steps have happened when this step is done */
  readonly clocks: readonly (readonly number[])[];
  /** by rank: one edge for each buffer whose scratch memory a later one takes over */
  readonly reuse: readonly (readonly Reuse[])[];
}

/** Facts of the manifest to hold a schedule to; what is absent is not checked, and the report says so. */
export interface CheckFacts {
  readonly wire?: string;
  readonly attention?: number;
  readonly ffn?: number;
  readonly microBatches?: number;
  readonly kv?: Manifest["kv"];
  readonly weights?: readonly { readonly rank: string; readonly bytes: number }[];
}

export type Verdict =
  | { readonly ok: true; readonly summary: string; readonly proved: readonly string[]; readonly unproved: readonly string[] }
  | {
      readonly ok: false;
      readonly rule: CheckRule;
      /** the shortest counter-example: each line names a rank, and the steps, slots and buffers concerned */
      readonly lines: readonly string[];
      /** the lines, joined */
      readonly reason: string;
    };

export type Checker = (schedule: Schedule, certificate: Certificate, facts?: CheckFacts) => Verdict;

/** Checks one schedule against its certificate. Never throws, whatever the JSON holds. */
export const checkSchedule: Checker = (schedule, certificate, facts = {}) => createChecker()(schedule, certificate, facts);

/**
 * A checker for many schedules that share parts: what it finds out about the steps or the buffers of one rank, it remembers by the identity
 * of those arrays, which nobody may change. Its verdicts are those of `checkSchedule`.
 */
export const createChecker = (): Checker => {
  const memory = new Memory();
  const known: Known = {};
  let last: { readonly schedule: Schedule; readonly context: Context } | undefined;
  return (schedule, certificate, facts = {}) => {
    try {
      const context = last && sameWire(last.schedule, schedule) ? last.context : readContext(schedule);
      last = { schedule, context };
      const locals = schedule.programs.map((program) => examine(program, context, memory));
      return judge(schedule, certificate, facts, context, locals, known);
    } catch (error) {
      if (error instanceof Rejected) return rejection(error, schedule);
      if (error instanceof TypeError || error instanceof RangeError)
        return rejection(new Rejected("form", [`the schedule is not well formed: ${error.message}`]), schedule);
      throw error;
    }
  };
};

/** Weights and states lie at the same place in all schedules of a bundle, so that ranks hold them once. Gives what differs, if anything. */
export const checkShared = (schedules: readonly Schedule[]): string | undefined => {
  const [first, ...others] = schedules;
  for (const other of others)
    for (const [i, p] of (first?.programs ?? []).entries()) {
      const fixed = (q: RankProgram | undefined): Buffer[] =>
        (q?.buffers ?? []).filter((b) => b.region === "weights" || b.region === "state");
      const mine = fixed(p);
      const theirs = fixed(other.programs[i]);
      for (let k = 0; k < Math.max(mine.length, theirs.length); k++) {
        const [b, c] = [mine[k], theirs[k]];
        if (
          !b ||
          !c ||
          b.name !== c.name ||
          b.offset !== c.offset ||
          b.bytes !== c.bytes ||
          b.region !== c.region ||
          b.binds !== c.binds
        )
          return `${p.rank.name}: ${b ? placeText(b) : "nothing"} in schedule ${first?.name}, ${c ? placeText(c) : "nothing"} in ${other.name}`;
      }
    }
  return undefined;
};

// --- rejections ------------------------------------------------------------------------------------------------------------------

const rejection = ({ rule, lines, partner }: Rejected, schedule: Schedule): Verdict => {
  const program = partner && schedule.programs.find((p) => p.rank.name === partner.rank);
  const at = program?.steps.findIndex(
    (s) =>
      s.op !== "launch" &&
      s.op === partner?.op &&
      s.slot === partner.slot &&
      s.exchange === partner.exchange &&
      (partner.peer === undefined || peerOf(s) === partner.peer),
  );
  const all = partner && program && at !== undefined && at >= 0 ? [...lines, `${stepText(program, at)} ${partner.says}`] : lines;
  return { ok: false, rule, lines: all, reason: all.join("; ") };
};

/** What the communication of all ranks comes to. */
interface Meeting {
  /** by rank and communication step: how many steps of each rank have happened when it is done */
  readonly clocks: readonly Int32Array[];
  /** the first use of memory that a peer may be using */
  readonly hazard: Rejected | undefined;
}

/** What the ranks' uses came to, the last time that nothing was wrong with their order. */
interface Known {
  together?: { readonly uses: readonly Uses[]; readonly meeting: Meeting };
}

const judge = (
  schedule: Schedule,
  certificate: Certificate,
  facts: CheckFacts,
  context: Context,
  locals: readonly Local[],
  known: Known,
): Verdict => {
  matchFacts(schedule, facts);
  const uses = locals.map((l) => l.uses);
  const protocol = shortest(uses.map((u) => u.protocol));
  if (protocol) throw protocol;
  const same = known.together?.uses.length === uses.length && known.together.uses.every((u, r) => u === uses[r]);
  const meeting = same && known.together ? known.together.meeting : meet(schedule, context, uses);
  known.together = { uses, meeting };
  const memory = shortest([...locals.map((l) => l.memory), meeting.hazard]);
  if (memory) throw memory;
  matchCertificate(schedule, certificate, locals, meeting.clocks);
  return approve(schedule, certificate, facts, context);
};

const meet = (schedule: Schedule, context: Context, uses: readonly Uses[]): Meeting => {
  const clocks = runClocks(schedule, context, uses);
  sameOrder(schedule, context, uses);
  return { clocks, hazard: shortest(uses.map((_, r) => hazards(schedule, context, uses, clocks, r))) };
};

/** The manifest and the schedule speak of the same machine, weights and caches. */
const matchFacts = (schedule: Schedule, facts: CheckFacts): void => {
  const { programs } = schedule;
  const attention = programs.filter((p) => p.rank.role === "attention").length;
  const said: readonly (readonly [string, unknown, unknown])[] = [
    ["wire hash", facts.wire, schedule.wire],
    ["attention ranks", facts.attention, attention],
    ["FFN ranks", facts.ffn, programs.length - attention],
    ["micro-batches", facts.microBatches, schedule.slots],
  ];
  for (const [what, wanted, found] of said)
    if (wanted !== undefined && wanted !== found)
      throw new Rejected("form", [`${what}: the manifest has ${String(wanted)}, the schedule ${String(found)}`]);
  for (const { rank, buffers, memory } of programs) {
    if (facts.kv)
      for (const b of buffers)
        if (b.region === "state" && b.bytes !== facts.kv.pages * facts.kv.pageBytes)
          throw new Rejected("state", [
            `${rank.name}: ${placeText(b)} is not ${facts.kv.pages} pages of ${facts.kv.pageBytes} bytes`,
          ]);
    if (!facts.weights) continue;
    const file = facts.weights.find(
      (w) => w.rank === rank.name || w.rank === rank.role || w.rank === `${rank.role}${rank.index}`,
    );
    if (!file || file.bytes !== memory.weights)
      throw new Rejected("weights", [
        `${rank.name}: ${memory.weights} bytes of weights, the manifest has ${file?.bytes ?? "none"} for it`,
      ]);
  }
};

/**
 * Vector clocks of the communication steps, by running all ranks as far as they go: a post comes before its accepts, a reply before its wait.
 * Entry k of a clock: steps of rank k that have happened. Throws the shortest cycle among the steps at which the round stands still.
 */
const runClocks = (schedule: Schedule, context: Context, uses: readonly Uses[]): readonly Int32Array[] => {
  const { attention, ffn, slots } = context;
  const ranks = uses.length;
  const codes = slots * context.exchanges.length;
  const clocks = uses.map((l) => new Int32Array(l.events.count * ranks));
  const done = new Int32Array(ranks);
  const join = (to: Int32Array, at: number, from: Int32Array, event: number): void => {
    const base = event * ranks;
    for (let k = 0; k < ranks; k++) {
      const theirs = from[base + k] as number;
      if (theirs > (to[at + k] as number)) to[at + k] = theirs;
    }
  };
  let left = uses.reduce((n, l) => n + l.events.count, 0);
  for (let moved = true; moved; ) {
    moved = false;
    for (let r = 0; r < ranks; r++) {
      const local = uses[r] as Uses;
      const mine = clocks[r] as Int32Array;
      let at = done[r] as number;
      run: for (; at < local.events.count; at++) {
        const base = at * ranks;
        const code = local.events.code[at] as number;
        const receiving = local.events.outgoing[at] === 0;
        if (receiving && r < attention) {
          for (let f = 0; f < ffn; f++)
            if (((uses[attention + f] as Uses).sends[r * codes + code] as number) >= (done[attention + f] as number)) break run;
        } else if (receiving) {
          const a = local.events.peer[at] as number;
          if (((uses[a] as Uses).sends[code] as number) >= (done[a] as number)) break;
        }
        if (at > 0) for (let k = 0; k < ranks; k++) mine[base + k] = mine[base - ranks + k] as number;
        if (receiving && r < attention)
          for (let f = 0; f < ffn; f++)
            join(
              mine,
              base,
              clocks[attention + f] as Int32Array,
              (uses[attention + f] as Uses).sends[r * codes + code] as number,
            );
        else if (receiving) {
          const a = local.events.peer[at] as number;
          join(mine, base, clocks[a] as Int32Array, (uses[a] as Uses).sends[code] as number);
        }
        mine[base + r] = (local.events.step[at] as number) + 1;
        left--;
        moved = true;
      }
      done[r] = at;
    }
  }
  if (left > 0) throw standstill(schedule, context, uses, done);
  return clocks;
};

const standstill = ({ programs }: Schedule, context: Context, uses: readonly Uses[], done: Int32Array): Rejected => {
  const { attention, ffn, slots } = context;
  const codes = slots * context.exchanges.length;
  const ranks = [...uses.keys()];
  /** for each rank that stands: the ranks it waits for, and their event that it needs */
  const blockers = ranks.map((r) => {
    const local = uses[r] as Uses;
    const at = done[r] as number;
    if (at >= local.events.count) return [];
    const code = local.events.code[at] as number;
    if (r >= attention)
      return [[local.events.peer[at] as number, (uses[local.events.peer[at] as number] as Uses).sends[code] as number] as const];
    return Array.from(
      { length: ffn },
      (_, f) => [attention + f, (uses[attention + f] as Uses).sends[r * codes + code] as number] as const,
    ).filter(([f, event]) => event >= (done[f] as number));
  });
  let best: (readonly [number, number])[] = [];
  for (const start of ranks) {
    // breadth first: the shortest way from a rank back to itself
    const queue: (readonly [number, number])[][] = (blockers[start] ?? []).map((b) => [b]);
    const seen = new Set<number>();
    for (let path = queue.shift(); path; path = queue.shift()) {
      const [at] = path.at(-1) as readonly [number, number];
      if (at === start) {
        if (best.length === 0 || path.length < best.length) best = path;
        break;
      }
      if (seen.has(at)) continue;
      seen.add(at);
      for (const b of blockers[at] ?? []) queue.push([...path, b]);
    }
  }
  const lines = best.map((_, i) => {
    const [from] = (best[i - 1] ?? best.at(-1)) as readonly [number, number];
    const [to, event] = best[i] as readonly [number, number];
    const standing = (uses[from] as Uses).events.step[done[from] as number] as number;
    const needed = (uses[to] as Uses).events.step[event] as number;
    return `${stepText(programs[from] as RankProgram, standing)} waits for ${stepText(programs[to] as RankProgram, needed)}`;
  });
  return new Rejected(
    "deadlock",
    lines.map((line, i) => (i + 1 < lines.length ? `${line}, which comes after` : `${line}, which comes after the first`)),
  );
};

/** Each pair of ranks sees posts and accepts in one order, replies and waits in one order, which transports with queues need. */
const sameOrder = ({ programs }: Schedule, context: Context, uses: readonly Uses[]): void => {
  const { attention, ffn } = context;
  const exchanges = context.exchanges.length;
  const list = (r: number, outgoing: 0 | 1, peer: number): number[] => {
    const l = uses[r] as Uses;
    const events: number[] = [];
    for (let at = 0; at < l.events.count; at++)
      if (l.events.outgoing[at] === outgoing && (peer < 0 || l.events.peer[at] === peer)) events.push(at);
    return events;
  };
  for (let a = 0; a < attention; a++) {
    const mine = [list(a, 1, -1), list(a, 0, -1)] as const;
    for (let f = 0; f < ffn; f++)
      for (const way of [0, 1] as const) {
        const theirs = list(attention + f, way, a);
        const [x, y] = [uses[a] as Uses, uses[attention + f] as Uses];
        for (let i = 0; i < theirs.length; i++) {
          const p = mine[way][i] as number;
          const q = theirs[i] as number;
          if (x.events.code[p] === y.events.code[q]) continue;
          const text = (code: number): string => `s${Math.floor(code / exchanges)} #${code % exchanges}`;
          throw new Rejected("order", [
            `${stepText(programs[a] as RankProgram, x.events.step[p] as number)} is number ${i} that a${a} ${way === 0 ? "sends to" : "takes from"} f${f}, and`,
            `${stepText(programs[attention + f] as RankProgram, y.events.step[q] as number)} is number ${i} on f${f}: ${text(x.events.code[p] as number)} against ${text(y.events.code[q] as number)}`,
          ]);
        }
      }
  }
};

/** An FFN rank reads what it accepted before the next push can overwrite it (K2), and rewrites a reply only once it has arrived (K6). */
const hazards = (
  { programs }: Schedule,
  context: Context,
  uses: readonly Uses[],
  clocks: readonly Int32Array[],
  r: number,
): Rejected | undefined => {
  const { attention, slots, fields, carries, pushes } = context;
  if (r < attention) return undefined;
  const ranks = uses.length;
  const exchanges = context.exchanges.length;
  const local = uses[r] as Uses;
  const program = programs[r] as RankProgram;
  for (let slot = 0; slot < slots; slot++)
    for (let n = 0; n < pushes; n++)
      for (let a = 0; a < attention; a++) {
        const peer = uses[a] as Uses;
        const clock = clocks[a] as Int32Array;
        // backwards: the next event of a that may overwrite the field; after the last exchange, the end of its round
        let next = peer.events.count - 1;
        let post = -1;
        for (let e = exchanges - 1; e >= 0; e--) {
          if (carries[e * fields.length + n] === 0) continue;
          const read = local.lastRead[(slot * exchanges + e) * fields.length + n] as number;
          if (read >= (local.settled[clock[next * ranks + r] as number] as number))
            return new Rejected("in flight", [
              `${stepText(program, read)} reads ${fields[n]?.name} of s${slot} #${e} from a${a}, and`,
              post < 0
                ? `a${a} may end the round, and post s${slot} again, before that`
                : `${stepText(programs[a] as RankProgram, post)} may overwrite it before that (K2)`,
            ]);
          next = peer.sends[slot * exchanges + e] as number;
          post = peer.events.step[next] as number;
        }
      }
  for (let i = 0; i < local.rewrites.length; i += 4) {
    const at = local.rewrites[i] as number;
    const before = local.rewrites[i + 1] as number;
    const code = local.rewrites[i + 2] as number;
    const e = local.rewrites[i + 3] as number;
    const slot = Math.floor(code / fields.length);
    for (let a = 0; a < attention; a++) {
      const seen = before === 0 ? 0 : ((clocks[r] as Int32Array)[(before - 1) * ranks + a] as number);
      const peer = uses[a] as Uses;
      const wait = e < 0 ? 0 : (peer.events.step[peer.receives[slot * exchanges + e] as number] as number);
      if (seen > wait) continue;
      return new Rejected("in flight", [
        `${stepText(program, at)} writes ${fields[code % fields.length]?.name} of s${slot}, and`,
        e < 0
          ? `nothing of this round from a${a} comes before that: its last round may still be fetching it (K6)`
          : `${stepText(programs[a] as RankProgram, wait)} may still be fetching it: nothing from a${a} after it comes before that (K6)`,
      ]);
    }
  }
  return undefined;
};

/** The certificate says exactly what was found: every clock, and an edge for every piece of memory that changes hands. */
const matchCertificate = (
  schedule: Schedule,
  certificate: Certificate,
  locals: readonly Local[],
  clocks: readonly Int32Array[],
): void => {
  const { programs } = schedule;
  const ranks = programs.length;
  const bad = (line: string): never => {
    throw new Rejected("certificate", [`certificate: ${line}`]);
  };
  const c = certificate as Partial<Certificate> | null;
  if (typeof c !== "object" || c === null || c.format !== 1 || !Array.isArray(c.clocks) || !Array.isArray(c.reuse))
    throw new Rejected("certificate", ["certificate: it is not well formed"]);
  if (c.schedule !== schedule.name || c.wire !== schedule.wire)
    bad(`it is of schedule ${String(c.schedule)}, wire ${String(c.wire).slice(0, 16)}`);
  for (const [r, program] of programs.entries()) {
    const { uses } = locals[r] as Local;
    const { first, last, order } = uses.accesses;
    const stated = certificate.clocks[r];
    const edges = certificate.reuse[r];
    const { steps, rank } = program;
    if (!stated || !edges || !Array.isArray(edges) || stated.length !== steps.length * ranks)
      throw new Rejected("certificate", [`certificate: it has no clocks or edges for the ${steps.length} steps of ${rank.name}`]);
    let event = 0;
    const now = new Int32Array(ranks);
    for (let at = 0; at < steps.length; at++) {
      if (event < uses.events.count && uses.events.step[event] === at) {
        for (let k = 0; k < ranks; k++) now[k] = (clocks[r] as Int32Array)[event * ranks + k] as number;
        event++;
      }
      now[r] = at + 1;
      for (let k = 0; k < ranks; k++)
        if (stated[at * ranks + k] !== now[k])
          bad(
            `${stepText(program, at)} comes after ${now[k]} steps of ${programs[k]?.rank.name}, and its clock says ${String(stated[at * ranks + k])}`,
          );
    }
    const name = (id: number): string => program.buffers[id]?.name ?? `buffer ${id}`;
    const claimed = new Set<number>();
    for (const edge of edges as readonly Reuse[]) {
      const [lastUse, firstWrite, earlier, later] = Array.isArray(edge) ? edge : ([] as unknown as Reuse);
      if (!isIndex(earlier, first.length) || !isIndex(later, first.length)) bad(`${rank.name}: an edge of unknown buffers`);
      if (last[earlier] !== lastUse || first[later] !== firstWrite || lastUse >= firstWrite)
        bad(
          `${rank.name}: ${name(earlier)}, used until step ${last[earlier]}, then ${name(later)}, from step ${first[later]}; the edge says ${lastUse}, ${firstWrite}`,
        );
      claimed.add(earlier * first.length + later);
    }
    for (const [earlier, later] of takesOf(program, order))
      if (!claimed.delete(earlier * first.length + later))
        bad(`${rank.name}: no edge says that ${name(later)} takes memory of ${name(earlier)}`);
    for (const edge of claimed)
      bad(
        `${rank.name}: ${name(edge % first.length)} takes no memory of ${name(Math.floor(edge / first.length))}, and an edge says so`,
      );
  }
};

const approve = (schedule: Schedule, certificate: Certificate, facts: CheckFacts, context: Context): Verdict => {
  const { programs, keys, slots, exchanges } = schedule;
  const steps = programs.reduce((n, p) => n + p.steps.length, 0);
  const edges = certificate.reuse.reduce((n, list) => n + list.length, 0);
  const wire =
    exchanges.length > 0 ? `, ${exchanges.length} exchanges on ${slots} slots, ${keys.length} keys` : `, ${slots} slots`;
  return {
    ok: true,
    summary: `${context.attention}A${context.ffn}F, ${steps} steps${wire}, ${edges} reuse edges: no deadlock, race or overrun`,
    proved: [
      "every exchange is posted, accepted, replied to and waited for once on each slot, with equal types and lengths (K3, K4, K5, K11)",
      "no rank waits for itself through others, in this round or the next: slots end as they start",
      "each pair of ranks sees its exchanges in one order",
      "what is sent is written before, and left alone until it has arrived (K1, K6); what is received is read before it is overwritten (K2)",
      "everything read was written, and no two buffers in use share memory",
      ...(facts.weights ? ["weights fill their file exactly"] : []),
      ...(facts.kv ? ["every state has its pages"] : []),
    ],
    unproved: [
      "that a kernel touches only its arguments, and of those only the rows it is given",
      "that the runtime executes the steps of a rank in order, and uses pages of one sequence in one slot only",
      "contracts of one transport or target: K7 to K9 (threads), K12 and K17 (numbers of ranks and keys), K13 to K16 (StepMesh itself)",
      ...(facts.weights ? [] : ["sizes of weights: no manifest was given"]),
      ...(facts.kv ? [] : ["sizes of states: no page geometry was given"]),
    ],
  };
};
