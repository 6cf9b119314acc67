/** What the lowering of an ONNX operator sees: the node's operands and attributes, and the ops to make of them. */
import { type Dim, dimText } from "../../../ir/dim.ts";
import { UserError } from "../../../ir/error.ts";
import type { Tensor } from "../../../ir/tensor.ts";
import { type DType, isFloat, typeText } from "../../../ir/type.ts";
import type { OnnxAttribute, OnnxGraph, OnnxNode, OnnxTensor } from "../onnx.ts";
import { type Emitter, type Item, SizesDepend } from "./emitter.ts";

/** What a node becomes: its results in order; undefined for one that cannot be made, which is an error when something reads it. */
export type Lowering = (c: Call) => Item | readonly (Item | undefined)[];

export interface Surroundings {
  /** a graph that is an attribute, on these inputs */
  run(graph: OnnxGraph, inputs: readonly Item[]): readonly Item[];
  tensor(t: OnnxTensor): Item;
}

type Kinds = { [A in OnnxAttribute as A["kind"]]: A["value"] };

export class Call {
  readonly node: OnnxNode;
  /** version of the operator set that the node's operator is of */
  readonly opset: number;
  readonly e: Emitter;
  readonly inputs: readonly (Item | undefined)[];
  private readonly around: Surroundings;

  constructor(node: OnnxNode, opset: number, e: Emitter, inputs: readonly (Item | undefined)[], around: Surroundings) {
    this.node = node;
    this.opset = opset;
    this.e = e;
    this.inputs = inputs;
    this.around = around;
  }

  fail(what: string): never {
    throw new UserError(what);
  }

  // --- operands ---

  has(i: number): boolean {
    return this.inputs[i] !== undefined;
  }
  x(i: number): Item {
    return this.inputs[i] ?? this.fail(`input ${i} is missing`);
  }
  get x0(): Item {
    return this.x(0);
  }
  optional(i: number): Item | undefined {
    return this.inputs[i];
  }
  dtype(i: number): DType {
    return this.x(i).type.dtype;
  }
  shape(i: number): readonly Dim[] {
    return this.x(i).type.shape;
  }
  rank(i: number): number {
    return this.x(i).type.shape.length;
  }
  /** Whether the node's result i is read or may be. */
  wants(i: number): boolean {
    return (this.node.outputs[i] ?? "") !== "";
  }

  /** Elements of an operand that decides what the graph is. Throws SizesDepend when they depend on inputs of the graph. */
  constant(i: number): Tensor {
    const item = this.x(i);
    return this.e.tensorOf(item) ?? this.depends(i, item);
  }
  /** Integers of an operand that decides shapes. */
  sizes(i: number): readonly Dim[] {
    const item = this.x(i);
    if (isFloat(item.type.dtype)) this.fail(`input ${i} must be integers, got ${typeText(item.type)}`);
    return this.e.dimsOf(item) ?? this.depends(i, item);
  }
  size(i: number): Dim {
    const sizes = this.sizes(i);
    return sizes.length === 1 ? (sizes[0] as Dim) : this.fail(`input ${i} must have one element, got ${sizes.length}`);
  }
  /** As `sizes`, for what cannot be an expression. */
  numbers(i: number): readonly number[] {
    return this.sizes(i).map((d) => (typeof d === "number" ? d : this.fail(`input ${i} must be numbers, got '${dimText(d)}'`)));
  }
  private depends(i: number, item: Item): never {
    const inputs = this.e.inputsOf(item);
    throw new SizesDepend(inputs, `input ${i} decides the sizes of what follows, and is known only when the graph runs`);
  }

  // --- attributes ---

  private attribute<K extends keyof Kinds>(name: string, kind: K): Kinds[K] | undefined {
    const found = this.node.attributes.get(name);
    if (found === undefined) return undefined;
    if (found.kind === kind) return found.value as Kinds[K];
    return this.fail(`attribute '${name}' must be ${kind}, got ${found.kind}`);
  }
  private missing(name: string): never {
    return this.fail(`attribute '${name}' is missing`);
  }
  hasAttribute(name: string): boolean {
    return this.node.attributes.has(name);
  }
  int(name: string, otherwise?: number): number {
    const value = this.attribute(name, "int");
    return value === undefined ? (otherwise ?? this.missing(name)) : Number(value);
  }
  flag(name: string, otherwise: boolean): boolean {
    return this.int(name, Number(otherwise)) !== 0;
  }
  /** An f32, as the format has attributes. */
  float(name: string, otherwise?: number): number {
    return Math.fround(this.attribute(name, "float") ?? otherwise ?? this.missing(name));
  }
  text(name: string, otherwise?: string): string {
    const value = this.attribute(name, "string");
    return value === undefined ? (otherwise ?? this.missing(name)) : new TextDecoder().decode(value);
  }
  ints(name: string): readonly number[] | undefined {
    const value = this.attribute(name, "ints");
    return value && [...value].map(Number);
  }
  floats(name: string): readonly number[] | undefined {
    const value = this.attribute(name, "floats");
    return value && [...value];
  }
  tensor(name: string): Item | undefined {
    const value = this.attribute(name, "tensor");
    return value && this.around.tensor(value);
  }
  graph(name: string): OnnxGraph {
    return this.attribute(name, "graph") ?? this.missing(name);
  }
  run(graph: OnnxGraph, inputs: readonly Item[]): readonly Item[] {
    return this.around.run(graph, inputs);
  }

  /** An axis counted from either end. */
  axis(axis: number, rank: number): number {
    const at = axis < 0 ? axis + rank : axis;
    return at >= 0 && at < rank && Number.isInteger(at) ? at : this.fail(`axis ${axis} of a tensor of ${rank} axes`);
  }
  axes(axes: readonly number[], rank: number): readonly number[] {
    const all = axes.map((a) => this.axis(a, rank));
    return new Set(all).size === all.length ? all : this.fail(`axes [${axes.join(", ")}] name one twice`);
  }
}
