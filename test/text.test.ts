import { describe, expect, test } from "vitest";
import {
  allKnowledge,
  Builder,
  canonicalJson,
  evaluate,
  type Graph,
  graphFromJson,
  graphToJson,
  kvState,
  parseGraph,
  parseType,
  printGraph,
  randomNumbers,
  sampleCase,
  type Tensor,
  tensor,
  typeText,
  UserError,
  verify,
  type WeightSource,
} from "../ir/index.ts";
import { randomCase } from "./random_graph.ts";

/** A graph with everything that the text has a form for. */
const rich = `; a comment of a line
; run: something
graph rich
symbol T 0..8 host
symbol S 16..4096 multiple 16 device
input ids i32[T]
input idle f32[3*T,(S+127)/128,2+T]
weight embed bf16[32,16] = tensor "model.embed_tokens.weight"
weight part bf16[8,16] = tensor "a \\"quoted\\" name;\\u0041\\n" [8:16, 0:16]
weight wide bf16[16,16] = dequantised "w" scales "w.scale_inv" block 128x128 [0:16, 0:16]
weight q8 e4m3[16,16] = codes e4m3 block 128x128 of (tensor "w" [0:16, 0:16]) [0:16, 0:16]
weight s8 f32[16,1] = scales i8 block 1x16 of (dequantised "w" scales "s" block 2x2)
weight all bf16[2,4,16] = stacked (tensor "a" [0:4, 0:16], dequantised "w" scales "s" block 2x2 [4:8, 0:16])
weight all8 e4m3[1,4,16] = stacked (codes e4m3 block 1x16 of (tensor "a"))
weight table f32[64,8] = rope theta 500000 positions 64 dim 8
weight numbers f32[7] = [1, -0, inf, -inf, nan, 1e-7, 1.5e+300]
weight none f32[0] = []
state kv0 kv<bf16,1x8>
input pages i32[T,4]
input position i32[T]
x bf16[T,16] = gather(embed, ids) @attention from "layers.0.embed"
h bf16[T,16] = rms_norm(x, w_in) {eps: 1e-5} @attention from "a \\"b\\" ; c"   ; the rest is a comment
q e4m3[T,16], s f32[T,1] = quantise(h) {to: e4m3, group: 128} @attention
y f32[T,16] = scaled_linear(q, s, q8, s1) {to: f32, block: [128, 128]} @attention
k bf16[T,8] = linear(h, part) @attention
kr bf16[T,8] = rotary(k, table, position) {heads: 1, dim: 8} @attention
kv1 kv<bf16,1x8> = kv_append(kv0, kr, k, pages, position) @attention
o bf16[T,8] = attention(kr, kv1, pages, position) {heads: 1, scale: 0.35355339059327373} @attention
c f32[] = const() {value: -inf, dtype: f32} @attention
f bf16[T,16], m bf16[T,1] = fused(x, h) @attention from "fused" {
  graph body
  input a bf16[T,16]
  input b bf16[T,16]
  input bf16[T,16] = silu(a)
  output bf16[T,16] = mul(input, b)
  top bf16[T,1] = reduce(a) {fn: max}
  output output
  output top
}
output y
output o
output f
output m
weight w_in bf16[16] = tensor "model.layers.0.input_layernorm.weight"
weight s1 f32[1,1] = [0.25]
`;

