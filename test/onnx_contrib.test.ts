/** Operators of com.microsoft, held to ONNX Runtime on small random models of one node. */
import { beforeAll, expect, test } from "vitest";
import { importFor } from "../compiler/frontends/onnx/import.ts";
import { readOnnxBytes } from "../compiler/frontends/onnx.ts";
import { evaluate } from "../ir/evaluate.ts";
import { type DType, drawTensor, randomNumbers, type Tensor, tensor, verify } from "../ir/index.ts";
import { type Attribute, inputsOf, modelOf, type NodeCase, type Operand } from "./onnx_nodes.ts";
import { Ort, type OrtResult } from "./ort.ts";

const random = randomNumbers(20261126);
const drawn = (dtype: DType, shape: readonly number[], draw: Parameters<typeof drawTensor>[1] = "normal"): Tensor =>
  drawTensor({ kind: "tensor", dtype, shape }, draw, random);
const f = (...shape: number[]): Operand => ({ tensor: drawn("f32", shape) });
const w = (...shape: number[]): Operand => ({ tensor: drawn("f32", shape), constant: true });
const positive = (...shape: number[]): Operand => ({ tensor: drawn("f32", shape, "positive"), constant: true });
const bytes = (...shape: number[]): Operand => ({ tensor: drawn("u8", shape, { below: 256 }), constant: true });
const integers = (dtype: DType, shape: readonly number[], values: readonly number[]): Operand => ({
  tensor: { ...tensor(dtype, shape), shape, data: Float64Array.from(values) },
});
const i32 = (...values: number[]): Operand => integers("i32", [values.length], values);
const half = (o: Operand): Operand => ({
  ...o,
  tensor: drawTensor({ kind: "tensor", dtype: "f16", shape: o.tensor.shape }, "normal", random),
});
const scaledBy = (o: Operand, by: number): Operand => ({
  ...o,
  tensor: { ...o.tensor, data: o.tensor.data.map((x) => Math.fround(x * by)) },
});
const float = (x: number): Attribute => ({ float: x });

const cases: NodeCase[] = [];
const add = (
  op: string,
  name: string,
  attributes: Readonly<Record<string, Attribute>>,
  inputs: readonly (Operand | undefined)[],
  outputs: readonly string[] = ["y"],
  domain = "com.microsoft",
): void => {
  cases.push({ name: `${op}: ${name}`, op, domain, attributes, inputs, outputs });
};

// --- functions of elements, normalisations, products ---
add("Gelu", "by erf", {}, [f(3, 5)]);
add("BiasGelu", "row of bias", {}, [f(2, 3, 8), f(8)]);
add("FastGelu", "by tanh", {}, [f(3, 5)]);
add("FastGelu", "with bias", {}, [f(3, 8), f(8)]);
add("QuickGelu", "alpha as it is", {}, [f(3, 5)]);
add("QuickGelu", "alpha 1", { alpha: float(1) }, [f(3, 5)]);
add("FusedMatMul", "alpha", { alpha: float(0.5) }, [f(2, 3, 4), f(4, 5)]);
add("FusedMatMul", "both transposed", { transA: 1, transB: 1 }, [f(2, 4, 3), f(2, 5, 4)]);
add("FusedMatMul", "batch of A behind", { transBatchA: 1, alpha: float(2) }, [f(3, 2, 4), f(2, 4, 5)]);
add("FusedMatMul", "batch of B behind", { transBatchB: 1, transB: 1 }, [f(2, 3, 4), f(5, 2, 4)]);
add("SimplifiedLayerNormalization", "of ONNX's domain", { epsilon: float(1e-6) }, [f(2, 3, 16), f(16)], ["y"], "");
add("SimplifiedLayerNormalization", "f16", {}, [half(f(2, 16)), half(f(16))], ["y"], "");
add("SimplifiedLayerNormalization", "two axes", { axis: 1 }, [f(2, 3, 4), f(3, 4)], ["y"], "");
add(
  "SkipSimplifiedLayerNormalization",
  "sum and result",
  { epsilon: float(1e-5) },
  [f(2, 3, 16), f(2, 3, 16), f(16)],
  ["y", "", "", "s"],
);
add("SkipSimplifiedLayerNormalization", "bias", {}, [f(2, 3, 16), f(2, 3, 16), f(16), f(16)], ["y", "", "", "s"]);
add("SkipSimplifiedLayerNormalization", "skip broadcast", {}, [f(2, 3, 16), f(3, 16), f(16)]);
add("SkipLayerNormalization", "gamma", { epsilon: float(1e-5) }, [f(2, 3, 16), f(2, 3, 16), f(16)]);
add(
  "SkipLayerNormalization",
  "all",
  { epsilon: float(1e-5) },
  [f(2, 3, 16), f(2, 3, 16), f(16), f(16), f(16)],
  ["y", "", "", "s"],
);

