/**
 * Kernels of the C family. One renderer spells the arithmetic of elements over a `Dialect` table, and one analysis turns the body of a
 * fused row op into stages over columns; a target adds its table and the template that places what is computed here.
 *
 * Values up to 32 bits of float and 16 of integer compute in the dialect's `narrow` type, f64 and larger integers in `wide`; every
 * rounding of the Graph is kept. Text depends only on kinds, types and attributes, never on the names of values: layers whose kernels do
 * the same thing give the same text.
 */

import { Builder } from "../ir/build.ts";
import { type Dim, dimText, mulDim, multipleOf, product, tokenSymbol } from "../ir/dim.ts";
import type { Graph, Op, Value } from "../ir/graph.ts";
import { knowledge } from "../ir/ops/index.ts";
import { roundTo } from "../ir/round.ts";
import { arg, type BinaryScalar, type Scalar, type UnaryScalar, un } from "../ir/scalar.ts";
import { type DType, type TensorType, typeText } from "../ir/type.ts";
import type { KernelContext } from "./backend.ts";
import type { Sizes } from "./sizes.ts";

/** How a language spells arithmetic. In patterns, `$0`, `$1`, `$2` stand for operands, which are names, literals or in parentheses. */
export interface Dialect {
  readonly name: string;
  /** types of variables: floats up to f32 and integers up to 16 bits; f64 and larger integers */
  readonly narrow: string;
  readonly wide: string;
  literal(value: number, wide: boolean): string;
  readonly unary: Readonly<Record<UnaryScalar, string>>;
  readonly binary: Readonly<Record<BinaryScalar, string>>;
  /** $0 where the condition is not 0, $1 then, $2 else */
  readonly select: string;
  /** the type of an element in memory; a dtype that is not here cannot be read or written */
  readonly storage: Readonly<Partial<Record<DType, string>>>;
  /** the value of element $1 of pointer $0 */
  readonly load: (dtype: DType) => string;
  /** $0 rounded to the dtype, as a variable holds it */
  readonly round: (dtype: DType) => string;
  /** statement: element $1 of pointer $0 becomes $2, rounded */
  readonly store: (dtype: DType) => string;
}

/** Variables that hold this dtype are of the dialect's wide type. */
export const isWide = (dtype: DType): boolean => ["f64", "i32", "u32", "i64", "u64"].includes(dtype);
export const variableType = (d: Dialect, dtype: DType): string => (isWide(dtype) ? d.wide : d.narrow);

/** A pattern with its operands put in. */
export const fill = (pattern: string, ...operands: readonly string[]): string =>
  pattern.replace(/\$(\d)/g, (_, n: string) => operands[Number(n)] ?? "");

/** A text without the parentheses around all of it. */
const bare = (text: string): string => {
  if (!text.startsWith("(") || !text.endsWith(")")) return text;
  let depth = 0;
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "(") depth++;
    if (text[i] === ")" && --depth === 0 && i < text.length - 1) return text;
  }
  return text.slice(1, -1);
};

/** A scalar expression as text; `operands` spell the arguments. */
export const renderScalar = (d: Dialect, s: Scalar, operands: readonly string[], wide: boolean): string => {
  const part = (x: Scalar): string => renderScalar(d, x, operands, wide);
  switch (s.op) {
    case "const":
      return d.literal(s.value, wide);
    case "arg":
      return operands[s.index] as string;
    case "round":
      return fill(d.round(s.dtype), part(s.x));
    case "select":
      return fill(d.select, part(s.if), part(s.x), part(s.y));
    default:
      return "y" in s
        ? fill(d.binary[s.op], part(s.x), part(s.y))
        : fill(d.unary[(s as { op: UnaryScalar }).op], part((s as { x: Scalar }).x));
  }
};

const dtypeOf = (v: Value): DType => v.type.dtype;
const shapeOf = (v: Value): readonly Dim[] => (v.type as TensorType).shape;

/** An operation on one element: `scalar` of values, rounded to the dtype of `output`. */
interface Element {
  readonly kind: string;
  readonly output: Value;
  readonly operands: readonly Value[];
  readonly scalar: Scalar;
}

const elementOf = (op: Op): Element => {
  const scalar = knowledge(op.kind).scalar;
  if (!scalar) throw new Error(`${op.kind} is not elementwise`);
  const args = op.inputs.map((_, i) => arg(i));
  return { kind: op.kind, output: op.outputs[0] as Value, operands: op.inputs, scalar: scalar(args, op.attrs) };
};