describe("text", () => {
  test("reads and prints everything, and what it prints is what it reads", () => {
    const g = parseGraph(rich);
    const text = printGraph(g);
    expect(parseGraph(text)).toEqual(g);
    expect(printGraph(parseGraph(text))).toBe(text);
    expect(g.symbols).toEqual([
      { name: "T", min: 0, max: 8, multiple: 1, source: "host" },
      { name: "S", min: 16, max: 4096, multiple: 16, source: "device" },
    ]);
    const weight = (name: string): WeightSource | undefined => g.weights.find((w) => w.value.name === name)?.source;
    expect(weight("part")).toEqual({
      kind: "tensor",
      tensor: 'a "quoted" name;A\n',
      slice: [
        [8, 16],
        [0, 16],
      ],
    });
    expect(weight("numbers")).toEqual({ kind: "literal", values: [1, -0, Infinity, -Infinity, NaN, 1e-7, 1.5e300] });
    expect(weight("s8")).toMatchObject({ kind: "scales", to: "i8", block: [1, 16], of: { kind: "dequantised", block: [2, 2] } });
    expect(g.ops[0]).toMatchObject({ kind: "gather", place: "attention", origin: "layers.0.embed" });
    expect(g.ops[1]?.origin).toBe('a "b" ; c');
    const fused = g.ops.find((op) => op.kind === "fused");
    expect(fused?.body?.ops.map((op) => op.outputs[0]?.name)).toEqual(["input", "output", "top"]);
    expect(fused?.body?.symbols).toBe(g.symbols);
    // values are shared, not copied
    expect(g.ops[1]?.inputs[0]).toBe(g.ops[0]?.outputs[0]);
  });

  test("prints like this", () => {
    const b = new Builder("tiny", [{ name: "T", min: 0, max: 8, multiple: 1, source: "host" }]);
    const ids = b.input("ids", tensor("i32", ["T"]));
    const embed = b.weight("embed", tensor("bf16", [32, 16]), { kind: "tensor", tensor: "model.embed_tokens.weight" });
    b.at("layers.0").place = "attention";
    const x = b.op("gather", [embed, ids], {}, ["x"]);
    // attributes print in the order that the op knows them in
    for (const v of b.ops("quantise", [x], { group: 128, to: "e4m3" }, ["q", "s"])) b.output(v);
    expect(printGraph(b.build())).toBe(`graph tiny
symbol T 0..8 host
input ids i32[T]
weight embed bf16[32,16] = tensor "model.embed_tokens.weight"
x bf16[T,16] = gather(embed, ids) @attention from "layers.0"
q e4m3[T,16], s f32[T,1] = quantise(x) {to: e4m3, group: 128} @attention from "layers.0"
output q
output s
`);
  });

  test("types of results may be left out, words that declare may be names", () => {
    const g = parseGraph(`graph graph
      symbol symbol 0..4 host
      input input f32[symbol,2]
      weight weight f32[2] = [1, 2]
      output = add(input, weight)
      state f32[symbol,2] = neg(output)
      from, graph = quantise(state) {to: i8} from "here"
      from2 = cast(from) {to: f32}
      output state
      output output
      output graph output from2`);
    expect(g.ops.map((op) => op.outputs.map((v) => `${v.name} ${typeText(v.type)}`).join(", "))).toEqual([
      "output f32[symbol,2]",
      "state f32[symbol,2]",
      "from i8[symbol,2], graph f32[symbol,1]",
      "from2 f32[symbol,2]",
    ]);
    expect(parseGraph(printGraph(g))).toEqual(g);
  });

  test("an op without origin gets its line, when the file has a name", () => {
    const text = 'graph g\ninput x f32[2]\ny = neg(x)\nz = neg(y) from "model"\noutput z\n';
    expect(parseGraph(text, "/some/where/g.step3").ops.map((op) => op.origin)).toEqual(["g.step3:3", "model"]);
    expect(parseGraph(text).ops.map((op) => op.origin)).toEqual([undefined, "model"]);
  });

  test("strings that look like other attributes are quoted", () => {
    const g = parseGraph('graph g\ny f32[] = const() {value: 1, dtype: "f32"}\noutput y\n');
    expect(g.ops[0]?.attrs).toEqual({ value: 1, dtype: "f32" });
    const attrs = { a: "true", b: "nan", c: "a b", d: ["x", "inf"], e: [1, -0], f: true, g: -5, h: "é\u2028" };
    const odd: Graph = { ...g, ops: [{ kind: "odd", inputs: [], outputs: [], attrs }], outputs: [] };
    expect(printGraph(odd)).toContain(
      `= odd() {a: "true", b: "nan", c: "a b", d: [x, "inf"], e: [1, -0], f: true, g: -5, h: "é\u2028"}`,
    );
  });

  const samples = allKnowledge.flatMap((k) =>
    k.samples.map((s) => [`${k.name}: ${s.name}`, sampleCase(k.name, s, 3).graph] as const),
  );
  test("every sample of every op comes back from text and from JSON", () => {
    expect(samples.length).toBeGreaterThan(300);
    for (const [name, g] of samples) {
      expect(parseGraph(printGraph(g)), name).toEqual(g);
      expect(graphFromJson(graphToJson(g)), name).toEqual(g);
    }
  });

  test("random graphs come back from text and from JSON, and evaluate the same", () => {
    for (let seed = 0; seed < 60; seed++) {
      const c = randomCase(seed);
      verify(c.graph);
      const again = parseGraph(printGraph(c.graph));
      expect(again, `seed ${seed}`).toEqual(c.graph);
      expect(graphToJson(graphFromJson(graphToJson(c.graph)))).toBe(graphToJson(c.graph));
      const results = evaluate(c.graph, c.inputs);
      if (seed % 6 === 0) expect(evaluate(again, c.inputs)).toEqual(results);
      for (const [name, t] of results)
        expect(
          [...t.data].every((x) => Number.isFinite(x)),
          `seed ${seed}: '${name}' is finite`,
        ).toBe(true);
    }
  });

  test("the same seed is the same graph, another is another", () => {
    expect(printGraph(randomCase(7).graph)).toBe(printGraph(randomCase(7).graph));
    expect(printGraph(randomCase(8).graph).replace("random8", "random7")).not.toBe(printGraph(randomCase(7).graph));
  });
});

