/**
 * Random row-wise graphs, the same for a seed everywhere, with inputs and, for each output, how far a right backend may be from the
 * interpreter on them. Each value is evaluated as it is made, so that ranges stay safe, and carries a bound of a backend's error; ops that
 * jump (quantise, topk, rounding, comparing) are only put where that error is 0, so no difference is ever excused by an unlucky tie.
 */
import {
  type Attrs,
  Builder,
  type Datum,
  type DType,
  drawTensor,
  type Graph,
  type KvState,
  knowledge,
  type Op,
  randomNumbers,
  rounder,
  type Tensor,
  tensor,
  type Value,
} from "../ir/index.ts";
import { interpret } from "../ir/interpret.ts";

export interface RandomCase {
  readonly seed: number;
  readonly graph: Graph;
  readonly inputs: ReadonlyMap<string, Tensor>;
  readonly states: ReadonlyMap<string, KvState>;
  readonly symbols: ReadonlyMap<string, number>;
  /** largest absolute difference by output; 0: the same bits */
  readonly tolerance: ReadonlyMap<string, number>;
}

export interface RandomOptions {
  /** ops to add; 12 unless given */
  readonly ops?: number;
  /** element types of the floats; f32 and bf16 unless given */
  readonly floats?: readonly ("f32" | "bf16" | "f16")[];
  /** rows of T at run time; random from 0 to 6 unless given */
  readonly rows?: number;
}

/** A value with what is known of its numbers. `factor`: rows of it per token. */
interface Known {
  readonly value: Value;
  readonly dtype: DType;
  readonly factor: number;
  readonly columns: number;
  /** the largest magnitude of an element */
  readonly bound: number;
  /** the least element, when all are positive; else 0 */
  readonly least: number;
  /** how far a right backend may be off */
  readonly error: number;
}

/** Half a unit in the last place, relative. */
const epsilon: Readonly<Partial<Record<DType, number>>> = { f32: 2 ** -24, bf16: 2 ** -8, f16: 2 ** -11 };

const largest = 2000;

/** Of no elements, any will do: then every range is [1, 1]. */
const range = ({ data }: Tensor): { readonly bound: number; readonly least: number } => {
  if (data.length === 0) return { bound: 1, least: 1 };
  let [bound, least] = [0, Number.POSITIVE_INFINITY];
  for (const x of data) [bound, least] = [Math.max(bound, Math.abs(x)), Math.min(least, x)];
  return { bound, least: Math.max(0, least) };
};

/** elements of a weight */
const weightLimit = 20_000;

class Maker {
  readonly b: Builder;
  readonly inputs = new Map<string, Tensor>();
  readonly symbols: ReadonlyMap<string, number>;
  private readonly random: () => number;
  private readonly floats: readonly DType[];
  private readonly pool: Known[] = [];
  /** what every value is, on the inputs of the case */
  private readonly values = new Map<string, Datum>();
  private settled = 0;
  private weights = 0;

  constructor(seed: number, options: RandomOptions) {
    this.random = randomNumbers(seed);
    this.floats = options.floats ?? ["f32", "bf16"];
    const max = 1 + this.below(6);
    const rows = options.rows ?? (this.below(16) === 0 ? 0 : 1 + this.below(max));
    this.symbols = new Map([["T", rows]]);
    this.b = new Builder(`random${seed}`, [{ name: "T", min: 0, max: Math.max(max, rows), multiple: 1, source: "host" }]);
    for (let i = 0; i < 2; i++) this.pool.push(this.input(this.pick(this.floats), 1, this.width(), "normal"));
  }

  below(n: number): number {
    return Math.floor(this.random() * n);
  }
  pick<X>(xs: readonly X[]): X {
    return xs[this.below(xs.length)] as X;
  }
  /** Columns: small ones, and around the sizes that kernels split at; at most `limit`, which keeps weights small enough to read. */
  private width(limit = 256): number {
    return this.pick([1, 3, 8, 16, 20, 33, 64, 127, 128, 130, 200, 256].filter((n) => n <= Math.max(1, limit)));
  }

  private input(dtype: DType, factor: number, columns: number, draw: "normal" | "unit" | { below: number }): Known {
    const name = `x${this.inputs.size}`;
    const rows = factor * (this.symbols.get("T") as number);
    const data = drawTensor({ kind: "tensor", dtype, shape: [rows, columns] }, draw, this.random);
    this.inputs.set(name, data);
    this.values.set(name, data);
    const value = this.b.input(name, tensor(dtype, [factor === 1 ? "T" : `${factor}*T`, columns]));
    return { value, dtype, factor, columns, ...range(data), error: 0 };
  }

