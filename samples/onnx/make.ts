/**
 * Makes the sample models: layers of three architectures at small sizes with drawn weights, a KV cache as inputs and outputs, batch, sequence
 * and past left open, and inputs to run them on in DIR/MODEL/.
 *
 *   node dist/samples/onnx/make.js DIR
 */
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Exporter } from "./exporter.ts";
import * as m from "./modules.ts";

const int64 = 7;

interface Cache {
  readonly key: string;
  readonly value: string;
}

/** What every layer has: hidden states, positions, and the cache of `heads` heads. */
const inputsOf = (
  e: Exporter,
  size: number,
  heads: number,
  keyDim: number,
  valueDim: number,
): Cache & { readonly hidden: string } => ({
  hidden: e.input("hidden_states", ["batch", "sequence", size]),
  key: e.input("past_key_values.0.key", ["batch", heads, "past", keyDim]),
  value: e.input("past_key_values.0.value", ["batch", heads, "past", valueDim]),
});
const outputsOf = (
  e: Exporter,
  hidden: string,
  size: number,
  present: Cache,
  heads: number,
  keyDim: number,
  valueDim: number,
): void => {
  e.output("output", hidden, ["batch", "sequence", size]);
  e.output("present.0.key", present.key, ["batch", heads, "past + sequence", keyDim]);
  e.output("present.0.value", present.value, ["batch", heads, "past + sequence", valueDim]);
};
const after = (e: Exporter, past: string, now: string): string => e.node("Concat", [past, now], { axis: 2 });

/** GPT-2: LayerNorm, one projection for q, k and v, biases, GELU by tanh. */
export const gpt2 = (): Uint8Array => {
  const [size, heads, dim, inner] = [48, 4, 12, 192];
  const e = new Exporter("gpt2_block", 17);
  const { hidden, ...past } = inputsOf(e, size, heads, dim, dim);
  // Conv1D is a Gemm on rows
  const conv = (name: string, x: string, from: number, to: number): string =>
    e.module(name, () => {
      const rows = e.reshape(x, -1, from);
      const weight = e.weight("weight", [from, to], 1.7 / Math.sqrt(from));
      return e.reshape(e.node("Gemm", [rows, weight, e.weight("bias", [to], 0.1)]), [x, 0], [x, 1], to);
    });
  e.module("h.0", () => {
    const normal = m.layerNorm(e, "ln_1", hidden, size);
    const [attended, present] = e.module("attn", () => {
      const parts = e.nodesOf("Split", [conv("c_attn", normal, size, 3 * size), e.ints(size, size, size)], { axis: 2 }, 3);
      const [q, k, v] = parts.map((x) => m.heads(e, x, heads, dim)) as [string, string, string];
      const [key, value] = [after(e, past.key, k), after(e, past.value, v)];
      const mixed = m.attention(e, q, key, value, m.causalMask(e, q, key), 1 / Math.sqrt(dim));
      return [conv("c_proj", m.joined(e, mixed, size), size, size), { key, value }] as const;
    });
    const residual = e.node("Add", [attended, hidden]);
    const fed = e.module("mlp", () => {
      const x = conv("c_fc", m.layerNorm(e, "ln_2", residual, size), size, inner);
      const cubed = e.node("Mul", [e.node("Pow", [x, e.floats(3)]), e.floats(0.044715)]);
      const tanh = e.node("Tanh", [e.node("Mul", [e.node("Add", [x, cubed]), e.floats(Math.sqrt(2 / Math.PI))])]);
      const active = e.node("Mul", [e.node("Mul", [x, e.floats(0.5)]), e.node("Add", [tanh, e.floats(1)])]);
      return conv("c_proj", active, inner, size);
    });
    outputsOf(e, e.node("Add", [residual, fed]), size, present, heads, dim, dim);
  });
  return e.encode();
};

