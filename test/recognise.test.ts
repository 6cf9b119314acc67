/** What the pass `recognise` finds however a graph is written, and what it says where something is not quite there. */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { runPasses } from "../compiler/pass.ts";
import { fold } from "../compiler/passes/fold.ts";
import { recognise } from "../compiler/passes/recognise.ts";
import { type Graph, parseGraph, randomNumbers, type Tensor } from "../ir/index.ts";
import { disguised, drawnInputs, drawnWeights, relativeError, run } from "./pass_cases.ts";

const list = [fold, recognise];
const kinds = (g: Graph): string[] => g.ops.map((op) => op.kind).sort();

/** The same graph with operands of commutative ops in another order. */
const permuted = (g: Graph, seed: number): Graph => {
  const random = randomNumbers(seed);
  const ops = g.ops.map((op) =>
    ["add", "mul", "and", "maximum"].includes(op.kind) && random() < 0.5 ? { ...op, inputs: op.inputs.toReversed() } : op,
  );
  return { ...g, ops };
};

const goldens = join(import.meta.dirname, "golden", "passes");
const sources = readdirSync(goldens).filter((f) => /^recognise_.*(?<!\.out)\.step3$/.test(f));

describe("names, the order of ops and the order of operands change nothing", () => {
  test.each(sources)("%s", (file) => {
    const graph = parseGraph(readFileSync(join(goldens, file), "utf8"));
    const weights = drawnWeights(graph, 7);
    const inputs = drawnInputs(graph, 5, 8);
    const expected = kinds(runPasses(graph, list));
    const before = run(graph, weights, inputs);
    for (let seed = 1; seed <= 6; seed++) {
      const result = runPasses(disguised(permuted(graph, seed), seed), list);
      expect(kinds(result)).toEqual(expected);
      for (const [name, y] of run(result, weights, inputs)) {
        const reference = before.get(name) as Tensor;
        const allowed = y.dtype === "bf16" ? 2 ** -7 : y.dtype === "f16" ? 2 ** -10 : 1e-5;
        expect(relativeError(y, reference), `${name} seed ${seed}`).toBeLessThan(allowed);
      }
    }
  });
});

/** What `--explain NAME` prints of recognise. */
const explained = (text: string, name: string): string | undefined => recognise.explain?.(parseGraph(text), name);

const rms = (middle: string): string => `graph g
symbol T 1..8 host
input x f32[T,4,16]
input y f32[T,4,16]
weight w f32[16] = tensor "w"
eps = const() {value: 0.00001, dtype: f32}
${middle}
output z
`;
const attention = (middle: string, more: string = ""): string => `graph g
symbol S 1..8 host
input q f32[1,4,S,8]
input k f32[1,2,S,8]
input v f32[1,2,S,8]
input wide f32[1,4,S,8]
${more}
scale = const() {value: 0.25, dtype: f32}
k5 = reshape(k) {shape: ["1","2","1","S","8"]}
kb = broadcast(k5) {shape: ["1","2","2","S","8"]}
k4 = reshape(kb) {shape: ["1","4","S","8"]}
v5 = reshape(v) {shape: ["1","2","1","S","8"]}
vb = broadcast(v5) {shape: ["1","2","2","S","8"]}
v4 = reshape(vb) {shape: ["1","4","S","8"]}
kt = transpose(k4) {perm: [0,1,3,2]}
${middle}
output z
`;

