/**
 * Graph -> Schedule: what every rank does in one round. Attention ranks run a software pipeline over the micro-batches: for each stage
 * between two exchanges, for each slot: wait, launches, post. FFN ranks serve, for each exchange, for each slot: accept from every
 * attention rank, launches over the rows of all of them, replies.
 */

import { type Dim, type DimSymbol, dimSymbols, mostOf, multipleOf, tokenSymbol } from "../ir/dim.ts";
import { UserError } from "../ir/error.ts";
import type { Graph, Op, Value } from "../ir/graph.ts";
import {
  type Buffer,
  type ExchangeType,
  type Field,
  headerBytes,
  type Key,
  type Rank,
  type RankProgram,
  type Schedule,
  type Step,
} from "../ir/schedule.ts";
import { dtypeBytes, type TensorType, typeText } from "../ir/type.ts";
import { align, planMemory, type Unplaced } from "./memory.ts";

/** One side of the machine: how many ranks, and which target compiled their program. */
export interface SideRanks {
  readonly ranks: number;
  readonly target: string;
}

export interface ScheduleOptions {
  /** `prefill`, `decode`, `main` */
  readonly name: string;
  /** its number in the bundle: part of every key, so that keys of two schedules differ */
  readonly index: number;
  readonly attention: SideRanks;
  readonly ffn: SideRanks;
  readonly microBatches: number;
  /** most rows (values of the symbol T) of one slot of one attention rank */
  readonly maxRows: number;
  /** names of the graph's outputs for the host, where they are others (withHomes gives an output that is also an input one of its own) */
  readonly outputs?: readonly string[];
  /** symbol of the kernel that does an op */
  kernelOf(op: Op): string;
  /** packed bytes of a weight; its buffer is padded to a multiple of 64 */
  weightBytes(weight: string): number;
  /** page geometry of the KV pools; needed when the graph has states */
  readonly kv?: { readonly pageBytes: number; readonly pages: number };
}

/** What one slot of an attention rank does, in order. */
type Item =
  | { readonly kind: "launch"; readonly op: Op }
  | { readonly kind: "post"; readonly exchange: number }
  | { readonly kind: "wait"; readonly exchange: number };

/** A tensor of the wire and the memory it has on both sides; several exchanges may use it, one after another. */
interface Wire {
  readonly field: Field;
  /** last position in a slot's items at which the attention side still needs the memory */
  busyUntil: number;
  /** last exchange during which the FFN side still needs it */
  ffnUntil: number;
}

/** Where the values of one exchange travel. */
interface Transfer {
  readonly type: string;
  readonly push: readonly Wire[];
  readonly pull: readonly Wire[];
}

/**
 * The schedule of a partitioned and sharded graph, its `wire` still empty (compiler/wire.ts fills it in). A graph without exchanges gives
 * every attention rank the whole program. Ops with place `ffn` need one FFN rank. Throws a UserError when the ranks or micro-batches
 * asked for do not fit the keys; any other Error means that a pass before this one left the graph in a state it must not be in.
 */
export const schedule = (graph: Graph, options: ScheduleOptions): Schedule => {
  const { attention, ffn, microBatches } = options;
  for (const [what, n, low, high] of [
    ["attention ranks", attention.ranks, 1, 256],
    ["FFN ranks", ffn.ranks, 0, 64],
    ["micro-batches", microBatches, 1, 256],
    ["rows", options.maxRows, 1, 2 ** 24],
  ] as const)
    if (!Number.isInteger(n) || n < low || n > high) throw new UserError(`${n} ${what}: choose ${low} to ${high}`);

  const symbols = graph.symbols.map((s): DimSymbol => (s.name === tokenSymbol ? { ...s, max: options.maxRows } : s));
  const sizes = sizer(symbols);
  const flow = readFlow(graph, ffn.ranks);
  for (const op of [...flow.dispatches, ...flow.collects, ...flow.blocks.flat(2)]) onlyTokensVary(op);
  const transfers = planTransfers(flow, sizes);
  const { types, exchanges, push, pull } = transfers;
  const slots = [...Array(microBatches).keys()];

  const context: Context = { graph, options, flow, sizes, transfers: transfers.of, push, pull, slots };
  const attentionPart = attentionProgram(context);
  const programs: RankProgram[] = [];
  const rank = (role: Rank["role"], index: number, target: string): Rank => ({
    name: role === "attention" ? `a${index}` : `f${index}`,
    role,
    index,
    target,
  });
  for (let a = 0; a < attention.ranks; a++) programs.push({ rank: rank("attention", a, attention.target), ...attentionPart });
  for (let f = 0; f < ffn.ranks; f++) programs.push({ rank: rank("ffn", f, ffn.target), ...ffnProgram(context, f) });

  return {
    abi: 1,
    name: options.name,
    wire: "",
    slots: microBatches,
    symbols,
    exchanges,
    types,
    keys: flow.exchanges === 0 ? [] : keysOf(context),
    programs,
  };
};

