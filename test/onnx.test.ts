/** Reading ONNX files: held to what an independent encoder (onnx-proto) was given, and to a line for everything that is wrong. */
import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { onnx } from "onnx-proto";
import { afterAll, expect, test } from "vitest";
import { importOnnx } from "../compiler/frontends/onnx/import.ts";
import { type OnnxModel, type OnnxTensor, readOnnx, readOnnxBytes, readOnnxTensor } from "../compiler/frontends/onnx.ts";
import { inspect } from "../compiler/inspect.ts";
import { UserError } from "../ir/error.ts";
import { evaluate, randomNumbers, type Tensor, typeText } from "../ir/index.ts";

const folder = mkdtempSync(join(tmpdir(), "step3c-onnx-"));
afterAll(() => rmSync(folder, { recursive: true }));

const { AttributeProto, TensorProto } = onnx;
const type = (dims: readonly (number | string)[], elemType = 1): onnx.ITypeProto => ({
  tensorType: { elemType, shape: { dim: dims.map((d) => (typeof d === "number" ? { dimValue: d } : { dimParam: d })) } },
});
const ofNumbers = (name: string, dataType: number, dims: readonly number[], data: onnx.ITensorProto): onnx.ITensorProto => ({
  name,
  dataType,
  dims: [...dims],
  ...data,
});
const relu = (input: string, output: string): onnx.INodeProto => ({ opType: "Relu", input: [input], output: [output] });
const modelOf = (graph: onnx.IGraphProto, more: onnx.IModelProto = {}): Uint8Array<ArrayBuffer> =>
  new Uint8Array(onnx.ModelProto.encode({ irVersion: 8, opsetImport: [{ domain: "", version: 17 }], graph, ...more }).finish());
const chain = (more: onnx.IGraphProto = {}): onnx.IGraphProto => ({
  name: "chain",
  input: [{ name: "x", type: type(["N", 4]) }],
  output: [{ name: "y", type: type(["N", 4]) }],
  node: [relu("x", "h"), relu("h", "y")],
  ...more,
});
const readTensor = (tensor: onnx.ITensorProto): OnnxTensor =>
  readOnnxTensor(new Uint8Array(TensorProto.encode(tensor).finish()), "t.pb");
const read = (bytes: Uint8Array): OnnxModel => readOnnxBytes(bytes, "m.onnx");
const joined = (...parts: readonly Uint8Array[]): Uint8Array<ArrayBuffer> => {
  const all = new Uint8Array(parts.reduce((n, p) => n + p.length, 0));
  let at = 0;
  for (const p of parts) {
    all.set(p, at);
    at += p.length;
  }
  return all;
};
/** What stands before `length` bytes of a field. */
const head = (number: number, length: number): Uint8Array => {
  const varint = (n: number): number[] => (n < 128 ? [n] : [(n & 127) | 128, ...varint(n >>> 7)]);
  return Uint8Array.from([...varint(number * 8 + 2), ...varint(length)]);
};
/** A field of bytes that an encoder of an older schema does not have. */
const field = (number: number, bytes: Uint8Array): Uint8Array => joined(head(number, bytes.length), bytes);
const utf8 = (s: string): Uint8Array => new Uint8Array(new TextEncoder().encode(s));

