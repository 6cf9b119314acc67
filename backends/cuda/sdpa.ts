/** Attention of heads that lie in memory as tensors, on any GPU: see sdpa.cuh. */
import type { KernelTemplate } from "../backend.ts";
import { sdpaPlan } from "../sdpa.ts";
import { loadTemplate } from "../template.ts";

/** Longer heads do not fit in the registers of a warp. */
const longestHead = 512;
/** Queries of a block of threads; sdpa.cuh has the same. */
const tile = 16;

const template = loadTemplate(new URL("./kernels/sdpa.hbs", import.meta.url));

export const sdpaKernel: KernelTemplate = {
  name: "sdpa",
  match(op, target) {
    const plan = sdpaPlan(op, target, longestHead, tile);
    return plan && { ...plan, scratch: 0 };
  },
  render: (context, name) => template({ ...context, name }),
};
