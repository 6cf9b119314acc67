/** The operators of ONNX and of its exporters that step3c has, by domain. */
import type { Lowering } from "../call.ts";
import { attentionOps, previewOps } from "./attention.ts";
import { control } from "./control.ts";
import { elementwise } from "./elementwise.ts";
import { indices } from "./indexing.ts";
import { normalisations } from "./normalise.ts";
import { products } from "./products.ts";
import { quantisations } from "./quantise.ts";
import { reductions } from "./reduce.ts";
import { shape } from "./shape.ts";

const onnx = {
  ...elementwise,
  ...shape,
  ...reductions,
  ...indices,
  ...products,
  ...normalisations,
  ...control,
  ...attentionOps,
  ...quantisations,
};

export const lowerings: ReadonlyMap<string, ReadonlyMap<string, Lowering>> = new Map(
  Object.entries({ "": onnx, "ai.onnx.preview": previewOps }).map(([domain, table]) => [domain, new Map(Object.entries(table))]),
);
