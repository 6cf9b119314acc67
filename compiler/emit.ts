import type { Backend, Inexact, KernelPlan, KvLayout, Layout, RenderedKernel, Target } from "../backends/backend.ts";
import { UserError } from "../ir/error.ts";
import type { Graph, Op, Place, Value, Weight } from "../ir/graph.ts";
import { typeText } from "../ir/type.ts";

export type Role = "attention" | "ffn";

/** The backend and architecture chosen for one side. */
export interface Side {
  readonly backend: Backend;
  readonly arch: string;
}

/** Which kernel does each op, and how its weights must lie in memory. */
export interface Emission {
  /** with one weight per layout: a weight that two kernels want stored differently appears twice */
  readonly graph: Graph;
  readonly kernels: Readonly<Record<Role, readonly EmittedKernel[]>>;
  kernelOf(op: Op): EmittedKernel;
  /** false for exchanges, which no kernel does */
  has(op: Op): boolean;
  layoutOf(weight: string): Layout | undefined;
}

export interface EmittedKernel extends RenderedKernel {
  readonly scratch: number;
  readonly inexact: Inexact | undefined;
}

export const roleOf = (place: Place | undefined): Role => (place?.startsWith("ffn") ? "ffn" : "attention");

/** Ops that move values between ranks; the schedule turns them into exchanges. */
export const isExchange = (op: Op): boolean => op.kind === "dispatch" || op.kind === "collect";

/** The name every kernel is rendered under to compare texts: layers that differ only in weights end up with one kernel. */
const anonymous = "KERNEL";

interface Choice {
  readonly op: Op;
  readonly plan: KernelPlan;
  readonly text: string;
  readonly render: (name: string) => string;
}

/** Chooses a kernel for every op of a graph; throws, listing everything a target lacks, when there is none. */
export const emit = (graph: Graph, sides: Readonly<Record<Role, Side>>, kv: KvLayout | undefined): Emission => {
  const choices = new Map<Op, Choice>();
  const lacking = new Map<string, string>();
  const weights = new Set(graph.weights.map((w) => w.value.name));
  const isWeight = (v: Value): boolean => weights.has(v.name);
  const alike = new Likeness(isWeight);
  for (const op of graph.ops) {
    if (isExchange(op)) continue;
    const role = roleOf(op.place);
    const like = alike.first(op, role);
    const choice =
      like === op
        ? choose(op, sides[role], graph, isWeight, kv, (why) =>
            lacking.set(`${role} on ${sides[role].backend.name}: ${why}`, op.origin ?? ""),
          )
        : choices.get(like);
    if (choice) choices.set(op, choice);
  }
  if (lacking.size > 0) throw lackingError(lacking);

  const kernels: Record<Role, EmittedKernel[]> = { attention: [], ffn: [] };
  const byText: Record<Role, Map<string, EmittedKernel>> = { attention: new Map(), ffn: new Map() };
  const chosen = new Map<Op, EmittedKernel>();
  for (const [op, choice] of choices) {
    const role = roleOf(op.place);
    // the runtime holds every launch of a kernel to the same arguments, and weights are not typed: they may be packed
    const identity = `${choice.text}\n${op.inputs.map((v) => Number(isWeight(v))).join("")}`;
    const known = byText[role].get(identity);
    if (known) {
      chosen.set(op, known);
      continue;
    }
    const name = `k${kernels[role].length}_${op.kind === "fused" ? fusedName(op) : op.kind}`;
    const kernel = {
      name,
      about: choice.plan.about,
      text: choice.render(name),
      scratch: choice.plan.scratch,
      inexact: choice.plan.inexact,
    };
    kernels[role].push(kernel);
    byText[role].set(identity, kernel);
    chosen.set(op, kernel);
  }

  const { graph: split, layouts, origin } = splitWeights(graph, choices);
  return {
    graph: split,
    kernels,
    kernelOf: (op) => {
      const kernel = chosen.get(origin.get(op) ?? op);
      if (!kernel) throw new Error(`no kernel was chosen for ${op.kind} ${op.outputs[0]?.name}`);
      return kernel;
    },
    has: (op) => chosen.has(origin.get(op) ?? op),
    layoutOf: (weight) => layouts.get(weight),
  };
};

/** Ops that differ only in the names of their values, as those of two layers do, get one choice. */
class Likeness {
  private readonly firsts = new Map<string, Op>();
  private readonly bodies = new Map<Graph, number>();
  private readonly isWeight: (v: Value) => boolean;

  constructor(isWeight: (v: Value) => boolean) {
    this.isWeight = isWeight;
  }

