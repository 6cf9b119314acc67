import { concrete, type Symbols } from "./bind.ts";
import type { Op } from "./graph.ts";
import type { Datum, Knowledge } from "./op.ts";

/** Runs ops in order over `values` (by name), which gets their results. `observe` sees each op's results as they come. */
export const interpret = (
  ops: readonly Op[],
  values: Map<string, Datum>,
  symbols: Symbols,
  knowledge: (kind: string) => Knowledge,
  observe?: (op: Op, results: readonly Datum[]) => void,
): void => {
  for (const op of ops) {
    const inputs = op.inputs.map((v) => {
      const datum = values.get(v.name);
      if (datum === undefined)
        throw new Error(`op '${op.kind}' (${op.origin ?? "no origin"}) uses '${v.name}' before it is defined`);
      return datum;
    });
    const types = op.outputs.map(({ type }) => (type.kind === "kv" ? type : concrete(type, symbols)));
    const results = knowledge(op.kind).evaluate(inputs, op.attrs, types, op.body);
    op.outputs.forEach((v, i) => {
      values.set(v.name, results[i] as Datum);
    });
    observe?.(op, results);
  }
};
