import {
  closeSync,
  cpSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { parseJson } from "../compiler/frontends/json.ts";
import { readSafetensors, writeSafetensors } from "../compiler/frontends/safetensors.ts";
import { readStep3 } from "../compiler/models/step3.ts";
import { readWeight } from "../compiler/weights.ts";
import { UserError } from "../ir/error.ts";
import { evaluate, kvState } from "../ir/evaluate.ts";
import type { Tensor } from "../ir/tensor.ts";
import type { DType } from "../ir/type.ts";
import { verify } from "../ir/verify.ts";
import { type CheckpointOptions, moeLayersOf, random, sizesOf, step3ConfigJson, writeStep3Checkpoint } from "./checkpoint.ts";
import { referenceModel } from "./reference.ts";

let scratch = "";
let count = 0;
beforeAll(() => {
  scratch = mkdtempSync(join(tmpdir(), "checkpoint-"));
});
afterAll(() => rmSync(scratch, { recursive: true }));

/** A fresh checkpoint directory. */
const made = (options: CheckpointOptions = {}): string => {
  const directory = join(scratch, String(count++));
  writeStep3Checkpoint(directory, options);
  return directory;
};

/** The message with which reading is refused: one line, from a UserError of exit code 1. */
const refusal = (directory: string, weights = true): string => {
  try {
    readStep3(directory, { weights }).checkpoint?.close();
  } catch (error) {
    if (!(error instanceof UserError)) throw error;
    expect(error.exitCode).toBe(1);
    expect(error.message).not.toMatch(/[\n\r]/);
    return error.message.replaceAll(directory, "DIR");
  }
  throw new Error("it was accepted");
};

const editJson = (path: string, edit: (value: Record<string, unknown>) => void): void => {
  const value = JSON.parse(readFileSync(path, "utf8")) as Record<string, unknown>;
  edit(value);
  writeFileSync(path, JSON.stringify(value));
};

interface Entry {
  dtype: string;
  shape: unknown;
  data_offsets: unknown;
}

/** Changes the header of a safetensors file, keeping its data. */
const editHeader = (path: string, edit: (header: Record<string, Entry>) => unknown): void => {
  const file = readFileSync(path);
  const length = Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.subarray(8, 8 + length).toString()) as Record<string, Entry>;
  const changed = edit(header);
  const text = Buffer.from(typeof changed === "string" && /^[[{]/.test(changed) ? changed : JSON.stringify(header));
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(BigInt(text.length));
  writeFileSync(path, Buffer.concat([prefix, text, file.subarray(8 + length)]));
};

const wq = "model.layers.1.self_attn.wq.weight";
const entry = (header: Record<string, Entry>, name: string): Entry => header[name] as Entry;

describe("a checkpoint is refused with one line that says what, where and the mend:", () => {
  const config = (what: string, edit: (value: Record<string, unknown>) => void, message: RegExp): void => {
    test(`config.json: ${what}`, () => {
      const directory = join(scratch, String(count++));
      mkdirSync(directory);
      writeFileSync(join(directory, "config.json"), JSON.stringify(step3ConfigJson()));
      editJson(join(directory, "config.json"), edit);
      expect(refusal(directory, false)).toMatch(message);
    });
  };
  config(
    "another model",
    (c) => (c.model_type = "llama"),
    /^DIR\/config\.json: model_type "llama" is not supported; .*step3_text/,
  );
  config("no model type", (c) => delete c.model_type, /model_type nothing is not supported/);
  config("a missing field", (c) => delete c.share_q_dim, /share_q_dim is missing; add it \(it must be an integer from 1/);
  config("a null field", (c) => (c.head_dim = null), /head_dim is missing; add it/);
  config("a string for a number", (c) => (c.hidden_size = "40"), /hidden_size is "40"; correct it \(it must be an integer/);
  config("a fraction", (c) => (c.num_hidden_layers = 2.5), /num_hidden_layers is 2\.5; correct it/);
  config("a negative size", (c) => (c.vocab_size = -1), /vocab_size is -1; correct it/);
  config("a huge size", (c) => (c.hidden_size = 1e18), /hidden_size is 1000000000000000000; correct it/);
  config("odd head_dim", (c) => (c.head_dim = 15), /head_dim is 15; correct it \(it must be even/);
  config(
    "KV heads that do not divide",
    (c) => (c.num_attention_groups = 3),
    /num_attention_groups is 3; .*divisor of num_attention_heads, 4/,
  );
  config("more experts chosen than there are", (c) => (c.moe_top_k = 7), /moe_top_k is 7; .*from 1 to 6/);
  config(
    "rotary scaling",
    (c) => (c.rope_scaling = { rope_type: "yarn", factor: 4 }),
    /rope_scaling is an object; .*scaling "yarn" is not supported/,
  );
  config("old rotary scaling", (c) => (c.rope_scaling = { type: "linear" }), /scaling "linear" is not supported/);
  config("rope_parameters", (c) => (c.rope_parameters = { rope_type: "llama3" }), /rope_parameters .*"llama3" is not supported/);
  config("another activation", (c) => (c.hidden_act = "gelu"), /hidden_act is "gelu"; .*"silu" or absent/);
  config("biases", (c) => (c.attention_bias = true), /attention_bias is true/);
  config(
    "tied embeddings",
    (c) => (c.tie_word_embeddings = true),
    /tie_word_embeddings is true; .*store a copy of model\.embed_tokens\.weight/,
  );
  config(
    "a layer list with words",
    (c) => (c.moe_layers_enum = "1,two"),
    /moe_layers_enum is "1,two"; .*below num_hidden_layers, 3/,
  );
  config("a layer that does not exist", (c) => (c.moe_layers_enum = "1,3"), /moe_layers_enum is "1,3"/);
  config("a layer listed twice", (c) => (c.moe_layers_enum = [1, 1]), /moe_layers_enum is \[1,1\]/);
  config("a flag that is none", (c) => (c.norm_expert_weight = 1), /norm_expert_weight is 1; .*true or false/);
  config("a token id that is none", (c) => (c.eos_token_id = [1, "x"]), /eos_token_id is \[1,"x"\]; .*token id/);
  config(
    "another quantisation",
    (c) => (c.quantization_config = { quant_method: "gptq" }),
    /quantization_config .*"gptq" is not supported/,
  );
  config(
    "another float",
    (c) => (c.quantization_config = { quant_method: "fp8", fmt: "e5m2" }),
    /fmt "e4m3"; "e5m2" is not supported/,
  );
  config(
    "a block that is none",
    (c) => (c.quantization_config = { weight_block_size: [128, 0] }),
    /weight_block_size is \[rows, columns\]/,
  );
  config("no text part", (c) => (c.model_type = "step3_vl"), /text_config must be an object/);
  config(
    "another text part",
    (c) => Object.assign(c, { model_type: "step3_vl", text_config: { model_type: "qwen3" } }),
    /text_config\.model_type "qwen3"/,
  );
  config(
    "a field of the text part",
    (c) => Object.assign(c, { model_type: "step3_vl", text_config: {} }),
    /text_config\.num_hidden_layers is missing/,
  );

  const text = (what: string, content: string | Uint8Array, message: RegExp): void => {
    test(`config.json: ${what}`, () => {
      const directory = join(scratch, String(count++));
      mkdirSync(directory);
      writeFileSync(join(directory, "config.json"), content);
      expect(refusal(directory, false)).toMatch(message);
      expect(refusal(join(directory, "config.json"), false)).toMatch(
        message.source.startsWith("^DIR\\/config") ? /^DIR: / : message,
      );
    });
  };
  text("bad JSON", '{"a": 1,\n "b": }', /unexpected character at line 2, column 7; correct it/);
  text("a truncated file", '{"a": [1, 2', /',' or ']' is expected at line 1, column 12/);
  text("a duplicate key", '{"a": 1, "a": 2}', /duplicate key "a" at line 1/);
  text("text after the end", "{} {}", /unexpected text after the end/);
  text("a string without an end", '{"model_type', /a string has no end/);
  text("a wrong escape", '{"\\q": 1}', /wrong escape/);
  text("nesting without an end", "[".repeat(100000), /nested more than 64 deep/);
  text("not an object", "[1]", /not a JSON object/);
  text("not UTF-8", Uint8Array.of(0x7b, 0xff, 0x7d), /not UTF-8/);
  text("nothing", "", /unexpected end at line 1, column 1/);

  const files = (what: string, edit: (directory: string) => void, message: RegExp, options: CheckpointOptions = {}): void => {
    test(what, () => {
      const directory = made(options);
      edit(directory);
      expect(refusal(directory)).toMatch(message);
    });
  };
  const model = (directory: string): string => join(directory, "model.safetensors");
  const index = (directory: string): string => join(directory, "model.safetensors.index.json");
  const shard = (directory: string, n: number): string => join(directory, `model-0000${n}-of-00003.safetensors`);
  const sharded = { shards: 3 };

  files("no config.json", (d) => rmSync(join(d, "config.json")), /config\.json: no such file; give a Hugging Face/);
  files("no weights", (d) => rmSync(model(d)), /^DIR: has neither model\.safetensors nor .*--no-weights/);
  files("both forms of weights", (d) => writeFileSync(index(d), "{}"), /^DIR: has both/);
  const asFolder = (path: string): void => {
    rmSync(path);
    mkdirSync(path);
  };
  files("weights that are a folder", (d) => asFolder(model(d)), /not a regular file/);
  files("an empty file", (d) => truncateSync(model(d)), /0 bytes are too few/);
  files(
    "a truncated file",
    (d) => truncateSync(model(d), 40000),
    /tensor "model\..*" is truncated: it ends at byte \d+, the file has 40000; .*download/,
  );
  files(
    "a file with more",
    (d) => writeFileSync(model(d), Buffer.concat([readFileSync(model(d)), Buffer.alloc(3)])),
    /3 bytes after the last tensor/,
  );
  const headerLength = (d: string, length: bigint): void => {
    const descriptor = openSync(model(d), "r+");
    const bytes = Buffer.alloc(8);
    bytes.writeBigUInt64LE(length);
    writeSync(descriptor, bytes, 0, 8, 0);
    closeSync(descriptor);
  };
  files("a header longer than the file", (d) => headerLength(d, 5_000_000n), /header length 5000000 is more than the file's/);
  files(
    "an absurd header length",
    (d) => headerLength(d, 2n ** 64n - 1n),
    /header length 18446744073709551615 is above the format's limit/,
  );
  files("a header cut short", (d) => headerLength(d, 100n), /header: .* at line 1, column/);
  const header = (what: string, edit: (h: Record<string, Entry>) => unknown, message: RegExp): void =>
    files(`header: ${what}`, (d) => editHeader(model(d), edit), message);
  header("not an object", () => "[]", /the header is not a JSON object/);
  header(
    "a duplicate tensor",
    (h) => JSON.stringify(h).replace("{", `{"lm_head.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},`),
    /duplicate key "lm_head\.weight"/,
  );
  header(
    "an unknown dtype",
    (h) => (entry(h, wq).dtype = "BF17"),
    /tensor "model\.layers\.1\.self_attn\.wq\.weight": unknown dtype "BF17"/,
  );
  header("an inherited name as dtype", (h) => (entry(h, wq).dtype = "toString"), /unknown dtype "toString"/);
  header("a negative size", (h) => (entry(h, wq).shape = [-64, -24]), /shape \[-64,-24\] is not a list of sizes/);
  header("a shape that is none", (h) => (entry(h, wq).shape = "64x24"), /shape "64x24" is not a list of sizes/);
  header("a huge shape", (h) => (entry(h, wq).shape = [2 ** 40, 2 ** 40]), /is too large/);
  header(
    "a shape that its bytes do not hold",
    (h) => (entry(h, wq).shape = [64, 25]),
    /hold 3072 bytes, but BF16 \[64,25\] needs 3200/,
  );
  header("offsets that are none", (h) => (entry(h, wq).data_offsets = [0]), /data_offsets \[0\] is not \[begin, end\]/);
  header("offsets the wrong way", (h) => (entry(h, wq).data_offsets = [4000, 928]), /hold -3072 bytes/);
  header("an unknown field", (h) => Object.assign(entry(h, wq), { compression: 1 }), /unknown field "compression"/);
  header(
    "metadata that are none",
    (h) => Object.assign(h, { __metadata__: { a: 1 } }),
    /__metadata__ must be an object of strings/,
  );
  const move = (h: Record<string, Entry>, by: number): void => {
    const [begin, end] = entry(h, wq).data_offsets as [number, number];
    entry(h, wq).data_offsets = [begin + by, end + by];
  };
  header("overlapping tensors", (h) => move(h, -2), /tensor "model\..*" overlaps tensor "model\./);
  header("a gap", (h) => move(h, 2), /2 bytes before tensor|overlaps/);
  header(
    "a missing tensor",
    (h) => Object.assign(h, { [wq.replace("wq", "wx")]: entry(h, wq), [wq]: undefined }),
    /tensor "model\.layers\.1\.self_attn\.wq\.weight" is missing; download/,
  );
  header(
    "no lm_head",
    (h) => Object.assign(h, { "lm_tail.weight": entry(h, "lm_head.weight"), "lm_head.weight": undefined }),
    /"lm_head\.weight" is missing; Step-3 does not share it/,
  );
  header(
    "an extra tensor",
    (h) => (h["model.layers.1.self_attn.q_norm.weight"] = { dtype: "F32", shape: [0], data_offsets: [0, 0] }),
    /model\.safetensors: tensor "model\.layers\.1\.self_attn\.q_norm\.weight" is not a part/,
  );
  header(
    "a control character in a name",
    (h) => (h["evil\u001b[2J\nname"] = { dtype: "F32", shape: [0], data_offsets: [0, 0] }),
    /tensor "evil\\u001b\[2J\\nname" is not a part/,
  );
  header(
    "a misshapen tensor",
    (h) => (entry(h, wq).shape = [24, 64]),
    /tensor "model\.layers\.1\.self_attn\.wq\.weight" has shape \[24,64\], config\.json says \[64,24\]/,
  );
  header(
    "a dtype that weights do not have",
    (h) => (entry(h, wq).dtype = "I16"),
    /wq\.weight" is I16; it must be BF16, F16, F32 or F8_E4M3 with scales/,
  );
  header("FP8 without scales", (h) => Object.assign(entry(h, wq), { dtype: "F8_E4M3", shape: [64, 48] }), /has shape \[64,48\]/);
  header(
    "a vision tensor beside a text model",
    (h) => (h["vision_model.x"] = { dtype: "F32", shape: [0], data_offsets: [0, 0] }),
    /"vision_model\.x" is not a part/,
  );
  files(
    "block scales that are missing",
    (d) =>
      editHeader(model(d), (h) =>
        Object.assign(h, { [`${wq}_extra`]: entry(h, `${wq}_scale_inv`), [`${wq}_scale_inv`]: undefined }),
      ),
    /wq\.weight_scale_inv" is missing/,
    { dtype: "FP8" },
  );
  files(
    "block scales of another block",
    (d) => editJson(join(d, "config.json"), (c) => (c.quantization_config = { weight_block_size: [16, 16] })),
    /_scale_inv" has shape \[1,1\], blocks of 16x16 need \[2,3\]/,
    { dtype: "FP8" },
  );
  files(
    "FP8 where it cannot be",
    (d) => editHeader(model(d), (h) => Object.assign(entry(h, "model.norm.weight"), { dtype: "F8_E4M3", shape: [80] })),
    /"model\.norm\.weight" has shape \[80\]/,
  );

  const indexed = (what: string, edit: (map: Record<string, unknown>) => unknown, message: RegExp): void =>
    files(`index: ${what}`, (d) => editJson(index(d), (v) => edit(v.weight_map as Record<string, unknown>)), message, sharded);
  files("index: no map", (d) => writeFileSync(index(d), "{}"), /index\.json: "weight_map" must be an object/, { shards: 3 });
  indexed(
    "a file that is not a string",
    (m) => (m[wq] = 3),
    /the file of tensor "model\.layers\.1\.self_attn\.wq\.weight" is not a string/,
  );
  indexed(
    "a path upwards",
    (m) => (m[wq] = "../x.safetensors"),
    /index\.json: file "\.\.\/x\.safetensors" is not a plain file name; .*inside/,
  );
  indexed("an absolute path", (m) => (m[wq] = "/etc/passwd"), /file "\/etc\/passwd" is not a plain file name/);
  indexed("a path upwards in the middle", (m) => (m[wq] = "a/../../x"), /is not a plain file name/);
  indexed("a backslash", (m) => (m[wq] = "..\\x"), /is not a plain file name/);
  indexed(
    "a shard that does not exist",
    (m) => (m[wq] = "model-9.safetensors"),
    /model-9\.safetensors: no such file, but .* lists it/,
  );
  indexed(
    "a tensor in another shard",
    (m) => (m[wq] = "model-00003-of-00003.safetensors"),
    /which model\.safetensors\.index\.json says is here, is missing|is not listed for this file/,
  );
  indexed(
    "a tensor that is not listed",
    (m) => delete m[wq],
    /tensor "model\.layers\.1\.self_attn\.wq\.weight" is not listed for this file/,
  );
  files(
    "index: a duplicate tensor",
    (d) => writeFileSync(index(d), readFileSync(index(d), "utf8").replace('"lm_head', '"model.norm.weight": "x", "lm_head')),
    /duplicate key "model\.norm\.weight"/,
    sharded,
  );
  files("a missing shard", (d) => rmSync(shard(d, 2)), /model-00002-of-00003\.safetensors: no such file/, sharded);
  files(
    "a truncated shard",
    (d) => truncateSync(shard(d, 2), 9000),
    /model-00002-of-00003\.safetensors: (header length|tensor .* is truncated)/,
    sharded,
  );
  files(
    "a link that leaves the directory",
    (d) => {
      renameSync(shard(d, 2), join(scratch, `outside-${count}`));
      symlinkSync(join(scratch, `outside-${count}`), shard(d, 2));
    },
    /file "model-00002-of-00003\.safetensors" is a link that leaves the directory/,
    sharded,
  );
  test("weights asked of a configuration", () => {
    const directory = made();
    expect(refusal(join(directory, "config.json"))).toMatch(/a configuration has no weights; give the checkpoint's directory/);
    expect(refusal(join(scratch, "nowhere"))).toMatch(/config\.json: no such file/);
  });
  test("a context longer than the model's positions is an error of usage", () => {
    const read = readStep3(made(), { weights: false });
    expect(() => read.graph(1, { maxContext: 257, maxPages: 17 })).toThrow(
      /--max-context 257 is more than the model's 256 positions/,
    );
  });
});

describe("a checkpoint is accepted:", () => {
  test.each<[string, CheckpointOptions]>([
    ["one file", {}],
    ["shards", { shards: 5 }],
    ["F16", { dtype: "F16" }],
    ["F32", { dtype: "F32", shards: 2 }],
    ["FP8", { dtype: "FP8" }],
    ["FP8 in other blocks", { dtype: "FP8", block: [16, 24] }],
    ["a vision-language directory", { vision: true, shards: 3 }],
    ["layers as a list", { layersEnum: "list", sizes: { moeLayers: [0, 2] } }],
    ["layers by default", { layersEnum: "absent" }],
    ["no layer with experts", { sizes: { moeLayers: [] } }],
    ["every layer with experts", { sizes: { moeLayers: [0, 1, 2] } }],
    ["one layer", { sizes: { layers: 1 } }],
    ["as many experts as are chosen", { sizes: { experts: 3 } }],
    ["two KV heads", { sizes: { kvHeads: 2 } }],
    [
      "sizes of 128",
      { sizes: { hidden: 128, intermediate: 256, moeIntermediate: 128, shared: 128, queryRank: 128, headDim: 32 } },
    ],
  ])("%s", (_, options) => {
    const { config, facts, checkpoint, graph } = readStep3(made(options), { weights: true });
    const sizes = sizesOf(options);
    verify(graph(4, { maxContext: 64, maxPages: 4 }));
    expect(config.moe?.layers ?? []).toEqual(moeLayersOf(sizes));
    expect(facts).toMatchObject({ vocabulary: sizes.vocabulary, bos: 0, eos: [sizes.vocabulary - 1], layers: sizes.layers });
    expect(facts.refused?.map((r) => r.id)).toEqual(options.vision ? [sizes.vocabulary - 2] : undefined);
    checkpoint?.close();
  });

  test("a snapshot of the Hugging Face cache, whose files are links to blobs", () => {
    const from = made({ shards: 2 });
    const repository = join(scratch, "models--x");
    const snapshot = join(repository, "snapshots", "0123");
    mkdirSync(snapshot, { recursive: true });
    cpSync(from, join(repository, "blobs"), { recursive: true });
    for (const name of readdirSync(from)) symlinkSync(join("../../blobs", name), join(snapshot, name));
    readStep3(snapshot, { weights: true }).checkpoint?.close();
  });

  test("text without the vision tower's shards", () => {
    const directory = made({ vision: true });
    const { tensors } = readSafetensors(join(directory, "model.safetensors"));
    const names = tensors.map((t) => t.name);
    const vision = (name: string): boolean => name.startsWith("vision_model.") || name.startsWith("vit_");
    const bytes = readFileSync(join(directory, "model.safetensors"));
    writeSafetensors(
      join(directory, "text.safetensors"),
      tensors.filter((t) => !vision(t.name)).map((t) => ({ ...t, data: [bytes.subarray(t.offset, t.offset + t.bytes)] })),
    );
    rmSync(join(directory, "model.safetensors"));
    const map = Object.fromEntries(names.map((name) => [name, vision(name) ? "model.safetensors" : "text.safetensors"]));
    // present in the index, and only there
    writeFileSync(join(directory, "model.safetensors.index.json"), JSON.stringify({ weight_map: map }));
    writeFileSync(join(directory, "model.safetensors.part"), "");
    renameSync(join(directory, "model.safetensors.part"), join(directory, "vision.safetensors"));
    editJson(join(directory, "model.safetensors.index.json"), (v) => {
      const weights = v.weight_map as Record<string, string>;
      for (const name of names) if (vision(name)) weights[name] = "vision.safetensors";
    });
    readStep3(directory, { weights: true }).checkpoint?.close();
  });

  test("a configuration alone, published fields included", () => {
    const directory = join(scratch, String(count++));
    mkdirSync(directory);
    const path = join(directory, "config.json");
    writeFileSync(path, JSON.stringify(step3ConfigJson({ vision: true })));
    for (const from of [directory, path]) {
      const { checkpoint, graph } = readStep3(from, { weights: false });
      expect(checkpoint).toBeUndefined();
      verify(graph(8, { maxContext: 256, maxPages: 16 }));
    }
  });
});

describe("damage is found, whatever byte it hits:", () => {
  test.each<[string, CheckpointOptions, string]>([
    ["config.json", {}, "config.json"],
    ["config.json of a vision-language model", { vision: true }, "config.json"],
    ["model.safetensors.index.json", { shards: 2 }, "model.safetensors.index.json"],
    ["the header of a shard", { shards: 2 }, "model-00002-of-00002.safetensors"],
    ["the header of FP8", { dtype: "FP8" }, "model.safetensors"],
  ])("%s", (_, options, file) => {
    const directory = made(options);
    const path = join(directory, file);
    const whole = readFileSync(path);
    const reach = file.endsWith(".safetensors") ? 8 + Number(whole.readBigUInt64LE(0)) : whole.length;
    const draw = random(11);
    let refused = 0;
    for (let i = 0; i < 250; i++) {
      const bytes = Buffer.from(whole);
      for (let n = 1 + Math.floor(draw() * 3); n > 0; n--) {
        const at = Math.floor(draw() * (i % 8 === 0 ? Math.min(reach, 8) : reach));
        bytes[at] = draw() < 0.5 ? (bytes[at] as number) ^ (1 << Math.floor(draw() * 8)) : Math.floor(draw() * 256);
      }
      const cut = i % 10 === 9 ? Math.floor(draw() * whole.length) : whole.length;
      writeFileSync(path, bytes.subarray(0, cut));
      try {
        const model = readStep3(directory, { weights: true });
        verify(model.graph(2, { maxContext: 16, maxPages: 1 }));
        model.checkpoint?.close();
      } catch (error) {
        if (!(error instanceof UserError)) throw error;
        expect([...error.message].every((ch) => ch >= " ")).toBe(true);
        refused++;
      }
    }
    expect(refused).toBeGreaterThan(60);
  });

  test("random JSON: what JSON.parse takes without duplicates and depth is taken, with the same meaning", () => {
    const draw = random(4);
    const alphabet = ['"a"', '"b\\n"', "1", "-0.5e3", "true", "null", "{", "}", "[", "]", ":", ",", " ", "\n", "x", '"'];
    const plain = (value: unknown): unknown =>
      value instanceof Map
        ? Object.fromEntries([...value].map(([k, v]) => [k, plain(v)]))
        : Array.isArray(value)
          ? value.map(plain)
          : value;
    for (let i = 0; i < 5000; i++) {
      const text = Array.from({ length: 1 + Math.floor(draw() * 8) }, () => alphabet[Math.floor(draw() * alphabet.length)]).join(
        "",
      );
      const attempt = (parse: () => unknown): string => {
        try {
          return JSON.stringify(parse());
        } catch (error) {
          return error instanceof UserError && error.message.includes("duplicate") ? "duplicate" : "error";
        }
      };
      const got = attempt(() => plain(parseJson(text, "text", "mend")));
      if (got !== "duplicate") expect([text, got]).toEqual([text, attempt(() => JSON.parse(text))]);
    }
  });
});

/** A prompt through the interpreter, all rows in one round. */
const interpreted = (directory: string, ids: readonly number[]): { logits: Tensor; chosen: number[][] } => {
  const { graph, checkpoint } = readStep3(directory, { weights: true });
  const rows = ids.length;
  const column = (dtype: DType, shape: readonly number[], value: (i: number) => number): Tensor => ({
    kind: "tensor",
    dtype,
    shape,
    data: Float64Array.from({ length: shape.reduce((n, d) => n * d, 1) }, (_, i) => value(i)),
  });
  const inputs = new Map([
    ["ids", column("i32", [rows], (i) => ids[i] as number)],
    ["position", column("i32", [rows], (i) => i)],
    ["pages", column("i32", [rows, 4], (i) => 1 + (i % 4))],
    ["temperature", column("f32", [rows], () => 0)],
    ["top_p", column("f32", [rows], () => 1)],
    ["seed", column("u32", [rows], () => 0)],
  ]);
  const chosen: number[][] = [];
  const model = graph(rows, { maxContext: 64, maxPages: 4 });
  const states = new Map(model.states.map((s) => [s.name, kvState(16)]));
  const outputs = evaluate(
    model,
    inputs,
    (w) => readWeight(checkpoint, w),
    states,
    new Map(),
    (op, results) => {
      if (op.kind === "topk") chosen.push([...(results[1] as Tensor).data]);
    },
  );
  checkpoint?.close();
  const logits = outputs.get("logits") as Tensor;
  const next = outputs.get("next") as Tensor;
  for (let t = 0; t < rows; t++) {
    const row = logits.data.subarray(t * (logits.shape[1] as number), (t + 1) * (logits.shape[1] as number));
    expect(next.data[t]).toBe(row.indexOf(Math.max(...row)));
  }
  return { logits, chosen };
};

describe("the graph agrees with a float64 forward pass that shares no code with it:", () => {
  const prompt = [5, 17, 3, 80, 2, 44, 9, 61, 0, 33, 33, 5];
  test.each<[string, CheckpointOptions]>([
    ["bf16", {}],
    ["F32, two KV heads, normalised experts", { dtype: "F32", sizes: { kvHeads: 2 }, normalise: true, seed: 2 }],
    [
      "F16, experts in the first layer and none in the second",
      { dtype: "F16", sizes: { moeLayers: [0, 2] }, layersEnum: "list", seed: 3 },
    ],
    ["FP8, sharded", { dtype: "FP8", shards: 3, seed: 4 }],
    ["FP8 in blocks of 16x8", { dtype: "FP8", block: [16, 8], vision: true, seed: 5 }],
    ["one expert a token, wide", { sizes: { topK: 1, hidden: 128, headDim: 32, moeIntermediate: 64 }, seed: 6 }],
    ["dense", { sizes: { moeLayers: [], layers: 2 }, seed: 7 }],
  ])("%s", (_, options) => {
    const directory = made(options);
    const { logits, chosen } = interpreted(directory, prompt);
    const reference = referenceModel(directory).forward(prompt);
    const topK = sizesOf(options).topK;
    const vocabulary = logits.shape[1] as number;
    let [error, size, compared] = [0, 0, 0];
    // a token whose experts were nearly tied may go elsewhere, and its cached keys then differ for those after it
    for (const [t, row] of reference.logits.entries()) {
      const flipped = (reference.routing[t] ?? []).find((route, k) => {
        const got = chosen[k]?.slice(t * topK, (t + 1) * topK).sort((a, b) => a - b);
        return got?.join() !== [...route.ids].sort((a, b) => a - b).join();
      });
      if (flipped) {
        expect(flipped.margin).toBeLessThan(0.02);
        break;
      }
      row.forEach((x, i) => {
        error += (x - (logits.data[t * vocabulary + i] as number)) ** 2;
        size += x * x;
      });
      compared++;
    }
    expect(compared).toBeGreaterThan(4);
    expect(Math.sqrt(error / size)).toBeLessThan(2e-2);
  });
});