/**
 * Gives every value one home: an op `cast` to the same dtype copies a value that is sent twice, or sent and also an output, or received and
 * handed out as it is. Run before kernels are chosen; a graph without such values comes back unchanged. An output keeps its name unless it
 * is also an input, a weight or another output.
 */
export const withHomes = (graph: Graph): Graph => {
  const names = new Set<string>([...graph.inputs, ...graph.states, ...graph.weights.map((w) => w.value)].map((v) => v.name));
  const taken = new Set<string>(names);
  for (const op of graph.ops) for (const v of op.outputs) names.add(v.name);
  const fresh = (wanted: string): string => {
    let name = wanted;
    while (names.has(name)) name += "_";
    names.add(name);
    return name;
  };
  const copy = (from: Value, to: Value, place: Op["place"]): Op => ({
    kind: "cast",
    inputs: [from],
    attrs: { to: to.type.kind === "tensor" ? to.type.dtype : fail(`${from.name} is a state and has one home`) },
    outputs: [to],
    ...(place === undefined ? {} : { place }),
    origin: `copy of ${from.name}`,
  });

  const received = new Set<string>(graph.ops.flatMap((op) => (op.kind === "collect" ? op.outputs.map((v) => v.name) : [])));
  const place = graph.ops.some((op) => op.place !== undefined) ? "attention" : undefined;
  const renamed = new Map<string, Value>();
  const last: Op[] = [];
  const outputs = graph.outputs.map((v): Value => {
    if (received.has(v.name) && !renamed.has(v.name)) {
      const arrived: Value = { ...v, name: fresh(`${v.name}_received`) };
      renamed.set(v.name, arrived);
      last.push(copy(arrived, v, place));
      return v;
    }
    if (!taken.has(v.name)) {
      taken.add(v.name);
      return v;
    }
    const other: Value = { ...v, name: fresh(`${v.name}_copy`) };
    last.push(copy(renamed.get(v.name) ?? v, other, place));
    return other;
  });

  const ranks = ranksOf(graph);
  const ops: Op[] = [];
  const rename = (values: readonly Value[]): readonly Value[] =>
    values.some((v) => renamed.has(v.name)) ? values.map((v) => renamed.get(v.name) ?? v) : values;
  for (const op of graph.ops) {
    let inputs = rename(op.inputs);
    const results = rename(op.outputs);
    const crosses = op.kind === "dispatch" || op.kind === "collect";
    if (crosses)
      inputs = inputs.map((v, i): Value => {
        if (!taken.has(v.name)) {
          taken.add(v.name);
          return v;
        }
        const other: Value = { ...v, name: fresh(`${v.name}_copy`) };
        ops.push(copy(v, other, op.kind === "dispatch" ? "attention" : `ffn${Math.floor((i * ranks) / inputs.length)}`));
        return other;
      });
    const same = results === op.outputs && inputs.every((v, i) => v === op.inputs[i]);
    ops.push(same ? op : { ...op, inputs, outputs: results });
    // what arrives lies in memory that the peer writes
    if (crosses) for (const v of results) taken.add(v.name);
  }
  return ops.length + last.length === graph.ops.length ? graph : { ...graph, ops: [...ops, ...last], outputs };
};

const ranksOf = (graph: Graph): number =>
  graph.ops.reduce((n, op) => Math.max(n, op.place?.startsWith("ffn") ? Number(op.place.slice(3)) + 1 : 0), 0);

// --- sizes ---------------------------------------------------------------------------------------------------------------------

interface Sizes {
  /** bytes of a tensor at its largest; a UserError when no memory has as many */
  bytes(type: TensorType): number;
  /** whether its first axis is rows, so that an FFN rank has one segment of them for each attention rank */
  isRows(type: TensorType): boolean;
}

/** Of one buffer; what the runtime takes too. */
const mostBytes = 2 ** 46;

const sizer = (symbols: readonly DimSymbol[]): Sizes => {
  const extents = new Map<Dim, number>();
  const rows = new Map<Dim, boolean>();
  const extent = (d: Dim): number => {
    if (typeof d === "number") return d;
    const n = extents.get(d) ?? mostOf(d, symbols);
    extents.set(d, n);
    return n;
  };
  return {
    bytes: (type) => {
      const bytes = type.shape.reduce((n: number, d) => n * extent(d), dtypeBytes(type.dtype));
      if (bytes > mostBytes)
        throw new UserError(`${typeText(type)} has ${bytes} bytes when its symbols are at their largest; declare smaller maxima`);
      return bytes;
    },
    isRows: ({ shape: [d] }) => {
      if (d === undefined || typeof d === "number") return false;
      const is = rows.get(d) ?? multipleOf(d, tokenSymbol) !== undefined;
      rows.set(d, is);
      return is;
    },
  };
};

