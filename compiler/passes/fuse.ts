/**
 * Joins ops into kernels, every rounding kept. After this pass elementwise ops, `reduce`, `spread`, `rms_norm`, `softmax` and `quantise`
 * over rows are inside `fused` ops; what stays by itself is ops that have neither `scalar` nor an expansion into such, contractions
 * without an epilogue, and elementwise ops whose shapes are none of the forms below.
 *
 * A `fused` body has one of two normal forms, which `fusedForm` checks:
 *
 * contraction: the first op is a linear, scaled_linear, grouped_linear or scaled_grouped_linear. Its operands are body inputs 0, 1 ... in
 *   order, and it is the only user of those (a value that the epilogue takes too is another input as well). The ops after it are elementwise (with `scalar`) or `const`. Its result is [R, N]; every other
 *   value outside of its operands is [R, N], [R, 1], [N] or []. The one output is [R, N] and depends on the contraction.
 *
 * row: every op is elementwise (with `scalar`), `reduce`, `spread` or `const`. With R one expression (or, for tensors of more axes, one
 *   list of them) and N one constant for the whole body, every value is [R, N]; [R, G] where G = ceil(N / group) for the group of some
 *   `reduce` or `spread` of the body; [R, 1]; or without rows: [N], [G], [1], []. `reduce` and `spread` take values with rows. Outputs,
 *   one or more, have rows. So a row is computed from that row of the inputs alone, in stages over columns, a new stage after each reduce.
 *   A body may instead hold only [R] and [], one column without its axis; it has no `reduce` or `spread`.
 *
 * In both, no op is there twice, every op leads to an output, values are named i0, i1 ... (inputs, in the order of their first use) and
 * t0, t1 ... (results, in order): bodies of layers that differ only in weights are equal.
 *
 * Work is not done twice, except for constants, what is computed of weights alone per column, and casts that lose nothing: those are ways
 * of reading a value, and each kernel reads for itself. Kernels span neither places nor a dispatch or collect between their ops.
 */
import { Builder } from "../../ir/build.ts";
import { type Dim, dimText } from "../../ir/dim.ts";
import type { Graph, Op, Value } from "../../ir/graph.ts";
import { knowledge } from "../../ir/ops/index.ts";
import type { TensorType } from "../../ir/type.ts";
import { typeText } from "../../ir/type.ts";
import type { Pass, PassContext } from "../pass.ts";
import { contraction, isContraction } from "./contraction.ts";
import { withoutDead } from "./dead.ts";
import { type Flow, flowOf, freshNames, rowDependent, usesOf } from "./flow.ts";
import { attrText, holds } from "./fold.ts";

const isElementwise = (op: Op): boolean => op.kind !== "const" && knowledge(op.kind).scalar !== undefined;
const isRowOp = (op: Op): boolean => isElementwise(op) || op.kind === "reduce" || op.kind === "spread";

const shapeOf = (v: Value): readonly Dim[] => (v.type as TensorType).shape;
const widthOf = (v: Value): Dim => shapeOf(v).at(-1) ?? 1;
/** The axes of rows: all but the last; of rank 1, none. */
const rowsText = (v: Value): string => shapeOf(v).slice(0, -1).map(dimText).join(",");
const isCast = (op: Op): boolean => {
  const [x, out] = [...op.inputs, ...op.outputs];
  return op.kind === "cast" && x?.type.kind === "tensor" && out?.type.kind === "tensor" && holds(out.type.dtype, x.type.dtype);
};

/** The ops of one kernel, which grow in number while kernels form. */
interface Group {
  readonly members: Op[];
  /** the last of their places in the graph's order */
  last: number;
  readonly widths: Widths;
  /** the contraction of an epilogue group */
  readonly contraction?: Op;
}

/** Last dims of values, and the groups in which `reduce` and `spread` take columns. */
interface Widths {
  readonly columns: Set<number>;
  readonly groups: Set<number>;
}

/** The graph with what is known of it while kernels form. */
interface Site {
  readonly g: Graph;
  readonly flow: Flow;
  readonly dependent: ReadonlySet<string>;
  /** exchanges that began or ended before an op */
  readonly segment: ReadonlyMap<Op, number>;
  readonly groupOf: Map<Op, Group>;
  /** casts that lose nothing and ops without rows: never grouped, read by each kernel for itself */
  readonly readings: ReadonlySet<Op>;
}

