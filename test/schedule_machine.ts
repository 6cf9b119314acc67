/**
 * Runs a small schedule on an imaginary machine: byte by byte memory, launches that queue up, messages that travel piece by piece and in any
 * order, ranks that proceed in any order, two rounds without a pause between. Every byte knows which content it holds, so that a wrong
 * interleaving shows as a wrong result, a read of nothing, a race, or a standstill. It shares nothing with the checker.
 */
import type { Buffer, RankProgram, Schedule, Step } from "../ir/schedule.ts";

/** What the host finds in the outputs, by round, rank and buffer; or what went wrong. */
export type Outcome = { readonly outputs: string } | { readonly fault: string };

class Fault extends Error {}
/** Memory is looked at four bytes at a time. */
const cell = (bytes: number): number => Math.ceil(bytes / 4);

const fault = (what: string): never => {
  throw new Fault(what);
};

type Launch = Step & { op: "launch" };

interface Message {
  readonly from: Rank;
  readonly to: Rank;
  /** pieces: copy `bytes` from one place to another */
  readonly pieces: {
    readonly source: Buffer;
    readonly target: Buffer;
    readonly read: number;
    readonly write: number;
    readonly bytes: number;
  }[];
  /** launches of the sender that must be done */
  readonly after: number;
  done: number;
  arrived(): void;
}

interface Rank {
  readonly program: RankProgram;
  readonly byName: ReadonlyMap<string, Buffer>;
  readonly memory: Record<Buffer["region"], Int32Array>;
  /** KV contents by state and slot: rows of one sequence are in one slot */
  readonly kv: Map<string, number>;
  round: number;
  at: number;
  /** launches handed to the device and not done, oldest first */
  readonly queue: { readonly step: Launch; readonly number: number }[];
  issued: number;
  completed: number;
  /** number, counted from 1, of the launch at each step of this round */
  readonly numbers: Map<number, number>;
  readonly outputs: string[];
}

/** A source of random numbers in [0, 1): mulberry32. */
export const randomOf = (seed: number): (() => number) => {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
};

/** Contents are numbers; equal descriptions are equal numbers. Shared by the runs that are compared. */
export class Contents {
  private readonly known = new Map<string, number>();
  of(description: string): number {
    const n = this.known.get(description) ?? this.known.size + 1;
    this.known.set(description, n);
    return n;
  }
}

/** Runs `rounds` rounds of a schedule in one random interleaving. */
export const run = (schedule: Schedule, contents: Contents, seed: number, rounds = 2): Outcome => {
  try {
    return { outputs: new Machine(schedule, contents, randomOf(seed)).run(rounds) };
  } catch (error) {
    if (error instanceof Fault) return { fault: error.message };
    throw error;
  }
};

class Machine {
  private readonly ranks: Rank[];
  private readonly messages: Message[] = [];
  /** `a f slot` -> sequence number arrived; `f a slot` likewise */
  private readonly arrived = new Map<string, number>();
  private readonly acknowledged = new Map<string, number>();
  /** slots of attention ranks that are posted: exchange */
  private readonly posted = new Map<string, number>();
  private readonly taken = new Map<string, number>();
  private readonly sends = new Map<string, string[]>();
  private readonly receives = new Map<string, string[]>();
  private readonly schedule: Schedule;
  private readonly contents: Contents;
  private readonly random: () => number;

  constructor(schedule: Schedule, contents: Contents, random: () => number) {
    this.schedule = schedule;
    this.contents = contents;
    this.random = random;
    this.ranks = schedule.programs.map((program): Rank => {
      const space = (region: Buffer["region"]): Int32Array => new Int32Array(cell(program.memory[region]));
      const rank: Rank = {
        program,
        byName: new Map(program.buffers.map((b) => [b.name, b])),
        memory: {
          weights: space("weights"),
          state: space("state"),
          exchange: space("exchange"),
          scratch: space("scratch"),
          input: space("input"),
          output: space("output"),
        },
        kv: new Map(),
        round: 0,
        at: 0,
        queue: [],
        issued: 0,
        completed: 0,
        numbers: new Map(),
        outputs: [],
      };
      for (const b of program.buffers)
        if (b.region === "weights" || b.region === "state") this.fill(rank, b, contents.of(`${b.region} ${b.binds}`), 0, b.bytes);
      return rank;
    });
  }

