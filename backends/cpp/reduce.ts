/** Reductions of a last axis whose size only a launch knows: what row kernels, whose columns are numbers, leave. */

import type { Value } from "../../ir/graph.ts";
import { type TensorType, typeText } from "../../ir/type.ts";
import type { KernelTemplate } from "../backend.ts";
import { fill, loadElement, storeElement } from "../c_family.ts";
import { perTokenOf, rowsText } from "../nest.ts";
import { dialect, storage } from "../scalar.ts";
import { Sizes } from "../sizes.ts";
import { loadTemplate } from "../template.ts";

const template = loadTemplate(new URL("./kernels/reduce.hbs", import.meta.url));

/** What starts a reduction, and how one more element, or the result of another lane, is taken in. */
const functions: Readonly<Record<string, { readonly start: number; readonly both: string; readonly magnitudes?: true }>> = {
  sum: { start: 0, both: dialect.binary.add },
  mean: { start: 0, both: dialect.binary.add },
  prod: { start: 1, both: dialect.binary.mul },
  max: { start: Number.NEGATIVE_INFINITY, both: dialect.binary.max },
  min: { start: Number.POSITIVE_INFINITY, both: dialect.binary.min },
  amax: { start: 0, both: dialect.binary.max, magnitudes: true },
};

export const reduceKernel: KernelTemplate = {
  name: "reduce",
  match(op, target) {
    const [x, out] = [op.inputs[0], op.outputs[0]] as readonly [Value, Value];
    const fn = functions[String(op.attrs.fn)];
    if (op.kind !== "reduce" || fn === undefined || Number(op.attrs.group ?? 0) !== 0) return undefined;
    const { dtype, shape } = x.type as TensorType;
    const columns = shape.at(-1);
    if (typeof columns !== "string") return undefined;
    const sizes = new Sizes(target);
    const lead = shape.slice(0, -1);
    const element = loadElement(dialect, dtype, "in_row", "i + j");
    const about = `${op.attrs.fn} of the last axis of ${typeText(x.type)}`;
    const context = {
      about,
      arguments: [
        { type: `const ${storage[dtype]}`, name: "in0", index: 0, note: typeText(x.type) },
        { type: storage[dtype], name: "out0", index: 1, note: typeText(out.type) },
      ],
      ...rowsText(sizes, lead, perTokenOf(lead[0], [shape]), "1", 1),
      columns: sizes.text(columns),
      start: dialect.literal(fn.start, true),
      load: fn.magnitudes ? fill(dialect.unary.abs, `(double)(${element})`) : element,
      both: fill(fn.both, "so", "x"),
      store: storeElement(dialect, dtype, "out0", "r.row", op.attrs.fn === "mean" ? "so / (double)columns" : "so"),
    };
    return { context: { ...context, sizes: sizes.variables }, about, scratch: 0 };
  },
  render: (context, name) => template({ ...context, name }),
};