test("names, types, attributes and subgraphs are what was written", () => {
  const inner = chain({ name: "inner", input: [], output: [{ name: "z", type: type([]) }], node: [relu("x", "z")] });
  const attribute: onnx.IAttributeProto[] = [
    { name: "f", type: AttributeProto.AttributeType.FLOAT, f: 0.5 },
    { name: "i", type: AttributeProto.AttributeType.INT, i: -7 },
    { name: "s", type: AttributeProto.AttributeType.STRING, s: utf8("text") },
    { name: "fs", type: AttributeProto.AttributeType.FLOATS, floats: [1, 2.5] },
    { name: "is", type: AttributeProto.AttributeType.INTS, ints: [1, -2, 3] },
    { name: "ss", type: AttributeProto.AttributeType.STRINGS, strings: [utf8("a"), utf8("b")] },
    { name: "t", type: AttributeProto.AttributeType.TENSOR, t: ofNumbers("", 7, [2], { int64Data: [5, -6] }) },
    { name: "then_branch", type: AttributeProto.AttributeType.GRAPH, g: inner },
  ];
  const node = [{ ...relu("x", "y"), name: "first", domain: "com.microsoft", attribute }];
  const m = read(modelOf(chain({ node }), { producerName: "maker", functions: [{ name: "f", domain: "d" }] }));
  expect([m.ir, m.producer, [...m.opsets], [...m.functions.keys()], m.unread]).toEqual([8, "maker", [["", 17]], ["d.f"], []]);
  expect(m.graph.inputs).toEqual([{ name: "x", type: { kind: "tensor", dtype: "f32", shape: ["N", 4] } }]);
  const [n] = m.graph.nodes;
  expect([n?.op, n?.domain, n?.name, n?.inputs, n?.outputs]).toEqual(["Relu", "com.microsoft", "first", ["x"], ["y"]]);
  const value = (name: string): unknown => n?.attributes.get(name)?.value;
  expect([value("f"), value("i"), value("fs"), value("is")]).toEqual([
    0.5,
    -7n,
    Float64Array.of(1, 2.5),
    BigInt64Array.of(1n, -2n, 3n),
  ]);
  expect([value("s"), value("ss")]).toEqual([utf8("text"), [utf8("a"), utf8("b")]]);
  const t = value("t") as { shape: number[]; bytes: () => Uint8Array };
  expect([t.shape, t.bytes()]).toEqual([[2], new Uint8Array(BigInt64Array.of(5n, -6n).buffer)]);
  expect((value("then_branch") as OnnxModel["graph"]).nodes[0]?.place).toBe(
    "graph.node[0] 'first' (com.microsoft.Relu): attribute 'then_branch'.node[0] (Relu)",
  );
});

test("initializers of every type, raw and as numbers", () => {
  const { DataType: T } = TensorProto;
  const raw = (bits: number): Uint8Array => Uint8Array.from({ length: Math.ceil((3 * bits) / 8) }, (_, i) => i + 1);
  const widths: readonly (readonly [code: number, name: string, bits: number])[] = [
    [T.FLOAT, "f32", 32],
    [T.UINT8, "u8", 8],
    [T.INT8, "i8", 8],
    [T.UINT16, "u16", 16],
    [T.INT16, "i16", 16],
    [T.INT32, "i32", 32],
    [T.INT64, "i64", 64],
    [T.BOOL, "bool", 8],
    [T.FLOAT16, "f16", 16],
    [T.DOUBLE, "f64", 64],
    [T.UINT32, "u32", 32],
    [T.UINT64, "u64", 64],
    [T.BFLOAT16, "bf16", 16],
    [17, "e4m3", 8],
    [19, "e5m2", 8],
    [21, "u4", 4],
    [22, "i4", 4],
  ];
  for (const [code, name, bits] of widths) {
    const tensor = readTensor(ofNumbers("w", code, [3], { rawData: raw(bits) }));
    expect([tensor.dtype, tensor.shape, tensor.bytes()]).toEqual([name, [3], raw(bits)]);
  }
  const numbers = (code: number, data: onnx.ITensorProto): Uint8Array => readTensor(ofNumbers("w", code, [2], data)).bytes();
  expect(numbers(T.FLOAT, { floatData: [1.5, -2] })).toEqual(new Uint8Array(Float32Array.of(1.5, -2).buffer));
  expect(numbers(T.DOUBLE, { doubleData: [1e300, -2] })).toEqual(new Uint8Array(Float64Array.of(1e300, -2).buffer));
  expect(numbers(T.INT8, { int32Data: [-1, 7] })).toEqual(Uint8Array.of(255, 7));
  expect(numbers(T.BFLOAT16, { int32Data: [0x3f80, 0xc000] })).toEqual(Uint8Array.of(0x80, 0x3f, 0, 0xc0));
  expect(numbers(T.UINT32, { uint64Data: [4294967295, 1] })).toEqual(new Uint8Array(Uint32Array.of(4294967295, 1).buffer));
  expect(numbers(22, { int32Data: [0x21] })).toEqual(Uint8Array.of(0x21));
});

