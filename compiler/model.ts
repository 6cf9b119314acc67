/** Front ends: from a path to a Graph with what the rest of the compiler needs to know of it. */
import { mkdtempSync, readFileSync, rmSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, dirname, join, resolve } from "node:path";
import type { KvLayout } from "../backends/backend.ts";
import type { ModelFacts } from "../ir/bundle.ts";
import { tokenSymbol } from "../ir/dim.ts";
import { UserError } from "../ir/error.ts";
import type { Graph } from "../ir/graph.ts";
import { parseGraph } from "../ir/parse.ts";
import { printGraph } from "../ir/print.ts";
import { encode } from "../ir/round.ts";
import type { Tensor } from "../ir/tensor.ts";
import type { DType, KvType } from "../ir/type.ts";
import { verify } from "../ir/verify.ts";
import { type Checkpoint, openCheckpoint } from "./frontends/checkpoint.ts";
import { type ImportedGraph, importOnnx } from "./frontends/onnx/import.ts";
import { readOnnx } from "./frontends/onnx.ts";
import { storedName, writeSafetensors } from "./frontends/safetensors.ts";
import { readStep3 } from "./models/step3.ts";
import { type ResumePoint, resumePoint } from "./pass.ts";

export interface Model {
  readonly graph: Graph;
  /** of the file or directory; not in the bundle, whose bytes do not depend on where the model lay */
  readonly name: string;
  readonly facts: ModelFacts;
  /** a language model has prefill and decode rounds over a KV cache; another graph is run once */
  readonly language: boolean;
  readonly maxContext: number;
  /** KV pages of one attention rank, the zero page included */
  readonly pages: number;
  /** where weights come from; without one they are drawn from a seed */
  readonly checkpoint?: Checkpoint;
  /** what stands for the weights' bytes in the source hash when they are drawn */
  readonly configuration: string;
  /** where tokenizer files may be */
  readonly directory?: string;
  close(): void;
}

interface ModelOptions {
  readonly weights: boolean;
  readonly kv: "bf16" | "fp8" | "int8";
  readonly maxBatch: number;
  readonly maxContext?: number;
  readonly dim?: ReadonlyMap<string, readonly [min: number, max: number]>;
}

/** Contexts longer than this are asked for, not assumed: KV memory grows with them. */
const defaultContext = 4096;

const kvTypes = { bf16: "bf16", fp8: "e4m3", int8: "i8" } as const;

/** Reads a Step-3 checkpoint directory, its config.json, an ONNX model, or a graph in its textual form. */
export const readModel = (path: string, options: ModelOptions, layout: (type: KvType) => KvLayout, maxRows: number): Model => {
  const entry = statSync(path, { throwIfNoEntry: false });
  if (!entry)
    throw new UserError(`${path}: no such file or directory; give a checkpoint directory, a model.onnx or a file.step3`);
  if (entry.isFile() && path.endsWith(".onnx"))
    return onnxModel(path, checked(path, importOnnx(readOnnx(path), path, { limits: options.dim ?? new Map() })), options);
  return entry.isFile() && path.endsWith(".step3") ? readGraph(path, options) : readCheckpoint(path, options, layout, maxRows);
};

/** What limits of symbols make impossible, such as a size below 0, is said of the file. */
const checked = (path: string, imported: ImportedGraph): ImportedGraph => {
  try {
    verify(imported.graph);
    return imported;
  } catch (error) {
    throw error instanceof UserError ? new UserError(`${path}: ${error.message}`, error.exitCode) : error;
  }
};

