/**
 * The self-test of a bundle: a case for each kernel of its programs, drawn inputs and what the interpreter makes of them. Kernels whose inputs
 * or work are too large to carry or to interpret have none; `step3c check --numbers` names them.
 */

import type { KvLayout, Layout } from "../backends/backend.ts";
import { caseFile, type KernelCase } from "../backends/kernel_cases.ts";
import { bytesOf, concrete, withDefined } from "../ir/bind.ts";
import { type DimSymbol, evalDim } from "../ir/dim.ts";
import { type Draw, drawTensor, randomNumbers } from "../ir/draw.ts";
import type { Graph, Op, Value } from "../ir/graph.ts";
import { knowledge } from "../ir/ops/index.ts";
import type { Tensor } from "../ir/tensor.ts";
import { type KvType, type TensorType, typeText } from "../ir/type.ts";
import { type Emission, type Role, roleOf } from "./emit.ts";

const mostRows = 3;
const mostBytes = 2 << 20;
const mostFlops = 2e7;

/** What to draw for operand `i` of an op, as the op's own samples have it; choices stay below what they choose from. */
const drawFor = (op: Op, i: number): Draw => {
  const types = op.inputs.map((v) => v.type);
  if (op.kind === "gather" && i === 1) return { below: (types[0] as TensorType).shape[0] as number };
  if ((op.kind === "take" || op.kind === "put") && i === 1) {
    const extent = (types[0] as TensorType).shape[Number(op.attrs.axis ?? 0)];
    return { below: typeof extent === "number" ? extent : 1 };
  }
  if (op.kind === "rotary" && i === 2) return { below: (types[1] as TensorType).shape[0] as number };
  if (op.kind.endsWith("grouped_linear") && i === op.inputs.length - 1)
    return {
      // some of them another rank's, where there are others
      below:
        Number((types.at(op.kind.startsWith("scaled") ? 2 : 1) as TensorType).shape[0]) * (op.attrs.owned === true ? 2 : 1) +
        Number(op.attrs.first ?? 0),
    };
  if (op.kind === "combine" && i === 1) return { below: Number(op.attrs.first ?? 0) + Number(op.attrs.count ?? 8) };
  const { samples, inputs } = knowledge(op.kind);
  // operands that a variant of the op adds stand between those that every variant has
  const sample = samples.find((s) => s.inputs.length === op.inputs.length) ?? samples[0];
  return inputs.length === 0 ? "normal" : (sample?.values?.[i] ?? "normal");
};

const stateOf = (op: Op): Value | undefined => op.inputs.find((v) => v.type.kind === "kv");

/** What to draw for an input of an op: what the first op of its body that reads it wants, ops with a cache before others. */
const drawOf = (op: Op, input: Value): Draw => {
  if (op.body === undefined)
    return drawFor(
      op,
      op.inputs.findIndex((v) => v.name === input.name),
    );
  const inner = op.body.inputs[op.inputs.findIndex((v) => v.name === input.name)]?.name;
  for (const part of op.body.ops.toSorted((a, b) => Number(!stateOf(a)) - Number(!stateOf(b)))) {
    const i = part.inputs.findIndex((v) => v.name === inner);
    if (i >= 0) return drawFor(part, i);
  }
  return "normal";
};

const changesState = (op: Op): boolean => op.outputs.some((v) => v.type.kind === "kv");

/** The ops of the case for one op: with a cache, the one that fills it, then one that reads it. */
const opsOf = (graph: Graph, op: Op): readonly Op[] | undefined => {
  const state = stateOf(op);
  if (state === undefined) return [op];
  if (!changesState(op)) {
    const filler = graph.ops.find((o) => o.outputs.some((v) => v.name === state.name));
    return filler && [filler, op];
  }
  const made = op.outputs.find((v) => v.type.kind === "kv");
  const reader = graph.ops.find((o) => !changesState(o) && o.inputs.some((v) => v.name === made?.name));
  return reader && [op, reader];
};

/** A small value of a symbol. */
const fewOf = ({ min, max, multiple }: DimSymbol): number => {
  const wanted = Math.max(min, Math.min(Math.max(mostRows, multiple), max));
  return Math.max(Math.floor(wanted / multiple) * multiple, Math.ceil(min / multiple) * multiple);
};

const caseOf = (emission: Emission, op: Op, kv: KvLayout | undefined): KernelCase | undefined => {
  const { graph } = emission;
  const ops = opsOf(graph, op);
  if (ops === undefined) return undefined;
  const few = graph.symbols.filter((s) => s.is === undefined).map((s) => [s.name, fewOf(s)] as const);
  const symbols = withDefined(graph.symbols, new Map(few));
  // expressions such as S-P are no sizes with all values
  const types = ops.flatMap((o) => [...o.inputs, ...o.outputs].map((v) => v.type));
  if (types.some((t) => t.kind !== "kv" && t.shape.some((d) => evalDim(d, symbols) < 0))) return undefined;
  const random = randomNumbers(1);
  const made = new Set(ops.flatMap((o) => o.outputs.map((v) => v.name)));
  const inputs = new Map<string, Tensor>();
  const given: Value[] = [];
  let bytes = 0;
  let flops = 0;
  for (const o of ops) {
    const types = o.inputs.map((v) => v.type);
    flops += knowledge(o.kind).cost(types, o.attrs, new Map([...symbols, ["context", mostRows]]), o.body).flops;
    for (const v of o.inputs) if (!made.has(v.name) && v.type.kind !== "kv") bytes += bytesOf(v.type, symbols);
    if (bytes > mostBytes || flops > mostFlops) return undefined;
    for (const v of o.inputs) {
      if (made.has(v.name) || inputs.has(v.name) || v.type.kind === "kv") continue;
      const draw = drawOf(o, v);
      const drawn = drawTensor(concrete(v.type as TensorType, symbols), draw, random);
      // rows this few all lie in their sequence's first page, so the pool need not have the others
      inputs.set(v.name, draw === "column" ? { ...drawn, data: drawn.data.map((page) => Math.min(page, 2)) } : drawn);
      given.push(v);
    }
  }
  const state = ops.map(stateOf).find((v) => v !== undefined && !made.has(v.name));
  const outputs = ops.flatMap((o) => o.outputs).filter((v) => v.type.kind !== "kv");
  const steps = ops.map((o) => {
    const layouts: Record<number, Layout> = {};
    o.inputs.forEach((v, i) => {
      const layout = emission.layoutOf(v.name);
      if (layout) layouts[i] = layout;
    });
    const kernel = emission.kernelOf(o);
    return { op: o, kernel: kernel.name, layouts, inexact: kernel.inexact };
  });
  const sub: Graph = {
    name: "case",
    symbols: graph.symbols,
    inputs: given,
    states: state ? [{ name: state.name, type: state.type as KvType }] : [],
    weights: [],
    ops,
    outputs,
  };
  const name = `${emission.kernelOf(op).name}: ${op.kind} ${op.inputs.map((v) => typeText(v.type)).join(", ")}`;
  return { name, given: { graph: sub, inputs, symbols }, kv, steps };
};

/** The file of cases for the program of one side. */
export const selftest = (emission: Emission, role: Role, kv: KvLayout | undefined): Uint8Array => {
  const cases: KernelCase[] = [];
  for (const kernel of emission.kernels[role]) {
    const op = emission.graph.ops.find((o) => emission.has(o) && roleOf(o.place) === role && emission.kernelOf(o) === kernel);
    const found = op && caseOf(emission, op, kv);
    if (found) cases.push(found);
  }
  return caseFile(cases);
};
