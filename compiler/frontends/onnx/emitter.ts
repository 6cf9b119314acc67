/**
 * Ops as they are added to a graph that is made of an ONNX model. What is known is computed at once: constants by the interpreter's own
 * definition of each op, and sizes, which may be expressions over symbols, as dims. Lowerings of ONNX operators therefore say what they
 * compute once, and get shapes, constants and ops out of it.
 */
import type { Attrs } from "../../../ir/attr.ts";
import { type Builder, identifier } from "../../../ir/build.ts";
import {
  addDim,
  type Dim,
  type DimSymbol,
  dimSymbols,
  dimTerms,
  divDim,
  evalDim,
  mulDim,
  product,
  subDim,
} from "../../../ir/dim.ts";
import { UserError } from "../../../ir/error.ts";
import type { Value, WeightSource } from "../../../ir/graph.ts";
import { inferTypes, knowledge } from "../../../ir/ops/index.ts";
import { rounder } from "../../../ir/round.ts";
import type { Tensor } from "../../../ir/tensor.ts";
import { type DType, type TensorType, tensor, typeText } from "../../../ir/type.ts";

/** What is known of a value when the graph is made: its elements, or its elements as dims (integers only). */
type Known = { readonly kind: "tensor"; readonly tensor: Tensor } | { readonly kind: "dims"; readonly dims: readonly Dim[] };

/** A value of the model, on its way into the graph: an op's result, or something known that becomes a weight where an op needs it. */
export interface Item {
  readonly type: TensorType;
  /** undefined: known only when the graph runs */
  known(): Known | undefined;
  /** the graph computes it, though it is known: an input that was given because sizes depend on it */
  readonly runs: boolean;
  /** the model's type, where it has fewer bits than a byte and is held in one */
  readonly narrow?: string | undefined;
  value(): Value;
}

/** A constant of the model whose elements are decoded when somebody asks for them. */
export interface Stored {
  readonly type: TensorType;
  readonly name: string;
  readonly narrow?: string | undefined;
  read(): Tensor;
}

/** Sizes depend on the values of these inputs of the graph. */
export class SizesDepend extends UserError {
  readonly inputs: readonly string[];
  constructor(inputs: readonly string[], message: string) {
    super(message);
    this.inputs = inputs;
  }
}

/** Larger results are not computed when the graph is made unless an operand is as large: the graph would outgrow the model. */
const mostFolded = 1 << 16;
/** Elements of a weight that a graph has in its text. */
const mostLiteral = 4096;
/** Elements of a constant that are kept once they are decoded. */
const mostKept = 1 << 16;
/** Ops that only move or convert elements. */
const later: ReadonlySet<string> = new Set(["reshape", "transpose", "slice", "broadcast", "cast"]);
const mostAxes = 64;
/** Elements of a value: what a 48-bit address could hold. */
const mostElements = 2 ** 40;

const concrete = (t: TensorType): t is TensorType & { readonly shape: readonly number[] } =>
  t.shape.every((d) => typeof d === "number");
const count = (shape: readonly number[]): number => shape.reduce((a, b) => a * b, 1);

export class Emitter {
  readonly builder: Builder;
  readonly symbols: ReadonlyMap<string, DimSymbol>;
  /** the elements of weights that are not in the graph's text, by the name of their source */
  readonly tensors: Map<string, Stored> = new Map();
  private readonly made: Map<string, readonly Value[]> = new Map();
  /** an axis of an input that is a symbol and nothing else */
  private readonly axes: Map<string, { readonly item: Item; readonly axis: number }> = new Map();
  private readonly numbers: Map<string, Item> = new Map();

  constructor(builder: Builder, symbols: ReadonlyMap<string, DimSymbol>) {
    this.builder = builder;
    this.symbols = symbols;
  }

  // --- leaves ---

  input(name: string, type: TensorType, given?: Tensor, narrow?: string): Item {
    const value = this.builder.input(name, type);
    const known: Known | undefined = given && { kind: "tensor", tensor: given };
    const item: Item = { type, known: () => known, runs: true, narrow, value: () => value };
    for (const [axis, d] of type.shape.entries())
      if (typeof d === "string" && identifier.test(d) && !this.axes.has(d)) this.axes.set(d, { item, axis });
    return item;
  }

