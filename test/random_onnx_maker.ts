/** The drawing of random ONNX models: operands, shapes and numbers that suit a node, from what a seed gives. */
import { type DType, isFloat, randomNumbers, rounder, type Tensor } from "../ir/index.ts";
import type { Attribute, MadeConstant, MadeInput, MadeModel, MadeNode } from "./onnx_maker.ts";

/** A value of the model under construction. */
export interface Known {
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly number[];
  /** computed without rounding, or rounded once */
  readonly exact: boolean;
  /** about the largest magnitude; Infinity when there may be NaN or infinities */
  readonly bound: number;
}
export type Result = Pick<Known, "dtype" | "shape"> & Partial<Known>;
export type Attributes = Readonly<Record<string, Attribute>>;

export const count = (shape: readonly number[]): number => shape.reduce((a, b) => a * b, 1);
export const mostElements = 300;

export const broadcastOf = (...shapes: readonly (readonly number[])[]): number[] => {
  const rank = Math.max(...shapes.map((s) => s.length));
  return Array.from({ length: rank }, (_, i) => {
    const sizes = shapes.map((s) => s[i - (rank - s.length)] ?? 1).filter((d) => d !== 1);
    return sizes[0] ?? 1;
  });
};

/** A random model under construction: values to draw operands from, and the nodes so far. */
export class Maker {
  readonly opset: number;
  readonly random: () => number;
  readonly pool: Known[] = [];
  /** sizes that have a name wherever an input has them */
  private readonly named: ReadonlySet<number>;
  private readonly inputs: MadeInput[] = [];
  private readonly constants: MadeConstant[] = [];
  private readonly nodes: MadeNode[] = [];
  private readonly results: Known[] = [];
  private names = 0;

  constructor(seed: number) {
    this.random = randomNumbers(seed);
    this.opset = 7 + this.below(20);
    this.named = new Set([1, 2, 3, 4, 5, 7].filter(() => this.chance(0.2)));
  }

  below(n: number): number {
    return Math.floor(this.random() * n);
  }
  /** From a to b, both included. */
  between(a: number, b: number): number {
    return a + this.below(b - a + 1);
  }
  chance(p: number): boolean {
    return this.random() < p;
  }
  pick<T>(xs: readonly T[]): T {
    return xs[this.below(xs.length)] as T;
  }
  shuffled<T>(xs: readonly T[]): T[] {
    const rest = [...xs];
    return xs.map(() => rest.splice(this.below(rest.length), 1)[0] as T);
  }
  /** Numbers 0 to n - 1, some of them, in any order. */
  some(n: number): number[] {
    return this.shuffled(Array.from({ length: n }, (_, i) => i)).slice(0, this.between(n > 0 ? 1 : 0, n));
  }
  name(kind: string): string {
    return `${kind}${this.names++}`;
  }

  shape(least: number = 0, most: number = 5): number[] {
    const rank = Math.min(most, Math.max(least, this.pick([0, 1, 1, 2, 2, 2, 3, 3, 4, 5])));
    for (;;) {
      const shape = Array.from({ length: rank }, () => this.pick([1, 1, 2, 2, 3, 3, 4, 5, 7, ...(this.chance(0.1) ? [0] : [])]));
      if (count(shape) <= mostElements) return shape;
    }
  }

  /** An axis, or the same counted from the end. */
  signed(axis: number, rank: number): number {
    return this.chance(0.3) ? axis - rank : axis;
  }

  // --- leaves ---

  elements(dtype: DType, n: number, draw: "normal" | "positive" | "unit" | "wild"): Float64Array {
    const round = rounder(dtype);
    const one = (): number => {
      if (dtype === "bool") return this.below(2);
      if (isFloat(dtype)) {
        if (draw === "wild" && this.chance(0.3)) return this.pick([0, -0, Infinity, -Infinity, NaN, 1, -1]);
        if (draw === "positive") return 0.25 + 3 * this.random();
        if (draw === "unit") return 0.05 + 0.9 * this.random();
        return 6 * this.random() - 3;
      }
      const unsigned = dtype.startsWith("u");
      const bits = Math.min(32, Number(dtype.slice(1)));
      if (draw === "wild" && this.chance(0.5))
        return this.pick([0, 1, 2 ** (bits - 1) - 1, unsigned ? 2 ** bits - 1 : -(2 ** (bits - 1)), 100]);
      if (draw === "positive" || unsigned) return 1 + this.below(9);
      return this.below(19) - 9;
    };
    return Float64Array.from({ length: n }, () => round(one()));
  }

  tensor(dtype: DType, shape: readonly number[], draw: "normal" | "positive" | "unit" | "wild" = "normal"): Tensor {
    return { kind: "tensor", dtype, shape, data: this.elements(dtype, count(shape), draw) };
  }

