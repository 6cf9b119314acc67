import { readFileSync, statSync } from "node:fs";
import { UserError } from "../ir/error.ts";
import type { Graph } from "../ir/graph.ts";
import { parseGraph } from "../ir/parse.ts";
import { typeText } from "../ir/type.ts";
import { readManifest } from "./bundle.ts";
import { qualificationLines } from "./qualification.ts";

/** Says in a few lines what a bundle, or a graph in its textual form, holds. */
export const inspect = (path: string): string => {
  let directory: boolean;
  try {
    directory = statSync(path).isDirectory();
  } catch (error) {
    throw new UserError(`${path}: ${(error as Error).message}`);
  }
  return directory ? inspectBundle(path) : inspectGraph(parseGraph(readFileSync(path, "utf8"), path));
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
    ...graph.inputs.map((v) => `input ${v.name} ${typeText(v.type)}`),
    ...graph.outputs.map((v) => `output ${v.name} ${typeText(v.type)}`),
    ...[...counts].sort(([a], [b]) => (a < b ? -1 : 1)).map(([key, count]) => `${String(count).padStart(6)} ${key}`),
  ];
  return `${lines.join("\n")}\n`;
};