test("data beside the model is read when it is asked for, and held to the file's size", () => {
  const weights = Uint8Array.from({ length: 64 }, (_, i) => i);
  writeFileSync(join(folder, "w.bin"), weights);
  const outside = (entries: Record<string, string>): string => {
    const externalData = Object.entries(entries).map(([key, value]) => ({ key, value }));
    const initializer = [ofNumbers("w", 1, [4], { dataLocation: 1, externalData })];
    const path = join(folder, "m.onnx");
    writeFileSync(path, modelOf(chain({ initializer })));
    return path;
  };
  const bytes = (path: string): Uint8Array => readOnnx(path).graph.initialisers.get("w")?.bytes() as Uint8Array;
  expect(bytes(outside({ location: "w.bin", offset: "16", length: "16" }))).toEqual(weights.subarray(16, 32));
  expect(bytes(outside({ location: "w.bin" }))).toEqual(weights.subarray(0, 16));
  for (const [entries, what] of [
    [{ location: "w.bin", offset: "60" }, "its bytes end at 76 of"],
    [{ location: "w.bin", offset: "-4" }, "external_data.offset is '-4'"],
    [{ location: "w.bin", offset: "99999999999999999999" }, "external_data.offset is"],
    [{ location: "w.bin", length: "12" }, "external_data.length is 12 where its shape and type have 16 bytes"],
    [{ location: "../w.bin" }, "which is not beside the model"],
    [{ location: "/etc/passwd" }, "which is not beside the model"],
    [{ location: "none.bin" }, "ENOENT"],
    [{}, "external data at ''"],
  ] as const)
    expect(() => bytes(outside(entries))).toThrow(new RegExp(`^.*m\\.onnx: graph\\.initializer\\[0\\] 'w': [^\\n]*${what}`));
});

test("fields that older readers drop are kept, and those that nobody knows are told", () => {
  const namespace = joined(field(1, utf8("namespace")), field(2, utf8("model.layers.3.self_attn")));
  const node = joined(onnx.NodeProto.encode(relu("x", "y")).finish(), field(9, namespace), field(10, utf8("device")));
  const graph = joined(onnx.GraphProto.encode(chain({ node: [] })).finish(), field(1, node));
  const m = read(joined(onnx.ModelProto.encode({ irVersion: 10 }).finish(), field(7, graph), field(99, utf8("new"))));
  expect([...(m.graph.nodes[0]?.metadata ?? [])]).toEqual([["namespace", "model.layers.3.self_attn"]]);
  expect(m.unread).toEqual(["graph.node.field 10", "field 99"]);
});

test("a message in two parts is one: its lists go on, its last value counts", () => {
  const part = (t: onnx.ITensorProto): Uint8Array => field(5, TensorProto.encode(t).finish());
  const attribute = joined(
    onnx.AttributeProto.encode({ name: "t", type: 4 }).finish(),
    part({ dims: [2], dataType: 6, int32Data: [1, 2] }),
    part({ dims: [2], dataType: 7, int64Data: [3, 4, 5, 6] }),
  );
  const node = joined(onnx.NodeProto.encode(relu("x", "y")).finish(), field(5, attribute));
  const graph = joined(onnx.GraphProto.encode(chain({ node: [] })).finish(), field(1, node));
  const decoded = onnx.ModelProto.decode(joined(onnx.ModelProto.encode({ irVersion: 8 }).finish(), field(7, graph)));
  expect(decoded.graph?.node?.[0]?.attribute?.[0]?.t?.dataType).toBe(7);
  const m = read(joined(onnx.ModelProto.encode({ irVersion: 8 }).finish(), field(7, graph)));
  const t = m.graph.nodes[0]?.attributes.get("t")?.value as OnnxTensor;
  expect([t.dtype, t.shape]).toEqual(["i64", [2, 2]]);
  expect(t.bytes()).toEqual(new Uint8Array(BigInt64Array.of(3n, 4n, 5n, 6n).buffer));
});

/** Subgraphs within subgraphs. */
const nested = (depth: number): Uint8Array => {
  const node = onnx.NodeProto.encode({ opType: "Loop" }).finish();
  const attribute = onnx.AttributeProto.encode({ name: "body", type: 5 }).finish();
  const parts: Uint8Array[] = [];
  let length = 0;
  const before = (part: Uint8Array): void => {
    parts.push(part);
    length += part.length;
  };
  for (let i = 0; i < depth; i++) {
    before(head(6, length));
    before(attribute);
    before(head(5, length));
    before(node);
    before(head(1, length));
  }
  before(head(7, length));
  return joined(onnx.ModelProto.encode({ irVersion: 8 }).finish(), ...parts.reverse());
};

test("nodes may stand before those whose results they read, within graphs too", () => {
  const { graph } = read(modelOf(chain({ node: [relu("h", "y"), relu("g", "h"), relu("x", "g")] })));
  expect(graph.nodes.map((n) => n.outputs[0])).toEqual(["g", "h", "y"]);
  const inner: onnx.IGraphProto = { name: "inner", output: [{ name: "z", type: type(["N", 4]) }], node: [relu("g", "z")] };
  const branch = ["then_branch", "else_branch"].map((name) => ({ name, type: AttributeProto.AttributeType.GRAPH, g: inner }));
  const node = [{ opType: "If", input: ["c"], output: ["y"], attribute: branch }, relu("x", "g")];
  const initializer = [ofNumbers("c", TensorProto.DataType.BOOL, [], { int32Data: [1] })];
  expect(read(modelOf(chain({ node, initializer }))).graph.nodes.map((n) => n.op)).toEqual(["Relu", "If"]);
});

