/** Attention of heads that lie in memory as tensors: see sdpa.h. */
import type { Dim } from "../../ir/dim.ts";
import { type TensorType, typeText } from "../../ir/type.ts";
import type { KernelTemplate } from "../backend.ts";
import { walkOf } from "../nest.ts";
import { dialect, storage } from "../scalar.ts";
import { Sizes } from "../sizes.ts";
import { loadTemplate } from "../template.ts";

/** Longer heads do not fit in what a thread keeps of a block. */
const longestHead = 1024;

const template = loadTemplate(new URL("./kernels/sdpa.hbs", import.meta.url));

export const sdpaKernel: KernelTemplate = {
  name: "sdpa",
  match(op, target) {
    if (op.kind !== "sdpa") return undefined;
    const [q, k, v, bias] = op.inputs.map((x) => x.type as TensorType) as [TensorType, TensorType, TensorType, TensorType?];
    const out = op.outputs[0]?.type as TensorType;
    const [batches, heads, queries, dim] = q.shape as readonly [Dim, number, Dim, number];
    const [kvHeads, keys, columns] = v.shape.slice(1) as [number, Dim, number];
    if (dim > longestHead || columns > longestHead) return target.decline(`heads of more than ${longestHead} elements`);
    if (storage[out.dtype] === undefined || out.dtype === "f64") return target.decline(`results of ${out.dtype}`);
    const sizes = new Sizes(target);
    const steps = bias ? walkOf(bias.shape, [batches, heads, queries, keys]).strides : [0, 0, 0, 0];
    const types = [...op.inputs, ...op.outputs].map((x) => typeText(x.type));
    const about = `sdpa of ${heads} heads by ${kvHeads}, ${types.slice(0, -1).join(", ")} -> ${types.at(-1)}`;
    const context = {
      type: storage[q.dtype],
      result: storage[out.dtype],
      bias: bias?.dtype === "bool" ? storage.bool : storage.f32,
      biasAt: bias ? `static_cast<const ${storage[bias.dtype]} *>(c->args[3])` : "nullptr",
      biasSteps: steps.map((s) => sizes.text(s)).join(", "),
      batches: sizes.text(batches),
      kvHeads,
      group: kvHeads === 0 ? 0 : heads / kvHeads,
      queries: sizes.text(queries),
      keys: sizes.text(keys),
      dim: k.shape[3] as number,
      out: columns,
      outAt: op.inputs.length,
      causal: (op.attrs.causal as string | undefined) ?? "none",
      scale: dialect.literal(op.attrs.scale as number, false),
      softcap: dialect.literal((op.attrs.softcap as number | undefined) ?? 0, false),
    };
    return { about, context: { ...context, about, sizes: sizes.variables }, scratch: 0 };
  },
  render: (context, name) => template({ ...context, name }),
};