/** Qwen3-MoE: grouped-query attention with normalised q and k, rotary positions, routed experts as their module loops over them. */
export const qwen3Moe = (): Uint8Array => {
  const [size, heads, kvHeads, dim, inner, experts, chosen] = [64, 4, 2, 16, 48, 6, 2];
  const e = new Exporter("qwen3_moe_layer", 17);
  const { hidden, ...past } = inputsOf(e, size, kvHeads, dim, dim);
  const positions = e.input("position_ids", ["batch", "sequence"], int64);
  e.module("model.layers.0", () => {
    const tables = m.rotaryTables(e, positions, dim);
    const normal = m.rmsNorm(e, "input_layernorm", hidden, size);
    const [attended, present] = e.module("self_attn", () => {
      const projected = (name: string, count: number): string => {
        const x = m.linear(e, `${name}_proj`, normal, size, count * dim);
        const apart = e.reshape(x, [x, 0], [x, 1], count, dim);
        const ready = name === "v" ? apart : m.rmsNorm(e, `${name}_norm`, apart, dim);
        return e.node("Transpose", [ready], { perm: [0, 2, 1, 3] });
      };
      const [q, k] = [m.rotated(e, projected("q", heads), tables, dim), m.rotated(e, projected("k", kvHeads), tables, dim)];
      const [key, value] = [after(e, past.key, k), after(e, past.value, projected("v", kvHeads))];
      const groups = heads / kvHeads;
      const [keys, values] = [m.repeated(e, key, kvHeads, groups, dim), m.repeated(e, value, kvHeads, groups, dim)];
      const mixed = m.attention(e, q, keys, values, m.causalMask(e, q, key), 1 / Math.sqrt(dim));
      return [m.linear(e, "o_proj", m.joined(e, mixed, heads * dim), heads * dim, size), { key, value }] as const;
    });
    const residual = e.node("Add", [hidden, attended]);
    const fed = e.module("mlp", () => {
      const x = m.rmsNorm(e, "post_attention_layernorm", residual, size);
      const scores = e.node("Softmax", [m.linear(e, "gate", x, size, experts)], { axis: -1 });
      const [best, ids] = e.nodesOf("TopK", [scores, e.ints(chosen)], { axis: -1 }, 2) as [string, string];
      const shares = e.node("Div", [best, e.node("ReduceSum", [best, e.ints(-1)], { keepdims: 1 })]);
      let sum = "";
      for (let i = 0; i < experts; i++) {
        const out = e.module(`experts.${i}`, () => {
          const here = e.node("Cast", [e.node("Equal", [ids, e.ints(i)])], { to: 1 });
          const share = e.node("ReduceSum", [e.node("Mul", [shares, here]), e.ints(-1)], { keepdims: 1 });
          return e.node("Mul", [m.swiglu(e, x, size, inner), share]);
        });
        sum = sum === "" ? out : e.node("Add", [sum, out]);
      }
      return sum;
    });
    outputsOf(e, e.node("Add", [residual, fed]), size, present, kvHeads, dim, dim);
  });
  return e.encode();
};

