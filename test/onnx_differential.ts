/**
 * Random ONNX models on the interpreter and on ONNX Runtime; a difference becomes the smallest model that has it.
 *
 *   node dist/test/onnx_differential.js [--from SEED] [--count N]     counts, reasons and every difference
 */
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { importFor, importOnnx } from "../compiler/frontends/onnx/import.ts";
import { readOnnxBytes } from "../compiler/frontends/onnx.ts";
import { packageRoot } from "../compiler/package_root.ts";
import { evaluate } from "../ir/evaluate.ts";
import { type DType, isFloat, type Tensor, UserError, verify } from "../ir/index.ts";
import { encodeModel, type MadeModel, type MadeNode, modelText } from "./onnx_maker.ts";
import { Ort } from "./ort.ts";
import { randomModel } from "./random_onnx.ts";

/** What the interpreter makes of the model, its named sizes as numbers or as symbols. */
export const onInterpreter = (m: MadeModel, symbolic: boolean = false): ReadonlyMap<string, Tensor> => {
  const model = readOnnxBytes(encodeModel(m), "random.onnx");
  const inputs = new Map(m.inputs.map((v) => [v.name, v.tensor]));
  const limits = new Map(m.inputs.flatMap((v) => v.dims.filter((d) => typeof d === "string").map((d) => [d, [1, 16] as const])));
  const imported = symbolic ? importOnnx(model, "random.onnx", { limits }) : importFor(model, "random.onnx", inputs);
  verify(imported.graph);
  const given = new Map(imported.graph.inputs.map((v) => [v.name, inputs.get(imported.names.get(v.name) as string) as Tensor]));
  const results = evaluate(imported.graph, given, imported.weight);
  return new Map([...results].map(([name, t]) => [imported.names.get(name) as string, t]));
};

const units: Partial<Readonly<Record<DType, number>>> = { f64: 2 ** -52, f32: 2 ** -23, f16: 2 ** -10 };

/**
 * Where two results differ by more than roundings of `depth` nodes, undefined where they do not. NaN and infinities must be at the same places.
 * A sum's error goes with its largest terms, so small elements are held to the largest, of operands too. The interpreter has integers exact to
 * 2^53, and rounds beyond.
 */
export const differs = (
  got: Tensor | undefined,
  want: Tensor,
  depth: number,
  operands: readonly Tensor[] = [],
): string | undefined => {
  if (got === undefined) return "is missing";
  if (got.dtype !== want.dtype) return `is ${got.dtype}, ONNX Runtime has ${want.dtype}`;
  if (got.shape.join() !== want.shape.join()) return `has shape [${got.shape}], ONNX Runtime has [${want.shape}]`;
  const unit = units[want.dtype] ?? 0;
  const largest = [want, ...operands.filter((t) => isFloat(t.dtype))].reduce(
    (most, t) => t.data.reduce((a, b) => (Math.abs(b) < 1e5 ? Math.max(a, Math.abs(b)) : a), most),
    2 ** -20,
  );
  for (let i = 0; i < want.data.length; i++) {
    const [x, y] = [got.data[i] as number, want.data[i] as number];
    if (x === y || (Number.isNaN(x) && Number.isNaN(y))) continue;
    const limit = isFloat(want.dtype) ? unit * depth * (8 * Math.abs(y) + 2 * largest) : Math.abs(y) > 2 ** 53 ? 2 ** 13 : 0;
    if (!(Math.abs(x - y) <= limit)) return `has ${x} at ${i}, ONNX Runtime has ${y}`;
  }
  return undefined;
};

export type Verdict =
  /** `refused`: why the model is not taken with symbols for its sizes, though it is with numbers */
  | { readonly kind: "same"; readonly refused?: string }
  /** ONNX Runtime does not take the model */
  | { readonly kind: "rejected"; readonly why: string }
  /** neither does, or ONNX Runtime's answer is known to be wrong */
  | { readonly kind: "excused"; readonly why: string }
  | { readonly kind: "different"; readonly what: string };

