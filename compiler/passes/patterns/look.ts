/** What patterns are written with: looking back from a value to the ops that made it, and saying in words what is not as it should be. */
import type { Builder } from "../../../ir/build.ts";
import type { Dim } from "../../../ir/dim.ts";
import type { Graph, Op, Value } from "../../../ir/graph.ts";
import { roundTo } from "../../../ir/round.ts";
import { type DType, dtypeBytes, type TensorType } from "../../../ir/type.ts";
import { type Flow, flowOf, usesOf } from "../flow.ts";

/** Why a pattern is not at a place. `near`: most of it was there, so that people may wonder. */
export class Miss extends Error {
  readonly near: boolean;
  constructor(why: string, near: boolean = false) {
    super(why);
    this.near = near;
  }
}
export const miss = (why: string): never => {
  throw new Miss(why);
};

/** From here on a miss is a near one. */
export const near = <R>(work: () => R): R => {
  try {
    return work();
  } catch (error) {
    throw error instanceof Miss ? new Miss(error.message, true) : error;
  }
};

/** The first of some ways that fits; else the miss of the way that came nearest. */
export const either = <R>(...ways: readonly (() => R)[]): R => {
  let best: Miss | undefined;
  for (const way of ways)
    try {
      return way();
    } catch (error) {
      if (!(error instanceof Miss)) throw error;
      if (best === undefined || (error.near && !best.near)) best = error;
    }
  throw best ?? new Miss("there is no way");
};

/** A pattern with what it finds taken out of its type: `at` gives the maker of what stands for the op's results, or throws a Miss. */
export interface Pattern {
  /** the kind of op that it makes */
  readonly name: string;
  /** kinds of the op whose result is the pattern's */
  readonly roots: readonly string[];
  at(op: Op, g: Look): (b: Builder) => readonly Value[];
}

export interface PatternOf<Found> {
  readonly name: string;
  readonly roots: readonly string[];
  /** the operands; throws a Miss that says what is not as it should be */
  match(op: Op, g: Look): Found;
  /** what stands for the op's results */
  build(b: Builder, found: Found, op: Op): Value | readonly Value[];
}
export const pattern = <Found>({ name, roots, match, build }: PatternOf<Found>): Pattern => ({
  name,
  roots,
  at(op, g) {
    const found = match(op, g);
    return (b) => [build(b, found, op)].flat();
  },
});

export const typeOf = (v: Value): TensorType => v.type as TensorType;
export const shapeOf = (v: Value): readonly Dim[] => typeOf(v).shape;
export const cast = (b: Builder, x: Value, to: DType): Value => (typeOf(x).dtype === to ? x : b.op("cast", [x], { to }));
export const reshaped = (b: Builder, x: Value, shape: readonly Dim[]): Value =>
  shape.length === shapeOf(x).length && shape.every((d, i) => d === shapeOf(x)[i])
    ? x
    : b.op("reshape", [x], { shape: shape.every((d) => typeof d === "number") ? (shape as number[]) : shape.map(String) });

const working: readonly DType[] = ["f32", "bf16", "f16"];
const isWorking = (v: Value | undefined): boolean => v?.type.kind === "tensor" && working.includes(v.type.dtype);

/** Whether a constant is this number, in f32 or as a shorter float has it. */
export const isNumber = (x: number | undefined, wanted: number): boolean =>
  x !== undefined &&
  (Math.abs(x - wanted) <= 1e-6 * Math.abs(wanted) || (["f16", "bf16"] as const).some((d) => roundTo(d, wanted) === x));

/** A product as a number times other values. */
export interface Product {
  readonly by: number;
  readonly factors: readonly Value[];
}

export class Look {
  private readonly flow: Flow;
  private readonly literals: ReadonlyMap<string, number>;

  constructor(g: Graph) {
    this.flow = flowOf(g);
    this.literals = new Map(
      g.weights.flatMap(({ value, source }) =>
        source.kind === "literal" && source.values.length > 0 && source.values.every((x) => x === source.values[0])
          ? [[value.name, source.values[0] as number] as const]
          : [],
      ),
    );
  }

  maker(v: Value | undefined): Op | undefined {
    return v && this.flow.producer.get(v.name);
  }
  users(v: Value): readonly Op[] {
    return usesOf(this.flow, v);
  }
  isOutput(v: Value): boolean {
    return this.flow.outputs.has(v.name);
  }