// --- positions ---
const places = integers("i64", [2, 3], [0, 4, 7, 1, 2, 3]);
const place = integers("i64", [1], [2]);
add("RotaryEmbedding", "halves", { num_heads: 2 }, [f(2, 3, 32), places, f(10, 8), f(10, 8)]);
add("RotaryEmbedding", "one place", {}, [f(2, 3, 32), place, f(10, 8), f(10, 8)]);
add("RotaryEmbedding", "neighbours", { interleaved: 1 }, [f(2, 3, 32), places, f(10, 8), f(10, 8)]);
add("RotaryEmbedding", "heads first", {}, [f(2, 2, 3, 16), places, f(10, 8), f(10, 8)]);
add("RotaryEmbedding", "a part", { num_heads: 2, rotary_embedding_dim: 8 }, [f(2, 3, 32), places, f(10, 4), f(10, 4)]);
add("RotaryEmbedding", "a part, neighbours", { num_heads: 2, rotary_embedding_dim: 8, interleaved: 1 }, [
  f(2, 2, 3, 16),
  places,
  f(10, 4),
  f(10, 4),
]);

// --- attention ---
const present = ["y", "k", "v"];
const total = (n: number): Operand => integers("i32", [], [n]);
const gqa = (
  name: string,
  attributes: Readonly<Record<string, Attribute>>,
  inputs: readonly (Operand | undefined)[],
  outputs = present,
): void => add("GroupQueryAttention", name, { num_heads: 4, kv_num_heads: 2, ...attributes }, inputs, outputs);
const qkv = (batch: number, rows: number): Operand[] => [f(batch, rows, 64), f(batch, rows, 32), f(batch, rows, 32)];
const caches = (batch: number, length: number): Operand[] => [f(batch, 2, length, 16), f(batch, 2, length, 16)];
const none = [undefined, undefined];
const table = [f(16, 8), f(16, 8)];
gqa("prompt", {}, [...qkv(2, 5), ...none, i32(4, 4), total(5)]);
gqa("packed prompt", { scale: float(0.3) }, [f(2, 5, 128), undefined, undefined, ...none, i32(4, 4), total(5)]);
gqa("prompt padded at the end", {}, [...qkv(2, 5), ...none, i32(2, 4), total(5)]);
gqa("prompt with places", { do_rotary: 1 }, [...qkv(2, 5), ...none, i32(4, 4), total(5), ...table]);
gqa("prompt with places, neighbours", { do_rotary: 1, rotary_interleaved: 1 }, [
  ...qkv(1, 5),
  ...none,
  i32(4),
  total(5),
  ...table,
]);
gqa("a part turned", { do_rotary: 1 }, [f(1, 5, 128), f(1, 5, 64), f(1, 5, 64), ...none, i32(4), total(5), ...table]);
gqa("token after a past", { do_rotary: 1 }, [...qkv(1, 1), ...caches(1, 6), i32(6), total(7), ...table]);
gqa("tokens after a past", { do_rotary: 1 }, [...qkv(1, 3), ...caches(1, 6), i32(8), total(9), ...table]);
gqa("two batches of one length", {}, [...qkv(2, 1), ...caches(2, 6), i32(6, 6), total(7)]);
gqa("two batches of two lengths", { do_rotary: 1 }, [...qkv(2, 1), ...caches(2, 6), i32(3, 6), total(7), ...table]);
gqa("packed token", { do_rotary: 1 }, [f(2, 1, 128), undefined, undefined, ...caches(2, 6), i32(6, 6), total(7), ...table]);
const filled = (o: Operand, rows: number): Operand => ({
  tensor: { ...o.tensor, data: o.tensor.data.map((x, i) => (Math.floor(i / 16) % (o.tensor.shape[2] as number) < rows ? x : 0)) },
});
gqa("buffers longer than what is in them", { do_rotary: 1 }, [
  ...qkv(1, 2),
  ...caches(1, 9).map((o) => filled(o, 4)),
  i32(5),
  total(6),
  ...table,
]);
gqa("scores", { qk_output: 1, softcap: float(2) }, [...qkv(1, 5), ...none, i32(4), total(5)], [...present, "scores"]);
gqa("probabilities", { qk_output: 2 }, [...qkv(1, 5), ...none, i32(4), total(5)], [...present, "scores"]);
gqa("all keys", { causal: 0 }, [...qkv(1, 5), ...none, i32(4), total(5)]);
gqa("window", { local_window_size: 3 }, [...qkv(1, 7), ...none, i32(6), total(7)]);
gqa("window of one token", { local_window_size: 3 }, [...qkv(1, 1), ...caches(1, 6), i32(6), total(7)]);
gqa("softcap", { softcap: float(1.5) }, [...qkv(1, 5), ...none, i32(4), total(5)]);
gqa("smooth softmax", { smooth_softmax: 1 }, [...qkv(1, 5), ...none, i32(4), total(5)]);
gqa("sinks", {}, [...qkv(2, 5), ...none, i32(4, 4), total(5), ...none, undefined, undefined, f(4)]);
gqa("sinks and window", { local_window_size: 2 }, [...qkv(1, 5), ...none, i32(4), total(5), ...none, undefined, undefined, f(4)]);
gqa("bias", {}, [...qkv(1, 3), ...caches(1, 2), i32(4), total(5), ...none, undefined, f(1, 4, 3, 5)]);
gqa("bias and softcap", { softcap: float(2) }, [...qkv(1, 5), ...none, i32(4), total(5), ...none, undefined, f(1, 1, 5, 5)]);
gqa("places given", { do_rotary: 1 }, [
  ...qkv(1, 3),
  ...caches(1, 2),
  i32(4),
  total(5),
  ...table,
  integers("i64", [1, 3], [3, 5, 9]),
]);
gqa("f16", { do_rotary: 1 }, [...[...qkv(1, 5), ...caches(1, 4)].map(half), i32(8), total(9), ...table.map(half)]);

