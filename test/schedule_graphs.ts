/** Graphs for the tests of schedules: Step-3's shape after partition, shard and fusion, as plain data. */
import { certify } from "../compiler/certify.ts";
import { schedule } from "../compiler/schedule.ts";
import { withWire } from "../compiler/wire.ts";
import type { Attrs } from "../ir/attr.ts";
import type { Certificate } from "../ir/check.ts";
import type { Dim } from "../ir/dim.ts";
import type { Graph, Op, Place, Value, Weight } from "../ir/graph.ts";
import type { Schedule } from "../ir/schedule.ts";
import { type DType, type TensorType, tensor } from "../ir/type.ts";

export interface Shape {
  readonly layers: number;
  isMoe(layer: number): boolean;
  readonly ffn: number;
  readonly hidden: number;
  readonly inner: number;
  readonly experts: number;
  readonly topK: number;
  readonly vocabulary: number;
}

/** Step-3 itself: 61 layers, the first four and the last dense. */
export const step3Shape = (ffn: number): Shape => ({
  layers: 61,
  isMoe: (i) => i >= 4 && i < 60,
  ffn,
  hidden: 7168,
  inner: 5120,
  experts: 48,
  topK: 3,
  vocabulary: 128815,
});

/** A few small layers, every other one with experts. */
export const smallShape = (layers: number, ffn: number): Shape => ({
  layers,
  isMoe: (i) => i % 2 === 1,
  ffn,
  hidden: 256,
  inner: 128,
  experts: 8,
  topK: 2,
  vocabulary: 100,
});

/** The graph that `schedule` takes: placed, sharded, about as many launches as after fusion. */
export const layeredGraph = (shape: Shape): Graph => {
  const { hidden, inner, experts, topK, ffn } = shape;
  const ops: Op[] = [];
  const weights: Weight[] = [];
  const states: Value[] = [];
  const type = (dtype: DType, ...dims: readonly Dim[]): TensorType => tensor(dtype, dims);
  const weight = (name: string, dtype: DType, ...dims: readonly number[]): Value => {
    const value = { name, type: tensor(dtype, dims) };
    weights.push({ value, source: { kind: "tensor", tensor: name } });
    return value;
  };
  const emit = (
    kind: string,
    inputs: readonly Value[],
    results: Readonly<Record<string, Value["type"]>>,
    place: Place = "attention",
    attrs: Attrs = {},
  ): Value[] => {
    const outputs = Object.entries(results).map(([name, t]): Value => ({ name, type: t }));
    ops.push({ kind, inputs, attrs, outputs, place });
    return outputs;
  };
  const one = (...args: Parameters<typeof emit>): Value => emit(...args)[0] as Value;
  const bf16 = (columns: number): TensorType => type("bf16", "T", columns);
  const f32 = (columns: number): TensorType => type("f32", "T", columns);

  const inputs = {
    ids: { name: "ids", type: type("i32", "T") },
    position: { name: "position", type: type("i32", "T") },
    pages: { name: "pages", type: type("i32", "T", 8) },
    temperature: { name: "temperature", type: type("f32", "T") },
    top_p: { name: "top_p", type: type("f32", "T") },
    seed: { name: "seed", type: type("u32", "T") },
  };
  let x = one("gather", [weight("embed", "bf16", shape.vocabulary, hidden), inputs.ids], { x: bf16(hidden) });
  for (let i = 0; i < shape.layers; i++) {
    const n = (name: string): string => `l${i}_${name}`;
    const h = one("rms_norm", [x, weight(n("ln"), "bf16", hidden)], { [n("h")]: bf16(hidden) });
    const qd = one("linear", [h, weight(n("q"), "bf16", 64, hidden)], { [n("qd")]: bf16(64) });
    const q = one("linear", [qd, weight(n("wq"), "bf16", 256, 64)], { [n("qq")]: bf16(256) });
    const k = one("linear", [h, weight(n("k"), "bf16", 64, hidden)], { [n("kk")]: bf16(64) });
    const v = one("linear", [h, weight(n("v"), "bf16", 64, hidden)], { [n("vv")]: bf16(64) });
    const qr = one("rotary", [q, inputs.position], { [n("qr")]: bf16(256) });
    const kr = one("rotary", [k, inputs.position], { [n("kr")]: bf16(64) });
    const kv: Value = { name: `kv${i}`, type: { kind: "kv", dtype: "bf16", heads: 1, dim: 64 } };
    states.push(kv);
    const filled = one("kv_append", [kv, kr, v, inputs.pages, inputs.position], { [n("kvs")]: kv.type });
    const o = one("attention", [qr, filled, inputs.pages, inputs.position], { [n("o")]: bf16(256) });
    const x1 = one("fused", [o, weight(n("wo"), "bf16", hidden, 256), x], { [n("x1")]: bf16(hidden) });
    const h2 = one("rms_norm", [x1, weight(n("ln2"), "bf16", hidden)], { [n("h2")]: bf16(hidden) });
    const sent = [...emit("quantise", [h2], { [n("tok")]: type("e4m3", "T", hidden), [n("scl")]: f32(hidden / 128) })];
    if (shape.isMoe(i)) {
      const p = one("fused", [h2, weight(n("gate"), "bf16", experts, hidden)], { [n("p")]: f32(experts) });
      const [wgt, ids] = emit("topk", [p], { [n("wgt")]: f32(topK), [n("ids")]: type("i32", "T", topK) }, "attention", {
        k: topK,
      });
      sent.push(ids as Value, wgt as Value);
    }
    if (ffn === 0) {
      x = one("fused", [x1, h2, ...sent, weight(n("mlp"), "bf16", hidden, hidden)], { [n("x2")]: bf16(hidden) });
      continue;
    }
    const arrived = Array.from({ length: ffn }, (_, f) => sent.map((s): Value => ({ name: `${s.name}_f${f}`, type: s.type })));
    ops.push({ kind: "dispatch", inputs: sent, attrs: { exchange: i, ranks: ffn }, outputs: arrived.flat(), place: "attention" });
    const partials = arrived.map(([tok, scl, ids, wgt], f): Value => {
      const m = (name: string): string => `l${i}_f${f}_${name}`;
      const mlp = (part: string, columns: number): Value => {
        const w = (name: string, rows: number, cols: number): Value => weight(m(`w${part}${name}`), "e4m3", rows, cols);
        const place: Place = `ffn${f}`;
        const g = one("scaled_linear", [tok, scl, w("g", columns, hidden)] as Value[], { [m(`${part}gg`)]: f32(columns) }, place);
        const a = emit(
          "fused",
          [tok, scl, w("u", columns, hidden), g] as Value[],
          { [m(`${part}a`)]: type("e4m3", "T", columns), [m(`${part}as`)]: f32(columns / 64) },
          place,
        );
        return one(
          "scaled_linear",
          [...a, w("d", hidden, columns)],
          { [m(`${part}y`)]: part === "" ? bf16(hidden) : f32(hidden) },
          place,
        );
      };
      if (!ids || !wgt) return mlp("", inner);
      const place: Place = `ffn${f}`;
      const own = experts / ffn;
      const attrs = { first: Math.floor(f * own), exact: true };
      const count = Math.floor((f + 1) * own) - Math.floor(f * own);
      const pairs = (dtype: DType, columns: number): TensorType => type(dtype, `${topK}*T`, columns);
      const w = (name: string, rows: number, cols: number): Value => weight(m(`we${name}`), "e4m3", count, rows, cols);
      const g = one(
        "scaled_grouped_linear",
        [tok, scl, w("g", inner, hidden), ids] as Value[],
        { [m("eg")]: pairs("f32", inner) },
        place,
        attrs,
      );
      const u = one(
        "scaled_grouped_linear",
        [tok, scl, w("u", inner, hidden), ids] as Value[],
        { [m("eu")]: pairs("f32", inner) },
        place,
        attrs,
      );
      const a = emit("fused", [g, u], { [m("ea")]: pairs("e4m3", inner), [m("eas")]: pairs("f32", inner / 64) }, place);
      const d = one(
        "scaled_grouped_linear",
        [...a, w("d", hidden, inner), ids],
        { [m("ed")]: pairs("f32", hidden) },
        place,
        attrs,
      );
      const shared = mlp("s", inner);
      return one("fused", [d, ids, wgt, shared], { [m("y")]: bf16(hidden) }, place);
    });
    const back = partials.map((p): Value => ({ name: `${p.name}_back`, type: p.type }));
    ops.push({ kind: "collect", inputs: partials, attrs: { exchange: i }, outputs: back, place: "attention" });
    x = one("fused", [x1, ...back], { [n("x2")]: bf16(hidden) });
  }
  const h = one("rms_norm", [x, weight("norm", "bf16", hidden)], { h: bf16(hidden) });
  const logits = one("linear", [h, weight("lm_head", "bf16", shape.vocabulary, hidden)], { logits: f32(shape.vocabulary) });
  const { temperature, top_p, seed, position } = inputs;
  const next = one("sample", [logits, temperature, top_p, seed, position], { next: type("i32", "T") });
  return {
    name: "layered",
    symbols: [{ name: "T", min: 0, max: 4096, multiple: 1, source: "host" }],
    inputs: Object.values(inputs),
    states,
    weights,
    ops,
    outputs: [next, logits],
  };
};

