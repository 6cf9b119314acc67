/**
 * Contractions that need each other's results, in one launch on Hopper (chain_hopper.cuh): an MLP, or experts with the shared one beside them, whose
 * results are then added up. What the fused op's body does is cut into stages, and each stage into problems; what stays between them lies in scratch,
 * packed by expert where experts read it again.
 */
import type { Graph, Op, Value } from "../../ir/graph.ts";
import { dtypeBytes, type TensorType, typeText } from "../../ir/type.ts";
import type { ContextValue, Inexact, KernelContext, KernelPlan, KernelTemplate, Target } from "../backend.ts";
import { rowsOf, tokenSymbol } from "../c_family.ts";
import { aboutContraction, type Contraction, contractionsOf, dtypeOf, operandsOf, placeOf, stagesOf } from "../contraction.ts";
import { storage } from "../scalar.ts";
import { loadTemplate } from "../template.ts";
import { lineBytes, linesOf, tiles } from "./layout.ts";
import {
  codeSums,
  dealtSums,
  finishOf,
  leastProduct,
  leastQuantisedRows,
  mostSegments,
  multipliedOf,
  type Pointer,
  packedBytes,
  roundUp,
  unitOf,
} from "./linear.ts";

/** Stages of a launch, problems of a stage, and matrices of a problem: shared memory has room for tables of these. */
const mostStages = 3;
const mostProblems = 2;
const mostMatrices = 48;
/** Bytes that may stay between stages. */
const mostScratch = 2 ** 32;

/** A stage's contractions, of the same unit, each with rows of its own. */
interface Stage {
  readonly body: Graph;
  readonly parts: readonly Contraction[];
  /** the one of them to which is added what experts of this stage give: sums of rows that have some wait until all of the stage is done */
  readonly waits?: Contraction;
}

const partsOf = (op: Op, body: Graph): readonly Contraction[] | undefined => {
  const place = op.place === undefined ? {} : { place: op.place };
  return contractionsOf({ kind: "fused", attrs: {}, inputs: body.inputs, outputs: body.outputs, body, ...place });
};

const isGrouped = ({ contraction }: Contraction): boolean => contraction.kind.includes("grouped");

/** Experts that a contraction has weights of, or that a `combine` adds up: who is chosen, the first of them, and how many. */
const choiceOf = (op: Op, ids: Value, count: unknown): string => `${ids.name} ${op.attrs.first ?? 0} ${count}`;

/**
 * The stages, with the last one beside the experts before it where all that it needs of them is the sum over what they give. Most rows have none of a
 * rank's few experts: they need not wait for those that do.
 */
const withoutWaiting = (stages: readonly Stage[]): readonly Stage[] => {
  const [before, last] = stages.slice(-2);
  const [experts, ...others] = before?.parts ?? [];
  const [part, ...more] = last?.parts ?? [];
  if (before === undefined || last === undefined || experts === undefined || part === undefined) return stages;
  const [sum, ...sums] = part.combines;
  if (others.length > 0 || more.length > 0 || sum === undefined || sums.length > 0 || !isGrouped(experts)) return stages;
  const [y, ids] = sum.inputs as readonly [Value, Value];
  const { operand, matrices } = operandsOf(experts);
  const made = new Set(before.body.outputs.map((v) => v.name));
  const read = [part.contraction, ...part.rest, ...part.combines].flatMap((o) => o.inputs).filter((v) => made.has(v.name));
  if (read.some((v) => v.name !== y.name)) return stages;
  if (choiceOf(sum, ids, sum.attrs.count) !== choiceOf(experts.contraction, operand("ids"), matrices)) return stages;
  const inputs = [...new Map([...before.body.inputs, ...last.body.inputs].map((v) => [v.name, v])).values()];
  const body: Graph = {
    ...before.body,
    inputs,
    ops: [...before.body.ops, ...last.body.ops],
    outputs: [...before.body.outputs, ...last.body.outputs],
  };
  const waits = { ...part, inputs };
  return [...stages.slice(0, -2), { body, parts: [{ ...experts, inputs }, waits], waits }];
};

