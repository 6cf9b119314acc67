/**
 * Splits what the FFN side does over F ranks. Attention ranks are data parallel and not in the graph.
 *
 * Experts go to X groups of Y ranks (`ep`: F groups of one, `tp`: one group of F), in contiguous ranges as even as possible. Inside a group,
 * and over all F ranks for linears without experts, columns are split: a linear gives each rank whole blocks of 128 of its columns, what is
 * elementwise follows on those columns, and the linear that takes them contracts its part, so that ranks hold partial sums. Sums of partial
 * sums, casts, and products with something whole keep that; anything else needs the whole value, so what leads to it is not split.
 * Each rank rounds its partial as the graph rounds the whole. The attention side adds the residual and the partials in f32, in ascending
 * rank order, and rounds once.
 *
 * Quantisation of split columns is per rank: groups of 128 columns are the same groups; a scale for the whole row becomes one for the
 * rank's columns, each rank's sum being scaled by its own.
 */
import type { Attrs } from "../../ir/attr.ts";
import { UserError } from "../../ir/error.ts";
import type { Graph, Op, Place, Slice, StoredSource, Value, Weight, WeightSource } from "../../ir/graph.ts";
import { inferTypes, knowledge } from "../../ir/ops/index.ts";
import { type DType, isFloat, type TensorType, tensor } from "../../ir/type.ts";
import type { Pass } from "../pass.ts";
import { type Contraction, contraction } from "./contraction.ts";
import { withoutDead } from "./dead.ts";
import { type Flow, flowOf, freshNames, usesOf } from "./flow.ts";
import { holds } from "./fold.ts";

/** X expert groups of Y ranks each; X * Y is the number of FFN ranks. */
export interface Split {
  readonly groups: number;
  readonly ranksPerGroup: number;
}

/** Reads `ep`, `tp` or `epXtpY` for a number of FFN ranks; throws a UserError (usage) when it is none of them or X * Y is another number. */
export const parseSplit = (text: string, ranks: number): Split => {
  if (text === "ep") return { groups: ranks, ranksPerGroup: 1 };
  if (text === "tp") return { groups: 1, ranksPerGroup: ranks };
  const [, x, y] = /^ep([1-9]\d*)tp([1-9]\d*)$/.exec(text) ?? [];
  if (x === undefined || y === undefined)
    throw new UserError(`--ffn-split ${text}: write ep, tp or epXtpY, such as ep2tp4 for 8 FFN ranks`, 2);
  if (Number(x) * Number(y) !== ranks)
    throw new UserError(
      `--ffn-split ${text}: ${x} groups of ${y} are ${Number(x) * Number(y)} ranks, but there are ${ranks}; change --ranks or the split`,
      2,
    );
  return { groups: Number(x), ranksPerGroup: Number(y) };
};

type Range = readonly [number, number];

/** Columns that stay together: the blocks of fp8 scales, and of the weights' scales with them. */
const blockColumns = 128;

/** The share of `part` when `count` things are dealt to `parts` in contiguous ranges, the first ones larger by one. */
export const share = (count: number, parts: number, part: number): Range => {
  const each = Math.floor(count / parts);
  const more = count % parts;
  const start = part * each + Math.min(part, more);
  return [start, start + each + (part < more ? 1 : 0)];
};

const shapeOf = (v: Value): TensorType["shape"] => (v.type as TensorType).shape;
const sameShape = (a: Value, b: Value): boolean => shapeOf(a).join() === shapeOf(b).join();
const lastDim = (v: Value): number | undefined => {
  const d = shapeOf(v).length >= 2 ? shapeOf(v).at(-1) : undefined;
  return typeof d === "number" ? d : undefined;
};

/** One exchange of a partitioned graph. */
interface Part {
  readonly dispatch: Op;
  readonly collect: Op;
  /** FFN ops that depend on what was dispatched, in order */
  readonly ops: readonly Op[];
}

const partsOf = (g: Graph): readonly Part[] => {
  const parts: { dispatch: Op; ops: Op[]; collect?: Op }[] = [];
  const owner = new Map<string, (typeof parts)[number]>();
  for (const op of g.ops) {
    if (op.kind === "dispatch") {
      const part = { dispatch: op, ops: [] };
      parts.push(part);
      for (const v of op.outputs) owner.set(v.name, part);
      continue;
    }
    const part = op.inputs.map((v) => owner.get(v.name)).find((p) => p !== undefined);
    if (part === undefined) continue;
    if (op.kind === "collect") part.collect = op;
    else {
      part.ops.push(op);
      for (const v of op.outputs) owner.set(v.name, part);
    }
  }
  return parts.map((p) => {
    if (p.collect === undefined) throw new Error(`dispatch ${p.dispatch.attrs.exchange} has no collect`);
    return { dispatch: p.dispatch, ops: p.ops, collect: p.collect };
  });
};

