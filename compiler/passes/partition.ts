/**
 * Decides which ops run on the attention side and which on the FFN side, by what they do.
 *
 * A feed-forward branch starts at a value x that is also one of the addends of an `add`, and ends at the other addend: x + branch(x).
 * Branches in which tokens do not meet each other (no state, no products of rows with rows) and that contract with weights go to the FFN side, as much of each as makes the fewest bytes per token cross:
 * - contractions with weights go to the FFN side, except those that compute which weights to take (the ids of grouped ops), which stay;
 * - the other ops of the branch fall on the side that a smallest cut puts them, and where two cuts cost the same, on the attention side;
 * - everything outside of such branches stays: embedding, attention with its states, residual adds, head, sampling.
 * Names and order of values, and names of weights, play no part.
 */
import { multipleOf, tokenSymbol } from "../../ir/dim.ts";
import type { Graph, Op, Value } from "../../ir/graph.ts";
import { knowledge } from "../../ir/ops/index.ts";
import { dtypeBytes, type Type, typeText } from "../../ir/type.ts";
import type { Pass } from "../pass.ts";
import { contraction, operandOf } from "./contraction.ts";
import { withoutDead } from "./dead.ts";
import { type Flow, flowOf, freshNames, meetsTokens, rowDependent, touchesState, usesOf } from "./flow.ts";
import { Network, unbounded } from "./mincut.ts";

/** One branch that goes to the FFN side. */
export interface Exchange {
  /** the value the branch starts from */
  readonly entry: Value;
  /** the add that merges its result into the residual */
  readonly merge: Op;
  /** its ops on the FFN side, in the graph's order */
  readonly ffn: readonly Op[];
  /** values that cross to the FFN side: activations, their scales, expert ids, the rest */
  readonly push: readonly Value[];
  /** the value that comes back */
  readonly pull: Value;
}

export interface Decision {
  readonly exchanges: readonly Exchange[];
  /** why each op is on its side */
  readonly reasons: ReadonlyMap<Op, string>;
  /** one line: what was decided */
  readonly summary: string;
}

/** Bytes that one token takes of a value whose first axis is a multiple of the tokens and whose others are numbers; undefined for other types. */
export const bytesPerToken = (type: Type): number | undefined => {
  const rows = type.kind === "tensor" ? type.shape[0] : undefined;
  if (type.kind !== "tensor" || rows === undefined) return undefined;
  const perToken = multipleOf(rows, tokenSymbol);
  return perToken === undefined
    ? undefined
    : type.shape
        .slice(1)
        .reduce<number | undefined>(
          (n, d) => (n === undefined || typeof d !== "number" ? undefined : n * d),
          perToken * dtypeBytes(type.dtype),
        );
};

interface Branch {
  readonly entry: Value;
  readonly merge: Op;
  /** all ops between entry and merge on the way through the addend, in order */
  readonly ops: readonly Op[];
}

/** What the analysis of one graph keeps at hand. */
interface Site {
  readonly g: Graph;
  readonly flow: Flow;
  readonly dependent: ReadonlySet<string>;
}

const isElementwise = (op: Op): boolean => op.inputs.length > 0 && knowledge(op.kind).scalar !== undefined;

/**
 * The last value from which both addends of `merge` come: `kept` through elementwise ops alone (a residual, perhaps cast or scaled),
 * `added` in any way.
 */
const entryOf = (site: Site, merge: Op, kept: Value, added: Value): Value | undefined => {
  const { g, flow, dependent } = site;
  const byResidual = new Set([kept.name]);
  const byBranch = new Set([added.name]);
  const from = (flow.index.get(merge) as number) - 1;
  for (let i = from, open = 2; i >= 0 && open > 0; i--) {
    const op = g.ops[i] as Op;
    for (const v of op.outputs) if (byResidual.has(v.name) && byBranch.has(v.name)) return v;
    const onBranch = op.outputs.some((v) => byBranch.has(v.name));
    const onResidual = op.outputs.some((v) => byResidual.has(v.name)) && isElementwise(op);
    for (const v of op.inputs) {
      if (!dependent.has(v.name)) continue;
      if (onBranch) byBranch.add(v.name);
      if (onResidual) byResidual.add(v.name);
    }
    if (onBranch && meetsTokens(op, dependent)) return undefined; // not feed-forward
  }
  return g.inputs.find((v) => byResidual.has(v.name) && byBranch.has(v.name));
};

