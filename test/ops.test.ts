import { describe, expect, test } from "vitest";
import {
  type Attrs,
  allKnowledge,
  Builder,
  bytesOf,
  concrete,
  type Datum,
  type DType,
  elements,
  evaluate,
  type Graph,
  inferTypes,
  type Knowledge,
  type KvType,
  knowledge,
  kvState,
  literalWeight,
  type Op,
  randomNumbers,
  roundTo,
  sampleCase,
  type Tensor,
  tensor,
  typeText,
  UserError,
  verify,
} from "../ir/index.ts";
import { interpret } from "../ir/interpret.ts";
import { sampleUniform } from "../ir/ops/sample.ts";
import { randomCase } from "./random_graph.ts";

const of = (dtype: DType, shape: readonly number[], values: readonly number[]): Tensor => ({
  kind: "tensor",
  dtype,
  shape,
  data: Float64Array.from(values),
});

/** The results of one op on tensors. */
const apply = (kind: string, inputs: readonly Tensor[], attrs: Attrs = {}): number[][] => {
  const types = inputs.map((t) => tensor(t.dtype, t.shape));
  const outputs = inferTypes(kind, types, attrs).map((t) => concrete(t as ReturnType<typeof tensor>, new Map()));
  return knowledge(kind)
    .evaluate(inputs, attrs, outputs)
    .map((t) => [...(t as Tensor).data]);
};
const one = (kind: string, inputs: readonly Tensor[], attrs: Attrs = {}): number[] => apply(kind, inputs, attrs)[0] as number[];
const f32 = (...values: number[]): Tensor => of("f32", [values.length], values);

const samples = allKnowledge.flatMap((k) => k.samples.map((sample) => [`${k.name}: ${sample.name}`, k, sample] as const));

describe("every op", () => {
  test.each(allKnowledge.map((k) => [k.name, k] as const))("%s has samples of several kinds and words for people", (_, k) => {
    expect(k.summary.length).toBeGreaterThan(5);
    expect(k.samples.length).toBeGreaterThanOrEqual(2);
    expect(new Set(k.samples.map((s) => s.name)).size).toBe(k.samples.length);
  });

  test("ops without scalar and expand are the core that a vendor writes", () => {
    const core = allKnowledge.filter((k) => !k.scalar && !k.expand).map((k) => k.name);
    const expected =
      "attention bitcast broadcast collect combine concat cumulate dispatch fused gather grouped_linear iota kv_append linear " +
      "matmul put reduce reshape rope rotary sample scaled_grouped_linear scaled_linear sdpa size slice sort spread take topk transpose";
    expect(core.sort()).toEqual(expected.split(" "));
  });

  test.each(samples)("%s evaluates to values of its type", (_, k, sample) => {
    const c = sampleCase(k.name, sample, 1);
    verify(c.graph);
    const states = new Map(c.graph.states.map((s) => [s.name, kvState(4)]));
    const results = evaluate(c.graph, c.inputs, undefined, states, c.symbols);
    expect(results.size).toBe(c.graph.outputs.length);
    for (const v of c.graph.outputs) {
      const t = results.get(v.name) as Tensor;
      expect(typeText(tensor(t.dtype, t.shape))).toBe(typeText(concrete(v.type as ReturnType<typeof tensor>, c.symbols)));
      expect(t.data.length).toBe(elements(v.type, c.symbols));
      expect([...t.data].filter((x) => !Object.is(roundTo(t.dtype, x), x))).toEqual([]);
    }
    // the same again, and other numbers from another seed
    const again = evaluate(
      c.graph,
      sampleCase(k.name, sample, 1).inputs,
      undefined,
      new Map(c.graph.states.map((s) => [s.name, kvState(4)])),
      c.symbols,
    );
    expect(again).toEqual(results);
  });

  test.each(samples)("%s has a cost", (_, k, sample) => {
    const symbols = new Map(Object.entries(sample.symbols ?? {}));
    const { flops, bytes } = k.cost(sample.inputs, sample.attrs, symbols, sample.body);
    expect(Number.isFinite(flops) && flops >= 0).toBe(true);
    const outputs = k.infer(sample.inputs, sample.attrs, sample.body);
    const whole = [...sample.inputs, ...outputs].reduce((n, t) => n + bytesOf(t, symbols), 0);
    if (!["gather", "rotary", "const", "kv_append", "attention", "size"].includes(k.name)) expect(bytes).toBe(whole);
    expect(bytes).toBeGreaterThanOrEqual(0);
  });

  test.each(samples.filter(([, k]) => k.expand))("%s equals what it expands to, bit for bit", (_, k, sample) => {
    const whole = sampleCase(k.name, sample, 2);
    const b = new Builder("expanded", whole.graph.symbols);
    const inputs = sample.inputs.map((t, i) => b.input(`x${i}`, t as ReturnType<typeof tensor>));
    const op: Op = { kind: k.name, inputs, attrs: sample.attrs, outputs: [] };
    const results = k.expand?.(b, op) ?? [];
    for (const [i, v] of results.entries()) b.output(v, `y${i}`);
    const expanded = b.build();
    verify(expanded);
    expect(expanded.ops.some((o) => o.kind === k.name)).toBe(false);
    expect(results.map((v) => typeText(v.type))).toEqual(whole.graph.outputs.map((v) => typeText(v.type)));
    expect(evaluate(expanded, whole.inputs)).toEqual(evaluate(whole.graph, whole.inputs));
  });

  test("an unknown op names the nearest", () => {
    expect(() => knowledge("softmx")).toThrow("there is no op 'softmx'; the nearest is 'softmax'");
    expect(() => knowledge("")).toThrow(UserError);
    expect(() => knowledge("x".repeat(1e6))).toThrow(UserError);
    expect(() => knowledge("constructor")).toThrow(UserError);
  });

  test("an unknown attribute names the known", () => {
    expect(() => inferTypes("cast", [tensor("f32", [1])], { dtype: "bf16" })).toThrow("cast: no attribute 'dtype'; it takes to");
    expect(() => inferTypes("exp", [tensor("f32", [1])], { a: 1 })).toThrow("it takes none");
    expect(() => inferTypes("cast", [tensor("f32", [1])], {})).toThrow("cast: attribute 'to' is missing");
    expect(() => inferTypes("cast", [tensor("f32", [1])], { to: "f31" })).toThrow("must be one of");
  });
});

