/**
 * Models of the ONNX format (onnx.proto of IR version 13): what a file says, checked for what any use of it needs. Operators are not looked at
 * here. Numbers of fields and data types are those of onnx.proto.
 */
import { closeSync, fstatSync, openSync, readFileSync, readSync, statSync } from "node:fs";
import { dirname, isAbsolute, join, normalize } from "node:path";
import { UserError } from "../../ir/error.ts";
import { printable } from "./json.ts";
import { decodeMessage, type Field, type Message, type Messages, type Numbers } from "./protobuf.ts";

const entries = "StringStringEntryProto[]";
const messages: Messages = {
  ModelProto: {
    1: ["ir_version", "int64"],
    2: ["producer_name", "string"],
    3: ["producer_version", "string"],
    4: ["domain", "string"],
    5: ["model_version", "int64"],
    6: ["doc_string", "string"],
    7: ["graph", "GraphProto"],
    8: ["opset_import", "OperatorSetIdProto[]"],
    14: ["metadata_props", entries],
    20: ["training_info", "bytes[]"],
    25: ["functions", "FunctionProto[]"],
  },
  GraphProto: {
    1: ["node", "NodeProto[]"],
    2: ["name", "string"],
    5: ["initializer", "TensorProto[]"],
    10: ["doc_string", "string"],
    11: ["input", "ValueInfoProto[]"],
    12: ["output", "ValueInfoProto[]"],
    13: ["value_info", "ValueInfoProto[]"],
    14: ["quantization_annotation", "bytes[]"],
    15: ["sparse_initializer", "SparseTensorProto[]"],
    16: ["metadata_props", entries],
  },
  NodeProto: {
    1: ["input", "string[]"],
    2: ["output", "string[]"],
    3: ["name", "string"],
    4: ["op_type", "string"],
    5: ["attribute", "AttributeProto[]"],
    6: ["doc_string", "string"],
    7: ["domain", "string"],
    8: ["overload", "string"],
    9: ["metadata_props", entries],
  },
  AttributeProto: {
    1: ["name", "string"],
    2: ["f", "float"],
    3: ["i", "int64"],
    4: ["s", "bytes"],
    5: ["t", "TensorProto"],
    6: ["g", "GraphProto"],
    7: ["floats", "float*"],
    8: ["ints", "int64*"],
    9: ["strings", "bytes[]"],
    10: ["tensors", "TensorProto[]"],
    11: ["graphs", "GraphProto[]"],
    13: ["doc_string", "string"],
    14: ["tp", "TypeProto"],
    15: ["type_protos", "TypeProto[]"],
    20: ["type", "int32"],
    21: ["ref_attr_name", "string"],
    22: ["sparse_tensor", "SparseTensorProto"],
    23: ["sparse_tensors", "SparseTensorProto[]"],
  },
  TensorProto: {
    1: ["dims", "int64*"],
    2: ["data_type", "int32"],
    4: ["float_data", "float*"],
    5: ["int32_data", "int32*"],
    6: ["string_data", "bytes[]"],
    7: ["int64_data", "int64*"],
    8: ["name", "string"],
    9: ["raw_data", "bytes"],
    10: ["double_data", "double*"],
    11: ["uint64_data", "uint64*"],
    12: ["doc_string", "string"],
    13: ["external_data", entries],
    14: ["data_location", "int32"],
    16: ["metadata_props", entries],
  },
  SparseTensorProto: { 1: ["values", "TensorProto"], 2: ["indices", "TensorProto"], 3: ["dims", "int64*"] },
  ValueInfoProto: {
    1: ["name", "string"],
    2: ["type", "TypeProto"],
    3: ["doc_string", "string"],
    4: ["metadata_props", entries],
  },
  TypeProto: {
    1: ["tensor_type", "TensorTypeProto"],
    4: ["sequence_type", "ElementTypeProto"],
    5: ["map_type", "MapTypeProto"],
    6: ["denotation", "string"],
    8: ["sparse_tensor_type", "TensorTypeProto"],
    9: ["optional_type", "ElementTypeProto"],
  },
  TensorTypeProto: { 1: ["elem_type", "int32"], 2: ["shape", "TensorShapeProto"] },
  ElementTypeProto: { 1: ["elem_type", "TypeProto"] },
  MapTypeProto: { 1: ["key_type", "int32"], 2: ["value_type", "TypeProto"] },
  TensorShapeProto: { 1: ["dim", "DimensionProto[]"] },
  DimensionProto: { 1: ["dim_value", "int64"], 2: ["dim_param", "string"], 3: ["denotation", "string"] },
  OperatorSetIdProto: { 1: ["domain", "string"], 2: ["version", "int64"] },
  StringStringEntryProto: { 1: ["key", "string"], 2: ["value", "string"] },
  FunctionProto: {
    1: ["name", "string"],
    4: ["input", "string[]"],
    5: ["output", "string[]"],
    6: ["attribute", "string[]"],
    7: ["node", "NodeProto[]"],
    8: ["doc_string", "string"],
    9: ["opset_import", "OperatorSetIdProto[]"],
    10: ["domain", "string"],
    11: ["attribute_proto", "AttributeProto[]"],
    12: ["value_info", "ValueInfoProto[]"],
    13: ["overload", "string"],
    14: ["metadata_props", entries],
  },
};