  /** The value without conversions between the floats that models compute in: patterns round once, to the dtype of their result. */
  bare(v: Value): Value {
    let now = v;
    for (let op = this.maker(now); op?.kind === "cast" && isWorking(now) && isWorking(op.inputs[0]); op = this.maker(now))
      now = op.inputs[0] as Value;
    return now;
  }
  /** The value at its narrowest on the way through such conversions: as many bits as its elements have. */
  operand(v: Value): Value {
    let [now, best] = [v, v];
    for (let op = this.maker(now); op?.kind === "cast" && isWorking(now) && isWorking(op.inputs[0]); op = this.maker(now)) {
      now = op.inputs[0] as Value;
      if (dtypeBytes(typeOf(now).dtype) <= dtypeBytes(typeOf(best).dtype)) best = now;
    }
    return best;
  }
  /** The value as it is held in a dtype on that way. */
  heldIn(v: Value, dtype: DType): Value | undefined {
    for (let now: Value | undefined = v; now !== undefined && isWorking(now); ) {
      if (typeOf(now).dtype === dtype) return now;
      const op = this.maker(now);
      now = op?.kind === "cast" ? op.inputs[0] : undefined;
    }
    return undefined;
  }
  /** The dtype that a result is converted to, where nothing else is done with it; its own otherwise. */
  usedAs(op: Op): DType {
    const [out] = op.outputs as readonly [Value];
    const [user, ...others] = this.users(out);
    const isOnly = user?.kind === "cast" && others.length === 0 && !this.isOutput(out);
    return isOnly && isWorking(user.outputs[0]) ? (user.attrs.to as DType) : typeOf(out).dtype;
  }
  /** Operands in the dtype that a result is used as, where all of them are held in it: else at their narrowest, for the result's own dtype. */
  narrowed(op: Op, operands: readonly Value[]): { readonly dtype: DType; readonly operands: readonly Value[] } {
    const dtype = this.usedAs(op);
    const held = operands.map((v) => this.heldIn(v, dtype));
    if (held.every((v) => v !== undefined)) return { dtype, operands: held };
    return { dtype: typeOf(op.outputs[0] as Value).dtype, operands: operands.map((v) => this.operand(v)) };
  }
  /** A value as large as the result that patterns replace. */
  sized(op: Op, x: Value): void {
    const [own, wanted] = [shapeOf(x), shapeOf(op.outputs[0] as Value)];
    if (own.length !== wanted.length || own.some((d, i) => d !== wanted[i])) miss(`'${x.name}' is repeated along axes`);
  }
  /** Whether two values are one, conversions aside. */
  same(a: Value, b: Value): boolean {
    return this.bare(a).name === this.bare(b).name;
  }

  /** The op that makes a value, which must be of a kind. */
  made(v: Value, kind: string, what: string = "a value"): Op {
    const op = this.maker(this.bare(v));
    return op?.kind === kind ? op : miss(`${what} is ${op === undefined ? `'${v.name}'` : `made by ${op.kind}`}, not ${kind}`);
  }
  /** The operands of a commutative op, in both orders. */
  both<R>(op: Op, work: (x: Value, y: Value) => R): R {
    const [x, y] = op.inputs as readonly [Value, Value];
    return either(
      () => work(x, y),
      () => work(y, x),
    );
  }

  /** What all elements of a constant are. */
  number(v: Value | undefined): number | undefined {
    if (v === undefined) return undefined;
    const op = this.maker(v);
    if (op === undefined) return this.literals.get(v.name);
    if (op.kind === "const") return op.attrs.value as number;
    return ["cast", "reshape", "broadcast"].includes(op.kind) ? this.number(op.inputs[0]) : undefined;
  }
  constant(v: Value, wanted: number, what: string): void {
    const x = this.number(v);
    if (!isNumber(x, wanted)) miss(`${what} is ${x ?? `'${v.name}'`}, not ${wanted}`);
  }