describe("elementwise", () => {
  test("NaN and infinities follow IEEE", () => {
    const x = f32(NaN, Infinity, -Infinity, -0, 0);
    expect(one("add", [x, f32(1, -Infinity, 5, 0, 0)])).toEqual([NaN, NaN, -Infinity, 0, 0]);
    expect(one("maximum", [x, f32(1, 1, 1, 0, -0)])).toEqual([NaN, Infinity, 1, 0, 0]);
    expect(one("minimum", [f32(1, NaN), f32(NaN, 1)])).toEqual([NaN, NaN]);
    expect(one("exp", [x])).toEqual([NaN, Infinity, 0, 1, 1]);
    expect(one("log", [f32(-1, 0, Infinity)])).toEqual([NaN, -Infinity, Infinity]);
    expect(one("sqrt", [f32(-1, -0)])).toEqual([NaN, -0]);
    expect(one("rsqrt", [f32(0, Infinity)])).toEqual([Infinity, 0]);
    expect(one("reciprocal", [f32(0, -0)])).toEqual([Infinity, -Infinity]);
    expect(one("div", [f32(0, 1, -1), f32(0, 0, 0)])).toEqual([NaN, Infinity, -Infinity]);
    expect(one("sigmoid", [x])).toEqual([NaN, 1, 0, 0.5, 0.5]);
    expect(one("tanh", [x])).toEqual([NaN, 1, -1, -0, 0]);
    expect(one("pow", [f32(1, -1, 2, 0), f32(NaN, Infinity, -1, 0)])).toEqual([1, 1, 0.5, 1]);
    expect(one("equal", [f32(NaN, 0), f32(NaN, -0)])).toEqual([0, 1]);
    expect(one("less", [f32(NaN, 1), f32(1, NaN)])).toEqual([0, 0]);
    expect(one("where", [of("bool", [2], [1, 0]), f32(1, NaN), f32(NaN, 2)])).toEqual([1, 2]);
  });

  test("casts saturate, clamp and keep NaN where the dtype has one", () => {
    const x = f32(1e9, -1e9, NaN, 448.1, 464, 0.5, 1.5, Infinity);
    expect(one("cast", [x], { to: "e4m3" })).toEqual([448, -448, NaN, 448, 448, 0.5, 1.5, 448]);
    expect(one("cast", [x], { to: "i8" })).toEqual([127, -128, 0, 127, 127, 0, 2, 127]);
    expect(one("cast", [x], { to: "bool" })).toEqual([1, 1, 1, 1, 1, 1, 1, 1]);
    expect(one("cast", [f32(65520, 65519)], { to: "f16" })).toEqual([Infinity, 65504]);
  });

  test("integers clamp", () => {
    const top = of("i8", [2], [127, -128]);
    expect(one("add", [top, top])).toEqual([127, -128]);
    expect(one("neg", [top])).toEqual([-127, 127]);
    expect(one("mul", [of("i32", [1], [2 ** 31 - 1]), of("i32", [1], [-4])])).toEqual([-(2 ** 31)]);
  });

  test("broadcasting is numpy's", () => {
    const x = of("f32", [2, 1, 3], [1, 2, 3, 4, 5, 6]);
    const y = of("f32", [2, 1], [10, 20]);
    expect(one("add", [x, y])).toEqual([11, 12, 13, 21, 22, 23, 14, 15, 16, 24, 25, 26]);
    expect(inferTypes("add", [tensor("f32", ["T", 1]), tensor("f32", [7])], {})).toEqual([tensor("f32", ["T", 7])]);
    expect(() => inferTypes("add", [tensor("f32", ["T"]), tensor("f32", [7])], {})).toThrow("do not broadcast: T against 7");
    expect(() => inferTypes("add", [tensor("f32", [7]), tensor("bf16", [7])], {})).toThrow("one dtype, got f32, bf16");
    expect(() => inferTypes("exp", [tensor("i32", [7])], {})).toThrow("exp: x must be");
    expect(() => inferTypes("and", [tensor("f32", [7]), tensor("f32", [7])], {})).toThrow("must be bool");
    expect(one("add", [of("f32", [0, 3], []), of("f32", [3], [1, 2, 3])])).toEqual([]);
  });

  test("each result is rounded once to the dtype", () => {
    const third = roundTo("bf16", 1 / 3);
    expect(one("mul", [of("bf16", [1], [third]), of("bf16", [1], [third])])).toEqual([roundTo("bf16", third * third)]);
    expect(one("silu", [of("bf16", [1], [third])])).toEqual([roundTo("bf16", third / (1 + Math.exp(-third)))]);
    expect(one("gelu", [f32(1)])[0]).toBeCloseTo(0.8413447460685429, 7);
    expect(one("gelu", [f32(1)], { approximate: "tanh" })[0]).toBeCloseTo(0.841191990608276, 7);
    expect(() => one("gelu", [f32(1)], { approximate: "sigmoid" })).toThrow("none, tanh");
    expect(one("nearest", [f32(0.5, 1.5, 2.5, -0.5)])).toEqual([0, 2, 2, -0]);
  });
});