/** TensorProto.DataType: a name, and bits of an element; strings have none. */
const dataTypes: readonly (readonly [name: string, bits: number])[] = [
  ["undefined", 0],
  ["f32", 32],
  ["u8", 8],
  ["i8", 8],
  ["u16", 16],
  ["i16", 16],
  ["i32", 32],
  ["i64", 64],
  ["string", 0],
  ["bool", 8],
  ["f16", 16],
  ["f64", 64],
  ["u32", 32],
  ["u64", 64],
  ["complex64", 64],
  ["complex128", 128],
  ["bf16", 16],
  ["e4m3", 8],
  ["e4m3fnuz", 8],
  ["e5m2", 8],
  ["e5m2fnuz", 8],
  ["u4", 4],
  ["i4", 4],
  ["e2m1", 4],
  ["e8m0", 8],
  ["u2", 2],
  ["i2", 2],
];

/** A tensor's elements are given when they are asked for: those of other files are read then. */
export interface OnnxTensor {
  readonly name: string;
  readonly dtype: string;
  readonly shape: readonly number[];
  /** bytes of the elements; 0 for strings */
  readonly size: number;
  /** Row-major and little endian; elements of fewer than 8 bits fill bytes from the lowest bit on. Throws a UserError when the file is not there. */
  bytes(): Uint8Array;
  /** of a tensor of strings */
  readonly strings: readonly Uint8Array[];
}
/** A number, a name that stands for one, or nothing known. */
export type OnnxDim = number | string | undefined;
export interface OnnxType {
  readonly kind: "tensor" | "sparse tensor" | "sequence" | "map" | "optional" | "unknown";
  /** of tensors */
  readonly dtype: string | undefined;
  /** of tensors; undefined when not even the rank is known */
  readonly shape: readonly OnnxDim[] | undefined;
}
export interface OnnxValue {
  readonly name: string;
  readonly type: OnnxType;
}
export type OnnxAttribute =
  | { readonly kind: "float"; readonly value: number }
  | { readonly kind: "int"; readonly value: bigint }
  | { readonly kind: "string"; readonly value: Uint8Array }
  | { readonly kind: "tensor"; readonly value: OnnxTensor }
  | { readonly kind: "graph"; readonly value: OnnxGraph }
  | { readonly kind: "floats"; readonly value: Float64Array }
  | { readonly kind: "ints"; readonly value: BigInt64Array }
  | { readonly kind: "strings"; readonly value: readonly Uint8Array[] }
  /** of a function: the attribute of its caller that is meant */
  | { readonly kind: "reference"; readonly value: string }
  /** read by nobody yet: sparse tensors, types, lists of tensors and of graphs */
  | { readonly kind: "other"; readonly value: string };
