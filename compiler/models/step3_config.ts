/** The configuration of a Step-3 text model, read from config.json with every field checked. */
import type { ModelFacts } from "../../ir/bundle.ts";
import { UserError } from "../../ir/error.ts";
import { type Expected, readJsonObject } from "../frontends/checkpoint.ts";
import { isObject, type Json, type JsonObject, shown } from "../frontends/json.ts";

export interface Step3Config {
  readonly hidden: number;
  readonly layers: number;
  readonly heads: number;
  /** KV heads; each serves heads / kvHeads query heads */
  readonly kvHeads: number;
  readonly headDim: number;
  /** columns of the low-rank query between q_proj and wq */
  readonly queryRank: number;
  /** hidden columns of a dense layer's MLP */
  readonly intermediate: number;
  readonly vocabulary: number;
  readonly epsilon: number;
  readonly ropeTheta: number;
  readonly maxPosition: number;
  /** absent when no layer has experts */
  readonly moe?: Step3Experts;
  /** [rows, columns] that share a scale in F8_E4M3 tensors */
  readonly block: readonly [number, number];
  readonly bos?: number;
  readonly eos: readonly number[];
  /** the token that stands for a piece of an image */
  readonly imageToken?: number;
  /** the text part of a vision-language model: vision tensors may be beside it */
  readonly vision: boolean;
}

export interface Step3Experts {
  /** the layers that have them, ascending */
  readonly layers: readonly number[];
  readonly experts: number;
  readonly topK: number;
  readonly intermediate: number;
  /** hidden columns of the shared expert */
  readonly shared: number;
  /** whether the chosen experts' weights are divided by their sum */
  readonly normalise: boolean;
}

/** Reads and checks a config.json of model_type step3_text, or step3_vl with its text_config. Throws a UserError naming file and field. */
export const readStep3Config = (path: string): Step3Config => {
  const root = readJsonObject(path);
  const type = root.get("model_type");
  if (type !== "step3_text" && type !== "step3_vl")
    throw new UserError(`${path}: model_type ${shown(type)} is not supported; this reads step3_text and step3_vl`);
  if (type === "step3_text") return readText(fieldsOf(path, "", root), fieldsOf(path, "", root), false);
  const text = root.get("text_config");
  if (!isObject(text)) throw new UserError(`${path}: text_config must be an object; add the configuration of the text model`);
  const inner = text.get("model_type") ?? "step3_text";
  if (inner !== "step3_text")
    throw new UserError(`${path}: text_config.model_type ${shown(inner)} is not supported; this reads step3_text`);
  return readText(fieldsOf(path, "text_config.", text), fieldsOf(path, "", root), true);
};

/** Typed access to the fields of one object, with errors that name file and field. */
interface Fields {
  has(name: string): boolean;
  get(name: string): Json | undefined;
  fail(name: string, must: string): never;
  integer(name: string, min: number, max: number, otherwise?: number): number;
  real(name: string, min: number, max: number, otherwise?: number): number;
  flag(name: string, otherwise: boolean): boolean;
}

const fieldsOf = (path: string, prefix: string, object: JsonObject): Fields => {
  // in files that Python writes, null stands for absent
  const get = (name: string): Json | undefined => object.get(name) ?? undefined;
  const fail = (name: string, must: string): never => {
    const value = get(name);
    const what = value === undefined ? "is missing; add it" : `is ${shown(value)}; correct it`;
    throw new UserError(`${path}: ${prefix}${name} ${what} (it must be ${must})`);
  };
  const real = (name: string, min: number, max: number, otherwise?: number, kind = "a number"): number => {
    const value = get(name) ?? otherwise;
    return typeof value === "number" && value >= min && value <= max ? value : fail(name, `${kind} from ${min} to ${max}`);
  };
  return {
    has: (name) => get(name) !== undefined,
    get,
    fail,
    real,
    integer: (name, min, max, otherwise) => {
      const value = real(name, min, max, otherwise, "an integer");
      return Number.isInteger(value) ? value : fail(name, `an integer from ${min} to ${max}`);
    },
    flag: (name, otherwise) => {
      const value = get(name) ?? otherwise;
      return typeof value === "boolean" ? value : fail(name, "true or false");
    },
  };
};

/** Above any model to come, and small enough that sizes in bytes stay exact. */
const widest = 1 << 20;
const mostTokens = 1 << 24;

