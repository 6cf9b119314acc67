/**
 * The independent checker of schedules. It knows the language of schedules and the contracts of the exchange (slots are memory plus a
 * notification, K1 to K17), and nothing of how schedules are made. It reads a schedule, its certificate and a few facts of the manifest,
 * trusts none of them, and costs O((steps + reuse edges) * ranks).
 */
import type { Manifest } from "./bundle.ts";
import { type Dim, evalDim } from "./dim.ts";
import { type Buffer, type Field, headerBytes, type RankProgram, type Schedule, type Step } from "./schedule.ts";
import { dtypeBytes, dtypes } from "./type.ts";

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

/** What a rejected schedule breaks. */
export type CheckRule =
  | "form"
  | "keys"
  | "length"
  | "slot"
  | "exchange"
  | "deadlock"
  | "order"
  | "unwritten"
  | "in flight"
  | "overlap"
  | "memory"
  | "weights"
  | "state"
  | "certificate";

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
  let last: { readonly schedule: Schedule; readonly context: Context } | undefined;
  return (schedule, certificate, facts = {}) => {
    try {
      const context = last && sameWire(last.schedule, schedule) ? last.context : readContext(schedule);
      last = { schedule, context };
      const locals = schedule.programs.map((program) => examine(program, context, memory));
      return judge(schedule, certificate, facts, context, locals, memory);
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

/** A step of another rank that makes a counter-example complete; looked up when the rejection is printed. */
interface Partner {
  readonly rank: string;
  readonly op: Step["op"];
  readonly slot: number;
  readonly exchange: number;
  readonly peer?: number;
  readonly says: string;
}

class Rejected extends Error {
  readonly rule: CheckRule;
  readonly lines: readonly string[];
  readonly partner: Partner | undefined;
  constructor(rule: CheckRule, lines: readonly string[], partner?: Partner) {
    super(lines[0]);
    this.rule = rule;
    this.lines = lines;
    this.partner = partner;
  }
}

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

/** The one with the fewest lines; the earliest rank among equals. */
const shortest = (found: readonly (Rejected | undefined)[]): Rejected | undefined => {
  let best: Rejected | undefined;
  for (const r of found) if (r && (!best || r.lines.length < best.lines.length)) best = r;
  return best;
};

const peerOf = (s: Step): number | undefined => (s.op === "accept" ? s.from : s.op === "reply" ? s.to : undefined);

const stepText = ({ rank, steps }: RankProgram, at: number): string => {
  const s = steps[at] as Step;
  const what = (): string => {
    switch (s.op) {
      case "launch":
        return `launch ${s.kernel} s${s.slot}`;
      case "post":
        return `post s${s.slot} ${s.type} #${s.exchange}`;
      case "wait":
        return `wait s${s.slot} #${s.exchange}`;
      case "accept":
        return `accept s${s.slot} #${s.exchange} from a${s.from}`;
      case "reply":
        return `reply s${s.slot} #${s.exchange} to a${s.to}`;
      default:
        return "a step of an unknown kind";
    }
  };
  return `${rank.name} step ${at}: ${what()}`;
};

const placeText = (b: Buffer): string => `${b.name} (${b.region} ${b.offset}..${b.offset + b.bytes})`;

// --- the wire: exchanges, fields, keys ---------------------------------------------------------------------------------------------

/** What a buffer is for the wire: `own` this rank sends it, otherwise peers write it. `code` is slot * fields + field. */
interface WireUse {
  readonly own: boolean;
  readonly code: number;
  readonly field: Field;
  readonly slot: number;
}

interface Context {
  readonly attention: number;
  readonly ffn: number;
  readonly slots: number;
  readonly exchanges: readonly string[];
  /** pushed fields, the header among them, then pulled ones; by name, one number each */
  readonly fields: readonly Field[];
  readonly pushes: number;
  readonly head: number;
  /** exchange * fields + field -> 1 when the exchange carries it */
  readonly carries: Uint8Array;
  /** by rank: buffer name -> its use */
  readonly wires: ReadonlyMap<string, ReadonlyMap<string, WireUse>>;
  elements(shape: readonly Dim[]): number;
}

const sameWire = (a: Schedule, b: Schedule): boolean =>
  a.keys === b.keys &&
  a.types === b.types &&
  a.exchanges === b.exchanges &&
  a.symbols === b.symbols &&
  a.slots === b.slots &&
  a.programs.length === b.programs.length &&
  a.programs.every((p, i) => p.rank === b.programs[i]?.rank);

const form = (holds: boolean, line: string): void => {
  if (!holds) throw new Rejected("form", [line]);
};

const isIndex = (n: unknown, below: number): n is number => typeof n === "number" && Number.isInteger(n) && n >= 0 && n < below;

const readContext = (schedule: Schedule): Context => {
  const { slots, exchanges, types, keys, programs, symbols } = schedule;
  form(schedule.abi === 1, `abi ${String(schedule.abi)}: this checker knows abi 1`);
  form(
    [exchanges, types, keys, programs, symbols].every(Array.isArray),
    "exchanges, types, keys, programs or symbols are missing",
  );
  form(isIndex(slots, 257) && slots > 0, `${String(slots)} slots`);
  form(
    programs.length > 0 && programs.length <= 512 && exchanges.length <= 1e5,
    `${programs.length} ranks, ${exchanges.length} exchanges`,
  );
  const attention = programs.filter((p) => p.rank.role === "attention").length;
  const ffn = programs.length - attention;
  programs.forEach(({ rank, buffers, steps, memory }, i) => {
    const name = i < attention ? `a${i}` : `f${i - attention}`;
    const role = i < attention ? "attention" : "ffn";
    const index = i < attention ? i : i - attention;
    form(rank.name === name && rank.role === role && rank.index === index, `rank ${i} is ${rank.name}, where ${name} is due`);
    form(
      Array.isArray(buffers) && Array.isArray(steps) && typeof memory === "object" && memory !== null,
      `${name} lacks buffers, steps or memory`,
    );
  });
  form(attention > 0, "no attention rank");
  form(exchanges.length === 0 || ffn > 0, `${exchanges.length} exchanges and no FFN rank`);
  form(
    exchanges.length * slots * programs.length <= 5e6,
    `${exchanges.length} exchanges of ${slots} slots on ${programs.length} ranks`,
  );

  const maxima = new Map<string, number>();
  for (const s of symbols) {
    form(typeof s.name === "string" && isIndex(s.max, 2 ** 31), `symbol ${String(s.name)} has no maximum`);
    maxima.set(s.name, s.max);
  }
  const extents = new Map<Dim, number>();
  const extent = (d: Dim): number => {
    let n = typeof d === "number" ? d : extents.get(d);
    if (n === undefined) {
      try {
        n = evalDim(d, maxima);
      } catch (error) {
        throw new Rejected("form", [(error as Error).message]);
      }
      extents.set(d, n);
    }
    form(isIndex(n, 2 ** 53), `dimension ${d} is ${n}`);
    return n;
  };
  const elements = (shape: readonly Dim[]): number => {
    let n = 1;
    for (const d of shape) n *= extent(d);
    return n;
  };

  const fields: Field[] = [];
  const numbers = new Map<string, number>();
  const add = (field: Field, where: string): number => {
    const { name, dtype, shape, bytes } = field;
    form(
      typeof name === "string" && dtypes.includes(dtype) && Array.isArray(shape),
      `${where}: field ${String(name)} is not well formed`,
    );
    const size = elements(shape) * dtypeBytes(dtype);
    if (size !== bytes)
      throw new Rejected("length", [`${where}: field ${name} ${dtype}[${shape.join(",")}] has ${size} bytes, and says ${bytes}`]);
    let n = numbers.get(name);
    if (n === undefined) {
      n = fields.push(field) - 1;
      numbers.set(name, n);
    }
    const known = fields[n] as Field;
    if (known.dtype !== dtype || known.shape.join() !== shape.join() || known.bytes !== bytes)
      throw new Rejected("length", [
        `${where}: field ${name} ${dtype}[${shape.join(",")}] of ${bytes} bytes is ${known.dtype}[${known.shape.join(",")}] of ${known.bytes} in another exchange (K3)`,
      ]);
    return n;
  };
  const byName = new Map(types.map((t) => [t.name, t]));
  form(byName.size === types.length, "two exchange types have one name");
  const pushed = new Map(types.map((t) => [t.name, t.push.map((f) => add(f, `exchange ${t.name}`))]));
  const pushes = fields.length;
  const pulled = new Map(types.map((t) => [t.name, t.pull.map((f) => add(f, `exchange ${t.name}`))]));
  form(fields.length <= 512, `${fields.length} fields`);
  for (const t of types) {
    const list = pushed.get(t.name) as number[];
    const back = pulled.get(t.name) as number[];
    form(
      new Set([...list, ...back]).size === list.length + back.length && back.every((n) => n >= pushes),
      `exchange ${t.name} names a field twice`,
    );
    const last = t.push.at(-1);
    if (last?.name !== "head" || last.dtype !== "u8" || last.bytes !== headerBytes)
      throw new Rejected("keys", [
        `exchange ${t.name}: the header, head u8[${headerBytes}], is not the last field pushed (K10, K11)`,
      ]);
  }
  const head = numbers.get("head") ?? -1;
  const carries = new Uint8Array(exchanges.length * fields.length);
  exchanges.forEach((name, e) => {
    form(byName.has(name), `exchange #${e} has the unknown type ${String(name)}`);
    for (const n of [...(pushed.get(name) as number[]), ...(pulled.get(name) as number[])]) carries[e * fields.length + n] = 1;
  });
  const wires = readKeys(schedule, { attention, ffn, fields, numbers, pushes, pushed });
  return { attention, ffn, slots, exchanges, fields, pushes, head, carries, wires, elements };
};

/** K1: one source for each key, for no other. K2, K4: one target of its own for each sender and tensor. Every field of every slot has its keys. */
const readKeys = (
  { keys, slots }: Schedule,
  of: {
    readonly attention: number;
    readonly ffn: number;
    readonly fields: readonly Field[];
    readonly numbers: ReadonlyMap<string, number>;
    readonly pushes: number;
    readonly pushed: ReadonlyMap<string, readonly number[]>;
  },
): ReadonlyMap<string, ReadonlyMap<string, WireUse>> => {
  const { attention, ffn, fields, numbers, pushes } = of;
  const bad = (...lines: string[]): never => {
    throw new Rejected("keys", lines);
  };
  const wires = new Map<string, Map<string, WireUse>>();
  for (let a = 0; a < attention; a++) wires.set(`a${a}`, new Map());
  for (let f = 0; f < ffn; f++) wires.set(`f${f}`, new Map());
  const seen = new Map<number, number>(); // (a, f, slot, field) -> position
  const meaning = new Map<number, string>(); // number of a key -> what it stands for
  const nameOf = new Map<string, string>(); // (rank, part) -> buffer
  const text = (k: Schedule["keys"][number]): string =>
    `key ${k.key} ${k.direction} a${k.a} f${k.f} s${k.slot} ${k.field}: ${k.source} -> ${k.target}`;

  const bind = (rank: string, part: string, buffer: string, use: WireUse, key: Schedule["keys"][number]): void => {
    const wire = wires.get(rank) as Map<string, WireUse>;
    const before = nameOf.get(`${rank} ${part}`);
    if (before !== undefined && before !== buffer)
      bad(text(key), `${rank} ${use.own ? "sends" : "receives"} this tensor ${use.own ? "from" : "in"} ${before} elsewhere (K1)`);
    const known = wire.get(buffer);
    if (before === undefined && known)
      bad(
        text(key),
        `${rank} has ${buffer} already for s${known.slot} ${known.field.name}: a buffer of a key serves no other (K1, K2)`,
      );
    if (before === undefined) {
      nameOf.set(`${rank} ${part}`, buffer);
      wire.set(buffer, use);
    }
  };
  keys.forEach((key, position) => {
    const { direction, a, f, slot, field: name } = key;
    const n = numbers.get(name);
    form(
      isIndex(key.key, 2 ** 48) && typeof key.source === "string" && typeof key.target === "string",
      `key ${position} is not well formed`,
    );
    if (!isIndex(a, attention) || !isIndex(f, ffn) || !isIndex(slot, slots))
      return bad(`${text(key)}: there are ${attention} attention ranks, ${ffn} FFN ranks and ${slots} slots`);
    if (n === undefined || n < pushes !== (direction === "a2f")) return bad(`${text(key)}: no exchange carries ${name} this way`);
    const field = fields[n] as Field;
    const id = ((a * ffn + f) * slots + slot) * fields.length + n;
    if (seen.has(id)) bad(text(key), `${text(keys[seen.get(id) as number] as Schedule["keys"][number])} is for the same tensor`);
    seen.set(id, position);
    const stands = direction === "a2f" ? `a${a} s${slot} ${name}` : `a${a} s${slot} ${name} of f${f}`;
    const other = meaning.get(key.key);
    if (other !== undefined && other !== stands) bad(text(key), `key ${key.key} stands for ${other} too (K1)`);
    meaning.set(key.key, stands);
    const code = slot * fields.length + n;
    const part = `${slot} ${name}`;
    const push = direction === "a2f";
    bind(`a${a}`, push ? part : `${part} ${f}`, push ? key.source : key.target, { own: push, code, field, slot }, key);
    bind(`f${f}`, part, push ? key.target : key.source, { own: !push, code, field, slot }, key);
  });
  const used = [...Array(fields.length).keys()];
  for (let a = 0; a < attention; a++)
    for (let f = 0; f < ffn; f++)
      for (let slot = 0; slot < slots; slot++) {
        const at = (n: number): number | undefined => seen.get(((a * ffn + f) * slots + slot) * fields.length + n);
        for (const n of used)
          if (at(n) === undefined)
            bad(
              `s${slot} ${(fields[n] as Field).name} between a${a} and f${f} has no key: ${n < pushes ? `nothing fills it on f${f} (K2, K4)` : `nothing fills it on a${a} (K3, K4)`}`,
            );
        for (const [type, list] of of.pushed)
          list.forEach((n, i) => {
            const next = list[i + 1];
            if (next !== undefined && (at(n) as number) > (at(next) as number))
              bad(
                `exchange ${type} pushes ${(fields[n] as Field).name} before ${(fields[next] as Field).name}; the keys of a${a} f${f} s${slot} are in another order (header last, K10)`,
              );
          });
      }
  return wires;
};

// --- one rank alone ----------------------------------------------------------------------------------------------------------------

/** How the steps of one rank use slots and buffers, wherever the buffers lie. */
interface Uses {
  /** slots or exchanges are misused: nothing below is meaningful */
  readonly protocol: Rejected | undefined;
  /** the first misuse of a buffer */
  readonly misuse: Rejected | undefined;
  /** communication steps in order: step, slot * exchanges + exchange, peer (-1: all) */
  readonly events: number;
  readonly step: Int32Array;
  readonly code: Int32Array;
  readonly peer: Int32Array;
  readonly outgoing: Uint8Array;
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
  /** by buffer: steps of its first write and last use, -1: none */
  readonly first: Int32Array;
  readonly last: Int32Array;
  /** scratch in the order of first writes */
  readonly order: readonly number[];
}

/** What one rank shows by itself. */
interface Local {
  readonly uses: Uses;
  /** the first misuse of memory, places included */
  readonly memory: Rejected | undefined;
  /** pairs of scratch buffers: the later takes memory of the earlier */
  readonly takes: readonly number[];
}

const regionNames = ["weights", "state", "exchange", "scratch", "input", "output"] as const;

/** What is known of programs, and of arrays by rank, seen before; entries go when those do. */
class Memory {
  /** what the ranks' uses came to, the last time that nothing was wrong with their order */
  together: { readonly uses: readonly Uses[]; readonly meeting: Meeting } | undefined;
  readonly programs: WeakMap<RankProgram, { readonly context: Context; readonly local: Local }> = new WeakMap();
  readonly layouts: WeakMap<RankProgram["buffers"], Map<string, Layout>> = new WeakMap();
  readonly uses: WeakMap<RankProgram["steps"], Map<string, { readonly layout: Layout; readonly uses: Uses }>> = new WeakMap();
}

const examine = (program: RankProgram, context: Context, memory: Memory): Local => {
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
  const uses =
    alike?.uses ??
    (rank.role === "attention" ? examineAttention(program, context, layout) : examineFfn(program, context, layout));
  if (!alike) seen.set(rank.name, { layout, uses });
  const { takes, collision } = uses.protocol ? { takes: [], collision: undefined } : share(program, uses);
  const local: Local = { uses, memory: uses.misuse ?? collision, takes };
  memory.programs.set(program, { context, local });
  return local;
};

/** Whether two lists of buffers differ at most in what the steps do not see. */
const sameNames = (a: readonly Buffer[], b: readonly Buffer[]): boolean => {
  if (a === b) return true;
  if (a.length !== b.length) return false;
  for (let i = 0; i < a.length; i++) {
    const x = a[i] as Buffer;
    const y = b[i] as Buffer;
    if (
      x !== y &&
      (x.name !== y.name || x.region !== y.region || x.slot !== y.slot || x.bytes !== y.bytes || x.binds !== y.binds)
    )
      return false;
  }
  return true;
};

interface Layout {
  readonly context: Context;
  readonly memory: RankProgram["memory"];
  readonly buffers: readonly Buffer[];
  readonly ids: ReadonlyMap<string, number>;
  readonly wires: readonly (WireUse | undefined)[];
  /** buffers of each region but scratch, in order */
  readonly kept: Readonly<Record<string, readonly number[]>>;
}

/** Buffers by themselves: sizes, places, and the memory that is never shared. */
const layOut = (program: RankProgram, context: Context, alike: Layout | undefined): Layout => {
  const { rank, buffers, memory } = program;
  const wire = context.wires.get(rank.name) as ReadonlyMap<string, WireUse>;
  const segments = rank.role === "ffn" ? context.attention : 1;
  for (const region of regionNames)
    form(isIndex(memory[region], 2 ** 53), `${rank.name}: memory of ${region} is ${String(memory[region])}`);
  const ids = new Map<string, number>();
  const wires: (WireUse | undefined)[] = [];
  const kept: Record<string, number[]> = { weights: [], state: [], exchange: [], input: [], output: [] };
  const names = alike ?? { ids, wires, kept };
  if (!alike)
    buffers.forEach(({ name, region }, id) => {
      form(typeof name === "string" && !ids.has(name), `${rank.name}: two buffers named ${String(name)}`);
      form(regionNames.includes(region), `${rank.name}: ${name} is of no region`);
      ids.set(name, id);
      wires.push(wire.get(name));
      kept[region]?.push(id);
    });
  const roomy = alike && regionNames.every((region) => memory[region] >= alike.memory[region]);
  for (let id = 0; id < buffers.length; id++) {
    const b = buffers[id] as Buffer;
    if (roomy && alike.buffers[id] === b) continue; // found right before
    const { name, region, offset, bytes } = b;
    if (!(b.dtype in widths) || !Array.isArray(b.shape) || !isIndex(offset, 2 ** 53) || !isIndex(bytes, 2 ** 53) || bytes === 0)
      throw new Rejected("form", [`${rank.name}: buffer ${name} is not well formed`]);
    if (b.slot !== undefined && !isIndex(b.slot, context.slots))
      throw new Rejected("slot", [`${rank.name}: ${placeText(b)} is of slot ${b.slot}, of ${context.slots} slots`]);
    const use = names.wires[id];
    if (use) sendable(rank.name, b, use, segments);
    if (region !== "weights" && region !== "state") {
      const size = context.elements(b.shape) * (widths[b.dtype] as number);
      if (bytes !== size * b.segments || (b.segments !== 1 && b.segments !== segments))
        throw new Rejected("length", [
          `${rank.name}: ${name} ${b.dtype}[${b.shape.join(",")}] in ${b.segments} segments has ${size * b.segments} bytes, and says ${bytes}`,
        ]);
    }
    if (offset % 64 !== 0 || offset + bytes > memory[region])
      throw new Rejected("memory", [
        `${rank.name}: ${placeText(b)} does not lie at a multiple of 64 within the ${memory[region]} bytes of its region`,
      ]);
  }
  for (const [name, use] of wire)
    if (!names.ids.has(name))
      throw new Rejected("keys", [`${rank.name} has no buffer ${name}, which a key of s${use.slot} ${use.field.name} names`]);
  for (const region in names.kept) apart(rank.name, buffers, names.kept[region] as readonly number[]);
  let weights = 0;
  for (const id of names.kept.weights as readonly number[]) {
    const b = buffers[id] as Buffer;
    if (b.offset !== weights || b.bytes % 64 !== 0 || b.binds === undefined)
      throw new Rejected("weights", [
        `${rank.name}: ${placeText(b)} does not follow the weights before it, which end at ${weights}`,
      ]);
    weights += b.bytes;
  }
  if (memory.weights !== weights)
    throw new Rejected("weights", [`${rank.name}: ${weights} bytes of weights in a region of ${memory.weights}`]);
  return { context, memory, buffers, ids: names.ids, wires: names.wires, kept: names.kept };
};

const widths: Readonly<Record<string, number>> = Object.fromEntries(dtypes.map((d) => [d, dtypeBytes(d)]));

/** K3: both ends of a key have the length of the field; each attention rank has a segment of its own on the FFN side. */
const sendable = (rank: string, b: Buffer, use: WireUse, segments: number): void => {
  const { field, slot } = use;
  const what = `${rank}: ${b.name}, ${use.own ? "source" : "target"} of s${slot} ${field.name}`;
  if (b.region !== "exchange" || b.slot !== slot)
    throw new Rejected("keys", [`${what}, is of region ${b.region}, slot ${b.slot ?? "none"}`]);
  if (
    b.dtype !== field.dtype ||
    b.shape.join() !== field.shape.join() ||
    b.segments !== segments ||
    b.bytes !== field.bytes * segments
  )
    throw new Rejected("length", [
      `${what}: ${b.segments} x ${b.dtype}[${b.shape.join(",")}], ${b.bytes / b.segments} bytes each; the field is ${segments} x ${field.dtype}[${field.shape.join(",")}], ${field.bytes} bytes each (K3)`,
    ]);
};

/** Buffers that live for the whole round do not touch. */
const apart = (rank: string, buffers: readonly Buffer[], kept: readonly number[]): void => {
  let list = kept;
  const at = (i: number): Buffer => buffers[list[i] as number] as Buffer;
  let sorted = true;
  for (let i = 1; i < list.length && sorted; i++) sorted = at(i - 1).offset <= at(i).offset;
  if (!sorted) list = [...kept].sort((x, y) => (buffers[x] as Buffer).offset - (buffers[y] as Buffer).offset);
  for (let i = 1; i < list.length; i++)
    if (at(i - 1).offset + at(i - 1).bytes > at(i).offset)
      throw new Rejected("overlap", [
        `${rank}: ${placeText(at(i - 1))} and`,
        `${rank}: ${placeText(at(i))} live for the whole round and share memory`,
      ]);
};

/** Reading and writing of buffers whose memory is this rank's own business. */
class Accesses {
  misuse: Rejected | undefined;
  /** by buffer: steps of its first write and last use, -1: none */
  readonly first: Int32Array;
  readonly last: Int32Array;
  /** scratch in the order of first writes */
  readonly order: number[] = [];
  private readonly program: RankProgram;
  private readonly layout: Layout;
  constructor(program: RankProgram, layout: Layout) {
    this.program = program;
    this.layout = layout;
    this.first = new Int32Array(program.buffers.length).fill(-1);
    this.last = new Int32Array(program.buffers.length).fill(-1);
  }

  blame(rule: CheckRule, at: number, line: string, ...more: string[]): void {
    this.misuse ??= new Rejected(rule, [`${stepText(this.program, at)} ${line}`, ...more]);
  }

  /** The buffer's number; the launch and the buffer agree about the slot. */
  find(name: string, slot: number, at: number): number {
    const id = this.layout.ids.get(name);
    if (id === undefined)
      throw new Rejected("form", [
        `${stepText(this.program, at)} names ${String(name)}, which ${this.program.rank.name} does not have`,
      ]);
    const b = this.program.buffers[id] as Buffer;
    if (b.slot !== undefined && b.slot !== slot) this.blame("slot", at, `uses ${name} of s${b.slot}`);
    return id;
  }

  /** Reads of what no peer writes. */
  read(id: number, at: number): void {
    if ((this.first[id] as number) < 0) {
      const { region, name } = this.program.buffers[id] as Buffer;
      if (region === "scratch" || region === "output" || region === "exchange") {
        const writer = this.program.steps.findIndex(
          (s) => s.op === "launch" && (s.out.includes(name) || s.inout?.includes(name)),
        );
        this.blame("unwritten", at, `reads ${name}, which ${writer < 0 ? "no step writes" : `step ${writer} writes only later`}`);
      }
    }
    this.last[id] = at;
  }

  /** A kernel may write its results before it has read its operands. */
  alone(id: number, at: number): void {
    if (this.last[id] === at) this.blame("overlap", at, `writes ${this.program.buffers[id]?.name}, which it also uses otherwise`);
  }

  write(id: number, at: number): void {
    if ((this.first[id] as number) < 0) {
      const { region, name } = this.program.buffers[id] as Buffer;
      if (region === "weights" || region === "input" || region === "state")
        this.blame("memory", at, `writes ${name} of region ${region}`);
      this.first[id] = at;
      if (region === "scratch") this.order.push(id);
    }
    this.last[id] = at;
  }

  /** Every result that the host reads is written. */
  finish(): void {
    const { buffers, rank } = this.program;
    buffers.forEach((b, id) => {
      if (b.region === "output" && (this.first[id] as number) < 0)
        this.misuse ??= new Rejected("unwritten", [`${rank.name}: no step writes ${placeText(b)}, output ${b.binds ?? ""}`]);
    });
  }
}

/** Scratch buffers in use at the same time share no memory. Gives who takes whose memory, and the first collision. */
const share = (
  program: RankProgram,
  { first, last, order }: Uses,
): { readonly takes: readonly number[]; readonly collision: Rejected | undefined } => {
  const { buffers, rank } = program;
  // memory cut at every border; each piece knows the buffer that was last in it
  const starts = new Float64Array(order.length);
  const ends = new Float64Array(order.length);
  order.forEach((id, i) => {
    const b = buffers[id] as Buffer;
    starts[i] = b.offset;
    ends[i] = b.offset + b.bytes;
  });
  const borders = new Set<number>();
  for (let i = 0; i < order.length; i++) borders.add(starts[i] as number).add(ends[i] as number);
  const pieces = new Map<number, number>();
  for (const offset of Float64Array.from(borders).sort()) pieces.set(offset, pieces.size);
  const owner = new Int32Array(pieces.size).fill(-1);
  const takes: number[] = [];
  let collision: Rejected | undefined;
  for (let i = 0; i < order.length; i++) {
    const id = order[i] as number;
    const end = pieces.get(ends[i] as number) as number;
    const mine = takes.length;
    for (let piece = pieces.get(starts[i] as number) as number; piece < end; piece++) {
      const before = owner[piece] as number;
      owner[piece] = id;
      if (before < 0) continue;
      if ((last[before] as number) >= (first[id] as number) && !collision) {
        const line = (n: number): string =>
          `${rank.name}: ${placeText(buffers[n] as Buffer)} lives from step ${first[n]} to step ${last[n]}`;
        collision = new Rejected("overlap", [
          `${line(before)} and`,
          `${line(id)}: they share memory, and nothing orders step ${last[before]} before step ${first[id]}`,
        ]);
      }
      let known = false;
      for (let k = mine; k < takes.length && !known; k += 2) known = takes[k] === before;
      if (!known) takes.push(before, id);
    }
  }
  return { takes, collision };
};

/** Arrays of communication steps that grow. */
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

const checkLaunch = (program: RankProgram, at: number, step: Step & { op: "launch" }, slots: number): void => {
  const lists = [step.in, step.out, step.inout ?? []];
  form(
    typeof step.kernel === "string" && lists.every(Array.isArray) && typeof step.rows === "string",
    `${program.rank.name} step ${at}: a launch that is not well formed`,
  );
  if (!isIndex(step.slot, slots)) throw new Rejected("slot", [`${stepText(program, at)}: there are ${slots} slots`]);
};

/** The step whose result a communication step follows: a launch of the slot, before it, and not before anything it sends is written. */
const checkAfter = (program: RankProgram, at: number, after: number, slot: number, accesses: Accesses): void => {
  const launch = isIndex(after, at) ? program.steps[after] : undefined;
  if (launch?.op !== "launch" || launch.slot !== slot)
    accesses.blame("unwritten", at, `starts after step ${String(after)}, which is no launch of s${slot} before it`);
};

const nothing = (found: Partial<Uses>): Uses => ({
  protocol: undefined,
  misuse: undefined,
  events: 0,
  step: empty,
  code: empty,
  peer: empty,
  outgoing: new Uint8Array(0),
  sends: empty,
  receives: empty,
  lastRead: empty,
  rewrites: [],
  settled: empty,
  first: empty,
  last: empty,
  order: [],
  ...found,
});
const empty: Int32Array = new Int32Array(0);

/** Attention slot: free, posted, free. Everything it sends is written anew, and left alone until the wait. */
const examineAttention = (program: RankProgram, context: Context, layout: Layout): Uses => {
  const { steps, rank } = program;
  const { slots, fields, carries, head, pushes } = context;
  const exchanges = context.exchanges.length;
  const accesses = new Accesses(program, layout);
  const events = new Events(steps.length);
  const sends = new Int32Array(slots * exchanges).fill(-1);
  const receives = new Int32Array(slots * exchanges).fill(-1);
  const posted = new Int32Array(slots).fill(-1);
  const postedAt = new Int32Array(slots).fill(-1);
  const next = new Int32Array(slots);
  const fresh = new Int32Array(slots * fields.length).fill(-1); // last write since the last post that carried it
  const arrived = new Int32Array(slots * fields.length).fill(-1);
  const lastRead = new Int32Array(slots * fields.length).fill(-1); // of what a peer writes
  const protocol = (rule: CheckRule, lines: readonly string[], partner?: Partner): Uses =>
    nothing({ protocol: new Rejected(rule, lines, partner) });

  const read = (id: number, at: number, slot: number): void => {
    const use = layout.wires[id];
    if (!use) return accesses.read(id, at);
    accesses.last[id] = at;
    const e = posted[slot] as number;
    const n = use.code % fields.length;
    if (use.own) {
      if (n !== head && (accesses.first[id] as number) < 0) accesses.read(id, at);
    } else if (e >= 0 && carries[e * fields.length + n] === 1)
      accesses.blame(
        "in flight",
        at,
        `reads ${program.buffers[id]?.name}`,
        `${stepText(program, postedAt[slot] as number)} has handed it to the FFN side, and no wait comes between`,
      );
    else if ((arrived[use.code] as number) < 0)
      accesses.blame("unwritten", at, `reads ${program.buffers[id]?.name}, which no exchange has filled yet`);
    if (!use.own) lastRead[use.code] = at;
  };
  const write = (id: number, at: number, slot: number): void => {
    const use = layout.wires[id];
    if (!use) return accesses.write(id, at);
    const n = use.code % fields.length;
    const e = posted[slot] as number;
    if (!use.own || n === head)
      accesses.blame("memory", at, `writes ${program.buffers[id]?.name}, which ${use.own ? "the runtime" : "a peer"} writes`);
    if (e >= 0 && carries[e * fields.length + n] === 1)
      accesses.blame(
        "in flight",
        at,
        `writes ${program.buffers[id]?.name}`,
        `${stepText(program, postedAt[slot] as number)} still sends it, and no wait comes between (K1, K5)`,
      );
    if ((accesses.first[id] as number) < 0) accesses.first[id] = at;
    accesses.last[id] = at;
    fresh[use.code] = at;
  };

  for (let at = 0; at < steps.length; at++) {
    const step = steps[at] as Step;
    const { slot } = step;
    if (step.op === "launch") {
      checkLaunch(program, at, step, slots);
      const rows = accesses.find(step.rows, slot, at);
      const use = layout.wires[rows];
      const b = program.buffers[rows] as Buffer;
      if (use ? use.code % fields.length !== head : exchanges > 0 || b.region !== "input" || b.bytes !== headerBytes)
        accesses.blame("memory", at, `takes its rows from ${step.rows}, which is no header`);
      for (const name of step.in) read(accesses.find(name, slot, at), at, slot);
      for (const name of step.inout ?? []) {
        const id = accesses.find(name, slot, at);
        accesses.alone(id, at);
        if (program.buffers[id]?.region === "state") continue;
        read(id, at, slot);
        write(id, at, slot);
      }
      for (const name of step.out) {
        const id = accesses.find(name, slot, at);
        accesses.alone(id, at);
        write(id, at, slot);
      }
      continue;
    }
    if (step.op !== "post" && step.op !== "wait")
      throw new Rejected("exchange", [`${stepText(program, at)} on an attention rank`]);
    if (!isIndex(slot, slots)) return protocol("slot", [`${stepText(program, at)}: there are ${slots} slots`]);
    const e = step.exchange;
    if (!isIndex(e, exchanges))
      return protocol("exchange", [
        `${stepText(program, at)}: a slot has ${exchanges} exchanges, and no FFN rank takes part in this one`,
      ]);
    const busy = posted[slot] as number;
    if (step.op === "wait") {
      if (busy !== e)
        return protocol("slot", [
          `${stepText(program, at)}: ${busy < 0 ? `nothing is posted on s${slot}, so nothing fills it` : `s${slot} carries #${busy}, posted at step ${postedAt[slot]}`}`,
        ]);
      posted[slot] = -1;
      for (let n = pushes; n < fields.length; n++)
        if (carries[e * fields.length + n] === 1) arrived[slot * fields.length + n] = e;
      receives[slot * exchanges + e] = events.add(at, slot * exchanges + e, -1, 0);
      continue;
    }
    if (busy >= 0)
      return protocol("slot", [
        `${stepText(program, postedAt[slot] as number)} and`,
        `${stepText(program, at)}: s${slot} is posted again, and no wait comes between`,
      ]);
    if (e !== next[slot])
      return protocol("exchange", [`${stepText(program, at)}: #${next[slot]} is due on s${slot}`], {
        rank: "f0",
        op: "accept",
        slot,
        exchange: next[slot] as number,
        peer: rank.index,
        says: `is the next that f0 takes from ${rank.name} on s${slot}`,
      });
    if (step.type !== context.exchanges[e])
      return protocol("exchange", [`${stepText(program, at)}: exchange #${e} has the type ${context.exchanges[e]}`]);
    checkAfter(program, at, step.after, slot, accesses);
    for (let n = 0; n < pushes; n++) {
      if (n === head || carries[e * fields.length + n] === 0) continue;
      const written = fresh[slot * fields.length + n] as number;
      if (written < 0)
        accesses.blame(
          "unwritten",
          at,
          `sends ${fields[n]?.name}, which no step writes ${e === 0 ? "before" : "after the post before"} it (K1)`,
        );
      else if (written > step.after)
        accesses.blame(
          "unwritten",
          at,
          `starts after step ${step.after}`,
          `${stepText(program, written)} writes the ${fields[n]?.name} it sends`,
        );
      fresh[slot * fields.length + n] = -1;
    }
    for (let n = pushes; n < fields.length; n++) {
      const read = lastRead[slot * fields.length + n] as number;
      if (carries[e * fields.length + n] === 1 && read > step.after)
        accesses.blame(
          "in flight",
          at,
          `starts after step ${step.after} and lets peers overwrite ${fields[n]?.name}`,
          `${stepText(program, read)} may not have read it yet`,
        );
    }
    posted[slot] = e;
    postedAt[slot] = at;
    next[slot] = e + 1;
    sends[slot * exchanges + e] = events.add(at, slot * exchanges + e, -1, 1);
  }
  for (let slot = 0; slot < slots; slot++) {
    if ((posted[slot] as number) >= 0)
      return protocol("slot", [`${stepText(program, postedAt[slot] as number)} is never waited for: s${slot} does not end free`]);
    if ((next[slot] as number) < exchanges)
      return protocol("exchange", [`${rank.name} ends after ${next[slot]} of the ${exchanges} exchanges of s${slot}`], {
        rank: "f0",
        op: "accept",
        slot,
        exchange: next[slot] as number,
        peer: rank.index,
        says: "is filled by nothing",
      });
  }
  accesses.finish();
  const { step, code, peer, outgoing, count } = events;
  const { misuse, first, last, order } = accesses;
  return nothing({ misuse, events: count, step, code, peer, outgoing, sends, receives, first, last, order });
};

/** FFN slot: empty, accepted from every attention rank, replied to every one, empty. */
const examineFfn = (program: RankProgram, context: Context, layout: Layout): Uses => {
  const { steps, rank } = program;
  const { slots, fields, carries, head, pushes, attention } = context;
  const exchanges = context.exchanges.length;
  const codes = slots * exchanges;
  const accesses = new Accesses(program, layout);
  const events = new Events(steps.length);
  const sends = new Int32Array(attention * codes).fill(-1);
  const receives = new Int32Array(attention * codes).fill(-1);
  const next = new Int32Array(slots); // exchange in progress, or due
  const accepted = new Int32Array(slots);
  const replied = new Int32Array(slots);
  const version = new Int32Array(slots * fields.length).fill(-1); // exchange whose contents a pushed field has
  const fresh = new Int32Array(slots * fields.length).fill(-1);
  const sentAt = new Int32Array(slots * fields.length).fill(-1); // last write of what the exchange in progress replies with
  const lastReplied = new Int32Array(slots * fields.length).fill(-1);
  const lastRead = new Int32Array(codes * fields.length).fill(-1);
  const rewrites: number[] = [];
  const settled = new Int32Array(steps.length + 1);
  const protocol = (rule: CheckRule, lines: readonly string[], partner?: Partner): Uses =>
    nothing({ protocol: new Rejected(rule, lines, partner) });
  const missing = (slot: number, table: Int32Array): number => {
    for (let a = 0; a < attention; a++) if (table[a * codes + slot * exchanges + (next[slot] as number)] === -1) return a;
    return -1;
  };
  const stuck = (slot: number, a: number): Partner => ({
    rank: `a${a}`,
    op: "wait",
    slot,
    exchange: next[slot] as number,
    says: "waits for that reply forever",
  });

  const read = (id: number, at: number, slot: number): void => {
    const use = layout.wires[id];
    if (!use || use.own) return accesses.read(id, at);
    accesses.last[id] = at;
    const e = next[slot] as number;
    const n = use.code % fields.length;
    const partly = e < exchanges && (accepted[slot] as number) < attention && (accepted[slot] as number) > 0;
    if (partly && carries[e * fields.length + n] === 1)
      return accesses.blame(
        "unwritten",
        at,
        `reads ${program.buffers[id]?.name} of s${slot} #${e}, not yet accepted from a${missing(slot, receives)}`,
      );
    const v = version[use.code] as number;
    if (v < 0) return accesses.blame("unwritten", at, `reads ${program.buffers[id]?.name}, which no exchange has filled yet`);
    lastRead[(slot * exchanges + v) * fields.length + n] = at;
  };
  const write = (id: number, at: number): void => {
    const use = layout.wires[id];
    if (!use) return accesses.write(id, at);
    if (!use.own) return accesses.blame("memory", at, `writes ${program.buffers[id]?.name}, which a peer writes`);
    if ((fresh[use.code] as number) < 0) rewrites.push(at, events.count, use.code, lastReplied[use.code] as number);
    if ((accesses.first[id] as number) < 0) accesses.first[id] = at;
    accesses.last[id] = at;
    fresh[use.code] = at;
  };

  for (let at = 0; at < steps.length; at++) {
    const step = steps[at] as Step;
    const { slot } = step;
    if (step.op === "launch") {
      checkLaunch(program, at, step, slots);
      const rows = accesses.find(step.rows, slot, at);
      if ((layout.wires[rows]?.code ?? -1) % fields.length !== head || layout.wires[rows]?.own === true)
        accesses.blame("memory", at, `takes its rows from ${step.rows}, which is no header`);
      else read(rows, at, slot);
      for (const name of step.in) read(accesses.find(name, slot, at), at, slot);
      for (const name of step.inout ?? []) {
        const id = accesses.find(name, slot, at);
        accesses.alone(id, at);
        read(id, at, slot);
        write(id, at);
      }
      for (const name of step.out) {
        const id = accesses.find(name, slot, at);
        accesses.alone(id, at);
        write(id, at);
      }
      continue;
    }
    if (step.op !== "accept" && step.op !== "reply") throw new Rejected("exchange", [`${stepText(program, at)} on an FFN rank`]);
    if (!isIndex(slot, slots)) return protocol("slot", [`${stepText(program, at)}: there are ${slots} slots`]);
    const e = step.exchange;
    const a = step.op === "accept" ? step.from : step.to;
    if (!isIndex(a, attention)) return protocol("exchange", [`${stepText(program, at)}: there are ${attention} attention ranks`]);
    if (!isIndex(e, exchanges))
      return protocol("exchange", [`${stepText(program, at)}: a slot has ${exchanges} exchanges, and nothing fills this one`]);
    const due = next[slot] as number;
    const code = slot * exchanges + e;
    if (step.op === "accept") {
      const lacks = (replied[slot] as number) > 0 || (accepted[slot] as number) === attention ? missing(slot, sends) : -1;
      if (e !== due && lacks >= 0)
        return protocol(
          "exchange",
          [`${stepText(program, at)}, and s${slot} #${due} has no reply to a${lacks}`],
          stuck(slot, lacks),
        );
      if (e !== due) {
        const from = (accepted[slot] as number) > 0 ? missing(slot, receives) : a;
        return protocol(
          "exchange",
          [
            `${stepText(program, at)}: s${slot} #${due} from a${from} is due first${e < due ? ", and nothing fills this one again" : ""}`,
          ],
          {
            rank: `a${from}`,
            op: "post",
            slot,
            exchange: due,
            says: `is not accepted by ${rank.name} before it`,
          },
        );
      }
      if (receives[a * codes + code] !== -1)
        return protocol("exchange", [`${stepText(program, at)}: it was accepted already, and nothing fills it again`]);
      receives[a * codes + code] = events.add(at, code, a, 0);
      accepted[slot] = (accepted[slot] as number) + 1;
      if (accepted[slot] === attention)
        for (let n = 0; n < pushes; n++) if (carries[e * fields.length + n] === 1) version[slot * fields.length + n] = e;
      continue;
    }
    if (e !== due || accepted[slot] !== attention) {
      const from = e === due ? missing(slot, receives) : a;
      return protocol("exchange", [`${stepText(program, at)}, and s${slot} #${e} was not accepted from a${from}`], {
        rank: `a${from}`,
        op: "post",
        slot,
        exchange: e,
        says: `fills that slot${e === due ? "" : `, where #${due} is due`}`,
      });
    }
    if (sends[a * codes + code] !== -1) return protocol("exchange", [`${stepText(program, at)}: a${a} has its reply already`]);
    checkAfter(program, at, step.after, slot, accesses);
    for (let n = pushes; n < fields.length; n++) {
      if (carries[e * fields.length + n] === 0) continue;
      const c = slot * fields.length + n;
      if (replied[slot] === 0) {
        if ((fresh[c] as number) < 0)
          accesses.blame(
            "unwritten",
            at,
            `returns ${fields[n]?.name}, which no step writes ${e === 0 ? "before" : "after the reply before"} it`,
          );
        sentAt[c] = fresh[c] as number;
        fresh[c] = -1;
        lastReplied[c] = e;
      }
      if ((sentAt[c] as number) > step.after)
        accesses.blame(
          "unwritten",
          at,
          `starts after step ${step.after}`,
          `${stepText(program, sentAt[c] as number)} writes the ${fields[n]?.name} it returns`,
        );
    }
    sends[a * codes + code] = events.add(at, code, a, 1);
    settled[at + 1] = step.after + 1;
    replied[slot] = (replied[slot] as number) + 1;
    if (replied[slot] === attention) {
      next[slot] = e + 1;
      accepted[slot] = 0;
      replied[slot] = 0;
    }
  }
  for (let slot = 0; slot < slots; slot++) {
    const e = next[slot] as number;
    if (e === exchanges) continue;
    const busy = (accepted[slot] as number) > 0;
    const a = busy ? missing(slot, accepted[slot] === attention ? sends : receives) : 0;
    return protocol(
      "exchange",
      [
        `${rank.name} ends, and ${busy ? `s${slot} #${e} has no reply to a${a}` : `takes ${e} of the ${exchanges} exchanges of s${slot}`}`,
      ],
      stuck(slot, a),
    );
  }
  accesses.finish();
  const { step, code, peer, outgoing, count } = events;
  const { misuse, first, last, order } = accesses;
  return nothing({ misuse, events: count, step, code, peer, outgoing, sends, receives, lastRead, rewrites,
    settled, first, last, order });
};

// --- all ranks together --------------------------------------------------------------------------------------------------------------

/** What the communication of all ranks comes to. */
interface Meeting {
  /** by rank and communication step: how many steps of each rank have happened when it is done */
  readonly clocks: readonly Int32Array[];
  /** the first use of memory that a peer may be using */
  readonly hazard: Rejected | undefined;
}

const judge = (
  schedule: Schedule,
  certificate: Certificate,
  facts: CheckFacts,
  context: Context,
  locals: readonly Local[],
  known: Memory,
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
  const clocks = uses.map((l) => new Int32Array(l.events * ranks));
  const done = new Int32Array(ranks);
  const join = (to: Int32Array, at: number, from: Int32Array, event: number): void => {
    const base = event * ranks;
    for (let k = 0; k < ranks; k++) {
      const theirs = from[base + k] as number;
      if (theirs > (to[at + k] as number)) to[at + k] = theirs;
    }
  };
  let left = uses.reduce((n, l) => n + l.events, 0);
  for (let moved = true; moved; ) {
    moved = false;
    for (let r = 0; r < ranks; r++) {
      const local = uses[r] as Uses;
      const mine = clocks[r] as Int32Array;
      let at = done[r] as number;
      run: for (; at < local.events; at++) {
        const base = at * ranks;
        const code = local.code[at] as number;
        const receiving = local.outgoing[at] === 0;
        if (receiving && r < attention) {
          for (let f = 0; f < ffn; f++)
            if (((uses[attention + f] as Uses).sends[r * codes + code] as number) >= (done[attention + f] as number)) break run;
        } else if (receiving) {
          const a = local.peer[at] as number;
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
          const a = local.peer[at] as number;
          join(mine, base, clocks[a] as Int32Array, (uses[a] as Uses).sends[code] as number);
        }
        mine[base + r] = (local.step[at] as number) + 1;
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
    if (at >= local.events) return [];
    const code = local.code[at] as number;
    if (r >= attention)
      return [[local.peer[at] as number, (uses[local.peer[at] as number] as Uses).sends[code] as number] as const];
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
    const standing = (uses[from] as Uses).step[done[from] as number] as number;
    const needed = (uses[to] as Uses).step[event] as number;
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
    for (let at = 0; at < l.events; at++) if (l.outgoing[at] === outgoing && (peer < 0 || l.peer[at] === peer)) events.push(at);
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
          if (x.code[p] === y.code[q]) continue;
          const text = (code: number): string => `s${Math.floor(code / exchanges)} #${code % exchanges}`;
          throw new Rejected("order", [
            `${stepText(programs[a] as RankProgram, x.step[p] as number)} is number ${i} that a${a} ${way === 0 ? "sends to" : "takes from"} f${f}, and`,
            `${stepText(programs[attention + f] as RankProgram, y.step[q] as number)} is number ${i} on f${f}: ${text(x.code[p] as number)} against ${text(y.code[q] as number)}`,
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
        let next = peer.events - 1;
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
          post = peer.step[next] as number;
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
      const wait = e < 0 ? 0 : (peer.step[peer.receives[slot * exchanges + e] as number] as number);
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
    return bad("it is not well formed");
  if (c.schedule !== schedule.name || c.wire !== schedule.wire)
    bad(`it is of schedule ${String(c.schedule)}, wire ${String(c.wire).slice(0, 16)}`);
  programs.forEach((program, r) => {
    const { uses, takes } = locals[r] as Local;
    const stated = certificate.clocks[r];
    const edges = certificate.reuse[r];
    const { steps, rank } = program;
    if (!Array.isArray(stated) || stated.length !== steps.length * ranks || !Array.isArray(edges))
      return bad(`it has no clocks or edges for the ${steps.length} steps of ${rank.name}`);
    let event = 0;
    const now = new Int32Array(ranks);
    for (let at = 0; at < steps.length; at++) {
      if (event < uses.events && uses.step[event] === at) {
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
      if (!isIndex(earlier, uses.first.length) || !isIndex(later, uses.first.length))
        return bad(`${rank.name}: an edge of unknown buffers`);
      if (uses.last[earlier] !== lastUse || uses.first[later] !== firstWrite || lastUse >= firstWrite)
        bad(
          `${rank.name}: ${name(earlier)}, used until step ${uses.last[earlier]}, then ${name(later)}, from step ${uses.first[later]}; the edge says ${lastUse}, ${firstWrite}`,
        );
      claimed.add(earlier * uses.first.length + later);
    }
    for (let i = 0; i < takes.length; i += 2) {
      const [earlier, later] = [takes[i] as number, takes[i + 1] as number];
      if (!claimed.delete(earlier * uses.first.length + later))
        bad(`${rank.name}: no edge says that ${name(later)} takes memory of ${name(earlier)}`);
    }
    for (const edge of claimed)
      bad(
        `${rank.name}: ${name(edge % uses.first.length)} takes no memory of ${name(Math.floor(edge / uses.first.length))}, and an edge says so`,
      );
  });
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