  constant(t: Tensor, name: string = "c"): Item {
    return this.stored({ type: tensor(t.dtype, t.shape), name, read: () => t });
  }

  stored(s: Stored): Item {
    let read: Tensor | undefined;
    let value: Value | undefined;
    // elements are doubles: those of large tensors are decoded anew for each use rather than kept
    const kept = count(s.type.shape as readonly number[]) <= mostKept;
    const elements = (): Tensor => {
      const t = read ?? s.read();
      if (kept) read = t;
      return t;
    };
    return {
      type: s.type,
      known: () => ({
        kind: "tensor",
        get tensor() {
          return elements();
        },
      }),
      runs: false,
      narrow: s.narrow,
      value: () => {
        value ??= this.weight(s, elements);
        return value;
      },
    };
  }

  private weight(s: Stored, elements: () => Tensor): Value {
    const size = count(s.type.shape as readonly number[]);
    const literal = size <= mostLiteral ? elements().data : undefined;
    const finite = literal?.every(
      (x) => Number.isFinite(x) && (Math.abs(x) <= Number.MAX_SAFE_INTEGER || /^[fb]/.test(s.type.dtype)),
    );
    if (s.type.shape.length === 0 && literal && (finite || literal[0] === Infinity || literal[0] === -Infinity))
      return this.builder.op("const", [], { value: literal[0] as number, dtype: s.type.dtype });
    const name = this.builder.unused(s.name.replace(/[^A-Za-z0-9_]/g, "_") || "c");
    let source: WeightSource;
    if (literal && finite) source = { kind: "literal", values: [...literal] };
    else {
      this.tensors.set(name, { ...s, read: elements });
      source = { kind: "tensor", tensor: name };
    }
    return this.builder.weight(name, s.type, source);
  }

  /** A scalar. */
  number(value: number, dtype: DType): Item {
    const key = `${dtype} ${Object.is(value, -0) ? "-0" : value}`;
    const found = this.numbers.get(key);
    if (found) return found;
    const item = this.constant({ kind: "tensor", dtype, shape: [], data: Float64Array.of(rounder(dtype)(value)) });
    this.numbers.set(key, item);
    return item;
  }

  /** Sizes as a vector, or in another shape: [] for one size. */
  dims(dims: readonly Dim[], dtype: "i64" | "i32" = "i64", shape: readonly number[] = [dims.length]): Item {
    if (dims.every((d) => typeof d === "number"))
      return this.constant({ kind: "tensor", dtype, shape, data: Float64Array.from(dims as readonly number[]) });
    let value: Value | undefined;
    return {
      type: tensor(dtype, shape),
      known: () => ({ kind: "dims", dims }),
      runs: false,
      value: () => {
        value ??= this.sizes(dims, dtype, shape).value();
        return value;
      },
    };
  }

  /** Sizes divided by a number, rounded down. */
  quotients(dims: readonly Dim[], by: number, like: Item): Item {
    const { dtype, shape } = like.type;
    return this.dims(
      dims.map((d) => divDim(d, by)),
      dtype as "i64" | "i32",
      shape as readonly number[],
    );
  }

  /** The ops that compute sizes when the graph runs. */
  private sizes(dims: readonly Dim[], dtype: DType, shape: readonly number[]): Item {
    const one = (d: Dim): Item => {
      if (typeof d === "number") return this.number(d, "i64");
      return dimTerms(d)
        .map(({ coefficient, factors }) =>
          factors
            .map((f) => {
              if (typeof f === "string") return this.symbol(f);
              // floor(x / c) of integers, exactly
              const of = this.op("cast", [one(f.of)], { to: "f64" });
              return this.op("cast", [this.op("floor", [this.op("div", [of, this.number(f.by, "f64")])])], { to: "i64" });
            })
            .reduce((a, b) => this.op("mul", [a, b]), this.number(coefficient, "i64")),
        )
        .reduce((a, b) => this.op("add", [a, b]));
    };
    const parts = dims.map((d) => this.op("reshape", [one(d)], { shape: [1] }));
    const vector = parts.length === 1 ? (parts[0] as Item) : this.op("concat", parts, { axis: 0 });
    const wide = this.op("reshape", [vector], { shape });
    return dtype === "i64" ? wide : this.op("cast", [wide], { to: dtype });
  }

