/** Portable C++20: the embedded default. One binary holds the kernels for every instruction set and chooses at run time. */

import { type DType, dtypes } from "../../ir/type.ts";
import type { Backend } from "../backend.ts";
import { tensorKernels } from "../tensors.ts";
import { tokenKernels } from "../tokens.ts";
import { assemble } from "./assemble.ts";
import { attentionKernels, kv } from "./attention.ts";
import { linearKernels } from "./linear.ts";
import { rowKernel } from "./rows.ts";
import { sdpaKernel } from "./sdpa.ts";

const backend: Backend = {
  name: "cpp",
  api: 1,
  device: "cpp",
  arches: ["any"],
  dtypes: dtypes as readonly DType[],
  kernels: [
    ...linearKernels,
    ...attentionKernels,
    sdpaKernel,
    ...tokenKernels(new URL(import.meta.url)),
    rowKernel,
    ...tensorKernels({ templates: new URL(import.meta.url), knowsSymbols: true }),
  ],
  kv,
  assemble,
};

export default backend;
