import { describe, expect, test } from "vitest";
import {
  Builder,
  type DimSymbol,
  evaluate,
  type Graph,
  type Op,
  type Place,
  parseGraph,
  printGraph,
  rewrite,
  type Tensor,
  tensor,
  UserError,
  type Value,
  verify,
} from "../ir/index.ts";
import { randomCase } from "./random_graph.ts";

const symbols: readonly DimSymbol[] = [{ name: "T", min: 0, max: 8, multiple: 1, source: "host" }];

/** Both sides, two FFN ranks, a state, a fused op, two exchanges. */
const whole = parseGraph(`graph whole
symbol T 0..8 host
input x f32[T,4]
input pages i32[T,2]
input position i32[T]
weight w f32[4,4] = tensor "w"
weight w0 f32[4,4] = tensor "w" [0:4, 0:4]
state kv0 kv<f32,1x4>
kv1 kv<f32,1x4> = kv_append(kv0, x, x, pages, position) @attention from "layers.0.attn"
o f32[T,4] = attention(x, kv1, pages, position) {heads: 1, scale: 0.5} @attention from "layers.0.attn"
a0 f32[T,4], a1 f32[T,4] = dispatch(o) {exchange: 0, ranks: 2} @attention
b0 f32[T,4] = linear(a0, w) @ffn0 from "layers.0.mlp"
b1 f32[T,4] = linear(a1, w0) @ffn1 from "layers.0.mlp"
c0 f32[T,4], c1 f32[T,4] = collect(b0, b1) {exchange: 0} @attention
s f32[T,4] = fused(c0, c1) @attention from "layers.0.add" {
  graph body
  input p f32[T,4]
  input q f32[T,4]
  t f32[T,4] = add(p, q)
  output t
}
d0 f32[T,4], d1 f32[T,4] = dispatch(s) {exchange: 1, ranks: 2} @attention
e0 f32[T,4] = neg(d0) @ffn0
e1 f32[T,4] = neg(d1) @ffn1
f0 f32[T,4], f1 f32[T,4] = collect(e0, e1) {exchange: 1} @attention
y f32[T,4] = add(f0, f1) @attention
output y
`);

const change = (result: string, edit: (op: Op) => Partial<Op>): Graph => ({
  ...whole,
  ops: whole.ops.map((op) => (op.outputs.some((v) => v.name === result) ? { ...op, ...edit(op) } : op)),
});
const without = (result: string): Graph => ({ ...whole, ops: whole.ops.filter((op) => op.outputs[0]?.name !== result) });
const moved = (result: string, to: number): Graph => {
  const rest = without(result).ops;
  const op = whole.ops.find((o) => o.outputs[0]?.name === result) as Op;
  return { ...whole, ops: [...rest.slice(0, to), op, ...rest.slice(to)] };
};
const value = (name: string): Value =>
  [...whole.inputs, ...whole.states, ...whole.weights.map((w) => w.value), ...whole.ops.flatMap((op) => op.outputs)].find(
    (v) => v.name === name,
  ) as Value;