export interface OnnxNode {
  readonly op: string;
  readonly domain: string;
  readonly name: string;
  /** names of values; "" where an optional one is left out */
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
  readonly attributes: ReadonlyMap<string, OnnxAttribute>;
  /** metadata_props: exporters say which module a node is of */
  readonly metadata: ReadonlyMap<string, string>;
  /** which of several functions of one name */
  readonly overload: string;
  /** for errors: where it is, and its name and operator */
  readonly place: string;
}
export interface OnnxGraph {
  readonly name: string;
  /** each after those that make what it reads */
  readonly nodes: readonly OnnxNode[];
  readonly inputs: readonly OnnxValue[];
  readonly outputs: readonly OnnxValue[];
  readonly initialisers: ReadonlyMap<string, OnnxTensor>;
  /** types that the file gives of values within */
  readonly values: ReadonlyMap<string, OnnxType>;
}
/** Nodes that stand for a node of another model's. */
export interface OnnxFunction {
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
  readonly nodes: readonly OnnxNode[];
  /** attributes that a caller may leave out, and what they are then */
  readonly defaults: ReadonlyMap<string, OnnxAttribute>;
  readonly opsets: ReadonlyMap<string, number>;
}
export interface OnnxModel {
  readonly ir: number;
  readonly producer: string;
  /** version of each operator set, "" for ONNX's own */
  readonly opsets: ReadonlyMap<string, number>;
  readonly graph: OnnxGraph;
  /** by domain, name and overload: `domain.name`, `name` or `domain.name:overload` */
  readonly functions: ReadonlyMap<string, OnnxFunction>;
  readonly metadata: ReadonlyMap<string, string>;
  /** fields that were not read, by place */
  readonly unread: readonly string[];
}

/** The key of a function in OnnxModel.functions. */
export const functionName = (domain: string, name: string, overload: string): string =>
  `${domain === "" || domain === "ai.onnx" ? "" : `${domain}.`}${name}${overload === "" ? "" : `:${overload}`}`;

const mend = "the file is damaged, or holds something else: export the model again";
const newestIr = 13;
const mostElements = 2 ** 40;
const mostAxes = 64;

const list = (m: Message, name: string): readonly Message[] => (m.get(name) as readonly Message[] | undefined) ?? [];
const text = (m: Message, name: string): string => (m.get(name) as string | undefined) ?? "";
const texts = (m: Message, name: string): readonly string[] => (m.get(name) as readonly string[] | undefined) ?? [];
const entriesOf = (m: Message, name: string): ReadonlyMap<string, string> =>
  new Map(list(m, name).map((e) => [text(e, "key"), text(e, "value")]));

/** Names of values: of a graph, and of those around it. */
class Names {
  private readonly own: Set<string> = new Set();
  private readonly outer: Names | undefined;

  constructor(outer?: Names) {
    this.outer = outer;
  }
  add(name: string): void {
    this.own.add(name);
  }
  has(name: string): boolean {
    return this.own.has(name) || this.outer?.has(name) === true;
  }
}

/** Places within places are long. */
const longestPlace = 600;

/** Names that a node reads, those of graphs within it too. */
const readsOf = (node: Message): readonly string[] => {
  const reads: string[] = [];
  const todo = [node];
  for (let n = todo.pop(); n !== undefined; n = todo.pop()) {
    reads.push(...texts(n, "input"));
    for (const a of list(n, "attribute"))
      for (const g of [a.get("g") as Message | undefined, ...list(a, "graphs")]) if (g) todo.push(...list(g, "node"));
  }
  return reads;
};

/** The nodes' numbers in an order in which each comes after those whose results it reads; that of the file where they read each other in a circle. */
const orderOf = (nodes: readonly Message[]): readonly number[] => {
  const maker = new Map<string, number>();
  for (const [i, n] of nodes.entries()) for (const v of texts(n, "output")) if (v !== "" && !maker.has(v)) maker.set(v, i);
  const before = nodes.map((n) => readsOf(n).flatMap((v) => maker.get(v) ?? []));
  if (before.every((makers, i) => makers.every((j) => j < i))) return nodes.map((_, i) => i);
  const order: number[] = [];
  const state = new Uint8Array(nodes.length); // 1: begun, 2: in the order
  for (const [first] of nodes.entries()) {
    const todo = [first];
    while (todo.length > 0) {
      const i = todo.at(-1) as number;
      const next = state[i] === 0 ? before[i]?.filter((j) => state[j] === 0 && j !== i) : [];
      if (state[i] === 0) state[i] = 1;
      if (next !== undefined && next.length > 0) {
        todo.push(...next.reverse());
        continue;
      }
      todo.pop();
      if (state[i] !== 2) order.push(i);
      state[i] = 2;
    }
  }
  const at = new Int32Array(nodes.length);
  for (const [place, i] of order.entries()) at[i] = place;
  const right = before.every((makers, i) => makers.every((j) => (at[j] as number) < (at[i] as number)));
  return right ? order : nodes.map((_, i) => i);
};