const mha = (
  name: string,
  attributes: Readonly<Record<string, Attribute>>,
  inputs: readonly (Operand | undefined)[],
  outputs = ["y"],
): void => add("MultiHeadAttention", name, { num_heads: 2, ...attributes }, inputs, outputs);
const three = (rows: number, keys: number): Operand[] => [f(2, rows, 32), f(2, keys, 32), f(2, keys, 32)];
const heads = (length: number): Operand => f(2, 2, length, 16);
mha("as it is", {}, three(3, 5));
mha("values of another width", {}, [f(2, 3, 32), f(2, 5, 32), f(2, 5, 48)]);
mha("bias of each", { scale: float(0.1) }, [...three(3, 5), f(96)]);
mha("causal", { unidirectional: 1 }, three(5, 5));
mha("keys with heads", {}, [f(2, 3, 32), heads(5), heads(5)]);
mha("lengths", {}, [...three(3, 5), undefined, i32(2, 5)]);
mha("padding", {}, [...three(3, 5), undefined, integers("i32", [2, 5], [1, 1, 0, 0, 1, 0, 1, 1, 1, 0])]);
mha("scores' bias", {}, [...three(3, 5), undefined, undefined, f(1, 2, 3, 5)]);
mha("past", {}, [...three(3, 3), undefined, undefined, undefined, heads(4), heads(4)], present);
mha("past, causal, bias", { unidirectional: 1 }, [...three(3, 3), f(96), undefined, f(2, 2, 3, 7), heads(4), heads(4)], present);