/** Whether every value of `from` is a value of `to`. */
const holds = (to: DType, from: DType): boolean => {
  const of: Readonly<Record<DType, readonly DType[]>> = {
    f64: ["f64", "f32", "f16", "bf16", "e4m3", "e5m2", "i32", "u32", "i16", "u16", "i8", "u8", "bool"],
    f32: ["f32", "f16", "bf16", "e4m3", "e5m2", "i16", "u16", "i8", "u8", "bool"],
    f16: ["f16", "e4m3", "e5m2", "i8", "u8", "bool"],
    bf16: ["bf16", "e4m3", "e5m2", "i8", "u8", "bool"],
    e4m3: ["e4m3", "bool"],
    e5m2: ["e5m2", "bool"],
    i64: ["i64", "i32", "u32", "i16", "u16", "i8", "u8", "bool"],
    u64: ["u64", "u32", "u16", "u8", "bool"],
    i32: ["i32", "i16", "u16", "i8", "u8", "bool"],
    u32: ["u32", "u16", "u8", "bool"],
    i16: ["i16", "i8", "u8", "bool"],
    u16: ["u16", "u8", "bool"],
    i8: ["i8", "bool"],
    u8: ["u8", "bool"],
    bool: ["bool"],
  };
  return of[to].includes(from);
};

/** Whether the expression always gives a value that the dtype holds: then rounding does nothing. */
const isExact = (s: Scalar, to: DType, operands: readonly Value[]): boolean => {
  const part = (x: Scalar): boolean => isExact(x, to, operands);
  switch (s.op) {
    case "const":
      return Object.is(roundTo(to, s.value), s.value);
    case "arg":
      return holds(to, dtypeOf(operands[s.index] as Value));
    case "select":
    case "min":
    case "max":
      return part(s.x) && part(s.y);
    case "neg":
    case "abs":
      return /^(f|bf|e)/.test(to) && part(s.x);
    case "lt":
    case "le":
    case "eq":
    case "and":
    case "or":
    case "not":
      return true;
    default:
      return false;
  }
};

const computesWide = (e: Element): boolean => [e.output, ...e.operands].some((v) => isWide(dtypeOf(v)));

/** The value of an element before rounding. */
const plainText = (d: Dialect, e: Element, operands: readonly string[]): string =>
  renderScalar(d, e.scalar, operands, computesWide(e));

/** The value of an element as a variable holds it: computed and rounded to its dtype. */
const roundedText = (d: Dialect, e: Element, operands: readonly string[]): string => {
  const text = plainText(d, e, operands);
  const to = dtypeOf(e.output);
  const kept = isExact(e.scalar, to, e.operands) || (to === "f32" && !computesWide(e)) || to === "f64";
  return kept ? text : fill(d.round(to), bare(text));
};

const declaration = (d: Dialect, dtype: DType, name: string, text: string): string =>
  `const ${variableType(d, dtype)} ${name} = ${bare(text)};`;

/** Whether a text is a name or a literal: then no variable is needed for it. */
const isAtom = (text: string): boolean => /^\(?-?[\w.]+\)?$/.test(text);

export interface Statements {
  /** `const float mul2 = x * y;`, one for each op that computes anything */
  readonly lines: readonly string[];
  /** the name or literal that holds a value's element */
  spell(value: Value): string;
}

/**
 * Elementwise ops as statements over one element, for the epilogues of contractions. `operand` spells the values that the ops do not
 * define (the contraction's result, and loads of the other inputs at the element's place); `first` numbers the first variable.
 */
export const elementStatements = (
  d: Dialect,
  ops: readonly Op[],
  operand: (value: Value) => string,
  first: number = 0,
): Statements => {
  const names = new Map<Value, string>();
  const lines: string[] = [];
  const spell = (value: Value): string => names.get(value) ?? operand(value);
  for (const op of ops) {
    const element = elementOf(op);
    const text = roundedText(d, element, op.inputs.map(spell));
    const name = isAtom(text) ? text : `${op.kind}${first + names.size}`;
    if (name !== text) lines.push(declaration(d, dtypeOf(element.output), name, text));
    names.set(element.output, name);
  }
  return { lines, spell };
};

/** The text that loads element `index` of a pointer. */
export const loadElement = (d: Dialect, dtype: DType, pointer: string, index: string): string =>
  fill(d.load(dtype), pointer, index);
/** The statement that rounds a value to a dtype and stores it as element `index` of a pointer. */
export const storeElement = (d: Dialect, dtype: DType, pointer: string, index: string, value: string): string =>
  fill(d.store(dtype), pointer, index, bare(value));