// --- who does what, when ---------------------------------------------------------------------------------------------------------

interface Flow {
  readonly exchanges: number;
  readonly dispatches: readonly Op[];
  readonly collects: readonly Op[];
  /** what a slot of an attention rank does: one list per stage, exchange s between stages s and s+1 */
  readonly stages: readonly (readonly Item[])[];
  /** launches of each FFN rank, by exchange */
  readonly blocks: readonly (readonly (readonly Op[])[])[];
  /** state version -> state */
  readonly stateOf: ReadonlyMap<string, string>;
}

const fail = (what: string): never => {
  throw new Error(`cannot schedule: ${what}`);
};

const describe = (op: Op): string =>
  `${op.kind} ${op.outputs.map((v) => v.name).join(", ")}${op.origin ? ` (${op.origin})` : ""}`;

const ffnRank = (op: Op, ranks: number): number | undefined => {
  if (op.kind === "dispatch" || op.kind === "collect" || !op.place?.startsWith("ffn")) return undefined;
  if (op.place === "ffn" && ranks === 1) return 0;
  const f = Number(op.place.slice(3));
  if (op.place === "ffn" || !Number.isInteger(f) || f >= ranks)
    return fail(`${describe(op)} is placed on ${op.place}, of ${ranks} FFN ranks`);
  return f;
};

/** FFN ranks know the rows of each message, and no other size. */
const onlyTokensVary = (op: Op): void => {
  for (const { name, type } of [...op.inputs, ...op.outputs]) {
    const other = type.kind === "kv" ? undefined : type.shape.flatMap(dimSymbols).find((s) => s !== tokenSymbol);
    if (other !== undefined)
      throw new UserError(
        `${describe(op)}: '${name}' ${typeText(type)} depends on ${other}, and only ${tokenSymbol} varies on FFN ranks; keep the op on the attention side (--ranks 1A0F keeps all)`,
      );
  }
};

