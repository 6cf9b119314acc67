import type { Attrs } from "./attr.ts";
import type { Graph, Op, Value } from "./graph.ts";
import type { Scalar } from "./scalar.ts";
import type { Tensor } from "./tensor.ts";
import type { Type } from "./type.ts";

/** Work of one op for given input sizes. `bytes` counts each operand read once and each result written once. */
export interface Cost {
  readonly flops: number;
  readonly bytes: number;
}

/**
 * How the rows of an op's results depend on the rows of its inputs (axis 0).
 * `row`: row i of every result depends on row i of the inputs that have the token axis, and on whole weights.
 * `state`: as `row`, and reads or changes a state. `none`: anything else.
 */
export type Rowwise = "row" | "state" | "none";

/** The cache of the interpreter: for each page, K and V as the Graph sees them (codes and scales for quantised ones). */
export interface KvState {
  readonly kind: "kv";
  /** tokens of a page, as the backend under test has it: position p is at offset p % pageTokens of page p / pageTokens of the row's table */
  readonly pageTokens: number;
  readonly rows: Map<string, KvRow>;
}
/** One cached token, found under `${page}:${offset}`. */
export interface KvRow {
  readonly k: Float64Array;
  readonly v: Float64Array;
  readonly kScale?: Float64Array;
  readonly vScale?: Float64Array;
}
export type Datum = Tensor | KvState;

/** Everything the project knows of one op: one object, one file in ir/ops. */
export interface Knowledge {
  readonly name: string;
  /** one line for people: what it computes, shapes included */
  readonly summary: string;
  /** attribute name -> what it means; an attribute not listed here is an error */
  readonly attrs: Readonly<Record<string, string>>;
  /** names of the inputs, in order; a trailing `...` on the last means any number */
  readonly inputs: readonly string[];
  readonly rowwise: Rowwise;
  /** result types; throws in words when the inputs make no sense */
  infer(inputs: readonly Type[], attrs: Attrs, body?: Graph): readonly Type[];
  /** slow and obvious, in double, rounding where the Graph says: every backend answers to this */
  evaluate(inputs: readonly Datum[], attrs: Attrs, outputs: readonly Type[], body?: Graph): readonly Datum[];
  cost(inputs: readonly Type[], attrs: Attrs, symbols: ReadonlyMap<string, number>, body?: Graph): Cost;
  /** the op in simpler ops */
  expand?(b: Build, op: Op): readonly Value[];
  /** elementwise ops: the value of one element before the rounding to the result's dtype; having this makes it fusible */
  scalar?(args: readonly Scalar[], attrs: Attrs): Scalar;
  /** drive every test and the support table */
  readonly samples: readonly Sample[];
}

/**
 * A case for tests: the op on inputs of these types; `values` fixes the range or the kind of data drawn for each input:
 * `normal` (mean 0, deviation 1; the default), `positive` (0.1 to 4), `unit` (0 to 1), integers `below` a bound,
 * `row` (an element's index on the first axis: positions of one sequence), `column` (1 + its index on the last: pages of one sequence).
 */
export interface Sample {
  readonly name: string;
  readonly inputs: readonly Type[];
  readonly attrs: Attrs;
  /** of `fused`; its symbols are those of the graph it is put in */
  readonly body?: Graph;
  readonly values?: readonly ("normal" | "positive" | "unit" | "row" | "column" | { readonly below: number })[];
  readonly symbols?: Readonly<Record<string, number>>;
}

/** Adds ops to a graph under construction; results get fresh names. */
export interface Build {
  op(kind: string, inputs: readonly Value[], attrs?: Attrs, names?: readonly string[]): Value;
  ops(kind: string, inputs: readonly Value[], attrs?: Attrs, names?: readonly string[]): readonly Value[];
}
