/**
 * Computes what is known, drops what changes nothing, and computes equal things once. Every rule keeps every bit of every result:
 * x + 0 stays, because -0 + 0 is +0; x * 1 goes. Functions whose last bit depends on the machine's library (exp, sin ...) are not folded,
 * so that a bundle is the same wherever it is made.
 */
import type { Attrs } from "../../ir/attr.ts";
import { concrete } from "../../ir/bind.ts";
import { rewrite } from "../../ir/build.ts";
import type { Graph, Op, Value } from "../../ir/graph.ts";
import { knowledge } from "../../ir/ops/index.ts";
import type { Tensor } from "../../ir/tensor.ts";
import { type DType, sameType, type TensorType } from "../../ir/type.ts";
import type { Pass } from "../pass.ts";
import { withoutDead } from "./dead.ts";
import { freshNames } from "./flow.ts";

/** For each dtype, those that hold all its values. */
const wider: Readonly<Partial<Record<DType, readonly DType[]>>> = {
  bool: ["u8", "u16", "u32", "u64", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64", "e4m3", "e5m2"],
  u8: ["u16", "u32", "u64", "i16", "i32", "i64", "f16", "bf16", "f32", "f64"],
  i8: ["i16", "i32", "i64", "f16", "bf16", "f32", "f64"],
  u16: ["u32", "u64", "i32", "i64", "f32", "f64"],
  i16: ["i32", "i64", "f32", "f64"],
  u32: ["u64", "i64", "f64"],
  i32: ["i64", "f64"],
  e4m3: ["f16", "bf16", "f32", "f64"],
  e5m2: ["f16", "bf16", "f32", "f64"],
  f16: ["f32", "f64"],
  bf16: ["f32", "f64"],
  f32: ["f64"],
};

/** True when every value of `from` is a value of `to`: such a cast loses nothing. */
export const holds = (to: DType, from: DType): boolean => to === from || (wider[from]?.includes(to) ?? false);

const dtypeOf = (v: Value): DType => (v.type as TensorType).dtype;

/** The ops that made the values of the graph as it is by now. */
type Made = ReadonlyMap<string, Op>;

const constantValue = (made: Made, v: Value | undefined): number | undefined => {
  const op = v === undefined ? undefined : made.get(v.name);
  return op?.kind === "const" ? (op.attrs.value as number) : undefined;
};

/** The operand that an op's result equals bit for bit, whatever its value is. */
const same = (op: Op, made: Made): Value | undefined => {
  const [x, y, z] = op.inputs;
  const right = constantValue(made, y);
  const inner = x === undefined ? undefined : made.get(x.name);
  switch (op.kind) {
    case "cast": {
      if (x === undefined) return undefined;
      if (dtypeOf(x) === op.attrs.to) return x;
      // there and back
      const original = inner?.kind === "cast" ? inner.inputs[0] : undefined;
      return original !== undefined && dtypeOf(original) === op.attrs.to && holds(dtypeOf(x), dtypeOf(original))
        ? original
        : undefined;
    }
    case "mul":
      return right === 1 ? x : constantValue(made, x) === 1 ? y : undefined;
    case "div":
    case "pow":
      return right === 1 ? x : undefined;
    case "sub":
      return right !== undefined && Object.is(right, 0) ? x : undefined;
    case "add":
      return Object.is(right, -0) ? x : Object.is(constantValue(made, x), -0) ? y : undefined;
    case "neg":
    case "not":
      return inner?.kind === op.kind ? inner.inputs[0] : undefined;
    case "abs":
    case "floor":
    case "ceil":
    case "nearest":
      return inner?.kind === op.kind ? x : undefined;
    case "maximum":
    case "minimum":
    case "and":
    case "or":
      return x === y ? x : undefined;
    case "where": {
      const condition = constantValue(made, x);
      return y === z ? y : condition === undefined ? undefined : condition !== 0 ? y : z;
    }
    case "reduce":
      return op.attrs.group === 1 && op.attrs.fn !== "amax" ? x : undefined;
    case "spread":
      return op.attrs.group === 1 ? x : undefined;
    default:
      return undefined;
  }
};

/** Ops whose results are the same on every machine. */
const exact: ReadonlySet<string> = new Set(
  "add sub mul div maximum minimum neg abs sqrt reciprocal floor ceil nearest less less_equal equal and or not where cast reduce spread".split(
    " ",
  ),
);

/** Elements of the largest weight that folding writes out in the graph. */
const literalLimit = 4096;

/** Numbers that a graph's text holds exactly. */
const printable = (t: Tensor): boolean => {
  const wide = t.dtype === "i64" || t.dtype === "u64";
  return t.data.every((x) => !Number.isNaN(x) && (!wide || Number.isSafeInteger(x)));
};

/** The one result of an op whose inputs are all known; undefined when they are not, or the result is better left to be computed. */
const computed = (op: Op, known: ReadonlyMap<string, Tensor>): Tensor | undefined => {
  const [out] = op.outputs;
  if (!exact.has(op.kind) || out === undefined || out.type.kind !== "tensor") return undefined;
  const elements = out.type.shape.reduce<number>((n, d) => (typeof d === "number" ? n * d : Number.POSITIVE_INFINITY), 1);
  if (elements > literalLimit) return undefined;
  const inputs = op.inputs.map((v) => known.get(v.name));
  if (!inputs.every((t) => t !== undefined)) return undefined;
  const result = knowledge(op.kind).evaluate(inputs, op.attrs, [concrete(out.type, new Map())])[0] as Tensor;
  return printable(result) ? result : undefined;
};

/** Weights that are written in the graph's text. */
const literals = (g: Graph): Map<string, Tensor> => {
  const found = new Map<string, Tensor>();
  for (const { value, source } of g.weights)
    if (source.kind === "literal" && source.values.length <= literalLimit)
      found.set(value.name, {
        kind: "tensor",
        dtype: value.type.dtype,
        shape: concrete(value.type, new Map()).shape,
        data: Float64Array.from(source.values),
      });
  return found;
};

export const attrText = (attrs: Attrs): string =>
  Object.keys(attrs)
    .sort()
    .map(
      (key) =>
        `${key}=${Object.is(attrs[key], -0) ? "-0" : typeof attrs[key] === "number" ? attrs[key] : JSON.stringify(attrs[key])}`,
    )
    .join(" ");

/** Equal text: equal results. Undefined for ops that do more than compute. */
const identity = (op: Op): string | undefined =>
  op.kind === "dispatch" || op.kind === "collect" || op.body !== undefined || op.outputs.some((v) => v.type.kind === "kv")
    ? undefined
    : `${op.place ?? ""} ${op.kind} ${attrText(op.attrs)} (${op.inputs.map((v) => v.name).join(",")})`;

export const fold: Pass = {
  name: "fold",
  run(g, context) {
    const made = new Map<string, Op>();
    const first = new Map<string, Op>();
    const known = literals(g);
    const fresh = freshNames(g);
    const folded = rewrite(g, (op, b) => {
      const [out] = op.outputs;
      const keep = (): undefined => {
        for (const v of op.outputs) made.set(v.name, op);
        if (op.kind === "const" && out) known.set(out.name, knowledge("const").evaluate([], op.attrs, [out.type])[0] as Tensor);
        return undefined;
      };
      const text = identity(op);
      if (out === undefined || text === undefined) return keep();

      const operand = same(op, made);
      if (operand !== undefined && sameType(operand.type, out.type) && context.apply()) return [operand];

      const result = op.inputs.length > 0 ? computed(op, known) : undefined;
      if (result !== undefined && context.apply()) {
        known.set(out.name, result);
        if (result.shape.length > 0) {
          const value = b.weight(fresh(out.name), out.type as TensorType, { kind: "literal", values: [...result.data] });
          known.set(value.name, result);
          return [value];
        }
        const attrs = { value: result.data[0] as number, dtype: result.dtype };
        made.set(out.name, { kind: "const", inputs: [], attrs, outputs: [out] });
        return [b.op("const", [], attrs)];
      }

      const narrowed = op.kind === "cast" ? made.get(op.inputs[0]?.name ?? "") : undefined;
      const source = narrowed?.kind === "cast" ? narrowed.inputs[0] : undefined;
      if (source !== undefined && holds(narrowed?.attrs.to as DType, dtypeOf(source)) && context.apply()) {
        const straight = { ...op, inputs: [source] };
        made.set(out.name, straight);
        return [b.op("cast", [source], op.attrs)];
      }

      const twin = first.get(text);
      if (twin !== undefined && context.apply()) return twin.outputs;
      first.set(text, op);
      return keep();
    });
    return withoutDead(folded);
  },
};
