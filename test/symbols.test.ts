/** Graphs of several symbols: what dimensions are worth, what inputs say, what is allocated, and one bundle at many sizes. */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { onnx } from "onnx-proto";
import { afterAll, describe, expect, test } from "vitest";
import { certify } from "../compiler/certify.ts";
import { checkBundle } from "../compiler/check_bundle.ts";
import { checkNumbers } from "../compiler/check_numbers.ts";
import { compile, defaultOptions } from "../compiler/compile.ts";
import { evalGraph } from "../compiler/eval.ts";
import { readNpy, writeNpy } from "../compiler/npy.ts";
import { silent } from "../compiler/progress.ts";
import { schedule } from "../compiler/schedule.ts";
import { bindSymbols, checkRanges, concrete } from "../ir/bind.ts";
import { checkSchedule } from "../ir/check.ts";
import { type DimSymbol, evalDim, mostOf, parseDim, solveDim } from "../ir/dim.ts";
import { drawTensor, randomNumbers } from "../ir/draw.ts";
import { UserError } from "../ir/error.ts";
import { evaluate } from "../ir/evaluate.ts";
import type { Graph } from "../ir/graph.ts";
import { parseGraph } from "../ir/parse.ts";
import { printGraph } from "../ir/print.ts";
import type { Buffer, Schedule } from "../ir/schedule.ts";
import { parseSchedule, printSchedule } from "../ir/schedule_text.ts";
import type { Tensor } from "../ir/tensor.ts";
import { type TensorType, type Type, tensor } from "../ir/type.ts";
import { shareBuilds, workspace } from "./sample.ts";

const symbol = (name: string, min: number, max: number, multiple = 1): DimSymbol => ({
  name,
  min,
  max,
  multiple,
  source: "host",
});
const declared: readonly DimSymbol[] = [symbol("B", 1, 4), symbol("S", 1, 128), symbol("P", 0, 64), symbol("T", 0, 8)];
const zeros = (...shape: number[]): Tensor => ({
  kind: "tensor",
  dtype: "f32",
  shape,
  data: new Float64Array(shape.reduce((a, b) => a * b, 1)),
});
const f32 = (...shape: readonly (number | string)[]): Type => tensor("f32", shape);

describe("dimensions", () => {
  test("quotients keep their value in canonical form, whatever they are multiplied by", () => {
    const half = (n: number): number => Math.floor(n / 2);
    const texts: readonly [string, (S: number, P: number) => number][] = [
      ["3*((S+1)/2)", (S) => 3 * half(S + 1)],
      ["(S+1)/2*3", (S) => 3 * half(S + 1)],
      ["(S+1)/2*((P+1)/2)", (S, P) => half(S + 1) * half(P + 1)],
      ["P*((S+1)/2)", (S, P) => P * half(S + 1)],
      ["P-3*((S+1)/2)", (S, P) => P - 3 * half(S + 1)],
      ["2*(((S+1)/2+P)/2)", (S, P) => 2 * half(half(S + 1) + P)],
    ];
    for (const [text, value] of texts) {
      const canonical = parseDim(text);
      expect(parseDim(String(canonical))).toBe(canonical);
      for (const S of [1, 2, 5, 8])
        for (const P of [0, 40, 41])
          expect([text, S, P, evalDim(canonical, new Map(Object.entries({ S, P })))]).toEqual([text, S, P, value(S, P)]);
    }
  });

  test("what is allocated is what a dimension never exceeds", () => {
    const most: readonly [string, number][] = [
      ["S", 128],
      ["P+S", 192],
      ["S-P", 128],
      ["140-S", 139],
      ["B*S", 512],
      ["8*((S+7)/8)", 128],
      ["(300-S)/2", 149],
      ["B*P-S", 255],
    ];
    for (const [text, n] of most) expect([text, mostOf(parseDim(text), declared)]).toEqual([text, n]);
    // no value of any exceeds it
    for (const [text, n] of most)
      for (const [B, S, P] of [
        [1, 1, 0],
        [4, 128, 64],
        [4, 1, 64],
        [1, 128, 0],
        [2, 37, 5],
      ] as const)
        expect(evalDim(parseDim(text), new Map(Object.entries({ B, S, P })))).toBeLessThanOrEqual(n);
  });

  test("one unknown is solved for where it is just multiplied and added to", () => {
    const values = new Map([["S", 4]]);
    expect(solveDim("P+S", 10, "P", values)).toBe(6);
    expect(solveDim("3*P+1", 10, "P", values)).toBe(3);
    expect(solveDim("P*S", 12, "P", values)).toBe(3);
    expect(solveDim("10-P", 7, "P", values)).toBe(3);
    expect(solveDim("P*S", 11, "P", values)).toBe(2.75);
    expect(solveDim("(P+1)/2", 3, "P", values)).toBeUndefined();
    expect(solveDim("P*P", 9, "P", values)).toBeUndefined();
    expect(solveDim("P*S", 0, "P", new Map([["S", 0]]))).toBeUndefined();
  });
});

