/**
 * Gives a graph whose tokens lie on axes of their own ([batch, sequence, hidden], as exporters write them) rows of tokens: [T, hidden].
 *
 * What contracts rows with weights says how many rows there are; their number becomes the symbol T, defined by the sizes it is made of. Ops
 * that work row by row move to rows of tokens; a `reshape` stands where a value goes over to them or back, and is gone where both meet.
 * Only graphs in which tokens meet each other (attention) and which have no T are changed: the partition needs rows to tell them apart.
 */
import { rewrite } from "../../ir/build.ts";
import { type Dim, dimSymbols, evalDim, product, tokenSymbol } from "../../ir/dim.ts";
import type { Graph, Op, Value } from "../../ir/graph.ts";
import type { Build } from "../../ir/op.ts";
import { knowledge } from "../../ir/ops/index.ts";
import type { TensorType } from "../../ir/type.ts";
import type { Pass } from "../pass.ts";
import { contraction } from "./contraction.ts";
import { withoutDead } from "./dead.ts";
import { meetsTokens, rowDependent } from "./flow.ts";

const shapeOf = (v: Value): readonly Dim[] => (v.type as TensorType).shape;
const attrDims = (dims: readonly Dim[]): readonly string[] => dims.map(String);

/** The number of rows that most contractions with weights have. */
const rowsOf = (g: Graph): Dim | undefined => {
  const counts = new Map<Dim, number>();
  for (const op of g.ops) {
    const rows = contraction(op)?.x && shapeOf(contraction(op)?.x as Value)[0];
    if (rows !== undefined) counts.set(rows, (counts.get(rows) ?? 0) + 1);
  }
  return [...counts].toSorted(([, a], [, b]) => b - a)[0]?.[0];
};

/** Axes in front that together count the rows; undefined where they do not. */
const leadOf = (shape: readonly Dim[], rows: Dim): number | undefined => {
  if (shape.length < 2) return undefined;
  return product(shape.slice(0, -1)) === rows ? shape.length - 1 : undefined;
};

/** Rewrites the ops of one graph. */
class Flattening {
  private readonly rows: Dim;
  /** values whose rows are tokens, by the name of the value that has the same elements in the graph as it was */
  private readonly flat: Map<string, Value> = new Map();
  /** what reshapes that stay are made of, by their names */
  private readonly sources: Map<string, Value> = new Map();
  private readonly weights: ReadonlySet<string>;

  constructor(g: Graph, rows: Dim) {
    this.rows = rows;
    this.weights = new Set(g.weights.map((w) => w.value.name));
  }

  rule(op: Op, b: Build): readonly Value[] | undefined {
    if (op.kind === "reshape") return this.reshape(op, b);
    if (op.outputs.some((v) => v.type.kind !== "tensor") || knowledge(op.kind).rowwise !== "row") return undefined;
    const operands = this.operands(op, b);
    if (operands === undefined) return undefined;
    const made = b.ops(op.kind, operands, op.attrs);
    return made.map((v, i) => this.back(v, op.outputs[i] as Value, b));
  }

  /** A value as the rest of the graph has it, which knows its rows. */
  private back(flat: Value, original: Value, b: Build): Value {
    const value = b.op("reshape", [flat], { shape: attrDims(shapeOf(original)) });
    this.flat.set(value.name, flat);
    this.flat.set(original.name, flat);
    return value;
  }

  private reshape(op: Op, b: Build): readonly Value[] | undefined {
    const [x] = op.inputs as readonly [Value];
    const from = this.flat.get(x.name);
    this.sources.set((op.outputs[0] as Value).name, this.sources.get(x.name) ?? x);
    const shape = shapeOf(op.outputs[0] as Value);
    const columns = shape.at(-1);
    // to other axes in front of the same columns: the same rows
    if (from === undefined || shapeOf(from)[1] !== columns || leadOf(shape, this.rows) === undefined) return undefined;
    return [this.back(from, op.outputs[0] as Value, b)];
  }

  /** A value as rows of tokens. */
  private toRows(v: Value, b: Build): Value {
    const known = this.flat.get(v.name);
    if (known !== undefined) return known;
    const made = b.op("reshape", [this.sources.get(v.name) ?? v], { shape: [tokenSymbol, String(shapeOf(v).at(-1))] });
    this.flat.set(v.name, made);
    return made;
  }

  /** The operands of an op that works on rows, as rows; undefined where it does not work on rows of tokens. */
  private operands(op: Op, b: Build): readonly Value[] | undefined {
    const out = shapeOf(op.outputs[0] as Value);
    const known = op.inputs.some((v) => this.flat.has(v.name));
    if (!known && leadOf(out, this.rows) === undefined) return undefined;
    const elementwise = knowledge(op.kind).scalar !== undefined;
    const kinds = op.inputs.map((v) => (elementwise ? this.spread(v, out) : this.role(op, v)));
    if (kinds.includes("neither") || !kinds.includes("rows")) return undefined;
    return op.inputs.map((v, i) => {
      if (kinds[i] === "rows") return this.toRows(v, b);
      if (!elementwise || shapeOf(v).length <= 1) return v;
      return b.op("reshape", [v], { shape: attrDims(shapeOf(v).slice(-1)) });
    });
  }

  /** How an operand of an elementwise op lies over the rows: one value for each row, the same for all, or neither. */
  private spread(v: Value, out: readonly Dim[]): "rows" | "same" | "neither" {
    const shape = shapeOf(v);
    const lead = shape.slice(0, -1);
    if (lead.every((d) => d === 1) && shape.length <= out.length && product(out.slice(0, -1)) !== 1) return "same";
    if (shape.length === out.length && lead.every((d, i) => d === out[i]))
      return this.flat.has(v.name) || leadOf(shape, this.rows) !== undefined ? "rows" : "neither";
    return shape.length === 0 ? "same" : "neither";
  }

  /** The same of other ops: weights are the same for all rows. */
  private role(op: Op, v: Value): "rows" | "same" | "neither" {
    if (this.weights.has(v.name) || contraction(op)?.w === v) return "same";
    return this.flat.has(v.name) || leadOf(shapeOf(v), this.rows) !== undefined ? "rows" : "neither";
  }
}

export const tokensPass: Pass = {
  name: "tokens",
  after: ["fold"],
  run(g, context) {
    const dependent = rowDependent(g);
    if (g.symbols.some((s) => s.name === tokenSymbol) || !g.ops.some((op) => meetsTokens(op, dependent))) return g;
    const rows = rowsOf(g);
    if (rows === undefined || !context.apply()) return g;
    const limit = (end: "min" | "max"): number =>
      evalDim(rows, new Map(g.symbols.filter((s) => dimSymbols(rows).includes(s.name)).map((s) => [s.name, s[end]])));
    const symbol = { name: tokenSymbol, min: limit("min"), max: limit("max"), multiple: 1, source: "host", is: rows } as const;
    const flattening = new Flattening(g, rows);
    return withoutDead(rewrite({ ...g, symbols: [...g.symbols, symbol] }, (op, b) => flattening.rule(op, b)));
  },
};