  run(rounds: number): string {
    // some runs have a slow network, others a slow device, others a slow rank
    const slow = new Map<string, number>();
    const weight = (what: string): number => {
      const w = slow.get(what) ?? (this.random() < 0.3 ? 0.01 : this.random());
      slow.set(what, w);
      return w;
    };
    for (const rank of this.ranks) this.begin(rank);
    for (;;) {
      const actions: { readonly weight: number; act(): void }[] = [];
      for (const rank of this.ranks) {
        const name = rank.program.rank.name;
        if (this.ready(rank, rounds)) actions.push({ weight: weight(`host ${name}`), act: () => this.step(rank, rounds) });
        if (rank.queue.length > 0) actions.push({ weight: weight(`device ${name}`), act: () => this.execute(rank) });
      }
      for (const m of this.messages)
        if (m.from.completed >= m.after)
          actions.push({
            weight: weight(`net ${m.from.program.rank.name} ${m.to.program.rank.name}`),
            act: () => this.travel(m),
          });
      if (actions.length === 0) break;
      let pick = this.random() * actions.reduce((sum, a) => sum + a.weight, 0);
      for (const a of actions) {
        pick -= a.weight;
        if (pick > 0 && a !== actions.at(-1)) continue;
        a.act();
        break;
      }
    }
    for (const rank of this.ranks)
      if (rank.round < rounds) fault(`${rank.program.rank.name} stands at step ${rank.at} of round ${rank.round}`);
    for (const [slot] of this.posted) fault(`slot ${slot} is not free at the end`);
    for (const [key, list] of this.sends)
      if (list.join() !== (this.receives.get(key) ?? []).join()) fault(`${key}: sent and received in different orders`);
    const exchanges = this.schedule.exchanges.length * this.schedule.slots * rounds;
    for (const list of this.sends.values()) if (list.length !== exchanges) fault(`${list.length} of ${exchanges} exchanges`);
    return this.ranks.map((r) => r.outputs.join("\n")).join("\n\n");
  }

  private begin(rank: Rank): void {
    rank.at = 0;
    rank.numbers.clear();
    if (rank.program.rank.role !== "attention") return;
    for (const b of rank.program.buffers) {
      const host = b.region === "input" || (b.region === "exchange" && b.name.startsWith("head"));
      if (host)
        this.fill(
          rank,
          b,
          this.contents.of(`input ${b.binds ?? "head"} s${b.slot} round ${rank.round} ${rank.program.rank.name}`),
          0,
          b.bytes,
        );
    }
  }

  /** Whether the host of a rank can take its next step. */
  private ready(rank: Rank, rounds: number): boolean {
    if (rank.round >= rounds) return false;
    const { steps } = rank.program;
    if (rank.at >= steps.length) return rank.queue.length === 0;
    const step = steps[rank.at] as Step;
    if (step.op === "launch" || step.op === "post" || step.op === "reply") return true;
    const name = rank.program.rank.name;
    const sequence = this.sequence(rank, step.exchange);
    if (step.op === "accept") return (this.arrived.get(`a${step.from} ${name} ${step.slot}`) ?? 0) >= sequence;
    return this.side("ffn").every(
      (f) =>
        (this.arrived.get(`${f.program.rank.name} ${name} ${step.slot}`) ?? 0) >= sequence &&
        (this.acknowledged.get(`${name} ${f.program.rank.name} ${step.slot}`) ?? 0) >= sequence,
    );
  }

  private side(role: "attention" | "ffn"): Rank[] {
    return this.ranks.filter((r) => r.program.rank.role === role);
  }

  private sequence(rank: Rank, exchange: number): number {
    return rank.round * this.schedule.exchanges.length + exchange + 1;
  }

