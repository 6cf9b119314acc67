/** Part of the independent checker (check.ts): the buffers of one rank, where they lie and how launches read and write them. */

import {
  type CheckRule,
  type Context,
  form,
  isIndex,
  otherThanTokens,
  placeText,
  Rejected,
  stepText,
  type WireUse,
} from "./check_wire.ts";
import { tokenSymbol } from "./dim.ts";
import type { Buffer, RankProgram, Step } from "./schedule.ts";
import { dtypeBytes, dtypes } from "./type.ts";

const regionNames = ["weights", "state", "exchange", "scratch", "input", "output"] as const;

/** Whether two lists of buffers differ at most in what the steps do not see. */
export const sameNames = (a: readonly Buffer[], b: readonly Buffer[]): boolean => {
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

export interface Layout {
  readonly context: Context;
  readonly memory: RankProgram["memory"];
  readonly buffers: readonly Buffer[];
  readonly ids: ReadonlyMap<string, number>;
  readonly wires: readonly (WireUse | undefined)[];
  /** buffers of each region but scratch, in order */
  readonly kept: Readonly<Record<string, readonly number[]>>;
}

/** Buffers by themselves: sizes, places, and the memory that is never shared. */
export const layOut = (program: RankProgram, context: Context, alike: Layout | undefined): Layout => {
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
    if (
      !(b.dtype in widths) ||
      !Array.isArray(b.shape) ||
      !isIndex(offset, 2 ** 53) ||
      !isIndex(bytes, 2 ** 53) ||
      (bytes === 0 && region === "exchange")
    )
      throw new Rejected("form", [`${rank.name}: buffer ${name} is not well formed`]);
    if (b.slot !== undefined && !isIndex(b.slot, context.slots))
      throw new Rejected("slot", [`${rank.name}: ${placeText(b)} is of slot ${b.slot}, of ${context.slots} slots`]);
    const use = names.wires[id];
    if (use) sendable(rank.name, b, use, segments);
    const unknown = rank.role === "ffn" ? otherThanTokens(b.shape) : undefined;
    if (unknown !== undefined)
      throw new Rejected("length", [
        `${rank.name}: ${name} ${b.dtype}[${b.shape.join(",")}] depends on ${unknown}, and FFN ranks are told the rows (${tokenSymbol}) only`,
      ]);
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
export class Accesses {
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
  private alone(id: number, at: number): void {
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

  /** A launch: what it reads, what it changes, what it writes; `read` and `write` say what that means for memory that peers use too. */
  launch(
    step: Step & { op: "launch" },
    at: number,
    slots: number,
    read: (id: number, at: number, slot: number) => void,
    write: (id: number, at: number, slot: number) => void,
  ): void {
    const { slot, inout = [] } = step;
    const lists = Array.isArray(step.in) && Array.isArray(step.out) && Array.isArray(inout);
    if (!lists || typeof step.kernel !== "string" || typeof step.rows !== "string")
      throw new Rejected("form", [`${this.program.rank.name} step ${at}: a launch that is not well formed`]);
    if (!isIndex(slot, slots)) throw new Rejected("slot", [`${stepText(this.program, at)}: there are ${slots} slots`]);
    for (const name of step.in) read(this.find(name, slot, at), at, slot);
    for (const name of inout) {
      const id = this.find(name, slot, at);
      this.alone(id, at);
      if (this.program.buffers[id]?.region === "state") continue;
      read(id, at, slot);
      write(id, at, slot);
    }
    for (const name of step.out) {
      const id = this.find(name, slot, at);
      this.alone(id, at);
      write(id, at, slot);
    }
  }

  /** A message leaves after a launch of its slot, and `written`, the last launch that writes what it sends, is not behind that one. */
  leaves(step: Step & { op: "post" | "reply" }, at: number): void {
    const launch = isIndex(step.after, at) ? this.program.steps[step.after] : undefined;
    if (launch?.op !== "launch" || launch.slot !== step.slot)
      this.blame("unwritten", at, `starts after step ${String(step.after)}, which is no launch of s${step.slot} before it`);
  }
  carries(step: Step & { op: "post" | "reply" }, at: number, field: string, written: number): void {
    const before = step.exchange === 0 ? "before it" : `after the ${step.op} before`;
    if (written < 0) this.blame("unwritten", at, `sends ${field}, which no step writes ${before} (K1)`);
    else if (written > step.after)
      this.blame(
        "unwritten",
        at,
        `starts after step ${step.after}`,
        `${stepText(this.program, written)} writes the ${field} it sends`,
      );
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
/** Scratch buffers in use at the same time share no memory: the first two that do. */
export const collision = (program: RankProgram, { first, last, order }: Accesses): Rejected | undefined => {
  const { buffers, rank } = program;
  // the buffers in use: few at any time
  const ids = new Int32Array(order.length);
  const starts = new Float64Array(order.length);
  const ends = new Float64Array(order.length);
  let inUse = 0;
  for (const id of order) {
    const { offset, bytes } = buffers[id] as Buffer;
    if (bytes === 0) continue;
    const end = offset + bytes;
    const now = first[id] as number;
    let kept = 0;
    for (let k = 0; k < inUse; k++) {
      const other = ids[k] as number;
      if ((last[other] as number) < now) continue;
      if ((starts[k] as number) < end && offset < (ends[k] as number)) {
        const line = (n: number): string =>
          `${rank.name}: ${placeText(buffers[n] as Buffer)} lives from step ${first[n]} to step ${last[n]}`;
        const order = `nothing orders step ${last[other]} before step ${now}`;
        return new Rejected("overlap", [`${line(other)} and`, `${line(id)}: they share memory, and ${order}`]);
      }
      ids[kept] = other;
      starts[kept] = starts[k] as number;
      ends[kept++] = ends[k] as number;
    }
    ids[kept] = id;
    starts[kept] = offset;
    ends[kept] = end;
    inUse = kept + 1;
  }
  return undefined;
};

/** Pairs of scratch buffers: the later takes memory that was last the earlier's. */
export const takesOf = (
  { buffers }: RankProgram,
  order: readonly number[],
): readonly (readonly [earlier: number, later: number])[] => {
  // memory cut at every border; each piece knows the buffer that was last in it
  const borders = new Set<number>();
  for (const id of order) {
    const { offset, bytes } = buffers[id] as Buffer;
    borders.add(offset).add(offset + bytes);
  }
  const pieces = new Map<number, number>();
  for (const offset of Float64Array.from(borders).sort()) pieces.set(offset, pieces.size);
  const owner = new Int32Array(pieces.size).fill(-1);
  const takes: (readonly [number, number])[] = [];
  for (const id of order) {
    const { offset, bytes } = buffers[id] as Buffer;
    const end = pieces.get(offset + bytes) as number;
    const before = new Set<number>();
    for (let piece = pieces.get(offset) as number; piece < end; piece++) {
      if ((owner[piece] as number) >= 0) before.add(owner[piece] as number);
      owner[piece] = id;
    }
    for (const earlier of before) takes.push([earlier, id]);
  }
  return takes;
};