  /** One integer below `below` for each token. */
  private indices(below: number): Value {
    const name = `x${this.inputs.size}`;
    const rows = this.symbols.get("T") as number;
    const data = drawTensor({ kind: "tensor", dtype: "i32", shape: [rows] }, { below }, this.random);
    this.inputs.set(name, data);
    this.values.set(name, data);
    return this.b.input(name, tensor("i32", ["T"]));
  }

  /** A weight with its values in the graph. */
  private weight(dtype: DType, shape: readonly number[], draw: "normal" | "positive", scale: number): Value {
    const round = rounder(dtype);
    const values = Array.from(drawTensor({ kind: "tensor", dtype: "f32", shape }, draw, this.random).data, (x) =>
      round(x * scale),
    );
    const value = this.b.weight(`w${this.weights++}`, tensor(dtype, shape), { kind: "literal", values });
    this.values.set(value.name, { kind: "tensor", dtype, shape, data: Float64Array.from(values) });
    return value;
  }

  /** Evaluates what has been added since. */
  private settle(): void {
    const ops = this.b.build().ops.slice(this.settled);
    interpret(ops, this.values, this.symbols, knowledge);
    this.settled += ops.length;
  }

  private dataOf(value: Value): Tensor {
    this.settle();
    return this.values.get(value.name) as Tensor;
  }

  /** Puts a result in the pool: its error is `computed` and, where that is not 0, a unit more, as a rounding may go the other way. */
  private put(value: Value, factor: number, computed: number): Known {
    const data = this.dataOf(value);
    const known = { value, dtype: data.dtype, factor, columns: data.shape[1] as number, ...range(data) };
    const error = computed === 0 ? 0 : computed * 1.1 + (epsilon[data.dtype] ?? 0) * 2 * known.bound;
    const whole = { ...known, error };
    this.pool.push(whole);
    return whole;
  }

  /** The largest result of the last op on the magnitudes of its inputs, unrounded: what errors of its sums are relative to. */
  private magnitude(replaced: ReadonlyMap<string, number> = new Map()): number {
    const op = this.b.build().ops.at(-1) as Op;
    this.settle();
    const inputs = op.inputs.map((v): Datum => {
      const t = this.values.get(v.name) as Tensor;
      if (t.dtype === "i32") return t;
      const error = replaced.get(v.name);
      return { ...t, data: t.data.map((x) => error ?? Math.abs(x)) };
    });
    const shape = (this.values.get(op.outputs[0]?.name ?? "") as Tensor).shape;
    const [sums] = knowledge(op.kind).evaluate(inputs, op.attrs, [tensor("f64", shape)]) as readonly [Tensor];
    return range(sums).bound;
  }

  private floatsInPool(test: (k: Known) => boolean = () => true): readonly Known[] {
    return this.pool.filter((k) => this.floats.includes(k.dtype) && test(k));
  }

  /** Something whose numbers are sure to be the same everywhere; made afresh when there is none. */
  private exact(test: (k: Known) => boolean = () => true): Known {
    const found = this.floatsInPool((k) => k.error === 0 && test(k));
    return found.length > 0 ? this.pick(found) : this.input(this.pick(this.floats), 1, this.width(), "normal");
  }

  private any(): Known {
    return this.pick(this.floatsInPool());
  }

  private constant(dtype: DType, value: number): Value {
    return this.b.op("const", [], { value, dtype });
  }