const oneProjection = (
  name: string,
  attributes: Readonly<Record<string, Attribute>>,
  inputs: readonly (Operand | undefined)[],
  outputs = ["y"],
): void => add("Attention", name, { num_heads: 2, ...attributes }, inputs, outputs);
const projected = (rows: number): Operand[] => [f(2, rows, 24), w(24, 96), w(96)];
oneProjection("as it is", {}, projected(5));
oneProjection("causal", { unidirectional: 1 }, projected(5));
oneProjection("lengths", {}, [...projected(5), i32(2, 5)]);
oneProjection("padding", {}, [...projected(3), integers("i32", [2, 3], [1, 1, 0, 1, 0, 1])]);
oneProjection("past, causal", { unidirectional: 1 }, [...projected(3), undefined, f(2, 2, 2, 4, 16)], ["y", "present"]);
oneProjection("scores' bias, scale", { scale: float(0.1) }, [...projected(3), undefined, undefined, f(1, 2, 3, 3)]);

const words = (rows: number): Operand =>
  integers(
    "i32",
    [2, rows],
    Array.from({ length: 2 * rows }, (_, i) => (i * 5) % 11),
  );
add("EmbedLayerNormalization", "places", {}, [words(4), undefined, w(11, 8), w(9, 8), undefined, w(8), w(8)], ["y", "mask"]);
add(
  "EmbedLayerNormalization",
  "segments and a mask",
  { epsilon: float(0.01) },
  [
    words(3),
    integers("i32", [2, 3], [0, 1, 1, 0, 0, 1]),
    w(11, 8),
    w(9, 8),
    w(2, 8),
    w(8),
    w(8),
    integers("i32", [2, 3], [1, 1, 0, 1, 1, 1]),
  ],
  ["y", "mask"],
);

// --- recurrences ---
for (const activation of ["none", "silu"])
  add("CausalConvWithState", activation, { activation }, [f(2, 4, 5), w(4, 1, 3), w(4), f(2, 4, 2)], ["y", "s"]);
add("CausalConvWithState", "no past", {}, [f(2, 4, 5), w(4, 1, 3)], ["y", "s"]);
for (const update_rule of ["linear", "gated", "delta", "gated_delta"])
  add(
    "LinearAttention",
    update_rule,
    { q_num_heads: 2, kv_num_heads: 2, update_rule },
    [
      f(2, 3, 32),
      scaledBy(f(2, 3, 32), 0.2),
      f(2, 3, 32),
      f(2, 2, 16, 16),
      update_rule.startsWith("gated") ? scaledBy({ tensor: drawn("f32", [2, 3, 2], "positive") }, -0.1) : undefined,
      update_rule.endsWith("delta") ? { tensor: drawn("f32", [2, 3, 2], "unit") } : undefined,
    ],
    ["y", "s"],
  );
add(
  "LinearAttention",
  "shared heads",
  { q_num_heads: 4, kv_num_heads: 2, update_rule: "linear", scale: float(0.5) },
  [f(2, 3, 64), f(2, 3, 32), f(2, 3, 32), f(2, 2, 16, 16)],
  ["y", "s"],
);

// --- codes ---
add("QuantizeLinear", "one scale", {}, [f(3, 4), positive(), { tensor: drawn("u8", [], { below: 200 }), constant: true }]);
add("DequantizeLinear", "an axis", { axis: 0 }, [bytes(3, 4), positive(3), bytes(3)]);

// --- weights in codes ---
const nBits = (name: string, k: number, n: number, block: number, bits: number, more: readonly (Operand | undefined)[]): void => {
  const blocks = Math.ceil(k / block);
  add("MatMulNBits", name, { K: k, N: n, bits, block_size: block }, [
    f(2, 3, k),
    bytes(n, blocks, (block * bits) / 8),
    positive(n * blocks),
    ...more,
  ]);
};
nBits("4 bits", 64, 8, 32, 4, []);
nBits("4 bits, a short last block", 80, 8, 32, 4, []);
nBits("4 bits, zero points", 64, 8, 16, 4, [bytes(8 * 2)]);
nBits("4 bits, zero points of an odd number of blocks", 96, 8, 32, 4, [bytes(8 * 2)]);
nBits("4 bits, zero points as floats", 64, 8, 32, 4, [scaledBy(positive(8 * 2), 5)]);
nBits("4 bits, bias", 64, 8, 32, 4, [undefined, undefined, f(8)]);
nBits("8 bits", 64, 8, 32, 8, []);
nBits("8 bits, zero points", 64, 8, 32, 8, [bytes(8 * 2)]);
nBits("2 bits", 64, 8, 32, 2, []);
add("MatMulNBits", "f16", { K: 64, N: 8, bits: 4, block_size: 32 }, [half(f(3, 64)), bytes(8, 2, 16), half(w(16))]);

