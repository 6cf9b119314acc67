/** NVIDIA GPUs: Hopper by its own instructions (sm_90a), Ampere and whatever came later by those that all of them have (sm_80). */

import { type DType, dtypes } from "../../ir/type.ts";
import type { Backend } from "../backend.ts";
import { tensorKernels } from "../tensors.ts";
import { tokenKernels } from "../tokens.ts";
import { appendKernel } from "./append.ts";
import { arches, assemble } from "./assemble.ts";
import { attentionKernels, kv } from "./attention.ts";
import { chainKernel } from "./chain.ts";
import { linearKernels } from "./linear.ts";
import { routeKernel } from "./route.ts";
import { rowKernel } from "./rows.ts";
import { sdpaKernel } from "./sdpa.ts";

const backend: Backend = {
  name: "cuda",
  api: 1,
  device: "cuda",
  arches,
  dtypes: dtypes as readonly DType[],
  kernels: [
    ...linearKernels,
    chainKernel,
    ...attentionKernels,
    sdpaKernel,
    appendKernel,
    routeKernel,
    ...tokenKernels(new URL(import.meta.url)),
    rowKernel,
    ...tensorKernels({ templates: new URL(import.meta.url), knowsSymbols: true }),
  ],
  kv,
  assemble,
};

export default backend;