/** What stays between stages, where it lies in scratch, and how a launcher spells it. */
class Between {
  readonly made: ContextValue[] = [];
  readonly packed: ContextValue[] = [];
  readonly kept: ContextValue[] = [];
  private readonly names: Map<string, string> = new Map();
  bytes: number;

  constructor(bytes: number) {
    this.bytes = bytes;
  }

  private take(bytes: number): number {
    const at = this.bytes;
    this.bytes = roundUp(at + bytes, 256);
    return at;
  }
  nameOf(v: Value): string | undefined {
    return this.names.get(v.name);
  }
  /** rows of a matrix in order */
  make(v: Value, rows: number, columns: number): void {
    const name = `made${this.made.length}`;
    this.names.set(v.name, name);
    const at = this.take(rows * columns * dtypeBytes(dtypeOf(v)));
    this.made.push({ type: storage[dtypeOf(v)], name, at, note: typeText(v.type) });
  }
  /** sums of rows that wait; the name of them */
  wait(rows: number, columns: number): string {
    const name = `waiting${this.made.length}`;
    this.made.push({ type: "float", name, at: this.take(rows * columns * 4), note: `f32[${rows},${columns}] at most` });
    return name;
  }
  /** rows packed by the matrix that they meet; the name of it */
  pack(rows: number, matrices: number, lines: number, scales: number): string {
    const name = `packed${this.packed.length}`;
    this.packed.push({ name, at: this.take(packedBytes(rows, matrices, lines, scales)), window: rows, matrices, lines, scales });
    return name;
  }
  /** other values of packed rows, with their scales */
  keep(of: string, rows: number, matrices: number, lines: number, values: Value, scales: Value | undefined): string {
    const name = `kept${this.kept.length}`;
    const scaled = scales === undefined ? 0 : lines;
    this.kept.push({ name, of, at: this.take(packedBytes(rows, matrices, lines, scaled)), lines, scales: scaled });
    this.names.set(values.name, `reinterpret_cast<${storage[dtypeOf(values)]} *>(${name}.lines)`);
    if (scales !== undefined) this.names.set(scales.name, `${name}.scales`);
    return name;
  }
}

/** Why contractions cannot be a chain, whatever lies between them; undefined when they can. */
const unsuited = (stages: readonly Stage[], isWeight: (v: Value) => boolean): string | undefined => {
  if (stages.length > mostStages) return `${stages.length} contractions one after the other`;
  for (const { parts, waits } of stages) {
    if (parts.length > mostProblems) return `${parts.length} contractions beside each other in a chain`;
    if (parts.length > 1 && parts.some((p) => p.combines.length > 0 && p !== waits))
      return "a sum over experts beside another contraction";
    const kinds = parts.map((p) => [p.partner !== undefined, p.quantised !== undefined].join());
    if (new Set(kinds).size > 1) return "different contractions beside each other in a chain";
  }
  const multiplied = multipliedOf(stages.flatMap(({ parts }) => parts)).map(operandsOf);
  if (!multiplied.every(({ w, scaled, operand }) => isWeight(w) && (!scaled || isWeight(operand("ws")))))
    return "a chain of contractions with what are no weights";
  if (multiplied.reduce((sum, { columns, inner }) => sum + columns * inner, 0) < leastProduct)
    return "a chain of small contractions";
  return undefined;
};

/** The one type that all contractions have, of those that a chain has kernels for. */
const unitOfAll = (stages: readonly Stage[]): "E4m3" | "Bf16" | undefined => {
  const units = multipliedOf(stages.flatMap(({ parts }) => parts)).map((work) => {
    const { scaled, w, inner } = operandsOf(work);
    return unitOf(dtypeOf(w), scaled ? (work.contraction.attrs.block as readonly [number, number]) : undefined, inner);
  });
  const [unit, ...others] = [...new Set(units)];
  return others.length === 0 && (unit === "E4m3" || unit === "Bf16") ? unit : undefined;
};

