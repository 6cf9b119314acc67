/** Random graphs through the whole compiler and the runtime, against the interpreter. Several go into one graph, so that one build serves them. */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { onTarget } from "../compiler/eval.ts";
import { silent } from "../compiler/progress.ts";
import {
  drawTensor,
  evaluate,
  type Graph,
  type Op,
  parseGraph,
  printGraph,
  randomNumbers,
  type Tensor,
  type Value,
  verify,
} from "../ir/index.ts";
import { type RandomCase, randomCase } from "./random_graph.ts";
import { shareBuilds, workspace } from "./sample.ts";

const work = workspace("fuzz");
afterAll(work.remove);

/** The cases side by side: names get the number of their case, symbols are the same for all. */
const merge = (cases: readonly RandomCase[]): Graph => {
  const parts = cases.map(({ graph }, n): Graph => {
    const renamed = new Map<string, Value>();
    const value = (v: Value): Value => {
      const known = renamed.get(v.name) ?? { ...v, name: `c${n}_${v.name}` };
      renamed.set(v.name, known);
      return known;
    };
    const op = (o: Op): Op => ({ ...o, inputs: o.inputs.map(value), outputs: o.outputs.map(value) });
    return {
      ...graph,
      inputs: graph.inputs.map(value),
      weights: graph.weights.map((w) => ({ ...w, value: { ...w.value, ...value(w.value) } as typeof w.value })),
      ops: graph.ops.map(op),
      outputs: graph.outputs.map(value),
    };
  });
  const symbols = new Map(parts.flatMap((g) => g.symbols.map((s) => [s.name, s])));
  return {
    name: "fuzz",
    symbols: [...symbols.values()],
    states: [],
    inputs: parts.flatMap((g) => g.inputs),
    weights: parts.flatMap((g) => g.weights),
    ops: parts.flatMap((g) => g.ops),
    outputs: parts.flatMap((g) => g.outputs),
  };
};

const rows = 5;

test("random graphs on the C++ backend are what the interpreter says", async () => {
  shareBuilds();
  const cases = Array.from({ length: 12 }, (_, seed) => randomCase(4000 + seed, { rows }));
  const graph = merge(cases);
  verify(graph);
  const inputs = new Map<string, Tensor>();
  for (const [n, c] of cases.entries()) for (const [name, tensor] of c.inputs) inputs.set(`c${n}_${name}`, tensor);
  const file = join(work.path, "fuzz.step3");
  writeFileSync(file, printGraph(graph));
  const expected = evaluate(graph, inputs, undefined, undefined, new Map([["T", rows]]));
  const found = await onTarget(file, graph, inputs, { target: "cpp" }, silent);
  for (const [n, c] of cases.entries())
    for (const [name, allowed] of c.tolerance) {
      const [want, got] = [expected.get(`c${n}_${name}`), found.get(`c${n}_${name}`)];
      expect(got?.shape, `seed ${c.seed} ${name}`).toEqual(want?.shape);
      let worst = 0;
      for (const [i, w] of (want?.data ?? []).entries()) {
        const g = got?.data[i] as number;
        if (!(Object.is(g, w) || g === w)) worst = Math.max(worst, Math.abs(g - w));
        if (Number.isNaN(g) !== Number.isNaN(w)) worst = Number.POSITIVE_INFINITY;
      }
      expect(worst, `seed ${c.seed} ${name}`).toBeLessThanOrEqual(allowed);
    }
}, 300_000);

test("a contraction with an operand that is an input, not a weight", async () => {
  const file = join(work.path, "computed.step3");
  writeFileSync(
    file,
    `graph computed
symbol T 0..8 host
input x f32[T,40]
input w f32[24,40]
y f32[T,24] = linear(x, w) {to: f32}
output y
`,
  );
  shareBuilds();
  const graph = parseGraph(readFileSync(file, "utf8"), file);
  const random = randomNumbers(3);
  const draw = (shape: number[]): Tensor => drawTensor({ kind: "tensor", dtype: "f32", shape }, "normal", random);
  const inputs = new Map([
    ["x", draw([6, 40])],
    ["w", draw([24, 40])],
  ]);
  const want = evaluate(graph, inputs).get("y")?.data ?? new Float64Array();
  const got = (await onTarget(file, graph, inputs, { target: "cpp" }, silent)).get("y")?.data ?? new Float64Array();
  expect(got).toHaveLength(6 * 24);
  for (const [i, w] of want.entries()) expect(Math.abs((got[i] as number) - w)).toBeLessThan(1e-4);
});
