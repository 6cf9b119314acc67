/**
 * Step-3's text model as a graph: multi-matrix factorisation attention (low-rank query with a norm in between, one KV head or a few),
 * dense SwiGLU layers, and layers of routed experts with one shared expert. The formulas are the published model's; every rounding is
 * that of a bf16 model: weights and activations bf16, sums, softmax and residual additions in f32.
 */
import { statSync } from "node:fs";
import { join } from "node:path";
import { Builder } from "../../ir/build.ts";
import type { ModelFacts } from "../../ir/bundle.ts";
import { UserError } from "../../ir/error.ts";
import type { Graph, Value, WeightSource } from "../../ir/graph.ts";
import { tensor } from "../../ir/type.ts";
import { type Checkpoint, checkTensors, openCheckpoint, scalesName } from "../frontends/checkpoint.ts";
import { isMoeLayer, readStep3Config, type Step3Config, step3Facts, step3Tensors, visionPrefixes } from "./step3_config.ts";

export interface Step3Options {
  /** tokens of the longest sequence: positions of the rotary table */
  readonly maxContext: number;
  /** page-table entries of a sequence */
  readonly maxPages: number;
}

export interface Step3Model {
  readonly config: Step3Config;
  readonly facts: ModelFacts;
  /** absent when only the configuration was read */
  readonly checkpoint?: Checkpoint;
  /** the graph for at most `maxRows` tokens in a round; prefill and decode differ in nothing else */
  graph(maxRows: number, options: Step3Options): Graph;
}

/**
 * Reads a Step-3 model: a Hugging Face directory, or with `weights: false` a directory or a bare config.json, of which only the
 * configuration is used. Throws a UserError that names the file and field or tensor at fault.
 */
export const readStep3 = (path: string, { weights }: { readonly weights: boolean }): Step3Model => {
  const isFile = statSync(path, { throwIfNoEntry: false })?.isFile() ?? false;
  if (isFile && weights)
    throw new UserError(`${path}: a configuration has no weights; give the checkpoint's directory, or --no-weights`);
  const configPath = isFile ? path : join(path, "config.json");
  const config = readStep3Config(configPath);
  const facts = step3Facts(config);
  if (!weights) return { config, facts, graph: (maxRows, options) => step3Graph(config, undefined, maxRows, options) };
  const checkpoint = openCheckpoint(path, config.vision ? visionPrefixes : []);
  try {
    if (!checkpoint.tensors.has("lm_head.weight") && checkpoint.tensors.has("model.embed_tokens.weight"))
      throw new UserError(
        `${path}: tensor "lm_head.weight" is missing; Step-3 does not share it with the embedding: to tie them, store a copy of model.embed_tokens.weight there`,
      );
    checkTensors(checkpoint, step3Tensors(config), config.block);
  } catch (error) {
    checkpoint.close();
    throw error;
  }
  return { config, facts, checkpoint, graph: (maxRows, options) => step3Graph(config, checkpoint, maxRows, options) };
};

/** The values of a round that every layer uses. */
interface Round {
  readonly position: Value;
  readonly pages: Value;
  readonly rope: Value;
}

/**
 * The graph of a configuration. Inputs ids, position i32[T], pages i32[T,P], temperature, top_p f32[T], seed u32[T];
 * outputs next i32[T], logits f32[T,V]. Weights of a checkpoint in block FP8 are dequantised ones; without a checkpoint all are plain.
 */
