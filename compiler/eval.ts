/** `step3c eval`: a graph on given inputs, by the interpreter or by a built target. */
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { bindSymbols, concrete, withDefined } from "../ir/bind.ts";
import { UserError } from "../ir/error.ts";
import { evaluate, kvState, literalWeight } from "../ir/evaluate.ts";
import type { Graph, Weight } from "../ir/graph.ts";
import { parseGraph } from "../ir/parse.ts";
import { decode, encode } from "../ir/round.ts";
import type { Tensor } from "../ir/tensor.ts";
import type { DType, TensorType } from "../ir/type.ts";
import { readManifest } from "./bundle.ts";
import { compile, defaultOptions } from "./compile.ts";
import { importFor } from "./frontends/onnx/import.ts";
import { onnxDType } from "./frontends/onnx/types.ts";
import { readOnnx } from "./frontends/onnx.ts";
import { type Model, onnxModel } from "./model.ts";
import { buildBundle } from "./native.ts";
import { readNpy, writeNpy } from "./npy.ts";
import type { Progress } from "./progress.ts";

export interface EvalOptions {
  /** `NAME=FILE.npy` of every input */
  readonly input: readonly string[];
  readonly out: string;
  /** `reference`, or the name of a target */
  readonly target: string;
  readonly isa?: string;
}

/** Writes OUT/<output>.npy for every output of an ONNX model or a graph in its textual form; gives the names written. */
export const evalGraph = async (path: string, options: EvalOptions, progress: Progress): Promise<string> => {
  if (!existsSync(path)) throw new UserError(`${path}: no such file; give a model.onnx or a file.step3`);
  const { graph, inputs, source, weight, nameOf } = path.endsWith(".onnx") ? ofOnnx(path, options) : ofText(path, options);
  const outputs =
    options.target === "reference"
      ? evaluate(graph, inputs, weight, new Map(graph.states.map((v) => [v.name, kvState()])))
      : await onTarget(source(), graph, inputs, options, progress);
  mkdirSync(options.out, { recursive: true });
  const names = [...outputs].map(([name, tensor]) => {
    const file = join(options.out, `${nameOf(name).replaceAll("/", "_")}.npy`);
    writeNpy(`${file}.part`, tensor);
    renameSync(`${file}.part`, file);
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
  const declared = graph.inputs.map((v) => ({ name: v.name, dtype: (v.type as TensorType).dtype }));
  const inputs = readInputs(declared, options.input);
  return { graph, inputs, source: () => path, weight: literalWeight, nameOf: (name) => name };
};

const ofOnnx = (path: string, options: EvalOptions): Evaluation => {
  const model = readOnnx(path);
  const fed = model.graph.inputs.filter((v) => !model.graph.initialisers.has(v.name));
  const declared = fed.map(({ name, type }) => ({ name, dtype: onnxDType(type, `${path}: input '${name}'`) }));
  const given = readInputs(declared, options.input);
  const imported = importFor(model, path, given);
  const inputs = new Map(imported.graph.inputs.map((v) => [v.name, given.get(imported.names.get(v.name) as string) as Tensor]));
  const source = (): Model => onnxModel(path, imported, defaultOptions);
  return { graph: imported.graph, inputs, source, weight: imported.weight, nameOf: (name) => imported.names.get(name) as string };
};

const readInputs = (
  declared: readonly { readonly name: string; readonly dtype: DType }[],
  given: readonly string[],
): Map<string, Tensor> => {
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
    declared.map(({ name, dtype }) => {
      const file = files.get(name);
      if (file === undefined) throw new UserError(`input ${name} is not given; add --input ${name}=FILE.npy`);
      return [name, readNpy(file, dtype)];
    }),
  );
};

/** Compiles the graph for the target, builds it and runs it once. */
export const onTarget = async (
  source: string | Model,
  graph: Graph,
  inputs: ReadonlyMap<string, Tensor>,
  options: Pick<EvalOptions, "target" | "isa">,
  progress: Progress,
): Promise<Map<string, Tensor>> => {
  const symbols = withDefined(
    graph.symbols,
    bindSymbols(graph.inputs.map((v) => ({ ...v, datum: inputs.get(v.name) as Tensor }))),
  );
  const scratch = mkdtempSync(join(tmpdir(), "step3c-eval-"));
  try {
    const bundle = join(scratch, "graph.s3");
    await compile(source, { ...defaultOptions, attention: options.target, ffn: options.target, out: bundle }, progress);
    const native = await buildBundle(bundle, readManifest(bundle), progress, options.isa, true);
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
        ...flag("--rows", String(symbols.get("T") ?? 1)),
        ...flag("--isa", options.isa),
      ],
      { encoding: "utf8" },
    );
    if (run.status === 1 || run.status === 3) throw new UserError(run.stderr.trim(), run.status);
    if (run.status !== 0) throw new Error(`step3-run --eval ended with ${run.signal ?? run.status}: ${run.stderr}`);
    return new Map(
      graph.outputs.map((v) => {
        const type = concrete(v.type as TensorType, symbols);
        const bytes = new Uint8Array(readFileSync(join(to, `${v.name}.bin`)));
        return [v.name, { kind: "tensor", dtype: type.dtype, shape: type.shape, data: decode(type.dtype, bytes) }];
      }),
    );
  } finally {
    rmSync(scratch, { recursive: true, force: true });
  }
};
