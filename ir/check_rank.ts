/** Part of the independent checker (check.ts): one rank alone. How its steps use slots and memory, and what is left to compare with others. */

import { Accesses, collision, type Layout, layOut, sameNames } from "./check_memory.ts";
import { type CheckRule, type Context, isIndex, type Partner, Rejected, stepText } from "./check_wire.ts";
import { headerBytes, type RankProgram, type Step } from "./schedule.ts";

/** How the steps of one rank use slots and buffers, wherever the buffers lie. */
export interface Uses {
  /** slots or exchanges are misused: nothing below is meaningful */
  readonly protocol: Rejected | undefined;
  /** communication steps in order: step, slot * exchanges + exchange, peer (-1: all), whether it sends */
  readonly events: Events;
  /** attention: events by code; FFN: by attention rank * slots * exchanges + code */
  readonly sends: Int32Array;
  readonly receives: Int32Array;
  /** FFN: code * fields + field -> last step that reads what this exchange brought, -1 when none does */
  readonly lastRead: Int32Array;
  /** FFN: groups of four: a launch that rewrites what it replies with, events before it, slot * fields + field, exchange last replied to (-1: none) */
  readonly rewrites: readonly number[];
  /**
   * FFN, by number n of steps: when step n - 1 is a reply, the steps whose launches are done when it arrives. Launches run in order on the
   * device, and a reply waits for one of them, not for those behind it.
   */
  readonly settled: Int32Array;
  /** what launches do to buffers, and the first misuse of one */
  readonly accesses: Accesses;
}

/** What one rank shows by itself. */
export interface Local {
  readonly uses: Uses;
  /** the first misuse of memory, places included */
  readonly memory: Rejected | undefined;
}

/** What is known of programs, and of arrays by rank, seen before; entries go when those do. */
export class Memory {
  readonly programs: WeakMap<RankProgram, { readonly context: Context; readonly local: Local }> = new WeakMap();
  readonly layouts: WeakMap<RankProgram["buffers"], Map<string, Layout>> = new WeakMap();
  readonly uses: WeakMap<RankProgram["steps"], Map<string, { readonly layout: Layout; readonly uses: Uses }>> = new WeakMap();
}

/** Examines one rank; throws a Rejected for what is not well formed. Equal parts of programs seen before are not examined again. */
export const examine = (program: RankProgram, context: Context, memory: Memory): Local => {
  const { rank, buffers, steps } = program;
  const known = memory.programs.get(program);
  if (known?.context === context) return known.local;
  const layouts = memory.layouts.get(buffers) ?? new Map<string, Layout>();
  memory.layouts.set(buffers, layouts);
  const seen = memory.uses.get(steps) ?? new Map<string, { layout: Layout; uses: Uses }>();
  memory.uses.set(steps, seen);
  const before = seen.get(rank.name);
  const alike = before?.layout.context === context && sameNames(before.layout.buffers, buffers) ? before : undefined;
  let layout = layouts.get(rank.name);
  if (layout?.context !== context || layout.memory !== program.memory) {
    layout = layOut(program, context, alike?.layout);
    layouts.set(rank.name, layout);
  }
  const side = rank.role === "attention" ? examineAttention : examineFfn;
  const uses = alike?.uses ?? side(program, context, layout);
  if (!alike) seen.set(rank.name, { layout, uses });
  const { protocol, accesses } = uses;
  const local: Local = { uses, memory: protocol ? undefined : (accesses.misuse ?? collision(program, accesses)) };
  memory.programs.set(program, { context, local });
  return local;
};

/** Communication steps in order. */
class Events {
  count = 0;
  readonly step: Int32Array;
  readonly code: Int32Array;
  readonly peer: Int32Array;
  readonly outgoing: Uint8Array;
  constructor(most: number) {
    this.step = new Int32Array(most);
    this.code = new Int32Array(most);
    this.peer = new Int32Array(most);
    this.outgoing = new Uint8Array(most);
  }
  add(step: number, code: number, peer: number, outgoing: 0 | 1): number {
    const n = this.count++;
    this.step[n] = step;
    this.code[n] = code;
    this.peer[n] = peer;
    this.outgoing[n] = outgoing;
    return n;
  }
}

const table = (length: number): Int32Array => new Int32Array(length).fill(-1);