  private symbol(name: string): Item {
    const found = this.axes.get(name);
    if (!found) throw new UserError(`no input has an axis of size '${name}' alone, which a size is computed from`);
    return this.emit("size", [found.item], { axis: found.axis })[0] as Item;
  }

  // --- ops ---

  /** An op with one result; operands must fit, as the op's `infer` says. */
  op(kind: string, inputs: readonly Item[], attrs: Attrs = {}): Item {
    return this.ops(kind, inputs, attrs)[0] as Item;
  }

  ops(kind: string, inputs: readonly Item[], attrs: Attrs = {}): readonly Item[] {
    const types = inferTypes(
      kind,
      inputs.map((i) => i.type),
      attrs,
    ) as readonly TensorType[];
    for (const t of types) {
      if (t.shape.length > mostAxes) throw new UserError(`${kind}: a result of ${t.shape.length} axes, more than ${mostAxes}`);
      if (concrete(t) && count(t.shape) > mostElements)
        throw new UserError(`${kind}: ${typeText(t)} has more than 2^40 elements`);
    }
    const known = this.fold(kind, inputs, attrs, types);
    if (known && !inputs.some((i) => i.runs)) return known;
    const made = this.emit(kind, inputs, attrs);
    return known === undefined ? made : made.map((item, i) => ({ ...item, known: () => (known[i] as Item).known() }));
  }

  private emit(kind: string, inputs: readonly Item[], attrs: Attrs): readonly Item[] {
    const operands = inputs.map((i) => i.value());
    const values = this.builder.ops(kind, operands, attrs);
    for (const v of values) this.made.set(v.name, operands);
    return values.map((value) => ({ type: value.type as TensorType, known: () => undefined, runs: true, value: () => value }));
  }

  /** The results, when all operands are known and the op is of a kind that can be computed now. */
  private fold(kind: string, inputs: readonly Item[], attrs: Attrs, types: readonly TensorType[]): readonly Item[] | undefined {
    if (!types.every(concrete)) return undefined;
    const largest = Math.max(0, ...inputs.map((i) => (concrete(i.type) ? count(i.type.shape) : 0)));
    if (types.some((t) => count(t.shape as number[]) > Math.max(mostFolded, largest))) return undefined;
    // targets make long ones faster than they read them
    if (kind === "iota" && count(types[0]?.shape as number[]) > 256) return undefined;
    const known: Known[] = [];
    for (const i of inputs) {
      const k = i.known();
      if (k === undefined) return undefined;
      known.push(k);
    }
    if (known.every((k) => k.kind === "tensor")) {
      if (kind === "matmul" || kind === "linear") {
        const work = knowledge(kind).cost(
          inputs.map((i) => i.type),
          attrs,
          new Map(),
        ).flops;
        if (work > 1e8) return undefined;
      }
      const [type] = types;
      if (later.has(kind) && type && count(type.shape as number[]) > mostKept) {
        // cannot fail, and may never be wanted
        const read = (): Tensor =>
          knowledge(kind).evaluate(
            known.map((k) => k.tensor),
            attrs,
            types,
          )[0] as Tensor;
        return [this.stored({ type, name: "c", read })];
      }
      const tensors = known.map((k) => k.tensor);
      return knowledge(kind)
        .evaluate(tensors, attrs, types)
        .map((t) => this.constant(t as Tensor));
    }
    const dims = foldDims(kind, inputs, known, attrs, types[0] as TensorType, this.symbols);
    if (dims === undefined) return undefined;
    if ("kind" in dims) return [this.constant(dims)];
    const { dtype, shape } = types[0] as TensorType;
    return [this.dims(dims, dtype as "i64" | "i32", shape as readonly number[])];
  }

  // --- what is known ---

  /** Elements, where they are known. */
  tensorOf(item: Item): Tensor | undefined {
    const known = item.known();
    return known?.kind === "tensor" ? known.tensor : undefined;
  }

