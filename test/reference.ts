/**
 * A Step-3 forward pass in plain double arithmetic, straight from the published formulas: no graph, no rounding, nothing of the
 * compiler. It reads the checkpoint by itself. What the compiled model gives must agree within the error of its number formats.
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";

export interface Routing {
  readonly layer: number;
  readonly ids: readonly number[];
  /** probability of the last expert chosen minus that of the best one not chosen */
  readonly margin: number;
}

export interface ReferenceRun {
  /** one row of logits for each position */
  readonly logits: readonly Float64Array[];
  /** for each position, the routing of each layer with experts */
  readonly routing: readonly (readonly Routing[])[];
}

interface Matrix {
  readonly shape: readonly number[];
  readonly data: Float64Array;
}

type Config = Readonly<Record<string, number | string | boolean | null | readonly number[] | undefined>>;

/** The value of an element by its bits. */
const bf16 = (bits: number): number => {
  const word = new DataView(new ArrayBuffer(4));
  word.setUint16(0, bits);
  return word.getFloat32(0);
};
const small = (bits: number, exponentBits: number, fractionBits: number, bias: number): number => {
  const sign = bits >> (exponentBits + fractionBits) ? -1 : 1;
  const exponent = (bits >> fractionBits) & ((1 << exponentBits) - 1);
  const fraction = (bits & ((1 << fractionBits) - 1)) / 2 ** fractionBits;
  return exponent === 0 ? sign * fraction * 2 ** (1 - bias) : sign * (1 + fraction) * 2 ** (exponent - bias);
};

const readFile = (path: string, into: Map<string, Matrix>): void => {
  const file = readFileSync(path);
  const length = Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.subarray(8, 8 + length).toString("utf8")) as Record<
    string,
    { dtype: string; shape: number[]; data_offsets: [number, number] }
  >;
  for (const [name, entry] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const count = entry.shape.reduce((n, d) => n * d, 1);
    const at = 8 + length + entry.data_offsets[0];
    const element = {
      BF16: (i: number) => bf16(file.readUInt16LE(at + 2 * i)),
      F16: (i: number) => small(file.readUInt16LE(at + 2 * i), 5, 10, 15),
      F32: (i: number) => file.readFloatLE(at + 4 * i),
      F8_E4M3: (i: number) => small(file.readUInt8(at + i), 4, 3, 7),
    }[entry.dtype] as (i: number) => number;
    into.set(name, { shape: entry.shape, data: Float64Array.from({ length: count }, (_, i) => element(i)) });
  }
};

/** The tensors of a directory, with block scales multiplied in. */
const readTensors = (directory: string, block: readonly number[]): Map<string, Matrix> => {
  const tensors = new Map<string, Matrix>();
  let files = ["model.safetensors"];
  try {
    const index = JSON.parse(readFileSync(join(directory, "model.safetensors.index.json"), "utf8")) as {
      weight_map: Record<string, string>;
    };
    files = [...new Set(Object.values(index.weight_map))];
  } catch {
    // one file without an index
  }
  for (const file of files) readFile(join(directory, file), tensors);
  for (const [name, { shape, data }] of tensors) {
    const scales = tensors.get(`${name}_scale_inv`);
    if (!scales) continue;
    const [rows, columns] = shape.slice(-2) as [number, number];
    const [down, across] = scales.shape.slice(-2) as [number, number];
    for (let i = 0; i < data.length; i++) {
      const m = Math.floor(i / (rows * columns));
      const r = Math.floor((Math.floor(i / columns) % rows) / (block[0] as number));
      const c = Math.floor((i % columns) / (block[1] as number));
      data[i] = (data[i] as number) * (scales.data[(m * down + r) * across + c] as number);
    }
  }
  return tensors;
};

const multiply = (w: Float64Array, at: number, rows: number, x: Float64Array): Float64Array => {
  const y = new Float64Array(rows);
  for (let r = 0; r < rows; r++) {
    let sum = 0;
    for (let c = 0; c < x.length; c++) sum += (w[at + r * x.length + c] as number) * (x[c] as number);
    y[r] = sum;
  }
  return y;
};

const silu = (x: number): number => x / (1 + Math.exp(-x));

const softmax = (x: Float64Array): Float64Array => {
  const most = x.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  const e = x.map((v) => Math.exp(v - most));
  const sum = e.reduce((a, b) => a + b, 0);
  return e.map((v) => v / sum);
};