  private step(rank: Rank, rounds: number): void {
    const { steps, rank: self } = rank.program;
    if (rank.at >= steps.length) {
      for (const b of rank.program.buffers)
        if (b.region === "output") rank.outputs.push(`${self.name} ${b.name}: ${this.contentsOf(rank, b).join(" ")}`);
      rank.round++;
      if (rank.round < rounds) this.begin(rank);
      return;
    }
    const at = rank.at++;
    const step = steps[at] as Step;
    if (step.op === "launch") {
      rank.issued++;
      rank.numbers.set(at, rank.issued);
      rank.queue.push({ step, number: rank.issued });
      return;
    }
    const { slot, exchange } = step;
    const sequence = this.sequence(rank, exchange);
    const log = (map: Map<string, string[]>, from: string, to: string): void => {
      map.set(`${from} to ${to}`, [...(map.get(`${from} to ${to}`) ?? []), `s${slot} ${sequence}`]);
    };
    if (step.op === "post") {
      if (this.posted.has(`${self.name} ${slot}`)) fault(`${self.name} posts s${slot} again`);
      if (step.type !== this.schedule.exchanges[exchange]) fault(`${self.name} posts ${step.type}`);
      this.posted.set(`${self.name} ${slot}`, exchange);
      for (const f of this.side("ffn")) {
        log(this.sends, self.name, f.program.rank.name);
        this.send(rank, f, "a2f", slot, exchange, rank.numbers.get(step.after), () => {
          this.arrived.set(`${self.name} ${f.program.rank.name} ${slot}`, sequence);
          this.acknowledged.set(`${self.name} ${f.program.rank.name} ${slot}`, sequence);
        });
      }
    } else if (step.op === "wait") {
      if (this.posted.get(`${self.name} ${slot}`) !== exchange)
        fault(`${self.name} waits for s${slot} #${exchange}, which is not posted`);
      this.posted.delete(`${self.name} ${slot}`);
      for (const f of this.side("ffn")) log(this.receives, f.program.rank.name, self.name);
    } else if (step.op === "accept") {
      const key = `${self.name} a${step.from} ${slot}`;
      if (this.arrived.get(`a${step.from} ${self.name} ${slot}`) !== sequence)
        fault(`${self.name} accepts s${slot} #${exchange} too late`);
      if (this.taken.has(key)) fault(`${self.name} accepts s${slot} from a${step.from} twice`);
      this.taken.set(key, exchange);
      log(this.receives, `a${step.from}`, self.name);
    } else {
      const key = `${self.name} a${step.to} ${slot}`;
      if (this.taken.get(key) !== exchange)
        fault(`${self.name} replies to s${slot} #${exchange} of a${step.to}, which it did not accept`);
      this.taken.delete(key);
      log(this.sends, self.name, `a${step.to}`);
      const to = this.ranks.find((r) => r.program.rank.name === `a${step.to}`) as Rank;
      this.send(rank, to, "f2a", slot, exchange, rank.numbers.get(step.after), () => {
        this.arrived.set(`${self.name} a${step.to} ${slot}`, sequence);
      });
    }
  }

  private send(
    from: Rank,
    to: Rank,
    direction: "a2f" | "f2a",
    slot: number,
    exchange: number,
    after: number | undefined,
    arrived: () => void,
  ): void {
    if (after === undefined) throw new Fault(`${from.program.rank.name} sends after a launch that it has not issued`);
    const a = direction === "a2f" ? from : to;
    const f = direction === "a2f" ? to : from;
    const type = this.schedule.types.find((t) => t.name === this.schedule.exchanges[exchange]);
    const fields = (direction === "a2f" ? type?.push : type?.pull) ?? [];
    const pieces: Message["pieces"] = [];
    for (const field of fields) {
      const key = this.schedule.keys.find(
        (k) =>
          k.direction === direction &&
          k.a === a.program.rank.index &&
          k.f === f.program.rank.index &&
          k.slot === slot &&
          k.field === field.name,
      );
      if (!key) throw new Fault(`${field.name} has no key`);
      const source = from.byName.get(key.source);
      const target = to.byName.get(key.target);
      if (!source || !target) throw new Fault(`key ${key.key} names no buffer`);
      const segment = (b: Buffer, rank: Rank): number => (rank === f ? a.program.rank.index : 0) * (b.bytes / b.segments);
      if (source.bytes / source.segments !== field.bytes || target.bytes / target.segments !== field.bytes)
        fault(`lengths of ${field.name} differ`);
      const half = Math.floor(field.bytes / 8) * 4;
      for (const [start, bytes] of [
        [0, half],
        [half, field.bytes - half],
      ] as const)
        pieces.push({ source, target, read: segment(source, from) + start, write: segment(target, to) + start, bytes });
    }
    this.messages.push({ from, to, pieces, after, done: 0, arrived });
  }