  /** One op of unary kind; f32 arithmetic of a few units' error for the functions, none for exact ones. */
  unary(): void {
    const x = this.any();
    const narrow = x.bound <= 8;
    const kind = this.pick([
      "neg",
      "abs",
      "tanh",
      "erf",
      "sigmoid",
      "silu",
      "gelu",
      ...(narrow ? ["exp", "sin", "cos"] : []),
      ...(x.least > 0 && x.error < x.least / 100 ? ["log", "sqrt", "rsqrt", "reciprocal"] : []),
      ...(x.error === 0 ? ["floor", "ceil", "nearest"] : []),
    ]);
    const attrs: Attrs = kind === "gelu" && this.below(2) === 0 ? { approximate: "tanh" } : {};
    const y = this.b.op(kind, [x.value], attrs);
    /** the steepest slope over the range */
    const slope = ((): number => {
      switch (kind) {
        case "exp":
          return Math.exp(x.bound);
        case "log":
        case "reciprocal":
          return 1 / x.least ** (kind === "log" ? 1 : 2);
        case "sqrt":
          return 0.5 / Math.sqrt(x.least);
        case "rsqrt":
          return 0.5 / x.least ** 1.5;
        default:
          return 1.2;
      }
    })();
    const exact = ["neg", "abs", "floor", "ceil", "nearest", "reciprocal"].includes(kind);
    const bound = range(this.dataOf(y)).bound;
    this.put(y, x.factor, x.error * slope + (exact ? 0 : 2 ** -20 * (bound + slope * Math.min(x.bound, 1))));
  }

  binary(): void {
    const x = this.any();
    const kind = this.pick(["add", "sub", "mul", "maximum", "minimum", "div", "add", "mul"]);
    const others = this.floatsInPool(
      (k) => k.dtype === x.dtype && k.factor === x.factor && (k.columns === x.columns || k.columns === 1 || x.columns === 1),
    );
    const scalar = this.below(4) === 0;
    const c = Math.round((0.25 + 2 * this.random()) * 8) / 8;
    const y: Known = scalar
      ? { ...x, value: this.constant(x.dtype, c), columns: 1, bound: c, least: c, error: 0 }
      : this.pick(others);
    if (kind === "div" && (y.least <= 0 || y.error > y.least / 100)) return;
    if (kind === "mul" && x.bound * y.bound > largest) return;
    if (kind === "div" && x.bound / y.least > largest) return;
    if (x.bound + y.bound > largest) return;
    const error =
      kind === "mul"
        ? x.error * y.bound + y.error * x.bound + x.error * y.error
        : kind === "div"
          ? (x.error + (x.bound / y.least) * y.error) / (y.least * 0.9)
          : x.error + y.error;
    const swap = !scalar && this.below(2) === 0 && (kind === "add" || kind === "mul");
    const value = this.b.op(kind, swap ? [y.value, x.value] : [x.value, y.value]);
    this.put(value, x.factor, error);
  }

  /** Something positive, so that roots, logarithms and quotients have operands. */
  positive(): void {
    const x = this.any();
    const y = this.b.op("add", [this.b.op("abs", [x.value]), this.constant(x.dtype, 0.5)]);
    this.put(y, x.factor, x.error);
  }

  select(): void {
    const x = this.exact();
    const others = this.floatsInPool((k) => k.factor === x.factor && k.columns === x.columns && k.dtype === x.dtype);
    const y = this.pick(others);
    const exact = this.pick(others.filter((k) => k.error === 0));
    const condition = this.b.op(this.pick(["less", "less_equal", "equal"]), [x.value, exact.value]);
    const not = this.below(2) === 0 ? this.b.op("not", [condition]) : condition;
    const both = this.below(2) === 0 ? this.b.op(this.pick(["and", "or"]), [not, condition]) : not;
    const value = this.b.op("where", [both, x.value, y.value]);
    this.put(value, x.factor, y.error);
  }

  cast(): void {
    const x = this.any();
    const to = this.pick(this.floats.filter((d) => d !== x.dtype));
    if (to === undefined) return;
    this.put(this.b.op("cast", [x.value], { to }), x.factor, x.error);
  }

  integers(): void {
    const x = this.exact((k) => k.bound < 100);
    const y = this.b.op("cast", [x.value], { to: this.pick(["i32", "i8"] as const) });
    const z = this.b.op(this.pick(["add", "sub", "mul", "maximum", "minimum"]), [y, y]);
    this.put(this.b.op("cast", [z], { to: "f32" }), x.factor, 0);
  }

  reduce(): void {
    const x = this.any();
    const fn = this.pick(["sum", "max", "min", "mean", "amax"]);
    const group = this.pick([0, 0, 8, 32, 128]);
    const size = group === 0 ? x.columns : Math.min(group, x.columns);
    if (fn === "sum" && x.bound * size > 4 * largest) return;
    const value = this.b.op("reduce", [x.value], { fn, ...(group === 0 ? {} : { group }) });
    // sums may be taken in f32 in any order
    const sums = (fn === "sum" || fn === "mean") && size > 1;
    const own = sums ? this.sumError(this.magnitude(), size) : 0;
    const y = this.put(value, x.factor, x.error * (fn === "sum" ? size : 1) + own);
    if (this.below(2) === 0)
      this.put(this.b.op("spread", [y.value], { group: group || x.columns, size: x.columns }), y.factor, y.error);
  }