describe("rows", () => {
  test("reduce", () => {
    const x = of("f32", [2, 5], [1, -7, 3, 4, 5, NaN, 1, 2, 3, 4]);
    expect(one("reduce", [x], { fn: "sum", group: 2 })).toEqual([-6, 7, 5, NaN, 5, 4]);
    expect(one("reduce", [x], { fn: "amax", group: 2 })).toEqual([7, 4, 5, NaN, 3, 4]);
    expect(one("reduce", [x], { fn: "max" })).toEqual([5, NaN]);
    expect(one("reduce", [x], { fn: "mean" })).toEqual([roundTo("f32", 6 / 5), NaN]);
    expect(inferTypes("reduce", [tensor("f32", [3, "T"])], { fn: "sum" })).toEqual([tensor("f32", [3, 1])]);
    expect(() => inferTypes("reduce", [tensor("f32", [3, "T"])], { fn: "sum", group: 2 })).toThrow("must be a constant");
    expect(() => inferTypes("reduce", [tensor("f32", [3, 0])], { fn: "max" })).toThrow("no elements");
  });

  test("spread undoes the shape of reduce", () => {
    expect(one("spread", [of("f32", [2, 2], [1, 2, 3, 4])], { group: 2, size: 3 })).toEqual([1, 1, 2, 3, 3, 4]);
    expect(() => inferTypes("spread", [tensor("f32", [2, 2])], { group: 2, size: 5 })).toThrow("are 3 groups, x has 2");
  });

  test("softmax of extremes", () => {
    expect(one("softmax", [of("f32", [1, 3], [1000, 1000, -1000])])).toEqual([0.5, 0.5, 0]);
    expect(one("softmax", [of("f32", [1, 2], [-Infinity, 0])])).toEqual([0, 1]);
    expect(one("softmax", [of("f32", [1, 2], [NaN, 0])])).toEqual([NaN, NaN]);
  });

  test("rms_norm of known rows", () => {
    const w = of("f32", [2], [1, 2]);
    const [a, b] = one("rms_norm", [of("f32", [1, 2], [3, 4]), w], { eps: 0 });
    expect(a).toBeCloseTo(3 / Math.sqrt(12.5), 6);
    expect(b).toBeCloseTo(8 / Math.sqrt(12.5), 6);
    expect(one("rms_norm", [of("f32", [1, 2], [0, 0]), w], { eps: 0.25 })).toEqual([0, 0]);
  });

  test("quantise: the largest of a group is 448 or 127, an empty group has scale 1", () => {
    const x = of("bf16", [1, 5], [1, -2, 0, 0, 3]);
    expect(apply("quantise", [x], { to: "e4m3", group: 2 })).toEqual([
      [224, -448, 0, 0, 448],
      [Math.fround(2 / 448), 1, Math.fround(3 / 448)],
    ]);
    expect(apply("quantise", [x], { to: "i8" })).toEqual([[42, -85, 0, 0, 127], [Math.fround(3 / 127)]]);
    expect(apply("quantise", [of("f32", [1, 2], [NaN, 1])], { to: "e4m3" })).toEqual([[NaN, NaN], [NaN]]);
  });
});