const isElementwise = (op: Op): boolean => op.inputs.length > 0 && knowledge(op.kind).scalar !== undefined;

/** How an exchange's values divide: which are split in columns (by group, the whole number of columns), and what is a partial sum. */
interface Plan {
  /** the columns of the group a value belongs to, when it is split */
  columns(v: Value): ColumnGroup | undefined;
  readonly grouped: ReadonlySet<string>;
}
interface ColumnGroup {
  readonly columns: number;
  /** split over the ranks of an expert group, not over all */
  readonly experts: boolean;
  /** for messages: the weight that makes the columns */
  readonly weight: string;
}

/** Sets of values that share their columns. */
class Ties {
  private readonly parent: Map<string, string> = new Map<string, string>();
  find(name: string): string {
    let root = name;
    for (let up = this.parent.get(root); up !== undefined; up = this.parent.get(root)) root = up;
    return root;
  }
  tie(a: string, b: string): void {
    const [x, y] = [this.find(a), this.find(b)];
    if (x !== y) this.parent.set(x, y);
  }
}

/** Decides what to split. Values that something needs whole, and all that shares columns with them, are not. */
const planOf = (g: Graph, flow: Flow, part: Part, split: Split): Plan => {
  const weights = new Set(g.weights.map((w) => w.value.name));
  const local = new Set([...part.dispatch.outputs, ...part.ops.flatMap((op) => op.outputs)].map((v) => v.name));
  const members = new Set(part.ops);
  const ties = new Ties();
  const whole = new Set<string>(part.dispatch.outputs.map((v) => v.name));

  /** values that come out of a contraction, and of two in a row: those may be partial sums */
  const contracted = new Set<string>();
  const mayBePartial = new Set<string>();
  /** rows of pairs (token, expert), of which a rank has its own experts' only */
  const grouped = new Set<string>();
  for (const op of part.ops) {
    const c = contraction(op);
    const has = (set: ReadonlySet<string>): boolean => op.inputs.some((v) => set.has(v.name));
    for (const v of op.outputs) {
      if (c !== undefined || has(contracted)) contracted.add(v.name);
      if (c !== undefined ? contracted.has(c.x.name) : op.kind === "combine" || (isElementwise(op) && has(mayBePartial)))
        mayBePartial.add(v.name);
      if (c?.ids !== undefined || (op.kind !== "combine" && c === undefined && has(grouped))) grouped.add(v.name);
    }
  }

  // what a partial sum may become: backwards from the collect
  const partialFits = new Map<string, boolean>();
  const fits = (v: Value): boolean =>
    !flow.outputs.has(v.name) &&
    usesOf(flow, v).every((op) => {
      if (op === part.collect) return true;
      const [out] = op.outputs;
      if (!members.has(op) || out === undefined || !(partialFits.get(out.name) ?? false)) return false;
      const others = op.inputs.filter((o) => o.name !== v.name);
      if (op.kind !== "combine" && !sameShape(v, out)) return false;
      const alone = others.every((o) => !mayBePartial.has(o.name));
      if (op.kind === "add" || op.kind === "sub" || op.kind === "neg") return true;
      if (op.kind === "cast") return isFloat((out.type as TensorType).dtype);
      if (op.kind === "mul") return alone && others.length === 1;
      if (op.kind === "div") return alone && op.inputs[0]?.name === v.name && others.length === 1;
      return op.kind === "combine" && op.inputs[0]?.name === v.name;
    });
  for (const op of [...part.ops].reverse()) for (const v of op.outputs) partialFits.set(v.name, fits(v));

  const needWhole = (v: Value): void => {
    if (local.has(v.name)) whole.add(v.name);
  };
  part.collect.inputs.forEach(needWhole);
  for (const op of part.ops) {
    const [out] = op.outputs;
    const c = contraction(op);
    if (c !== undefined) {
      const canSum = out !== undefined && (partialFits.get(out.name) ?? false) && weights.has(c.w.name);
      if (!canSum) needWhole(c.x);
      if (c.xs !== undefined) {
        const own = flow.producer.get(c.x.name);
        if (own?.kind === "quantise" && own === flow.producer.get(c.xs.name) && canSum) ties.tie(c.x.name, c.xs.name);
        else for (const v of [c.x, c.xs]) needWhole(v);
      }
      if (c.ids !== undefined) needWhole(c.ids);
      const own = [c.w, ...(c.ws === undefined ? [] : [c.ws])].every((v) => weights.has(v.name));
      if (!own && out !== undefined) needWhole(out);
    } else if (out !== undefined && isElementwise(op)) {
      const n = lastDim(out);
      for (const v of op.inputs) {
        const same = n !== undefined && n > 1 && shapeOf(v).at(-1) === n;
        const single = shapeOf(v).length === 0 || shapeOf(v).at(-1) === 1;
        if (local.has(v.name)) {
          if (same) ties.tie(v.name, out.name);
          else needWhole(v);
        } else if (!single && !weights.has(v.name)) needWhole(out);
      }
      if (n === undefined || n === 1) needWhole(out);
    } else if (op.kind === "quantise") {
      const [x, codes, scales] = [op.inputs[0], ...op.outputs];
      const group = quantiseGroup(op);
      if (x === undefined || codes === undefined || scales === undefined)
        throw new Error("quantise has one input and two results");
      for (const v of [x, scales]) ties.tie(v.name, codes.name);
      if (group !== 0 && blockColumns % group !== 0) needWhole(codes);
      for (const user of usesOf(flow, scales)) if (contraction(user)?.xs?.name !== scales.name) needWhole(scales);
    } else {
      op.inputs.forEach(needWhole);
      op.outputs.forEach(needWhole);
    }
  }

  // a column group is split when nothing needs any of its values whole and a linear takes it
  const wholeGroups = new Set([...whole].map((name) => ties.find(name)));
  const taken = new Set(part.ops.flatMap((op) => contraction(op)?.x.name ?? []).map((name) => ties.find(name)));
  const makers = new Map<string, { readonly c: Contraction; readonly columns: number }[]>();
  for (const op of part.ops) {
    const c = contraction(op);
    const [out] = op.outputs;
    if (c === undefined || out === undefined) continue;
    const root = ties.find(out.name);
    makers.set(root, [...(makers.get(root) ?? []), { c, columns: lastDim(out) ?? 0 }]);
  }
  const groups = new Map<string, ColumnGroup>();
  for (const [root, list] of makers) {
    const [first] = list;
    const experts = list.some((m) => m.c.ids !== undefined);
    if (first === undefined || wholeGroups.has(root) || !taken.has(root)) continue;
    if (experts && (split.ranksPerGroup === 1 || !list.every((m) => m.c.ids !== undefined))) continue;
    groups.set(root, { columns: first.columns, experts, weight: first.c.w.name });
  }
  if (split.groups > 1) checkExperts(flow, part, grouped, partialFits);
  return { columns: (v) => groups.get(ties.find(v.name)), grouped };
};