  /** the first op seen that is like this one */
  first(op: Op, role: Role): Op {
    let body = op.body ? this.bodies.get(op.body) : -1;
    if (op.body && body === undefined) {
      body = this.bodies.size;
      this.bodies.set(op.body, body);
    }
    const types = (values: readonly Value[]): string =>
      values.map((v) => `${this.isWeight(v) ? "weight " : ""}${typeText(v.type)}`).join(" ");
    const key = `${role} ${op.kind} ${body} ${JSON.stringify(op.attrs)} ${types(op.inputs)} -> ${types(op.outputs)}`;
    const known = this.firsts.get(key);
    if (known) return known;
    this.firsts.set(key, op);
    return op;
  }
}

const choose = (
  op: Op,
  side: Side,
  graph: Graph,
  isWeight: (v: Value) => boolean,
  kv: KvLayout | undefined,
  lack: (why: string) => void,
): Choice | undefined => {
  const reasons: string[] = [];
  const target = targetOf(side, graph, isWeight, kv, reasons);
  for (const template of side.backend.kernels) {
    const plan = template.match(op, target);
    if (plan) {
      const render = (name: string): string => template.render(plan.context, name);
      return { op, plan, text: render(anonymous), render };
    }
  }
  const shape = op.inputs.map((v) => typeText(v.type)).join(", ");
  lack(`${op.kind}(${shape})${reasons.length > 0 ? `: ${[...new Set(reasons)].join("; ")}` : ""}`);
  return undefined;
};

/** What templates are told of their target; why they decline goes to `reasons`. */
const targetOf = (
  side: Side,
  graph: Graph,
  isWeight: (v: Value) => boolean,
  kv: KvLayout | undefined,
  reasons: string[],
): Target => ({
  arch: side.arch,
  symbols: graph.symbols,
  isWeight,
  ...(kv ? { kv } : {}),
  decline: (why) => {
    reasons.push(why);
    return undefined;
  },
});

/** Whether a side has a kernel for an op of the graph. */
export const runsOn = (op: Op, side: Side, graph: Graph, kv: KvLayout | undefined): boolean => {
  const weights = new Set(graph.weights.map((w) => w.value.name));
  const target = targetOf(side, graph, (v) => weights.has(v.name), kv, []);
  return side.backend.kernels.some((template) => template.match(op, target) !== undefined);
};

const lackingError = (lacking: ReadonlyMap<string, string>): UserError => {
  const first = [...lacking].slice(0, 12).map(([what, where]) => `  ${what}${where === "" ? "" : ` (first at ${where})`}`);
  const more = lacking.size > 12 ? [`  and ${lacking.size - 12} more`] : [];
  return new UserError(
    [
      `the target has no kernel for ${lacking.size} op${lacking.size === 1 ? "" : "s"}; choose another target or precision:`,
      ...first,
      ...more,
    ].join("\n"),
  );
};

/** `linear_add_cast`: the ops of a fused body, so that a profile can be read */
const fusedName = (op: Op): string => {
  const kinds = [...new Set(op.body?.ops.map((o) => o.kind) ?? [])].filter((k) => k !== "const" && k !== "cast");
  const main = kinds.find((k) => k.includes("linear")) ?? kinds.find((k) => ["attention", "kv_append", "topk"].includes(k));
  return main === undefined ? `row_${kinds.slice(0, 3).join("_")}` : `${main}_fused`;
};

/** Gives a weight that is stored in two ways a second name for the second way. */
const splitWeights = (
  graph: Graph,
  choices: ReadonlyMap<Op, Choice>,
): { graph: Graph; layouts: Map<string, Layout>; origin: Map<Op, Op> } => {
  const weights = new Map(graph.weights.map((w) => [w.value, w]));
  const stored = new Map<string, Weight>();
  const layouts = new Map<string, Layout>();
  const origin = new Map<Op, Op>();
  const ops = graph.ops.map((op) => {
    const choice = choices.get(op);
    if (!choice) return op;
    let changed = false;
    const inputs = op.inputs.map((value, i) => {
      const weight = weights.get(value as Weight["value"]);
      if (!weight) return value;
      const layout = choice.plan.layouts?.[i];
      const known = stored.get(value.name);
      if (!known || layouts.get(value.name)?.name === layout?.name) {
        stored.set(value.name, weight);
        if (layout) layouts.set(value.name, layout);
        return value;
      }
      const name = `${value.name}_${layout?.name ?? "rows"}`;
      const twin = stored.get(name) ?? { value: { ...weight.value, name }, source: weight.source };
      stored.set(name, twin);
      if (layout) layouts.set(name, layout);
      changed = true;
      return twin.value;
    });
    if (!changed) return op;
    const renamed = { ...op, inputs };
    origin.set(renamed, op);
    return renamed;
  });
  return { graph: { ...graph, ops, weights: [...stored.values()] }, layouts, origin };
};
