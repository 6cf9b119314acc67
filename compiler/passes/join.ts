/**
 * Joins kernels into larger ones where the target has such: it is offered what could run as one, and takes it or not. The pass knows no target
 * and no pattern: contractions of the same rows, and an op with the only one that uses its results, are offered pair by pair, so a target that
 * wants three ops as one kernel also takes two of them.
 *
 * The body of a joined op is the ops of its parts, one after the other, names as `fuse` gives them. It has no normal form: what a body may be is
 * what some template of the target matches. A target whose templates match nothing new sees no difference.
 */
import type { Graph, Op, Value } from "../../ir/graph.ts";
import { typeText } from "../../ir/type.ts";
import type { Pass, PassContext } from "../pass.ts";
import { isContraction } from "./contraction.ts";
import { flowOf, usesOf } from "./flow.ts";
import { attrText } from "./fold.ts";
import { inOrder, originsOf, segments } from "./fuse.ts";

/** Whether the target of the op's place has a kernel for it. `graph` has the op's inputs. */
export type Runs = (op: Op, graph: Graph) => boolean;

/** Names of the operands of a contraction that hold its rows: which rows, and for experts which of them. */
const rowOperands: Readonly<Record<string, readonly number[]>> = {
  linear: [0],
  scaled_linear: [0, 1],
  grouped_linear: [0, 2],
  scaled_grouped_linear: [0, 1, 4],
};

/** The contraction that an op is or begins with. */
const leading = (op: Op): Op | undefined => {
  const first = op.kind === "fused" ? op.body?.ops[0] : op;
  return first && isContraction(first) ? first : undefined;
};

/** What siblings share: place, rows and how they are scaled. Undefined for what is no contraction. */
const siblingKey = (op: Op, segment: number): string | undefined => {
  const contraction = leading(op);
  if (contraction === undefined) return undefined;
  const outer = new Map(op.body?.inputs.map((v, i) => [v.name, (op.inputs[i] as Value).name] as const));
  const rows = (rowOperands[contraction.kind] ?? []).map((i) => {
    const name = (contraction.inputs[i] as Value).name;
    return op.kind === "fused" ? outer.get(name) : name;
  });
  return [op.place, segment, contraction.kind, attrText({ block: contraction.attrs.block ?? 0 }), ...rows].join(" ");
};

/** Bodies by their text: layers that differ only in weights share one. */
type Bodies = Map<string, Graph>;

/** Two ops as one, the first one's results before the second's; `needed` says which of the first one's are results of both. */
const merge = (g: Graph, a: Op, b: Op, needed: (v: Value) => boolean, bodies: Bodies): Op => {
  const made = new Set(a.outputs.map((v) => v.name));
  const inputs = [...a.inputs, ...b.inputs.filter((v) => !made.has(v.name))].filter(
    (v, i, all) => all.findIndex((w) => w.name === v.name) === i,
  );
  const outputs = [...a.outputs.filter(needed), ...b.outputs];
  const local = new Map<string, Value>(inputs.map((v, i) => [v.name, { name: `i${i}`, type: v.type }]));
  const ops: Op[] = [];
  let results = 0;
  const fresh = (v: Value): Value => ({ name: `t${results++}`, type: v.type });
  const add = (part: Op): void => {
    const inner =
      part.body === undefined
        ? local
        : new Map(part.body.inputs.map((v, i) => [v.name, local.get((part.inputs[i] as Value).name) as Value]));
    for (const op of part.body?.ops ?? [part]) {
      const made = op.outputs.map(fresh);
      ops.push({ kind: op.kind, attrs: op.attrs, inputs: op.inputs.map((v) => inner.get(v.name) as Value), outputs: made });
      op.outputs.forEach((v, i) => {
        inner.set(v.name, made[i] as Value);
      });
    }
    (part.body?.outputs ?? part.outputs).forEach((v, i) => {
      local.set((part.outputs[i] as Value).name, inner.get(v.name) as Value);
    });
  };
  add(a);
  add(b);
  const types = (values: readonly Value[]): string => values.map((v) => typeText(v.type)).join(" ");
  const text = [
    types(inputs),
    ...ops.map((op) => `${op.kind} ${attrText(op.attrs)} ${op.inputs.map((v) => v.name).join(",")} -> ${types(op.outputs)}`),
    outputs.map((v) => local.get(v.name)?.name).join(","),
  ].join("\n");
  let body = bodies.get(text);
  if (body === undefined) {
    body = {
      name: "joined",
      symbols: g.symbols,
      inputs: [...local.values()].slice(0, inputs.length),
      states: [],
      weights: [],
      ops,
      outputs: outputs.map((v) => local.get(v.name) as Value),
    };
    bodies.set(text, body);
  }
  const place = a.place === undefined ? {} : { place: a.place };
  return { kind: "fused", inputs, attrs: {}, outputs, body, ...place, ...originsOf([a, b]) };
};

