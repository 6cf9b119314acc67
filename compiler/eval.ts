/** `step3c eval`: a graph on given inputs, by the interpreter or by a built target. */
import { spawnSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type Bound, bindSymbols, checkRanges, concrete, type Symbols, unbound } from "../ir/bind.ts";
import { type DimSymbol, dimSymbols, tokenSymbol } from "../ir/dim.ts";
import { UserError } from "../ir/error.ts";
import { evaluate, kvState } from "../ir/evaluate.ts";
import type { Graph, Value } from "../ir/graph.ts";
import { parseGraph } from "../ir/parse.ts";
import { decode, encode } from "../ir/round.ts";
import type { Buffer, Schedule } from "../ir/schedule.ts";
import type { Tensor } from "../ir/tensor.ts";
import { type TensorType, tensor } from "../ir/type.ts";
import { readJson, readManifest } from "./bundle.ts";
import { compile, defaultOptions } from "./compile.ts";
import { buildBundle, type NativeBuild } from "./native.ts";
import { readNpy, writeNpy } from "./npy.ts";
import type { Progress } from "./progress.ts";
import { qualify } from "./qualification.ts";

export interface EvalOptions {
  /** `NAME=FILE.npy` of every input */
  readonly input: readonly string[];
  readonly out: string;
  /** `reference`, or the name of a target; of a bundle, which has its target, nothing */
  readonly target?: string;
  readonly isa?: string;
}

/**
 * Writes OUT/<output>.npy for every output of a graph in its textual form, or of the bundle of one, which is built once and runs at all sizes;
 * gives the names written. Sizes come from the inputs.
 */
export const evalGraph = async (path: string, options: EvalOptions, progress: Progress): Promise<string> => {
  const entry = statSync(path, { throwIfNoEntry: false });
  if (entry === undefined) throw new UserError(`${path}: no such file or directory; give a file.step3 or a bundle of one`);
  const outputs = await (entry.isDirectory() ? evalBundle : evalText)(path, options, progress);
  mkdirSync(options.out, { recursive: true });
  const names = [...outputs].map(([name, tensor]) => {
    const file = join(options.out, `${name.replaceAll("/", "_")}.npy`);
    writeNpy(`${file}.part`, tensor);
    renameSync(`${file}.part`, file);
    return file;
  });
  return `${names.join("\n")}\n`;
};

const evalText = async (path: string, options: EvalOptions, progress: Progress): Promise<Map<string, Tensor>> => {
  const graph = parseGraph(readFileSync(path, "utf8"), path);
  const inputs = readInputs(graph.inputs, options.input);
  const target = options.target ?? "cpp";
  if (target !== "reference") return onTarget(path, graph, inputs, { ...options, target }, progress);
  const symbols = symbolsOf(graph.symbols, boundOf(graph.inputs, inputs));
  return evaluate(graph, inputs, undefined, new Map(graph.states.map((v) => [v.name, kvState()])), symbols);
};

const evalBundle = async (bundle: string, options: EvalOptions, progress: Progress): Promise<Map<string, Tensor>> => {
  if (options.target !== undefined) throw new UserError(`--target ${options.target}: ${bundle} is compiled for its target`, 2);
  const manifest = readManifest(bundle);
  if (!manifest.schedules.includes("main"))
    throw new UserError(`${bundle}: the bundle of a language model; run it with step3c run or step3c score`);
  const program = readProgram(bundle);
  const inputs = readInputs(program.inputs, options.input);
  // before anything is built
  const symbols = symbolsOf(program.symbols, boundOf(program.inputs, inputs));
  const native = await buildBundle(bundle, manifest, progress, options.isa);
  const outputs = runOnce(bundle, native, program, inputs, symbols, options.isa);
  qualify(bundle, manifest, "ran", native.shown, progress);
  return outputs;
};

/** Compiles the graph for the target, builds it and runs it once. */
export const onTarget = async (
  path: string,
  graph: Graph,
  inputs: ReadonlyMap<string, Tensor>,
  options: { readonly target: string; readonly isa?: string },
  progress: Progress,
): Promise<Map<string, Tensor>> => {
  const symbols = symbolsOf(graph.symbols, boundOf(graph.inputs, inputs));
  const scratch = mkdtempSync(join(tmpdir(), "step3c-eval-"));
  try {
    const bundle = join(scratch, "graph.s3");
    await compile(path, { ...defaultOptions, attention: options.target, ffn: options.target, out: bundle }, progress);
    const native = await buildBundle(bundle, readManifest(bundle), progress, options.isa);
    return runOnce(bundle, native, readProgram(bundle), inputs, symbols, options.isa);
  } finally {
    rmSync(scratch, { recursive: true, force: true });
  }
};

