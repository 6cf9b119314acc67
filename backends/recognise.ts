/**
 * Recognising ops in bodies: passes leave `quantise`, `softmax` and `rms_norm` in pieces, and a kernel that does such a thing at once has to see
 * it there. What to look for is the op's own expansion, so there is one description of each.
 */
import type { Attrs } from "../ir/attr.ts";
import { Builder } from "../ir/build.ts";
import type { Graph, Op, Value } from "../ir/graph.ts";
import { knowledge } from "../ir/ops/index.ts";
import { sameType, type TensorType } from "../ir/type.ts";

/** The op of a body that makes each value. */
export type Producers = ReadonlyMap<string, Op>;
export const producersOf = (body: Graph): Producers => new Map(body.ops.flatMap((op) => op.outputs.map((v) => [v.name, op])));

const columnsOf = (v: Value | undefined): unknown => (v?.type.kind === "tensor" ? v.type.shape.at(-1) : undefined);

/** Attributes in one spelling: a group of all columns is no group. */
const attrsText = (op: Op): string => {
  const whole = op.kind === "reduce" && (op.attrs.group === 0 || op.attrs.group === columnsOf(op.inputs[0]));
  const { group, ...rest } = op.attrs;
  const kept: Attrs = whole || group === undefined ? rest : op.attrs;
  return JSON.stringify(Object.entries(kept).sort(([a], [b]) => (a < b ? -1 : 1)));
};

/**
 * The operands with which `results`, values of a body, are the first results of an op of this kind and these attributes; undefined when they are
 * not. `types`: of the operands.
 */
export const recognise = (
  makers: Producers,
  results: readonly Value[],
  kind: string,
  types: readonly TensorType[],
  attrs: Attrs,
): readonly Value[] | undefined => {
  const b = new Builder("pattern");
  const operands = types.map((type, i) => b.input(`x${i}`, type));
  const [first] = results;
  if (first === undefined) return undefined;
  const expand = knowledge(kind).expand;
  if (expand === undefined) throw new Error(`${kind} is not made of simpler ops`);
  const wanted = expand(b, { kind, inputs: operands, attrs, outputs: [] });
  const pattern = producersOf({ ...b.build(), outputs: wanted });
  const bound = new Map<string, Value>();
  const matches = (p: Value, v: Value): boolean => {
    const operand = operands.findIndex((o) => o.name === p.name);
    if (operand >= 0) {
      const known = bound.get(p.name);
      if (known !== undefined) return known.name === v.name;
      if (!sameType(p.type, v.type)) return false;
      bound.set(p.name, v);
      return true;
    }
    const [from, made] = [pattern.get(p.name), makers.get(v.name)];
    if (from === undefined || made === undefined || from.kind !== made.kind || attrsText(from) !== attrsText(made)) return false;
    if (from.outputs.findIndex((o) => o.name === p.name) !== made.outputs.findIndex((o) => o.name === v.name)) return false;
    return from.inputs.length === made.inputs.length && from.inputs.every((input, i) => matches(input, made.inputs[i] as Value));
  };
  if (!results.every((v, i) => matches(wanted[i] as Value, v))) return undefined;
  return operands.map((o) => bound.get(o.name)).filter((v): v is Value => v !== undefined);
};