const misses: readonly (readonly [what: string, name: string, text: string, said: string | RegExp])[] = [
  [
    "the mean over another axis",
    "rms_norm",
    rms(`s = mul(x, x)
t = transpose(s) {perm: [0,2,1]}
m = reduce(t) {fn: mean}
r = reshape(m) {shape: ["T","1","16"]}
e = add(r, eps)
i = rsqrt(e)
n = mul(x, i)
z = mul(n, w)`),
    "rms_norm at z: the mean is over axis 1, not the last\n",
  ],
  [
    "epsilon outside the mean",
    "z",
    rms(`s = mul(x, x)
m = reduce(s) {fn: mean}
r = sqrt(m)
e = add(r, eps)
n = div(x, e)
z = mul(n, w)`),
    /rms_norm at z: the divisor is made by add, not sqrt\n/,
  ],
  [
    "squares of another value",
    "rms_norm",
    rms(`s = mul(y, y)
m = reduce(s) {fn: mean}
e = add(m, eps)
i = rsqrt(e)
n = mul(x, i)
z = mul(n, w)`),
    "rms_norm at z: the squares are of 'y', and 'x' is divided\n",
  ],
  [
    "the sigmoid of another value",
    "silu",
    rms(`s = sigmoid(y)
z = mul(x, s)`),
    "silu at z: the sigmoid is of 'y', and 'x' is multiplied\n",
  ],
  [
    "another cubic coefficient",
    "gelu",
    rms(`c1 = const() {value: 0.0447, dtype: f32}
c2 = const() {value: 0.7978846, dtype: f32}
half = const() {value: 0.5, dtype: f32}
one = const() {value: 1, dtype: f32}
x2 = mul(x, x)
x3 = mul(x2, x)
k = mul(x3, c1)
i = add(x, k)
ic = mul(c2, i)
t = tanh(ic)
t1 = add(t, one)
hx = mul(half, x)
z = mul(hx, t1)`),
    /gelu at z: the cubic term has the factor 0\.0447\d*, not 0\.044715\n/,
  ],
  [
    "a scale that is no constant",
    "sdpa",
    attention(
      `s = matmul(q, kt)
t = mul(s, by)
p = softmax(t)
z = matmul(p, v4)`,
      "input by f32[1]",
    ),
    "sdpa at z: scores are scaled by 'by', which is no constant\n",
  ],
  [
    "a mask of another shape",
    "sdpa",
    attention(
      `s = matmul(q, kt)
t = mul(s, scale)
m = add(t, mask)
p = softmax(m)
z = matmul(p, v4)`,
      "input mask f32[3,1,S,S]",
    ),
    /sdpa at z: .*f32\[3,1,S,S\] does not broadcast to the scores/,
  ],
  [
    "probabilities that are used elsewhere",
    "sdpa",
    attention(`s = matmul(q, kt)
p = softmax(s)
o = matmul(p, v4)
a = reduce(p) {fn: max}
z = mul(o, a)`),
    "sdpa at o: the probabilities 'p' are used elsewhere\n",
  ],
  [
    "scores that are filled with what may count",
    "sdpa",
    attention(
      `fill = const() {value: -100, dtype: f32}
s = matmul(q, kt)
t = where(seen, s, fill)
p = softmax(t)
z = matmul(p, v4)`,
      "input seen bool[S,S]",
    ),
    "sdpa at z: scores are replaced by -100\n",
  ],
];

test.each(misses)("--explain: %s", (_, name, text, said) => {
  expect(explained(text, name)).toMatch(said);
  const graph = parseGraph(text);
  const found = ["rms_norm", "silu", "gelu", "sdpa"];
  expect(runPasses(graph, list).ops.filter((op) => found.includes(op.kind))).toEqual([]);
});

