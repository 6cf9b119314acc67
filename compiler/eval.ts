/** `step3c eval`: a graph on given inputs, by the interpreter or by a built target. */
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { bindSymbols, concrete } from "../ir/bind.ts";
import { UserError } from "../ir/error.ts";
import { evaluate, kvState } from "../ir/evaluate.ts";
import type { Graph } from "../ir/graph.ts";
import { parseGraph } from "../ir/parse.ts";
import { decode, encode } from "../ir/round.ts";
import type { Tensor } from "../ir/tensor.ts";
import type { TensorType } from "../ir/type.ts";
import { readManifest } from "./bundle.ts";
import { compile, defaultOptions } from "./compile.ts";
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

/** Writes OUT/<output>.npy for every output of the graph in its textual form; gives the names written. */
export const evalGraph = async (path: string, options: EvalOptions, progress: Progress): Promise<string> => {
  if (!existsSync(path)) throw new UserError(`${path}: no such file; give a file.step3`);
  const graph = parseGraph(readFileSync(path, "utf8"), path);
  const inputs = readInputs(graph, options.input);
  const outputs =
    options.target === "reference" ? reference(graph, inputs) : await onTarget(path, graph, inputs, options, progress);
  mkdirSync(options.out, { recursive: true });
  const names = [...outputs].map(([name, tensor]) => {
    const file = join(options.out, `${name.replaceAll("/", "_")}.npy`);
    writeNpy(`${file}.part`, tensor);
    renameSync(`${file}.part`, file);
    return file;
  });
  return `${names.join("\n")}\n`;
};

const readInputs = (graph: Graph, given: readonly string[]): Map<string, Tensor> => {
  const files = new Map<string, string>();
  for (const text of given) {
    const at = text.indexOf("=");
    if (at < 1) throw new UserError(`--input ${text}: write it as NAME=FILE.npy`, 2);
    files.set(text.slice(0, at), text.slice(at + 1));
  }
  const unknown = [...files.keys()].find((name) => !graph.inputs.some((v) => v.name === name));
  const known = graph.inputs.map((v) => v.name).join(", ");
  if (unknown !== undefined) throw new UserError(`--input ${unknown}: the graph has no such input; it has ${known}`);
  return new Map(
    graph.inputs.map((v) => {
      const file = files.get(v.name);
      if (file === undefined) throw new UserError(`input ${v.name} is not given; add --input ${v.name}=FILE.npy`);
      return [v.name, readNpy(file, (v.type as TensorType).dtype)];
    }),
  );
};

const reference = (graph: Graph, inputs: ReadonlyMap<string, Tensor>): Map<string, Tensor> =>
  evaluate(graph, inputs, undefined, new Map(graph.states.map((v) => [v.name, kvState()])));

/** Compiles the graph for the target, builds it and runs it once. */
export const onTarget = async (
  path: string,
  graph: Graph,
  inputs: ReadonlyMap<string, Tensor>,
  options: Pick<EvalOptions, "target" | "isa">,
  progress: Progress,
): Promise<Map<string, Tensor>> => {
  const symbols = bindSymbols(graph.inputs.map((v) => ({ ...v, datum: inputs.get(v.name) as Tensor })));
  const scratch = mkdtempSync(join(tmpdir(), "step3c-eval-"));
  try {
    const bundle = join(scratch, "graph.s3");
    await compile(path, { ...defaultOptions, attention: options.target, ffn: options.target, out: bundle }, progress);
    const native = await buildBundle(bundle, readManifest(bundle), progress, options.isa);
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