/** Attention slot: free, posted, free. What it sends is written anew, and left alone until the wait. */
const examineAttention = (program: RankProgram, context: Context, layout: Layout): Uses => {
  const { steps, rank, buffers } = program;
  const { slots, fields, carries, head, pushes, ffn } = context;
  const width = fields.length;
  const exchanges = context.exchanges.length;
  const accesses = new Accesses(program, layout);
  const events = new Events(steps.length);
  const [sends, receives] = [table(slots * exchanges), table(slots * exchanges)];
  const posted = table(slots); // exchange under way
  const postedAt = table(slots);
  const next = new Int32Array(slots);
  // by slot * width + field
  const written = table(slots * width); // last write since the last post that carried it
  const arrived = table(slots * width); // exchange that brought it
  const lastRead = table(slots * width);

  const uses = (protocol?: Rejected): Uses => {
    const none = { lastRead: empty, rewrites: [], settled: empty };
    return { protocol, events, sends, receives, accesses, ...none };
  };
  const reject = (rule: CheckRule, lines: readonly string[], partner?: Partner): Uses => uses(new Rejected(rule, lines, partner));
  const text = (at: number): string => stepText(program, at);
  const isCarried = (slot: number, n: number): boolean =>
    (posted[slot] as number) >= 0 && carries[(posted[slot] as number) * width + n] === 1;

  const read = (id: number, at: number, slot: number): void => {
    const wire = layout.wires[id];
    const n = wire ? wire.code % width : head;
    if (!wire || (wire.own && n !== head)) accesses.read(id, at);
    accesses.last[id] = at;
    if (!wire || wire.own) return;
    lastRead[wire.code] = at;
    const what = `reads ${buffers[id]?.name}`;
    if (isCarried(slot, n))
      accesses.blame("in flight", at, what, `${text(postedAt[slot] as number)} lets peers write it, and no wait comes between`);
    else if ((arrived[wire.code] as number) < 0) accesses.blame("unwritten", at, `${what}, which no exchange has filled yet`);
  };
  const write = (id: number, at: number, slot: number): void => {
    const wire = layout.wires[id];
    accesses.write(id, at);
    if (!wire) return;
    const n = wire.code % width;
    const what = `writes ${buffers[id]?.name}`;
    if (!wire.own || n === head) accesses.blame("memory", at, `${what}, which ${wire.own ? "the runtime" : "a peer"} writes`);
    if (isCarried(slot, n))
      accesses.blame(
        "in flight",
        at,
        what,
        `${text(postedAt[slot] as number)} still sends it, and no wait comes between (K1, K5)`,
      );
    written[wire.code] = at;
  };
  const isHeader = (id: number): boolean => {
    const wire = layout.wires[id];
    const b = buffers[id];
    return wire ? wire.code % width === head : exchanges === 0 && b?.region === "input" && b.bytes === headerBytes;
  };
  const nextOf = (slot: number, says: string): Partner | undefined =>
    ffn === 0 ? undefined : { rank: "f0", op: "accept", slot, exchange: next[slot] as number, peer: rank.index, says };

  /** what the post sends is written, what it lets peers overwrite is read */
  const post = (step: Step & { op: "post" }, at: number): void => {
    accesses.leaves(step, at);
    const { slot, exchange } = step;
    for (let n = 0; n < width; n++) {
      if (n === head || carries[exchange * width + n] === 0) continue;
      const c = slot * width + n;
      const name = fields[n]?.name as string;
      if (n < pushes) {
        accesses.carries(step, at, name, written[c] as number);
        written[c] = -1;
      } else if ((lastRead[c] as number) > step.after)
        accesses.blame(
          "in flight",
          at,
          `starts after step ${step.after} and lets peers overwrite ${name}`,
          `${text(lastRead[c] as number)} may not have read it yet`,
        );
    }
  };

  for (let at = 0; at < steps.length; at++) {
    const step = steps[at] as Step;
    const { slot } = step;
    if (step.op === "launch") {
      accesses.launch(step, at, slots, read, write);
      if (!isHeader(accesses.find(step.rows, slot, at)))
        accesses.blame("memory", at, `takes its rows from ${step.rows}, no header`);
      continue;
    }
    if (step.op !== "post" && step.op !== "wait") throw new Rejected("exchange", [`${text(at)} on an attention rank`]);
    if (!isIndex(slot, slots)) return reject("slot", [`${text(at)}: there are ${slots} slots`]);
    const e = step.exchange;
    if (!isIndex(e, exchanges))
      return reject("exchange", [`${text(at)}: a slot has ${exchanges} exchanges, and no FFN rank takes part in this one`]);
    const code = slot * exchanges + e;
    const busy = posted[slot] as number;
    const since = postedAt[slot] as number;
    if (step.op === "wait") {
      if (busy < 0) return reject("slot", [`${text(at)}: nothing is posted on s${slot}, so nothing fills it`]);
      if (busy !== e) return reject("slot", [`${text(since)} is under way, and`, `${text(at)}: nothing fills that one`]);
      posted[slot] = -1;
      for (let n = pushes; n < width; n++) if (carries[e * width + n] === 1) arrived[slot * width + n] = e;
      receives[code] = events.add(at, code, -1, 0);
      continue;
    }
    if (busy >= 0)
      return reject("slot", [`${text(since)} and`, `${text(at)}: s${slot} is posted again, and no wait comes between`]);
    if (e !== next[slot]) {
      const says = `is the next that f0 takes from ${rank.name} on s${slot}`;
      return reject("exchange", [`${text(at)}: #${next[slot]} is due on s${slot}`], nextOf(slot, says));
    }
    const type = context.exchanges[e];
    if (step.type !== type) return reject("exchange", [`${text(at)}: exchange #${e} has the type ${type}`]);
    post(step, at);
    posted[slot] = e;
    postedAt[slot] = at;
    next[slot] = e + 1;
    sends[code] = events.add(at, code, -1, 1);
  }
  for (let slot = 0; slot < slots; slot++) {
    if ((posted[slot] as number) >= 0)
      return reject("slot", [`${text(postedAt[slot] as number)} is never waited for: s${slot} does not end free`]);
    if ((next[slot] as number) === exchanges) continue;
    const line = `${rank.name} ends after ${next[slot]} of the ${exchanges} exchanges of s${slot}`;
    return reject("exchange", [line], nextOf(slot, "is filled by nothing"));
  }
  accesses.finish();
  return uses();
};