  norm(): void {
    const x = this.any();
    const w = this.weight(x.dtype, [x.columns], "positive", 0.5);
    const eps = this.pick([1e-5, 0.01]);
    const value = this.b.op("rms_norm", [x.value, w], { eps });
    // d(x / rms) is at most 2 |dx| sqrt(N) / rms; the least rms of a row counts
    const data = this.dataOf(x.value).data;
    let rms = Number.POSITIVE_INFINITY;
    for (let row = 0; row < data.length; row += x.columns)
      rms = Math.min(rms, Math.sqrt(data.subarray(row, row + x.columns).reduce((a, v) => a + v * v, 0) / x.columns + eps));
    const steep = (2 * 2 * Math.sqrt(x.columns)) / rms;
    const bound = range(this.dataOf(value)).bound;
    // the inner rounding can go the other way too
    this.put(value, x.factor, x.error * steep + bound * ((epsilon[x.dtype] ?? 0) * 2 + 2 ** -20));
  }

  softmax(): void {
    const x = this.any();
    if (x.error > 0.05) return;
    this.put(this.b.op("softmax", [x.value]), x.factor, 3 * x.error + 2 ** -20 * (1 + Math.min(x.bound, 30)));
  }

  linear(): void {
    const x = this.any();
    const scale = 1 / Math.sqrt(x.columns);
    const n = this.width(weightLimit / x.columns);
    const w = this.weight(x.dtype, [n, x.columns], "normal", scale);
    if (x.bound > largest) return;
    const to = this.pick(this.floats);
    const value = this.b.op("linear", [x.value, w], to === x.dtype && this.below(2) === 0 ? {} : { to });
    const inherited = x.error === 0 ? 0 : this.magnitude(new Map([[x.value.name, x.error]]));
    this.put(value, x.factor, inherited + this.sumError(this.magnitude(), x.columns));
  }

  /** Error of a sum of n products in f32, in any order and with or without fused multiply-add; `sum` is that of their magnitudes. */
  private sumError(sum: number, n: number): number {
    return sum * 2 ** -24 * (2 * Math.sqrt(n) + 4);
  }

  /** Codes and scales of something exact, then what the precision policies make of a linear. */
  scaled(): void {
    const x = this.exact();
    const k = x.columns;
    const n = this.width(weightLimit / k);
    const fp8 = this.below(2) === 0;
    const to = fp8 ? "e4m3" : "i8";
    const block: readonly [number, number] = fp8
      ? this.pick([
          [128, 128],
          [32, 32],
        ])
      : [1, k];
    const [codes, scales] = this.b.ops("quantise", [x.value], fp8 ? { to, group: block[1] } : { to }) as [Value, Value];
    const w = this.weight(to, [n, k], "normal", fp8 ? 64 : 30);
    const rows = Math.ceil(n / block[0]);
    const columns = Math.ceil(k / block[1]);
    const ws = this.weight("f32", [rows, columns], "positive", 1 / (256 * Math.sqrt(k)));
    const out = this.pick(this.floats);
    const value = this.b.op("scaled_linear", [codes, scales, w, ws], { to: out, block });
    this.put(value, x.factor, this.sumError(this.magnitude(), k));
    if (this.below(2) === 0) this.dequantised(x, codes, scales, fp8 ? block[1] : k);
  }

  private dequantised(x: Known, codes: Value, scales: Value, group: number): void {
    const wide = this.b.op("cast", [codes], { to: "f32" });
    const value = this.b.op("mul", [wide, this.b.op("spread", [scales], { group, size: x.columns })]);
    this.put(value, x.factor, 0);
  }