/** Ops on a way from `entry` to `result`, in order. */
const between = (site: Site, entry: Value, result: Value): readonly Op[] => {
  const { g, flow } = site;
  const producer = flow.producer.get(entry.name);
  const first = producer === undefined ? 0 : (flow.index.get(producer) as number) + 1;
  const wanted = new Set([result.name]);
  const towards: Op[] = [];
  const end = flow.producer.get(result.name);
  for (let i = end === undefined ? -1 : (flow.index.get(end) as number); i >= first; i--) {
    const op = g.ops[i] as Op;
    if (!op.outputs.some((v) => wanted.has(v.name))) continue;
    towards.push(op);
    for (const v of op.inputs) wanted.add(v.name);
  }
  const reached = new Set([entry.name]);
  return towards.reverse().filter((op) => {
    const dependent = op.inputs.some((v) => reached.has(v.name));
    if (dependent) for (const v of op.outputs) reached.add(v.name);
    return dependent;
  });
};

const branchesOf = (site: Site): readonly Branch[] => {
  const { g } = site;
  const found: Branch[] = [];
  const inside = new Set<Op>();
  for (const merge of [...g.ops].reverse()) {
    const [a, b] = merge.inputs;
    if (merge.kind !== "add" || a === undefined || b === undefined || inside.has(merge)) continue;
    if (![a, b].every((v) => site.dependent.has(v.name))) continue;
    for (const [kept, added] of [[a, b] as const, [b, a] as const]) {
      const entry = entryOf(site, merge, kept, added);
      if (entry === undefined || entry.name === added.name) continue;
      const ops = between(site, entry, added);
      if (
        ops.some((op) => meetsTokens(op, site.dependent)) ||
        !ops.some((op) => weightContraction(site, op)) ||
        ops.some((op) => inside.has(op))
      )
        continue;
      for (const op of ops) inside.add(op);
      found.push({ entry, merge, ops });
      break;
    }
  }
  return found.reverse();
};

const weightContraction = (site: Site, op: Op): boolean => {
  const c = contraction(op);
  return c !== undefined && !site.dependent.has(c.w.name);
};

/** Ops of a branch that an index operand of a grouped op comes from: the routing. */
const routing = (flow: Flow, branch: Branch): ReadonlySet<Op> => {
  const members = new Set(branch.ops);
  const marked = new Set<Op>();
  const mark = (v: Value): void => {
    const op = flow.producer.get(v.name);
    if (op === undefined || !members.has(op) || marked.has(op)) return;
    marked.add(op);
    op.inputs.forEach(mark);
  };
  for (const op of branch.ops) {
    const at = knowledge(op.kind).inputs.indexOf("ids");
    const ids = at < 0 ? undefined : op.inputs[at];
    if (ids !== undefined) mark(ids);
  }
  return marked;
};

interface Cut {
  readonly ffn: ReadonlySet<Op>;
  readonly reasons: ReadonlyMap<Op, string>;
}