const empty: Int32Array = new Int32Array(0);

/** FFN slot: empty, accepted from every attention rank, replied to every one, empty. */
const examineFfn = (program: RankProgram, context: Context, layout: Layout): Uses => {
  const { steps, rank, buffers } = program;
  const { slots, fields, carries, head, pushes, attention } = context;
  const width = fields.length;
  const exchanges = context.exchanges.length;
  const codes = slots * exchanges;
  const accesses = new Accesses(program, layout);
  const events = new Events(steps.length);
  const [sends, receives] = [table(attention * codes), table(attention * codes)];
  const next = new Int32Array(slots); // exchange under way, or due
  const accepted = new Int32Array(slots);
  const replied = new Int32Array(slots);
  // by slot * width + field
  const version = table(slots * width); // exchange that filled it
  const written = table(slots * width); // last write since the last reply that carried it
  const sent = table(slots * width); // last write of what the exchange under way replies with
  const lastReplied = table(slots * width); // exchange
  const lastRead = table(codes * width);
  const rewrites: number[] = [];
  const settled = new Int32Array(steps.length + 1);

  const uses = (protocol?: Rejected): Uses => ({ protocol, events, sends, receives, lastRead, rewrites, settled, accesses });
  const reject = (rule: CheckRule, lines: readonly string[], partner?: Partner): Uses => uses(new Rejected(rule, lines, partner));
  const text = (at: number): string => stepText(program, at);
  /** the first attention rank without an entry for the exchange under way */
  const lacking = (slot: number, entries: Int32Array): number => {
    let a = 0;
    while (a < attention && entries[a * codes + slot * exchanges + (next[slot] as number)] !== -1) a++;
    return a;
  };
  const waits = (slot: number, a: number): Partner => {
    const says = "waits for that reply forever";
    return { rank: `a${a}`, op: "wait", slot, exchange: next[slot] as number, says };
  };
  const posts = (slot: number, exchange: number, a: number, says: string): Partner => ({
    rank: `a${a}`,
    op: "post",
    slot,
    exchange,
    says,
  });

  const read = (id: number, at: number, slot: number): void => {
    const wire = layout.wires[id];
    if (!wire || wire.own) {
      accesses.read(id, at);
      return;
    }
    accesses.last[id] = at;
    const n = wire.code % width;
    const e = next[slot] as number;
    const what = `reads ${buffers[id]?.name}`;
    const partly = (accepted[slot] as number) > 0 && (accepted[slot] as number) < attention;
    const filled = version[wire.code] as number;
    if (partly && carries[e * width + n] === 1)
      accesses.blame("unwritten", at, `${what} of s${slot} #${e}, not yet accepted from a${lacking(slot, receives)}`);
    else if (filled < 0) accesses.blame("unwritten", at, `${what}, which no exchange has filled yet`);
    else lastRead[(slot * exchanges + filled) * width + n] = at;
  };
  const write = (id: number, at: number): void => {
    const wire = layout.wires[id];
    accesses.write(id, at);
    if (!wire) return;
    if (!wire.own) accesses.blame("memory", at, `writes ${buffers[id]?.name}, which a peer writes`);
    if ((written[wire.code] as number) < 0) rewrites.push(at, events.count, wire.code, lastReplied[wire.code] as number);
    written[wire.code] = at;
  };

  const accept = (step: Step & { op: "accept" }, at: number): Uses | undefined => {
    const { slot, exchange: e, from } = step;
    const due = next[slot] as number;
    const code = slot * exchanges + e;
    if (e !== due) {
      if (due === exchanges)
        return reject("exchange", [`${text(at)}: s${slot} has had its exchanges, nothing fills this one again`]);
      if (accepted[slot] === attention) {
        const a = lacking(slot, sends);
        return reject("exchange", [`${text(at)}, and s${slot} #${due} has no reply to a${a}`], waits(slot, a));
      }
      const a = (accepted[slot] as number) > 0 ? lacking(slot, receives) : from;
      const again = e < due ? ", and nothing fills this one again" : "";
      const partner = posts(slot, due, a, `is not accepted by ${rank.name} before it`);
      return reject("exchange", [`${text(at)}: s${slot} #${due} from a${a} is due first${again}`], partner);
    }
    if (receives[from * codes + code] !== -1)
      return reject("exchange", [`${text(at)}: it was accepted already, and nothing fills it again`]);
    receives[from * codes + code] = events.add(at, code, from, 0);
    accepted[slot] = (accepted[slot] as number) + 1;
    if (accepted[slot] === attention)
      for (let n = 0; n < pushes; n++) if (carries[e * width + n] === 1) version[slot * width + n] = e;
    return undefined;
  };

  const reply = (step: Step & { op: "reply" }, at: number): Uses | undefined => {
    const { slot, exchange: e, to, after } = step;
    const due = next[slot] as number;
    const code = slot * exchanges + e;
    if (e !== due || accepted[slot] !== attention) {
      const a = e === due ? lacking(slot, receives) : to;
      const partner = posts(slot, e, a, `fills that slot${e === due ? "" : `, where #${due} is due`}`);
      return reject("exchange", [`${text(at)}, and s${slot} #${e} was not accepted from a${a}`], partner);
    }
    if (sends[to * codes + code] !== -1) return reject("exchange", [`${text(at)}: a${to} has its reply already`]);
    accesses.leaves(step, at);
    for (let n = pushes; n < width; n++) {
      if (carries[e * width + n] === 0) continue;
      const c = slot * width + n;
      if (replied[slot] === 0) {
        sent[c] = written[c] as number;
        written[c] = -1;
        lastReplied[c] = e;
      }
      accesses.carries(step, at, fields[n]?.name as string, sent[c] as number);
    }
    sends[to * codes + code] = events.add(at, code, to, 1);
    settled[at + 1] = after + 1;
    replied[slot] = (replied[slot] as number) + 1;
    if (replied[slot] === attention) {
      next[slot] = e + 1;
      accepted[slot] = 0;
      replied[slot] = 0;
    }
    return undefined;
  };

  for (let at = 0; at < steps.length; at++) {
    const step = steps[at] as Step;
    const { slot } = step;
    if (step.op === "launch") {
      accesses.launch(step, at, slots, read, write);
      const rows = accesses.find(step.rows, slot, at);
      const wire = layout.wires[rows];
      if (wire && wire.code % width === head) read(rows, at, slot);
      else accesses.blame("memory", at, `takes its rows from ${step.rows}, no header`);
      continue;
    }
    if (step.op !== "accept" && step.op !== "reply") throw new Rejected("exchange", [`${text(at)} on an FFN rank`]);
    if (!isIndex(slot, slots)) return reject("slot", [`${text(at)}: there are ${slots} slots`]);
    const a = step.op === "accept" ? step.from : step.to;
    if (!isIndex(a, attention)) return reject("exchange", [`${text(at)}: there are ${attention} attention ranks`]);
    if (!isIndex(step.exchange, exchanges))
      return reject("exchange", [`${text(at)}: a slot has ${exchanges} exchanges, and nothing fills this one`]);
    const wrong = step.op === "accept" ? accept(step, at) : reply(step, at);
    if (wrong) return wrong;
  }
  for (let slot = 0; slot < slots; slot++) {
    const e = next[slot] as number;
    if (e === exchanges) continue;
    const busy = (accepted[slot] as number) > 0;
    const a = busy ? lacking(slot, accepted[slot] === attention ? sends : receives) : 0;
    const line = busy ? `s${slot} #${e} has no reply to a${a}` : `takes ${e} of the ${exchanges} exchanges of s${slot}`;
    return reject("exchange", [`${rank.name} ends, and ${line}`], waits(slot, a));
  }
  accesses.finish();
  return uses();
};