/** Where ONNX Runtime 1.30 is not what the operators' definitions say, or they leave it open; by the node that makes the result. */
const excuses: readonly (readonly [reason: string, is: (n: MadeNode, operands: readonly Tensor[]) => boolean])[] = [
  [
    "Clip of infinities: without a limit they become the largest finite number, which the operator's function does not do",
    (n, [x]) => n.op === "Clip" && has(x, (v) => !Number.isFinite(v)),
  ],
  [
    "ReduceLogSumExp of integers: the exponentials are cut to integers before they are summed",
    (n, [x]) => n.op === "ReduceLogSumExp" && x !== undefined && !isFloat(x.dtype),
  ],
  ["NaN among what is compared: which one it is to be is not said", (n, [x]) => compares.test(n.op) && has(x, Number.isNaN)],
  [
    "LogSoftmax of an infinity: the difference of two infinities counts as a number",
    (n, [x]) => n.op === "LogSoftmax" && has(x, (v) => v === Infinity),
  ],
  [
    "a product over no elements in f16 or with a vector: memory is left as it was",
    (n, [x, y]) => n.op === "MatMul" && x?.shape.at(-1) === 0 && (x.dtype === "f16" || y?.shape.length === 1),
  ],
  [
    "no elements: axes of them are not taken away or made 1 in every case",
    (n, [x]) => n.op.startsWith("Reduce") && x?.data.length === 0,
  ],
  [
    "Min and Max of four i64 at once: [-2147483650] * 4 counts as more than [-2] * 4, but not the fifth of five",
    (n, x) => /^M(in|ax)$/.test(n.op) && x.some((t) => t.dtype === "i64" && has(t, (v) => Math.abs(v) >= 2 ** 31)),
  ],
  ["Sign of NaN in f16 is 0, in f32 NaN", (n, [x]) => n.op === "Sign" && x?.dtype === "f16" && has(x, Number.isNaN)],
];
const compares = /^(Arg|Reduce)(Max|Min)$|^TopK$|^LogSoftmax$|^ReduceLogSumExp$/;
const has = (x: Tensor | undefined, test: (v: number) => boolean): boolean => x?.data.some(test) === true;

const excused = (n: MadeNode, operands: readonly Tensor[]): string | undefined => excuses.find(([, is]) => is(n, operands))?.[0];

/** The nodes that a value depends on, its own last. */
const ancestors = (m: MadeModel, output: string): readonly MadeNode[] => {
  const needed = new Set([output]);
  const nodes: MadeNode[] = [];
  for (const n of [...m.nodes].reverse())
    if (n.outputs.some((o) => needed.has(o))) {
      nodes.unshift(n);
      for (const i of readBy(n)) needed.add(i);
    }
  return nodes;
};
/** Names that a node and graphs within it read. */
const readBy = (n: MadeNode): readonly string[] => [
  ...n.inputs,
  ...Object.values(n.attributes).flatMap((a) => ("g" in a ? a.g.nodes.flatMap(readBy) : [])),
];
/** The part of a model that a value needs. */
const partOf = (m: MadeModel, output: string): MadeModel => {
  const nodes = ancestors(m, output);
  const used = new Set(nodes.flatMap(readBy));
  return {
    ...m,
    nodes,
    inputs: m.inputs.filter((v) => used.has(v.name)),
    constants: m.constants.filter((c) => used.has(c.name)),
    outputs: m.outputs.filter((v) => v.name === output),
  };
};

interface Difference {
  readonly output: string;
  readonly what: string;
}

const operandsOf = (m: MadeModel, n: MadeNode, ort: ReadonlyMap<string, Tensor>): readonly Tensor[] =>
  n.inputs.flatMap((name) => ort.get(name) ?? [...m.inputs, ...m.constants].find((v) => v.name === name)?.tensor ?? []);

/** ONNX Runtime puts mean and scale together before it adds them, so that large parts cancel. */
const cancels = /^(Instance|Group)Normalization$/;

/** Every difference, in the order of nodes; `ort` are ONNX Runtime's results. */
const differences = (m: MadeModel, ort: ReadonlyMap<string, Tensor>, own: ReadonlyMap<string, Tensor>): readonly Difference[] =>
  m.nodes.flatMap((n) =>
    n.outputs.flatMap((output) => {
      const want = ort.get(output);
      if (want === undefined) return [];
      const depth = ancestors(m, output).reduce((sum, a) => sum + (cancels.test(a.op) ? 64 : 1), 1);
      const what = differs(own.get(output), want, depth, operandsOf(m, n, ort));
      return what === undefined ? [] : [{ output, what }];
    }),
  );

const attempt = <R>(work: () => R): R | Error => {
  try {
    return work();
  } catch (error) {
    return error as Error;
  }
};

/** What is wrong with the model, undefined when nothing is; `symbolic` as for onInterpreter. */
const fault = async (ort: Ort, m: MadeModel, symbolic: boolean): Promise<Difference | undefined> => {
  const answer = await ort.run(m);
  if (!("outputs" in answer)) return undefined;
  const own = attempt(() => onInterpreter(m, symbolic));
  if (own instanceof Error)
    return symbolic && own instanceof UserError ? undefined : { output: m.outputs.at(-1)?.name ?? "", what: own.message };
  return differences(m, answer.outputs, own)[0];
};