/** How many exchanges began or ended before each op. */
export const segments = (g: Graph): ReadonlyMap<Op, number> => {
  let n = 0;
  return new Map(g.ops.map((op) => [op, op.kind === "dispatch" || op.kind === "collect" ? ++n : n] as const));
};

const together = (site: Pick<Site, "segment">, a: Op, b: Op): boolean =>
  a.place === b.place && site.segment.get(a) === site.segment.get(b);

// --- contractions and what follows them elementwise ---------------------------------------------------------------------------

/** The shapes that an epilogue over [R, N] can read. */
const fitsTile = (v: Value, rows: Dim, columns: Dim): boolean => {
  const shape = shapeOf(v);
  if (v.type.kind !== "tensor" || shape.length > 2) return false;
  if (shape.length === 2) return shape[0] === rows && (shape[1] === columns || shape[1] === 1);
  return shape.length === 0 || shape[0] === columns;
};

/**
 * The ops that a contraction's kernel can take on: the chain of only users of its result, and what alone feeds that chain from the side with
 * one operand (`silu` of a gate). The chain ends before a cast that loses nothing.
 */
const epilogue = (site: Pick<Site, "flow" | "segment" | "dependent">, op: Op, taken: ReadonlySet<string>): readonly Op[] => {
  const { flow } = site;
  const [result] = op.outputs as readonly [Value];
  const [rows, columns] = shapeOf(result) as readonly [Dim, Dim];
  const chain: Op[] = [];
  const sides = new Map<Op, readonly Op[]>();
  const inside = new Set<string>([result.name]);
  const available = (o: Op): boolean =>
    isElementwise(o) &&
    !taken.has(o.outputs[0]?.name ?? "") &&
    together(site, op, o) &&
    fitsTile(o.outputs[0] as Value, rows, columns);

  /** ops that feed `user` from the side and nothing else */
  const feeding = (v: Value, user: Op): readonly Op[] => {
    const from = flow.producer.get(v.name);
    if (from === undefined || !available(from) || flow.outputs.has(v.name) || isCast(from)) return [];
    const withRows = from.inputs.filter((i) => site.dependent.has(i.name));
    if (withRows.length !== 1 || !from.inputs.every((i) => fitsTile(i, rows, columns))) return [];
    if (usesOf(flow, v).some((u) => u !== user) || inside.has((withRows[0] as Value).name)) return [];
    return [...feeding(withRows[0] as Value, from), from];
  };

  for (let last = result; ; ) {
    const [user, ...others] = usesOf(flow, last);
    if (user === undefined || others.length > 0 || flow.outputs.has(last.name) || !available(user)) break;
    const [out] = user.outputs as readonly [Value];
    if (shapeOf(out)[0] !== rows || shapeOf(out)[1] !== columns || !user.inputs.every((v) => fitsTile(v, rows, columns))) break;
    sides.set(
      user,
      user.inputs.filter((v) => !inside.has(v.name)).flatMap((v) => feeding(v, user)),
    );
    chain.push(user);
    inside.add(out.name);
    last = out;
  }
  while (chain.length > 0 && isCast(chain.at(-1) as Op)) chain.pop();
  return chain.flatMap((o) => [...(sides.get(o) ?? []), o]);
};

/** For each contraction that gets one, its epilogue, by names of results. Later contractions choose first: `silu(gate) * up` goes to `up`. */
const epilogues = (g: Graph, context: PassContext): ReadonlyMap<string, ReadonlySet<string>> => {
  const site = { flow: flowOf(g), segment: segments(g), dependent: rowDependent(g) };
  const taken = new Set<string>();
  const found = new Map<string, ReadonlySet<string>>();
  for (const op of [...g.ops].reverse()) {
    if (!isContraction(op) || contraction(op)?.w === undefined) continue;
    const names = epilogue(site, op, taken).flatMap((o) => o.outputs.map((v) => v.name));
    if (names.length === 0 || !context.apply()) continue;
    for (const name of names) taken.add(name);
    found.set((op.outputs[0] as Value).name, new Set(names));
  }
  return found;
};

// --- rows ---------------------------------------------------------------------------------------------------------------------

const composites: ReadonlySet<string> = new Set(["rms_norm", "softmax", "quantise"]);

/** An op's expansion, on inputs and with results of its own names: many layers share one. */
interface Expansion {
  readonly inputs: readonly Value[];
  readonly ops: readonly Op[];
  readonly results: readonly Value[];
}

