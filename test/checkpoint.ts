/**
 * Step-3 checkpoints for tests: any sizes, shardings and dtypes, drawn from a seed. Tensors are streamed, so a checkpoint of many
 * gigabytes needs little memory.
 */
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { type StoredDType, storedBytes, type TensorToWrite, writeSafetensors } from "../compiler/frontends/safetensors.ts";
import { encode, floatCode } from "../ir/round.ts";

export interface Step3Sizes {
  readonly hidden: number;
  readonly layers: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly queryRank: number;
  readonly intermediate: number;
  readonly vocabulary: number;
  readonly experts: number;
  readonly topK: number;
  readonly moeIntermediate: number;
  readonly shared: number;
  readonly maxPosition: number;
  /** layers with experts; every layer but the first unless given */
  readonly moeLayers?: readonly number[];
}

export const tinySizes: Step3Sizes = {
  hidden: 40,
  layers: 3,
  heads: 4,
  kvHeads: 1,
  headDim: 16,
  queryRank: 24,
  intermediate: 56,
  vocabulary: 97,
  experts: 6,
  topK: 3,
  moeIntermediate: 36,
  shared: 28,
  maxPosition: 256,
};

export interface CheckpointOptions {
  readonly sizes?: Partial<Step3Sizes>;
  readonly seed?: number;
  /** how the matrices of the text layers are stored; FP8 has block scales and leaves the rest BF16 */
  readonly dtype?: "BF16" | "F16" | "F32" | "FP8";
  readonly block?: readonly [number, number];
  /** shards of about equal size, with an index; 0: one model.safetensors */
  readonly shards?: number;
  /** a vision-language directory: text_config, and a few vision tensors */
  readonly vision?: boolean;
  /** how moe_layers_enum is written; `absent` fits only the default layers */
  readonly layersEnum?: "string" | "list" | "absent";
  readonly normalise?: boolean;
  readonly config?: Readonly<Record<string, unknown>>;
  /** repeats a pool of values instead of drawing each: for gigabytes */
  readonly pooled?: boolean;
}

/** A generator of numbers: xorshift32 words. */
export const random = (seed: number): (() => number) => {
  let state = (Math.imul(seed + 1, 0x9e3779b1) ^ 0x85ebca6b) >>> 0 || 1;
  return () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) / 2 ** 32;
  };
};

/** About normal: a sum of uniform numbers with variance 1. */
const normal = (draw: () => number): number => (draw() + draw() + draw() + draw() - 2) * Math.sqrt(3);

export const sizesOf = (options: CheckpointOptions): Step3Sizes => ({ ...tinySizes, ...options.sizes });

export const moeLayersOf = (sizes: Step3Sizes): readonly number[] =>
  sizes.moeLayers ?? Array.from({ length: sizes.layers - 1 }, (_, i) => i + 1);

/** The config.json of a checkpoint. */
export const step3ConfigJson = (options: CheckpointOptions = {}): Record<string, unknown> => {
  const s = sizesOf(options);
  const moe = moeLayersOf(s);
  const form = options.layersEnum ?? "string";
  const text: Record<string, unknown> = {
    architectures: ["Step3TextForCausalLM"],
    model_type: "step3_text",
    hidden_size: s.hidden,
    intermediate_size: s.intermediate,
    num_attention_heads: s.heads,
    num_attention_groups: s.kvHeads,
    num_hidden_layers: s.layers,
    vocab_size: s.vocabulary,
    rms_norm_eps: 1e-5,
    moe_intermediate_size: s.moeIntermediate,
    moe_num_experts: s.experts,
    moe_top_k: s.topK,
    rope_theta: 500000,
    rope_scaling: null,
    max_position_embedding: s.maxPosition,
    max_seq_len: s.maxPosition,
    share_expert_dim: s.shared,
    share_q_dim: s.queryRank,
    head_dim: s.headDim,
    norm_expert_weight: options.normalise ?? false,
    ...(form === "absent" ? {} : { moe_layers_enum: form === "list" ? moe : moe.join(",") }),
    torch_dtype: "bfloat16",
    bos_token_id: 0,
    eos_token_id: s.vocabulary - 1,
  };
  const quantised =
    options.dtype === "FP8"
      ? {
          quantization_config: {
            activation_scheme: "dynamic",
            fmt: "e4m3",
            quant_method: "fp8",
            weight_block_size: options.block ?? [128, 128],
          },
        }
      : {};
  if (!options.vision) return { ...text, ...quantised, ...options.config };
  return {
    architectures: ["Step3VLForConditionalGeneration"],
    model_type: "step3_vl",
    image_token_id: s.vocabulary - 2,
    vision_config: { hidden_size: 8 },
    text_config: text,
    ...quantised,
    ...options.config,
  };
};