const readInputs = (wanted: readonly Value[], given: readonly string[]): Map<string, Tensor> => {
  const files = new Map<string, string>();
  for (const text of given) {
    const at = text.indexOf("=");
    if (at < 1) throw new UserError(`--input ${text}: write it as NAME=FILE.npy`, 2);
    files.set(text.slice(0, at), text.slice(at + 1));
  }
  const unknown = [...files.keys()].find((name) => !wanted.some((v) => v.name === name));
  const known = wanted.map((v) => v.name).join(", ");
  if (unknown !== undefined) throw new UserError(`--input ${unknown}: the graph has no such input; it has ${known}`);
  return new Map(
    wanted.map((v) => {
      const file = files.get(v.name);
      if (file === undefined) throw new UserError(`input ${v.name} is not given; add --input ${v.name}=FILE.npy`);
      return [v.name, readNpy(file, (v.type as TensorType).dtype)];
    }),
  );
};

const boundOf = (wanted: readonly Value[], inputs: ReadonlyMap<string, Tensor>): readonly Bound[] =>
  wanted.map((v) => ({ ...v, datum: inputs.get(v.name) as Tensor }));

/** The values of the symbols that the inputs imply, each as declared. */
const symbolsOf = (declared: readonly DimSymbol[], inputs: readonly Bound[]): Symbols => {
  const symbols = bindSymbols(inputs);
  checkRanges(declared, inputs, symbols);
  return symbols;
};

/** What the program of a bundle takes and gives. */
interface Program {
  readonly symbols: readonly DimSymbol[];
  readonly inputs: readonly Value[];
  readonly outputs: readonly Value[];
  /** symbols that sizes of its values depend on */
  readonly used: ReadonlySet<string>;
}

const readProgram = (bundle: string): Program => {
  const { symbols, programs } = readJson(join(bundle, "schedule-main.json")) as Schedule;
  const buffers = programs[0]?.buffers ?? [];
  const values = (region: Buffer["region"]): readonly Value[] =>
    buffers.flatMap((b) =>
      b.region === region && b.slot === 0 && b.binds !== undefined ? [{ name: b.binds, type: tensor(b.dtype, b.shape) }] : [],
    );
  const used = new Set(buffers.flatMap((b) => b.shape.flatMap(dimSymbols)));
  return { symbols, inputs: values("input"), outputs: values("output"), used };
};

/** One round of a built bundle; outputs by name. */
const runOnce = (
  bundle: string,
  native: NativeBuild,
  program: Program,
  inputs: ReadonlyMap<string, Tensor>,
  symbols: Symbols,
  isa: string | undefined,
): Map<string, Tensor> => {
  const loose = program.symbols.filter((s) => !symbols.has(s.name));
  const missing = loose.filter((s) => program.used.has(s.name)).map((s) => s.name);
  if (missing.length > 0) unbound(missing, boundOf(program.inputs, inputs));
  const values = new Map<string, number>([...symbols, ...loose.map((s) => [s.name, s.max] as const)]);
  const others = program.symbols.filter((s) => s.name !== tokenSymbol).map((s) => `${s.name}=${values.get(s.name)}`);
  const scratch = mkdtempSync(join(tmpdir(), "step3c-eval-"));
  try {
    const [from, to] = [join(scratch, "inputs"), join(scratch, "outputs")];
    mkdirSync(from);
    mkdirSync(to);
    for (const [name, { dtype, data }] of inputs) writeFileSync(join(from, `${name}.bin`), encode(dtype, data));
    const flag = (name: string, value: string | undefined): string[] => (value === undefined ? [] : [name, value]);
    const run = spawnSync(
      native.runner,
      [
        "--eval",
        ...flag("--bundle", bundle),
        ...flag("--program-attention", native.attention),
        ...flag("--program-ffn", native.ffn),
        ...flag("--inputs", from),
        ...flag("--outputs", to),
        ...flag("--rows", String(values.get(tokenSymbol) ?? 1)),
        ...flag("--symbols", others.length === 0 ? undefined : others.join(",")),
        ...flag("--isa", isa),
      ],
      { encoding: "utf8" },
    );
    if (run.status === 1 || run.status === 3) throw new UserError(run.stderr.trim(), run.status);
    if (run.status !== 0) throw new Error(`step3-run --eval ended with ${run.signal ?? run.status}: ${run.stderr}`);
    return new Map(
      program.outputs.map((v) => {
        const type = concrete(v.type as TensorType, values);
        const bytes = new Uint8Array(readFileSync(join(to, `${v.name}.bin`)));
        return [v.name, { kind: "tensor", dtype: type.dtype, shape: type.shape, data: decode(type.dtype, bytes) }];
      }),
    );
  } finally {
    rmSync(scratch, { recursive: true, force: true });
  }
};
