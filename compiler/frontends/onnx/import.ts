/** From an ONNX model to a Graph: values and scopes, functions put in place, branches and loops that are known unrolled. */
import { Builder, identifier } from "../../../ir/build.ts";
import { type Dim, type DimSymbol, dimSymbols, parseDim, substituteDim } from "../../../ir/dim.ts";
import { UserError } from "../../../ir/error.ts";
import { literalWeight } from "../../../ir/evaluate.ts";
import type { Graph, Weight } from "../../../ir/graph.ts";
import { decode } from "../../../ir/round.ts";
import type { Tensor } from "../../../ir/tensor.ts";
import { tensor, typeText } from "../../../ir/type.ts";
import { printable } from "../json.ts";
import {
  functionName,
  type OnnxAttribute,
  type OnnxDim,
  type OnnxFunction,
  type OnnxGraph,
  type OnnxModel,
  type OnnxNode,
  type OnnxTensor,
} from "../onnx.ts";
import { Call, type Lowering } from "./call.ts";
import { Emitter, type Item, SizesDepend, type Stored } from "./emitter.ts";
import { lowerings } from "./ops/index.ts";
import { irDType, narrowOf } from "./types.ts";

export interface ImportOptions {
  /** shapes of inputs, by their names, in the place of those that the model declares */
  readonly shapes?: ReadonlyMap<string, readonly number[]>;
  /** values of inputs that decide sizes */
  readonly values?: ReadonlyMap<string, Tensor>;
  /** limits of sizes that have a name */
  readonly limits?: ReadonlyMap<string, readonly [min: number, max: number]>;
}

export interface ImportedGraph {
  readonly graph: Graph;
  /** elements of weights whose source is a tensor of that name */
  readonly tensors: ReadonlyMap<string, Stored>;
  /** elements of any weight of the graph, for the interpreter */
  readonly weight: (w: Weight) => Tensor;
  /** names in the model of the graph's inputs and outputs, by their names in the graph */
  readonly names: ReadonlyMap<string, string>;
}

/** of a size that has no limit yet */
const mostSize = 2 ** 20;
const deepestCalls = 64;
const mostNodes = 200_000;

/** The elements of a tensor of the model. */
export const tensorData = (t: OnnxTensor): Tensor => {
  const dtype = irDType(t.dtype);
  const bits = t.dtype === "i4" || t.dtype === "u4" ? 4 : t.dtype === "i2" || t.dtype === "u2" ? 2 : 8;
  const bytes = t.bytes();
  if (bits === 8) return { kind: "tensor", dtype, shape: t.shape, data: decode(dtype, bytes) };
  const perByte = 8 / bits;
  const half = dtype === "i8" ? 2 ** (bits - 1) : Infinity;
  const size = t.shape.reduce((a, b) => a * b, 1);
  const data = Float64Array.from({ length: size }, (_, i) => {
    const code = ((bytes[Math.floor(i / perByte)] as number) >> ((i % perByte) * bits)) & (2 ** bits - 1);
    return code >= half ? code - 2 * half : code;
  });
  return { kind: "tensor", dtype, shape: t.shape, data };
};

/** The name of a value as a graph may have it. */
const cleaned = (name: string): string => name.replace(/[^A-Za-z0-9_]/g, "_").replace(/^(?=\d)/, "_") || "v";

interface Scope {
  readonly values: Map<string, Item>;
  readonly outer?: Scope;
  /** of the function, or of the model */
  readonly opsets: ReadonlyMap<string, number>;
  /** attributes of the function's caller */
  readonly attributes: ReadonlyMap<string, OnnxAttribute>;
  readonly depth: number;
}

/**
 * Makes the graph of a model. Throws a UserError that names file, node and what is wrong; SizesDepend when sizes depend on values of inputs
 * that `options.values` does not have.
 */
export const importOnnx = (model: OnnxModel, file: string, options: ImportOptions = {}): ImportedGraph => {
  // sizes that exporters named apart and that have to be one: `total_sequence_length` is `past + sequence`, and is checked when it is known
  const equal = new Map<string, Dim>();
  for (;;)
    try {
      return new Importer(model, file, options, equal).import();
    } catch (error) {
      const [a, b] = (error instanceof UserError && error.unequal) || [];
      const named = [b, a].find((d) => typeof d === "string" && identifier.test(d) && !equal.has(d)) as string | undefined;
      const other = named === b ? a : b;
      if (named === undefined || typeof other !== "string" || dimSymbols(other).includes(named)) throw error;
      equal.set(named, other);
    }
};

/**
 * Makes the graph of a model for these inputs: sizes are those that the inputs have, and of inputs that decide sizes the values are read.
 */
export const importFor = (model: OnnxModel, file: string, inputs: ReadonlyMap<string, Tensor>): ImportedGraph => {
  const shapes = new Map([...inputs].map(([name, t]) => [name, t.shape]));
  const values = new Map<string, Tensor>();
  for (;;)
    try {
      return importOnnx(model, file, { shapes, values });
    } catch (error) {
      const more = error instanceof SizesDepend ? error.inputs.filter((name) => !values.has(name) && inputs.has(name)) : [];
      if (more.length === 0) throw error;
      for (const name of more) values.set(name, inputs.get(name) as Tensor);
    }
};