/** Stages and blocks by what depends on what; the order of the graph decides only among ops of one stage. */
const readFlow = (graph: Graph, ranks: number): Flow => {
  const dispatches: Op[] = [];
  const collects: Op[] = [];
  const number = (op: Op): number => {
    const e = op.attrs.exchange;
    return typeof e === "number" && Number.isInteger(e) && e >= 0 ? e : fail(`${describe(op)} has no exchange number`);
  };
  for (const op of graph.ops) {
    if (op.kind === "dispatch") dispatches[number(op)] = op;
    if (op.kind === "collect") collects[number(op)] = op;
  }
  const exchanges = dispatches.length;
  for (let e = 0; e < exchanges; e++)
    if (!dispatches[e] || !collects[e]) fail(`exchange ${e} of ${exchanges} lacks its ${dispatches[e] ? "collect" : "dispatch"}`);
  if (collects.length !== exchanges) fail(`${collects.length} collects for ${exchanges} dispatches`);
  if (exchanges > 0 && ranks === 0) fail("the graph has exchanges, and there are no FFN ranks");

  // attention values: the stage in which they exist; FFN values: the exchange; both found in graph order, which defines before it uses
  const stage = new Map<string, number>();
  const home = new Map<string, number>(); // FFN rank of a value
  const stateOf = new Map<string, string>(graph.states.map((v) => [v.name, v.name]));
  const readers = new Map<string, Op[]>(); // of a state version
  const producer = new Map<string, Op>();
  const stageOfOp = new Map<Op, number>();
  const before = new Map<Op, Op[]>(); // an op that changes a state comes after the readers of the version it changes
  const floating: Op[] = []; // FFN ops that need nothing of an exchange
  for (const v of [...graph.inputs, ...graph.states, ...graph.weights.map((w) => w.value)]) stage.set(v.name, 0);
  const weights = new Set<string>(graph.weights.map((w) => w.value.name));

  for (const op of graph.ops) {
    for (const v of op.outputs) producer.set(v.name, op);
    if (op.kind === "dispatch") {
      const e = number(op);
      for (const v of op.inputs)
        if ((stage.get(v.name) ?? Number.POSITIVE_INFINITY) > e)
          fail(`${describe(op)} sends ${v.name}, which is known only after exchange ${e}`);
      if (op.outputs.length !== op.inputs.length * ranks)
        fail(`${describe(op)} has ${op.outputs.length} results for ${ranks} FFN ranks`);
      op.outputs.forEach((v, i) => {
        stage.set(v.name, e);
        home.set(v.name, Math.floor(i / op.inputs.length));
      });
      continue;
    }
    if (op.kind === "collect") {
      if (op.inputs.length === 0 || op.inputs.length % ranks !== 0)
        fail(`${describe(op)} takes ${op.inputs.length} values from ${ranks} FFN ranks`);
      const per = op.inputs.length / ranks;
      op.inputs.forEach((v, i) => {
        if (home.get(v.name) !== Math.floor(i / per))
          fail(`${describe(op)}: input ${i}, ${v.name}, is not of FFN rank ${Math.floor(i / per)}`);
        if ((stage.get(v.name) as number) > number(op)) fail(`${describe(op)} returns ${v.name} of a later exchange`);
      });
      for (const v of op.outputs) stage.set(v.name, number(op) + 1);
      continue;
    }
    const f = ffnRank(op, ranks);
    let at = f === undefined ? 0 : -1;
    for (const v of op.inputs) {
      const s = stage.get(v.name);
      if (s === undefined) return fail(`${describe(op)} uses ${v.name} before it is defined`);
      if (weights.has(v.name)) continue;
      if (home.get(v.name) !== f) fail(`${describe(op)} of ${op.place ?? "attention"} uses ${v.name}, which is elsewhere`);
      at = Math.max(at, s);
    }
    if (f === undefined) {
      const changed = op.outputs.some((v) => v.type.kind === "kv");
      for (const v of op.inputs) {
        if (v.type.kind !== "kv") continue;
        if (changed) {
          const earlier = readers.get(v.name) ?? [];
          before.set(op, earlier);
          for (const r of earlier) at = Math.max(at, stageOfOp.get(r) as number);
        } else readers.set(v.name, [...(readers.get(v.name) ?? []), op]);
      }
      for (const v of op.outputs)
        if (v.type.kind === "kv")
          stateOf.set(v.name, stateOf.get(changedState(op)?.name ?? "") ?? fail(`${describe(op)} makes a state`));
    } else {
      if (op.outputs.some((v) => v.type.kind === "kv")) fail(`${describe(op)} changes a state on an FFN rank`);
      if (at < 0) floating.push(op);
    }
    stageOfOp.set(op, at);
    for (const v of op.outputs) {
      stage.set(v.name, at);
      if (f !== undefined) home.set(v.name, f);
    }
  }

  // constants of the FFN side: with their first user
  for (const op of floating.reverse()) {
    const names = new Set<string>(op.outputs.map((v) => v.name));
    const users = graph.ops.filter((o) => o.inputs.some((v) => names.has(v.name)));
    const first = Math.min(...users.map((o) => (o.kind === "collect" ? number(o) : (stageOfOp.get(o) as number))));
    stageOfOp.set(op, Number.isFinite(first) ? first : 0);
  }

  const ofStage: Op[][] = Array.from({ length: exchanges + 1 }, () => []);
  const blocks: Op[][][] = Array.from({ length: ranks }, () => Array.from({ length: exchanges }, () => []));
  for (const [op, at] of stageOfOp) {
    const f = ffnRank(op, ranks);
    if (f === undefined) ofStage[at]?.push(op);
    else blocks[f]?.[at]?.push(op);
  }

  // what the exchange needs comes before its post, the rest after, while the FFN side works
  const stages = ofStage.map((ops, s): Item[] => {
    const items: Item[] = s > 0 ? [{ kind: "wait", exchange: s - 1 }] : [];
    const launch = (op: Op): Item => ({ kind: "launch", op });
    if (s === exchanges) return [...items, ...ops.map(launch)];
    const needed = new Set<Op>();
    const pending: Op[] = [];
    const need = (op: Op | undefined): void => {
      if (!op || needed.has(op) || stageOfOp.get(op) !== s) return;
      needed.add(op);
      pending.push(op);
    };
    for (const v of (dispatches[s] as Op).inputs) need(producer.get(v.name));
    for (let op = pending.pop(); op; op = pending.pop()) {
      for (const v of op.inputs) need(producer.get(v.name));
      for (const r of before.get(op) ?? []) need(r);
    }
    return [
      ...items,
      ...ops.filter((op) => needed.has(op)).map(launch),
      { kind: "post", exchange: s },
      ...ops.filter((op) => !needed.has(op)).map(launch),
    ];
  });
  return { exchanges, dispatches, collects, stages, blocks, stateOf };
};

/** The state an op changes: its `kv` input, when it has a `kv` result. */
const changedState = (op: Op): Value | undefined =>
  op.outputs.some((v) => v.type.kind === "kv") ? op.inputs.find((v) => v.type.kind === "kv") : undefined;

// --- the wire --------------------------------------------------------------------------------------------------------------------

interface Transfers {
  readonly of: readonly Transfer[];
  readonly types: readonly ExchangeType[];
  /** the type of each exchange */
  readonly exchanges: readonly string[];
  /** every pushed tensor in order, the header last; every pulled one */
  readonly push: readonly Field[];
  readonly pull: readonly Field[];
}

