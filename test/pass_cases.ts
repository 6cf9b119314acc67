/** Graphs, weights and inputs for the tests of the passes. */
import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Checkpoint } from "../compiler/frontends/checkpoint.ts";
import { readStep3 } from "../compiler/models/step3.ts";
import { readWeight } from "../compiler/weights.ts";
import {
  concrete,
  type Datum,
  drawTensor,
  encode,
  evaluate,
  type Graph,
  kvState,
  type Op,
  randomNumbers,
  type Tensor,
  type Value,
  type Weight,
  type WeightSource,
} from "../ir/index.ts";
import { type CheckpointOptions, writeStep3Checkpoint } from "./checkpoint.ts";

/** A graph with the values of its weights, which any graph that passes make of it takes too. */
export interface Model {
  readonly graph: Graph;
  readonly weights: (w: Weight) => Tensor;
}

/** Each weight's tensor is read once. */
const remembered = (checkpoint: Checkpoint | undefined): ((w: Weight) => Tensor) => {
  const known = new Map<string, Tensor>();
  return (w) => {
    const key = JSON.stringify([w.value.type, w.source]);
    const tensor = known.get(key) ?? readWeight(checkpoint, w);
    known.set(key, tensor);
    return tensor;
  };
};

/** A small Step-3 model with columns enough to divide in blocks of 128. */
export const step3Model = (options: CheckpointOptions = {}): Model => {
  const directory = mkdtempSync(join(tmpdir(), "step3c-passes-"));
  const sizes = {
    hidden: 136,
    headDim: 16,
    layers: 2,
    intermediate: 300,
    moeIntermediate: 136,
    shared: 132,
    experts: 4,
    vocabulary: 40,
  };
  writeStep3Checkpoint(directory, { ...options, sizes: { ...sizes, ...options.sizes } });
  const model = readStep3(directory, { weights: true });
  return { graph: model.graph(8, { maxContext: 32, maxPages: 4 }), weights: remembered(model.checkpoint) };
};

const innermost = (source: WeightSource): WeightSource =>
  "of" in source && source.kind !== "stacked" ? innermost(source.of) : source;

/** Weights named by `tensor` sources, drawn from a seed; their shapes are those of the graph before any pass. */
export const drawnWeights = (graph: Graph, seed: number): ((w: Weight) => Tensor) => {
  const random = randomNumbers(seed);
  const tensors = new Map<string, { readonly shape: readonly number[]; readonly bytes: Uint8Array }>();
  const matrices = graph.weights.flatMap(({ value, source }): Weight[] =>
    source.kind === "stacked"
      ? source.of.map((of) => ({ value: { ...value, type: { ...value.type, shape: value.type.shape.slice(1) } }, source: of }))
      : [{ value, source }],
  );
  for (const weight of matrices) {
    const source = innermost(weight.source);
    if (
      "of" in source ||
      source.kind === "rope" ||
      source.kind === "literal" ||
      (weight.source.kind === "scales" && tensors.has(source.tensor))
    )
      continue;
    const shape = source.slice?.map(([, to]) => to) ?? concrete(weight.value.type, new Map()).shape;
    const scale = 1 / Math.sqrt(shape.at(-1) ?? 1);
    const put = (name: string, shape: readonly number[], factor: number): void => {
      const { data } = drawTensor({ kind: "tensor", dtype: "f32", shape }, "normal", random);
      tensors.set(name, {
        shape,
        bytes: encode(
          "f32",
          data.map((x) => x * factor),
        ),
      });
    };
    put(source.tensor, shape, scale);
    if (source.kind === "dequantised")
      put(
        source.scales,
        shape.map((d, i) => Math.ceil(d / (source.block[i - shape.length + 2] ?? 1))),
        1,
      );
  }
  const checkpoint = {
    tensors: new Map([...tensors].map(([name, { shape }]) => [name, { name, dtype: "F32", shape }])),
    read: (tensor: { readonly name: string }) => tensors.get(tensor.name)?.bytes,
  } as unknown as Checkpoint;
  return remembered(checkpoint);
};

/** Inputs of a graph of rows: token ids of one sequence for a language model, drawn numbers for anything else. */
export const drawnInputs = (graph: Graph, rows: number, seed: number): ReadonlyMap<string, Tensor> => {
  const random = randomNumbers(seed);
  const symbols = new Map(graph.symbols.map((s) => [s.name, rows]));
  return new Map(
    graph.inputs.map((v) => {
      if (v.type.kind !== "tensor") throw new Error(`input '${v.name}' is no tensor`);
      const type = concrete(v.type, symbols);
      const integer = /^[iu]/.test(type.dtype);
      const draw =
        v.name === "position"
          ? "row"
          : v.name === "pages"
            ? "column"
            : v.name === "temperature"
              ? { below: 1 }
              : v.name === "top_p"
                ? "unit"
                : integer
                  ? { below: 4 }
                  : "normal";
      return [v.name, drawTensor(type, draw, random)] as const;
    }),
  );
};

/** Outputs by name. */
export const run = (
  graph: Graph,
  weights: (w: Weight) => Tensor,
  inputs: ReadonlyMap<string, Tensor>,
  observe?: (op: Op, results: readonly Datum[]) => void,
): Map<string, Tensor> => {
  const states = new Map(graph.states.map((s) => [s.name, kvState(8)]));
  return evaluate(graph, inputs, weights, states, new Map(), observe);
};

/** Root of the mean square difference over that of the reference. */
export const relativeError = (got: Tensor, reference: Tensor): number => {
  let [difference, size] = [0, 0];
  got.data.forEach((x, i) => {
    const r = reference.data[i] as number;
    difference += (x - r) ** 2;
    size += r ** 2;
  });
  return Math.sqrt(difference / (size || 1));
};

/** The same graph with other names of values and weights, in another order in which values are made before they are used. */
export const disguised = (graph: Graph, seed: number): Graph => {
  const random = randomNumbers(seed);
  const interface_ = new Set([...graph.inputs, ...graph.states, ...graph.outputs].map((v) => v.name));
  const names = new Map<string, Value>();
  const rename = (v: Value): Value => {
    const known = names.get(v.name) ?? {
      ...v,
      name: interface_.has(v.name) ? v.name : `v${names.size}_${Math.floor(random() * 1e6)}`,
    };
    names.set(v.name, known);
    return known;
  };
  const weights = graph.weights.map((w) => ({ ...w, value: rename(w.value) as Weight["value"] }));
  const left = new Set(graph.ops);
  const made = new Set([...graph.inputs, ...graph.states, ...graph.weights.map((w) => w.value)].map((v) => v.name));
  /** states must not be read by an op after they were changed */
  const readers = (op: Op): boolean => {
    const changed = op.kind === "kv_append" ? op.inputs[0]?.name : undefined;
    return [...left].every((o) => o === op || !o.inputs.some((v) => v.name === changed));
  };
  const ops: Op[] = [];
  while (left.size > 0) {
    const ready = [...left].filter((op) => op.inputs.every((v) => made.has(v.name)) && readers(op));
    const op = ready[Math.floor(random() * ready.length)] as Op;
    left.delete(op);
    for (const v of op.outputs) made.add(v.name);
    const { origin: _, ...rest } = op;
    ops.push({ ...rest, inputs: op.inputs.map(rename), outputs: op.outputs.map(rename) });
  }
  return { ...graph, weights: weights.sort(() => random() - 0.5), ops, outputs: graph.outputs.map(rename) };
};