/** DeepSeek: q and kv through low ranks, a rotary part that all heads share, SwiGLU. */
export const deepseekMla = (): Uint8Array => {
  const [size, heads, plain, turned, valueDim, queryRank, rank, inner] = [64, 4, 16, 8, 16, 32, 24, 128];
  const dim = plain + turned;
  const e = new Exporter("deepseek_mla_layer", 17);
  const { hidden, ...past } = inputsOf(e, size, heads, dim, valueDim);
  const positions = e.input("position_ids", ["batch", "sequence"], int64);
  e.module("model.layers.0", () => {
    const tables = m.rotaryTables(e, positions, turned);
    const normal = m.rmsNorm(e, "input_layernorm", hidden, size);
    const [attended, present] = e.module("self_attn", () => {
      const low = m.rmsNorm(e, "q_a_layernorm", m.linear(e, "q_a_proj", normal, size, queryRank), queryRank);
      const q = m.heads(e, m.linear(e, "q_b_proj", low, queryRank, heads * dim), heads, dim);
      const [qPlain, qTurned] = e.nodesOf("Split", [q, e.ints(plain, turned)], { axis: 3 }, 2) as [string, string];
      const both = m.linear(e, "kv_a_proj_with_mqa", normal, size, rank + turned);
      const [latent, shared] = e.nodesOf("Split", [both, e.ints(rank, turned)], { axis: 2 }, 2) as [string, string];
      const spread = m.rmsNorm(e, "kv_a_layernorm", latent, rank);
      const kv = m.heads(e, m.linear(e, "kv_b_proj", spread, rank, heads * (plain + valueDim)), heads, plain + valueDim);
      const [kPlain, v] = e.nodesOf("Split", [kv, e.ints(plain, valueDim)], { axis: 3 }, 2) as [string, string];
      const kTurned = m.rotated(e, m.heads(e, shared, 1, turned), tables, turned);
      const shape = e.node("Concat", [e.size(q, 0), e.ints(heads), e.size(q, 2), e.ints(turned)], { axis: 0 });
      const k = e.node("Concat", [kPlain, e.node("Expand", [kTurned, shape])], { axis: -1 });
      const query = e.node("Concat", [qPlain, m.rotated(e, qTurned, tables, turned)], { axis: -1 });
      const [key, value] = [after(e, past.key, k), after(e, past.value, v)];
      const mixed = m.attention(e, query, key, value, m.causalMask(e, query, key), 1 / Math.sqrt(dim));
      return [m.linear(e, "o_proj", m.joined(e, mixed, heads * valueDim), heads * valueDim, size), { key, value }] as const;
    });
    const residual = e.node("Add", [hidden, attended]);
    const fed = e.module("mlp", () => m.swiglu(e, m.rmsNorm(e, "post_attention_layernorm", residual, size), size, inner));
    outputsOf(e, e.node("Add", [residual, fed]), size, present, heads, dim, valueDim);
  });
  return e.encode();
};

/** A .npy file of f32 or i64 elements. */
const npy = (shape: readonly number[], data: Float32Array | BigInt64Array): Buffer => {
  const descr = data instanceof Float32Array ? "<f4" : "<i8";
  const text = `{'descr': '${descr}', 'fortran_order': False, 'shape': (${shape.join(", ")},), }`;
  const padded = `${text}${" ".repeat((64 - ((text.length + 11) % 64)) % 64)}\n`;
  const head = Buffer.from([0x93, ...Buffer.from("NUMPY"), 1, 0, padded.length & 255, padded.length >> 8]);
  return Buffer.concat([head, Buffer.from(padded, "latin1"), new Uint8Array(data.buffer)]);
};

/** Inputs of two sequences: five tokens after eight in the cache. */
const inputs = (
  size: number,
  heads: number,
  keyDim: number,
  valueDim: number,
  positions: boolean,
): ReadonlyMap<string, Buffer> => {
  const [batch, sequence, past] = [2, 5, 8];
  const values = (...shape: number[]): Buffer =>
    npy(
      shape,
      Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, (_, i) => Math.sin(i)),
    );
  const places = BigInt64Array.from({ length: batch * sequence }, (_, i) => BigInt(past + (i % sequence)));
  return new Map([
    ["hidden_states", values(batch, sequence, size)],
    ["past_key_values.0.key", values(batch, heads, past, keyDim)],
    ["past_key_values.0.value", values(batch, heads, past, valueDim)],
    ...(positions ? [["position_ids", npy([batch, sequence], places)] as const] : []),
  ]);
};

const given: Readonly<Record<string, ReadonlyMap<string, Buffer>>> = {
  gpt2: inputs(48, 4, 12, 12, false),
  qwen3_moe: inputs(64, 2, 16, 16, true),
  deepseek_mla: inputs(64, 4, 24, 16, true),
};

export const models: Readonly<Record<string, () => Uint8Array>> = { gpt2, qwen3_moe: qwen3Moe, deepseek_mla: deepseekMla };

if (/make\.[jt]s$/.test(process.argv[1] ?? "")) {
  const folder = process.argv[2] ?? "samples/onnx";
  mkdirSync(folder, { recursive: true });
  for (const [name, make] of Object.entries(models)) {
    const path = join(folder, `${name}.onnx`);
    writeFileSync(path, make());
    mkdirSync(join(folder, name), { recursive: true });
    for (const [input, bytes] of given[name] ?? []) writeFileSync(join(folder, name, `${input}.npy`), bytes);
    process.stdout.write(`${path}\n`);
  }
}