const expansionOf = (g: Graph, op: Op): Expansion => {
  const b = new Builder("expansion", g.symbols);
  const inputs = op.inputs.map((v, i) => b.input(`i${i}`, v.type as TensorType));
  const { kind, attrs, outputs } = op;
  const results = knowledge(kind).expand?.(b, { kind, attrs, outputs, inputs }) ?? [];
  return { inputs, ops: b.build().ops, results };
};

/** Row ops made of simpler ones become those. */
const expanded = (g: Graph): Graph => {
  const known = new Map<string, Expansion>();
  const fresh = freshNames(g);
  const ops = g.ops.flatMap((op): readonly Op[] => {
    if (!composites.has(op.kind) || shapeOf(op.inputs[0] as Value).length < 2) return [op];
    const key = `${op.kind} ${attrText(op.attrs)} ${op.inputs.map((v) => typeText(v.type)).join(" ")}`;
    const expansion = known.get(key) ?? expansionOf(g, op);
    known.set(key, expansion);
    const values = new Map(expansion.inputs.map((v, i) => [v.name, op.inputs[i] as Value] as const));
    for (const [i, v] of expansion.results.entries()) values.set(v.name, op.outputs[i] as Value);
    const { place, origin } = op;
    return expansion.ops.map((step) => {
      for (const v of step.outputs)
        if (!values.has(v.name)) values.set(v.name, { name: fresh(`${op.outputs[0]?.name}_${v.name}`), type: v.type });
      const named = (vs: readonly Value[]): readonly Value[] => vs.map((v) => values.get(v.name) as Value);
      return {
        kind: step.kind,
        inputs: named(step.inputs),
        attrs: step.attrs,
        outputs: named(step.outputs),
        ...(place === undefined ? {} : { place }),
        ...(origin === undefined ? {} : { origin }),
      };
    });
  });
  return { ...g, ops };
};

/** What an op's rows are, as text: ops of one kernel have the same. Undefined when its shapes are not those of the row form. */
const rowForm = (op: Op): string | undefined => {
  const [out] = op.outputs;
  if (!isRowOp(op) || out === undefined || out.type.kind !== "tensor") return undefined;
  const rank = shapeOf(out).length;
  if (rank === 0 || !op.inputs.every((v) => v.type.kind === "tensor")) return undefined;
  if (rank === 1) {
    if (!isElementwise(op)) return undefined;
    const rows = dimText(widthOf(out));
    return op.inputs.every((v) => shapeOf(v).length === 0 || dimText(widthOf(v)) === rows) ? `[${rows}]` : undefined;
  }
  const rows = rowsText(out);
  const fits = op.inputs.every((v) => {
    const shape = shapeOf(v);
    const columns = shape.length === 0 || typeof shape.at(-1) === "number";
    return columns && (shape.length <= 1 ? isElementwise(op) : shape.length === rank && rowsText(v) === rows);
  });
  // rows of no elements are nothing to fuse
  return fits && typeof widthOf(out) === "number" && widthOf(out) !== 0 ? `[${rows},]` : undefined;
};

const addWidths = (to: Widths, op: Op): void => {
  for (const v of [...op.inputs, ...op.outputs]) if (shapeOf(v).length > 0) to.columns.add(Number(widthOf(v)));
  const { group } = op.attrs;
  if ((op.kind === "reduce" || op.kind === "spread") && typeof group === "number" && group > 0) to.groups.add(group);
};

/** True when widths are N, 1, or the number of groups of N. */
const widthsFit = ({ columns, groups }: Widths): boolean => {
  const n = Math.max(1, ...columns);
  return [...columns].every((w) => w === n || w === 1 || [...groups].some((group) => Math.ceil(n / group) === w));
};

/**
 * True when joining `joining` with the group `group` makes a circle: something outside of the two takes a result of one and makes an operand
 * of the other. With `newest` the ops in `joining` come after those of the group, so that only their operands need be looked at.
 */