/** Reads one file. */
class Reader {
  private readonly file: string;

  constructor(file: string) {
    this.file = file;
  }

  fail(place: string, what: string): never {
    throw new UserError(
      `${this.file}: ${printable(place, longestPlace)}: ${printable(what, longestPlace)}; export the model again`,
    );
  }

  private dtype(code: Field | undefined, place: string): readonly [string, number] {
    const found = dataTypes[Number(code ?? 0)];
    return found === undefined || found[0] === "undefined"
      ? this.fail(place, `data type ${String(code ?? 0)} is none of ONNX's`)
      : found;
  }

  private dims(dims: BigInt64Array, place: string): readonly number[] {
    if (dims.length > mostAxes) this.fail(place, `${dims.length} axes, more than ${mostAxes}`);
    let count = 1n;
    for (const d of dims) {
      if (d < 0n) this.fail(place, `a dimension of ${d}`);
      count *= d === 0n ? 1n : d;
      if (count > BigInt(mostElements)) this.fail(place, `dimensions [${[...dims].join(", ")}] are more than 2^40 elements`);
    }
    return [...dims].map(Number);
  }

  tensor(m: Message, place: string): OnnxTensor {
    const name = text(m, "name");
    const where = name === "" ? place : `${place} '${name}'`;
    const [dtype, bits] = this.dtype(m.get("data_type"), where);
    const shape = this.dims((m.get("dims") as BigInt64Array | undefined) ?? new BigInt64Array(), where);
    const count = shape.reduce((n, d) => n * d, 1);
    const size = Math.ceil((count * bits) / 8);
    const strings = (m.get("string_data") as readonly Uint8Array[] | undefined) ?? [];
    if (dtype === "string" && strings.length !== count)
      this.fail(where, `${strings.length} strings where its shape has ${count}`);
    const outside = m.get("data_location") === 1;
    const from = outside ? this.outside(m, size, where) : undefined;
    const inside = outside ? undefined : this.inside(m, dtype, size, where);
    return { name, dtype, shape, size, strings, bytes: () => inside ?? this.read(from as Outside, where) };
  }

  /** Elements that are in the message: raw, or as numbers. */
  private inside(m: Message, dtype: string, size: number, where: string): Uint8Array {
    if (dtype === "string") return new Uint8Array();
    const raw = m.get("raw_data") as Uint8Array | undefined;
    const bytes = raw ?? bytesOfNumbers(m, dtype) ?? new Uint8Array();
    if (bytes.length !== size) this.fail(where, `${bytes.length} bytes of data where its shape and type have ${size}`);
    return bytes;
  }

  /** Where the elements are, in another file beside this one. */
  private outside(m: Message, size: number, where: string): Outside {
    const facts = entriesOf(m, "external_data");
    const location = facts.get("location") ?? "";
    if (location === "" || isAbsolute(location) || /^\.\.(\/|$)/.test(normalize(location)))
      this.fail(where, `external data at '${location}', which is not beside the model`);
    const number = (key: string, otherwise: number): number => {
      const given = facts.get(key);
      if (given === undefined) return otherwise;
      const n = Number(given);
      return /^\d+$/.test(given) && Number.isSafeInteger(n) ? n : this.fail(where, `external_data.${key} is '${given}'`);
    };
    const [offset, length] = [number("offset", 0), number("length", size)];
    if (length !== size) this.fail(where, `external_data.length is ${length} where its shape and type have ${size} bytes`);
    return { path: join(dirname(this.file), location), offset, size };
  }

  private read({ path, offset, size }: Outside, where: string): Uint8Array {
    let fd: number | undefined;
    try {
      if (!statSync(path).isFile()) this.fail(where, `${path} is not a file`);
      fd = openSync(path, "r");
      const there = fstatSync(fd).size;
      if (offset + size > there) this.fail(where, `its bytes end at ${offset + size} of ${path}, which has ${there}`);
      const bytes = new Uint8Array(size);
      for (let at = 0; at < size; ) {
        const n = readSync(fd, bytes, at, Math.min(size - at, 2 ** 30), offset + at);
        if (n === 0) this.fail(where, `${path} ended while it was read`);
        at += n;
      }
      return bytes;
    } catch (error) {
      if (error instanceof UserError) throw error;
      return this.fail(where, `${path}: ${(error as Error).message}`);
    } finally {
      if (fd !== undefined) closeSync(fd);
    }
  }

