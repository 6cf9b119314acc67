/** Making graphs: op by op with a Builder, or from another graph with `rewrite`. */
import type { Attrs } from "./attr.ts";
import type { DimSymbol } from "./dim.ts";
import { UserError } from "./error.ts";
import type { Graph, Op, Place, Value, Weight, WeightSource } from "./graph.ts";
import type { Build } from "./op.ts";
import { inferTypes } from "./ops/index.ts";
import { type KvType, sameType, type TensorType, type Type } from "./type.ts";

/** What a name of a value, symbol or graph looks like. */
export const identifier: RegExp = /^[A-Za-z_][A-Za-z0-9_]*$/;

/**
 * Builds a graph. Results get the names asked for, or names made of the op's kind; a taken name gets a number behind it.
 * Names of inputs, weights and states are kept exactly and must be free.
 */
export class Builder implements Build {
  /** Where the ops that follow run. */
  place: Place | undefined;
  private current: string | undefined;
  private readonly name: string;
  private readonly symbols: DimSymbol[];
  private readonly inputs: Value[] = [];
  private readonly states: Value[] = [];
  private readonly weights: Weight[] = [];
  private readonly made: Op[] = [];
  private readonly outputs: Value[] = [];
  private readonly taken: Set<string> = new Set<string>();
  private readonly counts: Map<string, number> = new Map<string, number>();
  /** values that another one now stands for */
  private readonly replaced: Map<Value, Value> = new Map<Value, Value>();

  constructor(name: string, symbols: readonly DimSymbol[] = []) {
    this.name = name;
    this.symbols = [...symbols];
  }

  /** The origin of the ops that follow. */
  get origin(): string | undefined {
    return this.current;
  }

  /** Sets the origin of the ops that follow: a model node such as `layers.3.mlp`; undefined for none. */
  at(origin: string | undefined): this {
    this.current = origin;
    return this;
  }

  symbol(symbol: DimSymbol): void {
    this.symbols.push(symbol);
  }

  input(name: string, type: TensorType): Value {
    const value = { name: this.claim(name), type };
    this.inputs.push(value);
    return value;
  }

  weight(name: string, type: TensorType, source: WeightSource): Value {
    const value = { name: this.claim(name), type };
    this.weights.push({ value, source });
    return value;
  }

  state(name: string, type: KvType): Value {
    const value = { name: this.claim(name), type };
    this.states.push(value);
    return value;
  }

  /** Adds an op with one result. */
  op(kind: string, inputs: readonly Value[], attrs: Attrs = {}, names: readonly string[] = []): Value {
    const results = this.ops(kind, inputs, attrs, names);
    if (results.length !== 1) throw new Error(`op '${kind}' has ${results.length} results; take them with ops()`);
    return results[0] as Value;
  }

  /** Adds an op; gives its results. Throws a UserError when attributes or inputs do not fit. */
  ops(kind: string, inputs: readonly Value[], attrs: Attrs = {}, names: readonly string[] = []): readonly Value[] {
    return this.add(kind, inputs, attrs, names, undefined);
  }

  /** Adds a `fused` op. The body's symbols become this graph's. */
  fused(inputs: readonly Value[], body: Graph, names: readonly string[] = []): readonly Value[] {
    return this.add("fused", inputs, {}, names, { ...body, symbols: this.symbols });
  }

  /** Makes a value an output of the graph, under `name` when given. A value that must keep its name is copied. */
  output(value: Value, name?: string): void {
    const now = this.resolve(value);
    if (name === undefined || now.name === name) {
      this.outputs.push(now);
      return;
    }
    const definition = this.made.find((op) => op.outputs.includes(now));
    if (definition === undefined || this.outputs.includes(now)) {
      const saved = [this.place, this.current] as const;
      this.place = definition?.place ?? this.made.at(-1)?.place;
      this.current = definition?.origin;
      this.outputs.push(this.op("cast", [now], { to: (now.type as TensorType).dtype }, [this.free(name)]));
      [this.place, this.current] = saved;
      return;
    }
    const renamed = { name: this.claim(name), type: now.type };
    this.taken.delete(now.name);
    this.rename(now, renamed, 0);
    this.outputs.push(renamed);
  }

  /** Adds an op as it is, results with their names, but with inputs that have since been replaced by others, and types inferred again. */
  keep(op: Op): void {
    const inputs = op.inputs.map((v) => this.resolve(v));
    const changed = inputs.some((v, i) => v !== op.inputs[i]);
    const types = changed
      ? this.blamed(op, () =>
          inferTypes(
            op.kind,
            inputs.map((v) => v.type),
            op.attrs,
            op.body,
          ),
        )
      : undefined;
    const outputs = op.outputs.map((v, i) => {
      const type = types?.[i] ?? v.type;
      if (sameType(type, v.type)) return v;
      const value = { name: v.name, type };
      this.replaced.set(v, value);
      return value;
    });
    this.made.push(changed ? { ...op, inputs, outputs } : op);
  }

  /** Lets `now` stand for `old` from here on. When an op added since `mark` defines it, it takes old's name. */
  replace(old: Value, now: Value, mark: number): void {
    const value = this.resolve(now);
    if (value === old) throw new Error(`a rule gave '${old.name}' for itself; it gives undefined to keep an op`);
    if (!this.made.slice(mark).some((op) => op.outputs.includes(value))) {
      this.replaced.set(old, value);
      return;
    }
    const renamed = { name: old.name, type: value.type };
    this.taken.delete(value.name);
    this.taken.add(old.name);
    this.rename(value, renamed, mark);
    this.replaced.set(old, renamed);
  }

