/** `step3c eval`: a graph on given inputs, by the interpreter or by a built target. */
import { spawnSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type Bound, bindSymbols, checkRanges, concrete, type Symbols, unbound, withDefined } from "../ir/bind.ts";
import { type DimSymbol, dimSymbols, tokenSymbol } from "../ir/dim.ts";
import { UserError } from "../ir/error.ts";
import { evaluate, kvState, literalWeight } from "../ir/evaluate.ts";
import type { Graph, Value, Weight } from "../ir/graph.ts";
import { parseGraph } from "../ir/parse.ts";
import { decode, encode } from "../ir/round.ts";
import type { Buffer, Schedule } from "../ir/schedule.ts";
import type { Tensor } from "../ir/tensor.ts";
import { type DType, type TensorType, tensor } from "../ir/type.ts";
import { readJson, readManifest } from "./bundle.ts";
import { compile, defaultOptions } from "./compile.ts";
import { printable } from "./frontends/json.ts";
import { importFor } from "./frontends/onnx/import.ts";
import { onnxDType } from "./frontends/onnx/types.ts";
import { readOnnx } from "./frontends/onnx.ts";
import { type Model, onnxModel } from "./model.ts";
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
 * Writes OUT/<output>.npy for every output of an ONNX model, of a graph in its textual form, or of the bundle of one of these, which is built
 * once and runs at all sizes; gives the names written. Sizes come from the inputs.
 */
export const evalGraph = async (path: string, options: EvalOptions, progress: Progress): Promise<string> => {
  const entry = statSync(path, { throwIfNoEntry: false });
  if (entry === undefined)
    throw new UserError(`${path}: no such file or directory; give a model.onnx, a file.step3 or a bundle of one`);
  const outputs = await (entry.isDirectory() ? evalBundle : evalModel)(path, options, progress);
  mkdirSync(options.out, { recursive: true });
  const names = [...outputs].map(([name, tensor]) => {
    const file = join(options.out, `${name.replaceAll("/", "_")}.npy`);
    try {
      writeNpy(`${file}.part`, tensor);
      renameSync(`${file}.part`, file);
    } catch (error) {
      throw new UserError(`${path}: output '${printable(name)}': ${printable((error as Error).message, 600)}`);
    }
    return file;
  });
  return `${names.join("\n")}\n`;
};

/** What is to be evaluated. `source` is for a target; `nameOf` gives an output its name outside. */
interface Evaluation {
  readonly graph: Graph;
  readonly inputs: ReadonlyMap<string, Tensor>;
  readonly source: () => string | Model;
  readonly weight: (w: Weight) => Tensor;
  readonly nameOf: (output: string) => string;
}

const ofText = (path: string, options: EvalOptions): Evaluation => {
  const graph = parseGraph(readFileSync(path, "utf8"), path);
  const inputs = readInputs(declarations(graph.inputs), options.input);
  return { graph, inputs, source: () => path, weight: literalWeight, nameOf: (name) => name };
};

const ofOnnx = (path: string, options: EvalOptions): Evaluation => {
  const model = readOnnx(path);
  const declared = model.graph.inputs.map(({ name, type }) => ({
    name,
    dtype: onnxDType(type, `${path}: input '${name}'`),
    // an initializer of the same name is what it is when it is not given
    optional: model.graph.initialisers.has(name),
  }));
  const given = readInputs(declared, options.input);
  const imported = importFor(model, path, given);
  const nameOf = (name: string): string => imported.names.get(name) as string;
  const inputs = new Map(imported.graph.inputs.map((v) => [v.name, given.get(nameOf(v.name)) as Tensor]));
  return {
    graph: imported.graph,
    inputs,
    source: () => onnxModel(path, imported, defaultOptions),
    weight: imported.weight,
    nameOf,
  };
};

const evalModel = async (path: string, options: EvalOptions, progress: Progress): Promise<Map<string, Tensor>> => {
  const { graph, inputs, source, weight, nameOf } = path.endsWith(".onnx") ? ofOnnx(path, options) : ofText(path, options);
  const target = options.target ?? "cpp";
  const symbols = symbolsOf(graph.symbols, boundOf(graph.inputs, inputs));
  const outputs =
    target === "reference"
      ? onReference(path, graph, inputs, weight, symbols)
      : await onTarget(source(), graph, inputs, { ...options, target }, progress);
  return new Map([...outputs].map(([name, tensor]) => [nameOf(name), tensor]));
};