// --- rows ---------------------------------------------------------------------------------------------------------------------

export { tokenSymbol };

const isRowOp = (kind: string): boolean => knowledge(kind).scalar !== undefined || kind === "reduce" || kind === "spread";

/**
 * The body of an op that a row kernel can do: its own when it is `fused`; the op alone when it is elementwise, a reduction or a spread;
 * what it expands to otherwise. Undefined for core ops, for contractions with an epilogue and for ops with states.
 */
export const rowBody = (op: Op): Graph | undefined => {
  if (op.kind === "fused") return op.body?.ops.every((o) => isRowOp(o.kind)) ? op.body : undefined;
  const known = knowledge(op.kind);
  const alone = isRowOp(op.kind);
  if ((!alone && !known.expand) || op.inputs.some((v) => v.type.kind !== "tensor")) return undefined;
  const b = new Builder("body");
  const inputs = op.inputs.map((v, i) => b.input(`x${i}`, v.type as TensorType));
  const results = alone ? b.ops(op.kind, inputs, op.attrs) : (known.expand?.(b, { ...op, inputs }) ?? []);
  return { ...b.build(), outputs: results };
};

/** Rows that a dim of axis 0 counts: for each token, or altogether; undefined when it is neither. */
export const rowsOf = (d: Dim): { readonly perToken: boolean; readonly count: number } | undefined => {
  if (typeof d === "number") return { perToken: false, count: d };
  const count = multipleOf(d, tokenSymbol);
  return count === undefined ? undefined : { perToken: true, count };
};

/** Stack bytes that one thread may use for values of a row. */
const mostBufferBytes = 2 << 20;
/** Rows of a kernel without reductions are cut into tiles of this many columns, so that one wide row keeps several threads busy. */
export const tileColumns = 2048;

/** An element op, a reduction, or a view (element c is the source's element floor(c / group)) of a row. */
type Node =
  | ({ readonly node: "map"; readonly columns: number; readonly id: string } & Element)
  | {
      readonly node: "reduce";
      readonly fn: string;
      readonly group: number;
      readonly source: Value;
      readonly output: Value;
      readonly columns: number;
      readonly id: string;
    }
  | { readonly node: "view"; readonly group: number; readonly source: Value; readonly output: Value; readonly columns: number };

type MapNode = Extract<Node, { node: "map" }>;
type ReduceNode = Extract<Node, { node: "reduce" }>;

export interface RowPlan {
  /** for the target's row template: everything but the kernel's name */
  readonly context: KernelContext;
  readonly about: string;
}

/**
 * Plans a kernel that computes a body row by row. All values of a body agree, by broadcasting, on their axes but the last, which
 * together count the rows; the last is the columns. Stages follow one another within a row: each has statements of values with one
 * column, loops over columns, and reductions of what the loops left. Values that a later stage needs are computed again when
 * that is cheap, else kept in a buffer.
 *
 * `decline` gets the reason when the body is not of this form. With `sizes`, axes of rows may be any expressions where rows are reduced:
 * bodies of elements alone are left to kernels without rows.
 */
export const planRows = (d: Dialect, body: Graph, decline: (why: string) => undefined, sizes?: Sizes): RowPlan | undefined => {
  const values = [...body.inputs, ...body.ops.flatMap((op) => op.outputs)];
  for (const v of values) {
    if (v.type.kind !== "tensor") return decline("row kernels take no states");
    if (d.storage[v.type.dtype] === undefined) return decline(`no ${v.type.dtype} in ${d.name}`);
  }

  const reductions = body.ops.filter((op) => op.kind === "reduce" || op.kind === "spread");
  for (const { inputs } of reductions) {
    const columns = inputs[0] === undefined ? 1 : (shapeOf(inputs[0]).at(-1) ?? 1);
    if (typeof columns !== "number") return decline(`rows of ${dimText(columns)} columns, which is no number`);
  }
  const reduces = reductions.length > 0;
  const space = rowSpace(values, body.outputs, reduces ? sizes : undefined);
  if (typeof space === "string") return decline(space);
  const nodes = nodesOf(body, space);
  const schedule = scheduleNodes(nodes);
  const plan = new RowEmitter(d, body, space, nodes, schedule).emit();
  if (plan.bufferBytes > mostBufferBytes) return decline(`a row needs ${plan.bufferBytes} bytes of intermediate values`);
  const { variables = [] } = sizes ?? {};
  // rows that the host of a launch cannot count: how many there are at most
  const most = variables.length === 0 ? 0 : Math.max(1, sizes?.largest(space.rows) ?? 0);
  return { ...plan, context: { ...plan.context, sizes: variables, count: space.count, most } };
};

