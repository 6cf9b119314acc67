/**
 * Kernels of the C family for the ops on rows of tokens that are neither contractions nor made of elements: gather, topk, sample, rotary,
 * combine. What a template needs is worked out here; a target brings the templates, `kernels/KIND.hbs`.
 */

import type { Attrs } from "../ir/attr.ts";
import type { Op } from "../ir/graph.ts";
import { type TensorType, typeText } from "../ir/type.ts";
import type { KernelContext, KernelTemplate, Target } from "./backend.ts";
import { loadElement, rowsOf, storeElement, tileColumns, variableType } from "./c_family.ts";
import { dialect, storage } from "./scalar.ts";
import { loadTemplate } from "./template.ts";

const inputType = (op: Op, i: number): TensorType => op.inputs[i]?.type as TensorType;
const outputType = (op: Op, i: number): TensorType => op.outputs[i]?.type as TensorType;
const columnsOf = (t: TensorType): number => t.shape.at(-1) as number;
const integer = (attrs: Attrs, name: string, otherwise: number): number => (attrs[name] as number | undefined) ?? otherwise;

/** `rows::of_tokens(c, 1, 1)` without the class's name: the rows of axis 0 of a type, each in `tiles` parts. */
const rowsText = (type: TensorType, tiles: number, target: Target): string | undefined => {
  const found = rowsOf(type.shape[0] ?? 1);
  if (found === undefined) return target.decline(`rows of ${typeText(type)} are not a multiple of the tokens`);
  return `${found.perToken ? "of_tokens" : "fixed"}(c, ${found.count}, ${tiles})`;
};

/** What a template of one kind of op places besides `rows` and `about`. */
type Plan = (op: Op) => { readonly rowsType: TensorType; readonly tiles: number; readonly context: KernelContext };

const kernel = (kind: string, plan: Plan, templates: URL): KernelTemplate => {
  const template = loadTemplate(new URL(`./kernels/${kind}.hbs`, templates));
  return {
    name: kind,
    match(op, target) {
      if (op.kind !== kind) return undefined;
      const { rowsType, tiles, context } = plan(op);
      const rows = rowsText(rowsType, tiles, target);
      if (rows === undefined) return undefined;
      const types = (values: Op["inputs"]): string => values.map((v) => typeText(v.type)).join(", ");
      const about = `${kind} ${types(op.inputs)} -> ${types(op.outputs)}`;
      return { context: { ...context, rows, about }, about, scratch: 0 };
    },
    render: (context, name) => template({ ...context, name }),
  };
};

const gather: Plan = (op) => {
  const table = inputType(op, 0);
  return {
    rowsType: outputType(op, 0),
    tiles: 1,
    context: { type: storage[table.dtype], columns: columnsOf(table), count: table.shape[0] as number },
  };
};

const topk: Plan = (op) => ({
  rowsType: inputType(op, 0),
  tiles: 1,
  context: { columns: columnsOf(inputType(op, 0)), k: op.attrs.k as number },
});

const sample: Plan = (op) => ({
  rowsType: inputType(op, 0),
  tiles: 1,
  context: { columns: columnsOf(inputType(op, 0)) },
});

const rotary: Plan = (op) => {
  const { dtype } = inputType(op, 0);
  const dim = op.attrs.dim as number;
  const heads = op.attrs.heads as number;
  return {
    rowsType: inputType(op, 0),
    tiles: heads,
    context: {
      type: storage[dtype],
      variable: variableType(dialect, dtype),
      heads,
      dim,
      half: dim / 2,
      positions: inputType(op, 1).shape[0] as number,
      loadA: loadElement(dialect, dtype, "a", "i"),
      loadB: loadElement(dialect, dtype, "b", "i"),
      storeA: storeElement(dialect, dtype, "out_a", "i", "(ai * cosines[i] - bi * sines[i])"),
      storeB: storeElement(dialect, dtype, "out_b", "i", "(bi * cosines[i] + ai * sines[i])"),
    },
  };
};

const combine: Plan = (op) => {
  const columns = columnsOf(outputType(op, 0));
  const from = integer(op.attrs, "first", 0);
  const bounded = op.attrs.count !== undefined;
  return {
    rowsType: outputType(op, 0),
    tiles: Math.ceil(columns / tileColumns),
    context: {
      columns,
      tile: tileColumns,
      choices: columnsOf(inputType(op, 1)),
      from,
      bounded,
      end: from + integer(op.attrs, "count", 0),
    },
  };
};

/** `templates`: a file beside the target's `kernels/`. */
export const tokenKernels = (templates: URL): readonly KernelTemplate[] =>
  Object.entries({ gather, topk, sample, rotary, combine }).map(([kind, plan]) => kernel(kind, plan, templates));