/**
 * Finds for every value that crosses a tensor of the wire. Its memory is permanent on both sides (K1), so exchanges share one as long as
 * nobody needs the old contents when the new ones are written; a value that is needed longer gets another.
 */
const planTransfers = (flow: Flow, sizes: Sizes): Transfers => {
  const written = new Map<string, number>(); // position in a slot's items
  const lastRead = new Map<string, number>();
  const postAt: number[] = [];
  const waitAt: number[] = [];
  flow.stages.flat().forEach((item, at) => {
    if (item.kind === "post") postAt[item.exchange] = at;
    else if (item.kind === "wait") waitAt[item.exchange] = at;
    else {
      for (const v of item.op.inputs) lastRead.set(v.name, at);
      for (const v of item.op.outputs) written.set(v.name, at);
    }
  });
  const ffnWritten = new Map<string, number>(); // exchange
  const ffnLastRead = new Map<string, number>();
  for (const block of flow.blocks)
    block.forEach((ops, e) => {
      for (const op of ops) {
        for (const v of op.inputs) ffnLastRead.set(v.name, e);
        for (const v of op.outputs) ffnWritten.set(v.name, e);
      }
    });

  const wires = new Map<string, Wire[]>(); // by role and type
  const roles = new Map<string, number>();
  const push: Field[] = [];
  const pull: Field[] = [];
  const wire = (role: string, type: TensorType, below: number | undefined, from: number, ffnFrom: number, all: Field[]): Wire => {
    const family = `${role} ${typeText(type)} ${below ?? ""}`;
    const known = wires.get(family) ?? [];
    wires.set(family, known);
    const free = known.find((w) => w.busyUntil < from && w.ffnUntil < ffnFrom);
    if (free) return free;
    const n = roles.get(role) ?? 0;
    roles.set(role, n + 1);
    const field: Field = {
      name: n === 0 ? role : `${role}_${n}`,
      dtype: type.dtype,
      shape: type.shape,
      bytes: sizes.bytes(type),
      ...(below === undefined ? {} : { below }),
    };
    const fresh: Wire = { field, busyUntil: -1, ffnUntil: -1 };
    known.push(fresh);
    all.push(field);
    return fresh;
  };

  const sent = new Set<string>();
  const pairs = flow.dispatches.map((dispatch, e): Omit<Transfer, "type"> => {
    const collect = flow.collects[e] as Op;
    const ranks = dispatch.outputs.length / dispatch.inputs.length;
    const wait = waitAt[e] as number;
    const roleOf = roleNames(dispatch.inputs);
    const pushed = dispatch.inputs.map((v, i) => {
      const from = written.get(v.name);
      if (from === undefined || sent.has(v.name) || v.type.kind !== "tensor")
        return fail(
          `${describe(dispatch)} sends ${v.name}, which is ${sent.has(v.name) ? "sent already" : "not made by an op"}; it needs a copy (withHomes)`,
        );
      sent.add(v.name);
      const arrived = Array.from({ length: ranks }, (_, f) => dispatch.outputs[f * dispatch.inputs.length + i] as Value);
      const w = wire(roleOf[i] as string, v.type, weightsSelected(flow, e, arrived), from, e, push);
      w.busyUntil = Math.max(wait, lastRead.get(v.name) ?? 0);
      w.ffnUntil = Math.max(e, ...arrived.map((x) => ffnLastRead.get(x.name) ?? e));
      return w;
    });
    const per = collect.inputs.length / ranks;
    const pulled = Array.from({ length: per }, (_, i) => {
      const partials = collect.inputs.filter((_, j) => j % per === i);
      const received = collect.outputs.filter((_, j) => j % per === i);
      const type = partials[0]?.type;
      if (type?.kind !== "tensor") return fail(`${describe(collect)} collects a state`);
      let from = e;
      for (const v of partials) {
        const at = ffnWritten.get(v.name);
        if (at === undefined || sent.has(v.name) || typeText(v.type) !== typeText(type))
          return fail(
            `${describe(collect)} returns ${v.name}, which no op of this exchange makes for it alone; it needs a copy (withHomes)`,
          );
        sent.add(v.name);
        from = Math.min(from, at);
      }
      const w = wire("back", type, undefined, postAt[e] as number, from, pull);
      w.busyUntil = Math.max(wait, ...received.map((v) => lastRead.get(v.name) ?? 0));
      w.ffnUntil = Math.max(e, ...partials.map((v) => ffnLastRead.get(v.name) ?? e));
      return w;
    });
    return { push: pushed, pull: pulled };
  });

  const head: Field = { name: "head", dtype: "u8", shape: [headerBytes], bytes: headerBytes };
  const order = new Map(push.map((field, i) => [field.name, i]));
  const types = new Map<string, ExchangeType>();
  const of = pairs.map((pair): Transfer => {
    const fields = pair.push.map((w) => w.field).sort((a, b) => (order.get(a.name) as number) - (order.get(b.name) as number));
    const content = { push: [...fields, head], pull: pair.pull.map((w) => w.field) };
    const text = JSON.stringify(content);
    let type = types.get(text);
    if (!type) {
      const kind = fields.some((f) => f.below !== undefined) ? "moe" : "dense";
      const n = [...types.values()].filter((t) => t.name.replace(/\d+$/, "") === kind).length;
      type = { name: n === 0 ? kind : `${kind}${n + 1}`, ...content };
      types.set(text, type);
    }
    return { ...pair, type: type.name };
  });
  return {
    of,
    types: [...types.values()],
    exchanges: of.map((t) => t.type),
    push: pairs.length === 0 ? [] : [...push, head],
    pull,
  };
};