class Importer {
  private readonly model: OnnxModel;
  private readonly file: string;
  private readonly options: ImportOptions;
  private readonly symbols: Map<string, DimSymbol> = new Map();
  private readonly emitter: Emitter;
  private readonly builder: Builder;
  private lowered = 0;

  /** symbols that nobody gave limits, and where they stand: an error, unless they turn out to stand for others */
  private readonly unlimited: Map<string, string> = new Map();
  /** symbols that stand for others */
  private readonly equal: ReadonlyMap<string, Dim>;

  constructor(model: OnnxModel, file: string, options: ImportOptions, equal: ReadonlyMap<string, Dim>) {
    this.model = model;
    this.file = file;
    this.options = options;
    this.equal = equal;
    this.builder = new Builder(identifier.test(cleaned(model.graph.name)) ? cleaned(model.graph.name) : "model");
    this.emitter = new Emitter(this.builder, this.symbols);
  }

  import(): ImportedGraph {
    const { graph } = this.model;
    const names = new Map<string, string>();
    const scope: Scope = { values: new Map(), opsets: this.model.opsets, attributes: new Map(), depth: 0 };
    for (const [i, input] of graph.inputs.entries()) {
      const { name, type } = input;
      // what an initializer makes a default of is an input where it is given
      if (graph.initialisers.has(name) && !this.options.shapes?.has(name)) continue;
      const place = `graph.input[${i}] '${name}'`;
      this.blamed(place, () => {
        if (type.kind !== "tensor") throw new UserError(`a ${type.kind} is not supported, only tensors are`);
        const given = this.options.shapes?.get(name);
        const shape =
          given ??
          type.shape?.map((d, axis) => this.dim(d, `${name}_${axis}`, place)) ??
          this.fail("its shape is not known, not even how many axes it has; export the model with shapes of inputs");
        if (given && type.shape) this.fits(given, type.shape);
        const own = this.builder.unused(cleaned(name));
        names.set(own, name);
        scope.values.set(
          name,
          this.emitter.input(own, tensor(irDType(type.dtype), shape), this.options.values?.get(name), narrowOf(type.dtype)),
        );
      });
    }
    for (const symbol of this.symbols.values()) this.builder.symbol(symbol);
    this.body(graph, scope);
    for (const [i, { name, type }] of graph.outputs.entries())
      this.blamed(`graph.output[${i}] '${name}'`, () => {
        const item = this.find(scope, name);
        if (type.kind === "tensor" && type.dtype !== undefined && irDType(type.dtype) !== item.type.dtype)
          this.fail(`it is declared as ${type.dtype}, and its node makes ${typeText(item.type)}`);
        const own = this.builder.unused(cleaned(name));
        names.set(own, name);
        this.builder.output(item.value(), own);
      });
    for (const [name, place] of this.unlimited)
      this.blamed(place, () => this.fail(`size '${name}' has no limit; add --dim ${name}=MAX`));
    const { tensors } = this.emitter;
    const weight = (w: Weight): Tensor =>
      w.source.kind === "tensor" ? (tensors.get(w.source.tensor) as Stored).read() : literalWeight(w);
    return { graph: this.builder.build(), tensors, weight, names };
  }

  private fail(what: string): never {
    throw new UserError(what);
  }

  /** Puts file and place in front of what is wrong. */
  private blamed<R>(place: string, work: () => R): R {
    try {
      return work();
    } catch (error) {
      if (!(error instanceof UserError) || error.message.startsWith(this.file)) throw error;
      const message = `${this.file}: ${printable(place, 600)}: ${printable(error.message, 600)}`;
      throw error instanceof SizesDepend
        ? new SizesDepend(error.inputs, message)
        : new UserError(message, error.exitCode, error.unequal);
    }
  }

  private fits(given: readonly number[], declared: readonly OnnxDim[]): void {
    if (given.length !== declared.length || declared.some((d, i) => typeof d === "number" && d !== given[i]))
      this.fail(`its shape is [${declared.map((d) => d ?? "?").join(",")}], and [${given.join(",")}] is given`);
  }

  /** A declared size: a number, a symbol, or an expression over symbols where the name reads as one. */
  private dim(d: OnnxDim, otherwise: string, place: string): Dim {
    if (typeof d === "number") return d;
    const text = d === undefined ? otherwise : d;
    let dim: Dim;
    try {
      dim = parseDim(text);
    } catch {
      dim = cleaned(text);
    }
    // those that stand for a symbol may stand for one that stands for another
    for (const _ of this.equal) dim = substituteDim(dim, this.equal);
    for (const name of dimSymbols(dim)) {
      if (this.symbols.has(name)) continue;
      const limits = this.options.limits?.get(name);
      if (limits === undefined) this.unlimited.set(name, place);
      const [min, max] = limits ?? [0, mostSize];
      this.symbols.set(name, { name, min, max, multiple: 1, source: "host" });
    }
    return dim;
  }