const rowsAt = integers("i64", [2, 2], [0, 3, 4, 1]);
const blocks = (name: string, attributes: Readonly<Record<string, Attribute>>, inputs: readonly (Operand | undefined)[]): void =>
  add("GatherBlockQuantized", name, attributes, inputs);
const codes = (narrow: "u4" | "i4", shape: readonly number[]): Operand => {
  const t = drawn("i32", shape, { below: 16 });
  const signed = narrow === "i4" ? t.data.map((x) => x - 8) : t.data;
  return { tensor: { ...t, dtype: narrow === "i4" ? "i8" : "u8", data: signed }, constant: true, narrow };
};
blocks("bytes of 4 bits", { block_size: 16, bits: 4, quantize_axis: 1 }, [bytes(5, 16), rowsAt, positive(5, 2)]);
blocks("bytes of 4 bits, zero points", { block_size: 16, bits: 4, quantize_axis: 1 }, [
  bytes(5, 16),
  rowsAt,
  positive(5, 2),
  bytes(5, 1),
]);
blocks("bytes of 8 bits", { block_size: 16, bits: 8, quantize_axis: 1 }, [bytes(5, 32), rowsAt, positive(5, 2)]);
blocks("u4", { block_size: 16, quantize_axis: 1 }, [codes("u4", [5, 32]), rowsAt, positive(5, 2), codes("u4", [5, 2])]);
blocks("i4", { block_size: 16, quantize_axis: 1 }, [codes("i4", [5, 32]), rowsAt, positive(5, 2)]);
blocks("i4 along the first axis", { block_size: 16, quantize_axis: 0, gather_axis: 1 }, [
  codes("i4", [32, 5]),
  rowsAt,
  positive(2, 5),
]);

// --- experts ---
const small = (...shape: number[]): Operand => scaledBy(w(...shape), 0.3);
const swiglu = { activation_type: "swiglu", swiglu_fusion: 1 };
for (const activation_type of ["relu", "gelu", "silu", "identity"])
  add("MoE", activation_type, { activation_type, k: 2 }, [f(5, 16), f(5, 4), small(4, 24, 16), undefined, small(4, 16, 24)]);
add("MoE", "bias, weights of a sum of 1", { activation_type: "silu", k: 2, normalize_routing_weights: 1 }, [
  f(2, 3, 16),
  f(6, 4),
  small(4, 24, 16),
  w(4, 24),
  small(4, 16, 24),
  w(4, 16),
]);
const gated = [f(5, 16), f(5, 4), small(4, 48, 16), w(4, 48), small(4, 16, 24), w(4, 16)];
add("MoE", "swiglu of neighbours", { ...swiglu, k: 2, normalize_routing_weights: 1 }, gated);
add(
  "MoE",
  "swiglu, alpha, beta, limit",
  {
    ...swiglu,
    k: 1,
    activation_alpha: float(1.702),
    activation_beta: float(1),
    swiglu_limit: float(0.7),
  },
  gated,
);

const qmoe = (
  name: string,
  attributes: Readonly<Record<string, Attribute>>,
  bits: number,
  more: readonly (Operand | undefined)[],
): void => {
  const k = (n: number): number => (n * bits) / 8;
  add("QMoE", name, { expert_weight_bits: bits, k: 2, ...swiglu, ...attributes }, [
    f(5, 32),
    f(5, 4),
    bytes(4, 64, k(32)),
    scaledBy(positive(4, 64), bits === 4 ? 0.02 : 0.001),
    undefined,
    bytes(4, 32, k(32)),
    scaledBy(positive(4, 32), bits === 4 ? 0.02 : 0.001),
    ...more,
  ]);
};
qmoe("4 bits", {}, 4, []);
qmoe("4 bits, bias of the second", { normalize_routing_weights: 1 }, 4, [w(4, 32)]);
qmoe("8 bits", { normalize_routing_weights: 1 }, 8, []);
add("QMoE", "4 bits in blocks, silu", { expert_weight_bits: 4, k: 2, block_size: 16, activation_type: "silu" }, [
  f(5, 32),
  f(5, 4),
  bytes(4, 32, 16),
  scaledBy(positive(4, 32, 2), 0.02),
  undefined,
  bytes(4, 32, 16),
  scaledBy(positive(4, 32, 2), 0.02),
]);