const circular = (site: Site, group: Group, joining: readonly Op[], newest: boolean): boolean => {
  const { flow, groupOf, readings } = site;
  const position = (op: Op): number => flow.index.get(op) as number;
  const added = new Set(joining);
  const isInside = (op: Op): boolean => added.has(op) || groupOf.get(op) === group;
  const first = Math.min(...[...group.members, ...joining].map(position));
  const seen = new Set<Group | Op>();
  const open: Op[] = [];
  /** puts the ops outside of `from` that make these values in line */
  const enter = (inputs: readonly Value[], from: (op: Op) => boolean): void => {
    for (const v of inputs) {
      const op = flow.producer.get(v.name);
      if (op === undefined || from(op)) continue;
      if (readings.has(op)) enter(op.inputs, from);
      else open.push(op);
    }
  };
  for (const op of newest ? joining : [...group.members, ...joining]) enter(op.inputs, isInside);
  for (let op = open.pop(); op !== undefined; op = open.pop()) {
    if (isInside(op)) return true;
    const other = groupOf.get(op);
    if (seen.has(other ?? op)) continue;
    seen.add(other ?? op);
    if (other === undefined) {
      if (position(op) > first) enter(op.inputs, () => false);
    } else if (other.last > first) for (const m of other.members) enter(m.inputs, (o) => groupOf.get(o) === other);
  }
  return false;
};

/** Groups that make an op's operands, through readings; the latest first. */
const groupsBefore = (site: Site, op: Op): readonly Group[] => {
  const found = new Map<Group, number>();
  const look = (v: Value): void => {
    const from = site.flow.producer.get(v.name);
    if (from === undefined) return;
    if (site.readings.has(from)) {
      from.inputs.forEach(look);
      return;
    }
    const group = site.groupOf.get(from);
    if (group !== undefined && group.contraction === undefined)
      found.set(group, Math.max(found.get(group) ?? 0, site.flow.index.get(from) as number));
  };
  op.inputs.forEach(look);
  return [...found].sort(([, a], [, b]) => b - a).map(([group]) => group);
};

/** Joins each row op to the kernels that make its operands, where that is possible. */
const groupRows = (site: Site, atoms: readonly Op[], context: PassContext): void => {
  const { flow, groupOf, readings } = site;
  const form = new Map(atoms.map((op) => [op, rowForm(op) as string] as const));
  const widthsOf = (op: Op): Widths => {
    const widths: Widths = { columns: new Set(), groups: new Set() };
    const add = (o: Op): void => {
      addWidths(widths, o);
      for (const v of o.inputs) {
        const from = flow.producer.get(v.name);
        if (from !== undefined && readings.has(from)) add(from);
      }
    };
    add(op);
    return widths;
  };
  const both = (a: Widths, b: Widths): Widths => ({
    columns: new Set([...a.columns, ...b.columns]),
    groups: new Set([...a.groups, ...b.groups]),
  });
  for (const op of atoms) {
    let own: Group = { members: [op], last: flow.index.get(op) as number, widths: widthsOf(op) };
    for (const group of groupsBefore(site, op)) {
      const [other] = group.members;
      if (other === undefined || form.get(other) !== form.get(op) || !together(site, other, op)) continue;
      if (
        !widthsFit(both(group.widths, own.widths)) ||
        circular(site, group, own.members, own.members.length === 1) ||
        !context.apply()
      )
        continue;
      for (const member of own.members) {
        group.members.push(member);
        groupOf.set(member, group);
      }
      group.last = Math.max(group.last, own.last);
      for (const n of own.widths.columns) group.widths.columns.add(n);
      for (const n of own.widths.groups) group.widths.groups.add(n);
      own.members.length = 0;
      own = group;
    }
    groupOf.set(op, own);
  }
};

// --- bodies -------------------------------------------------------------------------------------------------------------------

/** What a kernel computes, in order, readings included; the contraction first. */
const opsOf = (site: Site, group: Group): readonly Op[] => {
  const all = new Set<Op>();
  const include = (op: Op): void => {
    if (all.has(op)) return;
    for (const v of op.inputs) {
      const from = site.flow.producer.get(v.name);
      if (from !== undefined && site.readings.has(from) && !(op === group.contraction)) include(from);
    }
    all.add(op);
  };
  const order = (ops: Iterable<Op>): Op[] =>
    [...ops].sort((a, b) => (site.flow.index.get(a) as number) - (site.flow.index.get(b) as number));
  if (group.contraction) include(group.contraction);
  order(group.members).forEach(include);
  const rest = order(all).filter((op) => op !== group.contraction);
  return group.contraction ? [group.contraction, ...rest] : rest;
};

interface Kernel {
  readonly ops: readonly Op[];
  /** values it reads, in the order of the body's inputs: operands of the contraction, then others, each once */
  readonly inputs: readonly Value[];
  /** how many of the inputs are operands of the contraction */
  readonly operands: number;
  /** names of the results of its ops, without readings */
  readonly makes: ReadonlySet<string>;
}