  private find(scope: Scope, name: string): Item {
    for (let s: Scope | undefined = scope; s !== undefined; s = s.outer) {
      const found = s.values.get(name);
      if (found) return found;
    }
    return this.fail(`'${name}' is a result that step3c does not make`);
  }

  private stored(t: OnnxTensor): Item {
    const type = tensor(irDType(t.dtype), t.shape);
    return this.emitter.stored({ type, name: cleaned(t.name), narrow: narrowOf(t.dtype), read: () => tensorData(t) });
  }

  /** Initialisers and nodes of a graph, into the scope. */
  private body(graph: OnnxGraph, scope: Scope): void {
    for (const [name, t] of graph.initialisers)
      if (!scope.values.has(name)) this.blamed(`initializer '${name}'`, () => scope.values.set(name, this.stored(t)));
    for (const node of graph.nodes) this.node(node, scope);
  }

  private node(node: OnnxNode, scope: Scope): void {
    this.blamed(node.place, () => {
      this.count();
      const results = this.results(this.resolved(node, scope), scope);
      node.outputs.forEach((name, i) => {
        if (name === "") return;
        const item = results[i];
        if (item !== undefined) scope.values.set(name, item);
      });
    });
  }

  /** Of nodes, and of rounds of loops, which may have none. */
  private count(): void {
    if (++this.lowered > mostNodes) this.fail(`more than ${mostNodes} nodes, loops unrolled`);
  }

  /** The node with attributes of the function's caller where it refers to them. */
  private resolved(node: OnnxNode, scope: Scope): OnnxNode {
    if (![...node.attributes.values()].some((a) => a.kind === "reference")) return node;
    const attributes = new Map<string, OnnxAttribute>();
    for (const [name, a] of node.attributes) {
      const found = a.kind === "reference" ? scope.attributes.get(a.value) : a;
      if (found !== undefined) attributes.set(name, found);
    }
    return { ...node, attributes };
  }

  private results(node: OnnxNode, scope: Scope): readonly (Item | undefined)[] {
    const inputs = node.inputs.map((name) => (name === "" ? undefined : this.find(scope, name)));
    const called = this.model.functions.get(functionName(node.domain, node.op, node.overload));
    if (called) return this.call(called, node, inputs, scope);
    const operators = lowerings.get(node.domain);
    const lowering: Lowering | undefined = operators?.get(node.op);
    if (lowering === undefined)
      this.fail(
        operators === undefined
          ? `operators of '${node.domain}' are not known to step3c`
          : `step3c does not have this operator; replace it by others, or export with another opset`,
      );
    const opset =
      scope.opsets.get(node.domain) ?? (node.domain === "" ? this.fail("the model imports no opset of ONNX's own") : 1);
    const saved = this.builder.origin;
    this.builder.at(originOf(node));
    const call = new Call(node, opset, this.emitter, inputs, {
      run: (graph, given) => this.within(graph, given, scope),
      tensor: (t) => this.stored(t),
    });
    const made = (lowering as Lowering)(call);
    this.builder.at(saved);
    return Array.isArray(made) ? made : [made as Item];
  }

  /** A graph that is an attribute. */
  private within(graph: OnnxGraph, given: readonly Item[], outer: Scope): readonly Item[] {
    if (outer.depth >= deepestCalls) this.fail("graphs within graphs are too deep");
    this.count();
    const scope: Scope = { ...outer, values: new Map(), outer, depth: outer.depth + 1 };
    graph.inputs.forEach(({ name }, i) => {
      const item = given[i];
      if (item !== undefined) scope.values.set(name, item);
    });
    this.body(graph, scope);
    return graph.outputs.map(({ name }) => this.find(scope, name));
  }

  private call(f: OnnxFunction, node: OnnxNode, inputs: readonly (Item | undefined)[], caller: Scope): readonly Item[] {
    if (caller.depth >= deepestCalls) this.fail("functions call each other without end");
    const scope: Scope = {
      values: new Map(),
      opsets: f.opsets.size > 0 ? f.opsets : caller.opsets,
      attributes: new Map([...f.defaults, ...node.attributes]),
      depth: caller.depth + 1,
    };
    f.inputs.forEach((name, i) => {
      const item = inputs[i];
      if (item !== undefined) scope.values.set(name, item);
    });
    for (const inner of f.nodes) {
      // an optional input that the caller left out is left out within
      const known = inner.inputs.map((name) => (f.inputs.includes(name) && !scope.values.has(name) ? "" : name));
      this.node({ ...inner, inputs: known }, scope);
    }
    return f.outputs.map((name) => this.find(scope, name));
  }
}

/** Where a node is of: the module that the exporter noted, or the node's own name. */
const originOf = (node: OnnxNode): string => {
  const scopes = node.metadata.get("pkg.torch.onnx.name_scopes") ?? node.metadata.get("namespace");
  const name = node.name === "" ? node.op : node.name;
  return printable(
    scopes === undefined || scopes === ""
      ? name
      : (scopes
          .replace(/^\[|\]$|'/g, "")
          .split(", ")
          .filter(Boolean)
          .at(-1) ?? name),
    200,
  );
};
