/** Attention of heads that lie in memory as tensors, for targets of the C family: what their templates place. */
import type { Dim } from "../ir/dim.ts";
import { ceilDivDim, mulDim, product } from "../ir/dim.ts";
import type { Op } from "../ir/graph.ts";
import { type TensorType, typeText } from "../ir/type.ts";
import type { KernelContext, Target } from "./backend.ts";
import { walkOf } from "./nest.ts";
import { dialect, storage } from "./scalar.ts";
import { Sizes } from "./sizes.ts";

export interface SdpaPlan {
  readonly about: string;
  readonly context: KernelContext;
}

/** Undefined for other ops, and where a head is longer than the target keeps. `tile`: queries that share a head of k and go together. */
export const sdpaPlan = (op: Op, target: Target, longestHead: number, tile: number): SdpaPlan | undefined => {
  if (op.kind !== "sdpa") return undefined;
  const [q, k, v, bias] = op.inputs.map((x) => x.type as TensorType) as [TensorType, TensorType, TensorType, TensorType?];
  const out = op.outputs[0]?.type as TensorType;
  const [batches, heads, queries] = q.shape as readonly [Dim, number, Dim];
  const [kvHeads, keys, columns] = v.shape.slice(1) as [number, Dim, number];
  const dim = k.shape[3] as number;
  if (dim > longestHead || columns > longestHead) return target.decline(`heads of more than ${longestHead} elements`);
  if (!["f32", "bf16", "f16"].includes(out.dtype)) return target.decline(`results of ${out.dtype}`);
  const sizes = new Sizes(target);
  const steps = bias ? walkOf(bias.shape, [batches, heads, queries, keys]).strides : [0, 0, 0, 0];
  const types = [...op.inputs, ...op.outputs].map((x) => typeText(x.type));
  const about = `sdpa of ${heads} heads by ${kvHeads}, ${types.slice(0, -1).join(", ")} -> ${types.at(-1)}`;
  const group = kvHeads === 0 ? 0 : heads / kvHeads;
  const context = {
    about,
    type: storage[q.dtype],
    result: storage[out.dtype],
    bias: bias?.dtype === "bool" ? storage.bool : storage.f32,
    hasBias: bias !== undefined,
    steps: steps.map((s) => sizes.text(s)).join(", "),
    batches: sizes.text(batches),
    kvHeads,
    group,
    queries: sizes.text(queries),
    keys: sizes.text(keys),
    most: sizes.largest(product([batches, kvHeads, ceilDivDim(mulDim(queries, group), tile)])),
    dim,
    out: columns,
    outAt: op.inputs.length,
    causal: (op.attrs.causal as string | undefined) ?? "none",
    scale: dialect.literal(op.attrs.scale as number, false),
    softcap: dialect.literal((op.attrs.softcap as number | undefined) ?? 0, false),
  };
  return { about, context: { ...context, sizes: sizes.variables } };
};