/** Columns of a `quantise` that share a scale; 0 for the whole row. */
const quantiseGroup = (op: Op): number => {
  const group = typeof op.attrs.group === "number" ? op.attrs.group : 0;
  const columns = lastDim(op.inputs[0] as Value) ?? 0;
  return group >= columns ? 0 : group;
};

/** Rows of other ranks' experts hold anything on a rank: they may go through what works row by row, and must end in a `combine`. */
const checkExperts = (flow: Flow, part: Part, grouped: ReadonlySet<string>, partialFits: ReadonlyMap<string, boolean>): void => {
  const ids = new Set<string>();
  for (const op of part.ops) {
    const c = contraction(op);
    if (c?.ids !== undefined) ids.add(c.ids.name);
    if (op.kind === "combine" && grouped.has(op.inputs[0]?.name ?? "")) ids.add(op.inputs[1]?.name ?? "");
    for (const v of op.outputs) {
      if (op.kind === "combine" && !(partialFits.get(v.name) ?? false))
        cannotSplit(op, "its sum over experts is not only added to others");
      if (!grouped.has(v.name)) continue;
      for (const user of usesOf(flow, v)) {
        const takes = contraction(user);
        const rows = isElementwise(user) || user.kind === "quantise" || (takes?.ids !== undefined && takes.ids.name !== v.name);
        const summed = user.kind === "combine" && user.inputs[0]?.name === v.name;
        if (!rows && !summed) cannotSplit(user, "takes the rows of all experts");
      }
    }
  }
  if (ids.size > 1) cannotSplit(part.collect, `has ${ids.size} choices of experts (${[...ids].join(", ")}) in one exchange`);
};

