/**
 * Part of the independent checker (check.ts): how it says no, and what a schedule declares for all ranks: exchanges, fields, keys.
 */
import { type Dim, dimSymbols, mostOf, tokenSymbol } from "./dim.ts";
import { type Buffer, type Field, headerBytes, type RankProgram, type Schedule, type Step } from "./schedule.ts";
import { dtypeBytes, dtypes } from "./type.ts";

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

/** A step of another rank that makes a counter-example complete; looked up when the rejection is printed. */
export interface Partner {
  readonly rank: string;
  readonly op: Step["op"];
  readonly slot: number;
  readonly exchange: number;
  readonly peer?: number;
  readonly says: string;
}

export class Rejected extends Error {
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

/** The one with the fewest lines; the earliest rank among equals. */
export const shortest = (found: readonly (Rejected | undefined)[]): Rejected | undefined => {
  let best: Rejected | undefined;
  for (const r of found) if (r && (!best || r.lines.length < best.lines.length)) best = r;
  return best;
};

export const peerOf = (s: Step): number | undefined => (s.op === "accept" ? s.from : s.op === "reply" ? s.to : undefined);

export const stepText = ({ rank, steps }: RankProgram, at: number): string => {
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

export const placeText = (b: Buffer): string => `${b.name} (${b.region} ${b.offset}..${b.offset + b.bytes})`;

/** What a buffer is for the wire: `own` this rank sends it, otherwise peers write it. `code` is slot * fields + field. */
export interface WireUse {
  readonly own: boolean;
  readonly code: number;
  readonly field: Field;
  readonly slot: number;
}

export interface Context {
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

export const sameWire = (a: Schedule, b: Schedule): boolean =>
  a.keys === b.keys &&
  a.types === b.types &&
  a.exchanges === b.exchanges &&
  a.symbols === b.symbols &&
  a.slots === b.slots &&
  a.programs.length === b.programs.length &&
  a.programs.every((p, i) => p.rank === b.programs[i]?.rank);

export const form = (holds: boolean, line: string): void => {
  if (!holds) throw new Rejected("form", [line]);
};

export const isIndex = (n: unknown, below: number): n is number =>
  typeof n === "number" && Number.isInteger(n) && n >= 0 && n < below;

const largest = (d: Dim, symbols: Schedule["symbols"]): number => {
  try {
    return mostOf(d, symbols);
  } catch (error) {
    throw new Rejected("form", [(error as Error).message]);
  }
};

/** A symbol, if any, on which a shape depends besides the rows. */
export const otherThanTokens = (shape: readonly Dim[]): string | undefined =>
  shape.every((d) => typeof d === "number" || d === tokenSymbol)
    ? undefined
    : shape.flatMap(dimSymbols).find((s) => s !== tokenSymbol);

export const readContext = (schedule: Schedule): Context => {
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

  const declared = new Set<string>();
  for (const { name, min, max } of symbols) {
    form(
      typeof name === "string" && isIndex(max, 2 ** 31) && isIndex(min, max + 1),
      `symbol ${String(name)} has no range: ${String(min)}..${String(max)}`,
    );
    form(!declared.has(name), `symbol ${name} is declared twice`);
    declared.add(name);
  }
  for (const { name, max, is } of symbols)
    if (is !== undefined) {
      const most = largest(is, symbols);
      form(most <= max, `symbol ${name} is ${is}, which may be ${most}, and is said to be at most ${max}`);
    }
  const extents = new Map<Dim, number>();
  const extent = (d: Dim): number => {
    let n = typeof d === "number" ? d : extents.get(d);
    if (n === undefined) {
      n = largest(d, symbols);
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
    const other = otherThanTokens(shape);
    if (other !== undefined)
      throw new Rejected("length", [
        `${where}: field ${name} ${dtype}[${shape.join(",")}] depends on ${other}, and a header tells the rows (${tokenSymbol}) only`,
      ]);
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
  for (const [position, key] of keys.entries()) {
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
  }
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