add("QMoE", "weights of their own", { expert_weight_bits: 4, k: 2, activation_type: "silu" }, [
  f(5, 32),
  f(5, 4),
  bytes(4, 32, 16),
  scaledBy(positive(4, 32), 0.02),
  undefined,
  bytes(4, 32, 16),
  scaledBy(positive(4, 32), 0.02),
  ...Array.from({ length: 7 }, () => undefined),
  { tensor: drawn("f32", [5, 4], "positive") },
]);
qmoe("zero points", {}, 4, [undefined, undefined, undefined, undefined, bytes(4, 32), bytes(4, 16)]);

/** Rows that nobody reads: queries after the end of a padded prompt. */
const unread: Readonly<Record<string, readonly number[]>> = { "GroupQueryAttention: prompt padded at the end": [3, 4] };

/** Relative Frobenius error. */
const distance = (got: Tensor, want: Tensor): number => {
  let [difference, size] = [0, 0];
  want.data.forEach((x, i) => {
    difference += ((got.data[i] as number) - x) ** 2;
    size += x ** 2;
  });
  return Math.sqrt(difference / (size || 1));
};

/** The node's outputs by the interpreter. */
const evaluated = (c: NodeCase): ReadonlyMap<string, Tensor> => {
  const inputs = inputsOf(c);
  const imported = importFor(readOnnxBytes(new Uint8Array(modelOf(c)), "m.onnx"), "m.onnx", inputs);
  verify(imported.graph);
  const given = new Map(imported.graph.inputs.map((v) => [v.name, inputs.get(imported.names.get(v.name) ?? "") as Tensor]));
  const results = evaluate(imported.graph, given, imported.weight);
  return new Map(imported.graph.outputs.map((v) => [imported.names.get(v.name) ?? "", results.get(v.name) as Tensor]));
};

let expected: readonly OrtResult[];
beforeAll(async () => {
  const ort = new Ort();
  expected = await Promise.all(cases.map((c) => ort.runBytes(modelOf(c), inputsOf(c))));
  ort.close();
});

/** With 0 in the rows that nobody reads. */
const read = (t: Tensor, name: string): Tensor => {
  const columns = t.shape.at(-1) as number;
  const rows = unread[name] ?? [];
  return { ...t, data: t.data.map((x, i) => (rows.includes(Math.floor(i / columns)) ? 0 : x)) };
};

test.each(cases.map((c, i) => [c.name, i] as const))("%s", (_, i) => {
  const c = cases[i] as NodeCase;
  const result = expected[i] as OrtResult;
  if (!("outputs" in result)) throw new Error(`ONNX Runtime: ${JSON.stringify(result)}`);
  for (const [name, got] of evaluated(c)) {
    const right = result.outputs.get(name) as Tensor;
    expect([name, got.dtype, got.shape]).toEqual([name, right.dtype, right.shape]);
    const [x, y] = name === "y" ? [read(got, c.name), read(right, c.name)] : [got, right];
    expect(distance(x, y), name).toBeLessThan(right.dtype === "f16" ? 2e-3 : 2e-6);
  }
});

/** What ONNX Runtime's CPU kernels do not have, held to the same numbers in a form that they have. */
const same = (name: string, one: Omit<NodeCase, "name" | "outputs">, other: Omit<NodeCase, "name" | "outputs">): void => {
  test(name, () => {
    const [x, y] = [one, other].map((c) => evaluated({ ...c, name, outputs: ["y"] }).get("y") as Tensor);
    expect(distance(x as Tensor, y as Tensor)).toBeLessThan(1e-6);
  });
};
const domain = "com.microsoft";
/** [B, S, 32] each, as one with axes [B, S, 2 heads, how many, 16] */
const packed = (...parts: Operand[]): Operand => {
  const [first] = parts as [Operand];
  const [batch, rows] = first.tensor.shape as [number, number];
  const data = new Float64Array(parts.length * first.tensor.data.length);
  parts.forEach(({ tensor: t }, p) => {
    t.data.forEach((x, i) => {
      data[(Math.floor(i / 16) * parts.length + p) * 16 + (i % 16)] = x;
    });
  });
  return { tensor: { ...first.tensor, shape: [batch, rows, 2, parts.length, 16], data } };
};
const [q, k, v] = three(4, 4) as [Operand, Operand, Operand];
const attributes = { num_heads: 2 };
const apart = { op: "MultiHeadAttention", domain, attributes, inputs: [q, k, v] };
same("MultiHeadAttention: packed", { ...apart, inputs: [packed(q, k, v)] }, apart);
same("MultiHeadAttention: packed keys and values", { ...apart, inputs: [q, packed(k, v)] }, apart);