const kernelOf = (ops: readonly Op[], group: Group): Kernel => {
  const made = new Set(ops.flatMap((op) => op.outputs.map((v) => v.name)));
  const operands = group.contraction?.inputs ?? [];
  const others = new Map<string, Value>();
  for (const op of ops) if (op !== group.contraction) for (const v of op.inputs) if (!made.has(v.name)) others.set(v.name, v);
  return {
    ops,
    inputs: [...operands, ...others.values()],
    operands: operands.length,
    makes: new Set(group.members.flatMap((op) => op.outputs.map((v) => v.name))),
  };
};

/** Bodies by what they say: layers that differ only in weights share one. */
type Bodies = Map<string, Graph>;

const bodyOf = (g: Graph, kernel: Kernel, outputs: readonly Value[], name: string, bodies: Bodies): Graph => {
  const local = new Map<string, Value>();
  const inputs = kernel.inputs.map((v, i) => ({ name: `i${i}`, type: v.type }));
  kernel.inputs.forEach((v, i) => {
    if (i >= kernel.operands) local.set(v.name, inputs[i] as Value);
  });
  const same = new Map<string, readonly Value[]>();
  const ops: Op[] = [];
  for (const [position, op] of kernel.ops.entries()) {
    const ownOperands = position === 0 && kernel.operands > 0;
    const operands = op.inputs.map((v, i) => (ownOperands ? inputs[i] : local.get(v.name)) as Value);
    const key = `${op.kind} ${attrText(op.attrs)} ${operands.map((v) => v.name).join(",")}`;
    let results = same.get(key);
    if (results === undefined) {
      results = op.outputs.map((v) => ({ name: `t${ops.length}`, type: v.type }));
      same.set(key, results);
      ops.push({ kind: op.kind, inputs: operands, attrs: op.attrs, outputs: results });
    }
    for (const [i, v] of op.outputs.entries()) local.set(v.name, results[i] as Value);
  }
  const results = outputs.map((v) => local.get(v.name) as Value);
  const text = [name, ...inputs.map((v) => typeText(v.type)), ...same.keys(), ...results.map((v) => v.name)].join("\n");
  const known = bodies.get(text);
  if (known !== undefined) return known;
  const body: Graph = { name, symbols: g.symbols, inputs, states: [], weights: [], ops, outputs: results };
  fusedForm(body);
  bodies.set(text, body);
  return body;
};

/** `layers.3.moe + layers.3.norm`: where the ops of a kernel come from, the first few. */
export const originsOf = (ops: Iterable<Op>): { readonly origin?: string } => {
  const all = [...new Set([...ops].flatMap((op) => op.origin ?? []))];
  if (all.length === 0) return {};
  const more = all.length > 3 ? ` + ${all.length - 3} more` : "";
  return { origin: `${all.slice(0, 3).join(" + ")}${more}` };
};

export const fuse: Pass = {
  name: "fuse",
  after: ["fold", "quantise", "partition", "shard"],
  run(source, context) {
    if (source.ops.some((op) => op.kind === "fused")) throw new Error("the graph has been fused before");
    const compact = withoutDead(source);
    const chosen = epilogues(compact, context);
    return assemble(expanded(compact), chosen, context);
  },
};