describe("contractions", () => {
  test("linear rounds once", () => {
    const x = of("bf16", [1, 2], [1, 2 ** -9]);
    const w = of("bf16", [1, 2], [1, 1]);
    expect(one("linear", [x, w], { to: "f32" })).toEqual([1 + 2 ** -9]);
    expect(one("linear", [x, w])).toEqual([1]);
    expect(() => inferTypes("linear", [tensor("bf16", ["T", 3]), tensor("bf16", [2, 4])], {})).toThrow(
      "columns of w and x: 4 is not 3",
    );
  });

  test("scaled_linear is linear of what the codes stand for", () => {
    const [k, n] = [5, 3];
    const x = of("i8", [2, k], [1, 2, 3, 4, 5, -1, -2, -3, -4, -5]);
    const w = of(
      "i8",
      [n, k],
      Array.from({ length: n * k }, (_, i) => (i * 7) % 11),
    );
    const xs = of("f32", [2, 2], [0.5, 0.25, 2, 1]);
    const ws = of("f32", [2, 2], [1, 2, 4, 8]);
    const real = (codes: Tensor, at: (r: number, c: number) => number): number[] =>
      [...codes.data].map((v, i) => v * at(Math.floor(i / k), i % k));
    const wide = [
      of(
        "f32",
        [2, k],
        real(x, (r, c) => xs.data[r * 2 + Math.floor(c / 3)] as number),
      ),
      of(
        "f32",
        [n, k],
        real(w, (r, c) => ws.data[Math.floor(r / 2) * 2 + Math.floor(c / 3)] as number),
      ),
    ];
    expect(one("scaled_linear", [x, xs, w, ws], { to: "f32", block: [2, 3] })).toEqual(one("linear", wide));
  });

  test("grouped: each pair meets its expert, others give zeros", () => {
    const x = of("f32", [2, 1], [1, 10]);
    const w = of("f32", [2, 1, 1], [3, 5]);
    const ids = of("i32", [2, 2], [4, 5, 3, 4]);
    expect(one("grouped_linear", [x, w, ids], { first: 4 })).toEqual([3, 5, 0, 30]);
    expect(one("grouped_linear", [of("f32", [4, 1], [1, 2, 3, 4]), w, ids], { first: 4 })).toEqual([3, 10, 0, 12]);
    expect(() =>
      inferTypes("grouped_linear", [tensor("f32", ["2*T", 1]), tensor("f32", [2, 1, 1]), tensor("i32", ["T", 3])], {}),
    ).toThrow("a row for each token (T) or for each pair (3*T), got 2*T");
  });

  test("combine over ranks adds up to the whole", () => {
    const y = of("f32", [4, 2], [1, 2, 3, 4, 5, 6, 7, 8]);
    const ids = of("i32", [2, 2], [0, 3, 2, 1]);
    const weights = of("f32", [2, 2], [0.5, 0.25, 1, 2]);
    const whole = one("combine", [y, ids, weights]);
    expect(whole).toEqual([1.25, 2, 19, 22]);
    const parts = [0, 2].map((first) => one("combine", [y, ids, weights], { first, count: 2 }));
    expect(whole.map((_, i) => (parts[0]?.[i] as number) + (parts[1]?.[i] as number))).toEqual(whole);
  });

  test("topk: ties to the lower index, NaN last", () => {
    const p = of("f32", [2, 4], [1, 3, 3, 2, NaN, 0, NaN, -1]);
    expect(apply("topk", [p], { k: 3 })).toEqual([
      [3, 3, 2, 0, -1, NaN],
      [1, 2, 3, 1, 3, 0],
    ]);
    expect(() => inferTypes("topk", [tensor("f32", ["T", 2])], { k: 3 })).toThrow("k is 3, p has 2 columns");
  });

  test("gather refuses an index outside the table", () => {
    const table = of("f32", [2, 1], [5, 6]);
    expect(one("gather", [table, of("i32", [3], [1, 0, 1])])).toEqual([6, 5, 6]);
    expect(() => one("gather", [table, of("i32", [1], [2])])).toThrow("index 2 of row 0 is outside a table of 2 rows");
    expect(() => one("gather", [table, of("i32", [1], [-1])])).toThrow(UserError);
  });
});