describe("binding", () => {
  const bound = (...values: readonly [string, Type, Tensor][]) => values.map(([name, type, datum]) => ({ name, type, datum }));
  const bind = (...values: readonly [string, Type, Tensor][]) => Object.fromEntries(bindSymbols(bound(...values)));

  test("sums are solved once the other symbols are known, in any order of the inputs", () => {
    expect(bind(["mask", f32("B", "P+S"), zeros(2, 10)], ["x", f32("B", "S"), zeros(2, 7)])).toEqual({ B: 2, S: 7, P: 3 });
    expect(bind(["x", f32("B*S"), zeros(6)], ["y", f32("B", 4), zeros(3, 4)])).toEqual({ B: 3, S: 2 });
    expect(bind(["a", f32("P+S"), zeros(9)], ["b", f32("B+P"), zeros(5)], ["c", f32("B"), zeros(1)])).toEqual({
      B: 1,
      P: 4,
      S: 5,
    });
  });

  test("what does not fit is named with what is known", () => {
    expect(() => bind(["x", f32("S"), zeros(4)], ["mask", f32("P+S"), zeros(3)])).toThrow(
      "'mask' should be f32[P+S] with S = 4, got f32[3]",
    );
    expect(() => bind(["x", f32("2*S"), zeros(5)])).toThrow("'x' should be f32[2*S], got f32[5]");
    expect(() => bind(["x", f32("S"), zeros(4)], ["y", f32("S", "S"), zeros(4, 5)])).toThrow(
      "'y' should be f32[S,S] with S = 4, got f32[4,5]",
    );
    expect(() => bind(["x", f32("S"), zeros(4)], ["y", f32("(S+1)/2"), zeros(3)])).toThrow("got f32[3]");
  });

  test("sizes outside of what was declared are named with input, axis and limit", () => {
    const check = (...values: readonly [string, Type, Tensor][]) => {
      const pairs = bound(...values);
      checkRanges(declared, pairs, bindSymbols(pairs));
    };
    expect(() => check(["x", f32("B", "S"), zeros(4, 128)])).not.toThrow();
    expect(() => check(["x", f32("B", "S"), zeros(2, 129)])).toThrow(
      "input 'x' has size 129 on axis 1 (S); S is at least 1 and at most 128",
    );
    expect(() => check(["x", f32("B", "S"), zeros(0, 1)])).toThrow("input 'x' has size 0 on axis 0 (B); B is at least 1");
    expect(() => check(["x", f32("S"), zeros(1)], ["mask", f32(2, "P+S"), zeros(2, 70)])).toThrow(
      "input 'mask' has size 70 on axis 1 (P+S), so that P is 69; P is at least 0 and at most 64",
    );
    const eights = bound(["x", f32("M"), zeros(12)]);
    expect(() => checkRanges([symbol("M", 0, 64, 8)], eights, bindSymbols(eights))).toThrow(
      "input 'x' has size 12 on axis 0 (M); M is at least 0 and at most 64, a multiple of 8",
    );
  });
});