/** A pass's view of the graph while ops are joined. */
class Joining {
  private readonly g: Graph;
  private readonly runs: Runs;
  private readonly context: PassContext;
  private readonly segment: ReadonlyMap<Op, number>;
  private readonly weights: ReadonlySet<string>;
  private readonly bodies: Bodies = new Map();
  /** what the target said, by body and which inputs are weights */
  private readonly answers: Map<string, boolean> = new Map();
  private readonly bodyNumbers: Map<Graph, number> = new Map();
  changed = false;

  constructor(g: Graph, runs: Runs, context: PassContext) {
    this.g = g;
    this.runs = runs;
    this.context = context;
    this.segment = segments(g);
    this.weights = new Set(g.weights.map((w) => w.value.name));
  }

  /** One sweep of offers over the graph; each op is joined at most once in it. */
  sweep(): Graph {
    const flow = flowOf(this.g);
    const taken = new Map<Op, Op>();
    const gone = new Set<Op>();
    const at = (op: Op): number => flow.index.get(op) as number;
    const segmentOf = (op: Op): number => this.segment.get(op) as number;
    const offer = (a: Op, b: Op): void => {
      if (taken.has(a) || taken.has(b) || gone.has(a) || gone.has(b) || this.isBetween(flow, a, b)) return;
      const needed = (v: Value): boolean => flow.outputs.has(v.name) || usesOf(flow, v).some((u) => u !== b);
      const joined = merge(this.g, a, b, needed, this.bodies);
      if (!this.accepts(joined) || !this.context.apply()) return;
      gone.add(a);
      taken.set(b, joined);
      this.changed = true;
    };
    const siblings = new Map<string, Op>();
    for (const op of this.g.ops) {
      if (op.kind === "dispatch" || op.kind === "collect") continue;
      const key = siblingKey(op, segmentOf(op));
      if (key !== undefined) {
        const before = siblings.get(key);
        if (before !== undefined) offer(before, op);
        siblings.set(key, op);
      }
      const users = [...new Set(op.outputs.flatMap((v) => usesOf(flow, v)))];
      const [user] = users;
      if (user === undefined || users.length > 1 || user.kind === "dispatch" || user.kind === "collect") continue;
      if (op.outputs.some((v) => flow.outputs.has(v.name))) continue;
      if (op.place === user.place && segmentOf(op) === segmentOf(user)) offer(op, user);
    }
    if (!this.changed) return this.g;
    const units = this.g.ops
      .filter((op) => !gone.has(op))
      .map((op) => {
        const now = taken.get(op) ?? op;
        return { at: at(op), op: now, inputs: now.inputs };
      });
    const ops = inOrder(units, (unit) => new Set(unit.op.outputs.map((v) => v.name))).map((unit) => unit.op);
    return { ...this.g, ops };
  }

  /** Whether something else must run after `a` and before `b`, or the ops touch versions of one state. */
  private isBetween(flow: ReturnType<typeof flowOf>, a: Op, b: Op): boolean {
    const changes = (op: Op): boolean => op.outputs.some((v) => v.type.kind === "kv");
    if ((changes(a) || changes(b)) && [...a.inputs, ...a.outputs].some((v) => v.type.kind === "kv")) return true;
    const first = flow.index.get(a) as number;
    const seen = new Set<Op>();
    const reaches = (op: Op): boolean =>
      op.inputs.some((v) => {
        const from = flow.producer.get(v.name);
        if (from === undefined || seen.has(from) || (flow.index.get(from) as number) < first) return false;
        if (from === a) return op !== b;
        seen.add(from);
        return reaches(from);
      });
    return reaches(b);
  }

  private accepts(op: Op): boolean {
    const body = op.body as Graph;
    let number = this.bodyNumbers.get(body);
    if (number === undefined) {
      number = this.bodyNumbers.size;
      this.bodyNumbers.set(body, number);
    }
    const key = `${op.place} ${number} ${op.inputs.map((v) => (this.weights.has(v.name) ? "w" : ".")).join("")}`;
    let answer = this.answers.get(key);
    if (answer === undefined) {
      answer = this.runs(op, this.g);
      this.answers.set(key, answer);
    }
    return answer;
  }
}

/** `runs`: what the targets have kernels for. */
export const join = (runs: Runs): Pass => ({
  name: "join",
  after: ["fuse", "dead"],
  run(source, context) {
    let g = source;
    for (;;) {
      const joining = new Joining(g, runs, context);
      g = joining.sweep();
      if (!joining.changed) return g;
    }
  },
});