describe("rotary", () => {
  test("turns each pair (i, i + dim/2) by the angle of the row's position", () => {
    const [c, s] = [Math.fround(Math.cos(0.3)), Math.fround(Math.sin(0.3))];
    const table = of("f32", [2, 2], [1, 0, c, s]);
    const y = one("rotary", [of("f32", [1, 4], [1, 2, 3, 4]), table, of("i32", [1], [1])], { heads: 2, dim: 2 });
    expect(y).toEqual([c - 2 * s, 2 * c + s, 3 * c - 4 * s, 4 * c + 3 * s].map(Math.fround));
    expect(() => one("rotary", [of("f32", [1, 2], [1, 2]), table, of("i32", [1], [2])], { heads: 1, dim: 2 })).toThrow(
      "outside a table",
    );
    expect(() =>
      inferTypes("rotary", [tensor("f32", ["T", 3]), tensor("f32", [2, 3]), tensor("i32", ["T"])], { heads: 1, dim: 3 }),
    ).toThrow("even");
  });
});

/** kv_append then attention of `rows` rows a call, over the same sequence. */
const attend = (kv: KvType, chunk: number, total: number, pageTokens: number): number[] => {
  const heads = 2 * kv.heads;
  const b = new Builder("g", [{ name: "T", min: 0, max: total, multiple: 1, source: "host" }]);
  const state = b.state("kv0", kv);
  const q = b.input("q", tensor("f32", ["T", heads * kv.dim]));
  const k = b.input("k", tensor("f32", ["T", kv.heads * kv.dim]));
  const pages = b.input("pages", tensor("i32", ["T", 8]));
  const position = b.input("position", tensor("i32", ["T"]));
  const coded = (x: typeof k): readonly (typeof k)[] =>
    kv.dtype === "f32" ? [x] : b.ops("quantise", [x], { to: kv.dtype, group: kv.dim });
  const next = b.op("kv_append", [state, ...coded(k), ...coded(k), pages, position]);
  b.output(b.op("attention", [q, next, pages, position], { heads, scale: 0.5 }, ["o"]));
  const g = b.build();
  verify(g);
  const number = (t: number, c: number, n: number): number => Math.fround(Math.sin(t * 31 + c * 7 + n));
  const states = new Map([["kv0", kvState(pageTokens)]]);
  const result: number[] = [];
  for (let from = 0; from < total; from += chunk) {
    const rows = Math.min(chunk, total - from);
    const fill = (columns: number, n: number): Tensor =>
      of(
        "f32",
        [rows, columns],
        Array.from({ length: rows * columns }, (_, i) => number(from + Math.floor(i / columns), i % columns, n)),
      );
    const inputs = new Map([
      ["q", fill(heads * kv.dim, 1)],
      ["k", fill(kv.heads * kv.dim, 2)],
      // pages in no order, page 0 left alone
      [
        "pages",
        of(
          "i32",
          [rows, 8],
          Array.from({ length: rows * 8 }, (_, i) => 1 + (((i % 8) * 5) % 8)),
        ),
      ],
      [
        "position",
        of(
          "i32",
          [rows],
          Array.from({ length: rows }, (_, t) => from + t),
        ),
      ],
    ]);
    result.push(...(evaluate(g, inputs, undefined, states).get("o") as Tensor).data);
  }
  return result;
};