describe("attention", () => {
  const sdpaOf = (text: string): Graph["ops"][number] | undefined =>
    runPasses(parseGraph(text), list).ops.find((op) => op.kind === "sdpa");
  const inputsOf = (text: string): string[] | undefined => sdpaOf(text)?.inputs.map((v) => v.name);

  test("with the scale on q, on k, on both or on their product", () => {
    for (const middle of [
      "qs = mul(scale, q)\ns = matmul(qs, kt)\np = softmax(s)\nz = matmul(p, v4)",
      "ks = mul(kt, scale)\ns = matmul(q, ks)\np = softmax(s)\nz = matmul(p, v4)",
      "four = const() {value: 4, dtype: f32}\ns = matmul(q, kt)\nt = div(s, four)\np = softmax(t)\nz = matmul(p, v4)",
      "half = const() {value: 0.5, dtype: f32}\nqs = mul(q, half)\nks = mul(half, kt)\ns = matmul(qs, ks)\np = softmax(s)\nz = matmul(p, v4)",
    ]) {
      expect(inputsOf(attention(middle))).toEqual(["q", "k", "v"]);
      expect(sdpaOf(attention(middle))?.attrs).toEqual({ scale: 0.25 });
    }
  });

  test("keys that were repeated and values that were not stay as they are", () => {
    expect(inputsOf(attention("s = matmul(q, kt)\np = softmax(s)\nz = matmul(p, wide)"))).toEqual(["q", "k4", "wide"]);
  });

  test("a mask of places alone is causal", () => {
    const masked = (place: string): string =>
      attention(`${place}
j = iota() {shape: ["1","S"], axis: 1, dtype: i64}
seen = less_equal(j, i)
none = const() {value: "-inf", dtype: f32}
s = matmul(q, kt)
t = where(seen, s, none)
p = softmax(t)
z = matmul(p, v4)`).replace('"-inf"', "-inf");
    expect(sdpaOf(masked('i = iota() {shape: ["S","1"], axis: 0, dtype: i64}'))?.attrs).toEqual({ scale: 1, causal: "first" });
    expect(inputsOf(masked('i = iota() {shape: ["S","1"], axis: 0, dtype: i64}'))).toHaveLength(3);
    const later = 'r = iota() {shape: ["S","1"], axis: 0, dtype: i64}\none = const() {value: 1, dtype: i64}\ni = add(r, one)';
    expect(sdpaOf(masked(later))?.attrs).toEqual({ scale: 1 });
    expect(inputsOf(masked(later))).toHaveLength(4);
  });

  test("several masks become one", () => {
    const text = attention(
      `least = const() {value: -3e38, dtype: f32}
s = matmul(q, kt)
a = add(s, bias)
t = where(seen, a, least)
p = softmax(t)
z = matmul(p, v4)`,
      "input seen bool[S,S]\ninput bias f32[4,1,S]",
    );
    expect(inputsOf(text)).toHaveLength(4);
    const graph = parseGraph(text);
    const [weights, inputs] = [drawnWeights(graph, 1), drawnInputs(graph, 6, 2)];
    const [before, after] = [graph, runPasses(graph, list)].map((g) => run(g, weights, inputs).get("z") as Tensor);
    expect(relativeError(after as Tensor, before as Tensor)).toBeLessThan(1e-5);
  });
});