/** Splits a branch in attention ops, FFN ops, attention ops; a string says why it cannot be split. */
const cutBranch = (site: Site, branch: Branch): Cut | string => {
  const { flow, dependent } = site;
  const members = new Set(branch.ops);
  const route = routing(flow, branch);
  const core = branch.ops.filter((op) => weightContraction(site, op) && !route.has(op));
  if (core.length === 0) return "its only contractions choose weights";
  const bytes = (v: Value): number => bytesPerToken(v.type) ?? unbounded;
  const movable = (op: Op): boolean => !route.has(op) && knowledge(op.kind).rowwise === "row";

  // the ops that come after a core contraction: where the result goes back
  const after = new Set<Op>(core);
  for (const op of branch.ops)
    if (op.inputs.some((v) => members.has(flow.producer.get(v.name) as Op) && after.has(flow.producer.get(v.name) as Op)))
      after.add(op);
  const back = new Network();
  const backNode = new Map([...after].map((op) => [op, back.node()] as const));
  for (const op of core) back.edge(back.source, backNode.get(op) as number, unbounded);
  const entering = new Map<string, number>();
  for (const op of after) {
    const node = backNode.get(op) as number;
    if (!movable(op)) back.edge(node, back.sink, unbounded);
    for (const v of op.inputs) {
      const from = flow.producer.get(v.name);
      if (from !== undefined && after.has(from)) back.edge(node, backNode.get(from) as number, unbounded);
      else if (dependent.has(v.name)) {
        let value = entering.get(v.name);
        if (value === undefined) {
          value = back.node();
          entering.set(v.name, value);
          back.edge(value, back.sink, bytes(v));
        }
        back.edge(node, value, unbounded);
      }
    }
    for (const v of op.outputs) {
      const value = back.node();
      back.edge(node, value, bytes(v));
      const users = usesOf(flow, v);
      for (const user of users) if (after.has(user)) back.edge(value, backNode.get(user) as number, unbounded);
      if (flow.outputs.has(v.name) || users.some((user) => !after.has(user))) back.edge(value, back.sink, unbounded);
    }
  }
  if (back.solve() >= unbounded) return "a value without a token axis, or an op that mixes rows, stands in the way";
  const backSide = back.sourceSide();
  const ffn = new Set([...after].filter((op) => backSide.has(backNode.get(op) as number)));

  // the ops that come before: where the token leaves
  const before = branch.ops.filter((op) => !after.has(op));
  const out = new Network();
  const outNode = new Map(before.map((op) => [op, out.node()] as const));
  const values = new Map<string, number>();
  const valueNode = (v: Value): number => {
    let node = values.get(v.name);
    if (node === undefined) {
      node = out.node();
      values.set(v.name, node);
      const from = flow.producer.get(v.name);
      out.edge((from === undefined ? undefined : outNode.get(from)) ?? out.source, node, bytes(v));
    }
    return node;
  };
  for (const op of before) {
    const node = outNode.get(op) as number;
    const stays = op.outputs.some(
      (v) => flow.outputs.has(v.name) || usesOf(flow, v).some((user) => !outNode.has(user) && !ffn.has(user)),
    );
    if (stays || !movable(op)) out.edge(out.source, node, unbounded);
    for (const v of op.inputs) {
      if (!dependent.has(v.name)) continue;
      out.edge(valueNode(v), node, unbounded);
      const from = flow.producer.get(v.name);
      const fromNode = from === undefined ? undefined : outNode.get(from);
      if (fromNode !== undefined) out.edge(node, fromNode, unbounded);
    }
  }
  for (const op of ffn)
    for (const v of op.inputs) {
      const from = flow.producer.get(v.name);
      if (dependent.has(v.name) && !(from !== undefined && ffn.has(from))) out.edge(valueNode(v), out.sink, unbounded);
    }
  if (out.solve() >= unbounded) return "a value without a token axis would have to cross";
  const outSide = out.sinkSide();
  for (const op of before) if (outSide.has(outNode.get(op) as number)) ffn.add(op);

  const reasons = new Map<Op, string>();
  for (const op of branch.ops) reasons.set(op, reasonFor(site, op, { core, route, after, ffn, movable }));
  return { ffn, reasons };
};

const reasonFor = (
  site: Site,
  op: Op,
  facts: {
    readonly core: readonly Op[];
    readonly route: ReadonlySet<Op>;
    readonly after: ReadonlySet<Op>;
    readonly ffn: ReadonlySet<Op>;
    readonly movable: (op: Op) => boolean;
  },
): string => {
  if (facts.core.includes(op)) return "contracts tokens with weights and keeps no state";
  if (facts.route.has(op)) return "chooses the weights of grouped ops: ids are smaller than what they are computed from";
  if (!facts.movable(op)) return "mixes rows";
  const taken = sumBytes(op.inputs.filter((v) => site.dependent.has(v.name)));
  const given = sumBytes(op.outputs);
  if (facts.ffn.has(op))
    return facts.after.has(op)
      ? `the result is smallest after it or after an op that needs it: takes ${taken} B/token, gives ${given}`
      : `what it takes is smaller than what it gives: ${taken} B/token, ${given}`;
  return facts.after.has(op)
    ? `no fewer bytes would come back after it: takes ${taken} B/token, gives ${given}`
    : `no more bytes cross after it than before it: takes ${taken} B/token, gives ${given}`;
};