  /** Rows sent to experts and combined again. */
  experts(): void {
    const x = this.exact((k) => k.factor === 1);
    const e = 1 + this.below(6);
    const j = 1 + this.below(Math.min(3, e));
    const first = this.below(3) === 0 ? this.below(e) : 0;
    const owned = first === 0 ? e : 1 + this.below(e - first);
    const [weights, ids] = this.route(e, j);
    const n = this.width(weightLimit / (x.columns * owned));
    const scale = 1 / Math.sqrt(x.columns);
    const attrs: Attrs = first === 0 && this.below(2) === 0 ? {} : { first };
    const w = this.weight(x.dtype, [owned, n, x.columns], "normal", scale);
    const y = this.b.op("grouped_linear", [x.value, w, ids], { to: "f32", ...attrs });
    const pairs = this.put(y, j, this.sumError(this.magnitude(), x.columns));
    if (this.below(2) === 0) {
      const value = this.b.op("combine", [y, ids, weights], { first, count: owned });
      this.put(value, 1, pairs.error * j + this.magnitude() * 2 ** -22);
    } else this.scaledExperts(x, ids, owned, first, j);
  }

  /** Weights and expert ids of each token: topk of an input. */
  private route(e: number, j: number): readonly [Value, Value] {
    const p = this.input("f32", 1, e, this.below(3) === 0 ? { below: 2 } : "unit");
    const [weights, ids] = this.b.ops("topk", [p.value], { k: j }) as [Value, Value];
    return [weights, ids];
  }

  private scaledExperts(x: Known, ids: Value, owned: number, first: number, j: number): void {
    const k = x.columns;
    const n = this.width(weightLimit / (k * owned));
    const fp8 = this.below(2) === 0;
    const to = fp8 ? "e4m3" : "i8";
    const block: readonly [number, number] = fp8 ? [128, 128] : [1, k];
    const [codes, scales] = this.b.ops("quantise", [x.value], fp8 ? { to, group: 128 } : { to }) as [Value, Value];
    const w = this.weight(to, [owned, n, k], "normal", fp8 ? 64 : 30);
    const ws = this.weight(
      "f32",
      [owned, Math.ceil(n / block[0]), Math.ceil(k / block[1])],
      "positive",
      1 / (256 * Math.sqrt(k)),
    );
    const value = this.b.op("scaled_grouped_linear", [codes, scales, w, ws, ids], { to: "f32", block, first });
    this.put(value, j, this.sumError(this.magnitude(), k));
  }

  rotary(): void {
    const x = this.any();
    const dim = this.pick([2, 4, 16, 64].filter((d) => x.columns % d === 0));
    if (dim === undefined || x.factor !== 1) return;
    const positions = 16;
    const table = this.weight("f32", [positions, dim], "normal", 1 / 6);
    const position = this.indices(positions);
    const value = this.b.op("rotary", [x.value, table, position], { heads: x.columns / dim, dim });
    this.put(value, 1, 2 * x.error + x.bound * 2 ** -22);
  }

  gather(): void {
    const rows = 1 + this.below(20);
    const columns = this.width();
    const dtype = this.pick(this.floats);
    const table = this.weight(dtype, [rows, columns], "normal", 1);
    this.put(this.b.op("gather", [table, this.indices(rows)]), 1, 0);
  }

  finish(seed: number): RandomCase {
    const used = new Set(this.b.build().ops.flatMap((op) => op.inputs.map((v) => v.name)));
    const tolerance = new Map<string, number>();
    for (const k of this.pool) {
      if (used.has(k.value.name) || this.inputs.has(k.value.name)) continue;
      this.b.output(k.value);
      tolerance.set(k.value.name, k.error);
    }
    if (tolerance.size === 0) {
      const [x] = this.pool as [Known];
      const y = this.b.op("neg", [x.value]);
      this.b.output(y);
      tolerance.set(y.name, x.error);
    }
    return { seed, graph: this.b.build(), inputs: this.inputs, states: new Map(), symbols: this.symbols, tolerance };
  }
}

/** The random graph of a seed. */
export const randomCase = (seed: number, options: RandomOptions = {}): RandomCase => {
  const m = new Maker(seed, options);
  const steps: readonly (() => void)[] = [
    () => m.unary(),
    () => m.unary(),
    () => m.unary(),
    () => m.binary(),
    () => m.binary(),
    () => m.binary(),
    () => m.positive(),
    () => m.select(),
    () => m.cast(),
    () => m.integers(),
    () => m.reduce(),
    () => m.reduce(),
    () => m.norm(),
    () => m.softmax(),
    () => m.linear(),
    () => m.scaled(),
    () => m.experts(),
    () => m.rotary(),
    () => m.gather(),
  ];
  for (let i = 0; i < (options.ops ?? 12); i++) m.pick(steps)();
  return m.finish(seed);
};
