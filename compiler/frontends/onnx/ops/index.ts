/** The operators of ONNX and of its exporters that step3c has, by domain. */
import type { Lowering } from "../call.ts";
import { control } from "./control.ts";
import { elementwise } from "./elementwise.ts";
import { indices } from "./indexing.ts";
import { normalisations } from "./normalise.ts";
import { products } from "./products.ts";
import { reductions } from "./reduce.ts";
import { shape } from "./shape.ts";

const onnx = { ...elementwise, ...shape, ...reductions, ...indices, ...products, ...normalisations, ...control };

export const lowerings: ReadonlyMap<string, ReadonlyMap<string, Lowering>> = new Map([["", new Map(Object.entries(onnx))]]);