const cannotSplit = (op: Op, why: string): never => {
  const where = op.origin === undefined ? `'${op.outputs[0]?.name}'` : op.origin;
  throw new UserError(`${op.kind} at ${where} cannot be divided over expert groups: ${why}; use --ffn-split tp, or one FFN rank`);
};

/** A value on one rank. */
interface Local {
  readonly value: Value;
  /** the rank's columns of a split value */
  readonly columns?: Range;
  /** one of several addends: ranks hold the others */
  readonly partial: boolean;
}
/** `nothing`: this rank's share is zero, so it is not computed. */
type OnRank = Local | "nothing";

/** Emits ops of one rank. */
interface Emit {
  op(kind: string, inputs: readonly Value[], attrs: Attrs, name: string, origin: string | undefined): Value;
  like(op: Op, inputs: readonly Value[], attrs: Attrs): readonly Value[];
  sliced(weight: Value, ranges: readonly (Range | undefined)[]): Value;
  /** a number that each rank has as a weight, so that ranks which differ in it alone have the same kernels */
  number(value: number, dtype: DType): Value;
}

/** The ops of one exchange on one rank; gives the rank's partial. */
const onRank = (
  part: Part,
  plan: Plan,
  split: Split,
  rank: number,
  received: readonly Value[],
  free: (v: Value) => Value,
  emit: Emit,
): Value => {
  const ranks = split.groups * split.ranksPerGroup;
  const group = Math.floor(rank / split.ranksPerGroup);
  const inGroup = rank % split.ranksPerGroup;
  const here = new Map<string, OnRank>();
  for (const [i, v] of part.dispatch.outputs.entries()) here.set(v.name, { value: received[i] as Value, partial: false });
  const get = (v: Value): OnRank => here.get(v.name) ?? { value: free(v), partial: false };
  const renumbered = new Map<string, Value>();
  /** choices of experts, numbered from this rank's first one */
  const choices = (ids: Value, first: number): Value => {
    const { value } = get(ids) as Local;
    if (first === 0) return value;
    const known = renumbered.get(ids.name);
    if (known !== undefined) return known;
    const own = emit.op("sub", [value, emit.number(first, "i32")], {}, `${stem(ids.name)}_own`, part.dispatch.origin);
    renumbered.set(ids.name, own);
    return own;
  };

  /** this rank's columns of a split value */
  const rangeOf = (v: Value): Range | undefined => {
    const columns = plan.columns(v);
    if (columns === undefined) return undefined;
    const parts = columns.experts ? split.ranksPerGroup : ranks;
    const blocks = Math.ceil(columns.columns / blockColumns);
    const [first, end] = share(blocks, parts, columns.experts ? inGroup : rank);
    return [first * blockColumns, Math.min(end * blockColumns, columns.columns)];
  };

  const contract = (op: Op, c: Contraction): OnRank => {
    const [out] = op.outputs as readonly [Value];
    const x = get(c.x);
    const xs = c.xs === undefined ? undefined : get(c.xs);
    if (x === "nothing" || xs === "nothing") return "nothing";
    const rows = rangeOf(out);
    const { columns } = x;
    const experts = c.ids === undefined || split.groups === 1 ? undefined : share(shapeOf(c.w)[0] as number, split.groups, group);
    if (experts !== undefined && experts[0] === experts[1]) return "nothing";
    const lead = c.ids === undefined ? [] : [experts];
    const w = emit.sliced(c.w, [...lead, rows, columns]);
    const attrs: Record<string, Attrs[string]> = { ...op.attrs };
    const inputs: Value[] = [x.value];
    if (xs !== undefined && c.ws !== undefined) {
      const [bn, bk] = op.attrs.block as readonly [number, number];
      const k = shapeOf(c.w).at(-1) as number;
      const wholeRow = bk >= k;
      inputs.push(
        xs.value,
        w,
        emit.sliced(c.ws, [...lead, inBlocks(rows, bn, op), wholeRow ? undefined : inBlocks(columns, bk, op)]),
      );
      if (wholeRow && columns !== undefined) attrs.block = [bn, columns[1] - columns[0]];
    } else inputs.push(w);
    if (c.ids !== undefined) inputs.push(choices(c.ids, experts?.[0] ?? 0));
    if (experts !== undefined) attrs.owned = true; // checkExperts has seen to that
    const [value] = emit.like(op, inputs, attrs);
    return { value: value as Value, ...(rows === undefined ? {} : { columns: rows }), partial: columns !== undefined };
  };

  const map = (op: Op): OnRank => {
    const [out] = op.outputs as readonly [Value];
    const operands = op.inputs.map(get);
    const some = operands.filter((o): o is Local => o !== "nothing");
    const partial = some.some((o) => o.partial);
    if (op.kind === "add" || op.kind === "sub") {
      // beside partial sums, something whole counts once: on rank 0
      const partialSum = partial || operands.includes("nothing");
      const addends = operands.map((o) => (o !== "nothing" && partialSum && !o.partial && rank > 0 ? "nothing" : o));
      const [a, b] = addends;
      if (a === "nothing" && b === "nothing") return "nothing";
      if (a === "nothing" && b !== undefined && b !== "nothing")
        return op.kind === "add"
          ? { ...b, partial: true }
          : { value: emit.op("neg", [b.value], {}, stem(out.name), op.origin), partial: true };
      if (b === "nothing" && a !== undefined) return { ...(a as Local), partial: true };
    } else if (operands.includes("nothing")) return "nothing";
    const columns = rangeOf(out);
    const inputs = op.inputs.map((v, i) => {
      const { value } = operands[i] as Local;
      const own = columns !== undefined && !here.has(v.name) && shapeOf(v).at(-1) !== 1 && shapeOf(v).length > 0;
      return own
        ? emit.sliced(v, [
            ...shapeOf(v)
              .slice(1)
              .map(() => undefined),
            columns,
          ])
        : value;
    });
    const [value] = emit.like(op, inputs, op.attrs);
    return { value: value as Value, ...(columns === undefined ? {} : { columns }), partial };
  };

  for (const op of part.ops) {
    const c = contraction(op);
    const [first] = op.outputs as readonly [Value];
    if (c !== undefined) here.set(first.name, contract(op, c));
    else if (isElementwise(op)) here.set(first.name, map(op));
    else if (op.kind === "combine") {
      const y = get(op.inputs[0] as Value);
      if (y === "nothing") {
        here.set(first.name, "nothing");
        continue;
      }
      const [ids, weights] = op.inputs.slice(1) as [Value, Value];
      const total = split.groups > 1 ? expertsOf(part, plan) : 0;
      const [from, end] = share(total, split.groups, group);
      const inputs = [y.value, choices(ids, from), (get(weights) as Local).value];
      const attrs = split.groups > 1 ? { ...op.attrs, count: end - from } : op.attrs;
      here.set(first.name, { value: emit.like(op, inputs, attrs)[0] as Value, partial: y.partial || split.groups > 1 });
    } else {
      const operands = op.inputs.map(get);
      if (operands.includes("nothing")) {
        for (const v of op.outputs) here.set(v.name, "nothing");
        continue;
      }
      const columns = op.kind === "quantise" ? rangeOf(first) : undefined;
      const { group: _, ...rest } = op.attrs;
      const attrs = columns !== undefined && quantiseGroup(op) === 0 ? rest : op.attrs;
      const values = emit.like(
        op,
        operands.map((o) => (o as Local).value),
        attrs,
      );
      for (const [i, v] of op.outputs.entries())
        here.set(v.name, { value: values[i] as Value, ...(columns === undefined ? {} : { columns }), partial: false });
    }
  }

  const [pull] = part.collect.inputs as readonly [Value];
  const result = get(pull);
  if (result !== "nothing" && (result.partial || rank === 0)) return result.value;
  return zeros(pull, received, part.collect.origin, emit);
};