const assemble = (g: Graph, chosen: ReadonlyMap<string, ReadonlySet<string>>, context: PassContext): Graph => {
  const flow = flowOf(g);
  const dependent = rowDependent(g);
  const groupOf = new Map<Op, Group>();
  for (const op of g.ops) {
    const names = chosen.get(op.outputs[0]?.name ?? "");
    if (names === undefined) continue;
    const members = [op, ...[...names].map((name) => flow.producer.get(name) as Op)];
    const last = Math.max(...members.map((m) => flow.index.get(m) as number));
    const group: Group = { members, last, widths: { columns: new Set(), groups: new Set() }, contraction: op };
    for (const member of members) groupOf.set(member, group);
  }
  const isFree = (op: Op): boolean => !op.outputs.some((v) => dependent.has(v.name));
  const canRead = (op: Op): boolean => rowForm(op) !== undefined || (groupOf.has(op) && !isContraction(op));
  const readings = new Set<Op>();
  for (const op of [...g.ops].reverse()) {
    if (groupOf.has(op)) continue;
    const [out] = op.outputs as readonly [Value];
    // with rows of its own it is computed once: those that read it may have others
    const free = isFree(op) && (op.kind === "const" || (isElementwise(op) && shapeOf(out).length <= 1));
    // for an op that cannot read, a cast is made by the kernel of what is cast
    const read = isCast(op) && rowForm(op) !== undefined && !flow.outputs.has(out.name) && usesOf(flow, out).every(canRead);
    if (free || read) readings.add(op);
  }
  const site: Site = { g, flow, dependent, segment: segments(g), groupOf, readings };
  groupRows(
    site,
    g.ops.filter((op) => !groupOf.has(op) && !readings.has(op) && rowForm(op) !== undefined),
    context,
  );

  // a unit is a kernel or an op by itself
  const kernels = new Map<Group, Kernel>();
  for (const group of groupOf.values()) if (!kernels.has(group)) kernels.set(group, kernelOf(opsOf(site, group), group));
  const units: { readonly at: number; readonly group?: Group; readonly op?: Op; readonly inputs: readonly Value[] }[] = [];
  const at = (op: Op): number => flow.index.get(op) as number;
  for (const [group, kernel] of kernels) units.push({ at: group.last, group, inputs: kernel.inputs });
  for (const op of g.ops) if (!groupOf.has(op)) units.push({ at: at(op), op, inputs: op.inputs });

  const bodies: Bodies = new Map();
  const needed = new Set(g.outputs.map((v) => v.name));
  for (const unit of units) if (unit.op === undefined || !readings.has(unit.op)) for (const v of unit.inputs) needed.add(v.name);
  // readings that something outside of kernels takes stay, with what they read
  for (const unit of units.filter((u) => u.op !== undefined && readings.has(u.op)).sort((a, b) => b.at - a.at))
    if (unit.op?.outputs.some((v) => needed.has(v.name))) for (const v of unit.inputs) needed.add(v.name);

  const done = units.filter((u) => u.op === undefined || !readings.has(u.op) || u.op.outputs.some((v) => needed.has(v.name)));
  const ops = inOrder(done, (unit) =>
    unit.group ? (kernels.get(unit.group) as Kernel).makes : new Set(unit.op?.outputs.map((v) => v.name)),
  ).map((unit): Op => {
    if (unit.group === undefined) return unit.op as Op;
    const kernel = kernels.get(unit.group) as Kernel;
    const [first] = unit.group.members;
    const sorted = [...unit.group.members].sort((a, b) => at(a) - at(b));
    const outputs = sorted.flatMap((op) => op.outputs).filter((v) => needed.has(v.name));
    const body = bodyOf(g, kernel, outputs, unit.group.contraction?.kind ?? "row", bodies);
    return {
      kind: "fused",
      inputs: kernel.inputs,
      attrs: {},
      outputs,
      body,
      ...(first?.place === undefined ? {} : { place: first.place }),
      ...originsOf(sorted),
    };
  });
  return withoutDead({ ...g, ops });
};

/** Units so that values are made before they are used, otherwise by `at`. */
export const inOrder = <U extends { readonly at: number; readonly inputs: readonly Value[] }>(
  units: readonly U[],
  makes: (unit: U) => ReadonlySet<string>,
): readonly U[] => {
  const maker = new Map<string, U>();
  for (const unit of units) for (const name of makes(unit)) maker.set(name, unit);
  const state = new Map<U, "open" | "done">();
  const result: U[] = [];
  const visit = (unit: U): void => {
    if (state.get(unit) === "done") return;
    if (state.get(unit) === "open") throw new Error("kernels depend on each other in a circle");
    state.set(unit, "open");
    for (const v of unit.inputs) {
      const before = maker.get(v.name);
      if (before !== undefined && before !== unit) visit(before);
    }
    state.set(unit, "done");
    result.push(unit);
  };
  for (const unit of [...units].sort((a, b) => a.at - b.at)) visit(unit);
  return result;
};

// --- the normal form ----------------------------------------------------------------------------------------------------------

export type FusedForm =
  | { readonly kind: "contraction"; readonly contraction: Op; readonly rows: Dim; readonly columns: number }
  | { readonly kind: "row"; readonly rows: readonly Dim[]; readonly columns: number };