/** Reads a checkpoint whole; small ones only. */
export const referenceModel = (directory: string): { forward(ids: readonly number[]): ReferenceRun } => {
  const root = JSON.parse(readFileSync(join(directory, "config.json"), "utf8")) as Config & {
    text_config?: Config;
    quantization_config?: { weight_block_size?: number[] };
  };
  const config = root.text_config ?? root;
  const number = (name: string): number => config[name] as number;
  const tensors = readTensors(directory, root.quantization_config?.weight_block_size ?? [128, 128]);
  const weight = (name: string): Matrix => {
    const found = tensors.get(`${name}.weight`);
    if (!found) throw new Error(`the reference needs ${name}.weight`);
    return found;
  };
  const layers = number("num_hidden_layers");
  const heads = number("num_attention_heads");
  const kvHeads = number("num_attention_groups");
  const dim = number("head_dim");
  const topK = number("moe_top_k");
  const epsilon = number("rms_norm_eps");
  const listed = config.moe_layers_enum;
  const moe = new Set(
    listed === undefined || listed === null
      ? Array.from({ length: layers - 1 }, (_, i) => i + 1)
      : (typeof listed === "string" ? listed.split(",").filter((s) => s.trim() !== "") : (listed as readonly number[])).map(
          Number,
        ),
  );

  const linear = (name: string, x: Float64Array): Float64Array => {
    const w = weight(name);
    return multiply(w.data, 0, w.shape[0] as number, x);
  };
  const norm = (name: string, x: Float64Array): Float64Array => {
    const w = weight(name).data;
    const mean = x.reduce((s, v) => s + v * v, 0) / x.length;
    return x.map((v, i) => (v / Math.sqrt(mean + epsilon)) * (w[i] as number));
  };
  const rotate = (x: Float64Array, position: number): Float64Array => {
    const y = new Float64Array(x.length);
    const half = dim / 2;
    for (let at = 0; at < x.length; at += dim)
      for (let j = 0; j < half; j++) {
        const angle = position * number("rope_theta") ** ((-2 * j) / dim);
        const [a, b] = [x[at + j] as number, x[at + half + j] as number];
        y[at + j] = a * Math.cos(angle) - b * Math.sin(angle);
        y[at + half + j] = b * Math.cos(angle) + a * Math.sin(angle);
      }
    return y;
  };
  const mlp = (prefix: string, x: Float64Array, expert?: number): Float64Array => {
    const part = (name: string, v: Float64Array): Float64Array => {
      const w = weight(`${prefix}.${name}`);
      const rows = w.shape.at(-2) as number;
      return multiply(w.data, (expert ?? 0) * rows * v.length, rows, v);
    };
    const [gate, up] = [part("gate_proj", x), part("up_proj", x)];
    return part(
      "down_proj",
      gate.map((g, i) => silu(g) * (up[i] as number)),
    );
  };
  const add = (a: Float64Array, b: Float64Array, scale = 1): Float64Array => a.map((v, i) => v + scale * (b[i] as number));

  const forward = (ids: readonly number[]): ReferenceRun => {
    const cache = Array.from({ length: layers }, () => ({ k: [] as Float64Array[], v: [] as Float64Array[] }));
    const logits: Float64Array[] = [];
    const routing: Routing[][] = [];
    ids.forEach((id, position) => {
      const embedding = weight("model.embed_tokens");
      const hidden = embedding.shape[1] as number;
      let x: Float64Array = embedding.data.slice(id * hidden, (id + 1) * hidden);
      const routes: Routing[] = [];
      for (let i = 0; i < layers; i++) {
        const layer = `model.layers.${i}`;
        const h = norm(`${layer}.input_layernorm`, x);
        const low = norm(`${layer}.self_attn.inter_norm`, linear(`${layer}.self_attn.q_proj`, h));
        const q = rotate(linear(`${layer}.self_attn.wq`, low), position);
        const { k, v } = cache[i] as { k: Float64Array[]; v: Float64Array[] };
        k.push(rotate(linear(`${layer}.self_attn.k_proj`, h), position));
        v.push(linear(`${layer}.self_attn.v_proj`, h));
        const o = new Float64Array(heads * dim);
        for (let head = 0; head < heads; head++) {
          const shared = Math.floor((head * kvHeads) / heads) * dim;
          const scores = Float64Array.from(k, (row) => {
            let dot = 0;
            for (let c = 0; c < dim; c++) dot += (q[head * dim + c] as number) * (row[shared + c] as number);
            return dot / Math.sqrt(dim);
          });
          softmax(scores).forEach((p, t) => {
            for (let c = 0; c < dim; c++)
              o[head * dim + c] = (o[head * dim + c] as number) + p * ((v[t] as Float64Array)[shared + c] as number);
          });
        }
        x = add(x, linear(`${layer}.self_attn.o_proj`, o));
        const h2 = norm(`${layer}.post_attention_layernorm`, x);
        if (!moe.has(i)) {
          x = add(x, mlp(`${layer}.mlp`, h2));
          continue;
        }
        const p = softmax(linear(`${layer}.moe.gate`, h2));
        const order = [...p.keys()].sort((a, b) => (p[b] as number) - (p[a] as number) || a - b);
        const chosen = order.slice(0, topK);
        const mass = config.norm_expert_weight === true ? chosen.reduce((s, e) => s + (p[e] as number), 0) : 1;
        let y = mlp(`${layer}.share_expert`, h2);
        for (const e of chosen) y = add(y, mlp(`${layer}.moe`, h2, e), (p[e] as number) / mass);
        const next = order[topK];
        const margin = (p[chosen.at(-1) as number] as number) - (next === undefined ? 0 : (p[next] as number));
        routes.push({ layer: i, ids: chosen, margin });
        x = add(x, y);
      }
      logits.push(linear("lm_head", norm("model.norm", x)));
      routing.push(routes);
    });
    return { logits, routing };
  };
  return { forward };
};