/** Products over a cache that inputs hold: the shapes of an exported decoder. */
const cached = `
graph cached
symbol B 1..4 host
symbol S 1..16 host
symbol P 0..8 host
input past f32[B,P,6]
input x f32[B,S,6]
keys f32[B,P+S,6] = concat(past, x) {axis: 1}
turned f32[B,6,P+S] = transpose(keys) {perm: [0, 2, 1]}
scores f32[B,S,P+S] = matmul(x, turned)
y f32[B,S,6] = matmul(scores, keys)
output y
output keys
`;
const scheduleOf = (g: Graph, options: Partial<Parameters<typeof schedule>[1]> = {}): Schedule =>
  schedule(g, {
    name: "main",
    index: 0,
    attention: { ranks: 1, target: "cpp" },
    ffn: { ranks: 0, target: "cpp" },
    microBatches: 1,
    maxRows: g.symbols.find((s) => s.name === "T")?.max ?? 1,
    kernelOf: (op) => op.kind,
    weightBytes: () => 64,
    ...options,
  });

describe("the interpreter", () => {
  const g = parseGraph(cached);
  test("binds every symbol from the inputs", () => {
    for (const [B, S, P] of [
      [1, 1, 0],
      [2, 3, 4],
      [4, 16, 8],
    ] as const) {
      const results = evaluate(
        g,
        new Map([
          ["past", zeros(B, P, 6)],
          ["x", zeros(B, S, 6)],
        ]),
      );
      expect(results.get("y")?.shape).toEqual([B, S, 6]);
      expect(results.get("keys")?.shape).toEqual([B, P + S, 6]);
    }
  });

  test("says which symbols the inputs leave open", () => {
    const sum = parseGraph(`
graph g
symbol S 1..9 host
symbol P 1..9 host
input x f32[P+S]
one f32[] = const() {value: 1, dtype: f32}
y f32[P,S] = broadcast(one) {shape: ["P", "S"]}
output y
`);
    const x = new Map([["x", zeros(5)]]);
    expect(() => evaluate(sum, x)).toThrow("the sizes of the inputs do not say what S and P are, from 'x' f32[P+S] alone");
    expect(evaluate(sum, x, undefined, undefined, new Map([["S", 2]])).get("y")?.shape).toEqual([3, 2]);
    // one that nothing uses needs no value
    const unused = parseGraph("graph g symbol S 1..9 host symbol P 1..9 host input x f32[S] y f32[S] = neg(x) output y");
    expect(evaluate(unused, x).get("y")?.shape).toEqual([5]);
  });

  test("a dimension that comes out negative is an error in words", () => {
    const less = parseGraph(`
graph g
symbol S 1..9 host
symbol P 0..4 host
input x f32[S]
input p f32[P]
y f32[S-P] = slice(x) {axis: 0, start: 0, size: ["S-P"]}
output y
`);
    expect(
      evaluate(
        less,
        new Map([
          ["x", zeros(5)],
          ["p", zeros(2)],
        ]),
      ).get("y")?.shape,
    ).toEqual([3]);
    expect(() =>
      evaluate(
        less,
        new Map([
          ["x", zeros(1)],
          ["p", zeros(2)],
        ]),
      ),
    ).toThrow(UserError);
    expect(() =>
      evaluate(
        less,
        new Map([
          ["x", zeros(1)],
          ["p", zeros(2)],
        ]),
      ),
    ).toThrow("f32[-P+S] with P = 2, S = 1: dimension '-P+S' is -1");
  });
});