const sumBytes = (values: readonly Value[]): number => values.reduce((n, v) => n + (bytesPerToken(v.type) ?? 0), 0);

/** Activations, scales, ids, the rest; then larger before smaller; then in the order of the graph. */
const pushOrder = (flow: Flow, ffn: ReadonlySet<Op>, values: readonly Value[]): readonly Value[] => {
  const roles = ["x", "xs", "ids"];
  const role = (v: Value): number =>
    Math.min(
      roles.length,
      ...usesOf(flow, v)
        .filter((op) => ffn.has(op))
        .map((op) => roles.indexOf(operandOf(op, v) ?? ""))
        .filter((r) => r >= 0),
    );
  const size = (v: Value): number => bytesPerToken(v.type) ?? 0;
  const order = (v: Value): number => {
    const op = flow.producer.get(v.name);
    return op === undefined ? -1 : (flow.index.get(op) as number) + op.outputs.indexOf(v) / (op.outputs.length + 1);
  };
  return [...values].sort((a, b) => role(a) - role(b) || size(b) - size(a) || order(a) - order(b));
};

/** Finds the branches and cuts them; changes nothing. `g` has no dead ops. */
export const decide = (g: Graph): Decision => {
  const flow = flowOf(g);
  const site: Site = { g, flow, dependent: rowDependent(g) };
  const reasons = new Map<Op, string>();
  const whole = (summary: string): Decision => {
    for (const op of g.ops) reasons.set(op, touchesState(op) ? "reads or changes a state" : "everything runs on one side");
    return { exchanges: [], reasons, summary };
  };
  if (!g.ops.some((op) => meetsTokens(op, site.dependent)))
    return whole(
      "everything runs on the attention side: no tokens meet each other, so there is no attention to separate from it",
    );

  const exchanges: Exchange[] = [];
  const refused: string[] = [];
  for (const branch of branchesOf(site)) {
    const cut = cutBranch(site, branch);
    const where = `${branch.entry.name} .. ${branch.merge.outputs[0]?.name}`;
    const result = typeof cut === "string" ? cut : exchangeOf(site, branch, cut);
    if (typeof result === "string" || typeof cut === "string") {
      refused.push(`branch ${where}: ${result}`);
      for (const op of branch.ops) reasons.set(op, `its branch ${where} cannot be sent: ${result}`);
      continue;
    }
    for (const [op, why] of cut.reasons) reasons.set(op, why);
    reasons.set(branch.merge, `merges exchange ${exchanges.length} into the residual, where the residual is`);
    exchanges.push(result);
  }
  for (const op of g.ops)
    if (!reasons.has(op)) {
      const free = !op.outputs.some((v) => site.dependent.has(v.name));
      reasons.set(
        op,
        touchesState(op)
          ? "reads or changes a state"
          : free
            ? "a constant: computed wherever it is used"
            : "in no feed-forward branch",
      );
    }
  if (exchanges.length === 0) {
    const why = refused.length > 0 ? refused.join("; ") : "no branch x + f(x) contracts with weights and keeps no state";
    return { exchanges, reasons, summary: `everything runs on the attention side: ${why}` };
  }
  const kept = refused.length > 0 ? `; ${refused.length} more stay: ${refused.join("; ")}` : "";
  return {
    exchanges,
    reasons,
    summary: `${exchanges.length} branch${exchanges.length === 1 ? "" : "es"} to the FFN side${kept}`,
  };
};