/** The node that makes the value, alone, on the operands that ONNX Runtime gave it. */
const alone = (m: MadeModel, output: string, ort: ReadonlyMap<string, Tensor>): MadeModel | undefined => {
  const node = m.nodes.find((n) => n.outputs.includes(output)) as MadeNode;
  const inputs = [...new Set(readBy(node))].flatMap((name) => {
    const tensor = ort.get(name);
    return tensor === undefined ? [] : [{ name, tensor, dims: tensor.shape }];
  });
  const made = new Set(m.nodes.flatMap((n) => n.outputs));
  if (node.inputs.some((i) => i !== "" && made.has(i) && !ort.has(i))) return undefined;
  const used = new Set(readBy(node));
  return {
    ...m,
    nodes: [node],
    inputs: [...m.inputs.filter((v) => used.has(v.name)), ...inputs],
    constants: m.constants.filter((c) => used.has(c.name)),
    outputs: m.outputs.filter((v) => node.outputs.includes(v.name)),
  };
};

const cut = (t: Tensor, size: number, to: number): Tensor => {
  let { data, shape } = t;
  shape.forEach((d, axis) => {
    if (d !== size) return;
    const inner = shape.slice(axis + 1).reduce((a, b) => a * b, 1);
    data = data.filter((_, i) => Math.floor(i / inner) % d < to);
    shape = shape.with(axis, to);
  });
  return { ...t, data, shape };
};

/** Smaller models that may have the fault too. */
const smaller = function* (m: MadeModel): Iterable<MadeModel> {
  for (const [i, n] of m.nodes.entries())
    for (const key of Object.keys(n.attributes)) {
      const attributes = Object.fromEntries(Object.entries(n.attributes).filter(([k]) => k !== key));
      yield { ...m, nodes: m.nodes.with(i, { ...n, attributes }) };
    }
  const sizes = [...new Set([...m.inputs, ...m.constants].flatMap((v) => v.tensor.shape))].sort((a, b) => b - a);
  for (const size of sizes)
    for (const to of [1, size - 1])
      if (to > 0 && to < size) {
        const inputs = m.inputs.map((v) => ({ ...v, tensor: cut(v.tensor, size, to), dims: cut(v.tensor, size, to).shape }));
        yield { ...m, inputs, constants: m.constants.map((c) => ({ ...c, tensor: cut(c.tensor, size, to) })) };
      }
  for (const [i, v] of m.inputs.entries()) {
    if (v.tensor.data.length <= 1 || v.tensor.data.every((x) => x === v.tensor.data[0])) continue;
    for (const x of new Set(v.tensor.data))
      yield { ...m, inputs: m.inputs.with(i, { ...v, tensor: { ...v.tensor, data: v.tensor.data.map(() => x) } }) };
  }
  if (m.opset < 26) yield { ...m, opset: m.opset + 1, ir: Math.max(m.ir, 10) };
};

/** The smallest model found that still has a fault. */
export const shrink = async (
  ort: Ort,
  whole: MadeModel,
  symbolic: boolean,
): Promise<{ readonly model: MadeModel; readonly what: string }> => {
  const first = (await fault(ort, whole, symbolic)) as Difference;
  let [model, what] = [whole, first.what];
  const better = async (m: MadeModel | undefined): Promise<boolean> => {
    const found = m && m.outputs.length > 0 ? await fault(ort, m, symbolic) : undefined;
    if (m === undefined || found === undefined) return false;
    [model, what] = [m, `${found.output} ${found.what}`];
    return true;
  };
  if (!(await better(partOf(whole, first.output)))) for (const v of whole.outputs) if (await better(partOf(whole, v.name))) break;
  const answer = await ort.run(model);
  const last = model.outputs[0]?.name;
  if ("outputs" in answer && last !== undefined && !symbolic) {
    const all = await ort.run({ ...whole, outputs: whole.outputs });
    if ("outputs" in all) await better(alone(whole, last, all.outputs));
  }
  for (let steps = 0, more = true; more && steps < 60; ) {
    more = false;
    for (const m of smaller(model)) {
      if (++steps > 60) break;
      if (await better(m)) {
        more = true;
        break;
      }
    }
  }
  return { model, what };
};