  /** Products, and quotients by numbers, as one number times the rest; `depth` keeps powers of powers from growing without end. */
  product(v: Value, depth: number = 6): Product {
    const known = this.number(v);
    if (known !== undefined) return { by: known, factors: [] };
    const op = this.maker(this.bare(v));
    const [x, y] = op?.inputs ?? [];
    if (depth > 0 && op?.kind === "mul") {
      const [a, b] = [this.product(x as Value, depth - 1), this.product(y as Value, depth - 1)];
      return { by: a.by * b.by, factors: [...a.factors, ...b.factors] };
    }
    if (depth > 0 && op?.kind === "neg") {
      const a = this.product(x as Value, depth - 1);
      return { by: -a.by, factors: a.factors };
    }
    const divisor = depth > 0 && op?.kind === "div" ? this.number(y) : undefined;
    if (divisor !== undefined && divisor !== 0) {
      const a = this.product(x as Value, depth - 1);
      return { by: a.by / divisor, factors: a.factors };
    }
    return { by: 1, factors: [this.operand(v)] };
  }
  /** A value as a number times one other value. */
  scaled(v: Value): { readonly by: number; readonly x: Value } {
    const op = this.maker(this.bare(v));
    const [x, y] = op?.inputs ?? [];
    const by = op?.kind === "mul" ? (this.number(y) ?? this.number(x)) : op?.kind === "div" ? this.number(y) : undefined;
    if (by === undefined || by === 0) return { by: 1, x: this.operand(v) };
    const inner = this.scaled((op?.kind === "mul" && this.number(y) === undefined ? y : x) as Value);
    return { by: op?.kind === "mul" ? inner.by * by : inner.by / by, x: inner.x };
  }

  /** x of the mean of x over its last axis, which stays as one. */
  mean(v: Value): Value {
    const op = this.maker(this.bare(v));
    const { by, x } = this.scaled(v);
    const reduce = op?.kind === "reduce" ? op : this.maker(this.bare(x));
    if (reduce?.kind !== "reduce") {
      const source = reduce?.kind === "reshape" ? this.maker(reduce.inputs[0]) : undefined;
      const moved = source?.kind === "reduce" ? this.maker(source.inputs[0]) : undefined;
      if (moved?.kind === "transpose")
        return miss(`the mean is over axis ${(moved.attrs.perm as readonly number[]).at(-1)}, not the last`);
      return miss(`'${v.name}' is no mean`);
    }
    const of = reduce.inputs[0] as Value;
    const { fn, group = 0 } = reduce.attrs as { readonly fn: string; readonly group?: number };
    const columns = shapeOf(of).at(-1);
    const whole = group === 0 || group === columns;
    if (!whole) return miss(`the mean is over groups of ${group}, not the last axis`);
    if (fn === "mean" && by === 1) return this.bare(of);
    if (fn === "sum" && typeof columns === "number" && isNumber(by, 1 / columns)) return this.bare(of);
    return miss(`the reduction is a ${fn}, not a mean`);
  }
  square(v: Value): Value {
    const op = this.maker(this.bare(v));
    const [x, y] = (op?.inputs ?? []) as [Value?, Value?];
    if (op?.kind === "mul" && x && y && this.same(x, y)) return this.bare(x);
    if (op?.kind === "pow" && x && isNumber(this.number(y), 2)) return this.bare(x);
    return miss("the mean is of no square");
  }
  /** s of 1 / sqrt s */
  inverseRoot(v: Value): Value {
    const op = this.maker(this.bare(v));
    const [x, y] = (op?.inputs ?? []) as [Value, Value];
    switch (op?.kind) {
      case "rsqrt":
        return x;
      case "reciprocal":
        return this.made(x, "sqrt", "the reciprocal's operand").inputs[0] as Value;
      case "div":
        this.constant(x, 1, "the dividend");
        return this.made(y, "sqrt", "the divisor").inputs[0] as Value;
      case "pow":
        this.constant(y, -0.5, "the exponent");
        return x;
      default:
        return miss(`'${v.name}' is no reciprocal of a root`);
    }
  }
  /** x and s of x / sqrt s */
  overRoot(v: Value): { readonly x: Value; readonly s: Value } {
    const op = this.maker(this.bare(v));
    const [x, y] = (op?.inputs ?? []) as [Value, Value];
    if (op?.kind === "div") return { x: this.operand(x), s: this.made(y, "sqrt", "the divisor").inputs[0] as Value };
    if (op?.kind === "mul") return this.both(op, (a, b) => ({ x: this.operand(a), s: this.inverseRoot(b) }));
    return miss(`'${v.name}' is nothing divided by a root`);
  }
  /** A value plus a number. */
  plusNumber(v: Value, what: string): { readonly x: Value; readonly number: number } {
    const op = this.made(v, "add", what);
    return this.both(op, (x, y) => ({ x, number: this.number(y) ?? miss(`${what} has no constant added`) }));
  }
}