const exchangeOf = (site: Site, branch: Branch, cut: Cut): Exchange | string => {
  const { flow, dependent } = site;
  const ffn = branch.ops.filter((op) => cut.ffn.has(op));
  const made = new Set(ffn.flatMap((op) => op.outputs.map((v) => v.name)));
  const pushed = new Map<string, Value>();
  for (const op of ffn) for (const v of op.inputs) if (dependent.has(v.name) && !made.has(v.name)) pushed.set(v.name, v);
  const pulled = ffn
    .flatMap((op) => op.outputs)
    .filter((v) => flow.outputs.has(v.name) || usesOf(flow, v).some((user) => !cut.ffn.has(user)));
  const [pull, ...more] = pulled;
  if (pull === undefined || more.length > 0)
    return `${pulled.length} values (${pulled.map((v) => v.name).join(", ")}) would have to come back, an exchange brings back one`;
  return { entry: branch.entry, merge: branch.merge, ffn, push: pushOrder(flow, cut.ffn, [...pushed.values()]), pull };
};

/** Puts every op in its place and a dispatch and a collect around each group of FFN ops. */
const place = (g: Graph, exchanges: readonly Exchange[]): Graph => {
  const flow = flowOf(g);
  const dependent = rowDependent(g);
  const fresh = freshNames(g);
  const owner = new Map(exchanges.flatMap((e) => e.ffn.map((op) => [op, e] as const)));
  const waiting = new Map(
    exchanges.map((e) => [e, new Set(e.push.filter((v) => flow.producer.has(v.name)).map((v) => v.name))] as const),
  );
  const ops: Op[] = [];
  /** the exchange whose result has not been collected, with that result */
  let open: { readonly exchange: Exchange; readonly number: number; readonly result: Value } | undefined;
  let posted = 0;
  /** results that have not been collected */
  const awaited = new Set(exchanges.map((e) => e.pull.name));
  const freeCopies = new Map<string, Value>();

  /** An op whose value needs no token is computed again on the FFN side. */
  const copyOf = (v: Value): Value => {
    const op = flow.producer.get(v.name);
    if (op === undefined) return v; // a weight
    const known = freeCopies.get(v.name);
    if (known) return known;
    const inputs = op.inputs.map(copyOf);
    const outputs = op.outputs.map((o) => ({ ...o, name: fresh(`${o.name}_f`) }));
    ops.push({ ...op, inputs, outputs, place: "ffn" });
    for (const [i, o] of op.outputs.entries()) freeCopies.set(o.name, outputs[i] as Value);
    return freeCopies.get(v.name) as Value;
  };

  const collect = (): void => {
    if (open === undefined) return;
    const { exchange, number, result } = open;
    open = undefined;
    awaited.delete(exchange.pull.name);
    ops.push({
      kind: "collect",
      inputs: [result],
      attrs: { exchange: number },
      outputs: [exchange.pull],
      place: "attention",
      ...originOf(exchange),
    });
    made(exchange.pull);
  };
  const dispatch = (exchange: Exchange): void => {
    collect(); // a slot has one exchange under way
    const number = posted++;
    const received = new Map(exchange.push.map((v) => [v.name, { ...v, name: fresh(`${v.name}_f`) }] as const));
    ops.push({
      kind: "dispatch",
      inputs: exchange.push,
      attrs: { exchange: number },
      outputs: [...received.values()],
      place: "attention",
      ...originOf(exchange),
    });
    let result = exchange.pull;
    for (const op of exchange.ffn) {
      const inputs = op.inputs.map((v) => received.get(v.name) ?? (dependent.has(v.name) ? v : copyOf(v)));
      const outputs = op.outputs.map((v) => {
        if (v.name !== exchange.pull.name) return v;
        result = { ...v, name: fresh(`${v.name}_f`) };
        received.set(v.name, result);
        return result;
      });
      ops.push({ ...op, inputs, outputs, place: "ffn" });
    }
    open = { exchange, number, result };
    if (exchanges.some((e) => e.push.some((v) => v.name === exchange.pull.name))) collect();
  };
  const made = (v: Value): void => {
    for (const [exchange, missing] of waiting) {
      if (!missing.delete(v.name) || missing.size > 0) continue;
      waiting.delete(exchange);
      dispatch(exchange);
    }
  };

  /** for an op that changes a state, the ops that read the version it changes: they come before it */
  const readers = new Map<Op, readonly Op[]>();
  for (const op of g.ops)
    if (op.outputs.some((v) => v.type.kind === "kv"))
      readers.set(
        op,
        op.inputs.filter((v) => v.type.kind === "kv").flatMap((v) => usesOf(flow, v).filter((user) => user !== op)),
      );

  for (const [exchange, missing] of waiting)
    if (missing.size === 0) {
      waiting.delete(exchange);
      dispatch(exchange);
    }
  // what does not need the result that is under way goes before its collect; the order of the graph otherwise stays
  for (let left = g.ops.filter((op) => !owner.has(op)); left.length > 0; collect()) {
    const late = new Set<Op>();
    const lateValues = new Set<string>();
    for (const op of left) {
      const missing = op.inputs.some((v) => lateValues.has(v.name) || awaited.has(v.name));
      if (missing || readers.get(op)?.some((reader) => late.has(reader))) {
        late.add(op);
        for (const v of op.outputs) lateValues.add(v.name);
        continue;
      }
      ops.push({ ...op, place: "attention" });
      for (const v of op.outputs) made(v);
    }
    left = [...late];
  }
  return withoutDead({ ...g, ops });
};