interface Planned {
  readonly name: string;
  readonly shape: readonly number[];
  readonly kind: "norm" | "plain" | "linear" | "vision";
}

/** Names and shapes of a checkpoint's tensors, in the order they are written. */
export const plannedTensors = (options: CheckpointOptions): readonly Planned[] => {
  const s = sizesOf(options);
  const all: Planned[] = [];
  const add = (kind: Planned["kind"], name: string, ...shape: number[]): void =>
    void all.push({ name: `${name}.weight`, shape, kind });
  const mlp = (prefix: string, columns: number, ...experts: number[]): void => {
    add("linear", `${prefix}.gate_proj`, ...experts, columns, s.hidden);
    add("linear", `${prefix}.up_proj`, ...experts, columns, s.hidden);
    add("linear", `${prefix}.down_proj`, ...experts, s.hidden, columns);
  };
  add("plain", "model.embed_tokens", s.vocabulary, s.hidden);
  const moe = new Set(moeLayersOf(s));
  for (let i = 0; i < s.layers; i++) {
    const layer = `model.layers.${i}`;
    add("norm", `${layer}.input_layernorm`, s.hidden);
    add("norm", `${layer}.post_attention_layernorm`, s.hidden);
    add("linear", `${layer}.self_attn.q_proj`, s.queryRank, s.hidden);
    add("linear", `${layer}.self_attn.k_proj`, s.kvHeads * s.headDim, s.hidden);
    add("linear", `${layer}.self_attn.v_proj`, s.kvHeads * s.headDim, s.hidden);
    add("norm", `${layer}.self_attn.inter_norm`, s.queryRank);
    add("linear", `${layer}.self_attn.wq`, s.heads * s.headDim, s.queryRank);
    add("linear", `${layer}.self_attn.o_proj`, s.hidden, s.heads * s.headDim);
    if (moe.has(i)) {
      add("plain", `${layer}.moe.gate`, s.experts, s.hidden);
      mlp(`${layer}.moe`, s.moeIntermediate, s.experts);
      mlp(`${layer}.share_expert`, s.shared);
    } else mlp(`${layer}.mlp`, s.intermediate);
  }
  add("norm", "model.norm", s.hidden);
  add("plain", "lm_head", s.vocabulary, s.hidden);
  if (options.vision) {
    add("vision", "vision_model.transformer.layers.0.mlp.fc1", 8, 8);
    add("vision", "vit_large_projector", s.hidden, 8);
  }
  return all;
};

const pieceElements = 1 << 20;

/** Bytes of a tensor, drawn piece by piece: the draw of element i is `value(draw, i)`. */
function* drawn(dtype: StoredDType, count: number, seed: number, value: (draw: () => number) => number): Iterable<Uint8Array> {
  const draw = random(seed);
  const ir = dtype === "BF16" ? "bf16" : dtype === "F16" ? "f16" : dtype === "F32" ? "f32" : "e4m3";
  for (let at = 0; at < count; at += pieceElements)
    yield encode(
      ir,
      Float64Array.from({ length: Math.min(pieceElements, count - at) }, () => value(draw)),
    );
}

/** As `drawn`, but from a pool that is repeated from ever different beginnings. */
function* pooledBytes(pool: Uint8Array, bytes: number, width: number, seed: number): Iterable<Uint8Array> {
  const draw = random(seed);
  const piece = pool.length / 2;
  for (let at = 0; at < bytes; at += piece) {
    const from = Math.floor((draw() * piece) / width) * width;
    yield pool.subarray(from, from + Math.min(piece, bytes - at));
  }
}

