/** Models of one node, and what ONNX Runtime makes of them; it runs in a process of its own, since it may end the one it is in. */
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { onnx } from "onnx-proto";
import { decode, encode } from "../ir/round.ts";
import type { Tensor } from "../ir/tensor.ts";
import type { DType } from "../ir/type.ts";

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
const typeNames: Readonly<Record<string, string>> = {
  f32: "float32",
  u8: "uint8",
  i8: "int8",
  i32: "int32",
  i64: "int64",
  bool: "bool",
  f16: "float16",
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

const script = `
import { readFileSync, writeFileSync } from "node:fs";
const ort = (await import("onnxruntime-node")).default;
const half = globalThis.Float16Array ?? Uint16Array;
const arrays = { float32: Float32Array, uint8: Uint8Array, int8: Int8Array, int32: Int32Array, int64: BigInt64Array, bool: Uint8Array, float16: half };
const results = [];
for (const { model, inputs } of JSON.parse(readFileSync("cases.json", "utf8"))) {
  try {
    const session = await ort.InferenceSession.create(new Uint8Array(Buffer.from(model, "base64")), { logSeverityLevel: 4 });
    const feeds = {};
    for (const { name, type, shape, data } of inputs) {
      const bytes = new Uint8Array(Buffer.from(data, "base64"));
      feeds[name] = new ort.Tensor(type, new arrays[type](bytes.buffer.slice(0, bytes.length)), shape);
    }
    const outputs = await session.run(feeds);
    results.push({ outputs: Object.entries(outputs).map(([name, t]) => ({ name, type: t.type, shape: t.dims,
      data: Buffer.from(t.data.buffer, t.data.byteOffset, t.data.byteLength).toString("base64") })) });
  } catch (error) {
    results.push({ error: String(error.message ?? error) });
  }
}
writeFileSync("results.json", JSON.stringify(results));
`;

interface Result {
  readonly error?: string;
  readonly outputs?: readonly { name: string; type: string; shape: number[]; data: string }[];
}

/** Outputs of each case by name, or what ONNX Runtime says is wrong; `from` is a folder whose node_modules has onnxruntime-node. */
export const runOnnxRuntime = (cases: readonly NodeCase[], from: string): (ReadonlyMap<string, Tensor> | string)[] =>
  runModels(
    cases.map((c) => ({ model: modelOf(c), inputs: inputsOf(c) })),
    from,
  );

/** The same of whole models. */
export const runModels = (
  models: readonly { readonly model: Uint8Array; readonly inputs: ReadonlyMap<string, Tensor> }[],
  from: string,
): (ReadonlyMap<string, Tensor> | string)[] => {
  const folder = mkdtempSync(join(tmpdir(), "step3c-ort-"));
  try {
    const base64 = (bytes: Uint8Array): string => Buffer.from(bytes).toString("base64");
    const list = models.map(({ model, inputs }) => ({
      model: base64(model),
      inputs: [...inputs].map(([name, t]) => ({
        name,
        type: typeNames[t.dtype],
        shape: t.shape,
        data: base64(encode(t.dtype, t.data)),
      })),
    }));
    writeFileSync(join(folder, "cases.json"), JSON.stringify(list));
    const here = script
      .replaceAll("cases.json", join(folder, "cases.json"))
      .replace("results.json", join(folder, "results.json"));
    const run = spawnSync(process.execPath, ["--input-type=module", "-e", here], { cwd: from, encoding: "utf8" });
    if (run.status !== 0) throw new Error(`onnxruntime-node: ${run.stderr}`);
    const results = JSON.parse(readFileSync(join(folder, "results.json"), "utf8")) as readonly Result[];
    return results.map(({ error, outputs }) => {
      if (outputs === undefined) return error ?? "no outputs";
      return new Map(
        outputs.map(({ name, type, shape, data }) => {
          const dtype = Object.entries(typeNames).find(([, t]) => t === type)?.[0] as DType;
          return [name, { kind: "tensor", dtype, shape, data: decode(dtype, new Uint8Array(Buffer.from(data, "base64"))) }];
        }),
      );
    });
  } finally {
    rmSync(folder, { recursive: true });
  }
};