describe("schedules", () => {
  const g = parseGraph(cached);
  const s = scheduleOf(g);
  const program = s.programs[0] as Schedule["programs"][number];
  const bytesOf = (name: string): number => (program.buffers.find((b) => b.name === name || b.binds === name) as Buffer).bytes;

  test("buffers hold every size, and the checker agrees", () => {
    expect(bytesOf("past")).toBe(4 * 8 * 6 * 4);
    expect(bytesOf("keys")).toBe(4 * 24 * 6 * 4);
    expect(bytesOf("scores.0")).toBe(4 * 16 * 24 * 4);
    const verdict = checkSchedule(s, certify(s));
    expect(verdict.ok ? "" : verdict.reason).toBe("");
  });

  test("print and parse, graphs and schedules", () => {
    expect(parseSchedule(printSchedule(s))).toEqual(s);
    expect(printSchedule(s)).toContain("dim P 0..8 by 1 host");
    expect(parseGraph(printGraph(g))).toEqual(g);
  });

  test("a difference is allocated at the least of what it takes away", () => {
    const less = scheduleOf(
      parseGraph(
        'graph g symbol S 1..9 host symbol P 0..4 host input x f32[S] input p f32[P] y f32[S-P] = slice(x) {axis: 0, start: 0, size: ["S-P"]} output y',
      ),
    );
    expect(less.programs[0]?.buffers.find((b) => b.binds === "y")).toMatchObject({ bytes: 9 * 4 });
    expect(checkSchedule(less, certify(less)).ok).toBe(true);
  });

  test("mutants: a buffer for fewer, one that overlaps, a symbol without a range or twice", () => {
    const certificate = certify(s);
    const refused = (change: Partial<Schedule>, rule: string, line: RegExp): void =>
      expect(checkSchedule({ ...s, ...change }, certificate)).toMatchObject({
        ok: false,
        rule,
        reason: expect.stringMatching(line),
      });
    const withBuffer = (at: number, change: Partial<Buffer>): Partial<Schedule> => ({
      programs: [{ ...program, buffers: program.buffers.map((b, i) => (i === at ? { ...b, ...change } : b)) }],
    });
    let tried = 0;
    program.buffers.forEach((b, i) => {
      if (!b.shape.some((d) => typeof d === "string")) return;
      tried++;
      refused(withBuffer(i, { bytes: b.bytes - 4 }), "length", /has \d+ bytes, and says/);
      // what it has when all symbols are at their least is not enough
      const least = b.shape.reduce<number>((n, d) => n * evalDim(d, new Map(s.symbols.map((x) => [x.name, x.min]))), 4);
      if (least > 0) refused(withBuffer(i, { bytes: least }), "length", /has \d+ bytes, and says/);
    });
    expect(tried).toBeGreaterThan(5);
    const [x, past] = ["x", "past"].map((name) => program.buffers.findIndex((b) => b.binds === name)) as [number, number];
    refused(withBuffer(x, { offset: (program.buffers[past] as Buffer).offset }), "overlap", /share memory/);
    for (const [i, sym] of s.symbols.entries()) {
      const symbols = (change: Partial<DimSymbol>): Partial<Schedule> => ({
        symbols: s.symbols.map((y, k) => (k === i ? { ...y, ...change } : y)),
      });
      refused(symbols({ max: sym.max + 1 }), "length", /has \d+ bytes, and says/);
      refused(symbols({ min: sym.max + 1 }), "form", /has no range/);
      refused(symbols({ name: "Q" }), "form", /symbol '.' is not declared/);
      refused({ symbols: [...s.symbols, sym] }, "form", /declared twice/);
    }
  });

  test("sizes that no memory has are refused in words", () => {
    const huge = parseGraph("graph g symbol S 1..1000000000 host input x f32[S,S] y f32[S,S] = neg(x) output y");
    expect(() => scheduleOf(huge)).toThrow(
      /^f32\[S,S\] has 4e\+18|^f32\[S,S\] has 4\d+ bytes when its symbols are at their largest/,
    );
  });
});