describe("verify", () => {
  test("accepts what is right", () => {
    verify(whole);
    for (let seed = 100; seed < 110; seed++) verify(randomCase(seed).graph);
  });

  const body = (g: Partial<Graph>): Graph => change("s", (op) => ({ body: { ...(op.body as Graph), ...g } }));
  const bodyOp = (edit: (op: Op) => Op): Graph =>
    change("s", (op) => ({ body: { ...(op.body as Graph), ops: (op.body as Graph).ops.map(edit) } }));

  const cases: readonly [string, Graph, string][] = [
    [
      "a wrong type",
      change("o", (op) => ({ outputs: [{ name: "o", type: tensor("bf16", ["T", 4]) }, ...op.outputs.slice(1)] })),
      "op 'attention' -> 'o' (layers.0.attn): 'o' should be f32[T,4], is bf16[T,4]",
    ],
    [
      "a wrong number of results",
      change("o", (op) => ({ outputs: [...op.outputs, { name: "extra", type: tensor("f32", []) }] })),
      "has 1 results, not 2",
    ],
    ["inputs that make no sense", change("b0", () => ({ inputs: [value("a0"), value("x")] })), "(layers.0.mlp): linear:"],
    ["an unknown op", change("b0", () => ({ kind: "linera" })), "there is no op 'linera'; the nearest is 'linear'"],
    ["an unknown attribute", change("b0", () => ({ attrs: { bias: true } })), "linear: no attribute 'bias'; it takes to, keep"],
    ["a use before the definition", moved("o", 0), "op 'attention' -> 'o' (layers.0.attn): 'kv1' is used before it is defined"],
    ["a definition that is gone", without("b0"), "'b0' is used before it is defined"],
    [
      "a copy of a value with another type",
      change("y", () => ({ inputs: [{ name: "f0", type: tensor("f32", ["T", 1]) }, value("f1")] })),
      "'f0' is f32[T,4], used as f32[T,1]",
    ],
    [
      "a name twice",
      change("e0", () => ({ outputs: [{ name: "b0", type: tensor("f32", ["T", 4]) }] })),
      "op 'neg' -> 'b0': the name 'b0' is defined twice",
    ],
    [
      "a name that is none",
      change("e0", () => ({ outputs: [{ name: "b-0", type: tensor("f32", ["T", 4]) }] })),
      "'b-0' is not an identifier",
    ],
    ["a graph's name that is none", { ...whole, name: "" }, "'' is not an identifier"],
    ["an undeclared symbol", { ...whole, symbols: [] }, "symbol 'T' is not declared"],
    ["a symbol twice", { ...whole, symbols: [...symbols, ...symbols] }, "symbol 'T' is declared twice"],
    [
      "a symbol's range",
      { ...whole, symbols: [{ ...(symbols[0] as DimSymbol), multiple: 0 }] },
      "multiple >= 1, got 0..8 multiple 0",
    ],
    [
      "a dimension not in canonical form",
      { ...whole, inputs: [...whole.inputs, { name: "n", type: tensor("f32", ["T*2"]) }] },
      "dimension 'T*2' is not in canonical form (2*T)",
    ],
    [
      "a dimension that is no size",
      { ...whole, inputs: [...whole.inputs, { name: "n", type: tensor("f32", [1.5]) }] },
      "dimension 1.5 must be a whole number",
    ],
    [
      "a dimension past 2^53",
      {
        ...whole,
        symbols: [{ ...(symbols[0] as DimSymbol), max: 2 ** 52 }],
        inputs: [...whole.inputs, { name: "n", type: tensor("f32", ["3*T"]) }],
      },
      "when its symbols are at their max",
    ],
    [
      "a state as an input",
      { ...whole, inputs: [...whole.inputs, { name: "n", type: value("kv0").type }] },
      "input 'n' must be a tensor",
    ],
    [
      "a tensor as a state",
      { ...whole, states: [...whole.states, { name: "n", type: tensor("f32", []) }] },
      "state 'n' must be kv<...>, got f32[]",
    ],
    [
      "an old version of a state",
      change("o", () => ({ inputs: [value("x"), value("kv0"), value("pages"), value("position")] })),
      "state 'kv0' was changed by op 'kv_append' -> 'kv1' (layers.0.attn); use the version it gave",
    ],
    [
      "a state changed twice",
      {
        ...whole,
        ops: [
          whole.ops[0] as Op,
          { ...(whole.ops[0] as Op), outputs: [{ name: "kv2", type: value("kv0").type }] },
          ...whole.ops.slice(1),
        ],
      },
      "op 'kv_append' -> 'kv2' (layers.0.attn): state 'kv0' was changed",
    ],
    [
      "an op without a place",
      {
        ...whole,
        ops: whole.ops.map(({ place, ...op }) => (op.outputs[0]?.name === "y" ? op : { ...op, ...(place ? { place } : {}) })),
      },
      "op 'add' -> 'y': has no place, though other ops have",
    ],
    ["a place that is none", change("y", () => ({ place: "ffn-1" as Place })), "'ffn-1' is not a place"],
    [
      "a value from the other side",
      change("y", () => ({ inputs: [value("f0"), value("e1")] })),
      "op 'add' -> 'y': runs on 'attention' but 'e1' is on 'ffn1'; values cross by dispatch and collect",
    ],
    ["an input on the FFN side", change("e0", () => ({ inputs: [value("x")] })), "runs on 'ffn0' but 'x' is on 'attention'"],
    ["another rank's value", change("e1", () => ({ inputs: [value("d0")] })), "runs on 'ffn1' but 'd0' is on 'ffn0'"],
    [
      "a state op on the FFN side",
      change("o", () => ({ place: "ffn0" as Place })),
      "cannot run on 'ffn0': its rows are not independent",
    ],
    [
      "partials in another order",
      change("c0", (op) => ({ inputs: [...op.inputs].reverse() })),
      "op 'collect' -> 'c0', 'c1': 'b1' is on 'ffn1', partial 0 comes from ffn0",
    ],
    [
      "a partial from attention",
      change("c0", () => ({ inputs: [value("o"), value("b1")] })),
      "'o' is on 'attention', partial 0 comes from ffn0",
    ],
    [
      "too few partials",
      change("f0", (op) => ({ inputs: op.inputs.slice(0, 1), outputs: op.outputs.slice(0, 1) })),
      "takes 1 partials from 2 FFN ranks",
    ],
    ["a dispatch on the FFN side", change("d0", () => ({ place: "ffn0" as Place })), "has place 'ffn0', must have attention"],
    ["exchanges out of order", change("d0", () => ({ attrs: { exchange: 2, ranks: 2 } })), "is exchange 2, should be 1"],
    ["a collect of another exchange", change("c0", () => ({ attrs: { exchange: 1 } })), "is exchange 1, should be 0"],
    ["a dispatch while one is open", moved("c0", 8), "'c0' is used before"],
    [
      "an exchange that nothing answers",
      { ...without("f0"), ops: without("f0").ops.slice(0, -1), outputs: [value("s")] },
      "op 'dispatch' -> 'd0', 'd1': no collect answers it",
    ],
    [
      "an output that is not defined",
      { ...whole, outputs: [{ name: "z", type: tensor("f32", []) }] },
      "output 'z' is not defined",
    ],
    [
      "an output of another type",
      { ...whole, outputs: [{ name: "y", type: tensor("f32", []) }] },
      "output 'y' is f32[T,4], not f32[]",
    ],
    ["an output twice", { ...whole, outputs: [value("y"), value("y")] }, "'y' is an output twice"],
    ["an output on the FFN side", { ...whole, outputs: [value("e0")] }, "output 'e0' is on 'ffn0', not on attention"],
    [
      "a weight's slice",
      {
        ...whole,
        weights: [
          ...whole.weights,
          { value: { name: "n", type: tensor("f32", [3]) }, source: { kind: "tensor", tensor: "t", slice: [[1, 3]] } },
        ],
      },
      "weight 'n' f32[3]: the slice [1:3] has another shape",
    ],
    [
      "a weight of symbolic shape",
      { ...whole, weights: [{ value: { name: "n", type: tensor("f32", ["T"]) }, source: { kind: "tensor", tensor: "t" } }] },
      "the shape of a weight must be constant",
    ],
    [
      "scales that are not f32",
      {
        ...whole,
        weights: [
          {
            value: { name: "n", type: tensor("bf16", [1]) },
            source: { kind: "scales", of: { kind: "tensor", tensor: "t" }, to: "e4m3", block: [1, 1] },
          },
        ],
      },
      "scales are f32",
    ],
    [
      "a matrix of a stack in another shape",
      {
        ...whole,
        weights: [
          {
            value: { name: "n", type: tensor("f32", [1, 3, 2]) },
            source: {
              kind: "stacked",
              of: [
                {
                  kind: "tensor",
                  tensor: "t",
                  slice: [
                    [0, 2],
                    [0, 2],
                  ],
                },
              ],
            },
          },
        ],
      },
      "weight 'n' f32[3,2]: the slice [0:2, 0:2] has another shape",
    ],
    [
      "a rope table of another size",
      {
        ...whole,
        weights: [
          { value: { name: "n", type: tensor("f32", [3, 2]) }, source: { kind: "rope", theta: 1e4, positions: 4, dim: 2 } },
        ],
      },
      "a rope table is f32[4,2]",
    ],
    [
      "a fused op without a body",
      {
        ...whole,
        ops: whole.ops.map((op) => Object.fromEntries(Object.entries(op).filter(([k]) => k !== "body")) as unknown as Op),
      },
      "fused: needs a body",
    ],
    ["a body on a plain op", change("y", () => ({ body: whole })), "only 'fused' has a body"],
    [
      "a body with a mistake",
      bodyOp((op) => ({ ...op, kind: "less" })),
      "graph 'body': op 'less' -> 't': 't' should be bool[T,4], is f32[T,4]",
    ],
    ["a body with places", bodyOp((op) => ({ ...op, place: "attention" })), "an op of a body has neither place nor body"],
    ["a body with weights", body({ weights: whole.weights }), "a body has no weights and no states"],
    ["a body with other symbols", body({ symbols: [] }), "a body has the symbols of the graph around it"],
    ["a body with other inputs", change("s", (op) => ({ inputs: op.inputs.slice(1) })), "fused: body takes 2 inputs, got 1"],
  ];
  test.each(cases)("refuses %s", (_, g, message) => {
    expect(() => verify(g)).toThrow(UserError);
    expect(() => verify(g)).toThrow(message);
  });

  test("before the shard there is one FFN side", () => {
    const g = (ffn: string, ranks: string): string => `graph g symbol T 0..8 host input x f32[T,4]
      a f32[T,4] = dispatch(x) {exchange: 0${ranks}} @attention
      b f32[T,4] = neg(a) @${ffn}
      c f32[T,4] = collect(b) {exchange: 0} @attention
      output c`;
    parseGraph(g("ffn", ""));
    parseGraph(g("ffn0", ", ranks: 1"));
    expect(() => parseGraph(g("ffn0", ""))).toThrow("runs on 'ffn0' but 'a' is on 'ffn'");
  });

  test("weights may be used on both sides", () => {
    parseGraph(`graph g symbol T 0..8 host input x f32[T,4] weight w f32[4] = [1, 2, 3, 4]
      h f32[T,4] = mul(x, w) @attention
      a f32[T,4] = dispatch(h) {exchange: 0} @attention
      b f32[T,4] = mul(a, w) @ffn
      c f32[T,4] = collect(b) {exchange: 0} @attention
      output c`);
  });
});