/** A layer of a decoder as exporters write it: every norm, rotation, group of heads and product by itself. */
const layer = (): string => {
  const linear = (y: string, x: string, w: string, columns: number): string =>
    `${y}_r = reshape(${x}) {shape: ["B*S","${x === "act" ? 48 : 32}"]}
${y}_l = linear(${y}_r, ${w})
${y} = reshape(${y}_l) {shape: ["B","S","${columns}"]}`;
  const norm = (y: string, x: string, w: string): string =>
    `${y}_s = mul(${x}, ${x})
${y}_m = reduce(${y}_s) {fn: mean}
${y}_e = add(${y}_m, eps)
${y}_q = sqrt(${y}_e)
${y}_i = div(one, ${y}_q)
${y}_n = mul(${x}, ${y}_i)
${y} = mul(${w}, ${y}_n)`;
  const heads = (y: string, x: string, count: number): string =>
    `${y}_h = reshape(${x}) {shape: ["B","S","${count}","8"]}
${y} = transpose(${y}_h) {perm: [0,2,1,3]}`;
  const turned = (y: string, x: string): string =>
    `${y}_a = slice(${x}) {axis: 3, start: 0, size: [4]}
${y}_b = slice(${x}) {axis: 3, start: 4, size: [4]}
${y}_n = neg(${y}_b)
${y}_r = concat(${y}_n, ${y}_a) {axis: 3}
${y}_c = mul(${x}, cos)
${y}_s = mul(${y}_r, sin)
${y} = add(${y}_c, ${y}_s)`;
  const repeated = (y: string, x: string): string =>
    `${y}_5 = reshape(${x}) {shape: ["B","2","1","S","8"]}
${y}_b = broadcast(${y}_5) {shape: ["B","2","2","S","8"]}
${y} = reshape(${y}_b) {shape: ["B","4","S","8"]}`;
  return `graph layer
symbol B 1..4 host
symbol S 1..8 host
input x f32[B,S,32]
input cos f32[1,1,S,8]
input sin f32[1,1,S,8]
input mask f32[B,1,S,S]
weight n1 f32[32] = tensor "n1"
weight n2 f32[32] = tensor "n2"
weight wq f32[32,32] = tensor "wq"
weight wk f32[16,32] = tensor "wk"
weight wv f32[16,32] = tensor "wv"
weight wo f32[32,32] = tensor "wo"
weight wg f32[48,32] = tensor "wg"
weight wu f32[48,32] = tensor "wu"
weight wd f32[32,48] = tensor "wd"
one = const() {value: 1, dtype: f32}
eps = const() {value: 0.000001, dtype: f32}
scale = const() {value: 0.35355338, dtype: f32}
${norm("h", "x", "n1")}
${linear("q", "h", "wq", 32)}
${linear("k", "h", "wk", 16)}
${linear("v", "h", "wv", 16)}
${heads("qh", "q", 4)}
${heads("kh", "k", 2)}
${heads("vh", "v", 2)}
${turned("qt", "qh")}
${turned("kt", "kh")}
${repeated("k4", "kt")}
${repeated("v4", "vh")}
k4t = transpose(k4) {perm: [0,1,3,2]}
s = matmul(qt, k4t)
ss = mul(s, scale)
sm = add(ss, mask)
p = softmax(sm)
a = matmul(p, v4)
at = transpose(a) {perm: [0,2,1,3]}
ar = reshape(at) {shape: ["B","S","32"]}
${linear("o", "ar", "wo", 32)}
x1 = add(x, o)
${norm("h2", "x1", "n2")}
${linear("g", "h2", "wg", 48)}
${linear("u", "h2", "wu", 48)}
gs = sigmoid(g)
ga = mul(g, gs)
act = mul(ga, u)
${linear("d", "act", "wd", 32)}
y = add(x1, d)
output y
`;
};

test("a layer of a decoder is norms, linears, rotations and one attention", () => {
  const graph = parseGraph(layer());
  const [weights, inputs] = [drawnWeights(graph, 4), drawnInputs(graph, 3, 5)];
  const expected = run(graph, weights, inputs).get("y") as Tensor;
  for (let seed = 1; seed <= 3; seed++) {
    const result = runPasses(disguised(permuted(graph, seed), seed), list);
    const moves = ["reshape", "transpose"];
    expect(kinds(result).filter((kind) => !moves.includes(kind))).toEqual(
      "add add linear linear linear linear linear linear linear mul rms_norm rms_norm rope rope sdpa silu".split(" "),
    );
    expect(relativeError(run(result, weights, inputs).get("y") as Tensor, expected)).toBeLessThan(1e-5);
  }
});

test("the limit bounds what is recognised", () => {
  const graph = parseGraph(readFileSync(join(goldens, "recognise_activations.step3"), "utf8"));
  const found = (limit: number): number =>
    runPasses(graph, [recognise], { limit }).ops.filter((op) => ["silu", "gelu"].includes(op.kind)).length;
  expect([0, 1, 2, 3, 9].map(found)).toEqual([0, 1, 2, 3, 3]);
});