/** A launch while it is put together. Methods say in words why it cannot be. */
class Chain {
  private readonly body: Graph;
  private readonly stages: readonly Stage[];
  private readonly unit: "E4m3" | "Bf16";
  /** of one attention rank */
  private readonly mostTokens: number;
  private readonly results: ReadonlySet<string>;
  /** kept values: where they are packed, by which choice of experts, and the name of the scales packed with them */
  private readonly keptOf: Map<string, { readonly packed: string; readonly choice: string; readonly scales: string }> = new Map();
  readonly between: Between;

  constructor(body: Graph, stages: readonly Stage[], unit: "E4m3" | "Bf16", mostTokens: number) {
    this.body = body;
    this.stages = stages;
    this.unit = unit;
    this.mostTokens = mostTokens;
    this.results = new Set(body.outputs.map((v) => v.name));
    this.between = new Between(stages.length * dealtSums);
  }

  inputIndex(v: Value): number {
    return this.body.inputs.findIndex((i) => i.name === v.name);
  }
  /** The address of what a stage reads. */
  private spell(v: Value, type: string): string | undefined {
    const index = this.inputIndex(v);
    return index >= 0 ? `argument<const ${type}>(c, ${index})` : this.between.nameOf(v);
  }

  /** Rows of a part: whether they are packed here, what they are called where they are packed, and by which choice of experts. */
  private rowsOf(
    part: Contraction,
    most: number,
  ): string | { readonly packs: boolean; readonly packed: string; readonly choice: string } {
    const { x, operand, inner, matrices, rowPerToken, w, scaled } = operandsOf(part);
    const kept = this.keptOf.get(x.name);
    const scales = scaled ? operand("xs").name : "";
    const scalesKept = [...this.keptOf.values()].some((other) => scaled && other.scales === scales);
    if (kept === undefined ? scalesKept : kept.scales !== scales) return "packed rows with the scales of others";
    if (!isGrouped(part)) {
      if (kept !== undefined) return "packed rows that all meet one matrix";
      if (this.mostTokens < leastQuantisedRows) return `a chain of ${this.mostTokens} rows, fewer than ${leastQuantisedRows}`;
      if ((inner * dtypeBytes(dtypeOf(w))) % 16 !== 0) return `a chain with rows of ${inner}`;
      return { packs: false, packed: "", choice: "" };
    }
    if (part.contraction.attrs.owned !== true) return "a chain with experts that are not there";
    if (matrices > mostMatrices) return `${matrices} experts in a chain, more than ${mostMatrices}`;
    if (this.inputIndex(operand("ids")) < 0) return "a chain that chooses experts";
    const choice = choiceOf(part.contraction, operand("ids"), matrices);
    if (kept !== undefined)
      return kept.choice === choice && !rowPerToken
        ? { packs: false, packed: kept.packed, choice }
        : "a chain of experts that are chosen anew";
    if (this.inputIndex(x) < 0) return "a chain of experts whose rows are not packed";
    const lines = linesOf(inner, dtypeOf(w));
    return { packs: true, packed: this.between.pack(most, matrices, lines, this.unit === "E4m3" ? lines : 0), choice };
  }

