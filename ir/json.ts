/**
 * Canonical JSON: keys sorted, no spaces, so that equal things have equal bytes. A graph's JSON names values and spells types as its text
 * does; numbers that JSON has not (inf, -inf, nan, -0) are {"number": "inf"}.
 */
import type { Attr, Attrs } from "./attr.ts";
import { type Dim, type DimSymbol, parseDim } from "./dim.ts";
import { UserError } from "./error.ts";
import {
  type Graph,
  isStored,
  type Op,
  type Place,
  type Slice,
  type StoredSource,
  type Value,
  type Weight,
  type WeightSource,
} from "./graph.ts";
import { parseType } from "./parse.ts";
import { numberText } from "./print.ts";
import { dtypes, type TensorType, type Type, typeText } from "./type.ts";
import { verify } from "./verify.ts";

export type Json = null | boolean | number | string | readonly Json[] | { readonly [key: string]: Json | undefined };

/** Sorted by UTF-16 code units, undefined members left out. A number that JSON does not have is our fault, and an error. */
export const canonicalJson = (value: Json): string => {
  if (value === null || typeof value === "boolean" || typeof value === "string") return JSON.stringify(value);
  if (typeof value === "number") {
    if (!Number.isFinite(value)) throw new Error(`canonical JSON has no ${value}`);
    return JSON.stringify(value);
  }
  if (isList(value)) return `[${value.map(canonicalJson).join(",")}]`;
  const keys = Object.keys(value)
    .filter((k) => value[k] !== undefined)
    .sort();
  return `{${keys.map((k) => `${JSON.stringify(k)}:${canonicalJson(value[k] as Json)}`).join(",")}}`;
};

const isList = (value: Json): value is readonly Json[] => Array.isArray(value);

const numberJson = (x: number): Json => (Number.isFinite(x) && !Object.is(x, -0) ? x : { number: numberText(x) });
const attrJson = (a: Attr): Json => {
  if (typeof a === "number") return numberJson(a);
  if (typeof a === "string" || typeof a === "boolean") return a;
  return a.map((x: number | string) => (typeof x === "number" ? numberJson(x) : x));
};
const valueJson = (v: Value): Json => ({ name: v.name, type: typeText(v.type) });
const sliceJson = (s: Slice | undefined): Json | undefined => s?.map(([from, to]) => [from, to]);

const sourceJson = (s: WeightSource): Json => {
  switch (s.kind) {
    case "tensor":
      return { kind: s.kind, tensor: s.tensor, slice: sliceJson(s.slice) };
    case "dequantised":
      return { kind: s.kind, tensor: s.tensor, scales: s.scales, block: [...s.block], slice: sliceJson(s.slice) };
    case "codes":
    case "scales":
      return { kind: s.kind, of: sourceJson(s.of), to: s.to, block: [...s.block], slice: sliceJson(s.slice) };
    case "stacked":
      return { kind: s.kind, of: s.of.map(sourceJson) };
    case "rope":
      return { kind: s.kind, theta: numberJson(s.theta), positions: s.positions, dim: s.dim };
    case "literal":
      return { kind: s.kind, values: s.values.map(numberJson) };
  }
};

const opJson = (op: Op): Json => ({
  kind: op.kind,
  inputs: op.inputs.map((v) => v.name),
  attrs: Object.fromEntries(Object.entries(op.attrs).map(([k, v]) => [k, attrJson(v)])),
  outputs: op.outputs.map(valueJson),
  body: op.body && graphValue(op.body, false),
  place: op.place,
  origin: op.origin,
});

/** A body has the symbols of the graph around it. */
const graphValue = (g: Graph, withSymbols: boolean): Json => ({
  name: g.name,
  symbols: withSymbols ? g.symbols.map((s) => ({ ...s })) : undefined,
  inputs: g.inputs.map(valueJson),
  states: g.states.map(valueJson),
  weights: g.weights.map((w) => ({ name: w.value.name, type: typeText(w.value.type), source: sourceJson(w.source) })),
  ops: g.ops.map(opJson),
  outputs: g.outputs.map((v) => v.name),
});

