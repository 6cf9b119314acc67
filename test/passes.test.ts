import { existsSync, mkdtempSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { type Pass, resumePoint, runPasses } from "../compiler/pass.ts";
import { contraction } from "../compiler/passes/contraction.ts";
import { dead } from "../compiler/passes/dead.ts";
import { fold } from "../compiler/passes/fold.ts";
import { fuse, fusedForm } from "../compiler/passes/fuse.ts";
import { type PassesOptions, passes } from "../compiler/passes/index.ts";
import { bytesPerToken, decide, explainPartition, partition } from "../compiler/passes/partition.ts";
import { type Precision, quantise } from "../compiler/passes/quantise.ts";
import { recognise } from "../compiler/passes/recognise.ts";
import { parseSplit, shard, share } from "../compiler/passes/shard.ts";
import {
  Builder,
  type Graph,
  knowledge,
  type Op,
  parseGraph,
  printGraph,
  type Tensor,
  type TensorType,
  tensor,
  UserError,
  type Value,
  verify,
} from "../ir/index.ts";
import { disguised, drawnInputs, drawnWeights, relativeError, run, step3Model } from "./pass_cases.ts";
import { randomCase } from "./random_graph.ts";

const model = step3Model();
const inputs = drawnInputs(model.graph, 5, 11);
const through = (
  options: Partial<PassesOptions> & { readonly skip?: readonly string[]; readonly limit?: number; readonly stopAfter?: string },
  graph = model.graph,
): Graph => {
  const { skip, limit, stopAfter, ...rest } = options;
  return runPasses(graph, passes({ precision: "bf16", kv: "bf16", ffn: 1, split: "ep", ...rest }), { skip, limit, stopAfter });
};
const logits = (g: Graph, from = model): ReturnType<typeof run> extends Map<string, infer T> ? T : never => {
  const found = run(g, from.weights, inputs).get("logits");
  if (found === undefined) throw new Error("no logits");
  return found;
};
const policies: readonly (readonly [Precision, Precision])[] = [
  ["bf16", "bf16"],
  ["fp8", "fp8"],
  ["int8", "int8"],
  ["fp8", "bf16"],
];

const dtypeOf = (v: Value | undefined): unknown => (v?.type.kind === "tensor" ? v.type.dtype : undefined);
const folder = (): string => mkdtempSync(join(tmpdir(), "step3c-dump-"));
/** A pass that makes `name` out of every graph it sees, by breaking its last op. */
const breaking: Pass = {
  name: "breaking",
  run: (g) => ({ ...g, ops: g.ops.map((op, i) => (i === g.ops.length - 1 ? { ...op, inputs: op.inputs.slice(1) } : op)) }),
};
const two = (): Graph => {
  const b = new Builder("two", [{ name: "T", min: 0, max: 4, multiple: 1, source: "host" }]);
  const x = b.input("x", tensor("f32", ["T", 8]));
  const one = b.op("const", [], { value: 1, dtype: "f32" });
  b.at("layers.7.scale");
  b.output(b.op("neg", [b.op("mul", [b.op("mul", [x, one]), one])]), "y");
  return b.build();
};

describe("the loop", () => {
  test("verifies after every pass and names pass, op and origin", () => {
    expect(() => runPasses(two(), [fold, breaking])).toThrow(/pass 'breaking' broke the graph: .*'neg'.*layers\.7\.scale/);
    expect(() => runPasses(two(), [fold, breaking], { skip: ["breaking"] })).not.toThrow();
  });

  test("wants the passes in order, each once, and names that exist", () => {
    expect(() => runPasses(two(), [partition({ ffnRanks: 1 }), fold])).toThrow("'partition' must come after 'fold'");
    expect(() => runPasses(two(), [fold, fold])).toThrow("'fold' is in the list twice");
    for (const options of [{ stopAfter: "folds" }, { skip: ["folds"] }, { printAfter: "folds" }])
      expect(() => runPasses(two(), [fold, dead], options)).toThrow(/folds: no such pass; the passes are fold, dead/);
  });

  test("prints, stops, times and explains", () => {
    const printed: string[] = [];
    const print = (text: string): void => void printed.push(text);
    runPasses(two(), [fold, dead], { printAfter: "all", print });
    expect(printed.map((t) => t.split("\n")[0])).toEqual(["; after fold", "; after dead"]);
    expect(runPasses(two(), [fold, dead, breaking], { stopAfter: "dead" }).ops).toHaveLength(1);
    printed.length = 0;
    runPasses(two(), [fold, dead], { time: true, print });
    expect(printed.join("")).toMatch(/fold .* ms +2 applications\ndead .*\ntotal /);
    printed.length = 0;
    runPasses(model.graph, passes({ precision: "bf16", kv: "bf16", ffn: 1, split: "ep" }), {
      explain: "partition",
      stopAfter: "partition",
      print,
    });
    expect(printed.join("")).toContain("2 branches to the FFN side");
  });

  test("the limit bounds rule applications, and every limit leaves a graph that computes the same", () => {
    expect(runPasses(two(), [fold], { limit: 1 }).ops.filter((op) => op.kind === "mul")).toHaveLength(1);
    const reference = logits(model.graph);
    for (const limit of [0, 1, 2, 4, 9, 20, 40])
      expect(logits(through({ limit })).data, `limit ${limit}`).toEqual(reference.data);
  });

  test("a graph dumped after any pass, taken up again, ends the same", () => {
    const options = { precision: "fp8", kv: "int8", ffn: 2, split: "ep" } as const;
    const [first, again] = [folder(), folder()];
    const whole = printGraph(runPasses(model.graph, passes(options), { dumpTo: first }));
    const files = readdirSync(first).sort();
    expect(files).toEqual([
      "00-source.step3",
      "01-fold.step3",
      "02-recognise.step3",
      "03-tokens.step3",
      "04-quantise.step3",
      "05-partition.step3",
      "06-shard.step3",
      "07-fuse.step3",
      "08-dead.step3",
      "09-join.step3",
    ]);
    for (const file of files) {
      const text = readFileSync(join(first, file), "utf8");
      const graph = runPasses(parseGraph(text), passes(options), { from: resumePoint(text, file), dumpTo: again });
      expect(printGraph(graph)).toBe(whole);
      for (const later of files.slice(files.indexOf(file) + 1))
        expect(readFileSync(join(again, later), "utf8")).toBe(readFileSync(join(first, later), "utf8"));
    }
    expect(() => resumePoint("graph g\n", "g.step3")).toThrow("g.step3: does not say after which pass it was dumped");
  });
});

describe("fold and dead", () => {
  test("keep every bit of random graphs", () => {
    for (let seed = 0; seed < 30; seed++) {
      const c = randomCase(seed);
      const graph = runPasses(c.graph, [fold, dead]);
      const weights = drawnWeights(c.graph, seed);
      const reference = run(c.graph, weights, c.inputs);
      for (const [name, y] of run(graph, weights, c.inputs))
        expect(y.data, `seed ${seed}, ${name}`).toEqual(reference.get(name)?.data);
    }
  });

  test("leave alone what would change the sign of a zero, a NaN or a rounding", () => {
    const kept = (
      make: (b: Builder, x: ReturnType<Builder["input"]>) => ReturnType<Builder["input"]>,
      dtype: "f32" | "bf16" = "f32",
    ): number => {
      const b = new Builder("g", [{ name: "T", min: 0, max: 4, multiple: 1, source: "host" }]);
      b.output(make(b, b.input("x", tensor(dtype, ["T", 4]))), "y");
      return runPasses(b.build(), [fold]).ops.filter((op) => op.kind !== "const").length;
    };
    const number = (b: Builder, value: number, dtype = "f32"): ReturnType<Builder["input"]> =>
      b.op("const", [], { value, dtype });
    expect(kept((b, x) => b.op("neg", [b.op("add", [x, number(b, 0)])]))).toBe(2);
    expect(kept((b, x) => b.op("neg", [b.op("add", [x, number(b, -0)])]))).toBe(1);
    expect(kept((b, x) => b.op("neg", [b.op("sub", [x, number(b, 0)])]))).toBe(1);
    expect(kept((b, x) => b.op("neg", [b.op("mul", [x, number(b, 0)])]))).toBe(2);
    expect(kept((b, x) => b.op("neg", [b.op("cast", [b.op("cast", [x], { to: "bf16" })], { to: "f32" })]))).toBe(3);
    expect(kept((b, x) => b.op("neg", [b.op("cast", [b.op("cast", [x], { to: "f32" })], { to: "bf16" })]), "bf16")).toBe(1);
    expect(kept((b, x) => b.op("mul", [b.op("exp", [number(b, 1)]), x]))).toBe(2);
  });
});

describe("quantise", () => {
  test("quantises each input once, leaves the router and the head, and passes a checkpoint's codes through", () => {
    const stored = step3Model({ dtype: "FP8" });
    const g = runPasses(stored.graph, [fold, quantise({ weights: "fp8", kv: "fp8" })]);
    const kinds = (kind: string): readonly Op[] => g.ops.filter((op) => op.kind === kind);
    expect(kinds("linear").map((op) => op.origin)).toEqual(["layers.1.moe.gate", "lm_head"]);
    expect(kinds("grouped_linear")).toHaveLength(0);
    const taken = kinds("quantise").map((op) => `${op.inputs[0]?.name} ${op.attrs.group}`);
    expect(new Set(taken).size).toBe(taken.length);
    for (const w of g.weights.filter((w) => /_(codes|scales)$/.test(w.value.name))) expect(w.source.kind).toBe("tensor");
    expect(g.weights.some((w) => w.source.kind === "dequantised")).toBe(false);
    const other = runPasses(step3Model({ dtype: "FP8", block: [64, 64] }).graph, [
      fold,
      quantise({ weights: "fp8", kv: "bf16" }),
    ]);
    const source = other.weights.find((w) => w.value.name === "l0_wq_codes")?.source;
    expect(source?.kind === "codes" && source.of.kind).toBe("dequantised");
  });

  test.each(policies)("weights %s, kv %s: close to bf16, and the states change type", (weights, kv) => {
    const g = runPasses(model.graph, [fold, quantise({ weights, kv })]);
    expect(new Set(g.states.map((s) => s.type.kind === "kv" && s.type.dtype))).toEqual(
      new Set([{ bf16: "bf16", fp8: "e4m3", int8: "i8" }[kv]]),
    );
    const error = relativeError(logits(g), logits(model.graph));
    expect(error).toBeLessThan(weights === "bf16" ? 1e-9 : 0.12);
    if (weights !== "bf16") expect(error).toBeGreaterThan(1e-4);
  });
});

/** What does not depend on names or order: for each exchange, what the FFN side does and what crosses. */
const cuts = (g: Graph): readonly string[] =>
  decide(runPasses(g, [dead])).exchanges.map((e) => {
    const types = e.push.map((v) => `${(v.type as TensorType).dtype}[${(v.type as TensorType).shape.join(",")}]`);
    return `${e.ffn
      .map((op) => op.kind)
      .sort()
      .join(" ")} | ${types.join(" ")} | ${(e.pull.type as TensorType).dtype}`;
  });

describe("partition", () => {
  test.each(policies)(
    "weights %s, kv %s: finds the same cut whatever values are called and in whatever order ops come",
    (weights, kv) => {
      const g = runPasses(model.graph, [fold, quantise({ weights, kv })]);
      const expected = cuts(g);
      expect(expected).toHaveLength(2);
      const codes = { bf16: "bf16[T,136]", fp8: "e4m3[T,136] f32[T,2]", int8: "i8[T,136] f32[T,1]" }[weights];
      expect(expected[0]?.split(" | ").slice(1)).toEqual([codes, "bf16"]);
      expect(expected[1]?.split(" | ").slice(1)).toEqual([`${codes} i32[T,3] f32[T,3]`, "bf16"]);
      for (let seed = 1; seed <= 4; seed++) {
        const hidden = disguised(g, seed);
        verify(hidden);
        expect(cuts(hidden)).toEqual(expected);
        const placed = runPasses(hidden, [partition({ ffnRanks: 1 })]);
        expect(logits(placed).data).toEqual(logits(g).data);
      }
    },
  );

  test("keeps attention, routing, quantisation of what is sent, and the residual on the attention side", () => {
    const g = through({ precision: "fp8", kv: "fp8", stopAfter: "partition" });
    const sideOf = (origin: RegExp, kind: string): unknown =>
      [...new Set(g.ops.filter((op) => origin.test(op.origin ?? "") && op.kind === kind).map((op) => op.place))].join();
    for (const kind of ["gather", "attention", "kv_append", "topk", "softmax", "rms_norm", "sample", "linear"])
      expect(sideOf(/./, kind)).toBe("attention");
    expect(sideOf(/residual/, "add")).toBe("attention");
    expect(sideOf(/moe$/, "combine")).toBe("ffn");
    expect(sideOf(/moe\.gate_proj/, "scaled_grouped_linear")).toBe("ffn");
    expect(sideOf(/moe\.gate_proj/, "quantise")).toBe("attention");
    expect(sideOf(/moe\.down_proj/, "quantise")).toBe("ffn");
  });

  test("normalised expert weights are normalised before they are sent", () => {
    const normalised = step3Model({ normalise: true });
    const g = runPasses(normalised.graph, [fold, partition({ ffnRanks: 1 })]);
    for (const op of g.ops.filter((op) => op.kind === "div" || op.kind === "reduce")) expect(op.place).toBe("attention");
    expect(run(g, normalised.weights, inputs).get("logits")?.data).toEqual(
      run(normalised.graph, normalised.weights, inputs).get("logits")?.data,
    );
  });

  test("says so when there is nothing to separate", () => {
    expect(decide(two()).summary).toMatch(/no tokens meet each other/);
    const b = new Builder("attention_only", [{ name: "T", min: 0, max: 4, multiple: 1, source: "host" }]);
    const x = b.input("x", tensor("f32", ["T", 8]));
    const [pages, position] = [b.input("pages", tensor("i32", ["T", 2])), b.input("position", tensor("i32", ["T"]))];
    const kv = b.op("kv_append", [b.state("kv0", { kind: "kv", dtype: "f32", heads: 1, dim: 8 }), x, x, pages, position]);
    b.output(b.op("add", [x, b.op("attention", [x, kv, pages, position], { heads: 1, scale: 1 })]), "y");
    const g = b.build();
    expect(explainPartition(g)).toMatch(/everything runs on the attention side: no branch/);
    expect(runPasses(g, [partition({ ffnRanks: 2 })]).ops.every((op) => op.place === "attention")).toBe(true);
    expect(through({ ffn: 0 }).ops.every((op) => op.place === "attention")).toBe(true);
  });

  test("explains each op, each crossing and the totals", () => {
    const g = runPasses(model.graph, [fold, quantise({ weights: "fp8", kv: "fp8" })]);
    const text = explainPartition(g);
    for (const op of g.ops) expect(text).toContain(op.outputs[0]?.name);
    expect(text).toMatch(/exchange 1: branch of l1_x1, merged into l1_r2/);
    expect(text).toMatch(/-> l1_h2_codes +e4m3\[T,136\] +136 B\/token/);
    expect(text).toMatch(/total 168 B\/token to each FFN rank, 272 B\/token back/);
    expect(text).toMatch(/l1_ids .*chooses the weights|topk +l1_top +chooses the weights/);
    expect(bytesPerToken(tensor("bf16", ["3*T", 10]))).toBe(60);
    expect(bytesPerToken(tensor("bf16", [3, 10]))).toBeUndefined();
  });
});

describe("shard", () => {
  const ranksOf = (g: Graph): number => new Set(g.ops.flatMap((op) => (op.place?.startsWith("ffn") ? [op.place] : []))).size;

  test("deals contiguous ranges, uneven by at most one, and reads splits", () => {
    for (const [n, parts] of [
      [7, 3],
      [48, 8],
      [3, 3],
      [2, 5],
    ] as const) {
      const ranges = Array.from({ length: parts }, (_, i) => share(n, parts, i));
      expect(ranges[0]?.[0]).toBe(0);
      expect(ranges.at(-1)?.[1]).toBe(n);
      for (const [i, [from]] of ranges.slice(1).entries()) expect(from).toBe(ranges[i]?.[1]);
      const sizes = ranges.map(([from, to]) => to - from);
      expect(Math.max(...sizes) - Math.min(...sizes)).toBeLessThanOrEqual(1);
    }
    expect(parseSplit("ep2tp4", 8)).toEqual({ groups: 2, ranksPerGroup: 4 });
    expect(() => parseSplit("ep2tp2", 3)).toThrow("2 groups of 2 are 4 ranks, but there are 3");
    expect(() => parseSplit("pp", 3)).toThrow("write ep, tp or epXtpY");
  });

  /** one layer: dense, and with experts */
  const layers = [
    { layers: 1, moeLayers: [] },
    { layers: 1, moeLayers: [0] },
  ].map((sizes) => step3Model({ sizes }));
  /** what the attention side gets back of the only exchange, added up */
  const branch = (g: Graph, weights: Parameters<typeof run>[1]): Tensor => {
    let sum: Tensor | undefined;
    run(g, weights, inputs, (op, results) => {
      if (op.kind !== "collect") return;
      const partials = results as readonly Tensor[];
      const data = (partials[0] as Tensor).data.map((_, i) => partials.reduce((s, p) => s + (p.data[i] as number), 0));
      sum = { ...(partials[0] as Tensor), data };
    });
    return sum as Tensor;
  };

  const cases = (["bf16", "fp8", "int8"] as const).flatMap((precision) =>
    (
      [
        [1, "ep"],
        [2, "ep"],
        [2, "tp"],
        [1, "tp"],
      ] as const
    ).map(([ffn, split]) => [precision, ffn, split] as const),
  );
  test.each(cases)("%s over %i ranks, %s: near the whole", (precision, ffn, split) => {
    const g = through({ precision, kv: "bf16", ffn, split, stopAfter: "shard" });
    expect(ranksOf(g)).toBe(ffn);
    for (const op of g.ops) if (op.place?.startsWith("ffn")) expect(knowledge(op.kind).rowwise).toBe("row");
    for (const one of layers) {
      const [whole, sharded] = [1, ffn].map((ranks) =>
        through({ precision, kv: "bf16", ffn: ranks, split, stopAfter: "shard" }, one.graph),
      ) as [Graph, Graph];
      const error = relativeError(branch(sharded, one.weights), branch(whole, one.weights));
      // partials in bf16; int8 also scales the rows of each rank by themselves
      expect(error).toBeLessThan(ffn === 1 ? 1e-12 : precision === "int8" ? 0.02 : 0.005);
    }
  });

  test("four ranks: ep2tp2, and more expert groups than experts", () => {
    const wide = step3Model({ sizes: { intermediate: 512, shared: 512, experts: 3, layers: 2, moeIntermediate: 136 } });
    const whole = runPasses(wide.graph, passes({ precision: "bf16", kv: "bf16", ffn: 1, split: "ep" }), {
      stopAfter: "partition",
    });
    const reference = run(whole, wide.weights, inputs).get("logits");
    for (const split of ["ep", "ep2tp2"]) {
      const g = runPasses(wide.graph, passes({ precision: "fp8", kv: "bf16", ffn: 4, split }), { stopAfter: "shard" });
      expect(ranksOf(g)).toBe(4);
      // ranks choose among experts numbered from their own first one, so that their kernels are the same
      const counts = g.ops.filter((op) => op.kind === "combine").map((op) => op.attrs.count);
      expect(counts).toEqual(split === "ep" ? [1, 1, 1] : [2, 2, 1, 1]);
      const firsts = g.weights.flatMap((w) => (w.source.kind === "literal" ? w.source.values : []));
      expect(firsts).toEqual(split === "ep" ? [1, 2] : [2, 2]);
      const got = run(g, wide.weights, inputs).get("logits");
      expect(relativeError(got as NonNullable<typeof got>, reference as NonNullable<typeof reference>)).toBeLessThan(0.12);
      expect(fuseAgrees(g, wide)).toBe(true);
    }
  });

  test("a rank without experts and without a shared part answers zeros", () => {
    const g = expertsOnly(2);
    const weights = drawnWeights(g, 5);
    const input = drawnInputs(g, 3, 6);
    const whole = run(runPasses(g, [partition({ ffnRanks: 1 })]), weights, input).get("y");
    const sharded = runPasses(g, [partition({ ffnRanks: 3 }), shard({ ranks: 3, split: "ep" })]);
    expect(sharded.ops.filter((op) => op.place === "ffn2").map((op) => op.kind)).toEqual([
      "reduce",
      "cast",
      "const",
      "const",
      "where",
      "spread",
    ]);
    const got = run(sharded, weights, input).get("y");
    expect(relativeError(got as NonNullable<typeof got>, whole as NonNullable<typeof whole>)).toBeLessThan(0.01);
  });

  test("rounds each partial once, and adds residual and partials in f32 in rank order", () => {
    const g = through({ precision: "fp8", kv: "bf16", ffn: 2, split: "ep", stopAfter: "shard" });
    const producer = new Map(g.ops.flatMap((op) => op.outputs.map((v) => [v.name, op] as const)));
    for (const collect of g.ops.filter((op) => op.kind === "collect")) {
      expect(collect.inputs.map((v) => producer.get(v.name)?.place)).toEqual(["ffn0", "ffn1"]);
      for (const v of collect.inputs) {
        expect(dtypeOf(v)).toBe("bf16");
        const cast = producer.get(v.name) as Op;
        expect([cast.kind, dtypeOf(cast.inputs[0])]).toEqual(["cast", "f32"]);
      }
      const added = g.ops.filter(
        (op) => op.kind === "add" && op.inputs.some((v) => collect.outputs.includes(producer.get(v.name)?.inputs[0] as never)),
      );
      expect(added.map((op) => dtypeOf(op.outputs[0]))).toEqual(["f32", "f32"]);
      expect(added[1]?.inputs[0]).toBe(added[0]?.outputs[0]);
    }
  });

  test("too few blocks for the ranks: says which tensor, how many, and what to do", () => {
    expect(() => through({ ffn: 4, split: "ep" })).toThrow(
      "model.layers.0.mlp.gate_proj.weight: 300 columns are 3 blocks of 128, fewer than the 4 FFN ranks that share them; use at most 3 FFN ranks",
    );
    const narrow = step3Model({ sizes: { intermediate: 512, shared: 512 } });
    expect(() => through({ ffn: 4, split: "tp", precision: "int8" }, narrow.graph)).toThrow(
      /moe\.gate_proj\.weight: 136 columns are 2 blocks .* use --ffn-split ep/,
    );
    expect(() => through({ ffn: 4, split: "tp" }, narrow.graph)).toThrow(UserError);
  });

  test("every element of a weight is on some rank, and no rank has those of another's experts", () => {
    const g = through({ ffn: 2, split: "ep", stopAfter: "shard" });
    const rows = (name: string): unknown =>
      g.weights.filter((w) => w.value.name.startsWith(name)).map((w) => ("slice" in w.source ? w.source.slice : undefined));
    expect(rows("l1_moe_gate_proj")).toEqual([
      [
        [0, 2],
        [0, 136],
        [0, 136],
      ],
      [
        [2, 4],
        [0, 136],
        [0, 136],
      ],
    ]);
    expect(rows("l0_mlp_gate_proj")).toEqual([
      [
        [0, 256],
        [0, 136],
      ],
      [
        [256, 300],
        [0, 136],
      ],
    ]);
    expect(rows("l0_mlp_down_proj")).toEqual([
      [
        [0, 136],
        [0, 256],
      ],
      [
        [0, 136],
        [256, 300],
      ],
    ]);
  });
});

/** x + experts(x) beside an attention, without a shared expert. */
const expertsOnly = (experts: number): Graph => {
  const b = new Builder("experts_only", [{ name: "T", min: 0, max: 4, multiple: 1, source: "host" }]);
  const x = b.input("x", tensor("bf16", ["T", 16]));
  const [pages, position] = [b.input("pages", tensor("i32", ["T", 2])), b.input("position", tensor("i32", ["T"]))];
  const w = (name: string, ...shape: number[]): ReturnType<Builder["weight"]> =>
    b.weight(name, tensor("bf16", shape), { kind: "tensor", tensor: name });
  const kv = b.op("kv_append", [b.state("kv0", { kind: "kv", dtype: "bf16", heads: 1, dim: 16 }), x, x, pages, position]);
  const x1 = b.op("add", [x, b.op("attention", [x, kv, pages, position], { heads: 1, scale: 0.25 })]);
  const [top, ids] = b.ops("topk", [b.op("softmax", [b.op("linear", [x1, w("gate", experts, 16)], { to: "f32", keep: true })])], {
    k: 1,
  });
  if (top === undefined || ids === undefined) throw new Error("topk has two results");
  const up = b.op("grouped_linear", [x1, w("up", experts, 24, 16), ids], {});
  const down = b.op("grouped_linear", [b.op("gelu", [up]), w("down", experts, 16, 24), ids], { to: "f32" });
  const y = b.op("cast", [b.op("combine", [down, ids, top])], { to: "bf16" });
  b.output(b.op("add", [x1, y]), "y");
  return b.build();
};

const rowKinds = new Set(["reduce", "spread", "rms_norm", "softmax", "quantise", "const"]);

/** Bitwise the same after fusion, in normal form, and no row op left outside. */
const fuseAgrees = (g: Graph, from: { readonly weights: Parameters<typeof run>[1] }, given = inputs): boolean => {
  const fused = runPasses(g, [fuse, dead]);
  for (const op of fused.ops) {
    if (op.body) fusedForm(op.body);
    else expect(rowKinds.has(op.kind) || knowledge(op.kind).scalar !== undefined, `${op.kind} outside of a kernel`).toBe(false);
  }
  const [a, b] = [run(g, from.weights, given), run(fused, from.weights, given)];
  for (const [name, y] of a) expect(b.get(name)?.data, name).toEqual(y.data);
  return true;
};

/** Ops of a graph with those in bodies, by kind. */
const countKinds = (g: Graph): Map<string, number> => {
  const counts = new Map<string, number>();
  for (const op of g.ops.flatMap((op) => op.body?.ops ?? [op])) counts.set(op.kind, (counts.get(op.kind) ?? 0) + 1);
  return counts;
};

describe("fuse", () => {
  test.each(policies)("weights %s, kv %s: keeps every rounding, in normal form", (precision, kv) => {
    for (const [ffn, split] of [
      [0, "ep"],
      [1, "ep"],
      [2, "tp"],
      [2, "ep"],
    ] as const)
      expect(fuseAgrees(through({ precision, kv, ffn, split, stopAfter: "shard" }), model)).toBe(true);
  });

  test("makes the kernels that matter", () => {
    const g = through({ precision: "fp8", kv: "fp8", ffn: 2, split: "ep" });
    const kernel = (output: string): readonly string[] =>
      g.ops.find((op) => op.outputs.some((v) => v.name === output))?.body?.ops.map((op) => op.kind) ?? [];
    expect(kernel("l0_x1")).toEqual(["scaled_linear", "cast", "add", "cast"]);
    // residual, both partials, norm and quantisation of the next layer's input
    expect(g.ops.find((op) => op.outputs.some((v) => v.name === "l1_h_codes"))?.outputs.map((v) => v.name)).toEqual([
      "l0_x2",
      "l1_h_scales",
      "l1_h_codes",
    ]);
    expect(kernel("l1_h_codes").filter((kind) => kind === "reduce")).toHaveLength(2);
    expect(kernel("l1_a_f0")).toEqual(["scaled_grouped_linear", "silu", "mul", "cast"]);
    expect(kernel("l1_y_f0")).toEqual(["scaled_linear", "add", "cast"]);
  });

  test("does no work twice but constants and casts that lose nothing", () => {
    const before = through({ precision: "fp8", kv: "int8", ffn: 2, split: "tp", stopAfter: "shard" });
    const expanded = countKinds(runPasses(before, [fuse], { limit: 0 }));
    const after = countKinds(runPasses(before, [fuse, dead]));
    for (const [kind, count] of after)
      if (kind !== "const" && kind !== "cast") expect(count, kind).toBeLessThanOrEqual(expanded.get(kind) ?? 0);
  });

  test("is the same every time, and for layers that differ only in weights", () => {
    const options = { precision: "fp8", kv: "fp8", ffn: 2, split: "ep" } as const;
    expect(printGraph(through(options))).toBe(printGraph(through(options)));
    const deep = step3Model({ sizes: { layers: 3 } }).graph;
    const bodies = (prefix: string): readonly string[] =>
      through(options, deep)
        .ops.filter((op) => op.outputs[0]?.name.startsWith(prefix))
        .flatMap((op) => (op.body ? [printGraph({ ...op.body, symbols: [] })] : []));
    expect(bodies("l2_").slice(0, 6)).toEqual(bodies("l1_").slice(0, 6));
  });

  test("never joins across places or exchanges", () => {
    const g = through({ precision: "bf16", kv: "bf16", ffn: 2, split: "tp" });
    let exchange = 0;
    const segment = new Map<string, number>();
    for (const op of through({ precision: "bf16", kv: "bf16", ffn: 2, split: "tp", stopAfter: "shard" }).ops) {
      if (op.kind === "dispatch" || op.kind === "collect") exchange++;
      for (const v of op.outputs) segment.set(v.name, exchange);
    }
    for (const op of g.ops) expect(new Set(op.outputs.map((v) => segment.get(v.name))).size).toBe(1);
  });

  test("keeps every bit of random graphs", () => {
    for (let seed = 0; seed < 60; seed++) {
      const c = randomCase(seed, { ops: 20 });
      const fused = runPasses(c.graph, passes({ precision: "bf16", kv: "bf16", ffn: 1, split: "ep" }));
      for (const op of fused.ops) if (op.body) fusedForm(op.body);
      const weights = drawnWeights(c.graph, seed);
      const reference = run(c.graph, weights, c.inputs);
      for (const [name, y] of run(fused, weights, c.inputs))
        expect(y.data, `seed ${seed}, ${name}`).toEqual(reference.get(name)?.data);
    }
  });

  test("bodies that are in no normal form are found out", () => {
    const body = (text: string): Graph => parseGraph(`graph b\nsymbol T 0..4 host\n${text}`);
    const bad = (text: string, why: RegExp): void => expect(() => fusedForm(body(text))).toThrow(why);
    bad("input x f32[T,8]\ny = neg(x)\nz = exp(x)\noutput y", /leads to no output/);
    bad("input x f32[T,8]\ninput u f32[T,8]\ny = neg(x)\noutput y", /'u' is not used/);
    bad("input x f32[T,8]\ninput u f32[T,3]\ny = neg(x)\nz = neg(u)\noutput y\noutput z", /widths/);
    bad("input x f32[T,8]\ninput u f32[2*T,8]\ny = neg(x)\nz = neg(u)\noutput y\noutput z", /has not rows/);
    bad("input x f32[T,8]\ny = neg(x)\nz = neg(x)\nw = add(y, z)\noutput w", /computed twice/);
    bad("input x f32[T,8]\ny = softmax(x)\noutput y", /softmax in a row kernel/);
    bad("input x f32[T,8]\ninput w f32[8,8]\ny = linear(x, w)\nz = reduce(y) {fn: sum}\noutput z", /reduce in an epilogue/);
    bad("input x f32[T,8]\ninput w f32[8,8]\ny = linear(x, w)\nz = add(y, x)\noutput z", /operand of the contraction and of add/);
    expect(
      fusedForm(
        body(
          "input x f32[T,8]\ninput u f32[8]\nr = reduce(x) {fn: amax, group: 3}\ns = spread(r) {group: 3, size: 8}\ny = mul(s, u)\noutput y\noutput r",
        ),
      ),
    ).toEqual({ kind: "row", rows: ["T"], columns: 8 });
  });
});

test("what passes call a contraction has its operands by name", () => {
  const g = through({ precision: "fp8", kv: "fp8", ffn: 0 });
  for (const op of g.ops.flatMap((op) => op.body?.ops ?? [op])) {
    const c = contraction(op);
    if (c === undefined) continue;
    expect(op.inputs).toContain(c.w);
    expect(knowledge(op.kind).inputs).toHaveLength(op.inputs.length);
  }
});

/** `; run: pass NAME key=value ...` lines of a golden: the passes to run. */
const runLines = (text: string, file: string): readonly Pass[] => {
  const lines = [...text.matchAll(/^; run: pass (\S+)((?: \w+=\w+)*)$/gm)];
  if (lines.length === 0) throw new Error(`${file} has no line '; run: pass NAME'`);
  return lines.map(([, name, options]) => {
    const given = new Map(
      (options ?? "")
        .trim()
        .split(" ")
        .filter(Boolean)
        .map((o) => o.split("=") as [string, string]),
    );
    const number = (key: string): number => Number(given.get(key) ?? Number.NaN);
    const makers: Readonly<Record<string, () => Pass>> = {
      fold: () => fold,
      dead: () => dead,
      recognise: () => recognise,
      fuse: () => fuse,
      quantise: () => quantise({ weights: given.get("weights") as Precision, kv: given.get("kv") as Precision }),
      partition: () => partition({ ffnRanks: number("ranks") }),
      shard: () => shard({ ranks: number("ranks"), split: given.get("split") ?? "" }),
    };
    const make = makers[name ?? ""];
    if (make === undefined) throw new Error(`${file}: no pass '${name}'`);
    return make();
  });
};

/** How far results may be from those before the pass; 0: the same bits. */
const tolerance: Readonly<Record<string, number>> = { quantise: 0.15, shard: 0.02 };
/** What a result of fewer bits may be off when pieces that rounded several times round once. */
const rounding: Readonly<Record<string, number>> = { bf16: 2 ** -8, f16: 2 ** -11 };

describe("join", () => {
  const isContractionOp = (op: Op): boolean => op.kind.includes("linear");
  const bodyOps = (op: Op): readonly Op[] => op.body?.ops ?? [op];

  test("leaves a graph alone whose targets have nothing larger", () => {
    const alone = through({ precision: "fp8", kv: "fp8", stopAfter: "dead" });
    expect(printGraph(through({ precision: "fp8", kv: "fp8" }))).toBe(printGraph(alone));
  });

  for (const [precision, kv] of policies)
    test(`weights ${precision}, kv ${kv}: keeps every bit, whatever targets take`, () => {
      const options = { precision, kv, ffn: 2, split: "ep" } as const;
      const expected = logits(through({ ...options, stopAfter: "dead" }));
      const apart = through({ ...options, stopAfter: "dead" }).ops.length;
      let last = apart;
      for (const runs of [
        // contractions of the same rows; anything at all
        (op: Op): boolean => bodyOps(op).every(isContractionOp),
        (): boolean => true,
      ]) {
        const joined = through({ ...options, runs });
        expect(joined.ops.length).toBeLessThan(last);
        expect(logits(joined).data).toEqual(expected.data);
        last = joined.ops.length;
      }
    });

  test("offers a target the layers' kernels once, and each body to the side that would run it", () => {
    const offered: string[] = [];
    through({
      precision: "fp8",
      kv: "fp8",
      runs: (op) => {
        offered.push(`${op.place}\n${printGraph({ ...(op.body as Graph), symbols: [] })}`);
        return false;
      },
    });
    expect(new Set(offered).size).toBe(offered.length);
    expect(offered.some((text) => text.startsWith("attention") && text.includes("kv_append"))).toBe(true);
    expect(offered.some((text) => text.startsWith("ffn") && text.split("scaled_linear").length === 3)).toBe(true);
  });

  test("keeps every bit of random graphs", () => {
    for (let seed = 0; seed < 40; seed++) {
      const c = randomCase(seed, { ops: 20 });
      const options = { precision: "bf16", kv: "bf16", ffn: 1, split: "ep", runs: () => true } as const;
      const joined = runPasses(c.graph, passes(options));
      const weights = drawnWeights(c.graph, seed);
      const reference = run(c.graph, weights, c.inputs);
      for (const [name, y] of run(joined, weights, c.inputs))
        expect(y.data, `seed ${seed}, ${name}`).toEqual(reference.get(name)?.data);
    }
  });

  test("joins as often as it may", () => {
    const options = { precision: "bf16", kv: "bf16", runs: () => true } as const;
    const all = through(options);
    const before = through({ ...options, stopAfter: "dead" });
    const half = through({ ...options, limit: 1_000_000, skip: ["join"] });
    expect(printGraph(half)).toBe(printGraph(before));
    expect(all.ops.length).toBeLessThan(before.ops.length);
  });
});

describe("goldens", () => {
  const directory = join(import.meta.dirname, "golden", "passes");
  const files = readdirSync(directory);
  const sources = files.filter((f) => !f.endsWith(".out.step3"));
  const produced = new Set(sources.map((f) => f.replace(/\.step3$/, ".out.step3")));

  test("there is no golden that nothing produces", () => {
    expect(files.filter((f) => f.endsWith(".out.step3") && !produced.has(f))).toEqual([]);
  });

  test.each(sources)("%s", (file) => {
    const text = readFileSync(join(directory, file), "utf8");
    const list = runLines(text, file);
    const graph = parseGraph(text);
    let result: Graph | undefined;
    let printed: string;
    try {
      result = runPasses(graph, list);
      printed = printGraph(result);
    } catch (error) {
      if (!(error instanceof UserError)) throw error;
      printed = `; error: ${error.message}\n`;
    }
    const golden = join(directory, file.replace(/\.step3$/, ".out.step3"));
    if (process.env.BLESS === "1") writeFileSync(golden, printed);
    expect(printed).toBe(
      existsSync(golden) ? readFileSync(golden, "utf8") : "no golden yet: look at the output, then set BLESS=1",
    );
    for (const t of [text, printed]) expect(t.trimEnd().split("\n").length).toBeLessThan(40);
    if (result === undefined) return;
    expect(printGraph(parseGraph(printed))).toBe(printed);

    const weights = drawnWeights(graph, 3);
    const given = drawnInputs(graph, 3, 4);
    const [before, after] = [run(graph, weights, given), run(result, weights, given)];
    const allowedOf = ({ dtype }: Tensor): number =>
      Math.max(...list.map(({ name }) => (name === "recognise" ? (rounding[dtype] ?? 1e-6) : (tolerance[name] ?? 0))));
    for (const [name, y] of before) {
      const got = after.get(name) as Tensor;
      const allowed = allowedOf(y);
      if (allowed === 0) expect(got, name).toEqual(y);
      else expect(relativeError(got, y), name).toBeLessThan(allowed);
    }
  });
});