describe("types", () => {
  test.each([
    ["bf16[ T , 256 ]", "bf16[T,256]"],
    ["f32[]", "f32[]"],
    ["kv<e4m3, 1x256>", "kv<e4m3,1x256>"],
    ["f32[T+T*2]", "f32[3*T]"],
    ["f32[(T+127)/128]", "f32[(T+127)/128]"],
    ["i8[2*(T+1)-2, (256*T+5)/128]", "i8[2*T,2*T]"],
  ])("%s", (text, canonical) => {
    expect(typeText(parseType(text))).toBe(canonical);
  });
  test.each([
    "",
    "f33[2]",
    "kv<f16,1x2>",
    "kx<bf16,1x2>",
    "f32[T",
    "f32[T T]",
    "f32[2 3]",
    "f32[T/0]",
    "f32[T/T]",
    "f32[1.5]",
    "f32[,]",
    "f32[]]",
    "f32[#]",
  ])("'%s' is none", (text) => {
    expect(() => parseType(text)).toThrow(UserError);
  });
});

describe("errors say where, what was expected, and what was found", () => {
  const lines = [
    "graph g",
    "symbol T 0..8 host",
    "input x f32[T,4]",
    "weight w f32[2,4] = [1, 2, 3, 4, 5, 6, 7, 8]",
    "state kv0 kv<f32,1x4>",
    "y f32[T,2] = linear(x, w) {to: f32} @attention",
    "output y",
  ];
  const cases: readonly [what: string, line: number, text: string, message: string][] = [
    ["no graph", 1, "grph g", "1:1: expected 'graph', found 'grph'"],
    ["no name", 1, "graph 5", "1:7: expected a name, found '5'"],
    ["a range", 2, "symbol T 0.8 host", "2:14: expected '..', found 'host'"],
    ["a source", 2, "symbol T 0..8 hots", "2:15: expected 'host' or 'device', found 'hots'"],
    ["an empty range", 2, "symbol T 9..8 host", "2:8: symbol 'T' must have whole 0 <= min <= max"],
    ["a dtype", 3, "input x f31[T,4]", "3:9: expected a dtype (f64, f32"],
    ["a symbol", 3, "input x f32[Q,4]", "3:7: 'x' f32[Q,4]: symbol 'Q' is not declared"],
    ["a dimension", 3, "input x f32[T*,4]", "3:15: expected a number or a name or '(', found ','"],
    [
      "a negative dimension",
      3,
      "input x f32[T-5,4]",
      "3:7: 'x' f32[T-5,4]: dimension 'T-5' is -5 when its symbols are at their min",
    ],
    ["a huge dimension", 3, `input x f32[T,${"9".repeat(30)}]`, "must be a whole number"],
    ["a long dimension", 3, `input x f32[${"(T+1)*".repeat(60)}T,4]`, "3:13: a dimension is longer than 200 characters"],
    ["a source of weights", 4, "weight w f32[2,4] = [1, 2, 3]", "4:8: weight 'w' f32[2,4]: 8 elements, but 3 values"],
    [
      "another source",
      4,
      'weight w f32[2,4] = tensr "x"',
      "4:21: expected 'tensor' or 'dequantised' or 'codes' or 'scales' or 'stacked' or 'rope', found 'tensr'",
    ],
    [
      "a slice",
      4,
      'weight w f32[2,4] = tensor "x" [0:2, 0:5]',
      "4:8: weight 'w' f32[2,4]: the slice [0:2, 0:5] has another shape",
    ],
    ["a string", 4, 'weight w f32[2,4] = tensor "x', "4:28: a string that does not end on its line, or has a bad escape"],
    [
      "a block",
      4,
      'weight w e4m3[2,4] = codes e4m3 block 0x4 of (tensor "x")',
      "4:8: weight 'w' e4m3[2,4]: block must be two positive integers, got 0x4",
    ],
    [
      "a stack of other things",
      4,
      "weight w f32[1,2,4] = stacked ([1, 2])",
      "4:23: matrices of a stack are read from tensors, not literal",
    ],
    [
      "a stack of another size",
      4,
      'weight w f32[2,2,4] = stacked (tensor "x")',
      "4:8: weight 'w' f32[2,2,4]: a stack of 1 matrices is [1, rows, columns]",
    ],
    [
      "codes of a stack",
      4,
      'weight w e4m3[1,2,4] = codes e4m3 block 1x4 of (stacked (tensor "x"))',
      "4:8: weight 'w' e4m3[1,2,4]: codes of a stack are a stack of codes",
    ],
    ["a weight's state", 4, "weight w kv<f32,1x4> = [1]", "4:8: weight 'w' must be a tensor"],
    ["a cache", 5, "state kv0 kv<f16,1x4>", "5:14: expected bf16, f32, e4m3, i8, found 'f16'"],
    ["a state that is a tensor", 5, "state kv0 f32[2]", "5:7: state 'kv0' must be kv<...>"],
    ["an op", 6, "y f32[T,2] = linaer(x, w)", "6:14: there is no op 'linaer'; the nearest is 'linear'"],
    ["an input", 6, "y f32[T,2] = linear(x, ww)", "6:24: 'ww' is not defined here; the nearest name is 'w'"],
    ["an attribute", 6, "y f32[T,2] = linear(x, w) {too: f32}", "6:14: linear: no attribute 'too'; it takes to, keep"],
    ["an attribute twice", 6, "y f32[T,2] = linear(x, w) {to: f32, to: f32}", "6:37: attribute 'to' is given twice"],
    ["a mixed list", 6, "y f32[T,2] = linear(x, w) {to: [1, a]}", "6:32: a list holds numbers or strings, not both"],
    ["a result's type", 6, "y f32[T,3] = linear(x, w)", "6:1: 'y' should be f32[T,2], is declared f32[T,3]"],
    ["results", 6, "y, z = linear(x, w)", "6:8: linear: gives 1 results, 2 named"],
    ["a name twice", 6, "x f32[T,2] = linear(x, w)", "6:1: the name 'x' is defined twice"],
    ["a place", 6, "y f32[T,2] = linear(x, w) @moon", "6:14: 'moon' is not a place"],
    ["an unclosed call", 6, "y f32[T,2] = linear(x, w", "7:1: expected ')', found 'output'"],
    ["an unclosed body", 6, "y f32[T,2] = fused(x) { graph b", "7:9: expected '}', found the end of the text"],
    ["a body's state", 6, "y = fused(x) { graph b state k kv<f32,1x1> output k }", "6:30: a body has no weights and no states"],
    [
      "a body's symbol",
      6,
      "y = fused(x) { graph b symbol U 0..1 host input x f32[T,4] output x }",
      "6:31: a body has the symbols of the graph around it",
    ],
    [
      "a body out of reach",
      6,
      "y = fused(x) { graph b input a f32[T,4] z = neg(x) output z }",
      "6:49: 'x' is not defined here; the nearest name is 'a'",
    ],
    ["an output", 7, "output z", "7:8: 'z' is not defined here; the nearest name is"],
    ["an output's name", 7, "output", "7:7: expected a name, found the end of the text"],
    ["a strange character", 7, "output y €", '7:10: unexpected character "€"'],
    ["more after the end", 7, "output y }", "7:10: expected the end of the text, found '}'"],
  ];
  test.each(cases)("%s", (_, line, text, message) => {
    const bad = lines.map((l, i) => (i + 1 === line ? text : l)).join("\n");
    const error = (() => {
      try {
        parseGraph(bad, "dir/f.step3");
      } catch (e) {
        return e;
      }
      return undefined;
    })();
    expect(error).toBeInstanceOf(UserError);
    expect((error as Error).message).toContain(message);
    expect((error as Error).message.startsWith("dir/f.step3:")).toBe(true);
    expect((error as Error).message.split("\n").length).toBe(1);
  });
});

