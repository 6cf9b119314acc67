import { readFileSync, statSync } from "node:fs";
import { UserError } from "../ir/error.ts";
import type { Graph } from "../ir/graph.ts";
import { parseGraph } from "../ir/parse.ts";
import { typeText } from "../ir/type.ts";
import { readManifest } from "./bundle.ts";
import { printable } from "./frontends/json.ts";
import { type OnnxGraph, type OnnxModel, type OnnxType, readOnnx } from "./frontends/onnx.ts";
import { qualificationLines } from "./qualification.ts";

/** Says in a few lines what a bundle, a graph in its textual form, or an ONNX model holds. */
export const inspect = (path: string): string => {
  let directory: boolean;
  try {
    directory = statSync(path).isDirectory();
  } catch (error) {
    throw new UserError(`${path}: ${(error as Error).message}`);
  }
  if (directory) return inspectBundle(path);
  return path.endsWith(".onnx") ? inspectOnnx(readOnnx(path)) : inspectGraph(parseGraph(readFileSync(path, "utf8"), path));
};

const mib = (bytes: number): string => `${(bytes / 2 ** 20).toFixed(1).padStart(10)}`;

const inspectBundle = (bundle: string): string => {
  const m = readManifest(bundle);
  const lines = [
    `${m.model.name}: ${m.attention}A${m.ffn}F, split ${m.split}, ${m.microBatches} micro-batches, weights ${m.precision.weights}, KV ${m.precision.kv}`,
    `up to ${m.maxBatch} sequences of ${m.maxContext} tokens on each attention rank; schedules: ${m.schedules.join(", ")}`,
    `source ${m.source.slice(0, 16)}  wire ${m.wire.slice(0, 16)}  made by step3c ${m.step3c}`,
    ...m.programs.map((p) => `${p.role} on ${p.target}: ${p.kernels.length} kernels`),
    ...m.programs.flatMap((p) => p.kernels.map((k) => `  ${p.role} ${k.name}: ${k.about}`)),
    `MiB by rank:${["weights", "kv", "exchange", "scratch", "io", "total"].map((name) => name.padStart(11)).join("")}`,
    ...m.memory.map(
      (r) => `  ${r.rank.padEnd(9)}${[r.weights, r.kv, r.exchange, r.scratch, r.io, r.total].map((b) => ` ${mib(b)}`).join("")}`,
    ),
    ...qualificationLines(bundle),
  ];
  return `${lines.join("\n")}\n`;
};

const inspectGraph = (graph: Graph): string => {
  const counts = new Map<string, number>();
  for (const op of graph.ops) {
    const key = `${op.place ?? "unplaced"} ${op.kind}`;
    counts.set(key, (counts.get(key) ?? 0) + 1);
  }
  const lines = [
    `graph ${graph.name}: ${graph.ops.length} ops, ${graph.weights.length} weights, ${graph.states.length} states`,
    ...graph.symbols.map((s) => `symbol ${s.name} ${s.min}..${s.max}${s.multiple === 1 ? "" : ` multiple ${s.multiple}`}`),
    ...graph.inputs.map((v) => `input ${v.name} ${typeText(v.type)}`),
    ...graph.outputs.map((v) => `output ${v.name} ${typeText(v.type)}`),
    ...[...counts].sort(([a], [b]) => (a < b ? -1 : 1)).map(([key, count]) => `${String(count).padStart(6)} ${key}`),
  ];
  return `${lines.join("\n")}\n`;
};

const onnxType = ({ kind, dtype, shape }: OnnxType): string => {
  const dims = shape === undefined ? "[...]" : `[${shape.map((d) => d ?? "?").join(",")}]`;
  return `${kind === "tensor" ? "" : kind}${dtype === undefined ? "" : `${kind === "tensor" ? "" : " "}${dtype}${dims}`}`;
};

/** A graph and those within its nodes. */
const graphsOf = (graph: OnnxGraph): readonly OnnxGraph[] => [
  graph,
  ...graph.nodes.flatMap((n) => [...n.attributes.values()].flatMap((a) => (a.kind === "graph" ? graphsOf(a.value) : []))),
];

const inspectOnnx = (model: OnnxModel): string => {
  const graphs = graphsOf(model.graph);
  const nodes = graphs.flatMap((g) => g.nodes);
  const weights = graphs.flatMap((g) => [...g.initialisers.values()]);
  const counts = new Map<string, number>();
  for (const { op, domain } of nodes) {
    const key = domain === "" ? op : `${domain}.${op}`;
    counts.set(key, (counts.get(key) ?? 0) + 1);
  }
  const named = nodes.filter((n) => n.metadata.size > 0).length;
  const fed = model.graph.inputs.filter((v) => !model.graph.initialisers.has(v.name));
  const lines = [
    `onnx ${model.graph.name}: IR ${model.ir}, ${[...model.opsets].map(([domain, v]) => `${domain === "" ? "opset" : domain} ${v}`).join(", ")}${model.producer === "" ? "" : `, made by ${model.producer}`}`,
    `${nodes.length} nodes${graphs.length > 1 ? ` in ${graphs.length} graphs` : ""}, ${named} with metadata; ${weights.length} initializers of ${mib(weights.reduce((n, w) => n + w.size, 0)).trim()} MiB; ${model.functions.size} functions`,
    ...fed.map((v) => `input ${v.name} ${onnxType(v.type)}`),
    ...model.graph.outputs.map((v) => `output ${v.name} ${onnxType(v.type)}`),
    ...[...counts].sort(([a], [b]) => (a < b ? -1 : 1)).map(([key, count]) => `${String(count).padStart(6)} ${key}`),
    ...model.unread.map((place) => `not read: ${place}`),
  ];
  return `${lines.map((line) => printable(line)).join("\n")}\n`;
};