describe("attention", () => {
  test.each(["f32", "e4m3", "i8"] as const)("%s cache: chunked prefill, decode and page size make no difference", (dtype) => {
    const kv: KvType = { kind: "kv", dtype, heads: 2, dim: 4 };
    const whole = attend(kv, 7, 7, 16);
    expect(attend(kv, 1, 7, 16)).toEqual(whole);
    expect(attend(kv, 3, 7, 2)).toEqual(whole);
  });

  test("is the textbook formula", () => {
    const kv: KvType = { kind: "kv", dtype: "f32", heads: 1, dim: 2 };
    const result = attend(kv, 3, 3, 4);
    const number = (t: number, c: number, n: number): number => Math.fround(Math.sin(t * 31 + c * 7 + n));
    const expected: number[] = [];
    for (let t = 0; t < 3; t++)
      for (let h = 0; h < 2; h++) {
        const scores = Array.from({ length: t + 1 }, (_, j) =>
          Math.exp(0.5 * (number(t, h * 2, 1) * number(j, 0, 2) + number(t, h * 2 + 1, 1) * number(j, 1, 2))),
        );
        const sum = scores.reduce((a, b) => a + b, 0);
        for (let c = 0; c < 2; c++) expected.push(scores.reduce((a, s, j) => a + (s / sum) * number(j, c, 2), 0));
      }
    for (const [i, x] of result.entries()) expect(x).toBeCloseTo(expected[i] as number, 6);
  });

  test("a position past the page table is an error", () => {
    expect(() => attend({ kind: "kv", dtype: "f32", heads: 1, dim: 2 }, 9, 9, 1)).toThrow(
      "position 8 of row 8 is outside 8 pages of 1 tokens",
    );
  });

  test("types must fit the state", () => {
    const kv: KvType = { kind: "kv", dtype: "e4m3", heads: 1, dim: 4 };
    const rows = tensor("e4m3", ["T", 4]);
    const where = [tensor("i32", ["T", 2]), tensor("i32", ["T"])];
    expect(() => inferTypes("kv_append", [kv, rows, rows, ...where], {})).toThrow("takes 7 inputs");
    expect(() =>
      inferTypes("attention", [tensor("bf16", ["T", 12]), { ...kv, heads: 2 }, ...where], { heads: 3, scale: 1 }),
    ).toThrow("3 query heads do not divide over 2 KV heads");
  });
});

describe("sample", () => {
  const draw = (logits: number[], temperature: number, topP: number, seed: number, position: number): number =>
    one("sample", [
      of("f32", [1, logits.length], logits),
      of("f32", [1], [temperature]),
      of("f32", [1], [topP]),
      of("u32", [1], [seed]),
      of("i32", [1], [position]),
    ])[0] as number;

  test("greedy takes the lower index on ties", () => {
    expect(draw([1, 5, 5, 2], 0, 1, 7, 3)).toBe(1);
    expect(draw([NaN, 5, 2], 0, 1, 7, 3)).toBe(1);
  });

  test("top_p keeps the smallest prefix that reaches it", () => {
    const logits = [Math.log(0.1), Math.log(0.6), Math.log(0.3)];
    const seen = (topP: number): Set<number> => new Set(Array.from({ length: 200 }, (_, seed) => draw(logits, 1, topP, seed, 0)));
    expect(seen(0.5)).toEqual(new Set([1]));
    expect(seen(0)).toEqual(new Set([1]));
    expect([...seen(0.8)].sort()).toEqual([1, 2]);
    expect([...seen(1)].sort()).toEqual([0, 1, 2]);
  });

  test("draws follow the distribution and depend on seed and position only", () => {
    const logits = [Math.log(0.1), Math.log(0.6), Math.log(0.3)];
    const counts = [0, 0, 0];
    for (let seed = 0; seed < 4000; seed++) {
      const i = draw(logits, 1, 1, seed, 11);
      counts[i] = (counts[i] as number) + 1;
    }
    expect(Math.abs((counts[0] as number) / 4000 - 0.1)).toBeLessThan(0.02);
    expect(Math.abs((counts[1] as number) / 4000 - 0.6)).toBeLessThan(0.03);
    expect(draw(logits, 1, 1, 5, 6)).toBe(draw(logits, 1, 1, 5, 6));
  });

  test("the random number, step by step in 64-bit integers", () => {
    const mask = 0xffffffffn;
    const mix = (h: bigint): bigint => {
      let x = ((h ^ (h >> 16n)) * 0x85ebca6bn) & mask;
      x = ((x ^ (x >> 13n)) * 0xc2b2ae35n) & mask;
      return x ^ (x >> 16n);
    };
    for (const [seed, position] of [
      [0, 0],
      [1, 0],
      [0, 1],
      [123456789, 65535],
      [0xffffffff, 2 ** 31 - 1],
    ] as const) {
      let h = BigInt(seed) ^ ((BigInt(position) * 0x9e3779b1n) & mask);
      h = mix((mix(h) + 0x85ebca6bn) & mask);
      expect(sampleUniform(seed, position)).toBe(Number(h >> 8n) / 2 ** 24);
    }
  });
});