/** As few bytes as the shape allows, for machines that look at each. */
export const tinyShape = (layers: number, ffn: number): Shape => ({
  layers,
  isMoe: (i) => i % 2 === 1,
  ffn,
  hidden: 128,
  inner: 64,
  experts: 4,
  topK: 1,
  vocabulary: 4,
});

export interface Ranks {
  readonly attention: number;
  readonly microBatches: number;
  readonly maxRows?: number;
  readonly name?: string;
  /** packed bytes of every weight; otherwise its elements and one more */
  readonly weightBytes?: number;
}

/** Schedules a graph for its FFN ranks, with made-up kernel names and weight sizes. */
export const scheduleOf = (
  graph: Graph,
  { attention, microBatches, maxRows = 8, name = "decode", weightBytes }: Ranks,
): Schedule => {
  const ffn = graph.ops.reduce((n, op) => Math.max(n, op.place?.startsWith("ffn") ? Number(op.place.slice(3)) + 1 : 0), 0);
  const bytes = new Map(
    graph.weights.map(({ value }) => [value.name, value.type.shape.reduce((n: number, d) => n * Number(d), 1) + 1]),
  );
  const made = schedule(graph, {
    name,
    index: name === "prefill" ? 0 : 1,
    attention: { ranks: attention, target: "cpp" },
    ffn: { ranks: ffn, target: "cpp" },
    microBatches,
    maxRows,
    kernelOf: (op) => `k_${op.kind}`,
    weightBytes: (weight) => weightBytes ?? (bytes.get(weight) as number),
    kv: { pages: 4, pageBytes: weightBytes ?? 4096 },
  });
  const facts = { source: "0".repeat(64), precision: { weights: "fp8", kv: "bf16" }, attention, ffn, split: "ep" } as const;
  return withWire(facts, [made])[0] as Schedule;
};

export interface Certified {
  readonly schedule: Schedule;
  readonly certificate: Certificate;
}

export const certified = (graph: Graph, ranks: Ranks): Certified => {
  const made = scheduleOf(graph, ranks);
  return { schedule: made, certificate: certify(made) };
};