  /** Where a part's results lie that are not the launch's: packed as its rows are, where experts of a later stage read them, and what it is called. */
  private keep(
    part: Contraction,
    number: number,
    most: number,
    packed: string,
    choice: string,
  ): string | { readonly kept: string } {
    const { rows, columns, matrices } = operandsOf(part);
    const [stage, later] = [this.stages[number] as Stage, this.stages.slice(number + 1)];
    const made = part.outputs.filter((v) => !this.results.has(v.name));
    const reads = (v: Value): boolean =>
      later.some(({ parts }) => parts.some((p) => isGrouped(p) && operandsOf(p).x.name === v.name));
    const values = part.outputs.find(reads);
    if (values === undefined) {
      for (const v of made) this.between.make(v, most, ((v.type as TensorType).shape[1] ?? 1) as number);
      return { kept: "" };
    }
    const beside = part.rest.flatMap((o) => o.inputs).filter((v) => stage.body.inputs.some((i) => i.name === v.name));
    const along = beside.map((v) => placeOf(v, rows, columns)).some((place) => place === "at" || place === "row");
    const whole = (columns * dtypeBytes(dtypeOf(values))) % lineBytes === 0;
    const alone = made.length === part.outputs.length && made.length === (part.quantised === undefined ? 1 : 2);
    const others = later.flatMap(({ parts }) => parts.flatMap((p) => [...p.rest, ...p.combines].flatMap((o) => o.inputs)));
    if (
      !isGrouped(part) ||
      !whole ||
      !alone ||
      along ||
      part.combines.length > 0 ||
      others.some((v) => made.some((m) => m.name === v.name))
    )
      return "rows that cannot be packed as they are made";
    const lines = linesOf(columns, dtypeOf(values));
    const kept = this.between.keep(packed, most, matrices, lines, values, part.quantised?.scales);
    this.keptOf.set(values.name, { packed: kept, choice, scales: part.quantised?.scales.name ?? "" });
    return { kept };
  }

  private problem(part: Contraction, number: number): string | { readonly context: KernelContext; readonly kept: string } {
    const { rows, x, inner, operand, scaled, choices, matrices, rowPerToken } = operandsOf(part);
    const counted = rowsOf(rows);
    if (counted === undefined || !counted.perToken) return `${rows} rows in a chain`;
    const most = this.mostTokens * mostSegments * counted.count;
    if (most >= 2 ** 31) return `as many as ${most} rows`;
    const from = this.spell(x, storage[dtypeOf(x)]);
    const scales = scaled ? this.spell(operand("xs"), "float") : "nullptr";
    if (from === undefined || scales === undefined) return "a chain whose rows are results of the launch";
    const found = this.rowsOf(part, most);
    if (typeof found === "string") return found;
    const kept = this.keep(part, number, most, found.packed, found.choice);
    if (typeof kept === "string") return kept;
    return {
      context: {
        grouped: isGrouped(part),
        packs: found.packs,
        packed: found.packed,
        keeps: kept.kept !== "",
        x: from,
        xs: scales,
        inner,
        window: most,
        perToken: counted.perToken,
        count: counted.count,
        ids: isGrouped(part) ? (this.spell(operand("ids"), "int32_t") as string) : "",
        choices,
        matrices,
        firstMatrix: (part.contraction.attrs.first as number | undefined) ?? 0,
        rowPerToken,
        given: multipliedOf([part]).map((work) => {
          const given = operandsOf(work);
          const ws = given.scaled ? (this.spell(given.operand("ws"), "float") as string) : "nullptr";
          return { w: this.spell(given.w, "uint8_t") as string, ws, columns: given.columns };
        }),
      },
      kept: kept.kept,
    };
  }