test("sizes that are named apart and have to be one are one", () => {
  const input = [
    { name: "x", type: type(["past", 4]) },
    { name: "y", type: type(["now", 4]) },
    { name: "z", type: type(["total", 1]) },
  ];
  const node = [
    { opType: "Concat", input: ["x", "y"], output: ["xy"], attribute: [{ name: "axis", type: 2, i: 0 }] },
    { opType: "Add", input: ["xy", "z"], output: ["sum"] },
  ];
  const output = [{ name: "sum", type: type(["total", 4]) }];
  const model = read(modelOf({ name: "apart", input, node, output }));
  const limits = new Map(["past", "now"].map((name) => [name, [1, 8] as const]));
  const { graph } = importOnnx(model, "m.onnx", { limits });
  expect(graph.inputs.map((v) => typeText(v.type))).toEqual(["f32[past,4]", "f32[now,4]", "f32[now+past,1]"]);
  expect(graph.symbols.map((v) => v.name)).toEqual(["past", "now"]);
  // a symbol that stays needs limits, and a number is not made of a symbol
  expect(() => importOnnx(model, "m.onnx", { limits: new Map([["past", [1, 8]]]) })).toThrow(/m\.onnx: .*'now' has no limit/);
  const wrong = [{ name: "z", type: type([3, 1]) }];
  const unfit = read(modelOf({ name: "apart", input: [...input.slice(0, 2), ...wrong], node, output }));
  expect(() => importOnnx(unfit, "m.onnx", { limits })).toThrow("do not broadcast: now+past against 3");
});

test("before opset 7 an operand's axes stand beside those that its attribute names, and slopes are of channels", () => {
  const tensor = (shape: readonly number[]): Tensor => ({
    kind: "tensor",
    dtype: "f32",
    shape,
    data: Float64Array.from({ length: shape.reduce((a, b) => a * b, 1) }, (_, i) => (i % 2 === 0 ? i : -i)),
  });
  const inputs = new Map([
    ["x", tensor([2, 3, 4])],
    ["y", tensor([3])],
  ]);
  const results = (node: onnx.INodeProto): number[] => {
    const input = [...inputs].map(([name, t]) => ({ name, type: type(t.shape) }));
    const graph = { name: "old", input, node: [node], output: [{ name: "z", type: type([2, 3, 4]) }] };
    const model = read(modelOf(graph, { opsetImport: [{ domain: "", version: 6 }] }));
    const imported = importOnnx(model, "m.onnx");
    return [...(evaluate(imported.graph, inputs, imported.weight).get("z") as Tensor).data];
  };
  const [x, y] = [...inputs.values()].map((t) => t.data) as [Float64Array, Float64Array];
  const channel = (i: number): number => y[Math.floor(i / 4) % 3] as number;
  const attribute = ["axis", "broadcast"].map((name) => ({ name, type: 2, i: 1 }));
  expect(results({ opType: "Sub", input: ["x", "y"], output: ["z"], attribute })).toEqual([...x].map((v, i) => v - channel(i)));
  expect(results({ opType: "PRelu", input: ["x", "y"], output: ["z"] })).toEqual(
    [...x].map((v, i) => (v < 0 ? v * channel(i) : v)),
  );
});

