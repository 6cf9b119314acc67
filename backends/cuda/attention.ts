/** Attention over a paged cache, the kernel that writes it, and the geometry of its pages, which nothing else reads. */
import type { Dim } from "../../ir/dim.ts";
import type { Op, Value } from "../../ir/graph.ts";
import { type DType, dtypeBytes, type KvType, type TensorType, typeText } from "../../ir/type.ts";
import type { Inexact, KernelTemplate, KvLayout, Target } from "../backend.ts";
import { tokenSymbol } from "../c_family.ts";
import { dialect, storage } from "../scalar.ts";
import { loadTemplate } from "../template.ts";

const pageTokens = 64;
const cacheTypes: readonly DType[] = ["f32", "f16", "bf16", "e4m3", "i8"];
const roundUp = (n: number, multiple: number): number => Math.ceil(n / multiple) * multiple;

/** Pages of a cache: see attention.cuh for what lies in one. */
export const kv = (type: KvType): KvLayout => {
  if (!cacheTypes.includes(type.dtype)) throw new Error(`no cache of ${type.dtype}`);
  const bytes = dtypeBytes(type.dtype);
  const scales = bytes === 1 ? 2 * pageTokens * 4 : 0;
  return { pageTokens, pageBytes: type.heads * roundUp(2 * pageTokens * type.dim * bytes + scales, 128) };
};

const stateOf = (op: Op): KvType | undefined => {
  const found = op.inputs.find((v) => v.type.kind === "kv")?.type;
  return found?.kind === "kv" ? found : undefined;
};

const typeOf = (v: Value | undefined): TensorType => {
  if (v?.type.kind !== "tensor") throw new Error(`${v?.name ?? "an operand"} is not a tensor`);
  return v.type;
};

/** Columns of the page table, the last operand but one. */
const pagesOf = (op: Op): number => typeOf(op.inputs.at(-2)).shape[1] as number;

const rowsOf = (op: Op): Dim | undefined => typeOf(op.inputs.at(-1)).shape[0];

/** What does a shape on an architecture: a function, its header, and its scratch. */
interface Choice {
  readonly function: string;
  readonly header: string;
  readonly scratch: number;
  readonly inexact?: Inexact;
}

/** Bytes that blocks leave for each other: two parts for each of 132 at most, f32 sums of 64 queries with maximum and total. */
const partialBytes = (dim: number): number => 2 * 132 * (64 * dim * 4 + 64 * 8);

/** Matrix units pay from 8 query heads of a KV head on; fewer leave most of their rows empty. */
const choose = (q: DType, type: KvType, group: number, scale: number, target: Target): Choice => {
  const matrix = q === "bf16" && group >= 8 && [64, 128, 256].includes(type.dim) && scale > 0;
  if (!matrix || !["bf16", "e4m3", "i8"].includes(type.dtype))
    return { function: "attend_plain", header: "attention.cuh", scratch: 0 };
  const scratch = partialBytes(type.dim);
  if (target.arch === "sm_90a" && type.dtype !== "i8")
    return {
      function: "attend_hopper",
      header: "attention_hopper.cuh",
      scratch,
      inexact: type.dtype === "e4m3" ? inCodes : inBf16,
    };
  return { function: "attend_warps", header: "attention.cuh", scratch, inexact: type.dtype === "bf16" ? inBf16 : inF16 };
};

const inBf16: Inexact = { ofLargest: 2 ** -8, why: "weights of the softmax are multiplied as bf16" };
const inF16: Inexact = { ofLargest: 2 ** -10, why: "weights of the softmax are multiplied as f16" };
const inCodes: Inexact = {
  ofLargest: 2 ** -7,
  why: "queries and weights of the softmax are sums of two codes, and the 8-bit units of Hopper keep about 13 bits of a sum",
};

const attentionTemplate = loadTemplate(new URL("./kernels/attention.hbs", import.meta.url));
const appendTemplate = loadTemplate(new URL("./kernels/kv_append.hbs", import.meta.url));

const attention: KernelTemplate = {
  name: "attention",
  match(op, target) {
    const type = stateOf(op);
    if (op.kind !== "attention" || type === undefined) return undefined;
    const q = typeOf(op.inputs[0]);
    if (q.dtype === "f64") return target.decline("attention of f64: sums are f32");
    if (!cacheTypes.includes(type.dtype)) return target.decline(`no cache of ${type.dtype}`);
    if (rowsOf(op) !== tokenSymbol) return target.decline("attention has a row for each token");
    const heads = op.attrs.heads as number;
    const about = `attention of ${heads} heads ${typeText(q)} over ${typeText(type)}`;
    const scale = op.attrs.scale as number;
    const { scratch, inexact, ...chosen } = choose(q.dtype, type, heads / type.heads, scale, target);
    return {
      context: {
        ...chosen,
        about,
        type: storage[q.dtype],
        element: storage[type.dtype],
        kvHeads: type.heads,
        group: heads / type.heads,
        dim: type.dim,
        pages: pagesOf(op),
        scale: dialect.literal(scale, false),
      },
      scratch,
      about,
      ...(inexact ? { inexact } : {}),
    };
  },
  render: (context, name) => attentionTemplate({ ...context, name }),
};

const append: KernelTemplate = {
  name: "kv_append",
  match(op, target) {
    const type = stateOf(op);
    if (op.kind !== "kv_append" || type === undefined) return undefined;
    if (!cacheTypes.includes(type.dtype)) return target.decline(`no cache of ${type.dtype}`);
    if (rowsOf(op) !== tokenSymbol) return target.decline("kv_append has a row for each token");
    const names =
      op.inputs.length === 7 ? ["k", "k_scales", "v", "v_scales", "pages", "position"] : ["k", "v", "pages", "position"];
    const about = `kv_append to ${typeText(type)}`;
    const scaled = names.includes("k_scales");
    return {
      context: {
        about,
        header: "attention.cuh",
        // the state, which the op changes, comes last
        arguments: names.map((name, index) => ({ name, index, type: storage[typeOf(op.inputs[index + 1]).dtype] })),
        pool: names.length,
        element: storage[type.dtype],
        heads: type.heads,
        dim: type.dim,
        pages: pagesOf(op),
        kScales: scaled ? "k_scales" : "nullptr",
        vScales: scaled ? "v_scales" : "nullptr",
      },
      scratch: 0,
      about,
    };
  },
  render: (context, name) => appendTemplate({ ...context, name }),
};

export const attentionKernels: readonly KernelTemplate[] = [attention, append];
