/** Attention of heads that lie in memory as tensors: see sdpa.h. */
import type { KernelTemplate } from "../backend.ts";
import { sdpaPlan } from "../sdpa.ts";
import { loadTemplate } from "../template.ts";

/** Longer heads do not fit in what a thread keeps of a block. */
const longestHead = 1024;

const template = loadTemplate(new URL("./kernels/sdpa.hbs", import.meta.url));

export const sdpaKernel: KernelTemplate = {
  name: "sdpa",
  match(op, target) {
    const plan = sdpaPlan(op, target, longestHead, 1);
    return plan && { ...plan, scratch: 0 };
  },
  render: (context, name) => template({ ...context, name }),
};