const readText = (text: Fields, root: Fields, vision: boolean): Step3Config => {
  const layers = text.integer("num_hidden_layers", 1, 4096);
  const heads = text.integer("num_attention_heads", 1, 4096);
  const kvHeads = text.integer("num_attention_groups", 1, heads);
  if (heads % kvHeads !== 0) text.fail("num_attention_groups", `a divisor of num_attention_heads, ${heads}`);
  const headDim = text.integer("head_dim", 2, 4096);
  if (headDim % 2 !== 0) text.fail("head_dim", "even, for rotary embeddings");
  const vocabulary = text.integer("vocab_size", 1, mostTokens);
  const moe = readExperts(text, layers);
  const dense = layers - (moe?.layers.length ?? 0);
  refuseVariants(text, root);
  const bos = tokens(text, root, "bos_token_id")[0];
  const imageToken = tokens(text, root, "image_token_id")[0];
  return {
    hidden: text.integer("hidden_size", 1, widest),
    layers,
    heads,
    kvHeads,
    headDim,
    queryRank: text.integer("share_q_dim", 1, widest),
    intermediate: text.integer("intermediate_size", 1, widest, dense === 0 ? 1 : undefined),
    vocabulary,
    epsilon: text.real("rms_norm_eps", 0, 1, 1e-5),
    ropeTheta: ropeTheta(text),
    maxPosition: text.integer(text.has("max_seq_len") ? "max_seq_len" : "max_position_embedding", 1, mostTokens, 65536),
    ...(moe ? { moe } : {}),
    block: readBlock(text.has("quantization_config") ? text : root),
    ...(bos === undefined ? {} : { bos }),
    eos: tokens(text, root, "eos_token_id").filter((id) => id < vocabulary),
    ...(imageToken === undefined ? {} : { imageToken }),
    vision,
  };
};

/** Ids of a field that is a token id or a list of them, in the text model's configuration or else beside it. */
const tokens = (text: Fields, root: Fields, name: string): readonly number[] => {
  const fields = text.has(name) ? text : root;
  const value = fields.get(name);
  if (value === undefined) return [];
  const ids = Array.isArray(value) ? value : [value];
  const ok = ids.every((id) => Number.isSafeInteger(id) && id >= 0 && id < 2 ** 31);
  return ok ? (ids as readonly number[]) : fields.fail(name, "a token id or a list of token ids");
};

const readExperts = (text: Fields, layers: number): Step3Experts | undefined => {
  const where = moeLayers(text, layers);
  if (where.length === 0) return undefined;
  const experts = text.integer("moe_num_experts", 1, 65536);
  return {
    layers: where,
    experts,
    topK: text.integer("moe_top_k", 1, experts),
    intermediate: text.integer("moe_intermediate_size", 1, widest),
    shared: text.integer("share_expert_dim", 1, widest),
    normalise: text.flag("norm_expert_weight", false),
  };
};

/** `moe_layers_enum`: layer numbers in a string, or a list of them; absent: every layer but the first. */
const moeLayers = (text: Fields, layers: number): readonly number[] => {
  const name = "moe_layers_enum";
  const value = text.get(name);
  const must = `a string such as "1,2,3" of different layer numbers below num_hidden_layers, ${layers}`;
  if (value === undefined) return Array.from({ length: layers - 1 }, (_, i) => i + 1);
  const items: readonly Json[] | undefined =
    typeof value === "string" ? (value.trim() === "" ? [] : value.split(",")) : Array.isArray(value) ? value : undefined;
  if (items === undefined) return text.fail(name, must);
  const numbers = items.map((item) => (typeof item === "string" && /^\s*\d{1,9}\s*$/.test(item) ? Number(item) : item));
  const ok = numbers.every((n) => typeof n === "number" && Number.isInteger(n) && n >= 0 && n < layers);
  if (!ok || new Set(numbers).size !== numbers.length) return text.fail(name, must);
  return (numbers as number[]).sort((a, b) => a - b);
};

/** Theta of plain rotary embeddings, from `rope_theta` or from `rope_parameters`; any scaling of them is refused by its name. */
const ropeTheta = (text: Fields): number => {
  for (const name of ["rope_scaling", "rope_parameters"]) {
    const value = text.get(name);
    if (value === undefined) continue;
    if (!isObject(value)) text.fail(name, "null");
    const object = value as JsonObject;
    const type = object.get("rope_type") ?? object.get("type") ?? "default";
    if (type !== "default") text.fail(name, `null: rotary scaling ${shown(type)} is not supported`);
    const theta = object.get("rope_theta");
    if (name === "rope_scaling" || theta === undefined) continue;
    return typeof theta === "number" && theta >= 1 && theta <= 1e12
      ? theta
      : text.fail(name, `an object whose rope_theta is a number from 1 to ${1e12}`);
  }
  return text.real("rope_theta", 1, 1e12, 500000);
};