  /** Elements of integers as dims, where they are known. */
  dimsOf(item: Item): readonly Dim[] | undefined {
    const known = item.known();
    return known?.kind === "dims" ? known.dims : known && [...known.tensor.data];
  }

  /** Whether a <= b for all values of the symbols; undefined when that depends on them. */
  atMost(a: Dim, b: Dim): boolean | undefined {
    return compared("less_equal", a, b, this.symbols);
  }

  /** The inputs of the graph that a value depends on. */
  inputsOf(item: Item): readonly string[] {
    const seen = new Set<string>();
    const inputs: string[] = [];
    const todo = [item.value()];
    for (let v = todo.pop(); v !== undefined; v = todo.pop()) {
      if (seen.has(v.name)) continue;
      seen.add(v.name);
      const operands = this.made.get(v.name);
      if (operands) todo.push(...operands);
      else inputs.push(v.name);
    }
    return inputs;
  }

  // --- what nearly every lowering needs ---

  cast(x: Item, to: DType): Item {
    return x.type.dtype === to ? x : this.op("cast", [x], { to });
  }
  reshape(x: Item, shape: readonly Dim[]): Item {
    const same = shape.length === x.type.shape.length && shape.every((d, i) => d === x.type.shape[i]);
    return same ? x : this.op("reshape", [x], { shape: attrDims(shape) });
  }
  transpose(x: Item, perm: readonly number[]): Item {
    return perm.every((p, i) => p === i) ? x : this.op("transpose", [x], { perm });
  }
  broadcast(x: Item, shape: readonly Dim[]): Item {
    const same = shape.length === x.type.shape.length && shape.every((d, i) => d === x.type.shape[i]);
    return same ? x : this.op("broadcast", [x], { shape: attrDims(shape) });
  }
  slice(x: Item, axis: number, start: number, size: Dim, step: number = 1): Item {
    if (start === 0 && step === 1 && size === x.type.shape[axis]) return x;
    return this.op("slice", [x], { axis, start, size: attrDims([size]), ...(step === 1 ? {} : { step }) });
  }
  concat(xs: readonly Item[], axis: number): Item {
    return xs.length === 1 ? (xs[0] as Item) : this.op("concat", xs, { axis });
  }
  /** 0, 1, 2 ... along an axis of a shape. */
  iota(shape: readonly Dim[], axis: number, dtype: DType = "i64"): Item {
    return this.op("iota", [], { shape: attrDims(shape), axis, dtype });
  }
  /** An axis moved to the end, and the way back. */
  toLast(x: Item, axis: number): { readonly x: Item; back(y: Item): Item } {
    const rank = x.type.shape.length;
    const perm = [...Array.from({ length: rank }, (_, i) => i).filter((i) => i !== axis), axis];
    const back = Array.from({ length: rank }, (_, i) => perm.indexOf(i));
    return { x: this.transpose(x, perm), back: (y) => this.transpose(y, back) };
  }
}

/** Dims as an attribute holds them: all numbers, or all texts. */
export const attrDims = (dims: readonly Dim[]): readonly number[] | readonly string[] =>
  dims.every((d) => typeof d === "number") ? (dims as readonly number[]) : dims.map(String);

/** The largest and the smallest value of a dim, where every term grows with its symbols. */
const rangeOf = (d: Dim, symbols: ReadonlyMap<string, DimSymbol>): readonly [number, number] | undefined => {
  if (typeof d === "number") return [d, d];
  if (d.includes("-")) return undefined;
  const at = (end: "min" | "max"): number =>
    evalDim(d, new Map(dimSymbols(d).map((name) => [name, symbols.get(name)?.[end] ?? (end === "min" ? 0 : Infinity)])));
  return [at("min"), at("max")];
};

const divided = (a: Dim, b: Dim): Dim | undefined => {
  if (a === b) return 1;
  return typeof b === "number" && b > 0 ? divDim(a, b) : undefined;
};

const dimArithmetic: Readonly<Record<string, (a: Dim, b: Dim) => Dim | undefined>> = {
  add: addDim,
  sub: subDim,
  mul: mulDim,
};

