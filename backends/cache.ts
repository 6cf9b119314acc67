/** Ops on a cache of keys and values, as kernels of the C family take them: operands, the page table, and what an append's template places. */
import type { Op, Value } from "../ir/graph.ts";
import { type KvType, type TensorType, typeText } from "../ir/type.ts";
import { tokenSymbol } from "./c_family.ts";
import { storage } from "./scalar.ts";

/** The cache that an op reads or changes. */
export const stateOf = (op: Op): KvType | undefined => {
  const found = op.inputs.find((v) => v.type.kind === "kv")?.type;
  return found?.kind === "kv" ? found : undefined;
};

export const tensorOf = (v: Value | undefined): TensorType => {
  if (v?.type.kind !== "tensor") throw new Error(`${v?.name ?? "an operand"} is not a tensor`);
  return v.type;
};

/** Columns of the page table, the last operand but one. */
export const pagesOf = (op: Op): number => tensorOf(op.inputs.at(-2)).shape[1] as number;

/** Whether the op has a row for each token: positions, the last operand, count them. */
export const hasTokenRows = (op: Op): boolean => tensorOf(op.inputs.at(-1)).shape[0] === tokenSymbol;

export interface AppendContext {
  readonly about: string;
  readonly arguments: readonly { readonly name: string; readonly index: number; readonly type: string }[];
  /** index of the argument that is the pool */
  readonly pool: number;
  readonly heads: number;
  readonly dim: number;
  readonly pages: number;
  readonly kScales: string;
  readonly vScales: string;
}

/** What the template of a kv_append places, beside how the target spells elements of its pages. */
export const appendContext = (op: Op, type: KvType): AppendContext => {
  const scaled = op.inputs.length === 7;
  const names = scaled ? ["k", "k_scales", "v", "v_scales", "pages", "position"] : ["k", "v", "pages", "position"];
  return {
    about: `kv_append to ${typeText(type)}`,
    // the state, which the op changes, comes last
    arguments: names.map((name, index) => ({ name, index, type: storage[tensorOf(op.inputs[index + 1]).dtype] as string })),
    pool: names.length,
    heads: type.heads,
    dim: type.dim,
    pages: pagesOf(op),
    kScales: scaled ? "k_scales" : "nullptr",
    vScales: scaled ? "v_scales" : "nullptr",
  };
};