describe("beside the rows of an exchange", () => {
  /** T crosses; S stays on the attention side, or not */
  const split = (ffn: string): Graph =>
    parseGraph(`
graph split
symbol T 0..8 host
symbol S 1..16 host
input i f32[T,64]
input z f32[S,4]
weight v bf16[64,64] = tensor "v"
q f32[S,4] = neg(z) @attention
x bf16[T,64] = cast(i) {to: bf16} @attention
t0 bf16[T,64] = dispatch(x) {exchange: 0, ranks: 1} @attention
${ffn}
p bf16[T,64] = collect(y) {exchange: 0} @attention
r f32[T,64] = cast(p) {to: f32} @attention
output r
output q
`);
  const options = { ffn: { ranks: 1, target: "cpp" }, microBatches: 2 };
  const s = scheduleOf(split("y bf16[T,64] = linear(t0, v) @ffn0"), options);

  test("other symbols stay on the attention side", () => {
    const verdict = checkSchedule(s, certify(s));
    expect(verdict.ok ? "" : verdict.reason).toBe("");
    expect(parseSchedule(printSchedule(s))).toEqual(s);
  });

  test("a field, or memory of an FFN rank, that depends on another symbol is refused", () => {
    const certificate = certify(s);
    const other = (shape: readonly unknown[]): readonly unknown[] => shape.map((d) => (d === "T" ? "S" : d));
    const types = s.types.map((t) => ({ ...t, pull: t.pull.map((f) => ({ ...f, shape: other(f.shape), bytes: 2 * f.bytes })) }));
    expect(checkSchedule({ ...s, types } as unknown as Schedule, certificate)).toMatchObject({
      rule: "length",
      reason: expect.stringMatching(/field back bf16\[S,64\] depends on S/),
    });
    const programs = s.programs.map((p) => ({
      ...p,
      buffers: p.buffers.map((b) => (p.rank.role === "ffn" && b.region === "exchange" ? { ...b, shape: other(b.shape) } : b)),
    }));
    expect(checkSchedule({ ...s, programs } as unknown as Schedule, certificate)).toMatchObject({
      rule: "length",
      reason: expect.stringMatching(/on S, and FFN ranks|the field is/),
    });
  });

  test("an op on the FFN side that depends on another symbol is refused in words", () => {
    const g = split("y bf16[T,64] = linear(t0, v) @ffn0");
    const bad = {
      ...g,
      ops: g.ops.map((op) =>
        op.kind === "linear" ? { ...op, outputs: op.outputs.map((v) => ({ ...v, type: tensor("bf16", ["T", "S"]) })) } : op,
      ),
    };
    expect(() => scheduleOf(bad, options)).toThrow(/linear y: 'y' bf16\[T,S\] depends on S, and only T varies on FFN ranks/);
  });
});

describe("a symbol that others define", () => {
  /** as the pass `tokens` makes them */
  const defined = `
graph defined
symbol B 1..4 host
symbol S 1..16 host
symbol T 1..64 host is B*S
input x f32[B,S,8]
rows f32[T,8] = reshape(x) {shape: ["T", "8"]}
y f32[T,8] = neg(rows)
output y
`;
  const s = scheduleOf(parseGraph(defined));
  test("prints and parses, and is checked", () => {
    expect(printSchedule(s)).toContain('dim T 1..64 by 1 host is "B*S"');
    expect(parseSchedule(printSchedule(s))).toEqual(s);
    const verdict = checkSchedule(s, certify(s));
    expect(verdict.ok ? "" : verdict.reason).toBe("");
  });
  test("a maximum below what it may be is refused", () => {
    const symbols = s.symbols.map((x) => (x.name === "T" ? { ...x, max: 63 } : x));
    expect(checkSchedule({ ...s, symbols }, certify(s))).toMatchObject({
      rule: "form",
      reason: "symbol T is B*S, which may be 64, and is said to be at most 63",
    });
  });
  test("its value comes from theirs, and must agree with a size that says it too", () => {
    const results = evaluate(parseGraph(defined), new Map([["x", zeros(3, 5, 8)]]));
    expect(results.get("y")?.shape).toEqual([15, 8]);
    const [B, T] = [symbol("B", 1, 4), { ...symbol("T", 0, 8), is: "2*B" }];
    const pairs = [zeros(2), zeros(5)].map((datum, i) => ({ name: `x${i}`, type: f32(i === 0 ? "B" : "T"), datum }));
    expect(() => checkRanges([B, T], pairs, bindSymbols(pairs))).toThrow("T is 2*B = 4, and by the sizes of the inputs 5");
  });
});

