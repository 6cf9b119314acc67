/**
 * The precision policies. `fp8`: every linear but those marked `keep` (router, head) and those whose results choose takes e4m3 weights with a scale for each 128x128
 * block and an input quantised per row and 128 columns; codes and scales that a checkpoint stores in the same blocks pass through.
 * `int8`: a scale for each row of a weight, and one for each row of an input. KV `fp8`, `int8`: a scale for each token and head.
 * An input is quantised once, whatever number of linears take it.
 */
import { rewrite } from "../../ir/build.ts";
import { UserError } from "../../ir/error.ts";
import type { Graph, StoredSource, Value, Weight, WeightSource } from "../../ir/graph.ts";
import { knowledge } from "../../ir/ops/index.ts";
import { isFloat, type KvType, type TensorType, tensor } from "../../ir/type.ts";
import type { Pass } from "../pass.ts";
import { numbers } from "../weights/plan.ts";
import { quantisedValues } from "../weights/values.ts";
import { contraction } from "./contraction.ts";
import { withoutDead } from "./dead.ts";
import { flowOf, freshNames } from "./flow.ts";

export type Precision = "bf16" | "fp8" | "int8";

export interface QuantiseOptions {
  readonly weights: Precision;
  readonly kv: Precision;
}

const codesOf: Readonly<Record<"fp8" | "int8", "e4m3" | "i8">> = { fp8: "e4m3", int8: "i8" };

/** Rows and columns of a weight with `columns` columns that share a scale. */
const blockOf = (policy: "fp8" | "int8", columns: number): readonly [number, number] =>
  policy === "fp8" ? [128, 128] : [1, columns];

interface Quantised<S> {
  readonly codes: S;
  readonly scales: S;
}

/** Where the codes and scales of a quantised weight come from: the checkpoint's own when its blocks are these. */
const quantised = (
  { value: { name, type }, source }: Weight,
  to: "e4m3" | "i8",
  block: readonly [number, number],
): Quantised<WeightSource> => {
  if (source.kind === "literal") {
    if (!source.values.every(Number.isFinite))
      throw new UserError(`weight ${name} has a value that is not finite, and is to be quantised; use --precision bf16`);
    const { codes, scales } = quantisedValues({ shape: numbers(type), data: Float64Array.from(source.values) }, to, block);
    return { codes: { kind: "literal", values: [...codes.data] }, scales: { kind: "literal", values: [...scales.data] } };
  }
  if (source.kind !== "stacked") return quantisedMatrix(source, to, block);
  const each = source.of.map((of) => quantisedMatrix(of, to, block));
  return {
    codes: { kind: "stacked", of: each.map((q) => q.codes) },
    scales: { kind: "stacked", of: each.map((q) => q.scales) },
  };
};

const quantisedMatrix = (source: WeightSource, to: "e4m3" | "i8", block: readonly [number, number]): Quantised<StoredSource> => {
  if (source.kind === "dequantised" && to === "e4m3" && source.slice === undefined && String(source.block) === String(block))
    return { codes: { kind: "tensor", tensor: source.tensor }, scales: { kind: "tensor", tensor: source.scales } };
  return { codes: { kind: "codes", of: source, to, block }, scales: { kind: "scales", of: source, to, block } };
};

/** The graph with another dtype in its states; the ops that fill them do not fit yet. */
const withStates = (g: Graph, dtype: "e4m3" | "i8"): Graph => {
  const now = new Map<Value, Value>();
  const retype = (v: Value): Value => {
    if (v.type.kind !== "kv" || v.type.dtype === "e4m3" || v.type.dtype === "i8") return v;
    const known = now.get(v) ?? { name: v.name, type: { ...v.type, dtype } };
    now.set(v, known);
    return known;
  };
  return {
    ...g,
    states: g.states.map(retype),
    ops: g.ops.map((op) =>
      [...op.inputs, ...op.outputs].some((v) => v.type.kind === "kv")
        ? { ...op, inputs: op.inputs.map(retype), outputs: op.outputs.map(retype) }
        : op,
    ),
    outputs: g.outputs.map(retype),
  };
};