/** How values lie over rows and columns. */
interface RowSpace {
  /** whether there are rows for each token */
  readonly perToken: boolean;
  /** rows for a token when there are tokens, else all rows */
  readonly rows: Dim;
  readonly count: string;
  columns(v: Value): number;
  /** the index of a value's row: 0, `row`, or an expression of `row` */
  rowOf(v: Value): string;
}

const rowSpace = (values: readonly Value[], outputs: readonly Value[], sizes: Sizes | undefined): RowSpace | string => {
  // vectors over tokens ([T]) have one column
  const flat = values.some((v) => typeof (shapeOf(v).at(-1) ?? 0) !== "number");
  const lead = (v: Value): readonly Dim[] => (flat ? shapeOf(v) : shapeOf(v).slice(0, -1));
  const columns = (v: Value): number => (flat ? 1 : ((shapeOf(v).at(-1) ?? 1) as number));
  const rank = Math.max(0, ...values.map((v) => lead(v).length));
  const axes: Dim[] = Array.from({ length: rank }, () => 1);
  for (const v of values) {
    const own = lead(v);
    for (const [i, dim] of own.entries()) {
      const at = rank - own.length + i;
      if (dim === 1 || dim === axes[at]) continue;
      if (axes[at] !== 1) return `rows of ${typeText(v.type)} do not fit rows [${axes.map(dimText).join(",")}]`;
      axes[at] = dim;
    }
  }
  const [first = 1, ...rest] = axes;
  const counted = rowsOf(first);
  const inTokens = counted !== undefined && rest.every((n) => typeof n === "number");
  if (!inTokens && (sizes === undefined || flat))
    return counted === undefined
      ? `${dimText(first)} rows are not a multiple of ${tokenSymbol}`
      : `only the first axis may depend on ${tokenSymbol}`;
  const text = (d: Dim): string => sizes?.text(d) ?? String(d);
  const all = inTokens ? mulDim(counted.count, product(rest)) : product(axes);
  if (values.some((v) => shapeOf(v).includes(0))) return "a value has no elements";
  const full = (v: Value): boolean => lead(v).length === rank && lead(v).every((n, i) => n === axes[i]);
  if (!outputs.every(full)) return `results differ in rows: ${outputs.map((v) => typeText(v.type)).join(", ")}`;
  return {
    perToken: inTokens && counted.perToken,
    rows: all,
    count: text(all),
    columns,
    rowOf: (v) => {
      if (full(v) && rank > 0) return "row";
      const own = lead(v);
      const terms: string[] = [];
      let stride: Dim = 1;
      for (let i = own.length - 1; i >= 0; i--) {
        const size = own[i] as Dim;
        const at = rank - own.length + i;
        if (size !== 1) {
          const below = product(axes.slice(at + 1));
          const index = below === 1 ? "row" : `row / ${text(below)}`;
          const wrapped = at === 0 ? index : `${index} % ${text(size)}`;
          terms.push(stride === 1 ? wrapped : `${wrapped.includes(" ") ? `(${wrapped})` : wrapped} * ${text(stride)}`);
        }
        stride = mulDim(stride, size);
      }
      return terms.length === 0 ? "0" : terms.length === 1 ? (terms[0] as string) : terms.map((t) => `(${t})`).join(" + ");
    },
  };
};

/** What computes a body: nodes in order, and for each of its outputs the value that is stored. */
interface Nodes {
  readonly nodes: readonly Node[];
  readonly outputs: readonly Value[];
}