/** Experts of an exchange: all its grouped linears have as many. */
const expertsOf = (part: Part, plan: Plan): number => {
  const sizes = new Set(
    part.ops.flatMap((op) =>
      plan.grouped.size > 0 && contraction(op)?.ids ? [shapeOf((contraction(op) as Contraction).w)[0] as number] : [],
    ),
  );
  const [size, ...others] = sizes;
  if (size === undefined || others.length > 0)
    return cannotSplit(part.collect, "its grouped linears have different numbers of experts");
  return size;
};

/** A range of elements in blocks of `block`. */
const inBlocks = (range: Range | undefined, block: number, op: Op): Range | undefined => {
  if (range === undefined) return undefined;
  if (range[0] % block !== 0)
    throw new UserError(
      `${op.origin ?? op.outputs[0]?.name}: scales in blocks of ${block} do not divide in columns of ${blockColumns}; use blocks that divide ${blockColumns}, or --ffn-split ep`,
    );
  return [range[0] / block, Math.ceil(range[1] / block)];
};

/** Zeros of a value's type: a rank without a share of an exchange still answers. */
const zeros = (like: Value, received: readonly Value[], origin: string | undefined, emit: Emit): Value => {
  const type = like.type as TensorType;
  const columns = lastDim(like);
  const source = received.find((v) => shapeOf(v)[0] === type.shape[0] && shapeOf(v).length === 2);
  if (source === undefined || columns === undefined || type.shape.length !== 2)
    throw new Error(`no zeros for '${like.name}': nothing dispatched has its rows`);
  const op = (kind: string, inputs: readonly Value[], attrs: Attrs): Value =>
    emit.op(kind, inputs, attrs, `${like.name}_none`, origin);
  const one = op("cast", [op("reduce", [source], { fn: "max" })], { to: type.dtype });
  const never = op("const", [], { value: 0, dtype: "bool" });
  const none = op("where", [never, one, op("const", [], { value: 0, dtype: type.dtype })], {});
  return columns === 1 ? none : op("spread", [none], { group: columns, size: columns });
};