/** The canonical JSON of a graph: what its hash is taken of. */
export const graphToJson = (g: Graph): string => canonicalJson(graphValue(g, true));

/** One place in a JSON document, for errors that name it. */
class Reader {
  private readonly value: unknown;
  private readonly path: string;
  private readonly depth: number;
  /** types by their text, shared by all readers of a document */
  private readonly types: Map<string, Type>;

  constructor(value: unknown, path: string, depth = 0, types: Map<string, Type> = new Map()) {
    this.value = value;
    this.path = path;
    this.depth = depth;
    this.types = types;
    if (depth > 200) this.fail("is nested too deep");
  }

  fail(what: string): never {
    throw new UserError(`graph JSON: ${this.path} ${what}`);
  }

  private isObject(): boolean {
    return typeof this.value === "object" && this.value !== null && !Array.isArray(this.value);
  }

  /** Members of an object that has none but these. */
  object(...known: readonly string[]): void {
    if (!this.isObject()) this.fail("must be an object");
    for (const k of Object.keys(this.value as object))
      if (!known.includes(k)) this.fail(`has a member '${k.slice(0, 64)}' that is not one of ${known.join(", ")}`);
  }

  has(key: string): boolean {
    return this.isObject() && Object.hasOwn(this.value as object, key);
  }

  at(key: string): Reader {
    if (!this.has(key)) this.fail(`has no '${key}'`);
    return new Reader((this.value as Record<string, unknown>)[key], `${this.path}.${key}`, this.depth + 1, this.types);
  }

  entries(): [string, Reader][] {
    if (!this.isObject()) this.fail("must be an object");
    return Object.keys(this.value as object).map((k) => [k, this.at(k)]);
  }

  list(): Reader[] {
    if (!Array.isArray(this.value)) return this.fail("must be a list");
    return this.value.map((v, i) => new Reader(v, `${this.path}[${i}]`, this.depth + 1, this.types));
  }

  isList(): boolean {
    return Array.isArray(this.value);
  }

  text(): string {
    return typeof this.value === "string" ? this.value : this.fail("must be a string");
  }

  oneOf<W extends string>(words: readonly W[]): W {
    return words.find((w) => w === this.value) ?? this.fail(`must be one of ${words.join(", ")}`);
  }

  number(): number {
    if (typeof this.value === "number") return this.value;
    if (!this.has("number")) return this.fail("must be a number");
    const text = this.at("number").text();
    const found = [Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, Number.NaN, -0].find((x) => numberText(x) === text);
    return found ?? this.fail("must be a number, or inf, -inf, nan or -0");
  }

  integer(): number {
    const n = this.number();
    return Number.isSafeInteger(n) && n >= 0 ? n : this.fail("must be a whole number");
  }

  dim(): Dim {
    if (typeof this.value === "number") return this.integer();
    try {
      return parseDim(this.text());
    } catch (error) {
      return this.fail(`is not a dimension: ${(error as Error).message}`);
    }
  }

  pair(): readonly [number, number] {
    const [a, b, more] = this.list();
    return a && b && !more ? [a.integer(), b.integer()] : this.fail("must be two whole numbers");
  }

  attr(): Attr {
    if (typeof this.value === "string" || typeof this.value === "boolean") return this.value;
    if (!this.isList()) return this.number();
    const items = this.list();
    return items.every((i) => typeof i.value === "string") ? items.map((i) => i.text()) : items.map((i) => i.number());
  }

  type(): Type {
    const text = this.text();
    try {
      const type = this.types.get(text) ?? parseType(text);
      this.types.set(text, type);
      return type;
    } catch (error) {
      if (error instanceof UserError) this.fail(`is not a type: ${error.message}`);
      throw error;
    }
  }
}

/** The graph of its JSON, verified; UserErrors name the place in the document. */
export const graphFromJson = (text: string): Graph => {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new UserError(`graph JSON: ${(error as Error).message}`);
  }
  const g = readGraph(new Reader(value, "$"), undefined);
  verify(g);
  return g;
};

const readSlice = (r: Reader): { slice?: Slice } =>
  r.has("slice")
    ? {
        slice: r
          .at("slice")
          .list()
          .map((x) => x.pair()),
      }
    : {};