const nodesOf = (body: Graph, space: RowSpace): Nodes => {
  const nodes: Node[] = [];
  const made = new Map<Value, Node>();
  const add = (n: Node): void => {
    nodes.push(n);
    made.set(n.output, n);
  };
  /** the value itself, as an element op of the given columns: for reductions and outputs of what no loop computes */
  const copied = (v: Value, id: string, columns: number): Value => {
    const output: Value = { name: id, type: v.type };
    add({ node: "map", kind: "copy", output, operands: [v], scalar: arg(0), columns, id });
    return output;
  };
  for (const [i, op] of body.ops.entries()) {
    const output = op.outputs[0] as Value;
    const columns = space.columns(output);
    const source = op.inputs[0] as Value;
    if (op.kind === "spread") {
      add({ node: "view", group: op.attrs.group as number, source, output, columns });
    } else if (op.kind === "reduce") {
      const fn = op.attrs.fn as string;
      const group = (op.attrs.group as number | undefined) || space.columns(source);
      if (group === 1 || space.columns(source) === 1) {
        const scalar = fn === "amax" ? un("abs", arg(0)) : arg(0);
        add({ node: "map", kind: fn, output, operands: [source], scalar, columns, id: `${fn}${i}` });
        continue;
      }
      const from = made.get(source);
      // a loop must leave the elements as variables hold them, unless memory has them so
      const ready = from?.node === "map" || (from === undefined && ["f32", "f64"].includes(dtypeOf(source)));
      const elements = ready ? source : copied(source, `copy${i}`, space.columns(source));
      add({ node: "reduce", fn, group, source: elements, output, columns, id: `${fn}${i}` });
    } else add({ node: "map", ...elementOf(op), columns, id: `${op.kind}${i}` });
  }
  const copies = new Map<Value, Value>();
  for (const v of body.outputs) {
    const from = made.get(v);
    const computed = from?.node === "map" || (from?.node === "reduce" && from.columns === 1);
    if (!computed && !copies.has(v)) copies.set(v, copied(v, `copy${body.ops.length + copies.size}`, space.columns(v)));
  }
  return { nodes, outputs: body.outputs.map((v) => copies.get(v) ?? v) };
};

/** When each node runs: stages from 0. A map runs in the loop of its stage and columns; a reduction ends the stage. */
type Stages = ReadonlyMap<Value, number>;

const scheduleNodes = ({ nodes, outputs }: Nodes): Stages => {
  const nodeOf = new Map(nodes.map((n) => [n.output, n]));
  const stage = new Map<Value, number>();
  /** the first stage in which a loop of other columns, or of a later stage, can read it */
  const readable = (v: Value): number => {
    const n = nodeOf.get(v);
    if (n === undefined) return 0;
    if (n.node === "view") return readable(n.source);
    const at = stage.get(v) as number;
    return n.node === "map" && n.columns === 1 ? at : at + 1;
  };
  const sameLoop = (v: Value, columns: number): boolean => {
    const n = nodeOf.get(v);
    return n?.node === "map" && n.columns === columns;
  };
  for (const n of nodes) {
    if (n.node === "view") continue;
    const operands = n.node === "map" ? n.operands : [n.source];
    const columns = n.node === "map" ? n.columns : Number.NaN;
    const times = operands.map((v) =>
      n.node === "reduce" && nodeOf.get(v)?.node === "map"
        ? (stage.get(v) as number)
        : sameLoop(v, columns)
          ? (stage.get(v) as number)
          : readable(v),
    );
    stage.set(n.output, Math.max(0, ...times));
  }
  // what only later loops of the same columns read moves there, so that it need not be kept
  const latest = new Map<Value, number>();
  const limit = (v: Value, at: number): void => void latest.set(v, Math.min(latest.get(v) ?? Number.POSITIVE_INFINITY, at));
  for (const n of [...nodes].reverse()) {
    if (n.node === "map" && n.columns > 1 && !outputs.includes(n.output)) {
      const last = latest.get(n.output);
      if (last !== undefined && last > (stage.get(n.output) as number)) stage.set(n.output, last);
    }
    const at = n.node === "view" ? (latest.get(n.output) ?? 0) : (stage.get(n.output) as number);
    for (const v of n.node === "map" ? n.operands : [n.source]) {
      const together = n.node === "reduce" || nodeOf.get(v)?.node === "view" || (n.node === "map" && sameLoop(v, n.columns));
      limit(v, together ? at : at - 1);
    }
  }
  return stage;
};

/** The start of a row of an argument: `const bf16 *const in0_row = in0 + row * 256;` */
export type RowPointer = { readonly type: string; readonly name: string; readonly from: string };

interface RowBuffer {
  readonly type: string;
  readonly name: string;
  readonly size: number;
}

interface Loop {
  readonly stage: number;
  readonly columns: number;
  readonly nodes: readonly MapNode[];
}

/** Writes the statements of a row. One use. */
class RowEmitter {
  private readonly d: Dialect;
  private readonly body: Graph;
  private readonly space: RowSpace;
  private readonly nodes: readonly Node[];
  private readonly outputs: readonly Value[];
  private readonly stage: Stages;
  private readonly nodeOf: ReadonlyMap<Value, Node>;
  private readonly inputAt: ReadonlyMap<Value, number>;
  private readonly readers: ReadonlyMap<Value, number>;
  private readonly buffers: Map<Value, RowBuffer> = new Map();
  private readonly pointers: Map<string, RowPointer> = new Map();
  private readonly setup: Set<string> = new Set();
  /** values of one column that are another's name or a literal */
  private readonly atoms: Map<Value, string> = new Map();