/** A part of where a weight comes from, in the axes of the weight. */
export const sliceSource = (source: WeightSource, shape: readonly number[], ranges: Slice): WeightSource => {
  if (source.kind === "rope") throw new Error("a rotary table is not split");
  if (source.kind === "literal") return { kind: "literal", values: sliceValues(source.values, shape, ranges) };
  if (source.kind === "stacked") {
    const [matrices, ...rest] = ranges as readonly [Range, ...Slice];
    const whole = rest.every(([from, to], axis) => from === 0 && to === shape[axis + 1]);
    return { kind: "stacked", of: source.of.slice(...matrices).map((of) => (whole ? of : slicedStored(of, rest))) };
  }
  return slicedStored(source, ranges);
};

const slicedStored = (source: StoredSource, ranges: Slice): StoredSource => {
  const within = source.slice;
  const slice = ranges.map(([from, to], axis) => {
    const start = within?.[axis]?.[0] ?? 0;
    return [start + from, start + to] as const;
  });
  return { ...source, slice };
};

const sliceValues = (values: readonly number[], shape: readonly number[], ranges: Slice): readonly number[] => {
  const [range, ...inner] = ranges;
  if (range === undefined) return values;
  const step = shape.slice(1).reduce((a, b) => a * b, 1);
  const picked: number[] = [];
  for (let i = range[0]; i < range[1]; i++)
    picked.push(...sliceValues(values.slice(i * step, (i + 1) * step), shape.slice(1), inner));
  return picked;
};

/** Throws unless every split group has a block of columns for each rank. */
const checkBlocks = (g: Graph, part: Part, plan: Plan, split: Split): void => {
  const ranks = split.groups * split.ranksPerGroup;
  for (const op of part.ops)
    for (const v of op.outputs) {
      const columns = plan.columns(v);
      if (columns === undefined) continue;
      const parts = columns.experts ? split.ranksPerGroup : ranks;
      const blocks = Math.ceil(columns.columns / blockColumns);
      if (blocks >= parts) continue;
      const source = g.weights.find((w) => w.value.name === columns.weight)?.source;
      const mend = columns.experts
        ? `use --ffn-split ep, or at most ${blocks} rank${blocks === 1 ? "" : "s"} in a tp group`
        : `use at most ${blocks} FFN rank${blocks === 1 ? "" : "s"}`;
      throw new UserError(
        `${tensorName(source) ?? columns.weight}: ${columns.columns} columns are ${blocks} block${blocks === 1 ? "" : "s"} of ${blockColumns}, fewer than the ${parts} FFN ranks that share them; ${mend}`,
      );
    }
};

const tensorName = (source: WeightSource | undefined): string | undefined =>
  source === undefined || source.kind === "rope" || source.kind === "literal"
    ? undefined
    : source.kind === "stacked"
      ? tensorName(source.of[0])
      : "of" in source
        ? tensorName(source.of)
        : source.tensor;

export interface ShardOptions {
  readonly ranks: number;
  /** `ep`, `tp` or `epXtpY` */
  readonly split: string;
}

