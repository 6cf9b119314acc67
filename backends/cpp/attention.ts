/** Attention over a paged cache, the kernel that writes it, and the geometry of its pages, which nothing else reads. */
import { type KvType, typeText } from "../../ir/type.ts";
import type { KernelTemplate, KvLayout } from "../backend.ts";
import { appendContext, hasTokenRows, pagesOf, stateOf, tensorOf } from "../cache.ts";
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

const attentionTemplate = loadTemplate(new URL("./kernels/attention.hbs", import.meta.url));
const appendTemplate = loadTemplate(new URL("./kernels/kv_append.hbs", import.meta.url));

const attention: KernelTemplate = {
  name: "attention",
  match(op, target) {
    const type = stateOf(op);
    if (op.kind !== "attention" || type === undefined) return undefined;
    const q = tensorOf(op.inputs[0]);
    if (q.dtype === "f64") return target.decline("attention of f64: sums are f32");
    if (!hasTokenRows(op)) return target.decline("attention has a row for each token");
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
    if (!hasTokenRows(op)) return target.decline("kv_append has a row for each token");
    const context = appendContext(op, type);
    return {
      context: { ...context, panel: cellOfCache(type).panel },
      scratch: 0,
      about: context.about,
    };
  },
  render: (context, name) => appendTemplate({ ...context, name }),
};

export const attentionKernels: readonly KernelTemplate[] = [attention, append];