  constructor(d: Dialect, body: Graph, space: RowSpace, { nodes, outputs }: Nodes, stage: Stages) {
    this.d = d;
    this.body = body;
    this.space = space;
    this.nodes = nodes;
    this.outputs = outputs;
    this.stage = stage;
    this.nodeOf = new Map(nodes.map((n) => [n.output, n]));
    this.inputAt = new Map(body.inputs.map((v, i) => [v, i]));
    const readers = new Map<Value, number>();
    for (const n of nodes) for (const v of n.node === "map" ? n.operands : [n.source]) readers.set(v, (readers.get(v) ?? 0) + 1);
    this.readers = readers;
  }

  emit(): RowPlan & { bufferBytes: number } {
    const maps = this.nodes.filter((n): n is MapNode => n.node === "map");
    const reductions = this.nodes.filter((n): n is ReduceNode => n.node === "reduce");
    for (const r of reductions) {
      if (r.columns > 1) this.keep(r.output, r.id, r.columns);
      if (this.nodeOf.has(r.source)) this.keepMap(r.source);
    }
    const loops: Loop[] = [];
    for (const m of maps) {
      if (m.columns === 1) continue;
      const stage = this.stage.get(m.output) as number;
      const loop = loops.find((l) => l.stage === stage && l.columns === m.columns) ?? { stage, columns: m.columns, nodes: [] };
      if (!loops.includes(loop)) loops.push(loop);
      (loop.nodes as MapNode[]).push(m);
    }
    for (const loop of loops) this.keepForLater(loop);

    const last = Math.max(0, ...this.stage.values());
    const tiled =
      loops.length === 1 && reductions.length === 0 && this.outputs.every((v) => loops[0]?.nodes.some((m) => m.output === v));
    const stages = Array.from({ length: last + 1 }, (_, t) => ({
      scalars: maps.filter((m) => m.columns === 1 && this.stage.get(m.output) === t).flatMap((m) => this.scalarLines(m)),
      loops: loops.filter((l) => l.stage === t).map((l) => this.loop(l, tiled)),
      reductions: reductions.filter((r) => this.stage.get(r.output) === t).flatMap((r) => this.reduction(r)),
    }));
    const tile = stages.flatMap((s) => s.loops).find((l) => l.tile !== 0);
    const tiles = tile === undefined ? 1 : Math.ceil((tile.columns as number) / tileColumns);
    const text = JSON.stringify([stages, [...this.setup], [...this.pointers.values()]]);
    return {
      about: this.about(),
      bufferBytes: [...this.buffers].reduce((n, [v, b]) => n + b.size * (isWide(dtypeOf(v)) ? 8 : 4), 0),
      context: {
        about: this.about(),
        arguments: this.arguments(),
        rows: `${this.space.perToken ? "of_tokens" : "fixed"}(c, ${this.space.count}, ${tiles})`,
        tiles,
        usesRow: /\brow\b/.test(text),
        pointers: [...this.pointers.values()],
        setup: [...this.setup],
        buffers: [...this.buffers.values()].map((b) => ({ ...b })),
        stages,
      },
    };
  }

  private about(): string {
    const types = (vs: readonly Value[]): string => vs.map((v) => typeText(v.type)).join(", ");
    const kinds = this.body.ops.map((op) => (op.kind === "reduce" ? `${op.attrs.fn}` : op.kind)).filter((k) => k !== "const");
    return `rows ${types(this.body.inputs)} -> ${types(this.body.outputs)}: ${kinds.join(" ") || "const"}`;
  }

  private arguments(): { type: string; name: string; index: number; note: string }[] {
    const inputs = this.body.inputs.map((v, i) => ({ v, name: `in${i}`, constant: "const " }));
    const outputs = this.body.outputs.map((v, i) => ({ v, name: `out${i}`, constant: "" }));
    return [...inputs, ...outputs]
      .map(({ v, name, constant }, index) => ({
        type: `${constant}${this.d.storage[dtypeOf(v)]}`,
        name,
        index,
        note: typeText(v.type),
      }))
      .filter((a) => !a.name.startsWith("in") || (this.readers.get(this.body.inputs[a.index] as Value) ?? 0) > 0);
  }

  private keep(v: Value, id: string, size: number): void {
    this.buffers.set(v, { type: variableType(this.d, dtypeOf(v)), name: `${id}_row`, size });
  }