  /** Takes over a graph's inputs, states and weights, and keeps the names of its ops' results free for them. */
  adopt(g: Graph): void {
    this.inputs.push(...g.inputs);
    this.states.push(...g.states);
    for (const w of g.weights) this.weights.push(w);
    for (const v of [...g.inputs, ...g.states, ...g.weights.map((w) => w.value)]) this.claim(v.name);
    for (const op of g.ops) for (const v of op.outputs) this.taken.add(v.name);
  }

  /** Gives a reserved name back. */
  release(name: string): void {
    this.taken.delete(name);
  }

  /** Ops so far: the mark for `replace`. */
  get size(): number {
    return this.made.length;
  }

  /** The value that stands for this one by now. */
  resolve(value: Value): Value {
    let now = value;
    for (let next = this.replaced.get(now); next !== undefined; next = this.replaced.get(now)) now = next;
    return now;
  }

  /** The graph so far. */
  build(): Graph {
    return {
      name: this.name,
      symbols: [...this.symbols],
      inputs: [...this.inputs],
      states: [...this.states],
      weights: [...this.weights],
      ops: [...this.made],
      outputs: [...this.outputs],
    };
  }

  private add(
    kind: string,
    inputs: readonly Value[],
    attrs: Attrs,
    names: readonly string[],
    body: Graph | undefined,
  ): readonly Value[] {
    const resolved = inputs.map((v) => this.resolve(v));
    const here = { kind, ...(this.current === undefined ? {} : { origin: this.current }) };
    const types = this.blamed(here, () =>
      inferTypes(
        kind,
        resolved.map((v) => v.type),
        attrs,
        body,
      ),
    );
    const outputs = types.map((type: Type, i) => ({ name: this.fresh(names[i] ?? `${kind}_`, names[i] === undefined), type }));
    this.made.push({
      ...here,
      inputs: resolved,
      attrs,
      outputs,
      ...(body === undefined ? {} : { body }),
      ...(this.place === undefined ? {} : { place: this.place }),
    });
    return outputs;
  }

  /** Puts the origin in front of a UserError of an op. */
  private blamed<R>(op: { readonly kind: string; readonly origin?: string }, work: () => R): R {
    try {
      return work();
    } catch (error) {
      if (error instanceof UserError && op.origin !== undefined) throw error.at(op.origin);
      throw error;
    }
  }

  private rename(value: Value, renamed: Value, from: number): void {
    this.replaced.set(value, renamed);
    const swap = (v: Value): Value => (v === value ? renamed : v);
    for (let i = from; i < this.made.length; i++) {
      const op = this.made[i] as Op;
      if (op.outputs.includes(value) || op.inputs.includes(value))
        this.made[i] = { ...op, inputs: op.inputs.map(swap), outputs: op.outputs.map(swap) };
    }
  }

  /** A name like this one that nothing has yet. */
  unused(like: string): string {
    const name = this.fresh(like, false);
    this.taken.delete(name);
    return name;
  }

  private claim(name: string): string {
    if (!identifier.test(name)) throw new Error(`'${name}' is not an identifier`);
    this.free(name);
    this.taken.add(name);
    return name;
  }

  private free(name: string): string {
    if (this.taken.has(name)) throw new Error(`the name '${name}' is taken in graph '${this.name}'`);
    return name;
  }

  /** A free name: the hint itself, or the hint and the least number that is free. */
  private fresh(hint: string, numbered: boolean): string {
    const stem = hint.replace(/[^A-Za-z0-9_]/g, "_").replace(/^(?=\d)/, "_") || "v";
    if (!numbered && !this.taken.has(stem)) {
      this.taken.add(stem);
      return stem;
    }
    const separated = numbered || !/\d$/.test(stem) ? stem : `${stem}_`;
    for (let n = this.counts.get(separated) ?? (numbered ? 0 : 2); ; n++) {
      const name = `${separated}${n}`;
      if (this.taken.has(name)) continue;
      this.counts.set(separated, n + 1);
      this.taken.add(name);
      return name;
    }
  }
}

/**
 * The one way a pass changes a graph. `rule` sees each op, in order, with inputs as they are by then, and gives undefined to keep it, or
 * the values that stand for its results from now on: results of ops it added with `b`, or any earlier value; [] drops an op without users.
 * New ops get the origin and the place of the op they replace, and their results its names. Values, places and origins of kept ops stay.
 */
export const rewrite = (g: Graph, rule: (op: Op, b: Builder) => readonly Value[] | undefined): Graph => {
  const b = new Builder(g.name, g.symbols);
  b.adopt(g);
  // passes may hold copies of values: a name is a value
  const values = new Map<string, Value>();
  for (const v of [...g.inputs, ...g.states, ...g.weights.map((w) => w.value)]) values.set(v.name, v);
  for (const original of g.ops) {
    const inputs = original.inputs.map((v) => values.get(v.name) ?? v);
    const op = inputs.every((v, i) => v === original.inputs[i]) ? original : { ...original, inputs };
    for (const v of op.outputs) values.set(v.name, v);
    const seen = { ...op, inputs: op.inputs.map((v) => b.resolve(v)) };
    b.at(op.origin);
    b.place = op.place;
    const mark = b.size;
    const results = rule(seen, b);
    if (results === undefined) {
      b.keep(op);
      continue;
    }
    if (results.length !== 0 && results.length !== op.outputs.length)
      throw new Error(
        `a rule gave ${results.length} values for the ${op.outputs.length} results of '${op.kind}' (${op.origin ?? "no origin"})`,
      );
    results.forEach((now, i) => {
      b.replace(op.outputs[i] as Value, now, mark);
    });
  }
  for (const v of g.outputs) {
    const now = b.resolve(values.get(v.name) ?? v);
    if (now.name !== v.name) b.release(v.name);
    b.output(now, v.name);
  }
  return b.build();
};
