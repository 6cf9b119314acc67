/** The whole compiler on one page: source -> Graph -> (passes) -> Graph -> schedule -> Schedule -> emit -> Bundle. */
import type { Backend, KvLayout } from "../backends/backend.ts";
import { loadBackend } from "../backends/index.ts";
import { UserError } from "../ir/error.ts";
import type { Graph } from "../ir/graph.ts";
import { printGraph } from "../ir/print.ts";
import type { Schedule } from "../ir/schedule.ts";
import { printSchedule } from "../ir/schedule_text.ts";
import type { KvType } from "../ir/type.ts";
import { type Emission, emit, type Role, roleOf, runsOn, type Side } from "./emit.ts";
import { type Model, readModel, resume, rowsOf } from "./model.ts";
import { packBundle } from "./pack.ts";
import { runPasses } from "./pass.ts";
import { passes } from "./passes/index.ts";
import type { Progress } from "./progress.ts";
import { schedule, withHomes } from "./schedule.ts";
import { packedBytes } from "./weights.ts";

/** The flags of `step3c compile`; their help texts in cli.ts say what they mean. */
export interface CompileOptions {
  readonly out?: string;
  readonly attention: string;
  readonly ffn: string;
  readonly precision: "bf16" | "fp8" | "int8";
  readonly kv: "bf16" | "fp8" | "int8";
  readonly ranks: { readonly attention: number; readonly ffn: number };
  readonly ffnSplit: string;
  readonly microBatches: number;
  readonly maxBatch: number;
  readonly maxContext?: number;
  /** limits of the sizes that an ONNX model leaves open, by their names */
  readonly dim?: ReadonlyMap<string, readonly [min: number, max: number]>;
  readonly weights: boolean;
  readonly emit?: "ir" | "schedule" | "kernels";
  readonly printIrAfter?: string;
  readonly dumpTo?: string;
  readonly from?: string;
  readonly stopAfter?: string;
  readonly skipPass?: readonly string[];
  readonly passLimit?: number;
  readonly timePasses?: boolean;
  readonly explain?: string;
}

export const defaultOptions: CompileOptions = {
  attention: "cpp",
  ffn: "cpp",
  precision: "bf16",
  kv: "bf16",
  ranks: { attention: 1, ffn: 1 },
  ffnSplit: "ep",
  microBatches: 3,
  maxBatch: 16,
  weights: true,
};

/** Rows of one slot in a prefill round: enough for the weights read once to serve many tokens, few enough to keep slots small. */
const prefillRows = 128;

/** Compiles a model, which it closes, into a bundle; gives the text that was asked to be printed. Throws a UserError when the input is at fault. */
export const compile = async (source: string | Model, options: CompileOptions, progress: Progress): Promise<string> => {
  const printed: string[] = [];
  const sides = await loadSides(options);
  const model =
    typeof source === "string"
      ? readModel(source, options, (type) => layoutOf(sides.attention.backend, type), maxRows(options))
      : source;
  try {
    const resumed = options.from === undefined ? undefined : resume(options.from);
    const graph = runPasses(
      resumed?.graph ?? model.graph,
      passes({
        ...options,
        ffn: options.ranks.ffn,
        split: options.ffnSplit,
        runs: (op, g) => runsOn(op, sides[roleOf(op.place)], g, kvLayout(g, sides.attention.backend)),
      }),
      {
        printAfter: options.printIrAfter,
        dumpTo: options.dumpTo,
        stopAfter: options.stopAfter,
        skip: options.skipPass,
        limit: options.passLimit,
        time: options.timePasses,
        from: resumed?.point,
        explain: options.explain,
        print: (text) => printed.push(text),
      },
    );
    if (options.stopAfter !== undefined || options.emit === "ir") return [...printed, printGraph(graph)].join("");

    const kv = kvLayout(graph, sides.attention.backend);
    const emission = emit(withHomes(graph), sides, kv);
    const outputs = graph.outputs.map((v) => v.name);
    const schedules = makeSchedules(model, emission, outputs, sides, kv, options);
    if (options.emit === "schedule") return [...printed, ...schedules.map(printSchedule)].join("");
    if (options.emit === "kernels") return [...printed, ...kernelTexts(emission)].join("");
    if (options.explain !== undefined) return [...printed, explainKernel(emission, options.explain, printed.length > 0)].join("");
    const out = await packBundle({ model, options, sides, emission, schedules, ...(kv ? { kv } : {}) }, progress);
    return [...printed, `${out}\n`].join("");
  } finally {
    model.close();
  }
};