describe("one bundle, built once, at many sizes", () => {
  const work = workspace("symbols");
  afterAll(work.remove);
  const random = randomNumbers(7);
  const numbers = (...shape: number[]): string =>
    Array.from({ length: shape.reduce((a, b) => a * b, 1) }, () => Math.round(400 * (random() - 0.5)) / 1000).join(", ");
  const texts: Readonly<Record<string, string>> = {
    // elements, products, softmax and axes in another order; no rows
    plain: `
graph plain
symbol B 1..4 host
symbol S 1..16 host
symbol P 0..8 host
input past f32[B,2,P,8]
input x f32[B,S,2,8]
q f32[B,2,S,8] = transpose(x) {perm: [0, 2, 1, 3]}
k f32[B,2,P+S,8] = concat(past, q) {axis: 2}
turned f32[B,2,8,P+S] = transpose(k) {perm: [0, 1, 3, 2]}
scores f32[B,2,S,P+S] = matmul(q, turned)
chosen f32[B,2,S,P+S] = softmax(scores)
y f32[B,2,S,8] = matmul(chosen, k)
z f32[B,S,2,8] = transpose(y) {perm: [0, 2, 1, 3]}
p f32[B,S,2,8] = softmax(z)
o f32[B,S,2,8] = add(p, x)
output o
output k
output x
`,
    // reductions of an axis that only a launch knows
    reduced: `
graph reduced
symbol B 1..3 host
symbol S 1..40 host
input x f32[B,S]
b bf16[B,S] = cast(x) {to: bf16}
y f32[B,S] = softmax(x)
sums f32[B,1] = reduce(x) {fn: sum}
means f32[B,1] = reduce(x) {fn: mean}
most f32[B,1] = reduce(x) {fn: max}
least f32[B,1] = reduce(x) {fn: min}
products f32[B,1] = reduce(x) {fn: prod}
magnitudes bf16[B,1] = reduce(b) {fn: amax}
wide f32[B,1] = cast(magnitudes) {to: f32}
output y
output sums
output means
output most
output least
output products
output wide
`,
    // tokens become rows, and the branch after the attention goes to an FFN rank
    split: `
graph split
symbol B 1..3 host
symbol S 1..8 host
input x f32[B,S,16]
weight wq f32[16,16] = [${numbers(16, 16)}]
weight up f32[32,16] = [${numbers(32, 16)}]
weight down f32[16,32] = [${numbers(16, 32)}]
rows f32[B*S,16] = reshape(x) {shape: ["B*S", "16"]}
qr f32[B*S,16] = linear(rows, wq)
q f32[B,S,16] = reshape(qr) {shape: ["B", "S", "16"]}
turned f32[B,16,S] = transpose(q) {perm: [0, 2, 1]}
scores f32[B,S,S] = matmul(q, turned)
gate f32[B,S,S] = tanh(scores)
y f32[B,S,16] = matmul(gate, q)
o f32[B*S,16] = reshape(y) {shape: ["B*S", "16"]}
a f32[B*S,16] = add(o, rows)
u f32[B*S,32] = linear(a, up)
s f32[B*S,32] = silu(u)
d f32[B*S,16] = linear(s, down)
m f32[B*S,16] = add(a, d)
p f32[B*S,16] = softmax(m)
r f32[B,S,16] = reshape(p) {shape: ["B", "S", "16"]}
output r
`,
  };
  const shapes = (g: Graph, values: Readonly<Record<string, number>>): Map<string, Tensor> =>
    new Map(
      g.inputs.map((v) => [
        v.name,
        drawTensor(concrete(v.type as TensorType, new Map(Object.entries(values))), "normal", random),
      ]),
    );
  const filesOf = (inputs: ReadonlyMap<string, Tensor>): string[] =>
    [...inputs].map(([name, t]) => {
      const file = join(work.path, `${name}.npy`);
      writeNpy(file, t);
      return `${name}=${file}`;
    });

  test.each([
    [
      "plain",
      [
        { B: 1, S: 1, P: 0 },
        { B: 2, S: 7, P: 3 },
        { B: 4, S: 16, P: 8 },
      ],
      "1A0F",
    ],
    [
      "reduced",
      [
        { B: 1, S: 1 },
        { B: 3, S: 17 },
        { B: 2, S: 40 },
      ],
      "1A0F",
    ],
    [
      "split",
      [
        { B: 1, S: 1 },
        { B: 2, S: 5 },
        { B: 3, S: 8 },
      ],
      "1A1F",
    ],
  ] as const)("%s: what the interpreter says", { timeout: 300_000 }, async (name, sizes, ranks) => {
    shareBuilds();
    const [source, bundle, out] = [`${name}.step3`, `${name}.s3`, `${name}.out`].map((f) => join(work.path, f)) as [
      string,
      string,
      string,
    ];
    const g = parseGraph(texts[name] as string);
    writeFileSync(source, printGraph(g));
    await compile(source, { ...defaultOptions, out: bundle }, silent);
    expect(checkBundle(bundle, silent)).toContain(`schedule main: ${ranks}`);
    expect(await checkNumbers(bundle, silent)).not.toContain("without a case");
    for (const size of sizes) {
      const inputs = shapes(g, size);
      await evalGraph(bundle, { input: filesOf(inputs), out }, silent);
      for (const [output, want] of evaluate(g, inputs)) {
        const got = readNpy(join(out, `${output}.npy`), "f32");
        expect(got.shape).toEqual(want.shape);
        const worst = want.data.reduce((m, x, i) => Math.max(m, Math.abs(x - (got.data[i] as number))), 0);
        expect(worst).toBeLessThan(2e-5);
      }
    }
    const larger = filesOf(shapes(g, { ...sizes[0], S: 41 }));
    await expect(evalGraph(bundle, { input: larger, out }, silent)).rejects.toThrow(
      /^input 'x' has size 41 on axis 1 \(S\); S is at least 1 and at most (16|40|8)$/,
    );
    await expect(evalGraph(bundle, { input: larger, out, target: "cpp" }, silent)).rejects.toThrow("is compiled for its target");
  });
});

