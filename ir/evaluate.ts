import { bindSymbols, type Symbols, unbound, withDefined } from "./bind.ts";
import { dimSymbols } from "./dim.ts";
import { UserError } from "./error.ts";
import type { Graph, Op, Weight } from "./graph.ts";
import { interpret } from "./interpret.ts";
import type { Datum, KvState } from "./op.ts";
import { knowledge } from "./ops/index.ts";
import { rounder } from "./round.ts";
import type { Tensor } from "./tensor.ts";

/** An empty cache; `pageTokens` is the page size of the backend it stands for. */
export const kvState = (pageTokens = 16): KvState => ({ kind: "kv", pageTokens, rows: new Map() });

/**
 * The reference interpreter: outputs by name. Double arithmetic, rounded to a value's dtype where the Graph defines a value.
 * Symbols come from `symbols` and from the shapes of the inputs. States are changed in place. `observe` sees every op's results.
 * Throws a UserError when an input, weight or state is missing or does not have its type, and when shapes do not say what a symbol is.
 */
export const evaluate = (
  graph: Graph,
  inputs: ReadonlyMap<string, Tensor>,
  weights: (w: Weight) => Tensor = literalWeight,
  states: ReadonlyMap<string, KvState> = new Map(),
  symbols: Symbols = new Map(),
  observe?: (op: Op, results: readonly Datum[]) => void,
): Map<string, Tensor> => {
  const find = <D>(what: string, from: ReadonlyMap<string, D>, name: string): D => {
    const found = from.get(name);
    if (found === undefined) throw new UserError(`graph '${graph.name}': ${what} '${name}' is not given`);
    return found;
  };
  const pairs: { name: string; type: Graph["inputs"][number]["type"]; datum: Datum }[] = [
    ...graph.inputs.map((v) => ({ ...v, datum: find("input", inputs, v.name) })),
    ...graph.states.map((v) => ({ ...v, datum: find("state", states, v.name) })),
    ...graph.weights.map((w) => ({ ...w.value, datum: weights(w) })),
  ];
  const bound = withDefined(graph.symbols, bindSymbols(pairs, symbols));
  const loose = graph.symbols.map((s) => s.name).filter((name) => !bound.has(name));
  if (loose.length > 0) {
    const types = graph.ops.flatMap((op) => op.outputs.map((v) => v.type));
    const used = new Set(types.flatMap((t) => (t.kind === "kv" ? [] : t.shape.flatMap(dimSymbols))));
    const missing = loose.filter((name) => used.has(name));
    if (missing.length > 0) unbound(missing, pairs);
  }
  const values = new Map<string, Datum>(pairs.map(({ name, datum }) => [name, datum]));
  const forget = forgetting(graph, values);
  interpret(graph.ops, values, bound, knowledge, (op, results) => {
    observe?.(op, results);
    forget(op);
  });
  return new Map(graph.outputs.map((v) => [v.name, values.get(v.name) as Tensor]));
};

/** Elements of all results that are still needed: as doubles they are 512 MiB. */
const mostKept = 2 ** 26;

/** Drops values after their last use, and throws a UserError when results that are still needed are too many. */
const forgetting = (graph: Graph, values: Map<string, Datum>): ((op: Op) => void) => {
  const last = new Map<string, Op>();
  for (const op of graph.ops) for (const v of [...op.outputs, ...op.inputs]) last.set(v.name, op);
  const kept = new Set(graph.outputs.map((v) => v.name));
  const made = new Set<string>();
  let count = 0;
  const size = (name: string): number => {
    const datum = values.get(name);
    return made.has(name) && datum?.kind === "tensor" ? datum.data.length : 0;
  };
  return (op) => {
    for (const { name } of op.outputs) {
      made.add(name);
      count += size(name);
    }
    if (count > mostKept)
      throw new UserError(`graph '${graph.name}': results of ${count} elements at once, and the interpreter holds ${mostKept}`);
    for (const { name } of [...op.outputs, ...op.inputs]) {
      if (kept.has(name) || last.get(name) !== op) continue;
      count -= size(name);
      values.delete(name);
    }
  };
};

/** The weight of a graph that has its values in its text. */
export const literalWeight = ({ value, source }: Weight): Tensor => {
  if (source.kind !== "literal")
    throw new UserError(`weight '${value.name}' comes from a checkpoint; its values are not in the graph`);
  return {
    kind: "tensor",
    dtype: value.type.dtype,
    shape: value.type.shape as readonly number[],
    data: Float64Array.from(source.values, rounder(value.type.dtype)),
  };
};