/** Runs a model on both. */
export const judge = async (ort: Ort, m: MadeModel): Promise<Verdict> => {
  const answer = await ort.run(m);
  if ("crash" in answer) return { kind: "rejected", why: `process ended: ${answer.crash}` };
  if ("error" in answer) return { kind: "rejected", why: answer.error };
  let refused: string | undefined;
  for (const symbolic of [false, ...(m.inputs.some((v) => v.dims.some((d) => typeof d === "string")) ? [true] : [])]) {
    const own = attempt(() => onInterpreter(m, symbolic));
    if (own instanceof Error) {
      // what needs numbers for its sizes says so
      if (symbolic && own instanceof UserError) {
        refused = own.message
          .replace(/^.*?\((\w+)\): /, "")
          .replaceAll(/[\w*+-]*\[[^\]]*\]|[\d'][\w*+']*|\bn\d+\b/g, "N")
          .slice(0, 60);
        continue;
      }
      return { kind: "different", what: `${symbolic ? "symbolic: " : ""}${own instanceof UserError ? own.message : own.stack}` };
    }
    const found = differences(m, answer.outputs, own);
    for (const d of found) {
      const node = m.nodes.find((n) => n.outputs.includes(d.output)) as MadeNode;
      const why = excused(node, operandsOf(m, node, answer.outputs));
      if (why !== undefined) return { kind: "excused", why };
      // a node that agrees on ONNX Runtime's operands passes on what roundings before it made
      const single = symbolic ? undefined : alone(m, d.output, answer.outputs);
      const again = single && (await fault(ort, single, false));
      const same = node.inputs.every((i) => {
        const [x, y] = [own.get(i), answer.outputs.get(i)];
        return x === undefined || y === undefined || x.data.every((v, k) => Object.is(v, y.data[k]));
      });
      if (single !== undefined && again === undefined && !same) continue;
      return { kind: "different", what: `${symbolic ? "symbolic: " : ""}${d.output} of ${node.op} ${d.what}` };
    }
    if (found.length > 0) return { kind: "excused", why: "roundings before a step" };
  }
  return refused === undefined ? { kind: "same" } : { kind: "same", refused };
};

export interface Count {
  same: number;
  /** of these, the ones that need numbers for their sizes */
  readonly refused: Map<string, number>;
  readonly rejected: Map<string, number>;
  readonly excused: Map<string, number>;
  readonly different: string[];
}

/** Models of seeds from `from` on, shared among the processes; differences are shrunk and written to .cache/random_onnx. */
export const compare = async (from: number, count: number, processes: number): Promise<Count> => {
  const total: Count = { same: 0, refused: new Map(), rejected: new Map(), excused: new Map(), different: [] };
  const add = (to: Map<string, number>, key: string): unknown => to.set(key, (to.get(key) ?? 0) + 1);
  const folder = join(packageRoot(), ".cache", "random_onnx");
  let next = from;
  const work = async (): Promise<void> => {
    const ort = new Ort();
    for (let seed = next++; seed < from + count; seed = next++) {
      const m = randomModel(seed);
      const verdict = await judge(ort, m);
      if (verdict.kind === "same") {
        total.same++;
        if (verdict.refused !== undefined) add(total.refused, verdict.refused);
      } else if (verdict.kind === "rejected") add(total.rejected, `${verdict.why.replaceAll(/\s+/g, " ")}`);
      else if (verdict.kind === "excused") add(total.excused, verdict.why);
      else {
        const symbolic = verdict.what.startsWith("symbolic: ");
        const found = (await fault(ort, m, symbolic)) === undefined ? { model: m, what: "" } : await shrink(ort, m, symbolic);
        mkdirSync(folder, { recursive: true });
        writeFileSync(join(folder, `seed-${seed}.onnx`), encodeModel(found.model));
        total.different.push(
          `seed ${seed}: ${verdict.what}\n${symbolic ? "symbolic, " : ""}shrunk: ${found.what}\n${modelText(found.model)}\n`,
        );
      }
    }
    ort.close();
  };
  await Promise.all(Array.from({ length: processes }, work));
  return total;
};

const sum = (m: ReadonlyMap<string, number>): number => [...m.values()].reduce((a, b) => a + b, 0);
/** The counts, and the reasons for them. */
export const countText = (c: Count): string => {
  const lines = (what: string, m: ReadonlyMap<string, number>): string =>
    [`${sum(m)} ${what}`, ...[...m].sort((a, b) => b[1] - a[1]).map(([why, n]) => `  ${n} ${why}`)].join("\n");
  return [
    ...c.different,
    `${c.same} the same`,
    lines("of these need numbers for sizes", c.refused),
    lines("not taken by ONNX Runtime", c.rejected),
    lines("excused", c.excused),
    `${c.different.length} different`,
  ].join("\n");
};
/** Models that say nothing. */
export const rejections = (c: Count): number => sum(c.rejected);

const main = async (): Promise<void> => {
  const flag = (name: string, otherwise: number): number => {
    const at = process.argv.indexOf(name);
    return at < 0 ? otherwise : Number(process.argv[at + 1]);
  };
  const started = performance.now();
  const count = await compare(flag("--from", 1), flag("--count", 500), 2);
  process.stdout.write(`${countText(count)}\n${((performance.now() - started) / 1000).toFixed(1)} s\n`);
};

if (process.argv[1]?.endsWith("onnx_differential.js")) await main();
