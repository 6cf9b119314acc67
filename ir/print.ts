/** The textual form of a graph: one line for each symbol, input, weight, state, op and output. `parseGraph` reads it back exactly. */
import type { Attr } from "./attr.ts";
import { type DimSymbol, dimText } from "./dim.ts";
import type { Graph, Op, Slice, Value, WeightSource } from "./graph.ts";
import { allKnowledge } from "./ops/index.ts";
import { typeText } from "./type.ts";

/** Words that mean something as attribute values; strings that look like them are quoted. */
const attributeWords: readonly string[] = ["true", "false", "inf", "nan"];

/** A number that `Number` reads back exactly, or inf, -inf, nan. */
export const numberText = (x: number): string => {
  if (Object.is(x, -0)) return "-0";
  if (x === Number.POSITIVE_INFINITY) return "inf";
  if (x === Number.NEGATIVE_INFINITY) return "-inf";
  return Number.isNaN(x) ? "nan" : String(x);
};

const wordText = (s: string): string => (/^[A-Za-z_]\w*$/.test(s) && !attributeWords.includes(s) ? s : JSON.stringify(s));

const attrText = (a: Attr): string => {
  if (typeof a === "number") return numberText(a);
  if (typeof a === "string") return wordText(a);
  if (typeof a === "boolean") return String(a);
  return `[${a.map((x: number | string) => (typeof x === "number" ? numberText(x) : wordText(x))).join(", ")}]`;
};

const sliceText = (slice: Slice | undefined): string =>
  slice === undefined ? "" : ` [${slice.map(([from, to]) => `${from}:${to}`).join(", ")}]`;

/** `tensor "model.norm.weight" [0:128]` and so on. */
export const sourceText = (s: WeightSource): string => {
  switch (s.kind) {
    case "tensor":
      return `tensor ${JSON.stringify(s.tensor)}${sliceText(s.slice)}`;
    case "dequantised":
      return `dequantised ${JSON.stringify(s.tensor)} scales ${JSON.stringify(s.scales)} block ${s.block.join("x")}${sliceText(s.slice)}`;
    case "codes":
    case "scales":
      return `${s.kind} ${s.to} block ${s.block.join("x")} of (${sourceText(s.of)})${sliceText(s.slice)}`;
    case "stacked":
      return `stacked (${s.of.map(sourceText).join(", ")})`;
    case "rope":
      return `rope theta ${numberText(s.theta)} positions ${s.positions} dim ${s.dim}`;
    case "literal":
      return `[${s.values.map(numberText).join(", ")}]`;
  }
};

const symbolText = (s: DimSymbol): string =>
  `symbol ${s.name} ${s.min}..${s.max}${s.multiple === 1 ? "" : ` multiple ${s.multiple}`} ${s.source}${s.is === undefined ? "" : ` is ${dimText(s.is)}`}`;

const valueText = (v: Value): string => `${v.name} ${typeText(v.type)}`;

/** Attributes in the order of the op's Knowledge: equal attributes print equally. Ones it does not know come last. */
const attrNames = (op: Op): readonly string[] => {
  const known = Object.keys(allKnowledge.find((k) => k.name === op.kind)?.attrs ?? {});
  const given = Object.keys(op.attrs);
  return [...known.filter((name) => given.includes(name)), ...given.filter((name) => !known.includes(name)).sort()];
};

/** One op on one line (a fused one with its body on the lines after). */
export const printOp = (op: Op, indent = ""): string => {
  const attrs = attrNames(op).map((name) => `${name}: ${attrText(op.attrs[name] as Attr)}`);
  const line =
    `${indent}${op.outputs.map(valueText).join(", ")} = ${op.kind}(${op.inputs.map((v) => v.name).join(", ")})` +
    (attrs.length === 0 ? "" : ` {${attrs.join(", ")}}`) +
    (op.place === undefined ? "" : ` @${op.place}`) +
    (op.origin === undefined ? "" : ` from ${JSON.stringify(op.origin)}`);
  return op.body === undefined ? line : `${line} {\n${lines(op.body, `${indent}  `, false).join("\n")}\n${indent}}`;
};

/** A body shares the symbols of the graph around it. */
const lines = (g: Graph, indent: string, withSymbols: boolean): string[] => [
  `${indent}graph ${g.name}`,
  ...(withSymbols ? g.symbols : []).map((s) => indent + symbolText(s)),
  ...g.inputs.map((v) => `${indent}input ${valueText(v)}`),
  ...g.weights.map((w) => `${indent}weight ${valueText(w.value)} = ${sourceText(w.source)}`),
  ...g.states.map((v) => `${indent}state ${valueText(v)}`),
  ...g.ops.map((op) => printOp(op, indent)),
  ...g.outputs.map((v) => `${indent}output ${v.name}`),
];

/** The text of a graph, ending in a newline. */
export const printGraph = (g: Graph): string => `${lines(g, "", true).join("\n")}\n`;