export const shard = (options: ShardOptions): Pass => ({
  name: "shard",
  after: ["partition"],
  // no matter what the limit of --pass-limit is: ops on the FFN side must have a rank to run at all
  run(g) {
    if (options.ranks === 0) return g;
    const split = parseSplit(options.split, options.ranks);
    if (!g.ops.some((op) => op.place === "ffn")) return g;
    return divide(g, options.ranks, split);
  },
});

/** The collected partials of an exchange, waiting to be added where the whole was. */
interface Partials {
  readonly values: readonly Value[];
  readonly whole: Value;
}

const divide = (g: Graph, ranks: number, split: Split): Graph => {
  const flow = flowOf(g);
  const fresh = freshNames(g);
  const parts = partsOf(g);
  const byDispatch = new Map(parts.map((p) => [p.dispatch, p] as const));
  const byCollect = new Map(parts.map((p) => [p.collect, p] as const));
  const weights = new Map(g.weights.map((w) => [w.value.name, w] as const));
  const newWeights = new Map<string, Weight>();
  const ops: Op[] = [];
  const partials = new Map<Op, readonly Value[]>();
  const copies = new Map<string, Value>();
  const planned = ranks === 1 ? wholePlan : planOf;

  const slicedWeight = (rank: number, weight: Value, ranges: readonly (Range | undefined)[]): Value => {
    const own = weights.get(weight.name);
    if (own === undefined) throw new Error(`'${weight.name}' is not a weight`);
    const shape = own.value.type.shape as readonly number[];
    const full: Slice = shape.map((n, axis) => ranges[axis] ?? [0, n]);
    if (full.every(([from, to], axis) => from === 0 && to === shape[axis])) return weight;
    const key = `${rank} ${weight.name} ${full.join(" ")}`;
    const known = newWeights.get(key);
    if (known) return known.value;
    const type = { ...own.value.type, shape: full.map(([from, to]) => to - from) };
    const made: Weight = {
      value: { name: fresh(`${weight.name}_f${rank}`), type },
      source: sliceSource(own.source, shape, full),
    };
    newWeights.set(key, made);
    return made.value;
  };

  const emitOn = (rank: number): Emit => {
    const place: Place = `ffn${rank}`;
    const add = (
      kind: string,
      inputs: readonly Value[],
      attrs: Attrs,
      names: readonly string[],
      origin: string | undefined,
    ): readonly Value[] => {
      const types = inferTypes(
        kind,
        inputs.map((v) => v.type),
        attrs,
      );
      const outputs = types.map((type, i) => ({ name: fresh(`${names[i]}_f${rank}`), type }));
      ops.push({ kind, inputs, attrs, outputs, place, ...(origin === undefined ? {} : { origin }) });
      return outputs;
    };
    return {
      op: (kind, inputs, attrs, name, origin) => add(kind, inputs, attrs, [name], origin)[0] as Value,
      like: (op, inputs, attrs) =>
        add(
          op.kind,
          inputs,
          attrs,
          op.outputs.map((v) => stem(v.name)),
          op.origin,
        ),
      sliced: (weight, ranges) => slicedWeight(rank, weight, ranges),
      number: (value, dtype) => {
        const key = `${rank} ${dtype} ${value}`;
        const known = newWeights.get(key);
        if (known) return known.value;
        const named = { name: fresh(`number_${value}_f${rank}`), type: tensor(dtype, [1]) };
        newWeights.set(key, { value: named, source: { kind: "literal", values: [value] } });
        return named;
      },
    };
  };

  /** An FFN op that needs no token, such as a constant, is computed on each rank that uses it. */
  const freeOn =
    (rank: number) =>
    (v: Value): Value => {
      const op = flow.producer.get(v.name);
      if (op === undefined) return v;
      const key = `${rank} ${v.name}`;
      const known = copies.get(key);
      if (known) return known;
      const outputs = emitOn(rank).like(op, op.inputs.map(freeOn(rank)), op.attrs);
      for (const [i, o] of op.outputs.entries()) copies.set(`${rank} ${o.name}`, outputs[i] as Value);
      return copies.get(key) as Value;
    };

  const send = (part: Part): void => {
    const { dispatch } = part;
    const received = Array.from({ length: ranks }, (_, rank) =>
      dispatch.outputs.map((v) => ({ name: fresh(`${stem(v.name)}_f${rank}`), type: v.type })),
    );
    const plan = planned(g, flow, part, split);
    checkBlocks(g, part, plan, split);
    const chooses = split.groups > 1 && plan.grouped.size > 0 && part.ops.some((op) => contraction(op)?.ids !== undefined);
    const attrs = { ...dispatch.attrs, ranks, ...(chooses ? { experts: expertsOf(part, plan) } : {}) };
    ops.push({ ...dispatch, attrs, outputs: received.flat() });
    partials.set(
      part.collect,
      received.map((values, rank) => onRank(part, plan, split, rank, values, freeOn(rank), emitOn(rank))),
    );
  };

  const merges = new Map<Op, Partials>();
  const skipped = new Set<Op>();
  const receive = (part: Part): void => {
    const { collect } = part;
    const [whole] = collect.outputs as readonly [Value];
    const inputs = partials.get(collect) as readonly Value[];
    const values = ranks === 1 ? [whole] : inputs.map((v, rank) => ({ name: fresh(`${whole.name}_p${rank}`), type: v.type }));
    ops.push({ ...collect, inputs, outputs: values });
    if (ranks === 1) return;
    const merge = mergeOf(flow, whole);
    if (merge === undefined) {
      addUp(ops, fresh, undefined, { values, whole }, whole, collect.origin);
      return;
    }
    merges.set(merge.add, { values, whole: merge.addend });
    for (const op of merge.casts) skipped.add(op);
  };

  for (const op of g.ops) {
    const dispatched = byDispatch.get(op);
    const collected = byCollect.get(op);
    const merged = merges.get(op);
    if (dispatched) send(dispatched);
    else if (collected) receive(collected);
    else if (merged) {
      const residual = op.inputs.find((v) => v.name !== merged.whole.name) as Value;
      addUp(ops, fresh, residual, merged, op.outputs[0] as Value, op.origin);
    } else if (op.place === "attention" && !skipped.has(op)) ops.push(op);
  }
  return withoutDead({ ...g, ops, weights: [...g.weights, ...newWeights.values()] });
};