  stage(number: number, target: Target): string | KernelContext {
    const { body, parts, waits } = this.stages[number] as Stage;
    if (body.inputs.some((v) => this.results.has(v.name))) return "a chain that reads what it writes for others";
    const problems: KernelContext[] = [];
    const keeping = new Map<Contraction, string>();
    for (const part of parts) {
      const problem = this.problem(part, number);
      if (typeof problem === "string") return problem;
      problems.push(problem.context);
      if (problem.kept !== "") keeping.set(part, problem.kept);
    }
    if (keeping.size > 1) return "several results of experts for experts";
    const pointerOf = (v: Value, type: string): Pointer => {
      const [input, result] = [this.inputIndex(v), this.body.outputs.findIndex((r) => r.name === v.name)];
      const within = input < 0 && result < 0;
      const index = input >= 0 ? input : this.body.inputs.length + result;
      return { value: within ? (this.between.nameOf(v) as string) : `argument<${type}>(c, ${index})`, within };
    };
    const finish = finishOf(parts, body.outputs, target, pointerOf, (part) => keeping.has(part), waits);
    if (finish === undefined) return "an epilogue that does not lie along its sums";
    const about = parts.map((part) => aboutContraction(part, operandsOf(part).x, operandsOf(part).w)).join(" and ");
    const [kept] = keeping.values();
    return {
      ...finish,
      about,
      problems,
      many: parts.length,
      unit: this.unit,
      places: kept === undefined ? "" : `${kept}.places`,
      waiting: waits === undefined ? "" : this.between.wait(this.mostTokens * mostSegments, operandsOf(waits).columns),
    };
  }
}

const match = (op: Op, target: Target): KernelPlan | undefined => {
  const { body } = op;
  if (op.kind !== "fused" || body === undefined || target.arch !== "sm_90a" || !op.place?.startsWith("ffn")) return undefined;
  const found: Stage[] = [];
  for (const stage of stagesOf(body) ?? []) {
    const parts = partsOf(op, stage);
    if (parts === undefined) return undefined;
    found.push({ body: stage, parts });
  }
  if (found.length === 0) return undefined;
  const stages = withoutWaiting(found);
  const isWeight = (v: Value): boolean => {
    const outer = op.inputs[body.inputs.findIndex((i) => i.name === v.name)];
    return outer !== undefined && (target.isWeight?.(outer) ?? true);
  };
  const why = unsuited(stages, isWeight);
  if (why !== undefined) return target.decline(why);
  const unit = unitOfAll(stages);
  if (unit === undefined) return target.decline("a chain is of e4m3 or of bf16");
  const chain = new Chain(body, stages, unit, target.symbols.find((s) => s.name === tokenSymbol)?.max ?? 1);
  const contexts: KernelContext[] = [];
  for (const number of stages.keys()) {
    const context = chain.stage(number, target);
    if (typeof context === "string") return target.decline(context);
    contexts.push(context);
  }
  const { between } = chain;
  if (between.bytes > mostScratch) return target.decline(`${between.bytes} bytes between contractions`);
  const about = contexts.map((s) => s.about).join(", then ");
  const weights = multipliedOf(stages.flatMap(({ parts }) => parts)).map((work) => operandsOf(work).w);
  return {
    context: { about, stages: contexts, made: between.made, packed: between.packed, kept: between.kept, unit },
    scratch: between.bytes,
    layouts: Object.fromEntries(weights.map((w) => [chain.inputIndex(w), tiles])),
    about,
    inexact: unit === "E4m3" ? codesBetween : roundedBetween,
  };
};

/**
 * A sum that is off in its last bits may round to the next code. Of the largest codes that is 32 of 448 off, and so is their part of a result: where 256
 * or 512 are summed, up to 2^-7.6 of the largest result with 5 of 1536 codes changed. More are summed in larger layers, and each counts for less.
 */
const codesBetween: Inexact = {
  ofLargest: 2 ** -7,
  why: `${codeSums.why}, and codes between contractions are rounded from such sums`,
};
const roundedBetween: Inexact = {
  ofLargest: 2 ** -11,
  why: "values between contractions are rounded from sums in another order",
};

const text = loadTemplate(new URL("./kernels/chain.hbs", import.meta.url));

export const chainKernel: KernelTemplate = {
  name: "chain",
  match,
  render: (context, symbol) => {
    const stages = (context.stages as readonly KernelContext[]).map((stage, i) => ({ ...stage, struct: `${symbol}_stage${i}` }));
    return text({ ...context, stages, name: symbol });
  },
};