/** A comparison of dims, where it is the same for all values of the symbols. */
const compared = (kind: string, a: Dim, b: Dim, symbols: ReadonlyMap<string, DimSymbol>): boolean | undefined => {
  if (a === b) return kind !== "less";
  const difference = rangeOf(subDim(a, b), symbols);
  const [ra, rb] = [rangeOf(a, symbols), rangeOf(b, symbols)];
  const [least, most] = difference ?? (ra && rb ? [ra[0] - rb[1], ra[1] - rb[0]] : [-Infinity, Infinity]);
  if (kind === "equal") return least > 0 || most < 0 ? false : undefined;
  if (kind === "less") return most < 0 ? true : least >= 0 ? false : undefined;
  return most <= 0 ? true : least > 0 ? false : undefined;
};

/** An op on integers that are dims: dims, or a tensor where symbols do not matter. Undefined where the result is not one of these. */
const foldDims = (
  kind: string,
  inputs: readonly Item[],
  known: readonly Known[],
  attrs: Attrs,
  type: TensorType,
  symbols: ReadonlyMap<string, DimSymbol>,
): readonly Dim[] | Tensor | undefined => {
  const shape = type.shape as readonly number[];
  const integers = (i: number): readonly Dim[] => {
    const k = known[i] as Known;
    return k.kind === "dims" ? k.dims : [...k.tensor.data];
  };
  /** operands by numbers that stand for dims, so that ops which only move elements move dims */
  const names: Dim[] = [];
  const tokens = (i: number): Tensor => ({
    kind: "tensor",
    dtype: "i64",
    shape: (inputs[i] as Item).type.shape as readonly number[],
    data: Float64Array.from(integers(i), (d) => names.push(d) - 1),
  });
  const moved = (operands: readonly Tensor[], how: string = kind, by: Attrs = attrs): readonly Dim[] => {
    const [result] = knowledge(how).evaluate(operands, by, [{ ...type, dtype: "i64" }]);
    return [...(result as Tensor).data].map((n) => names[n] as Dim);
  };
  const spread = (i: number): readonly Dim[] => moved([tokens(i)], "broadcast", { shape: [...shape] });
  switch (kind) {
    case "reshape":
    case "slice":
    case "transpose":
    case "broadcast":
      return moved([tokens(0)]);
    case "concat":
      return moved(inputs.map((_, i) => tokens(i)));
    case "take": {
      const index = known[1];
      return index?.kind === "tensor" ? moved([tokens(0), index.tensor]) : undefined;
    }
    case "cast":
      return ["i64", "i32"].includes(type.dtype) ? integers(0) : undefined;
    case "add":
    case "sub":
    case "mul": {
      if (type.dtype !== "i64" && type.dtype !== "i32") return undefined;
      const [a, b] = [spread(0), spread(1)];
      return a.map((x, i) => dimArithmetic[kind]?.(x, b[i] as Dim) as Dim);
    }
    case "div": {
      const [a, b] = [spread(0), spread(1)];
      const quotients = a.map((x, i) => divided(x, b[i] as Dim));
      return quotients.every((q) => q !== undefined) ? (quotients as readonly Dim[]) : undefined;
    }
    case "equal":
    case "less":
    case "less_equal": {
      const [a, b] = [spread(0), spread(1)];
      const truths = a.map((x, i) => compared(kind, x, b[i] as Dim, symbols));
      if (!truths.every((t) => t !== undefined)) return undefined;
      return { kind: "tensor", dtype: "bool", shape, data: Float64Array.from(truths as boolean[], Number) };
    }
    case "where": {
      const condition = known[0];
      if (condition?.kind !== "tensor") return undefined;
      const [a, b] = [spread(1), spread(2)];
      const [chosen] = knowledge("broadcast").evaluate([condition.tensor], {}, [{ ...type, dtype: "bool" }]);
      return a.map((x, i) => ((chosen as Tensor).data[i] === 0 ? (b[i] as Dim) : x));
    }
    case "reduce":
      if (attrs.fn === "prod" && count(shape) === 1) return [product(integers(0))];
      return undefined;
    default:
      return undefined;
  }
};