describe("garbage", () => {
  const onlyUserErrors = (text: string, read: (text: string) => unknown = parseGraph): void => {
    try {
      read(text);
    } catch (error) {
      if (!(error instanceof UserError)) throw new Error(`on ${JSON.stringify(text.slice(0, 2000))}`, { cause: error });
    }
  };

  test.each([
    ["brackets", "graph g x = neg(".repeat(100_000)],
    ["open brackets", "([{".repeat(200_000)],
    ["bodies", `graph g\n${"y = fused() { graph b\n".repeat(5000)}`],
    ["sources", `graph g weight w f32[1] = ${"codes i8 block 1x1 of (".repeat(5000)}`],
    ["dims", `graph g input x f32[${"(".repeat(5000)}`],
    ["quotes", '"'.repeat(100_000)],
    ["minus signs", `graph g weight w f32[1] = [${"-".repeat(100_000)}`],
    ["strange characters", "€".repeat(100_000)],
    ["comments", ";".repeat(100_000)],
    ["names", `graph ${"a".repeat(1_000_000)}`],
    ["a close name", `graph g input ${"a".repeat(100_000)} f32[1] y = neg(${"b".repeat(100_000)})`],
    ["nothing", ""],
    ["blanks", " \n\t\r\n".repeat(1000)],
    ["a huge number", "graph g symbol T 0..1e999 host"],
    ["many symbols multiplied", `graph g symbol A 0..9 host symbol B 0..9 host input x f32[${"(A+B+1)*".repeat(24)}1]`],
    ["constructor", "graph constructor input __proto__ f32[1] toString = neg(__proto__) {__proto__: 1} output toString"],
  ])("%s", (_, text) => {
    const start = performance.now();
    onlyUserErrors(text);
    onlyUserErrors(text, graphFromJson);
    expect(performance.now() - start).toBeLessThan(20_000);
  });

  test("flipped, cut, doubled and swapped bytes of a text: a graph or a UserError", () => {
    const random = randomNumbers(11);
    const below = (n: number): number => Math.floor(random() * n);
    const texts = [rich, printGraph(randomCase(1, { ops: 5 }).graph).slice(0, 4000)];
    const alphabet = 'abTxf 0123.,:;=@()[]{}<>+-*/"\\\n_é\0';
    for (let i = 0; i < 3000; i++) {
      let text = texts[i % 8 === 0 ? 1 : 0] as string;
      for (let n = 1 + below(3); n > 0; n--) {
        const at = below(text.length);
        const to = Math.min(text.length, at + 1 + below(20));
        const kind = below(5);
        if (kind === 0) text = text.slice(0, at) + alphabet[below(alphabet.length)] + text.slice(at + 1);
        else if (kind === 1)
          text = text.slice(0, at) + String.fromCharCode(text.charCodeAt(at) ^ (1 << below(8))) + text.slice(at + 1);
        else if (kind === 2) text = text.slice(0, at) + text.slice(to);
        else if (kind === 3) text = text.slice(0, to) + text.slice(at);
        else {
          const from = below(text.length);
          text = text.slice(0, at) + text.slice(from, from + 1 + below(30)) + text.slice(to);
        }
      }
      onlyUserErrors(text);
    }
  });

  test("flipped bytes of the JSON of a graph: a graph or a UserError", () => {
    const random = randomNumbers(12);
    const below = (n: number): number => Math.floor(random() * n);
    const json = graphToJson(parseGraph(rich));
    for (let i = 0; i < 2000; i++) {
      const at = below(json.length);
      const text =
        below(2) === 0
          ? json.slice(0, at) + String.fromCharCode(json.charCodeAt(at) ^ (1 << below(7))) + json.slice(at + 1)
          : json.slice(0, at) + json.slice(at + 1 + below(12));
      onlyUserErrors(text, graphFromJson);
    }
    for (const text of ["[]", "null", "{}", "[".repeat(100_000), `${'{"name":'.repeat(5000)}1${"}".repeat(5000)}`])
      onlyUserErrors(text, graphFromJson);
  });
});

