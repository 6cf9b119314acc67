/** Checks that a graph is one: run after every pass and on everything that comes from outside. */
import { identifier } from "./build.ts";
import { type Dim, type DimSymbol, dimSymbols, evalDim, mostOf, parseDim } from "./dim.ts";
import { UserError } from "./error.ts";
import type { Graph, Op, Value, Weight, WeightSource } from "./graph.ts";
import { inferTypes, knowledge } from "./ops/index.ts";
import { sameType, type Type, tensor, typeText } from "./type.ts";

/** `op 'linear' -> 'q' (layers.0.self_attn.wq)` */
const opText = (op: Op): string =>
  `op '${op.kind}' -> ${op.outputs.map((v) => `'${v.name}'`).join(", ")}${op.origin === undefined ? "" : ` (${op.origin})`}`;

/** Throws with the op in front, in the words of `locate` when it knows a better place than the op's origin. */
export type Locate = (op: Op) => string | undefined;

/** A value's side: where it can be used without an exchange; weights and nothing else are everywhere. */
type Side = string | "everywhere";

interface Defined {
  readonly value: Value;
  readonly side: Side;
  /** of a state: an op has changed it, so it is gone */
  changedBy?: Op;
}

/**
 * Throws a UserError naming op, origin and value unless: names are unique identifiers; types are what ops infer from their inputs, with known
 * attributes and declared symbols; values are defined before use; each version of a state is changed at most once and not used afterwards;
 * either no op has a place, or all have and values cross sides only through dispatch and collect, which come in pairs in exchange order.
 */
export const verify = (g: Graph, locate: Locate = () => undefined): void => {
  verifyGraph(g, locate, undefined, new Set());
};

/** `sound`: bodies seen before; layers share theirs */
const verifyGraph = (g: Graph, locate: Locate, within: Graph | undefined, sound: Set<Graph>): void => {
  const fail = (message: string): never => {
    throw new UserError(`graph '${g.name}': ${message}`);
  };
  if (!identifier.test(g.name)) fail(`'${g.name}' is not an identifier`);
  verifySymbols(g.symbols, fail);
  if (within !== undefined) {
    if (g.weights.length > 0 || g.states.length > 0) fail("a body has no weights and no states; pass them as inputs");
    if (JSON.stringify(g.symbols) !== JSON.stringify(within.symbols)) fail(`a body has the symbols of the graph around it`);
  }

  const placed = g.ops.some((op) => op.place !== undefined);
  const defined = new Map<string, Defined>();
  const dims = new Set<Dim>();
  const define = (value: Value, side: Side, blame: (m: string) => never): void => {
    if (!identifier.test(value.name)) blame(`'${value.name}' is not an identifier`);
    if (defined.has(value.name)) blame(`the name '${value.name}' is defined twice`);
    verifyType(value, g.symbols, dims, blame);
    defined.set(value.name, { value, side });
  };
  for (const v of g.inputs) {
    if (v.type.kind !== "tensor" && within === undefined)
      fail(`input '${v.name}' must be a tensor; states are declared as states`);
    define(v, "attention", fail);
  }
  for (const { value, source } of g.weights) {
    define(value, "everywhere", fail);
    verifySource(value, source, fail);
  }
  for (const v of g.states) {
    if (v.type.kind !== "kv") fail(`state '${v.name}' must be kv<...>, got ${typeText(v.type)}`);
    define(v, "attention", fail);
  }

  const exchanges = new Exchanges();
  for (const op of g.ops) {
    const blame = (message: string): never => {
      throw new UserError(`${locate(op) ?? `graph '${g.name}': ${opText(op)}`}: ${message}`);
    };
    if (within !== undefined && (op.place !== undefined || op.body !== undefined))
      blame("an op of a body has neither place nor body");
    if (op.kind === "fused" && op.body !== undefined && !sound.has(op.body)) {
      verifyGraph(op.body, locate, g, sound);
      sound.add(op.body);
    }
    verifyTypes(op, blame);
    for (const v of op.inputs) useValue(v, op, defined, blame);
    if (placed) verifyPlace(op, defined, exchanges, blame);
    for (const [i, v] of op.outputs.entries()) define(v, resultSide(op, i), blame);
  }
  exchanges.finish(fail);

  const names = new Set<string>();
  for (const v of g.outputs) {
    const d = defined.get(v.name) ?? fail(`output '${v.name}' is not defined`);
    if (!sameType(d.value.type, v.type)) fail(`output '${v.name}' is ${typeText(d.value.type)}, not ${typeText(v.type)}`);
    if (names.has(v.name)) fail(`'${v.name}' is an output twice`);
    if (placed && within === undefined && d.side !== "attention" && d.side !== "everywhere")
      fail(`output '${v.name}' is on '${d.side}', not on attention`);
    names.add(v.name);
  }
};