/** With one rank nothing is split. */
const wholePlan = (): Plan => ({ columns: () => undefined, grouped: new Set() });

/** Without the mark of the partition. */
const stem = (name: string): string => name.replace(/_f$/, "");

/** The float add that alone takes a collected value, perhaps through casts that lose nothing. */
const mergeOf = (
  flow: Flow,
  collected: Value,
): { readonly add: Op; readonly addend: Value; readonly casts: readonly Op[] } | undefined => {
  const casts: Op[] = [];
  for (let v = collected; ; ) {
    const [user, ...others] = usesOf(flow, v);
    const [out] = user?.outputs ?? [];
    if (user === undefined || out === undefined || others.length > 0 || flow.outputs.has(v.name)) return undefined;
    const dtype = (out.type as TensorType).dtype;
    if (user.kind === "add" && user.inputs[0]?.name !== user.inputs[1]?.name && isFloat(dtype))
      return user.inputs.every((i) => sameShape(i, out)) ? { add: user, addend: v, casts } : undefined;
    if (user.kind !== "cast" || !holds(dtype, (v.type as TensorType).dtype)) return undefined;
    casts.push(user);
    v = out;
  }
};

/** residual + partial 0 + partial 1 ... in f32 (f64 stays), rounded once to the result, which keeps its name. */
const addUp = (
  ops: Op[],
  fresh: (name: string) => string,
  residual: Value | undefined,
  partials: Partials,
  result: Value,
  origin: string | undefined,
): void => {
  const { dtype } = result.type as TensorType;
  const wide = dtype === "f64" ? "f64" : "f32";
  const push = (kind: string, inputs: readonly Value[], attrs: Attrs, out: Value): Value => {
    ops.push({ kind, inputs, attrs, outputs: [out], place: "attention", ...(origin === undefined ? {} : { origin }) });
    return out;
  };
  const asWide = (v: Value): Value => {
    const type = v.type as TensorType;
    if (type.dtype === wide) return v;
    return push("cast", [v], { to: wide }, { name: fresh(`${v.name}_wide`), type: { ...type, dtype: wide } });
  };
  const addends = [...(residual === undefined ? [] : [residual]), ...partials.values];
  const sum = addends.slice(1).reduce(
    (total, v, i) => {
      const last = i === addends.length - 2 && dtype === wide;
      const out = last
        ? result
        : { name: fresh(`${result.name}_sum`), type: { ...(result.type as TensorType), dtype: wide } as const };
      return push("add", [total, asWide(v)], {}, out);
    },
    asWide(addends[0] as Value),
  );
  if (dtype !== wide) push("cast", [sum], { to: dtype }, result);
};
