/** Deterministic data for tests and for the conformance kit: the tensors of a Sample, and the graph that runs it. */
import { type ConcreteTensor, concrete, type Symbols, tensorOf } from "./bind.ts";
import { Builder } from "./build.ts";
import type { DimSymbol } from "./dim.ts";
import type { Graph, Value } from "./graph.ts";
import type { Sample } from "./op.ts";
import { sampleUniform } from "./ops/sample.ts";
import { rounder } from "./round.ts";
import type { Tensor } from "./tensor.ts";
import { isFloat, type KvType, type TensorType, tensor } from "./type.ts";

export type Draw = NonNullable<Sample["values"]>[number];

/** Numbers in [0, 1), multiples of 2^-24, the same for a seed everywhere. */
export const randomNumbers = (seed: number): (() => number) => {
  let n = 0;
  return () => sampleUniform(seed, n++);
};

/** Mean 0, deviation 1, within +-6: twelve uniforms, whose sum needs no logarithm and so is the same everywhere. */
const normal = (random: () => number): number => {
  let sum = -6;
  for (let i = 0; i < 12; i++) sum += random();
  return sum;
};

/** A tensor of the type; `draw` says what (see Sample). Integers get small ones, bools coins, when it says nothing fit for them. */
export const drawTensor = (type: ConcreteTensor, draw: Draw, random: () => number): Tensor => {
  const data = new Float64Array(type.shape.reduce((a, b) => a * b, 1));
  const columns = type.shape.at(-1) ?? 1;
  const perRow = data.length / (type.shape[0] ?? 1);
  const round = rounder(type.dtype);
  const element = (i: number): number => {
    if (typeof draw === "object") return Math.floor(random() * draw.below);
    if (draw === "row") return Math.floor(i / perRow);
    if (draw === "column") return 1 + (i % columns);
    if (type.dtype === "bool") return random() < 0.5 ? 0 : 1;
    const scale = isFloat(type.dtype) ? 1 : 8;
    if (draw === "positive") return scale * (0.1 + 3.9 * random());
    return scale * (draw === "unit" ? random() : normal(random));
  };
  for (let i = 0; i < data.length; i++) data[i] = round(element(i));
  return tensorOf(type, data);
};

/** A graph with inputs for it: what a backend is asked, beside `evaluate`. */
export interface Case {
  readonly graph: Graph;
  readonly inputs: ReadonlyMap<string, Tensor>;
  readonly symbols: Symbols;
}

/**
 * The graph of one op on a sample's inputs `x0`, `x1` ... with outputs `y0`, `y1` ... A state that the op reads is filled by a kv_append
 * before it, one that it changes is read by an attention after it: states are neither inputs nor outputs of a graph.
 */
export const sampleCase = (kind: string, sample: Sample, seed: number): Case => {
  const values = new Map<string, number>(Object.entries(sample.symbols ?? {}));
  const symbols: DimSymbol[] = [...values].map(([name, max]) => ({ name, min: 0, max, multiple: 1, source: "host" }));
  const b = new Builder(kind, symbols);
  const random = randomNumbers(seed);
  const inputs = new Map<string, Tensor>();
  const add = (name: string, type: TensorType, draw: Draw): Value => {
    inputs.set(name, drawTensor(concrete(type, values), draw, random));
    return b.input(name, type);
  };
  const operands = sample.inputs.map((type, i) =>
    type.kind === "kv" ? b.state(`x${i}`, type) : add(`x${i}`, type, sample.values?.[i] ?? "normal"),
  );
  const state = operands.find((v) => v.type.kind === "kv");
  const names = ["y0", "y1"];
  if (sample.body !== undefined) for (const v of b.fused(operands, sample.body, names)) b.output(v);
  else if (state === undefined) for (const v of b.ops(kind, operands, sample.attrs, names)) b.output(v);
  else {
    const kv = state.type as KvType;
    const [pages, position] = operands.slice(-2) as [Value, Value];
    const rows = (position.type as TensorType).shape[0] ?? "T";
    if (kind === "kv_append") {
      const q = add("q", tensor("f32", [rows, kv.heads * kv.dim]), "normal");
      const next = b.op(kind, operands, sample.attrs);
      b.output(b.op("attention", [q, next, pages, position], { heads: kv.heads, scale: 0.125 }, ["y0"]));
    } else {
      const quantised = kv.dtype === "e4m3" || kv.dtype === "i8";
      const appended = ["k", "v"].flatMap((name) => [
        add(name, tensor(kv.dtype, [rows, kv.heads * kv.dim]), "normal"),
        ...(quantised ? [add(`${name}s`, tensor("f32", [rows, kv.heads]), "positive")] : []),
      ]);
      const filled = b.op("kv_append", [state, ...appended, pages, position]);
      b.output(
        b.op(
          kind,
          operands.map((v) => (v === state ? filled : v)),
          sample.attrs,
          ["y0"],
        ),
      );
    }
  }
  return { graph: b.build(), inputs, symbols: values };
};