test("an ONNX model with open dimensions: one bundle, its own names, any size within the limits", {
  timeout: 300_000,
}, async () => {
  shareBuilds();
  const work = workspace("symbols-onnx");
  const dims = (...of: readonly (string | number)[]): onnx.ITypeProto => ({
    tensorType: { elemType: 1, shape: { dim: of.map((d) => (typeof d === "number" ? { dimValue: d } : { dimParam: d })) } },
  });
  const graph: onnx.IGraphProto = {
    name: "open",
    input: [{ name: "x/in", type: dims("batch", "seq", 4) }],
    output: [{ name: "out.0", type: dims("batch", 3, "seq") }],
    initializer: [{ name: "w", dataType: 1, dims: [4, 3], floatData: Array.from({ length: 12 }, (_, i) => (i % 5) - 2) }],
    node: [
      { opType: "MatMul", input: ["x/in", "w"], output: ["h"] },
      { opType: "Relu", input: ["h"], output: ["r"] },
      {
        opType: "Transpose",
        input: ["r"],
        output: ["out.0"],
        attribute: [{ name: "perm", type: onnx.AttributeProto.AttributeType.INTS, ints: [0, 2, 1] }],
      },
    ],
  };
  const [model, bundle, out, file] = ["open.onnx", "open.s3", "out", "x.npy"].map((f) => join(work.path, f)) as string[];
  try {
    writeFileSync(
      model as string,
      onnx.ModelProto.encode({ irVersion: 8, opsetImport: [{ domain: "", version: 17 }], graph }).finish(),
    );
    const limits = new Map([
      ["batch", [1, 3]],
      ["seq", [1, 6]],
    ] as const);
    await compile(model as string, { ...defaultOptions, dim: limits, out: bundle as string }, silent);
    for (const [batch, seq] of [
      [1, 1],
      [2, 5],
      [3, 6],
    ] as const) {
      const x = drawTensor({ kind: "tensor", dtype: "f32", shape: [batch, seq, 4] }, "normal", randomNumbers(batch));
      writeNpy(file as string, x);
      const given = { input: [`x/in=${file}`], out: out as string };
      await evalGraph(bundle as string, given, silent);
      const got = readNpy(join(out as string, "out.0.npy"), "f32");
      await evalGraph(model as string, { ...given, target: "reference" }, silent);
      const want = readNpy(join(out as string, "out.0.npy"), "f32");
      expect(got.shape).toEqual([batch, 3, seq]);
      for (const [i, w] of want.data.entries()) expect(Math.abs((got.data[i] as number) - w)).toBeLessThan(1e-5);
    }
    writeNpy(file as string, zeros(2, 7, 4));
    await expect(evalGraph(bundle as string, { input: [`x/in=${file}`], out: out as string }, silent)).rejects.toThrow(
      /^input 'x\/in' has size 7 on axis 1 \(seq\); seq is at least 1 and at most 6$/,
    );
  } finally {
    work.remove();
  }
});