/** `tok` what the FFN works on, `scl` its scales, `ids` and `wgt` the experts chosen and their weights; anything else x0, x1 ... */
const roleNames = (values: readonly Value[]): string[] => {
  const dtypes = values.map((v) => (v.type.kind === "tensor" ? v.type.dtype : undefined));
  let ids: number | undefined;
  let others = 0;
  return values.map((_, i) => {
    const shape = (at: number): string => (values[at] ? typeText((values[at] as Value).type).replace(/^\w+/, "") : "");
    if (i === 0) return "tok";
    if (dtypes[i] === "i32" && ids === undefined) {
      ids = i;
      return "ids";
    }
    if (dtypes[i] === "f32" && ids === i - 1 && shape(ids) === shape(i)) return "wgt";
    if (dtypes[i] === "f32" && i === 1 && (dtypes[0] === "e4m3" || dtypes[0] === "i8")) return "scl";
    return `x${others++}`;
  });
};

/** How many weights an integer field chooses among: experts over all FFN ranks. */
const weightsSelected = (flow: Flow, e: number, arrived: readonly Value[]): number | undefined => {
  if (arrived[0]?.type.kind !== "tensor" || !/^[iu]/.test(arrived[0].type.dtype)) return undefined;
  const experts = (op: Op, name: string): number => {
    const at = op.inputs.findIndex((v) => v.name === name);
    if (at < 0) return 0;
    if (op.body) {
      const inner = op.body.inputs[at]?.name ?? name;
      return Math.max(0, ...op.body.ops.map((o) => experts(o, inner)));
    }
    const first = typeof op.attrs.first === "number" ? op.attrs.first : 0;
    if (op.kind === "combine" && at === 1 && typeof op.attrs.count === "number") return first + op.attrs.count;
    // the ids are the last operand; quantised tokens are integers too
    if (!op.kind.endsWith("grouped_linear") || at !== op.inputs.length - 1) return 0;
    const stack = op.inputs.find((v) => v.type.kind === "tensor" && v.type.shape.length === 3)?.type;
    return stack?.kind === "tensor" && typeof stack.shape[0] === "number" ? first + stack.shape[0] : 0;
  };
  let most = 0;
  arrived.forEach((v, f) => {
    for (const op of flow.blocks[f]?.[e] ?? []) most = Math.max(most, experts(op, v.name));
  });
  if (most === 0) return undefined;
  // ranks with experts of their own number them from their first one
  const all = flow.dispatches[e]?.attrs.experts;
  return typeof all === "number" ? all : most;
};

/** schedule, direction, attention rank, slot, tensor; pulled tensors are numbered per FFN rank, pushed ones go to all under one number */
const keysOf = ({ options, push, pull, slots }: Context): Key[] => {
  const keys: Key[] = [];
  const number = (direction: 0 | 1, a: number, slot: number, tensor: number): number =>
    options.index * 2 ** 28 + direction * 2 ** 24 + a * 2 ** 16 + slot * 2 ** 8 + tensor;
  if (push.length > 256 || pull.length * options.ffn.ranks > 256)
    throw new UserError(
      `${push.length} tensors out and ${pull.length} back from each of ${options.ffn.ranks} FFN ranks: at most 256 each way`,
    );
  for (let a = 0; a < options.attention.ranks; a++)
    for (let f = 0; f < options.ffn.ranks; f++)
      for (const slot of slots) {
        push.forEach(({ name: field }, t) => {
          const name = fieldBuffer(field, slot);
          keys.push({ key: number(0, a, slot, t), direction: "a2f", a, f, slot, field, source: name, target: name });
        });
        pull.forEach(({ name: field }, t) => {
          const source = fieldBuffer(field, slot);
          const target = partBuffer(field, slot, f);
          keys.push({ key: number(1, a, slot, f * pull.length + t), direction: "f2a", a, f, slot, field, source, target });
        });
      }
  return keys;
};