const originOf = (e: Exchange): { readonly origin?: string } => (e.merge.origin === undefined ? {} : { origin: e.merge.origin });

const places = (g: Graph): boolean => g.ops.some((op) => op.place !== undefined);

/** `ffnRanks` 0: everything stays on the attention side. A graph that says where its ops run keeps its word. */
export const partition = ({ ffnRanks }: { readonly ffnRanks: number }): Pass => ({
  name: "partition",
  after: ["fold", "quantise"],
  run(source, context) {
    if (places(source)) return source;
    const g = withoutDead(source);
    const exchanges = ffnRanks === 0 ? [] : decide(g).exchanges;
    return place(
      g,
      exchanges.filter(() => context.apply()),
    );
  },
  explain: (g, name) =>
    name !== "partition"
      ? undefined
      : ffnRanks === 0
        ? "partition: there are no FFN ranks: everything runs on the attention side\n"
        : explainPartition(g),
});

/** For people: each op's side and the reason, each exchange with the bytes per token of every value that crosses. */
export const explainPartition = (source: Graph): string => {
  if (places(source)) return "partition: the graph says itself where its ops run; nothing was decided\n";
  const g = withoutDead(source);
  const { exchanges, reasons, summary } = decide(g);
  const ffn = new Set(exchanges.flatMap((e) => e.ffn));
  const lines = [`partition: ${summary}`];
  const crossing = (mark: string, v: Value): string =>
    `  ${mark} ${v.name.padEnd(24)} ${typeText(v.type).padEnd(20)} ${String(bytesPerToken(v.type) ?? 0).padStart(8)} B/token`;
  let [out, back] = [0, 0];
  for (const [i, e] of exchanges.entries()) {
    lines.push(`exchange ${i}: branch of ${e.entry.name}, merged into ${e.merge.outputs[0]?.name}${originText(e.merge)}`);
    for (const v of e.push) lines.push(crossing("->", v));
    lines.push(crossing("<-", e.pull));
    lines.push(`  total ${sumBytes(e.push)} B/token to each FFN rank, ${sumBytes([e.pull])} B/token back from each`);
    out += sumBytes(e.push);
    back += sumBytes([e.pull]);
  }
  if (exchanges.length > 0)
    lines.push(`all exchanges: ${out} B/token to each FFN rank, ${back} B/token back from each, without headers`);
  lines.push("ops:");
  for (const op of g.ops)
    lines.push(
      `  ${ffn.has(op) ? "ffn      " : "attention"} ${op.kind.padEnd(21)} ${(op.outputs[0]?.name ?? "").padEnd(16)} ${reasons.get(op)}${originText(op)}`,
    );
  return `${lines.join("\n")}\n`;
};

const originText = (op: Op): string => (op.origin === undefined ? "" : ` (${op.origin})`);
