/** Kernels that go row by row: elementwise ops, reductions and spreads, alone or fused, and what other ops expand to. */

import type { KernelTemplate } from "../backend.ts";
import { planRows, rowBody } from "../c_family.ts";
import { dialect } from "../scalar.ts";
import { Sizes } from "../sizes.ts";
import { loadTemplate } from "../template.ts";

const template = loadTemplate(new URL("./kernels/row.hbs", import.meta.url));

export const rowKernel: KernelTemplate = {
  name: "row",
  match(op, target) {
    const body = rowBody(op);
    const plan = body && planRows(dialect, body, target.decline, new Sizes(target));
    return plan && { context: plan.context, about: plan.about, scratch: 0 };
  },
  render: (context, name) => template({ ...context, name }),
};