  private keepMap(v: Value): void {
    const n = this.nodeOf.get(v);
    if (n?.node === "map" && n.columns > 1 && !this.buffers.has(v)) this.keep(v, n.id, n.columns);
  }

  /** Keeps what this loop needs of earlier loops and cannot cheaply compute again, and what loops of other columns view. */
  private keepForLater(loop: Loop): void {
    const visit = (v: Value): void => {
      const n = this.nodeOf.get(v);
      if (n === undefined) return;
      if (n.node === "view") {
        if (!this.isAlias(n)) this.keepMap(n.source);
        return;
      }
      if (n.node !== "map" || n.columns !== loop.columns || this.buffers.has(v)) return;
      if (this.stage.get(v) === loop.stage || this.recomputeCost(n) <= 6) for (const u of n.operands) visit(u);
      else this.keepMap(v);
    };
    for (const n of loop.nodes) for (const u of n.operands) visit(u);
  }

  /** A view whose elements are the source's one and only, or are the source's one by one. */
  private isAlias(n: Extract<Node, { node: "view" }>): boolean {
    return this.space.columns(n.source) === 1 || (n.group === 1 && this.nodeOf.get(n.source)?.node !== "reduce");
  }

  /** Rough cycles to compute an element again from memory. */
  private recomputeCost(n: MapNode): number {
    const own = scalarCost(n.scalar) + (isExact(n.scalar, dtypeOf(n.output), n.operands) ? 0 : roundCost(dtypeOf(n.output)));
    return n.operands.reduce((sum, v) => {
      const from = this.nodeOf.get(v);
      return sum + (from?.node === "map" && from.columns > 1 && !this.buffers.has(v) ? this.recomputeCost(from) : 0);
    }, own);
  }

  private pointer(name: string, v: Value): string {
    const row = this.space.rowOf(v);
    const columns = this.space.columns(v);
    if (row === "0") return name;
    const input = name.startsWith("in") ? "const " : "";
    const offset = columns === 1 ? row : `${row.includes(" ") ? `(${row})` : row} * ${columns}`;
    this.pointers.set(name, { type: `${input}${this.d.storage[dtypeOf(v)]}`, name: `${name}_row`, from: `${name} + ${offset}` });
    return `${name}_row`;
  }

  /** The variable of a value with one column. */
  private scalarName(v: Value): string {
    const n = this.nodeOf.get(v);
    if (n?.node === "view") return this.scalarName(n.source);
    if (n !== undefined) return this.atoms.get(v) ?? n.id;
    const i = this.inputAt.get(v) as number;
    const name = `x${i}`;
    const load = loadElement(this.d, dtypeOf(v), `in${i}`, this.space.rowOf(v));
    this.setup.add(declaration(this.d, dtypeOf(v), name, load));
    return name;
  }

  private scalarLines(m: MapNode): string[] {
    const operands = m.operands.map((v) => this.scalarName(v));
    if ((this.readers.get(m.output) ?? 0) === 0) return this.stores(m.output, plainText(this.d, m, operands));
    const text = roundedText(this.d, m, operands);
    if (isAtom(text)) {
      this.atoms.set(m.output, text);
      return this.stores(m.output, text);
    }
    return [declaration(this.d, dtypeOf(m.output), m.id, text), ...this.stores(m.output, m.id)];
  }

  /** Stores a value where it is an output; without an index, one that has a single column. */
  private stores(v: Value, text: string, index?: string): string[] {
    return this.outputs.flatMap((o, i) => {
      if (o !== v) return [];
      const [pointer, at] = index === undefined ? [`out${i}`, this.space.rowOf(v)] : [this.pointer(`out${i}`, v), index];
      return [storeElement(this.d, dtypeOf(v), pointer, at, text)];
    });
  }

  private reduction(r: ReduceNode): string[] {
    const size = this.space.columns(r.source);
    const i = this.inputAt.get(r.source);
    const from = i === undefined ? (this.buffers.get(r.source) as RowBuffer).name : this.pointer(`in${i}`, r.source);
    const dtype = dtypeOf(r.output);
    const rounds = dtype !== "f32" && dtype !== "f64";
    if (r.columns === 1) {
      const text = `${r.fn}(${from}, ${size})`;
      const line = declaration(this.d, dtype, r.id, rounds ? fill(this.d.round(dtype), text) : text);
      return [line, ...this.stores(r.output, r.id)];
    }
    const to = (this.buffers.get(r.output) as RowBuffer).name;
    const lines = [`${r.fn}_of_groups(${from}, ${size}, ${r.group}, ${to});`];
    if (rounds) lines.push(`each_of_groups(${to}, ${r.columns}, [](auto x) { return ${fill(this.d.round(dtype), "x")}; });`);
    return lines;
  }