export const step3Graph = (
  config: Step3Config,
  checkpoint: Checkpoint | undefined,
  maxRows: number,
  options: Step3Options,
): Graph => {
  const { maxContext, maxPages } = options;
  if (maxContext > config.maxPosition)
    throw new UserError(`--max-context ${maxContext} is more than the model's ${config.maxPosition} positions`, 2);
  const b = new Builder("step3", [{ name: "T", min: 0, max: maxRows, multiple: 1, source: "host" }]);
  const ids = b.input("ids", tensor("i32", ["T"]));
  const position = b.input("position", tensor("i32", ["T"]));
  const pages = b.input("pages", tensor("i32", ["T", maxPages]));
  const temperature = b.input("temperature", tensor("f32", ["T"]));
  const topP = b.input("top_p", tensor("f32", ["T"]));
  const seed = b.input("seed", tensor("u32", ["T"]));
  const rope = b.weight("rope", tensor("f32", [maxContext, config.headDim]), {
    kind: "rope",
    theta: config.ropeTheta,
    positions: maxContext,
    dim: config.headDim,
  });
  const layer = layerOf(b, config, weightsOf(b, config, checkpoint), { position, pages, rope });
  const head = weightsOf(b, config, checkpoint);

  b.at("embed_tokens");
  let x = b.op("gather", [head("embed", "model.embed_tokens", config.vocabulary, config.hidden), ids], {}, ["x"]);
  for (let i = 0; i < config.layers; i++) x = layer(i, x);
  b.at("norm");
  const h = b.op("rms_norm", [x, head("norm", "model.norm", config.hidden)], { eps: config.epsilon }, ["h"]);
  b.at("lm_head");
  const lmHead = head("lm_head", "lm_head", config.vocabulary, config.hidden);
  const logits = b.op("linear", [h, lmHead], { to: "f32", keep: true }, ["logits"]);
  b.at("sample");
  b.output(b.op("sample", [logits, temperature, topP, seed, position], {}, ["next"]));
  b.output(logits);
  return b.build();
};

/** Declares a bf16 weight: its name in the graph, the checkpoint's module whose `weight` it is, and its shape. */
type Weights = (name: string, module: string, ...shape: number[]) => Value;

const weightsOf =
  (b: Builder, config: Step3Config, checkpoint: Checkpoint | undefined): Weights =>
  (name, module, ...shape) => {
    const name_ = `${module}.weight`;
    const stored = checkpoint?.tensors.get(name_);
    const source: WeightSource =
      stored?.dtype === "F8_E4M3"
        ? { kind: "dequantised", tensor: name_, scales: scalesName(name_), block: config.block }
        : { kind: "tensor", tensor: name_ };
    return b.weight(name, tensor("bf16", shape), source);
  };

