/** Writes ONNX models node by node, as exporters do: every module's nodes carry its path, and sizes are computed from shapes where they vary. */
import proto, { type onnx } from "onnx-proto";

// a CommonJS package: its names are members of its default export
const { AttributeProto, ModelProto, TensorProto } = proto.onnx;
const kinds = AttributeProto.AttributeType;

export type Attribute = number | string | readonly number[] | { readonly float: number };
export type Dim = number | string;

const attributeOf = (name: string, value: Attribute): onnx.IAttributeProto => {
  if (typeof value === "number") return { name, type: kinds.INT, i: value };
  if (typeof value === "string") return { name, type: kinds.STRING, s: new TextEncoder().encode(value) };
  if ("float" in value) return { name, type: kinds.FLOAT, f: value.float };
  return { name, type: kinds.INTS, ints: [...value] };
};

const typeOf = (elemType: number, dims: readonly Dim[]): onnx.ITypeProto => ({
  tensorType: { elemType, shape: { dim: dims.map((d) => (typeof d === "number" ? { dimValue: d } : { dimParam: d })) } },
});

/** Numbers in [-1, 1) that are the same everywhere: the fractional parts of multiples of the golden ratio. */
const spread = (seed: number): ((i: number) => number) => {
  let state = Math.imul(seed + 1, 0x9e3779b1) >>> 0;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 31 - 1;
  };
};

export class Exporter {
  private readonly name: string;
  private readonly opset: number;
  private readonly nodes: onnx.INodeProto[] = [];
  private readonly initializers: onnx.ITensorProto[] = [];
  private readonly inputs: onnx.IValueInfoProto[] = [];
  private readonly outputs: onnx.IValueInfoProto[] = [];
  private path: readonly string[] = [];

  constructor(name: string, opset: number) {
    this.name = name;
    this.opset = opset;
  }

  /** Nodes that `work` makes are of the module of this name within the one at hand. */
  module<R>(name: string, work: () => R): R {
    const outer = this.path;
    this.path = [...outer, name];
    const result = work();
    this.path = outer;
    return result;
  }

  input(name: string, dims: readonly Dim[], elemType: number = TensorProto.DataType.FLOAT): string {
    this.inputs.push({ name, type: typeOf(elemType, dims) });
    return name;
  }

  output(name: string, value: string, dims: readonly Dim[]): void {
    this.nodes.push({ opType: "Identity", input: [value], output: [name] });
    this.outputs.push({ name, type: typeOf(TensorProto.DataType.FLOAT, dims) });
  }

  private fresh(what: string): string {
    return `/${[...this.path, `${what}_${this.nodes.length + this.initializers.length}`].join("/")}`;
  }

  node(opType: string, input: readonly string[], attributes: Readonly<Record<string, Attribute>> = {}): string {
    return this.nodesOf(opType, input, attributes, 1)[0] as string;
  }

  nodesOf(
    opType: string,
    input: readonly string[],
    attributes: Readonly<Record<string, Attribute>>,
    results: number,
  ): readonly string[] {
    const name = this.fresh(opType);
    const output = Array.from({ length: results }, (_, i) => `${name}_output_${i}`);
    const attribute = Object.entries(attributes).map(([key, value]) => attributeOf(key, value));
    this.nodes.push({ name, opType, input: [...input], output, attribute });
    return output;
  }

  /** A weight of numbers spread over +-`scale`, around `middle`. */
  weight(name: string, dims: readonly number[], scale: number, middle: number = 0): string {
    const next = spread(this.initializers.length);
    const size = dims.reduce((a, b) => a * b, 1);
    const data = Float32Array.from({ length: size }, (_, i) => middle + scale * next(i));
    return this.tensor([...this.path, name].join("."), dims, data, TensorProto.DataType.FLOAT);
  }

  tensor(name: string, dims: readonly number[], data: Float32Array | BigInt64Array | Uint8Array, dataType: number): string {
    const rawData = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    this.initializers.push({ name, dims: [...dims], dataType, rawData });
    return name;
  }

  floats(...values: readonly number[]): string {
    const dims = values.length === 1 ? [] : [values.length];
    return this.tensor(this.fresh("Constant"), dims, Float32Array.from(values), TensorProto.DataType.FLOAT);
  }
  ints(...values: readonly number[]): string {
    const data = BigInt64Array.from(values, BigInt);
    return this.tensor(this.fresh("Constant"), [values.length], data, TensorProto.DataType.INT64);
  }

  /** Size of an axis, as a vector of one. */
  size(x: string, axis: number): string {
    const size = this.node("Gather", [this.node("Shape", [x]), this.ints(axis)], { axis: 0 });
    return this.node("Reshape", [size, this.ints(1)]);
  }

  /** To a shape of numbers and sizes of axes of values. */
  reshape(x: string, ...dims: readonly (number | readonly [value: string, axis: number])[]): string {
    if (dims.every((d) => typeof d === "number")) return this.node("Reshape", [x, this.ints(...(dims as readonly number[]))]);
    const parts = dims.map((d) => (typeof d === "number" ? this.ints(d) : this.size(...d)));
    return this.node("Reshape", [x, this.node("Concat", parts, { axis: 0 })]);
  }

  encode(): Uint8Array {
    const model: onnx.IModelProto = {
      irVersion: 8,
      producerName: "step3c samples",
      opsetImport: [{ domain: "", version: this.opset }],
      graph: {
        name: this.name,
        node: this.nodes,
        initializer: this.initializers,
        input: this.inputs,
        output: this.outputs,
      },
    };
    return ModelProto.encode(model).finish();
  }
}