const readSource = (r: Reader): WeightSource => {
  const kind = r.at("kind").oneOf(["tensor", "dequantised", "codes", "scales", "stacked", "rope", "literal"]);
  switch (kind) {
    case "tensor":
      r.object("kind", "tensor", "slice");
      return { kind, tensor: r.at("tensor").text(), ...readSlice(r) };
    case "dequantised":
      r.object("kind", "tensor", "scales", "block", "slice");
      return { kind, tensor: r.at("tensor").text(), scales: r.at("scales").text(), block: r.at("block").pair(), ...readSlice(r) };
    case "codes":
    case "scales":
      r.object("kind", "of", "to", "block", "slice");
      return { kind, of: readSource(r.at("of")), to: r.at("to").oneOf(dtypes), block: r.at("block").pair(), ...readSlice(r) };
    case "stacked":
      r.object("kind", "of");
      return { kind, of: r.at("of").list().map(readStored) };
    case "rope":
      r.object("kind", "theta", "positions", "dim");
      return { kind, theta: r.at("theta").number(), positions: r.at("positions").integer(), dim: r.at("dim").integer() };
    case "literal":
      r.object("kind", "values");
      return {
        kind,
        values: r
          .at("values")
          .list()
          .map((v) => v.number()),
      };
  }
};

/** A matrix of a stack. */
const readStored = (r: Reader): StoredSource => {
  const source = readSource(r);
  return isStored(source) ? source : r.fail(`is ${source.kind}, and matrices of a stack are read from tensors`);
};

const readSymbol = (r: Reader): DimSymbol => {
  r.object("name", "min", "max", "multiple", "source", "is");
  return {
    name: r.at("name").text(),
    min: r.at("min").integer(),
    max: r.at("max").integer(),
    multiple: r.at("multiple").integer(),
    source: r.at("source").oneOf(["host", "device"]),
    ...(r.has("is") ? { is: r.at("is").dim() } : {}),
  };
};

const readGraph = (r: Reader, outer: readonly DimSymbol[] | undefined): Graph => {
  r.object("name", "symbols", "inputs", "states", "weights", "ops", "outputs");
  if (outer !== undefined && r.has("symbols")) r.fail("has symbols, but a body has those of the graph around it");
  const symbols = outer ?? r.at("symbols").list().map(readSymbol);
  const values = new Map<string, Value>();
  const define = (v: Reader): Value => {
    const value = { name: v.at("name").text(), type: v.at("type").type() };
    if (values.has(value.name)) v.fail(`defines '${value.name}' a second time`);
    values.set(value.name, value);
    return value;
  };
  const plain = (v: Reader): Value => {
    v.object("name", "type");
    return define(v);
  };
  const use = (v: Reader): Value => values.get(v.text()) ?? v.fail(`is '${v.text().slice(0, 64)}', which is not defined before`);
  const inputs = r.at("inputs").list().map(plain);
  const states = r.at("states").list().map(plain);
  const weights = r
    .at("weights")
    .list()
    .map((w): Weight => {
      w.object("name", "type", "source");
      const value = define(w);
      if (value.type.kind !== "tensor") w.fail("must be a tensor");
      return { value: value as Value & { readonly type: TensorType }, source: readSource(w.at("source")) };
    });
  const ops = r
    .at("ops")
    .list()
    .map((o): Op => {
      o.object("kind", "inputs", "attrs", "outputs", "body", "place", "origin");
      return {
        kind: o.at("kind").text(),
        inputs: o.at("inputs").list().map(use),
        attrs: readAttrs(o.at("attrs")),
        outputs: o.at("outputs").list().map(plain),
        ...(o.has("body") ? { body: readGraph(o.at("body"), symbols) } : {}),
        ...(o.has("place") ? { place: o.at("place").text() as Place } : {}),
        ...(o.has("origin") ? { origin: o.at("origin").text() } : {}),
      };
    });
  return { name: r.at("name").text(), symbols, inputs, states, weights, ops, outputs: r.at("outputs").list().map(use) };
};

const readAttrs = (r: Reader): Attrs => Object.fromEntries(r.entries().map(([name, value]) => [name, value.attr()]));