describe("Builder", () => {
  const start = (): { b: Builder; x: Value } => {
    const b = new Builder("g", symbols);
    return { b, x: b.input("x", tensor("f32", ["T", 4])) };
  };

  test("names results: as asked, else by kind, always free", () => {
    const { b, x } = start();
    const names = [
      b.op("neg", [x]),
      b.op("neg", [x]),
      b.op("neg", [x], {}, ["x"]),
      b.op("neg", [x], {}, ["q"]),
      b.op("neg", [x], {}, ["q"]),
      b.op("neg", [x], {}, ["q"]),
      b.op("neg", [x], {}, ["layers.0.q"]),
      b.op("neg", [x], {}, ["3d"]),
      b.op("neg", [x], {}, ["x1"]),
      b.op("neg", [x], {}, ["x1"]),
    ].map((v) => v.name);
    expect(names).toEqual(["neg_0", "neg_1", "x2", "q", "q2", "q3", "layers_0_q", "_3d", "x1", "x1_2"]);
  });

  test("puts origin and place on ops, and the origin on errors", () => {
    const { b, x } = start();
    b.place = "attention";
    b.at("layers.0").op("neg", [x]);
    expect(b.origin).toBe("layers.0");
    b.at(undefined).op("neg", [x]);
    expect(b.build().ops.map((op) => [op.origin, op.place])).toEqual([
      ["layers.0", "attention"],
      [undefined, "attention"],
    ]);
    expect(() => b.at("layers.1").op("linear", [x, x])).toThrow("layers.1: linear: axis 0 of w must be a constant");
  });

  test("outputs take names; one that must keep its own is copied", () => {
    const { b, x } = start();
    const y = b.op("neg", [x], {}, ["y"]);
    const z = b.op("exp", [y], {}, ["z"]);
    b.output(y, "first");
    b.output(y, "second");
    b.output(x, "third");
    b.output(z);
    b.op("abs", [y], {}, ["late"]);
    const g = b.build();
    verify(g);
    expect(g.outputs.map((v) => v.name)).toEqual(["first", "second", "third", "z"]);
    expect(g.ops.map((op) => `${op.outputs[0]?.name}=${op.kind}(${op.inputs[0]?.name})`)).toEqual([
      "first=neg(x)",
      "z=exp(first)",
      "second=cast(first)",
      "third=cast(x)",
      "late=abs(first)",
    ]);
    expect(() => b.output(z, "x")).toThrow("the name 'x' is taken");
  });

  test("names of inputs are kept, or refused", () => {
    const { b } = start();
    expect(() => b.input("x", tensor("f32", []))).toThrow("the name 'x' is taken");
    expect(() => b.weight("a.b", tensor("f32", [1]), { kind: "literal", values: [1] })).toThrow("'a.b' is not an identifier");
    expect(() => b.op("quantise", [b.input("q", tensor("f32", ["T", 4]))], { to: "i8" })).toThrow("has 2 results");
  });
});