  constantOf(tensor: Tensor): Known {
    const name = this.name("c");
    this.constants.push({ name, tensor, raw: this.chance(0.5) });
    return this.leaf(name, tensor);
  }
  inputOf(tensor: Tensor): Known {
    const name = this.name("x");
    const dims = tensor.shape.map((d) => (this.named.has(d) ? `n${d}` : d));
    this.inputs.push({ name, tensor, dims });
    return this.leaf(name, tensor);
  }
  private leaf(name: string, { dtype, shape, data }: Tensor): Known {
    const bound = data.reduce((a, b) => Math.max(a, Number.isNaN(b) ? Infinity : Math.abs(b)), 0);
    const known = { name, dtype, shape, exact: true, bound };
    this.pool.push(known);
    return known;
  }
  /** Integers that decide what a node does: mostly constants, as exporters have them. */
  integers(values: readonly number[], shape: readonly number[] = [values.length], dtype: DType = "i64"): string {
    const tensor: Tensor = { kind: "tensor", dtype, shape, data: Float64Array.from(values) };
    return (this.chance(0.85) ? this.constantOf(tensor) : this.inputOf(tensor)).name;
  }
  /** Numbers from 0 to 2. */
  below3(dtype: DType, shape: readonly number[]): Tensor {
    return { kind: "tensor", dtype, shape, data: Float64Array.from({ length: count(shape) }, () => this.below(3)) };
  }
  scalarOf(dtype: DType, value: number, shape: readonly number[] = []): Known {
    const data = Float64Array.from({ length: count(shape) }, () => rounder(dtype)(value));
    return this.constantOf({ kind: "tensor", dtype, shape, data });
  }

  fresh(dtype: DType, shape: readonly number[] = this.shape(), draw: "normal" | "positive" | "unit" | "wild" = "normal"): Known {
    const tensor = this.tensor(dtype, shape, draw);
    return this.chance(0.7) || shape.some((d) => this.named.has(d)) ? this.inputOf(tensor) : this.constantOf(tensor);
  }

  /** A value of one of the types for which `test` holds; made when there is none. */
  value(
    dtypes: readonly DType[],
    { least = 0, most = 5, draw = "normal", test = () => true, exact = false }: Wanted = {},
  ): Known {
    const fit = this.pool.filter(
      (k) =>
        dtypes.includes(k.dtype) &&
        k.shape.length >= least &&
        k.shape.length <= most &&
        (k.exact || !exact) &&
        (draw === "wild" || k.bound <= 1000) &&
        test(k),
    );
    if (fit.length > 0 && draw !== "positive" && draw !== "unit" && this.chance(0.75)) return this.pick(fit);
    for (;;) {
      const shape = this.shape(least, most);
      const dtype = this.pick(dtypes);
      if (test({ name: "", dtype, shape, exact: true, bound: 1 })) return this.fresh(dtype, shape, draw);
    }
  }

  /** An operand that broadcasts with x. */
  partner(x: Known, draw: "normal" | "positive" | "unit" | "wild" = "normal", dtype: DType = x.dtype): Known {
    const fit = this.pool.filter(
      (k) =>
        k.dtype === dtype &&
        (draw === "wild" || k.bound <= 1000) &&
        k.name !== x.name &&
        fits(k.shape, x.shape) &&
        count(broadcastOf(k.shape, x.shape)) <= mostElements,
    );
    if (fit.length > 0 && (draw === "normal" || draw === "wild") && this.chance(0.4)) return this.pick(fit);
    const lost = this.below(x.shape.length + 1);
    const shape = this.chance(0.3) ? [...x.shape] : x.shape.slice(lost).map((d) => (this.chance(0.3) ? 1 : d));
    const longer = shape.map((d, i) => (x.shape[i + x.shape.length - shape.length] === 1 && this.chance(0.3) ? 3 : d));
    return this.fresh(dtype, count(broadcastOf(longer, x.shape)) <= mostElements ? longer : shape, draw);
  }

  // --- nodes ---

  node(
    op: string,
    inputs: readonly (Known | string | undefined)[],
    attributes: Attributes,
    results: readonly Result[],
  ): readonly Known[] {
    const names = inputs.map((i) => (i === undefined ? "" : typeof i === "string" ? i : i.name));
    while (names.at(-1) === "") names.pop();
    const operands = inputs.filter((i): i is Known => typeof i === "object");
    const bound = Math.max(0, ...operands.map((o) => o.bound));
    const exact = operands.every((o) => o.exact);
    const made = results.map((r): Known => ({ exact, bound, name: this.name("y"), ...r }));
    this.nodes.push({ op, inputs: names, outputs: made.map((k) => k.name), attributes });
    this.results.push(...made);
    this.pool.push(...made);
    return made;
  }

  /** A node whose result is no output. */
  within(op: string, input: Known, output: string, attributes: Attributes): void {
    this.nodes.push({ op, inputs: [input.name], outputs: [output], attributes });
  }

  model(): MadeModel {
    const outputs = this.results.map(({ name, dtype }) => ({ name, dtype }));
    // operators of an opset may want a newer IR version; before 4 initializers are inputs
    const ir = this.opset <= 8 ? this.pick([3, 4, 8]) : this.opset <= 20 ? this.pick([4, 8, 9]) : 10;
    return { opset: this.opset, ir, inputs: this.inputs, constants: this.constants, nodes: this.nodes, outputs };
  }
}

export interface Wanted {
  readonly least?: number;
  readonly most?: number;
  readonly draw?: "normal" | "positive" | "unit" | "wild";
  readonly test?: (k: Known) => boolean;
  readonly exact?: boolean;
}

export const fits = (a: readonly number[], b: readonly number[]): boolean => {
  const rank = Math.max(a.length, b.length);
  return Array.from({ length: rank }, (_, i) => [a[i - (rank - a.length)] ?? 1, b[i - (rank - b.length)] ?? 1] as const).every(
    ([x, y]) => x === 1 || y === 1 || x === y,
  );
};