/** Which normal form a fused body has (see the head of this file); throws, in words, when it has none. */
export const fusedForm = (body: Graph): FusedForm => {
  const fail = (why: string): never => {
    throw new Error(`fused body '${body.name}': ${why}`);
  };
  if (body.weights.length > 0 || body.states.length > 0) fail("has weights or states of its own");
  if (body.outputs.length === 0) fail("has no output");
  const seen = new Set<string>();
  const used = new Set(body.outputs.map((v) => v.name));
  for (const op of [...body.ops].reverse()) {
    if (op.outputs.length !== 1) fail(`${op.kind} has ${op.outputs.length} results`);
    if (!used.has((op.outputs[0] as Value).name)) fail(`'${op.outputs[0]?.name}' leads to no output`);
    for (const v of op.inputs) used.add(v.name);
  }
  for (const v of body.inputs) if (!used.has(v.name)) fail(`input '${v.name}' is not used`);
  for (const op of body.ops) {
    const key = `${op.kind} ${attrText(op.attrs)} ${op.inputs.map((v) => v.name).join(",")}`;
    if (seen.has(key)) fail(`'${op.outputs[0]?.name}' is computed twice`);
    seen.add(key);
  }
  for (const v of body.outputs)
    if (!body.ops.some((op) => op.outputs.some((o) => o.name === v.name))) fail(`output '${v.name}' is an input`);
  const [first] = body.ops;
  if (first !== undefined && isContraction(first)) return contractionForm(body, first, fail);
  return rowsForm(body, fail);
};

const contractionForm = (body: Graph, first: Op, fail: (why: string) => never): FusedForm => {
  const [result] = first.outputs as readonly [Value];
  const [rows, columns] = shapeOf(result) as readonly [Dim, number];
  const operands = new Set(first.inputs.map((v) => v.name));
  first.inputs.forEach((v, i) => {
    if (v.name !== body.inputs[i]?.name) fail(`operand ${i} of ${first.kind} is '${v.name}', not input ${i}`);
  });
  const depends = new Set([result.name]);
  for (const op of body.ops.slice(1)) {
    if (!isElementwise(op) && op.kind !== "const") fail(`${op.kind} in an epilogue`);
    for (const v of op.inputs) if (operands.has(v.name)) fail(`'${v.name}' is an operand of the contraction and of ${op.kind}`);
    for (const v of [...op.inputs, ...op.outputs])
      if (!fitsTile(v, rows, columns)) fail(`'${v.name}' ${typeText(v.type)} beside [${rows},${columns}]`);
    if (op.inputs.some((v) => depends.has(v.name))) for (const v of op.outputs) depends.add(v.name);
  }
  const [out, ...more] = body.outputs as readonly [Value];
  if (more.length > 0) fail("an epilogue has more than one output");
  if (!depends.has(out.name) || shapeOf(out)[0] !== rows || shapeOf(out)[1] !== columns)
    fail(`output '${out.name}' is not the contraction's`);
  return { kind: "contraction", contraction: first, rows, columns };
};

const rowsForm = (body: Graph, fail: (why: string) => never): FusedForm => {
  const [out] = body.outputs as readonly [Value];
  const vector = shapeOf(out).length === 1;
  const rows = vector ? shapeOf(out) : shapeOf(out).slice(0, -1);
  const text = rows.map(dimText).join(",");
  const bare = (v: Value): boolean => (vector ? shapeOf(v).length === 0 : shapeOf(v).length <= 1);
  const values = [...body.inputs, ...body.ops.flatMap((op) => op.outputs)];
  for (const v of values) {
    const own = vector ? shapeOf(v).map(dimText).join(",") : rowsText(v);
    if (!bare(v) && (own !== text || (!vector && typeof widthOf(v) !== "number")))
      fail(`'${v.name}' ${typeText(v.type)} has not rows [${text}]`);
  }
  for (const op of body.ops) {
    if (!isRowOp(op) && op.kind !== "const") fail(`${op.kind} in a row kernel`);
    if (!isElementwise(op) && op.kind !== "const" && (vector || bare(op.inputs[0] as Value)))
      fail(`${op.kind} of a value without rows`);
  }
  for (const v of body.outputs) if (bare(v)) fail(`output '${v.name}' ${typeText(v.type)} has no rows`);
  const widths: Widths = { columns: new Set(), groups: new Set() };
  for (const op of body.ops) addWidths(widths, op);
  if (!vector && !widthsFit(widths)) fail("widths are not one number of columns and its groups");
  const columns = vector ? 1 : Math.max(...values.filter((v) => shapeOf(v).length > 0).map((v) => Number(widthOf(v))));
  return { kind: "row", rows, columns };
};