  private loop(l: Loop, tiled: boolean): LoopContext {
    const names = new Map<Value, string>();
    const lines: string[] = [];
    const before: string[] = [];
    let group = 0;
    const element = (v: Value): string => {
      const known = names.get(v);
      if (known !== undefined) return known;
      const n = this.nodeOf.get(v);
      let name: string;
      if (n?.node === "view") name = view(n);
      else if (this.space.columns(v) === 1) return this.scalarName(v);
      else if (n === undefined) {
        const i = this.inputAt.get(v) as number;
        name = `x${i}`;
        lines.push(declaration(this.d, dtypeOf(v), name, loadElement(this.d, dtypeOf(v), this.pointer(`in${i}`, v), "i")));
      } else if (this.buffers.has(v)) name = `${(this.buffers.get(v) as RowBuffer).name}[i]`;
      else name = compute(n as MapNode);
      names.set(v, name);
      return name;
    };
    const view = (n: Extract<Node, { node: "view" }>): string => {
      if (this.isAlias(n)) return element(n.source);
      const i = this.inputAt.get(n.source);
      const pointer = i === undefined ? (this.buffers.get(n.source) as RowBuffer).name : this.pointer(`in${i}`, n.source);
      const load = (index: string): string =>
        i === undefined ? `${pointer}[${index}]` : loadElement(this.d, dtypeOf(n.source), pointer, index);
      if (group === 0) group = n.group;
      if (group !== n.group) return load(`i / ${n.group}`);
      const name = i === undefined ? pointer.replace(/_row$/, "_group") : `x${i}_group`;
      const line = declaration(this.d, dtypeOf(n.source), name, load("g"));
      if (!before.includes(line)) before.push(line);
      return name;
    };
    const compute = (m: MapNode): string => {
      const text = roundedText(this.d, m, m.operands.map(element));
      if (isAtom(text)) return text;
      lines.push(declaration(this.d, dtypeOf(m.output), m.id, text));
      return m.id;
    };
    for (const m of l.nodes) {
      const buffer = this.buffers.get(m.output);
      const onlyStored = (this.readers.get(m.output) ?? 0) === 0 && buffer === undefined;
      if (onlyStored) {
        lines.push(...this.stores(m.output, plainText(this.d, m, m.operands.map(element)), "i"));
        continue;
      }
      const name = names.get(m.output) ?? compute(m);
      names.set(m.output, name);
      if (buffer !== undefined) lines.push(`${buffer.name}[i] = ${name};`);
      lines.push(...this.stores(m.output, name, "i"));
    }
    const wide = tiled && l.columns > tileColumns && group === 0;
    return loopContext(l.columns, lines, { before, group: group === 1 ? 0 : group, tile: wide ? tileColumns : 0 });
  }
}

type LoopContext = {
  readonly columns: number;
  readonly lines: readonly string[];
  readonly before: readonly string[];
  readonly tile: number;
  readonly group: number;
  readonly groups: number;
  readonly lastGroup: number;
  readonly ragged: boolean;
  readonly whole: boolean;
};

const loopContext = (
  columns: number,
  lines: readonly string[],
  how: { readonly before: readonly string[]; readonly group: number; readonly tile: number },
): LoopContext => {
  const groups = how.group === 0 ? 1 : Math.ceil(columns / how.group);
  const ragged = how.group !== 0 && columns % how.group !== 0;
  return { columns, lines, ...how, groups, lastGroup: groups - 1, ragged, whole: how.group === 0 && how.tile === 0 };
};

/** Rough cycles of an expression, for choosing between computing again and keeping. */
const scalarCost = (s: Scalar): number => {
  if (s.op === "const" || s.op === "arg") return 0;
  if (s.op === "select") return 1 + scalarCost(s.if) + scalarCost(s.x) + scalarCost(s.y);
  if (s.op === "round") return roundCost(s.dtype) + scalarCost(s.x);
  const cheap = ["add", "sub", "mul", "neg", "abs", "min", "max", "lt", "le", "eq", "and", "or", "not"].includes(s.op);
  const own = cheap ? 1 : s.op === "div" || s.op === "sqrt" ? 6 : 20;
  return own + scalarCost(s.x) + ("y" in s ? scalarCost(s.y) : 0);
};
const roundCost = (dtype: DType): number => (dtype === "f32" || dtype === "f64" ? 0 : dtype === "bf16" ? 3 : 10);