/** Rows of each expert's matrix, or of its bias, in another order. */
const ordered = (o: Operand, order: readonly number[]): Operand => {
  const [experts, rows] = o.tensor.shape as [number, number];
  const width = o.tensor.data.length / experts / rows;
  const data = new Float64Array(experts * order.length * width);
  for (let x = 0; x < experts; x++)
    order.forEach((from, to) => {
      const row = (x * rows + from) * width;
      data.set(o.tensor.data.subarray(row, row + width), (x * order.length + to) * width);
    });
  return { ...o, tensor: { ...o.tensor, shape: o.tensor.shape.with(1, order.length), data } };
};
const [even, odd] = [0, 1].map((first) => Array.from({ length: 24 }, (_, i) => 2 * i + first)) as [number[], number[]];
const [x, router, fc1, bias1, fc2, bias2] = gated as [Operand, Operand, Operand, Operand, Operand, Operand];
const neighbours = { op: "MoE", domain, attributes: { ...swiglu, k: 2 }, inputs: gated };
const halves = [...even, ...odd];
same(
  "MoE: swiglu of halves",
  {
    ...neighbours,
    attributes: { ...neighbours.attributes, swiglu_fusion: 2 },
    inputs: [x, router, ordered(fc1, halves), ordered(bias1, halves), fc2, bias2],
  },
  neighbours,
);
same(
  "MoE: swiglu of two linears",
  {
    ...neighbours,
    attributes: { ...neighbours.attributes, swiglu_fusion: 0 },
    inputs: [x, router, ordered(fc1, even), ordered(bias1, even), fc2, bias2, ordered(fc1, odd), ordered(bias1, odd)],
  },
  neighbours,
);

/** What is not supported says so, at the node. */
const refused: readonly (readonly [
  string,
  string,
  Readonly<Record<string, Attribute>>,
  readonly (Operand | undefined)[],
  RegExp,
])[] = [
  [
    "weights in codes that are an input",
    "MatMulNBits",
    { K: 32, N: 8, block_size: 32 },
    [f(2, 32), { tensor: drawn("u8", [8, 1, 16], { below: 256 }) }, positive(8)],
    /input 1 must be a constant/,
  ],
  [
    "codes that are not the rows'",
    "MatMulNBits",
    { K: 64, N: 8, block_size: 32 },
    [f(2, 64), bytes(8, 1, 16), positive(16)],
    /those of 8 rows of 2 blocks/,
  ],
  [
    "a cache in codes",
    "GroupQueryAttention",
    { num_heads: 4, kv_num_heads: 2, k_quant_type: "PER_TENSOR" },
    [...qkv(1, 5), ...none, i32(4), total(5)],
    /k_quant_type must be NONE/,
  ],
  [
    "heads that cannot be shared",
    "GroupQueryAttention",
    { num_heads: 3, kv_num_heads: 2 },
    [...qkv(1, 5), ...none, i32(4), total(5)],
    /3 heads of queries do not share 2 heads/,
  ],
  ["an activation of no name", "MoE", { activation_type: "tanh" }, gated, /activation_type 'tanh' is not supported/],
  ["two linears where there is one", "MoE", { activation_type: "swiglu" }, gated, /swiglu_fusion 0 needs fc3/],
];
test.each(refused)("%s", (name, op, attributes, inputs, message) => {
  expect(() => evaluated({ name, op, domain, attributes, inputs, outputs: ["y"] })).toThrow(message);
});
