/** ONNX models of a few nodes as plain data: written by an independent encoder (onnx-proto), and as text. */
import proto, { type onnx } from "onnx-proto";
import { type DType, encode, isFloat, type Tensor } from "../ir/index.ts";

/** Types that ONNX Runtime's binding takes and gives. */
export type Element = Exclude<DType, "bf16" | "e4m3" | "e5m2">;

export type Attribute =
  | { readonly i: number }
  | { readonly f: number }
  | { readonly s: string }
  | { readonly ints: readonly number[] }
  | { readonly floats: readonly number[] }
  | { readonly t: Tensor }
  | { readonly g: Body };
export interface MadeNode {
  readonly op: string;
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
  readonly attributes: Readonly<Record<string, Attribute>>;
}
/** A graph that is an attribute; without `inputs` for a branch. */
export interface Body {
  readonly inputs: readonly { readonly name: string; readonly dtype: DType; readonly shape: readonly number[] }[];
  readonly nodes: readonly MadeNode[];
  readonly outputs: readonly { readonly name: string; readonly dtype: DType }[];
}
export interface MadeInput {
  readonly name: string;
  readonly tensor: Tensor;
  /** as declared: numbers, or names of sizes */
  readonly dims: readonly (number | string)[];
}
export interface MadeConstant {
  readonly name: string;
  readonly tensor: Tensor;
  /** elements as bytes, or in the field of their type */
  readonly raw: boolean;
}
export interface MadeModel {
  readonly opset: number;
  readonly ir: number;
  readonly inputs: readonly MadeInput[];
  readonly constants: readonly MadeConstant[];
  readonly nodes: readonly MadeNode[];
  readonly outputs: readonly { readonly name: string; readonly dtype: DType }[];
}

/** TensorProto.DataType */
const codes: Readonly<Record<DType, number>> = {
  f32: 1,
  u8: 2,
  i8: 3,
  u16: 4,
  i16: 5,
  i32: 6,
  i64: 7,
  bool: 9,
  f16: 10,
  f64: 11,
  u32: 12,
  u64: 13,
  bf16: 16,
  e4m3: 17,
  e5m2: 19,
};
export const dtypeCode = (dtype: DType): number => codes[dtype];

const bitsOf = ({ dtype, data }: Tensor): number[] => {
  const bytes = encode(dtype, data);
  const view = new DataView(bytes.buffer);
  return Array.from(data, (x, i) =>
    dtype === "f16" || dtype === "bf16" ? view.getUint16(2 * i, true) : isFloat(dtype) ? (bytes[i] as number) : x,
  );
};
const fieldsOf = (t: Tensor): onnx.ITensorProto => {
  const data = [...t.data];
  switch (t.dtype) {
    case "f32":
      return { floatData: data };
    case "f64":
      return { doubleData: data };
    case "i64":
      return { int64Data: data };
    case "u64":
    case "u32":
      return { uint64Data: data };
    default:
      return { int32Data: bitsOf(t) };
  }
};
const tensorProto = (t: Tensor, raw: boolean, name: string = ""): onnx.ITensorProto => ({
  name,
  dataType: codes[t.dtype],
  dims: [...t.shape],
  ...(raw ? { rawData: encode(t.dtype, t.data) } : fieldsOf(t)),
});
const typeOf = (dtype: DType, dims?: readonly (number | string)[]): onnx.ITypeProto => ({
  tensorType: {
    elemType: codes[dtype],
    ...(dims && { shape: { dim: dims.map((d) => (typeof d === "number" ? { dimValue: d } : { dimParam: d })) } }),
  },
});
const attributeProto = (name: string, a: Attribute): onnx.IAttributeProto => {
  const T = proto.onnx.AttributeProto.AttributeType;
  if ("i" in a) return { name, type: T.INT, i: a.i };
  if ("f" in a) return { name, type: T.FLOAT, f: a.f };
  if ("s" in a) return { name, type: T.STRING, s: new TextEncoder().encode(a.s) };
  if ("ints" in a) return { name, type: T.INTS, ints: [...a.ints] };
  if ("floats" in a) return { name, type: T.FLOATS, floats: [...a.floats] };
  if ("t" in a) return { name, type: T.TENSOR, t: tensorProto(a.t, true) };
  const { g } = a;
  return {
    name,
    type: T.GRAPH,
    g: {
      name,
      node: g.nodes.map(nodeProto),
      input: g.inputs.map((v) => ({ name: v.name, type: typeOf(v.dtype, v.shape) })),
      output: g.outputs.map((v) => ({ name: v.name, type: typeOf(v.dtype) })),
    },
  };
};
const nodeProto = (n: MadeNode): onnx.INodeProto => ({
  opType: n.op,
  input: [...n.inputs],
  output: [...n.outputs],
  attribute: Object.entries(n.attributes).map(([name, a]) => attributeProto(name, a)),
});

/** The model's file. Before IR version 4 initializers are inputs too. */
export const encodeModel = (m: MadeModel): Uint8Array<ArrayBuffer> => {
  const inputs = m.inputs.map((v) => ({ name: v.name, type: typeOf(v.tensor.dtype, v.dims) }));
  const defaults = m.ir < 4 ? m.constants.map((c) => ({ name: c.name, type: typeOf(c.tensor.dtype, c.tensor.shape) })) : [];
  return new Uint8Array(
    proto.onnx.ModelProto.encode({
      irVersion: m.ir,
      opsetImport: [{ domain: "", version: m.opset }],
      graph: {
        name: "random",
        input: [...inputs, ...defaults],
        initializer: m.constants.map((c) => tensorProto(c.tensor, c.raw, c.name)),
        node: m.nodes.map(nodeProto),
        output: m.outputs.map((v) => ({ name: v.name, type: typeOf(v.dtype) })),
      },
    }).finish(),
  );
};

const tensorText = ({ dtype, shape, data }: Tensor): string =>
  `${dtype}[${shape}] ${data.length > 40 ? `${data.slice(0, 40).join(" ")} ...` : data.join(" ")}`;
const attributeText = (a: Attribute): string => {
  if ("t" in a) return tensorText(a.t);
  if ("g" in a)
    return `(${a.g.inputs.map((v) => v.name)}) => { ${a.g.nodes.map(nodeText).join("; ")} -> ${a.g.outputs.map((v) => v.name)} }`;
  return JSON.stringify(Object.values(a)[0]);
};
const nodeText = (n: MadeNode): string =>
  `${n.outputs.join(", ")} = ${n.op}(${n.inputs.join(", ")})${Object.entries(n.attributes)
    .map(([k, a]) => ` ${k}=${attributeText(a)}`)
    .join("")}`;

/** The model for people: what a report of a difference prints. */
export const modelText = (m: MadeModel): string =>
  [
    `opset ${m.opset}, IR ${m.ir}`,
    ...m.inputs.map((v) => `input ${v.name} [${v.dims}] ${tensorText(v.tensor)}`),
    ...m.constants.map((c) => `constant ${c.name} ${tensorText(c.tensor)}`),
    ...m.nodes.map(nodeText),
    `outputs ${m.outputs.map((v) => `${v.name} ${v.dtype}`).join(", ")}`,
  ].join("\n");