describe("fused", () => {
  const body = (): Graph => {
    const b = new Builder("body", [{ name: "T", min: 0, max: 9, multiple: 1, source: "host" }]);
    const x = b.input("x", tensor("bf16", ["T", 8]));
    const w = b.input("w", tensor("bf16", [8]));
    b.output(b.op("mul", [b.op("silu", [x]), w], {}, ["y"]));
    b.output(b.op("reduce", [x], { fn: "max" }, ["m"]));
    return b.build();
  };

  test("means its body", () => {
    const inner = body();
    const b = new Builder("outer", inner.symbols);
    const inputs = inner.inputs.map((v) => b.input(v.name, v.type as ReturnType<typeof tensor>));
    for (const [i, v] of b.fused(inputs, inner).entries()) b.output(v, ["y", "m"][i]);
    const g = b.build();
    verify(g);
    const data = new Map([
      [
        "x",
        of(
          "bf16",
          [3, 8],
          Array.from({ length: 24 }, (_, i) => i / 4 - 2),
        ),
      ],
      ["w", of("bf16", [8], [1, 2, 3, 4, 5, 6, 7, 8])],
    ]);
    expect(evaluate(g, data)).toEqual(evaluate(inner, data));
    const cost = knowledge("fused").cost(
      inputs.map((v) => v.type),
      {},
      new Map([["T", 3]]),
      inner,
    );
    expect(cost).toEqual({ flops: 24 * 5 + 24, bytes: 48 + 16 + 48 + 6 });
  });

  test("costs the rows of a table that are in use, and what its ops move of states", () => {
    const b = new Builder("body", [{ name: "T", min: 0, max: 9, multiple: 1, source: "host" }]);
    const table = b.input("table", tensor("bf16", [1000, 8]));
    const ids = b.input("ids", tensor("i32", ["T"]));
    const pages = b.input("pages", tensor("i32", ["T", 4]));
    const position = b.input("position", tensor("i32", ["T"]));
    const state = b.state("state", { kind: "kv", dtype: "bf16", heads: 1, dim: 8 });
    const row = b.op("gather", [table, ids], {}, ["row"]);
    b.output(b.op("kv_append", [state, row, row, pages, position], {}, ["appended"]));
    const built = b.build();
    const inner: Graph = { ...built, inputs: [...built.inputs, state], states: [] };
    const types = inner.inputs.map((v) => v.type);
    // a row of the table is 16 bytes; so are the K and the V that are written
    expect(knowledge("fused").cost(types, {}, new Map([["T", 3]]), inner).bytes).toBe(3 * (16 + 4 + 16 + 4 + 32));
  });

  test("refuses inputs that are not its body's", () => {
    const types = [tensor("bf16", ["T", 8]), tensor("f32", [8])];
    expect(() => inferTypes("fused", types, {}, body())).toThrow("fused: input 'w' of the body is bf16[8], got f32[8]");
    expect(() => inferTypes("fused", types.slice(1), {}, body())).toThrow("takes 2 inputs, got 1");
    expect(() => inferTypes("fused", types, {})).toThrow("needs a body");
    expect(() => inferTypes("exp", types.slice(1), {}, body())).toThrow("only 'fused' has a body");
  });
});

