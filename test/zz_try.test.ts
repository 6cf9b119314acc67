import { expect, test } from "vitest";
import { type Datum, evaluate, knowledge, type Knowledge, randomNumbers, rounder, type Tensor, type Type, verify } from "../ir/index.ts";
import { interpret } from "../ir/interpret.ts";
import { randomCase } from "./random_graph.ts";
const inexact = "exp log sqrt rsqrt tanh erf sigmoid silu gelu sin cos rms_norm softmax linear scaled_linear grouped_linear scaled_grouped_linear combine rotary".split(" ");
const perturbed = (random: () => number) => (kind: string): Knowledge => {
  const k = knowledge(kind);
  if (!inexact.includes(kind) && kind !== "reduce") return k;
  return { ...k, evaluate(inputs, attrs, outputs, body) {
    if (kind === "reduce" && attrs.fn !== "sum" && attrs.fn !== "mean") return k.evaluate(inputs, attrs, outputs, body);
    const wide = outputs.map((t) => ({ ...t, dtype: "f64" }) as Type);
    const contraction = /linear|reduce|combine|rotary/.test(kind);
    return k.evaluate(inputs, attrs, wide, body).map((d: Datum, i) => {
      const t = d as Tensor; const dtype = (outputs[i] as Tensor).dtype; const round = rounder(dtype);
      const columns = t.shape.at(-1) ?? 1;
      return { ...t, dtype, data: t.data.map((x, j) => {
        const row = Math.floor(j / columns) * columns;
        const size = contraction ? Math.max(...t.data.subarray(row, row + columns).map(Math.abs)) : Math.abs(x);
        return round(x + size * (random() * 2 - 1) * 2 ** -21.5);
      }) };
    });
  } };
};
test("x", () => {
  let worst = 0; const hist: Record<string, number> = {};
  for (let seed = 0; seed < 400; seed++) {
    const c = randomCase(seed); verify(c.graph);
    for (const op of c.graph.ops) hist[op.kind] = (hist[op.kind] ?? 0) + 1;
    const values = new Map<string, Datum>([...c.inputs]);
    for (const w of c.graph.weights) values.set(w.value.name, { kind: "tensor", dtype: w.value.type.dtype, shape: w.value.type.shape as number[], data: Float64Array.from((w.source as {values: number[]}).values) });
    interpret(c.graph.ops, values, c.symbols, perturbed(randomNumbers(seed)));
    const right = evaluate(c.graph, c.inputs);
    for (const [n, t] of right) {
      const p = values.get(n) as Tensor; const tol = c.tolerance.get(n) as number;
      let d = 0, m = 0; t.data.forEach((x, i) => { d = Math.max(d, Math.abs(x - (p.data[i] as number))); m = Math.max(m, Math.abs(x)); });
      if (d > tol) console.log("BAD", seed, n, d, tol, m, c.graph.ops.find(o => o.outputs[0]?.name === n)?.kind);
      if (tol > 0) worst = Math.max(worst, d / tol);
      if (tol > 0.05 * m && m > 0) hist.loose = (hist.loose ?? 0) + 1; else if (tol > 0) hist.tight = (hist.tight ?? 0) + 1; else hist.exact = (hist.exact ?? 0) + 1;
    }
  }
  console.log(worst, hist);
});