describe("rewrite", () => {
  const g = parseGraph(`graph g
symbol T 0..8 host
input x f32[T,4]
a f32[T,4] = sigmoid(x) @attention from "one"
b f32[T,4] = mul(x, a) @attention from "two"
c f32[T,4] = neg(b) @attention from "three"
d f32[T,4] = exp(a) @attention
output c
output d
output a
`);
  const data = new Map<string, Tensor>([
    ["x", { kind: "tensor", dtype: "f32", shape: [1, 4], data: Float64Array.of(1, 2, -3, 0) }],
  ]);

  test("a rule that does nothing changes nothing, not even objects", () => {
    const same = rewrite(g, () => undefined);
    expect(same).toEqual(g);
    for (const [i, op] of same.ops.entries()) expect(op).toBe(g.ops[i]);
    expect(rewrite(whole, () => undefined)).toEqual(whole);
    expect(printGraph(rewrite(whole, () => undefined))).toBe(printGraph(whole));
  });

  test("new ops take origin, place and name of the old", () => {
    const out = rewrite(g, (op, b) =>
      op.kind === "mul" ? [b.op("sub", [b.op("add", [...op.inputs]), op.inputs[0] as Value])] : undefined,
    );
    verify(out);
    expect(printGraph(out)).toBe(`graph g
symbol T 0..8 host
input x f32[T,4]
a f32[T,4] = sigmoid(x) @attention from "one"
add_0 f32[T,4] = add(x, a) @attention from "two"
b f32[T,4] = sub(add_0, x) @attention from "two"
c f32[T,4] = neg(b) @attention from "three"
d f32[T,4] = exp(a) @attention
output c
output d
output a
`);
  });

  test("an earlier value can stand for a result, outputs keep their names", () => {
    const out = rewrite(g, (op) => (op.kind === "neg" || op.kind === "exp" ? [op.inputs[0] as Value] : undefined));
    verify(out);
    expect(out.outputs.map((v) => v.name)).toEqual(["c", "d", "a"]);
    const results = evaluate(out, data);
    const before = evaluate(g, data);
    expect(results.get("a")).toEqual(before.get("a"));
    expect(results.get("d")).toEqual(before.get("a"));
    const none = rewrite(g, (op) => (op.kind === "exp" || op.kind === "sigmoid" ? [op.inputs[0] as Value] : undefined));
    verify(none);
    expect(evaluate(none, data).get("a")).toEqual(data.get("x"));
  });

  test("what later ops infer changes with the types", () => {
    const out = rewrite(g, (op, b) => {
      if (op.kind !== "sigmoid") return undefined;
      return [
        b.op("where", [b.op("less", [...op.inputs, b.op("const", [], { value: 0, dtype: "f32" })]), ...op.inputs, ...op.inputs]),
      ];
    });
    verify(out);
    const narrowed = rewrite(parseGraph("graph n input x f32[2] y f32[2] = neg(x) z f32[2] = exp(y) output z"), (op, b) =>
      op.kind === "neg" ? [b.op("cast", [b.op("neg", [...op.inputs])], { to: "bf16" })] : undefined,
    );
    verify(narrowed);
    expect(printGraph(narrowed)).toContain("z bf16[2] = exp(y)");
    expect(() =>
      rewrite(g, (op, b) => (op.kind === "sigmoid" ? [b.op("cast", [...op.inputs], { to: "bf16" })] : undefined)),
    ).toThrow("two: mul: operands must have one dtype");
  });

  test("a value kept from an earlier rule stays good: one quantisation for two users", () => {
    const twice = parseGraph(`graph g
symbol T 0..8 host
input x f32[T,4]
weight w f32[2,4] = tensor "w"
h f32[T,4] = neg(x)
a f32[T,2] = linear(h, w)
b f32[T,2] = linear(h, w)
output a
output b
`);
    const seen = new Map<string, readonly Value[]>();
    const out = rewrite(twice, (op, b) => {
      if (op.kind !== "linear") return undefined;
      const [x] = op.inputs as [Value, Value];
      const codes = seen.get(x.name) ?? b.ops("quantise", [x], { to: "i8" });
      seen.set(x.name, codes);
      const source = { kind: "tensor", tensor: "w" } as const;
      const w = b.weight(`${op.outputs[0]?.name}_codes`, tensor("i8", [2, 4]), {
        kind: "codes",
        of: source,
        to: "i8",
        block: [1, 4],
      });
      const s = b.weight(`${op.outputs[0]?.name}_scales`, tensor("f32", [2, 1]), {
        kind: "scales",
        of: source,
        to: "i8",
        block: [1, 4],
      });
      return [b.op("scaled_linear", [...codes, w, s], { to: "f32", block: [1, 4] })];
    });
    verify(out);
    expect(out.ops.map((op) => op.kind)).toEqual(["neg", "quantise", "scaled_linear", "scaled_linear"]);
    expect(out.weights.map((w) => w.value.name)).toEqual(["w", "a_codes", "a_scales", "b_codes", "b_scales"]);
    expect(parseGraph(printGraph(out))).toEqual(out);
  });

  test("[] drops an op; a dropped op that is used is found by the verifier", () => {
    const out = rewrite(g, (op) => (op.kind === "exp" ? [] : undefined));
    expect(out.ops.length).toBe(3);
    expect(() => verify(out)).toThrow("output 'd' is not defined");
    expect(() => rewrite(g, (op) => (op.kind === "exp" ? [...op.inputs, ...op.inputs] : undefined))).toThrow(
      "a rule gave 2 values",
    );
    expect(() => rewrite(g, (op) => (op.kind === "exp" ? op.outputs : undefined))).toThrow("it gives undefined to keep an op");
  });

  test("fusing: the body is run where its last op was", () => {
    const out = rewrite(g, (op, b) => {
      if (op.kind !== "neg") return undefined;
      const inner = new Builder("body", g.symbols);
      const p = inner.input("p", tensor("f32", ["T", 4]));
      inner.output(inner.op("neg", [inner.op("abs", [p])]), "out");
      return b.fused([op.inputs[0] as Value], inner.build());
    });
    verify(out);
    expect(out.ops[2]).toMatchObject({ kind: "fused", origin: "three", place: "attention", outputs: [{ name: "c" }] });
    expect(parseGraph(printGraph(out))).toEqual(out);
    expect([...(evaluate(out, data).get("c") as Tensor).data].every((x) => x <= 0)).toBe(true);
  });

  test("every random graph survives being expanded op by op", async () => {
    const { knowledge } = await import("../ir/index.ts");
    for (let seed = 200; seed < 215; seed++) {
      const c = randomCase(seed);
      const out = rewrite(c.graph, (op, b) => knowledge(op.kind).expand?.(b, op));
      verify(out);
      expect(evaluate(out, c.inputs), `seed ${seed}`).toEqual(evaluate(c.graph, c.inputs));
    }
  });
});