/** Tensors to write for one planned tensor: itself, and its scales when it is stored in blocks. */
const tensorsFor = (planned: Planned, options: CheckpointOptions, seed: number, pools: Pools): TensorToWrite[] => {
  const { name, shape, kind } = planned;
  const count = shape.reduce((n, d) => n * d, 1);
  const columns = shape.at(-1) as number;
  if (kind === "norm") return [{ name, dtype: "BF16", shape, data: drawn("BF16", count, seed, (d) => 1 + 0.1 * normal(d)) }];
  // outputs of about the size of inputs; the router decides clearly, and logits spread
  const gain = name.endsWith("moe.gate.weight")
    ? 2
    : name === "lm_head.weight"
      ? 3
      : name === "model.embed_tokens.weight"
        ? Math.sqrt(columns)
        : 1.2;
  const spread = gain / Math.sqrt(columns);
  const dtype: StoredDType =
    options.dtype === "FP8" ? (kind === "linear" ? "F8_E4M3" : "BF16") : kind === "vision" ? "BF16" : (options.dtype ?? "BF16");
  if (dtype !== "F8_E4M3") {
    const data = options.pooled
      ? pooledBytes(pools(dtype, spread), count * storedBytes(dtype), storedBytes(dtype), seed)
      : drawn(dtype, count, seed, (d) => spread * normal(d));
    return [{ name, dtype, shape, data }];
  }
  const block = options.block ?? [128, 128];
  const scaleShape = shape.map((d, i) =>
    Math.ceil(d / (i === shape.length - 1 ? block[1] : i === shape.length - 2 ? block[0] : 1)),
  );
  const scales = scaleShape.reduce((n, d) => n * d, 1);
  const codes = options.pooled
    ? pooledBytes(pools(dtype, 100), count, 1, seed)
    : drawn(dtype, count, seed, (d) => 100 * normal(d));
  return [
    { name, dtype, shape, data: codes },
    {
      name: `${name}_scale_inv`,
      dtype: "F32",
      shape: scaleShape,
      data: drawn("F32", scales, seed + 1, (d) => (spread / 100) * (0.6 + 0.8 * d())),
    },
  ];
};

type Pools = (dtype: StoredDType, spread: number) => Uint8Array;

const createPools = (): Pools => {
  const pools = new Map<string, Uint8Array>();
  return (dtype, spread) => {
    const key = `${dtype} ${spread}`;
    const pool = pools.get(key) ?? Buffer.concat([...drawn(dtype, 2 << 20, 7, (d) => spread * normal(d))]);
    pools.set(key, pool);
    return pool;
  };
};

/** Writes a checkpoint directory. Equal options give equal bytes. */
export const writeStep3Checkpoint = (directory: string, options: CheckpointOptions = {}): void => {
  mkdirSync(directory, { recursive: true });
  writeFileSync(join(directory, "config.json"), `${JSON.stringify(step3ConfigJson(options), null, 1)}\n`);
  const pools = createPools();
  const seed = (options.seed ?? 1) * 100003;
  const tensors = plannedTensors(options).flatMap((planned, i) => tensorsFor(planned, options, seed + 2 * i, pools));
  const bytes = (t: TensorToWrite): number => t.shape.reduce((n, d) => n * d, storedBytes(t.dtype));
  const shards = options.shards ?? 0;
  if (shards === 0) {
    writeSafetensors(join(directory, "model.safetensors"), tensors, new Map([["format", "pt"]]));
    return;
  }
  const total = tensors.reduce((n, t) => n + bytes(t), 0);
  const files = Array.from({ length: shards }, (): TensorToWrite[] => []);
  let before = 0;
  for (const tensor of tensors) {
    (files[Math.min(shards - 1, Math.floor((before / total) * shards))] as TensorToWrite[]).push(tensor);
    before += bytes(tensor);
  }
  const map: Record<string, string> = {};
  for (const [i, file] of files.entries()) {
    if (file.length === 0) continue;
    const name = `model-${String(i + 1).padStart(5, "0")}-of-${String(shards).padStart(5, "0")}.safetensors`;
    writeSafetensors(join(directory, name), file, new Map([["format", "pt"]]));
    for (const tensor of file) map[tensor.name] = name;
  }
  const index = { metadata: { total_size: total }, weight_map: map };
  writeFileSync(join(directory, "model.safetensors.index.json"), `${JSON.stringify(index, null, 1)}\n`);
};

/** bf16 bits of a number, for tests that patch a file. */
export const bf16Bits = (x: number): number => floatCode("bf16", x);