/** Puts the file in front of what is wrong. */
const onReference = (
  path: string,
  graph: Graph,
  inputs: ReadonlyMap<string, Tensor>,
  weight: (w: Weight) => Tensor,
  symbols: Symbols,
): Map<string, Tensor> => {
  try {
    return evaluate(graph, inputs, weight, new Map(graph.states.map((v) => [v.name, kvState()])), symbols);
  } catch (error) {
    if (!(error instanceof UserError) || error.message.startsWith(path)) throw error;
    throw new UserError(`${path}: ${error.message}`, error.exitCode);
  }
};

const evalBundle = async (bundle: string, options: EvalOptions, progress: Progress): Promise<Map<string, Tensor>> => {
  if (options.target !== undefined) throw new UserError(`--target ${options.target}: ${bundle} is compiled for its target`, 2);
  const manifest = readManifest(bundle);
  if (!manifest.schedules.includes("main"))
    throw new UserError(`${bundle}: the bundle of a language model; run it with step3c run or step3c score`);
  const program = readProgram(bundle);
  const names = new Map(Object.entries(manifest.model.names ?? {}));
  const nameOf = (name: string): string => names.get(name) ?? name;
  const declared = declarations(program.inputs).map((d) => ({ ...d, name: nameOf(d.name) }));
  const given = readInputs(declared, options.input);
  const inputs = new Map(program.inputs.map((v) => [v.name, given.get(nameOf(v.name)) as Tensor]));
  // before anything is built
  const symbols = symbolsOf(program.symbols, boundOf(program.inputs, inputs), nameOf);
  const native = await buildBundle(bundle, manifest, progress, options.isa);
  const outputs = runOnce(bundle, native, program, inputs, symbols, options.isa);
  qualify(bundle, manifest, "ran", native.shown, progress);
  return new Map([...outputs].map(([name, tensor]) => [nameOf(name), tensor]));
};

/** Compiles the graph for the target, builds it and runs it once. */
export const onTarget = async (
  source: string | Model,
  graph: Graph,
  inputs: ReadonlyMap<string, Tensor>,
  options: { readonly target: string; readonly isa?: string },
  progress: Progress,
): Promise<Map<string, Tensor>> => {
  const symbols = symbolsOf(graph.symbols, boundOf(graph.inputs, inputs));
  const scratch = mkdtempSync(join(tmpdir(), "step3c-eval-"));
  try {
    const bundle = join(scratch, "graph.s3");
    await compile(source, { ...defaultOptions, attention: options.target, ffn: options.target, out: bundle }, progress);
    const native = await buildBundle(bundle, readManifest(bundle), progress, options.isa, true);
    return runOnce(bundle, native, readProgram(bundle), inputs, symbols, options.isa);
  } finally {
    rmSync(scratch, { recursive: true, force: true });
  }
};

interface Declaration {
  readonly name: string;
  readonly dtype: DType;
  readonly optional?: boolean;
}

const declarations = (inputs: readonly Value[]): readonly Declaration[] =>
  inputs.map((v) => ({ name: v.name, dtype: v.type.dtype }));

const readInputs = (declared: readonly Declaration[], given: readonly string[]): Map<string, Tensor> => {
  const files = new Map<string, string>();
  for (const text of given) {
    const at = text.indexOf("=");
    if (at < 1) throw new UserError(`--input ${text}: write it as NAME=FILE.npy`, 2);
    files.set(text.slice(0, at), text.slice(at + 1));
  }
  const unknown = [...files.keys()].find((name) => !declared.some((v) => v.name === name));
  const known = declared.map((v) => v.name).join(", ");
  if (unknown !== undefined) throw new UserError(`--input ${unknown}: the graph has no such input; it has ${known}`);
  return new Map(
    declared.flatMap(({ name, dtype, optional }) => {
      const file = files.get(name);
      if (file === undefined && optional === true) return [];
      if (file === undefined) throw new UserError(`input ${name} is not given; add --input ${name}=FILE.npy`);
      return [[name, readNpy(file, dtype)] as const];
    }),
  );
};

const boundOf = (wanted: readonly Value[], inputs: ReadonlyMap<string, Tensor>): readonly Bound[] =>
  wanted.map((v) => ({ ...v, datum: inputs.get(v.name) as Tensor }));

/** The values of the symbols that the inputs imply, each as declared. */
const symbolsOf = (
  declared: readonly DimSymbol[],
  inputs: readonly Bound[],
  nameOf: (input: string) => string = (name) => name,
): Symbols => {
  const named = inputs.map((v) => ({ ...v, name: nameOf(v.name) }));
  const symbols = withDefined(declared, bindSymbols(named));
  checkRanges(declared, named, symbols);
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
  given: Symbols,
  isa: string | undefined,
): Map<string, Tensor> => {
  // passes define symbols too
  const symbols = withDefined(program.symbols, given);
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