const loadSides = async (options: CompileOptions): Promise<Record<Role, Side>> => ({
  attention: await loadBackend(options.attention),
  ffn: await loadBackend(options.ffn),
});

const layoutOf = (backend: Backend, type: KvType): KvLayout => {
  const layout = backend.kv?.(type);
  if (!layout)
    throw new UserError(`target ${backend.name} has no KV cache, so it cannot run attention; choose another --attention`);
  return layout;
};

const kvLayout = (graph: Graph, backend: Backend): KvLayout | undefined => {
  const [first, ...rest] = graph.states.map((s) => s.type as KvType);
  if (!first) return undefined;
  const layout = layoutOf(backend, first);
  for (const type of rest) {
    const other = layoutOf(backend, type);
    if (other.pageBytes !== layout.pageBytes || other.pageTokens !== layout.pageTokens)
      throw new UserError("the layers' KV caches differ in page size; one page table cannot serve them all");
  }
  return layout;
};

const decodeRows = (options: CompileOptions): number => Math.ceil(options.maxBatch / options.microBatches);
const maxRows = (options: CompileOptions): number => Math.max(prefillRows, decodeRows(options));

/** A language model has a prefill and a decode schedule over the same kernels, weights and KV; any other graph has one. Not sealed yet. */
const makeSchedules = (
  model: Model,
  emission: Emission,
  outputs: readonly string[],
  sides: Readonly<Record<Role, Side>>,
  kv: KvLayout | undefined,
  options: CompileOptions,
): readonly Schedule[] => {
  const split = emission.kernels.ffn.length > 0;
  const types = new Map(emission.graph.weights.map((w) => [w.value.name, w.value.type]));
  const one = (name: string, index: number, rows: number, microBatches: number): Schedule =>
    schedule(emission.graph, {
      name,
      index,
      attention: { ranks: options.ranks.attention, target: sides.attention.backend.name },
      ffn: { ranks: split ? options.ranks.ffn : 0, target: sides.ffn.backend.name },
      microBatches,
      maxRows: rows,
      outputs,
      kernelOf: (op) => emission.kernelOf(op).name,
      weightBytes: (weight) => packedBytes(types.get(weight) ?? missing(weight), emission.layoutOf(weight)),
      ...(kv ? { kv: { pageBytes: kv.pageBytes, pages: model.pages } } : {}),
    });
  return model.language
    ? [one("prefill", 0, prefillRows, options.microBatches), one("decode", 1, decodeRows(options), options.microBatches)]
    : [one("main", 0, rowsOf(emission.graph), split ? options.microBatches : 1)];
};

const missing = (weight: string): never => {
  throw new Error(`the schedule asks for weight ${weight}, which the graph does not have`);
};

const kernelTexts = (emission: Emission): string[] =>
  (["attention", "ffn"] as const).flatMap((role) =>
    emission.kernels[role].map((k) => `// ${role} ${k.name}: ${k.about}\n${k.text}\n`),
  );

/** `--explain NAME` for a kernel or an op; passes explain themselves */
const explainKernel = (emission: Emission, name: string, explained: boolean): string => {
  const ops = emission.graph.ops.filter((op) => op.kind === name || op.outputs.some((v) => v.name === name));
  const kernels = (["attention", "ffn"] as const).flatMap((role) => emission.kernels[role].filter((k) => k.name === name));
  const lines = [
    ...kernels.map(
      (k) =>
        `kernel ${k.name}: ${k.about}; ${k.scratch} bytes of scratch; ${emission.graph.ops.filter((op) => emission.has(op) && emission.kernelOf(op) === k).length} ops use it\n${k.text}`,
    ),
    ...ops.map(
      (op) =>
        `${op.kind} ${op.outputs.map((v) => v.name).join(", ")} @${op.place} from ${op.origin ?? "the source"}: ${emission.has(op) ? emission.kernelOf(op).name : "an exchange"}`,
    ),
  ];
  if (lines.length === 0 && !explained)
    throw new UserError(
      `--explain ${name}: neither partition nor a kernel, an op or a value of this graph; --emit kernels lists the kernels`,
      2,
    );
  return lines.length === 0 ? "" : `${lines.join("\n")}\n`;
};