  private travel(m: Message): void {
    const piece = m.pieces[m.done++] as Message["pieces"][number];
    const from = m.from.memory[piece.source.region];
    const to = m.to.memory[piece.target.region];
    const start = piece.source.offset + piece.read;
    to.set(from.subarray(cell(start), cell(start + piece.bytes)), cell(piece.target.offset + piece.write));
    if (m.done < m.pieces.length) return;
    this.messages.splice(this.messages.indexOf(m), 1);
    m.arrived();
  }

  private execute(rank: Rank): void {
    const { step, number } = rank.queue.shift() as Rank["queue"][number];
    // a kernel may write its results before it has read all of its operands
    for (const name of step.out) {
      const b = this.buffer(rank, name);
      this.fill(rank, b, 0, 0, b.bytes);
    }
    const read = [step.rows, ...step.in, ...(step.inout ?? [])].map((name) => {
      const b = this.buffer(rank, name);
      if (b.region === "state") return `${this.contentsOf(rank, b).join(" ")} ${rank.kv.get(`${name} ${step.slot}`) ?? ""}`;
      for (const m of this.messages)
        if (m.to === rank && m.pieces.some((p, i) => i >= m.done && p.target === b))
          fault(`${rank.program.rank.name} reads ${name} while it arrives`);
      return this.contentsOf(rank, b).join(" ");
    });
    for (const [i, name] of [...step.out, ...(step.inout ?? [])].entries()) {
      const b = this.buffer(rank, name);
      const result = `${step.kernel} result ${i} of ${read.join(", ")}`;
      if (b.region === "state") {
        rank.kv.set(`${name} ${step.slot}`, this.contents.of(result));
        continue;
      }
      if (b.region !== "scratch" && b.region !== "exchange" && b.region !== "output")
        fault(`${rank.program.rank.name} writes ${name}`);
      for (const m of this.messages)
        if (
          (m.from === rank && number > m.after && m.pieces.some((p, k) => k >= m.done && p.source === b)) ||
          (m.to === rank && m.pieces.some((p) => p.target === b))
        )
          fault(`${rank.program.rank.name} writes ${name} while it travels`);
      const bytes = b.bytes / b.segments;
      for (let s = 0; s < b.segments; s++) this.fill(rank, b, this.contents.of(`${result}, segment ${s}`), s * bytes, bytes);
    }
    rank.completed = number;
  }

  private buffer(rank: Rank, name: string): Buffer {
    return rank.byName.get(name) ?? fault(`${rank.program.rank.name} has no ${name}`);
  }

  private fill(rank: Rank, b: Buffer, content: number, start: number, bytes: number): void {
    const memory = rank.memory[b.region];
    if (cell(b.offset + start + bytes) > memory.length) fault(`${b.name} is outside of its region`);
    memory.fill(content, cell(b.offset + start), cell(b.offset + start + bytes));
  }

  /** The content of each segment; a segment of several contents, or of none, is a fault. */
  private contentsOf(rank: Rank, b: Buffer): number[] {
    const memory = rank.memory[b.region];
    const bytes = b.bytes / b.segments;
    return Array.from({ length: b.segments }, (_, s) => {
      const start = cell(b.offset + s * bytes);
      const end = cell(b.offset + (s + 1) * bytes);
      const first = memory[start] as number;
      if (!first) fault(`${rank.program.rank.name} reads ${b.name}, which holds nothing`);
      for (let i = start + 1; i < end; i++)
        if (memory[i] !== first) fault(`${rank.program.rank.name} reads ${b.name}, which holds several things`);
      return first;
    });
  }
}