const readCheckpoint = (path: string, options: ModelOptions, layout: (type: KvType) => KvLayout, maxRows: number): Model => {
  const model = readStep3(path, { weights: options.weights });
  try {
    const { kvHeads, headDim, maxPosition } = model.config;
    const maxContext = options.maxContext ?? Math.min(maxPosition, defaultContext);
    const { pageTokens } = layout({ kind: "kv", dtype: kvTypes[options.kv], heads: kvHeads, dim: headDim });
    const maxPages = Math.ceil(maxContext / pageTokens);
    const directory = statSync(path).isFile() ? dirname(path) : path;
    return {
      graph: model.graph(maxRows, { maxContext, maxPages }),
      name: basename(resolve(directory)),
      facts: model.facts,
      language: true,
      maxContext,
      pages: 1 + options.maxBatch * maxPages,
      ...(model.checkpoint ? { checkpoint: model.checkpoint } : {}),
      configuration: JSON.stringify(model.config),
      directory,
      close: () => model.checkpoint?.close(),
    };
  } catch (error) {
    model.checkpoint?.close();
    throw error;
  }
};

/** Most rows of a graph that is run once; passes may give it some. */
export const rowsOf = (graph: Graph): number => graph.symbols.find((s) => s.name === tokenSymbol)?.max ?? 1;

/** A graph made of an ONNX model. Weights that are not in the graph's text go through a file of their own, as a checkpoint's do. */
export const onnxModel = (
  path: string,
  { graph, tensors, names }: ImportedGraph,
  options: Pick<ModelOptions, "maxBatch">,
): Model => {
  const directory = mkdtempSync(join(tmpdir(), "step3c-onnx-"));
  const remove = (): void => rmSync(directory, { recursive: true, force: true });
  try {
    const entries = [...tensors].map(([name, { type, read }]) => ({
      name,
      dtype: storedName(type.dtype),
      shape: type.shape as readonly number[],
      data: elementsOf(type.dtype, read),
    }));
    if (entries.length > 0) writeSafetensors(join(directory, "model.safetensors"), entries);
    const checkpoint = entries.length > 0 ? openCheckpoint(directory) : undefined;
    const rows = rowsOf(graph);
    const renamed = [...names].filter(([own, name]) => own !== name);
    return {
      graph,
      name: basename(path, ".onnx"),
      facts: { name: graph.name, ...(renamed.length > 0 ? { names: Object.fromEntries(renamed) } : {}) },
      language: false,
      maxContext: rows,
      pages: 1 + options.maxBatch * rows,
      ...(checkpoint ? { checkpoint } : {}),
      configuration: printGraph(graph),
      close: () => {
        checkpoint?.close();
        remove();
      },
    };
  } catch (error) {
    remove();
    throw error;
  }
};

/** The bytes of a tensor, decoded when they are asked for. */
function* elementsOf(dtype: DType, read: () => Tensor): Iterable<Uint8Array> {
  yield encode(dtype, read().data);
}

const readGraph = (path: string, options: ModelOptions): Model => {
  const text = readText(path);
  const graph = parseGraph(text, path);
  const stored = graph.weights.find((w) => w.source.kind !== "literal" && w.source.kind !== "rope");
  if (stored && options.weights)
    throw new UserError(
      `${path}: weight ${stored.value.name} is in a checkpoint, and a graph has none; write its values in the text, or compile with --no-weights`,
    );
  const rows = rowsOf(graph);
  return {
    graph,
    name: basename(path, ".step3"),
    facts: { name: graph.name },
    language: false,
    maxContext: rows,
    pages: 1 + options.maxBatch * rows,
    configuration: text,
    close: () => {},
  };
};

/** A graph that `--dump-to` wrote, and the pass after which it stands. */
export const resume = (path: string): { readonly graph: Graph; readonly point: ResumePoint } => {
  const text = readText(path);
  return { point: resumePoint(text, path), graph: parseGraph(text, path) };
};

const readText = (path: string): string => {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    throw new UserError(`${path}: ${(error as Error).message}`);
  }
};

/** Tokenizer files that a model has. */
export const tokenizerPaths = (
  model: Model,
  names: readonly string[],
): readonly { readonly name: string; readonly path: string }[] =>
  names
    .map((name) => ({ name, path: join(model.directory ?? "", name) }))
    .filter(({ path }) => model.directory !== undefined && statSync(path, { throwIfNoEntry: false })?.isFile() === true);