  type(m: Message | undefined, place: string): OnnxType {
    const tensor = (m?.get("tensor_type") ?? m?.get("sparse_tensor_type")) as Message | undefined;
    const kinds = ["sparse_tensor_type", "sequence_type", "map_type", "optional_type"] as const;
    const kind =
      m?.has("tensor_type") === true
        ? "tensor"
        : kinds
            .find((k) => m?.has(k) === true)
            ?.replace("_type", "")
            .replace("_", " ");
    if (tensor === undefined) return { kind: (kind ?? "unknown") as OnnxType["kind"], dtype: undefined, shape: undefined };
    const shape = tensor.get("shape") as Message | undefined;
    const dims = shape && list(shape, "dim");
    if (dims !== undefined && dims.length > mostAxes) this.fail(place, `${dims.length} axes, more than ${mostAxes}`);
    return {
      kind: kind as OnnxType["kind"],
      dtype: this.dtype(tensor.get("elem_type"), place)[0],
      shape: dims?.map((d) => {
        const value = d.get("dim_value") as bigint | undefined;
        const name = text(d, "dim_param");
        if (value === undefined) return name === "" ? undefined : name;
        return value >= 0n && value <= BigInt(mostElements) ? Number(value) : this.fail(place, `a dimension of ${value}`);
      }),
    };
  }

  private value(m: Message, place: string): OnnxValue {
    const name = text(m, "name");
    return { name, type: this.type(m.get("type") as Message | undefined, `${place} '${name}'`) };
  }

  private attribute(m: Message, place: string, outer: Names): OnnxAttribute {
    const reference = text(m, "ref_attr_name");
    if (reference !== "") return { kind: "reference", value: reference };
    const kinds = [
      "undefined",
      "f",
      "i",
      "s",
      "t",
      "g",
      "floats",
      "ints",
      "strings",
      "tensors",
      "graphs",
      "sparse_tensor",
      "sparse_tensors",
      "tp",
      "type_protos",
    ];
    // files of the first IR version do not say which field it is
    const stated =
      kinds[Number(m.get("type") ?? 0)] ?? this.fail(place, `attribute type ${String(m.get("type"))} is none of ONNX's`);
    const field = stated === "undefined" ? (kinds.find((k) => m.has(k)) ?? "undefined") : stated;
    const value = m.get(field);
    switch (field) {
      case "f":
        return { kind: "float", value: (value as number | undefined) ?? 0 };
      case "i":
        return { kind: "int", value: (value as bigint | undefined) ?? 0n };
      case "s":
        return { kind: "string", value: (value as Uint8Array | undefined) ?? new Uint8Array() };
      case "t":
        return {
          kind: "tensor",
          value: this.tensor((value as Message | undefined) ?? this.fail(place, "a tensor that is not there"), place),
        };
      case "g":
        return {
          kind: "graph",
          value: this.graph((value as Message | undefined) ?? this.fail(place, "a graph that is not there"), place, outer),
        };
      case "floats":
        return { kind: "floats", value: (value as Float64Array | undefined) ?? new Float64Array() };
      case "ints":
        return { kind: "ints", value: (value as BigInt64Array | undefined) ?? new BigInt64Array() };
      case "strings":
        return { kind: "strings", value: (value as readonly Uint8Array[] | undefined) ?? [] };
      case "undefined":
        return this.fail(place, "an attribute without a type");
      default:
        return { kind: "other", value: field };
    }
  }