/** `tok0`, and `x1.0` where the field ends in a digit */
const fieldBuffer = (field: string, slot: number): string => (/\d$/.test(field) ? `${field}.${slot}` : `${field}${slot}`);
const partBuffer = (field: string, slot: number, f: number): string => `${fieldBuffer(field, slot)}.${f}`;

// --- programs --------------------------------------------------------------------------------------------------------------------

interface Context {
  readonly graph: Graph;
  readonly options: ScheduleOptions;
  readonly flow: Flow;
  readonly sizes: Sizes;
  readonly transfers: readonly Transfer[];
  readonly push: readonly Field[];
  readonly pull: readonly Field[];
  readonly slots: readonly number[];
}

type Program = Omit<RankProgram, "rank">;

/** Names and collects the buffers of one rank. */
class Memory {
  readonly buffers: Unplaced[] = [];
  private readonly names = new Set<string>();
  private readonly context: Context;
  private readonly segments: number;
  /** value -> buffer of each slot */
  private readonly of = new Map<string, readonly string[]>();

  constructor(context: Context, segments: number) {
    this.context = context;
    this.segments = segments;
  }

  add(
    wanted: string,
    region: Buffer["region"],
    type: TensorType,
    more: { slot?: number; binds?: string; bytes?: number; whole?: boolean },
  ): string {
    let name = wanted;
    while (this.names.has(name)) name += "_";
    this.names.add(name);
    const segments = more.whole !== true && this.context.sizes.isRows(type) ? this.segments : 1;
    this.buffers.push({
      name,
      region,
      dtype: type.dtype,
      shape: type.shape,
      segments,
      bytes: more.bytes ?? segments * this.context.sizes.bytes(type),
      ...(more.slot === undefined ? {} : { slot: more.slot }),
      ...(more.binds === undefined ? {} : { binds: more.binds }),
    });
    return name;
  }

  /** A buffer of the wire; the names that keys use are never taken by another. */
  exchange(name: string, field: Field, segments: number, slot: number): string {
    this.names.add(name);
    const { dtype, shape, bytes } = field;
    this.buffers.push({ name, region: "exchange", dtype, shape, segments, bytes: segments * bytes, slot });
    return name;
  }

  bind(value: string, names: readonly string[]): void {
    this.of.set(value, names);
  }

  known(value: string): boolean {
    return this.of.has(value);
  }

  name(value: Value, slot: number): string {
    return this.of.get(value.name)?.[slot] ?? fail(`${value.name} has no buffer`);
  }

  /** Weights that these ops use, in the order of the graph: the same in every schedule of a bundle. */
  weights(ops: readonly Op[]): void {
    const used = new Set<string>();
    for (const op of ops) for (const v of op.inputs) used.add(v.name);
    const { graph, options, slots } = this.context;
    for (const { value } of graph.weights) {
      if (!used.has(value.name)) continue;
      const bytes = align(options.weightBytes(value.name));
      const name = this.add(value.name, "weights", value.type, { binds: value.name, bytes, whole: true });
      this.bind(
        value.name,
        slots.map(() => name),
      );
    }
  }

  /** Scratch for the results of an op that have no other home. */
  results(op: Op): void {
    for (const value of op.outputs) {
      if (value.type.kind === "kv" || this.known(value.name)) continue;
      const type = value.type;
      this.bind(
        value.name,
        this.context.slots.map((slot) => this.add(`${value.name}.${slot}`, "scratch", type, { slot })),
      );
    }
  }

  launch(op: Op, slot: number, rows: string): Step {
    const changed = changedState(op);
    const inputs = op.inputs.filter((v) => v !== changed).map((v) => this.name(v, slot));
    return {
      op: "launch",
      kernel: this.context.options.kernelOf(op),
      in: inputs,
      out: op.outputs.filter((v) => v.type.kind !== "kv").map((v) => this.name(v, slot)),
      ...(changed ? { inout: [this.name(changed, slot)] } : {}),
      rows,
      slot,
    };
  }

  finish(steps: readonly Step[]): Program {
    const { buffers, memory } = planMemory(this.buffers, steps);
    return { buffers, steps, memory };
  }
}