/** Contractions whose results, alone or through elements and softmax, are put in order: an error there chooses something else. */
const choosersOf = (g: Graph): ReadonlySet<string> => {
  const { producer } = flowOf(g);
  const found = new Set<string>();
  const seen = new Set<string>();
  const mark = (v: Value): void => {
    const op = producer.get(v.name);
    if (op === undefined || seen.has(v.name)) return;
    seen.add(v.name);
    if (contraction(op) !== undefined) found.add(v.name);
    else if (knowledge(op.kind).scalar !== undefined || op.kind === "softmax" || op.kind === "reshape") op.inputs.forEach(mark);
  };
  for (const op of g.ops) if (op.kind === "topk" || op.kind === "sort") mark(op.inputs[0] as Value);
  return found;
};

export const quantise = (options: QuantiseOptions): Pass => ({
  name: "quantise",
  after: ["fold"],
  run(g, context) {
    const { weights: policy, kv } = options;
    if (policy === "bf16" && kv === "bf16") return g;
    const fresh = freshNames(g);
    const weights = new Map(g.weights.map((w) => [w.value.name, w]));
    const inputs = new Map<string, readonly Value[]>();
    const stored = new Map<string, readonly Value[]>();
    const choosers = choosersOf(g);
    const cached = kv !== "bf16" && g.states.length > 0 && context.apply();

    const result = rewrite(cached ? withStates(g, codesOf[kv]) : g, (op, b) => {
      /** Codes and scales of an activation; equal requests share one op. */
      const codes = (x: Value, to: "e4m3" | "i8", group: number): readonly Value[] => {
        const key = `${to} ${group} ${x.name}`;
        const known = inputs.get(key);
        if (known) return known;
        const attrs = group === 0 ? { to } : { to, group };
        const made = b.ops("quantise", [x], attrs, [fresh(`${x.name}_codes`), fresh(`${x.name}_scales`)]);
        inputs.set(key, made);
        return made;
      };

      if (op.kind === "kv_append" && cached && op.inputs.length === 5) {
        const [state, k, v, pages, position] = op.inputs as readonly [Value, Value, Value, Value, Value];
        const { dim } = state.type as KvType;
        const to = codesOf[kv];
        return b.ops("kv_append", [state, ...codes(k, to, dim), ...codes(v, to, dim), pages, position], op.attrs);
      }

      const c = contraction(op);
      const weight = c === undefined ? undefined : weights.get(c.w.name);
      if (c === undefined || weight === undefined || policy === "bf16") return undefined;
      if (choosers.has((op.outputs[0] as Value).name)) return undefined;
      if (op.attrs.keep === true || c.ws !== undefined || !isFloat(weight.value.type.dtype) || !context.apply()) return undefined;
      const shape = weight.value.type.shape as readonly number[];
      const [rows, columns] = shape.slice(-2) as [number, number];
      const block = blockOf(policy, columns);
      const to = codesOf[policy];
      let [w, ws] = stored.get(c.w.name) ?? [];
      if (w === undefined || ws === undefined) {
        const sources = quantised(weight, to, block);
        const scales = [...shape.slice(0, -2), Math.ceil(rows / block[0]), Math.ceil(columns / block[1])];
        w = b.weight(fresh(`${c.w.name}_codes`), tensor(to, shape), sources.codes);
        ws = b.weight(fresh(`${c.w.name}_scales`), tensor("f32", scales), sources.scales);
        stored.set(c.w.name, [w, ws]);
      }
      const x = codes(c.x, to, policy === "fp8" ? 128 : 0);
      const first = op.attrs.first === undefined ? {} : { first: op.attrs.first };
      const attrs = { to: ((op.outputs[0] as Value).type as TensorType).dtype, block, ...first };
      return c.ids === undefined
        ? b.ops("scaled_linear", [...x, w, ws], attrs)
        : b.ops("scaled_grouped_linear", [...x, w, ws, c.ids], attrs);
    });
    return withoutDead(result);
  },
});
