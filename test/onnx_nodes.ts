/** Models of one node, of any domain. */
import { onnx } from "onnx-proto";
import { encode } from "../ir/round.ts";
import type { Tensor } from "../ir/tensor.ts";

export interface Operand {
  readonly tensor: Tensor;
  /** stored in the model instead of given to it */
  readonly constant?: true;
  /** u4 or i4: two elements a byte */
  readonly narrow?: "u4" | "i4";
}
/** An int attribute, a float one, or a string. */
export type Attribute = number | { readonly float: number } | string;

export interface NodeCase {
  readonly name: string;
  readonly op: string;
  readonly domain: string;
  readonly attributes: Readonly<Record<string, Attribute>>;
  /** undefined: left out */
  readonly inputs: readonly (Operand | undefined)[];
  readonly outputs: readonly string[];
}

const elementTypes: Readonly<Record<string, number>> = {
  f32: 1,
  u8: 2,
  i8: 3,
  i32: 6,
  i64: 7,
  bool: 9,
  f16: 10,
  u4: 21,
  i4: 22,
};
const bytesOf = ({ tensor, narrow }: Operand): Uint8Array => {
  if (narrow === undefined) return encode(tensor.dtype, tensor.data);
  const bytes = new Uint8Array(Math.ceil(tensor.data.length / 2));
  tensor.data.forEach((x, i) => {
    bytes[i >> 1] = (bytes[i >> 1] as number) | ((x & 15) << ((i & 1) * 4));
  });
  return bytes;
};

const attributeOf = (name: string, value: Attribute): onnx.IAttributeProto => {
  const { AttributeType } = onnx.AttributeProto;
  if (typeof value === "string") return { name, type: AttributeType.STRING, s: new TextEncoder().encode(value) };
  return typeof value === "number"
    ? { name, type: AttributeType.INT, i: value }
    : { name, type: AttributeType.FLOAT, f: value.float };
};

const nameOf = (i: number): string => `x${i}`;

/** The bytes of the case's model. */
export const modelOf = (c: NodeCase): Uint8Array => {
  const given = c.inputs.flatMap((operand, i) => (operand ? [{ name: nameOf(i), operand }] : []));
  const typeOf = (o: Operand): number => elementTypes[o.narrow ?? o.tensor.dtype] as number;
  const graph: onnx.IGraphProto = {
    name: "one",
    node: [
      {
        opType: c.op,
        domain: c.domain,
        input: c.inputs.map((operand, i) => (operand ? nameOf(i) : "")),
        output: [...c.outputs],
        attribute: Object.entries(c.attributes).map(([name, value]) => attributeOf(name, value)),
      },
    ],
    input: given
      .filter(({ operand }) => !operand.constant)
      .map(({ name, operand }) => ({
        name,
        type: {
          tensorType: { elemType: typeOf(operand), shape: { dim: operand.tensor.shape.map((dimValue) => ({ dimValue })) } },
        },
      })),
    initializer: given
      .filter(({ operand }) => operand.constant)
      .map(({ name, operand }) => ({
        name,
        dataType: typeOf(operand),
        dims: [...operand.tensor.shape],
        rawData: bytesOf(operand),
      })),
    output: c.outputs.filter((name) => name !== "").map((name) => ({ name })),
  };
  const opsetImport = [
    { domain: "", version: 21 },
    { domain: "com.microsoft", version: 1 },
  ];
  return onnx.ModelProto.encode({ irVersion: 10, opsetImport, graph }).finish();
};

/** The case's inputs by name. */
export const inputsOf = (c: NodeCase): Map<string, Tensor> =>
  new Map(c.inputs.flatMap((operand, i) => (operand && !operand.constant ? [[nameOf(i), operand.tensor] as const] : [])));
