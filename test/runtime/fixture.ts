/** A bundle written by hand, for the programs of program.cpp: two exchanges a round, one routed and one dense. */
import { createHash } from "node:crypto";
import { mkdirSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { schedule } from "../../compiler/schedule.ts";
import type { KernelFacts, Manifest } from "../../ir/bundle.ts";
import { parseGraph } from "../../ir/parse.ts";
import type { ExchangeType, Field, Key, Buffer as Memory, RankProgram, Schedule, Step } from "../../ir/schedule.ts";
import { type DType, dtypeBytes } from "../../ir/type.ts";

export interface Shape {
  readonly attention: number;
  readonly ffn: number;
  readonly slots: number;
  /** rows of one slot */
  readonly prefillRows: number;
  readonly decodeRows: number;
  readonly pages: number;
  readonly maxBatch: number;
  /** changes the wire hash and nothing else */
  readonly source?: string;
  readonly seeded?: boolean;
  /** of both sides, or of the FFN side alone */
  readonly device?: string;
  readonly ffnDevice?: string;
}

export const small: Shape = { attention: 1, ffn: 1, slots: 3, prefillRows: 4, decodeRows: 2, pages: 33, maxBatch: 6 };

/** Plain data, so that a test can spoil any part of it before it is written. */
export interface Bundle {
  manifest: Manifest;
  schedules: Schedule[];
  /** path -> tensor -> bytes */
  weights: Map<string, Map<string, Uint8Array>>;
}

export const H = 8;
export const V = 32;
const J = 2;
const eos = 13;
export const pageTokens = 4;
const columns = 4;
const pageBytes = 64;
export const context: number = pageTokens * columns;

const field = (name: string, dtype: DType, width: number, rows: number, below?: number): Field => ({
  name,
  dtype,
  shape: ["T", width],
  bytes: rows * width * dtypeBytes(dtype),
  ...(below === undefined ? {} : { below }),
});
const header: Field = { name: "head", dtype: "u8", shape: [64], bytes: 64 };

export const typesOf = (rows: number): ExchangeType[] => [
  {
    name: "moe",
    push: [field("tok", "f32", H, rows), field("ids", "i32", J, rows, 4), field("wgt", "f32", J, rows), header],
    pull: [field("back", "f32", H, rows)],
  },
  { name: "dense", push: [field("tok", "f32", H, rows), header], pull: [field("back", "f32", H, rows)] },
];

class Regions {
  readonly buffers: Memory[] = [];
  readonly memory: Record<Memory["region"], number> = { weights: 0, state: 0, exchange: 0, scratch: 0, input: 0, output: 0 };
  private readonly rows: number;
  private readonly segments: number;
  constructor(rows: number, segments: number) {
    this.rows = rows;
    this.segments = segments;
  }
  add(
    name: string,
    region: Memory["region"],
    dtype: DType,
    shape: Memory["shape"],
    rest: { slot?: number; binds?: string } = {},
  ): void {
    const permanent = region === "weights" || region === "state";
    const segments = permanent ? 1 : this.segments;
    const one = shape.reduce((n: number, d) => n * (d === "T" ? this.rows : (d as number)), dtypeBytes(dtype));
    const bytes = region === "weights" ? Math.ceil(one / 64) * 64 : one * segments;
    this.buffers.push({ name, region, dtype, shape, segments, offset: this.memory[region], bytes, ...rest });
    this.memory[region] += Math.ceil(bytes / 64) * 64;
  }
}

const attentionProgram = (a: number, shape: Shape, rows: number): RankProgram => {
  const r = new Regions(rows, 1);
  r.add("w_head", "weights", "f32", [V, H], { binds: "lm_head" });
  r.add("kv0", "state", "u8", [shape.pages, pageBytes], { binds: "kv0" });
  for (let m = 0; m < shape.slots; m++) {
    const slot = { slot: m };
    for (const [name, dtype] of [
      ["ids", "i32"],
      ["position", "i32"],
      ["temperature", "f32"],
      ["top_p", "f32"],
      ["seed", "u32"],
    ] as const)
      r.add(`${name}${m}`, "input", dtype, ["T"], { ...slot, binds: name });
    r.add(`pages${m}`, "input", "i32", ["T", columns], { ...slot, binds: "pages" });
    r.add(`next${m}`, "output", "i32", ["T"], { ...slot, binds: "next" });
    r.add(`logits${m}`, "output", "f32", ["T", V], { ...slot, binds: "logits" });
    r.add(`tok${m}`, "exchange", "f32", ["T", H], slot);
    r.add(`eids${m}`, "exchange", "i32", ["T", J], slot);
    r.add(`wgt${m}`, "exchange", "f32", ["T", J], slot);
    r.add(`head${m}`, "exchange", "u8", [64], slot);
    for (let f = 0; f < shape.ffn; f++) r.add(`back${m}.${f}`, "exchange", "f32", ["T", H], slot);
    for (const x of ["x", "y", "z"]) r.add(`${x}${m}`, "scratch", "f32", ["T", H], slot);
  }
  const steps: Step[] = [];
  const launch = (slot: number, kernel: string, inputs: string[], out: string[], inout?: string[]): number => {
    const of = (names: string[]): string[] =>
      names.map((n) => (n === "kv0" || n === "w_head" ? n : n.replace(/^(\w+?)(\.\d+)?$/, `$1${slot}$2`)));
    steps.push({ op: "launch", kernel, in: of(inputs), out: of(out), ...(inout ? { inout } : {}), rows: `head${slot}`, slot });
    return steps.length - 1;
  };
  const backs = Array.from({ length: shape.ffn }, (_, f) => `back.${f}`);
  const slots = Array.from({ length: shape.slots }, (_, m) => m);
  for (const slot of slots) {
    launch(slot, "embed", ["ids", "position", "pages"], ["x"], ["kv0"]);
    const after = launch(slot, "route", ["x"], ["tok", "eids", "wgt"]);
    steps.push({ op: "post", slot, exchange: 0, type: "moe", after });
  }
  for (const slot of slots) {
    steps.push({ op: "wait", slot, exchange: 0 });
    launch(slot, `merge${shape.ffn}`, ["x", ...backs], ["y"]);
    const after = launch(slot, "copy", ["y"], ["tok"]);
    steps.push({ op: "post", slot, exchange: 1, type: "dense", after });
  }
  for (const slot of slots) {
    steps.push({ op: "wait", slot, exchange: 1 });
    launch(slot, `merge${shape.ffn}`, ["y", ...backs], ["z"]);
    launch(slot, "head", ["z", "w_head", "temperature", "seed", "position"], ["next", "logits"]);
  }
  return { rank: { name: `a${a}`, role: "attention", index: a, target: "test" }, buffers: r.buffers, steps, memory: r.memory };
};

const ffnProgram = (f: number, shape: Shape, rows: number): RankProgram => {
  const r = new Regions(rows, shape.attention);
  r.add("w", "weights", "f32", [4], { binds: "experts" });
  for (let m = 0; m < shape.slots; m++) {
    const slot = { slot: m };
    r.add(`tok${m}`, "exchange", "f32", ["T", H], slot);
    r.add(`eids${m}`, "exchange", "i32", ["T", J], slot);
    r.add(`wgt${m}`, "exchange", "f32", ["T", J], slot);
    r.add(`head${m}`, "exchange", "u8", [64], slot);
    r.add(`back${m}`, "exchange", "f32", ["T", H], slot);
  }
  const steps: Step[] = [];
  for (const exchange of [0, 1])
    for (let m = 0; m < shape.slots; m++) {
      for (let a = 0; a < shape.attention; a++) steps.push({ op: "accept", slot: m, exchange, from: a });
      const inputs = exchange === 0 ? [`tok${m}`, `eids${m}`, `wgt${m}`, "w"] : [`tok${m}`, "w"];
      steps.push({
        op: "launch",
        kernel: exchange === 0 ? "experts" : "dense",
        in: inputs,
        out: [`back${m}`],
        rows: `head${m}`,
        slot: m,
      });
      const after = steps.length - 1;
      for (let a = 0; a < shape.attention; a++) steps.push({ op: "reply", slot: m, exchange, to: a, after });
    }
  return { rank: { name: `f${f}`, role: "ffn", index: f, target: "test" }, buffers: r.buffers, steps, memory: r.memory };
};

const keysOf = (shape: Shape): Key[] => {
  const keys: Key[] = [];
  for (let a = 0; a < shape.attention; a++)
    for (let slot = 0; slot < shape.slots; slot++)
      for (let f = 0; f < shape.ffn; f++) {
        const name: Record<string, string> = { tok: "tok", ids: "eids", wgt: "wgt", head: "head" };
        for (const [i, [fieldName, buffer]] of Object.entries(name).entries())
          keys.push({
            key: (a << 16) | (slot << 8) | i,
            direction: "a2f",
            a,
            f,
            slot,
            field: fieldName,
            source: `${buffer}${slot}`,
            target: `${buffer}${slot}`,
          });
        keys.push({
          key: (1 << 24) | (a << 16) | (slot << 8),
          direction: "f2a",
          a,
          f,
          slot,
          field: "back",
          source: `back${slot}`,
          target: `back${slot}.${f}`,
        });
      }
  return keys;
};

const scheduleOf = (name: string, shape: Shape, rows: number, wire: string): Schedule => ({
  abi: 1,
  name,
  wire,
  slots: shape.slots,
  symbols: [{ name: "T", min: 0, max: rows, multiple: 1, source: "host" }],
  exchanges: ["moe", "dense"],
  types: typesOf(rows),
  keys: keysOf(shape),
  programs: [
    ...Array.from({ length: shape.attention }, (_, a) => attentionProgram(a, shape, rows)),
    ...Array.from({ length: shape.ffn }, (_, f) => ffnProgram(f, shape, rows)),
  ],
});

export const lmHead: readonly number[] = Array.from({ length: V * H }, (_, i) => ((i * 7 + (i >> 3) * 5) % 15) - 7);
export const expertsOf = (f: number): readonly number[] => [1 + f, 2, 3 + f, 4 - f];

const floats = (values: readonly number[]): Uint8Array => {
  const bytes = new Uint8Array(Math.ceil((values.length * 4) / 64) * 64);
  new Float32Array(bytes.buffer).set(values);
  return bytes;
};

const kernels = (names: readonly string[]): KernelFacts[] =>
  names.map((name) => ({ name, about: name, scratch: name === "embed" ? 4096 : 0 }));

export const makeBundle = (shape: Shape): Bundle => {
  const wire = createHash("sha256")
    .update(`test ${shape.attention}A${shape.ffn}F ${shape.source ?? ""}`)
    .digest("hex");
  const schedules = [scheduleOf("prefill", shape, shape.prefillRows, wire), scheduleOf("decode", shape, shape.decodeRows, wire)];
  const first = schedules[0] as Schedule;
  const weights = new Map([["weights/attention.safetensors", new Map([["lm_head", floats(lmHead)]])]]);
  for (let f = 0; f < shape.ffn; f++) weights.set(`weights/ffn${f}.safetensors`, new Map([["experts", floats(expertsOf(f))]]));
  if (shape.seeded) weights.clear();
  const manifest: Manifest = {
    format: 1,
    step3c: "test",
    model: {
      name: "small integers",
      vocabulary: V,
      eos: [eos],
      refused: [{ id: 30, why: "image token: this bundle has no vision tower" }],
    },
    source: wire,
    wire,
    precision: { weights: "none", kv: "none" },
    attention: shape.attention,
    ffn: shape.ffn,
    split: "ep",
    microBatches: shape.slots,
    maxBatch: shape.maxBatch,
    maxContext: context,
    symbols: first.symbols,
    programs: [
      {
        role: "attention",
        target: "test",
        device: shape.device ?? "cpp",
        kernels: kernels(["embed", "route", "copy", "merge1", "merge2", "head", "stray"]),
      },
      {
        role: "ffn",
        target: "test",
        device: shape.ffnDevice ?? shape.device ?? "cpp",
        kernels: kernels(["experts", "dense", "stray"]),
      },
    ],
    schedules: schedules.map((s) => s.name),
    kv: { pageTokens, pages: shape.pages, pageBytes },
    weights: first.programs.map((p) => ({
      rank: p.rank.name,
      ...(shape.seeded
        ? { seed: 7 }
        : { file: p.rank.role === "attention" ? "weights/attention.safetensors" : `weights/ffn${p.rank.index}.safetensors` }),
      bytes: p.memory.weights,
    })),
    memory: [],
  };
  return { manifest, schedules, weights };
};

/** One kernel, `x -> y`, no exchange. */
export const makeEvalBundle = (): Bundle => {
  const shape = { ...small, ffn: 0, slots: 1 };
  const bundle = makeBundle(shape);
  const r = new Regions(4, 1);
  r.add("head0", "input", "u8", [64], { slot: 0 });
  r.add("in", "input", "f32", ["T", H], { slot: 0, binds: "layer/x" });
  r.add("out", "output", "f32", ["T", H], { slot: 0, binds: "y" });
  const program: RankProgram = {
    rank: { name: "a0", role: "attention", index: 0, target: "test" },
    buffers: r.buffers,
    steps: [{ op: "launch", kernel: "twice", in: ["in"], out: ["out"], rows: "head0", slot: 0 }],
    memory: r.memory,
  };
  const { eos: _, refused: __, vocabulary: ___, ...model } = bundle.manifest.model;
  const { kv: ____, ...rest } = bundle.manifest;
  const manifest: Manifest = {
    ...rest,
    model,
    schedules: ["main"],
    maxContext: 0,
    programs: [{ role: "attention", target: "test", device: "cpp", kernels: kernels(["twice"]) }],
    weights: [{ rank: "a0", seed: 1, bytes: 0 }],
  };
  const schedule = bundle.schedules[0] as Schedule;
  return {
    manifest,
    schedules: [{ ...schedule, name: "main", exchanges: [], types: [], keys: [], programs: [program] }],
    weights: new Map(),
  };
};

/** A graph of four symbols, one of them the rows; its kernels are of program.cpp. */
export const sizesGraph = `
graph sizes
symbol B 1..4 host
symbol T 0..3 host
symbol S 2..8 multiple 2 host
symbol P 0..6 host
input x f32[B,S]
input past f32[P,B]
input rows f32[T,8]
turned f32[S,B] = transpose(x) {perm: [1, 0]}
all f32[P+S,B] = concat(past, turned) {axis: 0}
told f32[T,8] = neg(rows)
output all
output told
`;

export const makeSizesBundle = (): Bundle => {
  const { manifest } = makeEvalBundle();
  const kernelOf: Readonly<Record<string, string>> = { transpose: "turn", concat: "extend", neg: "tell" };
  const graph = parseGraph(sizesGraph);
  const main = schedule(graph, {
    name: "main",
    index: 0,
    attention: { ranks: 1, target: "test" },
    ffn: { ranks: 0, target: "test" },
    microBatches: 1,
    maxRows: 3,
    kernelOf: (op) => kernelOf[op.kind] ?? op.kind,
    weightBytes: () => 0,
  });
  const programs = [{ role: "attention", target: "test", device: "cpp", kernels: kernels(Object.values(kernelOf)) }] as const;
  return { manifest: { ...manifest, programs }, schedules: [{ ...main, wire: manifest.wire }], weights: new Map() };
};

export const safetensors = (tensors: ReadonlyMap<string, Uint8Array>): Uint8Array => {
  const header: Record<string, unknown> = {};
  let at = 0;
  for (const [name, bytes] of tensors) {
    header[name] = { dtype: "U8", shape: [bytes.length], data_offsets: [at, at + bytes.length] };
    at += bytes.length;
  }
  const text = new TextEncoder().encode(JSON.stringify(header));
  const out = new Uint8Array(8 + text.length + at);
  new DataView(out.buffer).setBigUint64(0, BigInt(text.length), true);
  out.set(text, 8);
  at = 8 + text.length;
  for (const bytes of tensors.values()) {
    out.set(bytes, at);
    at += bytes.length;
  }
  return out;
};

export const writeBundle = (directory: string, bundle: Bundle): string => {
  rmSync(directory, { recursive: true, force: true });
  const put = (path: string, content: string | Uint8Array): void => {
    mkdirSync(dirname(join(directory, path)), { recursive: true });
    writeFileSync(join(directory, path), content);
  };
  put("manifest.json", JSON.stringify(bundle.manifest));
  for (const s of bundle.schedules) put(`schedule-${s.name}.json`, JSON.stringify(s));
  for (const [path, tensors] of bundle.weights) put(path, safetensors(tensors));
  put("COMPLETE", "test\n");
  return directory;
};

/** What the programs compute, one token after another: logits after `ids`. */
export const logitsAfter = (ids: readonly number[], ffn: number): number[] => {
  let sum = 0;
  for (const [p, id] of ids.entries()) sum = (sum + (p + 1) * (id + 1)) % 997;
  const x = Array.from({ length: H }, (_, i) => (sum * (i + 3)) % 101);
  const first = (x[1] as number) % 4;
  const ranks = Array.from({ length: ffn }, (_, f) => expertsOf(f));
  const routed = ranks.reduce((s, w) => s + 0.5 * (w[first] as number) + 0.25 * (w[(first + 1) % 4] as number), 0);
  const always = ranks.reduce((s, w) => s + (w[3] as number), 0);
  const y = x.map((v) => (v + routed * v) % 1009);
  const z = y.map((v) => (v + always * v) % 1009);
  return Array.from({ length: V }, (_, v) => z.reduce((s, value, i) => s + value * (lmHead[v * H + i] as number), 0) % 127);
};

export const generated = (prompt: readonly number[], max: number, ffn: number): { tokens: number[]; stop: "eos" | "length" } => {
  const tokens: number[] = [];
  for (;;) {
    const logits = logitsAfter([...prompt, ...tokens], ffn);
    const token = logits.indexOf(Math.max(...logits));
    tokens.push(token);
    if (token === eos) return { tokens, stop: "eos" };
    if (tokens.length >= max || prompt.length + tokens.length >= context) return { tokens, stop: "length" };
  }
};
