/** topk joined with the softmax whose results it chooses among: a warp a token. */
import type { Value } from "../../ir/graph.ts";
import { type TensorType, typeText } from "../../ir/type.ts";
import type { KernelTemplate } from "../backend.ts";
import { tokenSymbol } from "../c_family.ts";
import { producersOf, recognise } from "../recognise.ts";
import { loadTemplate } from "../template.ts";

/** Columns that a warp keeps in registers. */
const mostColumns = 1024;

const template = loadTemplate(new URL("./kernels/route.hbs", import.meta.url));

export const routeKernel: KernelTemplate = {
  name: "route",
  match(op, target) {
    const topk = op.body?.ops.at(-1);
    if (op.kind !== "fused" || op.body === undefined || topk?.kind !== "topk") return undefined;
    const p = topk.inputs[0] as Value;
    const type = p.type as TensorType;
    const columns = type.shape.at(-1) as number;
    const scores = recognise(producersOf(op.body), [p], "softmax", [type], {})?.[0];
    if (scores === undefined || scores.name !== op.body.inputs[0]?.name || op.inputs.length > 1 || op.outputs.length > 2)
      return target.decline("not the softmax of an input");
    if (type.shape[0] !== tokenSymbol || columns > mostColumns) return target.decline(`choosing among ${typeText(type)}`);
    const about = `softmax and topk ${typeText(type)} -> ${op.outputs.map((v) => typeText(v.type)).join(", ")}`;
    return { context: { about, columns, k: topk.attrs.k as number }, scratch: 0, about };
  },
  render: (context, name) => template({ ...context, name }),
};
