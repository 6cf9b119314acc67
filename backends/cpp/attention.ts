/** Attention over a paged cache, the kernel that writes it, and the geometry of its pages, which nothing else reads. */
import type { Dim } from "../../ir/dim.ts";
import type { Op, Value } from "../../ir/graph.ts";
import { type KvType, type TensorType, typeText } from "../../ir/type.ts";
import type { KernelTemplate, KvLayout } from "../backend.ts";
import { tokenSymbol } from "../c_family.ts";
import { dialect, storage } from "../scalar.ts";
import { loadTemplate } from "../template.ts";
import { type Cell, cellOf, panelColumns } from "./layout.ts";

const pageTokens = 32;
/** the counter that hands out tasks */
const scratchBytes = 64;

const cellOfCache = (type: KvType): Cell => {
  const cell = cellOf(type.dtype);
  if (!cell) throw new Error(`no cache of ${type.dtype}`);
  return cell;
};

/** Pages of a cache: see attention.h for what lies in one. */
export const kv = (type: KvType): KvLayout => {
  const { step, bytes } = cellOfCache(type);
  const keys = (pageTokens / panelColumns) * Math.ceil(type.dim / step) * bytes;
  const values = Math.ceil(type.dim / panelColumns) * (pageTokens / step) * bytes;
  const scales = type.dtype === "e4m3" || type.dtype === "i8" ? 2 * pageTokens * 4 : 0;
  return { pageTokens, pageBytes: type.heads * Math.ceil((keys + values + scales) / 64) * 64 };
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

const attentionTemplate = loadTemplate(new URL("./kernels/attention.hbs", import.meta.url));
const appendTemplate = loadTemplate(new URL("./kernels/kv_append.hbs", import.meta.url));

const attention: KernelTemplate = {
  name: "attention",
  match(op, target) {
    const type = stateOf(op);
    if (op.kind !== "attention" || type === undefined) return undefined;
    const q = typeOf(op.inputs[0]);
    if (q.dtype === "f64") return target.decline("attention of f64: sums are f32");
    if (rowsOf(op) !== tokenSymbol) return target.decline("attention has a row for each token");
    const heads = op.attrs.heads as number;
    const about = `attention of ${heads} heads ${typeText(q)} over ${typeText(type)}`;
    return {
      context: {
        about,
        type: storage[q.dtype],
        panel: cellOfCache(type).panel,
        kvHeads: type.heads,
        group: heads / type.heads,
        dim: type.dim,
        pages: pagesOf(op),
        scale: dialect.literal(op.attrs.scale as number, false),
      },
      scratch: scratchBytes,
      about,
    };
  },
  render: (context, name) => attentionTemplate({ ...context, name }),
};

const append: KernelTemplate = {
  name: "kv_append",
  match(op, target) {
    const type = stateOf(op);
    if (op.kind !== "kv_append" || type === undefined) return undefined;
    if (rowsOf(op) !== tokenSymbol) return target.decline("kv_append has a row for each token");
    const names =
      op.inputs.length === 7 ? ["k", "k_scales", "v", "v_scales", "pages", "position"] : ["k", "v", "pages", "position"];
    const about = `kv_append to ${typeText(type)}`;
    const scaled = names.includes("k_scales");
    return {
      context: {
        about,
        // the state, which the op changes, comes last
        arguments: names.map((name, index) => ({ name, index, type: storage[typeOf(op.inputs[index + 1]).dtype] })),
        pool: names.length,
        panel: cellOfCache(type).panel,
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
