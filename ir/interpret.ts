import { type ConcreteTensor, concrete, type Symbols } from "./bind.ts";
import { UserError } from "./error.ts";
import type { Op } from "./graph.ts";
import type { Datum, Knowledge } from "./op.ts";
import { typeText } from "./type.ts";

/** Elements of a result: as doubles they are 256 MiB. */
const mostElements = 2 ** 25;

/** Throws a UserError when the interpreter cannot hold the tensor. */
const holds = (type: ConcreteTensor): void => {
  const count = type.shape.reduce((n, d) => n * d, 1);
  if (count > mostElements)
    throw new UserError(`${typeText(type)} has ${count} elements, and the interpreter holds ${mostElements}`);
};

const within = <R>(op: Op, work: () => R): R => {
  try {
    return work();
  } catch (error) {
    if (!(error instanceof UserError)) throw error;
    throw new UserError(`op '${op.kind}'${op.origin === undefined ? "" : ` (${op.origin})`}: ${error.message}`);
  }
};

/**
 * Runs ops in order over `values` (by name), which gets their results. `observe` sees each op's results as they come. Throws a UserError that
 * names op and origin when an op does not take its operands' elements, such as an index beyond an axis, or results are too large to hold.
 */
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
    const results = within(op, () => {
      const types = op.outputs.map(({ type }) => (type.kind === "kv" ? type : concrete(type, symbols)));
      for (const t of types) if (t.kind !== "kv") holds(t as ConcreteTensor);
      return knowledge(op.kind).evaluate(inputs, op.attrs, types, op.body);
    });
    op.outputs.forEach((v, i) => {
      values.set(v.name, results[i] as Datum);
    });
    observe?.(op, results);
  }
};
