/** The operators of ONNX and of its exporters that step3c has, by domain. */
import type { Lowering } from "../call.ts";
import { attentionOps, previewOps, recurrences } from "./attention.ts";
import { contrib, contribOfOnnx } from "./contrib.ts";
import { contribAttention } from "./contrib_attention.ts";
import { contribWeights } from "./contrib_weights.ts";
import { control } from "./control.ts";
import { elementwise } from "./elementwise.ts";
import { indices } from "./indexing.ts";
import { normalisations } from "./normalise.ts";
import { products } from "./products.ts";
import { conversions, quantisations } from "./quantise.ts";
import { reductions } from "./reduce.ts";
import { shape } from "./shape.ts";
import { windows } from "./windows.ts";

const onnx = {
  ...elementwise,
  ...shape,
  ...reductions,
  ...indices,
  ...products,
  ...normalisations,
  ...control,
  ...windows,
  ...attentionOps,
  ...quantisations,
  ...contribOfOnnx,
};
const microsoft = { ...contrib, ...contribAttention, ...contribWeights, ...recurrences, ...conversions };

export const lowerings: ReadonlyMap<string, ReadonlyMap<string, Lowering>> = new Map(
  Object.entries({ "": onnx, "ai.onnx.preview": previewOps, "com.microsoft": microsoft }).map(([domain, table]) => [
    domain,
    new Map(Object.entries(table)),
  ]),
);