describe("evaluate", () => {
  const g = ((): Graph => {
    const b = new Builder("g", [{ name: "T", min: 0, max: 4, multiple: 1, source: "host" }]);
    const x = b.input("x", tensor("f32", ["T", 2]));
    const w = b.weight("w", tensor("f32", [2]), { kind: "literal", values: [1, 2] });
    b.output(b.op("mul", [x, w]), "y");
    b.output(b.op("reduce", [x], { fn: "sum" }, ["s"]));
    return b.build();
  })();

  test("binds symbols from the inputs", () => {
    const results = evaluate(g, new Map([["x", of("f32", [2, 2], [1, 2, 3, 4])]]));
    expect([...(results.get("y") as Tensor).data]).toEqual([1, 4, 3, 8]);
    expect([...(results.get("s") as Tensor).data]).toEqual([3, 7]);
  });

  test("shows every op's results", () => {
    const seen: string[] = [];
    evaluate(g, new Map([["x", of("f32", [1, 2], [1, 2])]]), undefined, undefined, undefined, (op) => seen.push(op.kind));
    expect(seen).toEqual(["mul", "reduce"]);
  });

  test("says what does not fit", () => {
    expect(() => evaluate(g, new Map())).toThrow("graph 'g': input 'x' is not given");
    expect(() => evaluate(g, new Map([["x", of("f32", [2, 3], [])]]))).toThrow("'x' should be f32[T,2]");
    expect(() => evaluate(g, new Map([["x", of("bf16", [2, 2], [])]]))).toThrow("got bf16[2,2]");
    expect(() => evaluate(g, new Map([["x", of("f32", [2, 2], [])]]), undefined, undefined, new Map([["T", 3]]))).toThrow(
      "with T = 3, got f32[2,2]",
    );
  });

  test("no rows", () => {
    const results = evaluate(g, new Map([["x", of("f32", [0, 2], [])]]));
    expect(results.get("y")).toEqual(of("f32", [0, 2], []));
  });
});

describe("random graphs", () => {
  /** Ops whose results a backend may compute with other roundings inside than the interpreter. */
  const inexact =
    /^(exp|log|r?sqrt|tanh|erf|sigmoid|silu|gelu|sin|cos|rms_norm|softmax|(scaled_|grouped_|scaled_grouped_)?linear|combine|rotary)$/;

  /** The op as a backend in f32 might do it: off by a few units of the largest element of the row, then rounded. */
  const disturbed =
    (random: () => number) =>
    (kind: string): Knowledge => {
      const k = knowledge(kind);
      const evaluateOff: Knowledge["evaluate"] = (inputs, attrs, outputs, body) => {
        const sums = kind === "reduce" && (attrs.fn === "sum" || attrs.fn === "mean") && (inputs[0] as Tensor).shape.at(-1) !== 1;
        if (!inexact.test(kind) && !sums) return k.evaluate(inputs, attrs, outputs, body);
        const wide = outputs.map((t) => tensor("f64", (t as Tensor).shape));
        return k.evaluate(inputs, attrs, wide, body).map((datum, i): Tensor => {
          const { data, shape } = datum as Tensor;
          const columns = shape.at(-1) ?? 1;
          const { dtype } = outputs[i] as Tensor;
          const size = (j: number): number => {
            if (!sums && !/linear|combine|rotary/.test(kind)) return Math.abs(data[j] as number);
            const row = j - (j % columns);
            return data.subarray(row, row + columns).reduce((a, x) => Math.max(a, Math.abs(x)), 0);
          };
          const off = data.map((x, j) => roundTo(dtype, x + size(j) * (2 * random() - 1) * 2 ** -21.5));
          return { kind: "tensor", dtype, shape, data: off };
        });
      };
      return { ...k, evaluate: evaluateOff };
    };

  test("their tolerances hold for a backend that rounds differently, and are 0 where nothing can differ", () => {
    let exact = 0;
    for (let seed = 300; seed < 360; seed++) {
      const c = randomCase(seed);
      const weights = c.graph.weights.map((w) => [w.value.name, literalWeight(w)] as const);
      const values = new Map<string, Datum>([...c.inputs, ...weights]);
      interpret(c.graph.ops, values, c.symbols, disturbed(randomNumbers(seed)));
      for (const [name, right] of evaluate(c.graph, c.inputs)) {
        const allowed = c.tolerance.get(name) as number;
        const other = values.get(name) as Tensor;
        const difference = right.data.reduce((a, x, i) => Math.max(a, Math.abs(x - (other.data[i] as number))), 0);
        expect(difference, `seed ${seed}: '${name}'`).toBeLessThanOrEqual(allowed);
        if (allowed === 0) exact++;
      }
    }
    expect(exact).toBeGreaterThan(60);
  });
});