test("whatever is wrong gets a line that names node and field", () => {
  const w = (data: onnx.ITensorProto, dims: readonly number[] = [2]): Uint8Array =>
    modelOf(chain({ initializer: [ofNumbers("w", 1, dims, data)] }));
  const twice = { name: "a", type: 2, i: 1 };
  const cases: readonly (readonly [Uint8Array, string])[] = [
    [new Uint8Array(), "ir_version: it is missing"],
    [utf8("not a model at all"), "wire type"],
    [onnx.ModelProto.encode({ irVersion: 8 }).finish(), "graph: it is missing"],
    [modelOf(chain(), { irVersion: 14 }), "ir_version: 14, and step3c reads up to 13"],
    [modelOf(chain(), { opsetImport: [{ version: 0 }] }), "opset_import[0]: version 0 of ''"],
    [
      modelOf(chain({ node: [relu("h", "y"), relu("y", "h")] })),
      "graph.node[0] (Relu): it reads 'h', which nothing before it makes: nodes read each other in a circle",
    ],
    [modelOf(chain({ node: [relu("q", "y")] })), "graph.node[0] (Relu): it reads 'q', which nothing makes"],
    [modelOf(chain({ node: [relu("x", "y"), relu("x", "y")] })), "graph.node[1] (Relu): it makes 'y', which is there already"],
    [modelOf(chain({ node: [relu("x", "x")] })), "graph.node[0] (Relu): it makes 'x', which is there already"],
    [modelOf(chain({ node: [] })), "graph.output[0]: nothing makes 'y'"],
    [modelOf(chain({ node: [{ name: "n", input: ["x"], output: ["y"] }] })), "graph.node[0] 'n' (): a node without op_type"],
    [modelOf(chain({ node: [{ ...relu("x", "y"), attribute: [twice, twice] }] })), "attribute 'a' is there twice"],
    [
      modelOf(
        chain({ node: [{ ...relu("x", "y"), attribute: [{ name: "a", type: 77 as onnx.AttributeProto.AttributeType }] }] }),
      ),
      "attribute type 77 is none of ONNX's",
    ],
    [modelOf(chain({ input: [{ name: "x" }, { name: "x" }] })), "graph.input[1]: 'x' is there twice"],
    [w({ rawData: new Uint8Array(7) }), "graph.initializer[0] 'w': 7 bytes of data where its shape and type have 8"],
    [w({ floatData: [1] }), "graph.initializer[0] 'w': 4 bytes of data where its shape and type have 8"],
    [w({ doubleData: [1, 2] }), "graph.initializer[0] 'w': 0 bytes of data where its shape and type have 8"],
    [w({}, [-2]), "graph.initializer[0] 'w': a dimension of -2"],
    [w({}, [2 ** 31, 2 ** 31, 2 ** 31]), "are more than 2^40 elements"],
    [modelOf(chain({ initializer: [ofNumbers("w", 99, [1], {})] })), "graph.initializer[0] 'w': data type 99 is none of ONNX's"],
    [nested(10_000), "messages within messages, 100 deep"],
    [modelOf(chain()).slice(0, -3), "bytes are announced where"],
  ];
  for (const [bytes, what] of cases) {
    expect(() => read(bytes), what).toThrow(UserError);
    const { message } = (() => {
      try {
        return read(bytes) as never;
      } catch (error) {
        return error as UserError;
      }
    })();
    expect(message).toContain(what);
    expect(message).toMatch(/^m\.onnx: [^\n]+$/);
    expect(message.length, message).toBeLessThan(1200);
  }
});

test("changed and cut bytes are read, or refused in one line", () => {
  const random = randomNumbers(11);
  const attribute = [{ name: "g", type: 5, g: chain() }];
  const whole = modelOf(
    chain({
      node: [{ ...relu("x", "y"), attribute }],
      initializer: [ofNumbers("w", 1, [2, 3], { floatData: [1, 2, 3, 4, 5, 6] })],
    }),
    { functions: [{ name: "f", node: [relu("a", "b")] }], metadataProps: [{ key: "k", value: "v" }] },
  );
  let refused = 0;
  for (let round = 0; round < 5000; round++) {
    let bytes = whole.slice(0, random() < 0.2 ? Math.floor(random() * whole.length) : whole.length);
    if (random() < 0.1) bytes = joined(bytes, bytes);
    for (let n = Math.floor(random() * 4); n >= 0 && bytes.length > 0; n--)
      bytes[Math.floor(random() * bytes.length)] = Math.floor(random() * 256);
    try {
      read(bytes);
    } catch (error) {
      refused++;
      expect(error).toBeInstanceOf(UserError);
      expect((error as UserError).message).toMatch(/^m\.onnx: [^\n]+$/);
    }
  }
  expect(refused).toBeGreaterThan(2000);
});

test("step3c inspect says what a model holds; compile asks for limits of the sizes that it leaves open", () => {
  const path = join(folder, "inspected.onnx");
  writeFileSync(path, modelOf(chain({ initializer: [ofNumbers("w", 1, [2], { floatData: [1, 2] })] })));
  expect(inspect(path)).toBe(
    "onnx chain: IR 8, opset 17\n2 nodes, 0 with metadata; 1 initializers of 0.0 MiB; 0 functions\n" +
      "input x f32[N,4]\noutput y f32[N,4]\n     2 Relu\n",
  );
  const { status, stderr } = spawnSync(process.execPath, [join("dist", "compiler", "cli.js"), "compile", path], {
    encoding: "utf8",
  });
  expect([status, stderr]).toEqual([1, `step3c: ${path}: graph.input[0] 'x': size 'N' has no limit; add --dim N=MAX\n`]);
});