/** Settings that would change the mathematics: only Step-3's own values are understood. */
const refuseVariants = (text: Fields, root: Fields): void => {
  const only = (name: string, value: Json): void => {
    if (text.has(name) && text.get(name) !== value)
      text.fail(name, `${JSON.stringify(value)} or absent; other models are not supported`);
  };
  only("hidden_act", "silu");
  only("attention_bias", false);
  only("mlp_bias", false);
  only("partial_rotary_factor", 1);
  only("sliding_window", false);
  for (const fields of [text, root])
    if (fields.get("tie_word_embeddings") === true)
      fields.fail(
        "tie_word_embeddings",
        "false: Step-3 has its own lm_head.weight; to tie them, store a copy of model.embed_tokens.weight there",
      );
};

const readBlock = (fields: Fields): readonly [number, number] => {
  const name = "quantization_config";
  const value = fields.get(name);
  if (value === undefined) return [128, 128];
  if (!isObject(value)) return fields.fail(name, "an object");
  const method = value.get("quant_method") ?? "fp8";
  if (method !== "fp8") return fields.fail(name, `of quant_method "fp8"; ${shown(method)} is not supported`);
  const format = value.get("fmt") ?? "e4m3";
  if (format !== "e4m3") return fields.fail(name, `of fmt "e4m3"; ${shown(format)} is not supported`);
  const block = value.get("weight_block_size") ?? [128, 128];
  const ok = Array.isArray(block) && block.length === 2 && block.every((n) => Number.isSafeInteger(n) && n >= 1 && n <= widest);
  return ok
    ? [block[0] as number, block[1] as number]
    : fields.fail(name, "an object whose weight_block_size is [rows, columns]");
};

/** What the runtime's text side needs to know. */
export const step3Facts = (config: Step3Config): ModelFacts => ({
  name: "step3",
  vocabulary: config.vocabulary,
  ...(config.bos === undefined ? {} : { bos: config.bos }),
  eos: config.eos,
  ...(config.imageToken === undefined
    ? {}
    : { refused: [{ id: config.imageToken, why: "an image token: this bundle has no vision tower" }] }),
  layers: config.layers,
});

export const isMoeLayer = (config: Step3Config, layer: number): boolean => config.moe?.layers.includes(layer) ?? false;

/** Names in a checkpoint that belong to the vision tower. */
export const visionPrefixes: readonly string[] = ["vision_model.", "vit_"];

/** Every tensor of the text model, with the shapes that the configuration gives it. */
export const step3Tensors = (config: Step3Config): readonly Expected[] => {
  const { hidden, heads, kvHeads, headDim, queryRank, vocabulary, moe } = config;
  const tensors: Expected[] = [];
  const vector = (name: string, columns: number): void => void tensors.push({ name, shape: [columns], scaled: false });
  const matrix = (name: string, ...shape: number[]): void => void tensors.push({ name, shape, scaled: true });
  const whole = (name: string, ...shape: number[]): void => void tensors.push({ name, shape, scaled: false });
  whole("model.embed_tokens.weight", vocabulary, hidden);
  for (let i = 0; i < config.layers; i++) {
    const layer = `model.layers.${i}`;
    vector(`${layer}.input_layernorm.weight`, hidden);
    vector(`${layer}.post_attention_layernorm.weight`, hidden);
    const attention = `${layer}.self_attn`;
    matrix(`${attention}.q_proj.weight`, queryRank, hidden);
    matrix(`${attention}.k_proj.weight`, kvHeads * headDim, hidden);
    matrix(`${attention}.v_proj.weight`, kvHeads * headDim, hidden);
    vector(`${attention}.inter_norm.weight`, queryRank);
    matrix(`${attention}.wq.weight`, heads * headDim, queryRank);
    matrix(`${attention}.o_proj.weight`, hidden, heads * headDim);
    const mlp = (prefix: string, columns: number, ...experts: number[]): void => {
      matrix(`${prefix}.gate_proj.weight`, ...experts, columns, hidden);
      matrix(`${prefix}.up_proj.weight`, ...experts, columns, hidden);
      matrix(`${prefix}.down_proj.weight`, ...experts, hidden, columns);
    };
    if (moe && isMoeLayer(config, i)) {
      whole(`${layer}.moe.gate.weight`, moe.experts, hidden);
      mlp(`${layer}.moe`, moe.intermediate, moe.experts);
      mlp(`${layer}.share_expert`, moe.shared);
    } else mlp(`${layer}.mlp`, config.intermediate);
  }
  vector("model.norm.weight", hidden);
  whole("lm_head.weight", vocabulary, hidden);
  return tensors;
};