const attentionProgram = (context: Context): Program => {
  const { graph, options, flow, slots, transfers } = context;
  const memory = new Memory(context, 1);
  const ops = flow.stages.flat().flatMap((item) => (item.kind === "launch" ? [item.op] : []));
  const fields = { push: context.push.filter((f) => f.name !== "head"), pull: context.pull };
  const heads = slots.map((slot) => fieldBuffer("head", slot));

  // names of the wire first, so that no value takes one
  for (const slot of slots) {
    for (const f of fields.push) memory.exchange(fieldBuffer(f.name, slot), f, 1, slot);
    const head: Field = { name: "head", dtype: "u8", shape: [headerBytes], bytes: headerBytes };
    if (flow.exchanges > 0) memory.exchange(heads[slot] as string, head, 1, slot);
    else
      memory.add(
        heads[slot] as string,
        "input",
        { kind: "tensor", dtype: "u8", shape: [headerBytes] },
        { slot, bytes: headerBytes },
      );
    for (const f of fields.pull)
      for (let r = 0; r < options.ffn.ranks; r++) memory.exchange(partBuffer(f.name, slot, r), f, 1, slot);
  }
  memory.weights(ops);
  for (const state of graph.states) {
    const kv = options.kv ?? fail(`state ${state.name} needs the page geometry of the attention backend`);
    const type: TensorType = { kind: "tensor", dtype: "u8", shape: [kv.pages, kv.pageBytes] };
    const name = memory.add(state.name, "state", type, { binds: state.name, bytes: kv.pages * kv.pageBytes });
    for (const [version, root] of flow.stateOf)
      if (root === state.name)
        memory.bind(
          version,
          slots.map(() => name),
        );
  }
  for (const region of ["input", "output"] as const)
    for (const [i, value] of (region === "input" ? graph.inputs : graph.outputs).entries()) {
      const { type, name } = value;
      const binds = region === "input" ? name : (options.outputs?.[i] ?? name);
      if (type.kind !== "tensor") return fail(`${region} ${name} is a state`);
      if (memory.known(name)) return fail(`output ${name} is also an input or a weight; it needs a copy (withHomes)`);
      memory.bind(
        name,
        slots.map((slot) => memory.add(`${region === "input" ? "in" : "out"}${slot}.${binds}`, region, type, { slot, binds })),
      );
    }
  flow.dispatches.forEach((op, e) => {
    const { push, pull } = transfers[e] as Transfer;
    const bind = (value: Value, name: (slot: number) => string): void => {
      if (memory.known(value.name)) fail(`${value.name} is sent, received or returned twice; it needs a copy (withHomes)`);
      memory.bind(value.name, slots.map(name));
    };
    for (const [i, v] of op.inputs.entries()) bind(v, (slot) => fieldBuffer((push[i] as Wire).field.name, slot));
    for (const [i, v] of (flow.collects[e] as Op).outputs.entries())
      bind(v, (slot) => partBuffer((pull[i % pull.length] as Wire).field.name, slot, Math.floor(i / pull.length)));
  });
  for (const op of ops) memory.results(op);

  const steps: Step[] = [];
  // a message leaves after the last launch of its slot: all it sends is written, and all that the answer overwrites is read
  const latest = new Map<number, number>();
  for (const stage of flow.stages)
    for (const slot of slots)
      for (const item of stage) {
        if (item.kind === "wait") steps.push({ op: "wait", slot, exchange: item.exchange });
        else if (item.kind === "post") {
          const after = latest.get(slot) ?? fail(`exchange ${item.exchange} sends nothing`);
          steps.push({ op: "post", slot, exchange: item.exchange, type: (transfers[item.exchange] as Transfer).type, after });
        } else {
          latest.set(slot, steps.length);
          steps.push(memory.launch(item.op, slot, heads[slot] as string));
        }
      }
  return memory.finish(steps);
};

const ffnProgram = (context: Context, f: number): Program => {
  const { options, flow, slots, transfers } = context;
  const ranks = options.attention.ranks;
  const memory = new Memory(context, ranks);
  const blocks = flow.blocks[f] ?? [];
  const ops = blocks.flat();
  for (const slot of slots)
    for (const field of [...context.push, ...context.pull]) memory.exchange(fieldBuffer(field.name, slot), field, ranks, slot);
  memory.weights(ops);
  flow.dispatches.forEach((op, e) => {
    const { push, pull } = transfers[e] as Transfer;
    push.forEach((w, i) => {
      const value = op.outputs[f * push.length + i] as Value;
      memory.bind(
        value.name,
        slots.map((slot) => fieldBuffer(w.field.name, slot)),
      );
    });
    const collect = flow.collects[e] as Op;
    pull.forEach((w, i) => {
      const value = collect.inputs[f * pull.length + i] as Value;
      memory.bind(
        value.name,
        slots.map((slot) => fieldBuffer(w.field.name, slot)),
      );
    });
  });
  for (const op of ops) memory.results(op);

  const steps: Step[] = [];
  const latest = new Map<number, number>();
  blocks.forEach((block, e) => {
    for (const slot of slots) {
      for (let a = 0; a < ranks; a++) steps.push({ op: "accept", slot, exchange: e, from: a });
      for (const op of block) {
        latest.set(slot, steps.length);
        steps.push(memory.launch(op, slot, fieldBuffer("head", slot)));
      }
      const after = latest.get(slot) ?? fail(`FFN rank ${f} returns nothing in exchange ${e}`);
      for (let a = 0; a < ranks; a++) steps.push({ op: "reply", slot, exchange: e, to: a, after });
    }
  });
  return memory.finish(steps);
};