  node(m: Message, place: string, outer: Names): OnnxNode {
    const [name, op, domain] = [text(m, "name"), text(m, "op_type"), text(m, "domain")];
    const where = `${place}${name === "" ? "" : ` '${name}'`} (${domain === "" ? "" : `${domain}.`}${op})`;
    if (op === "") this.fail(where, "a node without op_type");
    const attributes = new Map<string, OnnxAttribute>();
    for (const a of list(m, "attribute")) {
      const key = text(a, "name");
      if (attributes.has(key)) this.fail(where, `attribute '${key}' is there twice`);
      attributes.set(key, this.attribute(a, `${where}: attribute '${key}'`, outer));
    }
    return {
      op,
      domain: domain === "ai.onnx" ? "" : domain,
      name,
      inputs: texts(m, "input"),
      outputs: texts(m, "output"),
      attributes,
      metadata: entriesOf(m, "metadata_props"),
      overload: text(m, "overload"),
      place: where,
    };
  }

  /** `outer`: names of values that graphs around this one have. */
  graph(m: Message, place: string, outer: Names): OnnxGraph {
    const known = new Names(outer);
    const own = new Set<string>();
    const initialisers = new Map<string, OnnxTensor>();
    for (const [i, t] of list(m, "initializer").entries()) {
      const tensor = this.tensor(t, `${place}.initializer[${i}]`);
      if (tensor.name === "") this.fail(`${place}.initializer[${i}]`, "an initializer without a name");
      if (initialisers.has(tensor.name)) this.fail(`${place}.initializer[${i}]`, `'${tensor.name}' is there twice`);
      initialisers.set(tensor.name, tensor);
      known.add(tensor.name);
      own.add(tensor.name);
    }
    if (list(m, "sparse_initializer").length > 0) this.fail(`${place}.sparse_initializer`, "sparse initializers are not read");
    const inputs = list(m, "input").map((v, i) => this.value(v, `${place}.input[${i}]`));
    for (const [i, { name }] of inputs.entries()) {
      // an initializer may be the default of an input
      if (own.has(name) && !initialisers.has(name)) this.fail(`${place}.input[${i}]`, `'${name}' is there twice`);
      known.add(name);
      own.add(name);
    }
    const nodes = this.nodes(m, place, known, own);
    const outputs = list(m, "output").map((v, i) => this.value(v, `${place}.output[${i}]`));
    for (const [i, { name }] of outputs.entries())
      if (!known.has(name)) this.fail(`${place}.output[${i}]`, `nothing makes '${name}'`);
    const values = new Map(
      list(m, "value_info").map((v, i) => {
        const { name, type } = this.value(v, `${place}.value_info[${i}]`);
        return [name, type] as const;
      }),
    );
    return { name: text(m, "name"), nodes, inputs, outputs, initialisers, values };
  }

  /** `known`: values that the nodes may read; `own`: those that they may not make again. Both grow by what the nodes make. */
  private nodes(m: Message, place: string, known: Names, own: Set<string>): readonly OnnxNode[] {
    const all = list(m, "node");
    return orderOf(all).map((i) => {
      const node = this.node(all[i] as Message, `${place}.node[${i}]`, known);
      const missing = node.inputs.find((v) => v !== "" && !known.has(v));
      if (missing !== undefined) {
        const made = all.some((n) => texts(n, "output").includes(missing));
        this.fail(
          node.place,
          `it reads '${missing}', which ${made ? "nothing before it makes: nodes read each other in a circle" : "nothing makes"}`,
        );
      }
      for (const v of node.outputs) {
        if (v === "") continue;
        if (own.has(v)) this.fail(node.place, `it makes '${v}', which is there already`);
        known.add(v);
        own.add(v);
      }
      return node;
    });
  }

  private opsets(m: Message, place: string): ReadonlyMap<string, number> {
    const opsets = new Map<string, number>();
    for (const [i, o] of list(m, "opset_import").entries()) {
      const domain = text(o, "domain") === "ai.onnx" ? "" : text(o, "domain");
      const version = Number(o.get("version") ?? 0);
      if (version < 1) this.fail(`${place}opset_import[${i}]`, `version ${version} of '${domain}'`);
      opsets.set(domain, Math.max(version, opsets.get(domain) ?? 0));
    }
    return opsets;
  }

