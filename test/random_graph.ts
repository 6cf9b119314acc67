/**
 * Random row-wise graphs, the same for a seed everywhere, with inputs and, for each output, how far a right backend may be from the
 * interpreter. Every value carries the largest magnitude it can have and a bound of a backend's error; ops that jump (quantise, topk,
 * rounding, comparing) are only put where that error is 0, so no difference is ever excused by an unlucky tie.
 */
import {
  type Attrs,
  Builder,
  type DType,
  drawTensor,
  type Graph,
  type KvState,
  randomNumbers,
  rounder,
  type Tensor,
  tensor,
  type Value,
} from "../ir/index.ts";

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
  /** no element is larger in magnitude */
  readonly bound: number;
  /** every element is at least this, when it is known to be positive */
  readonly least: number;
  readonly error: number;
}

/** Half a unit in the last place, relative. */
const epsilon: Readonly<Partial<Record<DType, number>>> = { f32: 2 ** -24, bf16: 2 ** -8, f16: 2 ** -11 };

const largest = 2000;
/** elements of a weight */
const weightLimit = 20_000;

class Maker {
  readonly b: Builder;
  readonly inputs = new Map<string, Tensor>();
  readonly symbols: ReadonlyMap<string, number>;
  private readonly random: () => number;
  private readonly floats: readonly DType[];
  private readonly pool: Known[] = [];

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
    const type = { kind: "tensor", dtype, shape: [rows, columns] } as const;
    this.inputs.set(name, drawTensor(type, draw, this.random));
    const value = this.b.input(name, tensor(dtype, [factor === 1 ? "T" : `${factor}*T`, columns]));
    const bound = draw === "normal" ? 6 : draw === "unit" ? 1 : draw.below;
    return { value, dtype, factor, columns, bound, least: 0, error: 0 };
  }

  /** A weight with its values in the graph. */
  private weight(dtype: DType, shape: readonly number[], draw: "normal" | "positive", scale: number): Value {
    const round = rounder(dtype);
    const values = Array.from(drawTensor({ kind: "tensor", dtype: "f32", shape }, draw, this.random).data, (x) =>
      round(x * scale),
    );
    return this.b.weight(`w${this.b.size}_${this.below(1e6)}`, tensor(dtype, shape), { kind: "literal", values });
  }

  /** Puts a result in the pool: its error is `computed` and, where that is not 0, half a unit more of each rounding. */
  private put(value: Value, like: Omit<Known, "value" | "dtype" | "columns" | "error">, computed: number): Known {
    if (value.type.kind !== "tensor") throw new Error("a state is no result of a random op");
    const { dtype, shape } = value.type;
    const unit = (epsilon[dtype] ?? 0) * 2;
    const error = computed === 0 ? 0 : computed + unit * like.bound;
    const known = { ...like, value, dtype, columns: shape[1] as number, error };
    this.pool.push(known);
    return known;
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
    /** largest result, steepest slope over the range, least result */
    const [bound, slope, least] = ((): readonly [number, number, number] => {
      switch (kind) {
        case "exp":
          return [Math.exp(x.bound), Math.exp(x.bound), Math.exp(-x.bound)];
        case "log":
          return [Math.max(Math.abs(Math.log(x.bound)), Math.abs(Math.log(x.least))) + 1, 1 / x.least, 0];
        case "sqrt":
          return [Math.sqrt(x.bound), 0.5 / Math.sqrt(x.least), Math.sqrt(x.least)];
        case "rsqrt":
          return [1 / Math.sqrt(x.least), 0.5 / x.least ** 1.5, 1 / Math.sqrt(x.bound)];
        case "reciprocal":
          return [1 / x.least, 1 / x.least ** 2, 1 / x.bound];
        case "tanh":
        case "erf":
        case "sin":
        case "cos":
          return [1, 1.2, 0];
        case "sigmoid":
          return [1, 0.25, narrow ? 1 / (1 + Math.exp(x.bound)) / 2 : 0];
        case "floor":
        case "ceil":
        case "nearest":
          return [x.bound + 1, 1, 0];
        case "abs":
          return [x.bound, 1, x.least];
        default:
          return [x.bound, 1.2, 0];
      }
    })();
    const exact = ["neg", "abs", "floor", "ceil", "nearest", "reciprocal"].includes(kind);
    const own = exact ? 0 : 2 ** -19 * Math.max(bound, 1) + 2 ** -19 * slope * x.bound;
    this.put(y, { factor: x.factor, bound, least: least * 0.98 }, x.error * slope * 1.1 + own);
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
    const bound =
      kind === "mul"
        ? x.bound * y.bound
        : kind === "div"
          ? x.bound / y.least
          : kind === "add" || kind === "sub"
            ? x.bound + y.bound
            : Math.max(x.bound, y.bound);
    if (bound > largest) return;
    const error =
      kind === "mul"
        ? x.error * y.bound + y.error * x.bound + x.error * y.error
        : kind === "div"
          ? (x.error + bound * y.error) / (y.least * 0.9)
          : x.error + y.error;
    const least =
      kind === "mul"
        ? x.least * y.least
        : kind === "div"
          ? x.least / y.bound
          : kind === "sub"
            ? 0
            : kind === "add"
              ? x.least + y.least
              : Math.min(x.least, y.least);
    const swap = !scalar && this.below(2) === 0 && (kind === "add" || kind === "mul");
    const value = this.b.op(kind, swap ? [y.value, x.value] : [x.value, y.value]);
    this.put(value, { factor: x.factor, bound, least: least * 0.98 }, error);
  }

  /** Something positive, so that roots, logarithms and quotients have operands. */
  positive(): void {
    const x = this.any();
    const y = this.b.op("add", [this.b.op("abs", [x.value]), this.constant(x.dtype, 0.5)]);
    this.put(y, { factor: x.factor, bound: x.bound + 0.5, least: 0.49 }, x.error);
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
    this.put(value, { factor: x.factor, bound: Math.max(x.bound, y.bound), least: Math.min(x.least, y.least) }, y.error);
  }

  cast(): void {
    const x = this.any();
    const to = this.pick(this.floats.filter((d) => d !== x.dtype));
    if (to === undefined) return;
    // to a wider type nothing is lost; to a narrower one an error can tip a rounding
    this.put(this.b.op("cast", [x.value], { to }), { factor: x.factor, bound: x.bound * 1.01, least: x.least * 0.99 }, x.error);
  }

  integers(): void {
    const x = this.exact((k) => k.bound < 100);
    const y = this.b.op("cast", [x.value], { to: this.pick(["i32", "i8"] as const) });
    const z = this.b.op(this.pick(["add", "sub", "mul", "maximum", "minimum"]), [y, y]);
    this.put(this.b.op("cast", [z], { to: "f32" }), { factor: x.factor, bound: (x.bound + 1) ** 2, least: 0 }, 0);
  }

  reduce(): void {
    const x = this.any();
    const fn = this.pick(["sum", "max", "min", "mean", "amax"]);
    const group = this.pick([0, 0, 8, 32, 128]);
    const size = group === 0 ? x.columns : Math.min(group, x.columns);
    const sums = fn === "sum" || fn === "mean";
    const bound = fn === "sum" ? x.bound * size : x.bound;
    if (bound > largest) return;
    const value = this.b.op("reduce", [x.value], { fn, ...(group === 0 ? {} : { group }) });
    // sums may be taken in f32 in any order
    const own = sums && size > 1 ? size * x.bound * 2 ** -23 * Math.ceil(Math.log2(size) + 4) : 0;
    const error = fn === "sum" ? x.error * size + own : x.error + own;
    const least = fn === "sum" || fn === "mean" || fn === "min" || fn === "max" || fn === "amax" ? x.least : 0;
    const y = this.put(value, { factor: x.factor, bound, least: least * 0.98 }, error);
    if (this.below(2) === 0) {
      const spread = this.b.op("spread", [y.value], { group: group || x.columns, size: x.columns });
      this.put(spread, { factor: y.factor, bound: y.bound, least: y.least }, y.error);
    }
  }

  norm(): void {
    const x = this.any();
    const w = this.weight(x.dtype, [x.columns], "positive", 0.5);
    const eps = this.pick([1e-5, 0.01]);
    const value = this.b.op("rms_norm", [x.value, w], { eps });
    // a row of sqrt(N) equal elements at least: |x| / rms <= sqrt N; its slope is at most 2 / sqrt eps
    const bound = Math.sqrt(x.columns) * 2.1;
    if ((x.error * 4) / Math.sqrt(eps) > 1) return;
    this.put(
      value,
      { factor: x.factor, bound, least: 0 },
      (x.error * 8) / Math.sqrt(eps) + bound * ((epsilon[x.dtype] ?? 0) * 2 + 2 ** -18),
    );
  }

  softmax(): void {
    const x = this.any();
    if (x.error > 0.05) return;
    this.put(this.b.op("softmax", [x.value]), { factor: x.factor, bound: 1, least: 0 }, 3 * x.error + 2 ** -18 * (1 + x.bound));
  }

  linear(): void {
    const x = this.any();
    const scale = 1 / Math.sqrt(x.columns);
    const n = this.width(weightLimit / x.columns);
    const w = this.weight(x.dtype, [n, x.columns], "normal", scale);
    const bound = Math.min(6 * scale * x.bound * x.columns, x.bound * x.columns);
    if (bound > largest) return;
    const to = this.pick(this.floats);
    const value = this.b.op("linear", [x.value, w], to === x.dtype && this.below(2) === 0 ? {} : { to });
    this.put(value, { factor: x.factor, bound, least: 0 }, 3 * scale * x.columns * x.error + this.sumError(bound, x.columns));
  }

  /** Error of a sum of n products in f32, in any order and with or without fused multiply-add: `bound` is many deviations off. */
  private sumError(bound: number, n: number): number {
    return bound * 2 ** -25 * (Math.sqrt(n) + 4);
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
    const bound = (x.bound * k * 384 * 4.1) / (256 * Math.sqrt(k));
    if (bound > 4 * largest) return;
    this.put(value, { factor: x.factor, bound, least: 0 }, this.sumError(bound, k));
    if (this.below(2) === 0) this.dequantised(x, codes, scales, fp8 ? block[1] : k);
  }

  private dequantised(x: Known, codes: Value, scales: Value, group: number): void {
    const wide = this.b.op("cast", [codes], { to: "f32" });
    const value = this.b.op("mul", [wide, this.b.op("spread", [scales], { group, size: x.columns })]);
    this.put(value, { factor: x.factor, bound: x.bound * 1.1, least: 0 }, 0);
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
    const bound = 6 * scale * x.bound * x.columns;
    if (bound > largest) return;
    const attrs: Attrs = first === 0 && this.below(2) === 0 ? {} : { first };
    const w = this.weight(x.dtype, [owned, n, x.columns], "normal", scale);
    const y = this.b.op("grouped_linear", [x.value, w, ids], { to: "f32", ...attrs });
    const pairs = this.put(y, { factor: j, bound, least: 0 }, this.sumError(bound, x.columns));
    if (this.below(2) === 0) {
      const value = this.b.op("combine", [y, ids, weights], { first, count: owned });
      this.put(value, { factor: 1, bound: bound * j, least: 0 }, pairs.error * j + bound * j * 2 ** -21);
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
    const bound = (x.bound * k * 384 * 4.1) / (256 * Math.sqrt(k));
    if (bound <= 4 * largest) this.put(value, { factor: j, bound, least: 0 }, this.sumError(bound, k));
  }

  rotary(): void {
    const x = this.any();
    const dim = this.pick([2, 4, 16, 64].filter((d) => x.columns % d === 0));
    if (dim === undefined || x.factor !== 1) return;
    const positions = 16;
    const table = this.weight("f32", [positions, dim], "normal", 1 / 6);
    const name = `x${this.inputs.size}`;
    const rows = this.symbols.get("T") as number;
    this.inputs.set(name, drawTensor({ kind: "tensor", dtype: "i32", shape: [rows] }, { below: positions }, this.random));
    const position = this.b.input(name, tensor("i32", ["T"]));
    const value = this.b.op("rotary", [x.value, table, position], { heads: x.columns / dim, dim });
    this.put(value, { factor: 1, bound: 2 * x.bound, least: 0 }, 2 * x.error + x.bound * 2 ** -21);
  }

  gather(): void {
    const rows = 1 + this.below(20);
    const columns = this.width();
    const dtype = this.pick(this.floats);
    const table = this.weight(dtype, [rows, columns], "normal", 1);
    const name = `x${this.inputs.size}`;
    const tokens = this.symbols.get("T") as number;
    this.inputs.set(name, drawTensor({ kind: "tensor", dtype: "i32", shape: [tokens] }, { below: rows }, this.random));
    const value = this.b.op("gather", [table, this.b.input(name, tensor("i32", ["T"]))]);
    this.put(value, { factor: 1, bound: 6, least: 0 }, 0);
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