/** Names are identifiers and declared once, ranges are ranges; `fail` says which symbol is at fault. */
export const verifySymbols = (symbols: readonly DimSymbol[], fail: (m: string, symbol: DimSymbol) => never): void => {
  const names = new Set<string>();
  for (const s of symbols) {
    if (!identifier.test(s.name)) fail(`symbol '${s.name}' is not an identifier`, s);
    if (names.has(s.name)) fail(`symbol '${s.name}' is declared twice`, s);
    names.add(s.name);
    const integers = [s.min, s.max, s.multiple].every((n) => Number.isSafeInteger(n) && n >= 0);
    if (!integers || s.min > s.max || s.multiple < 1)
      fail(
        `symbol '${s.name}' must have whole 0 <= min <= max and multiple >= 1, got ${s.min}..${s.max} multiple ${s.multiple}`,
        s,
      );
  }
};

/**
 * Why a dim cannot be one: it is to be canonical, of declared symbols, and a whole number from 0 to 2^53 at their least and largest. In between
 * it may still come out negative (`S-P`): who runs the graph checks the sizes that he has.
 */
const dimFault = (d: Dim, symbols: readonly DimSymbol[]): string | undefined => {
  if (typeof d === "number") return Number.isSafeInteger(d) && d >= 0 ? undefined : `dimension ${d} must be a whole number`;
  for (const s of dimSymbols(d)) if (!symbols.some((x) => x.name === s)) return `symbol '${s}' is not declared`;
  const canonical = parseDim(d);
  if (canonical !== d) return `dimension '${d}' is not in canonical form (${canonical})`;
  for (const bound of ["min", "max"] as const) {
    const size = evalDim(d, new Map(symbols.map((s) => [s.name, s[bound]])));
    if (!Number.isSafeInteger(size) || size < 0) return `dimension '${d}' is ${size} when its symbols are at their ${bound}`;
  }
  if (!Number.isSafeInteger(mostOf(d, symbols))) return `dimension '${d}' may be ${mostOf(d, symbols)}`;
  return undefined;
};

/** The type's sizes are sizes; `blame` says why not. `good` remembers the dims that were, of the same symbols. */
export const verifyType = (
  { name, type }: Value,
  symbols: readonly DimSymbol[],
  good: Set<Dim>,
  blame: (m: string) => never,
): void => {
  const bad = (why: string): never => blame(`'${name}' ${typeText(type)}: ${why}`);
  if (type.kind === "kv") {
    if (![type.heads, type.dim].every((n) => Number.isSafeInteger(n) && n > 0)) bad("heads and dim must be positive integers");
    return;
  }
  for (const d of type.shape) {
    if (good.has(d)) continue;
    const fault = dimFault(d, symbols);
    if (fault !== undefined) bad(fault);
    good.add(d);
  }
};

const isBlock = (block: readonly number[]): boolean => block.length === 2 && block.every((n) => Number.isSafeInteger(n) && n > 0);

/** A source can give a weight of that type; `fail` says why not. */
export const verifySource = (value: Weight["value"], source: WeightSource, fail: (m: string) => never): void => {
  const { type } = value;
  const bad = (why: string): never => fail(`weight '${value.name}' ${typeText(type)}: ${why}`);
  const shape = type.shape.map((d) => (typeof d === "number" ? d : bad("the shape of a weight must be constant")));
  if (source.kind === "literal") {
    const size = shape.reduce((a, b) => a * b, 1);
    if (source.values.length !== size) bad(`${size} elements, but ${source.values.length} values`);
    return;
  }
  if (source.kind === "rope") {
    if (type.dtype !== "f32" || shape.length !== 2 || shape[0] !== source.positions || shape[1] !== source.dim)
      bad(`a rope table is f32[${source.positions},${source.dim}]`);
    if (!(source.theta > 0)) bad(`theta must be positive, got ${source.theta}`);
    if (source.dim % 2 !== 0) bad(`dim must be even, got ${source.dim}`);
    return;
  }
  if (source.kind === "stacked") {
    if (shape.length !== 3 || shape[0] !== source.of.length || source.of.length === 0)
      bad(`a stack of ${source.of.length} matrices is [${source.of.length}, rows, columns]`);
    for (const of of source.of) verifySource({ ...value, type: tensor(type.dtype, shape.slice(1)) }, of, fail);
    return;
  }
  if (source.kind === "scales" && type.dtype !== "f32") bad("scales are f32");
  if (source.kind === "codes" && type.dtype !== source.to) bad(`codes are ${source.to}`);
  for (let s: WeightSource = source; ; s = s.of) {
    if (s.kind === "stacked") {
      bad(`${source.kind} of a stack are a stack of ${source.kind}`);
      break;
    }
    if ("block" in s && !isBlock(s.block)) bad(`block must be two positive integers, got ${s.block.join("x")}`);
    if ("slice" in s && s.slice !== undefined) {
      for (const [from, to] of s.slice)
        if (![from, to].every(Number.isSafeInteger) || from < 0 || to < from) bad(`slice ${from}:${to} is not a range`);
      if (s === source && (s.slice.length !== shape.length || s.slice.some(([from, to], i) => to - from !== shape[i])))
        bad(`the slice [${s.slice.map(([from, to]) => `${from}:${to}`).join(", ")}] has another shape`);
    }
    if (s.kind !== "codes" && s.kind !== "scales") break;
  }
};