const layerOf =
  (b: Builder, config: Step3Config, weight: Weights, round: Round) =>
  (i: number, x: Value): Value => {
    const { hidden, epsilon } = config;
    /** names of results `l3_h`, of weights `l3_wq`, origins `layers.3.self_attn.wq` */
    const at = (module: string): void => void b.at(`layers.${i}.${module}`);
    const named = (name: string): string => `l${i}_${name}`;
    const op = (kind: string, name: string, inputs: readonly Value[], attrs = {}): Value =>
      b.op(kind, inputs, attrs, [named(name)]);
    const own = (name: string, module: string, ...shape: number[]): Value =>
      weight(named(name), `model.layers.${i}.${module}`, ...shape);
    const wide = (name: string, value: Value): Value => op("cast", name, [value], { to: "f32" });
    const narrow = (name: string, value: Value): Value => op("cast", name, [value], { to: "bf16" });
    const norm = (name: string, module: string, value: Value, columns: number): Value => {
      at(module);
      return op("rms_norm", name, [value, own(module.replace("self_attn.", ""), module, columns)], { eps: epsilon });
    };
    /** silu(gate) * up in f32, rounded to bf16 */
    const swiglu = (prefix: string, gate: Value, up: Value): Value =>
      narrow(`${prefix}a`, op("mul", `${prefix}m`, [op("silu", `${prefix}s`, [gate]), up]));

    const attention = (h: Value): Value => {
      const { heads, kvHeads, headDim, queryRank } = config;
      const linear = (name: string, module: string, value: Value, rows: number, columns: number, attrs = {}): Value => {
        at(`self_attn.${module}`);
        return op("linear", name, [value, own(module, `self_attn.${module}`, rows, columns)], attrs);
      };
      const low = linear("qd", "q_proj", h, queryRank, hidden);
      const query = linear("q", "wq", norm("qn", "self_attn.inter_norm", low, queryRank), heads * headDim, queryRank);
      const key = linear("k", "k_proj", h, kvHeads * headDim, hidden);
      const value = linear("v", "v_proj", h, kvHeads * headDim, hidden);
      at("self_attn.rotary");
      const rotate = (name: string, v: Value, n: number): Value =>
        op("rotary", name, [v, round.rope, round.position], { heads: n, dim: headDim });
      const [q, k] = [rotate("qr", query, heads), rotate("kr", key, kvHeads)];
      const cache = b.state(`kv${i}`, { kind: "kv", dtype: "bf16", heads: kvHeads, dim: headDim });
      at("self_attn");
      const filled = op("kv_append", "kv", [cache, k, value, round.pages, round.position]);
      const attrs = { heads, scale: 1 / Math.sqrt(headDim) };
      const o = op("attention", "o", [q, filled, round.pages, round.position], attrs);
      return linear("p", "o_proj", o, hidden, heads * headDim, { to: "f32" });
    };

    /** down(silu(gate h) * up h), f32 */
    const mlp = (module: string, prefix: string, h: Value, columns: number): Value => {
      const linear = (name: string, projection: string, value: Value, rows: number, inner: number): Value => {
        at(`${module}.${projection}`);
        return op("linear", `${prefix}${name}`, [value, own(`${prefix}${projection}`, `${module}.${projection}`, rows, inner)], {
          to: "f32",
        });
      };
      const gate = linear("g", "gate_proj", h, columns, hidden);
      const up = linear("u", "up_proj", h, columns, hidden);
      at(module);
      return linear("d", "down_proj", swiglu(prefix, gate, up), hidden, columns);
    };

    const experts = (h: Value, moe: NonNullable<Step3Config["moe"]>): Value => {
      at("moe.gate");
      const scores = op("linear", "scores", [h, own("router", "moe.gate", moe.experts, hidden)], { to: "f32", keep: true });
      const names = [named("top"), named("ids")];
      const [top, ids] = b.ops("topk", [op("softmax", "probability", [scores])], { k: moe.topK }, names) as [Value, Value];
      const chosen = moe.normalise ? op("div", "share", [top, op("reduce", "mass", [top], { fn: "sum" })]) : top;
      const grouped = (name: string, projection: string, value: Value, rows: number, columns: number): Value => {
        at(`moe.${projection}`);
        const w = own(`moe_${projection}`, `moe.${projection}`, moe.experts, rows, columns);
        return op("grouped_linear", name, [value, w, ids], { to: "f32" });
      };
      const gate = grouped("g", "gate_proj", h, moe.intermediate, hidden);
      const up = grouped("u", "up_proj", h, moe.intermediate, hidden);
      at("moe");
      const down = grouped("d", "down_proj", swiglu("", gate, up), hidden, moe.intermediate);
      at("moe");
      const routed = op("combine", "routed", [down, ids, chosen]);
      const shared = mlp("share_expert", "share_", h, moe.shared);
      at("moe");
      return op("add", "sum", [routed, shared]);
    };

    const projected = attention(norm("h", "input_layernorm", x, hidden));
    at("self_attn.residual");
    const middle = narrow("x1", op("add", "r", [wide("xw", x), projected]));
    const h = norm("h2", "post_attention_layernorm", middle, hidden);
    const y = config.moe && isMoeLayer(config, i) ? experts(h, config.moe) : mlp("mlp", "mlp_", h, config.intermediate);
    const module = config.moe && isMoeLayer(config, i) ? "moe" : "mlp";
    at(module);
    const rounded = narrow("y", y);
    at(`${module}.residual`);
    return narrow("x2", op("add", "r2", [wide("x1w", middle), wide("yw", rounded)]));
  };