describe("JSON", () => {
  test("canonical: keys sorted, undefined left out", () => {
    expect(canonicalJson({ b: [1, "x", null], a: { d: true, c: undefined } })).toBe('{"a":{"d":true},"b":[1,"x",null]}');
    expect(() => canonicalJson({ a: NaN })).toThrow("canonical JSON has no NaN");
  });
  test("everything of a graph comes back", () => {
    const g = parseGraph(rich);
    expect(graphFromJson(graphToJson(g))).toEqual(g);
    expect(printGraph(graphFromJson(graphToJson(g)))).toBe(printGraph(g));
    const spread = { ...g, ops: g.ops.map((op) => ({ ...op, attrs: Object.fromEntries(Object.entries(op.attrs).reverse()) })) };
    expect(graphToJson(spread)).toBe(graphToJson(g));
    expect(printGraph(spread)).toBe(printGraph(g));
  });
  test("errors name the place", () => {
    const json = graphToJson(parseGraph("graph g\ninput x f32[2]\ny = neg(x)\noutput y"));
    expect(() => graphFromJson(json.replace('"inputs":["x"]', '"inputs":["z"]'))).toThrow(
      "graph JSON: $.ops[0].inputs[0] is 'z', which is not defined",
    );
    expect(() => graphFromJson(json.replace('"type":"f32[2]"', '"type":"f32[2"'))).toThrow(
      /graph JSON: \$\..*\.type is not a type/,
    );
    expect(() => graphFromJson(json.replace('"kind"', '"kin"'))).toThrow("has a member 'kin'");
    expect(() => graphFromJson("{")).toThrow("graph JSON: ");
  });
});

test("a graph parsed from its text runs, states and all", () => {
  const g = parseGraph(`graph g
    symbol T 0..4 host
    input x f32[T,4]
    input pages i32[T,2]
    input position i32[T]
    state kv0 kv<f32,1x4>
    kv1 = kv_append(kv0, x, x, pages, position)
    o = attention(x, kv1, pages, position) {heads: 1, scale: 0.5}
    output o`);
  const x = { kind: "tensor", dtype: "f32", shape: [1, 4], data: Float64Array.of(1, 2, 3, 4) } satisfies Tensor;
  const inputs = new Map<string, Tensor>([
    ["x", x],
    ["pages", { kind: "tensor", dtype: "i32", shape: [1, 2], data: Float64Array.of(1, 2) }],
    ["position", { kind: "tensor", dtype: "i32", shape: [1], data: Float64Array.of(0) }],
  ]);
  expect(evaluate(g, inputs, undefined, new Map([["kv0", kvState()]])).get("o")).toEqual(x);
});