const inferred = (op: Op, blame: (m: string) => never): readonly Type[] => {
  const inputs = op.inputs.map((v) => v.type);
  try {
    return inferTypes(op.kind, inputs, op.attrs, op.body);
  } catch (error) {
    if (error instanceof UserError) return blame(error.message);
    throw error;
  }
};

/** The results are those that the op infers from its inputs. */
const verifyTypes = (op: Op, blame: (m: string) => never): void => {
  const types = inferred(op, blame);
  if (types.length !== op.outputs.length) blame(`has ${types.length} results, not ${op.outputs.length}`);
  op.outputs.forEach((v, i) => {
    const type = types[i] as Type;
    if (!sameType(type, v.type)) blame(`'${v.name}' should be ${typeText(type)}, is ${typeText(v.type)}`);
  });
};

const useValue = (v: Value, op: Op, defined: Map<string, Defined>, blame: (m: string) => never): void => {
  const d = defined.get(v.name) ?? blame(`'${v.name}' is used before it is defined`);
  if (!sameType(d.value.type, v.type)) blame(`'${v.name}' is ${typeText(d.value.type)}, used as ${typeText(v.type)}`);
  if (d.changedBy !== undefined) blame(`state '${v.name}' was changed by ${opText(d.changedBy)}; use the version it gave`);
  const changes = op.outputs.some((o) => o.type.kind === "kv");
  if (changes && v.type.kind === "kv") d.changedBy = op;
};

/** The side on which result i of an op can be used. */
const resultSide = (op: Op, i: number): Side => {
  if (op.kind !== "dispatch") return op.place ?? "attention";
  const perRank = op.inputs.length;
  return op.attrs.ranks === undefined ? "ffn" : `ffn${Math.floor(i / perRank)}`;
};

/** Dispatches and collects in the order of the graph: dispatch 0, collect 0, dispatch 1 ... */
class Exchanges {
  private next = 0;
  private open: { readonly op: Op; readonly ranks: number } | undefined;

  dispatch(op: Op, blame: (m: string) => never): void {
    if (this.open) blame(`exchange ${this.next} is still open: ${opText(this.open.op)} has no collect before this`);
    if (op.attrs.exchange !== this.next) blame(`is exchange ${op.attrs.exchange}, should be ${this.next}`);
    this.open = { op, ranks: typeof op.attrs.ranks === "number" ? op.attrs.ranks : 1 };
  }

  collect(op: Op, blame: (m: string) => never): void {
    const open = this.open ?? blame("collects what nothing dispatched");
    if (op.attrs.exchange !== this.next) blame(`is exchange ${op.attrs.exchange}, should be ${this.next}`);
    if (op.inputs.length !== open.ranks) blame(`takes ${op.inputs.length} partials from ${open.ranks} FFN ranks`);
    this.open = undefined;
    this.next++;
  }

  finish(fail: (m: string) => never): void {
    if (this.open) fail(`${opText(this.open.op)}: no collect answers it`);
  }
}

const verifyPlace = (op: Op, defined: ReadonlyMap<string, Defined>, exchanges: Exchanges, blame: (m: string) => never): void => {
  const place = op.place ?? blame("has no place, though other ops have");
  if (!/^(attention|ffn\d*)$/.test(place)) blame(`'${place}' is not a place: attention, ffn or ffn and a number`);
  if (op.kind === "dispatch" || op.kind === "collect") {
    if (place !== "attention") blame(`has place '${place}', must have attention`);
    exchanges[op.kind](op, blame);
  }
  if (place !== "attention" && knowledge(op.kind).rowwise !== "row")
    blame(`cannot run on '${place}': its rows are not independent`);
  op.inputs.forEach((v, i) => {
    const side = defined.get(v.name)?.side;
    if (side === "everywhere") return;
    if (op.kind !== "collect") {
      if (side !== place) blame(`runs on '${place}' but '${v.name}' is on '${side}'; values cross by dispatch and collect`);
    } else if (side !== `ffn${i}` && !(side === "ffn" && op.inputs.length === 1))
      blame(`'${v.name}' is on '${side}', partial ${i} comes from ffn${i}`);
  });
};