  private function(m: Message, place: string): OnnxFunction {
    const [inputs, outputs] = [texts(m, "input"), texts(m, "output")];
    const known = new Names();
    for (const name of inputs) known.add(name);
    const nodes = this.nodes(m, place, known, new Set(inputs));
    const nothing = outputs.find((v) => !known.has(v));
    if (nothing !== undefined) this.fail(place, `nothing makes its output '${nothing}'`);
    const defaults = new Map(
      list(m, "attribute_proto").map((a) => [
        text(a, "name"),
        this.attribute(a, `${place}: attribute '${text(a, "name")}'`, known),
      ]),
    );
    return { inputs, outputs, nodes, defaults, opsets: this.opsets(m, `${place}.`) };
  }

  model(m: Message, unread: readonly string[]): OnnxModel {
    const ir = Number(m.get("ir_version") ?? 0);
    if (ir < 1) this.fail("ir_version", "it is missing: no ONNX model");
    if (ir > newestIr)
      throw new UserError(`${this.file}: ir_version: ${ir}, and step3c reads up to ${newestIr}; export for an older one`);
    const graph = m.get("graph") as Message | undefined;
    if (graph === undefined) this.fail("graph", "it is missing");
    const functions = new Map<string, OnnxFunction>();
    for (const [i, f] of list(m, "functions").entries()) {
      const name = functionName(text(f, "domain"), text(f, "name"), text(f, "overload"));
      if (functions.has(name)) this.fail(`functions[${i}]`, `'${name}' is there twice`);
      functions.set(name, this.function(f, `functions[${i}] '${name}'`));
    }
    return {
      ir,
      producer: [text(m, "producer_name"), text(m, "producer_version")].filter((s) => s !== "").join(" "),
      opsets: this.opsets(m, ""),
      graph: this.graph(graph as Message, "graph", new Names()),
      functions,
      metadata: entriesOf(m, "metadata_props"),
      unread,
    };
  }
}

interface Outside {
  readonly path: string;
  readonly offset: number;
  readonly size: number;
}

type Make = (numbers: Numbers) => ArrayBufferView;
const plain = (numbers: Numbers): Float64Array => Float64Array.from(numbers as Float64Array, Number);
/** The field of TensorProto that holds elements of a type as numbers: most are in int32_data by their bits, and so are packed bytes of less than 8 bits. */
const numbersOf: Readonly<Record<string, readonly [field: string, make: Make]>> = {
  f32: ["float_data", (x) => Float32Array.from(plain(x))],
  complex64: ["float_data", (x) => Float32Array.from(plain(x))],
  f64: ["double_data", plain],
  complex128: ["double_data", plain],
  i64: ["int64_data", (x) => BigInt64Array.from(x as BigInt64Array)],
  u64: ["uint64_data", (x) => BigUint64Array.from(x as BigUint64Array)],
  u32: ["uint64_data", (x) => Uint32Array.from(plain(x))],
  i32: ["int32_data", (x) => Int32Array.from(plain(x))],
  ...Object.fromEntries(
    ["i16", "u16", "f16", "bf16"].map((t) => [t, ["int32_data", (x: Numbers) => Uint16Array.from(plain(x))]]),
  ),
};
const bytesOfNumbers = (m: Message, dtype: string): Uint8Array | undefined => {
  const [field, make] = numbersOf[dtype] ?? ["int32_data", (x: Numbers) => Uint8Array.from(plain(x))];
  const numbers = m.get(field) as Numbers | undefined;
  if (numbers === undefined) return undefined;
  const array = make(numbers);
  return new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
};

/** Reads a model and checks what any use of it needs: names, order, types and sizes. Throws a UserError that names file, node and field. */
export const readOnnx = (path: string): OnnxModel => {
  let bytes: Uint8Array;
  try {
    bytes = new Uint8Array(readFileSync(path));
  } catch (error) {
    throw new UserError(`${path}: ${(error as Error).message}`);
  }
  return readOnnxBytes(bytes, path);
};

/** The same of bytes; `path` names them in errors, and external data lies beside it. */
export const readOnnxBytes = (bytes: Uint8Array, path: string): OnnxModel => {
  const { message, unknown } = decodeMessage(bytes, messages, "ModelProto", path, mend);
  return new Reader(path).model(message, unknown);
};

/** A tensor in a file of its own, as test data of the ONNX project are. */
export const readOnnxTensor = (bytes: Uint8Array, path: string): OnnxTensor => {
  const { message } = decodeMessage(bytes, messages, "TensorProto", path, mend);
  return new Reader(path).tensor(message, "tensor");
};
