/**
 * Node tests of the ONNX project (test/data/onnx; Apache-2.0): each case has a model, inputs, and the outputs that its maker expects.
 *
 *   npm run onnx:suite [-- --target reference|cpp] [--only TEXT]     lists every case that does not pass, with the reason, and counts
 */
import { spawnSync } from "node:child_process";
import { mkdtempSync, readdirSync, readFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { compile, defaultOptions } from "../compiler/compile.ts";
import { onTarget } from "../compiler/eval.ts";
import type { Stored } from "../compiler/frontends/onnx/emitter.ts";
import { type ImportedGraph, importFor, tensorData } from "../compiler/frontends/onnx/import.ts";
import { type OnnxTensor, readOnnx, readOnnxTensor } from "../compiler/frontends/onnx.ts";
import { onnxModel } from "../compiler/model.ts";
import { packageRoot } from "../compiler/package_root.ts";
import { silent } from "../compiler/progress.ts";
import { evaluate, literalWeight } from "../ir/evaluate.ts";
import { type Graph, isFloat, type Op, type Tensor, UserError, type Value, verify, type Weight } from "../ir/index.ts";

export interface SuiteCase {
  readonly name: string;
  /** whether onnxruntime-node 1.30 passes it */
  readonly ort: boolean;
  readonly model: string;
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
}

const data = pathToFileURL(`${join(packageRoot(), "test", "data", "onnx")}/`);

/** Unpacks the cases into a new folder. */
export const suiteCases = (): readonly SuiteCase[] => {
  const folder = mkdtempSync(join(tmpdir(), "step3c-onnx-suite-"));
  const unpacked = spawnSync("tar", ["xzf", new URL("onnx-node-tests.tar.gz", data).pathname, "-C", folder]);
  if (unpacked.status !== 0) throw new Error(`tar: ${unpacked.stderr}`);
  const index = JSON.parse(readFileSync(new URL("onnx-node-tests.index.json", data), "utf8")) as Record<
    string,
    { ort130: string }
  >;
  return Object.entries(index).map(([name, { ort130 }]) => {
    const of = join(folder, name, "test_data_set_0");
    const files = (kind: string): string[] => {
      const found = readdirSync(of).filter((f) => f.startsWith(kind)).length;
      return Array.from({ length: found }, (_, i) => join(of, `${kind}_${i}.pb`));
    };
    return {
      name,
      ort: ort130 === "PASS",
      model: join(folder, name, "model.onnx"),
      inputs: files("input"),
      outputs: files("output"),
    };
  });
};

const read = (path: string): Tensor => {
  const tensor: OnnxTensor = readOnnxTensor(new Uint8Array(readFileSync(path)), path);
  return tensorData(tensor);
};

/** The case's inputs by the names that the model has for them, and its expected outputs by theirs. */
export const suiteData = (c: SuiteCase): { readonly inputs: Map<string, Tensor>; readonly expected: Map<string, Tensor> } => {
  const { graph } = readOnnx(c.model);
  const fed = graph.inputs.filter((v) => !graph.initialisers.has(v.name));
  return {
    inputs: new Map(c.inputs.map((path, i) => [fed[i]?.name ?? "", read(path)])),
    expected: new Map(c.outputs.map((path, i) => [graph.outputs[i]?.name ?? "", read(path)])),
  };
};

/** What is wrong with a result: undefined when it is as expected, with the tolerances of ONNX's own runner. */
export const difference = (got: Tensor | undefined, expected: Tensor): string | undefined => {
  if (got === undefined) return "is missing";
  if (got.dtype !== expected.dtype) return `is ${got.dtype}, expected ${expected.dtype}`;
  if (got.shape.join() !== expected.shape.join()) return `has shape [${got.shape}], expected [${expected.shape}]`;
  const [rtol, atol] = isFloat(expected.dtype) ? [1e-3, 1e-7] : [0, 0];
  for (let i = 0; i < expected.data.length; i++) {
    const [x, y] = [got.data[i] as number, expected.data[i] as number];
    const same = Object.is(x, y) || x === y || Math.abs(x - y) <= atol + rtol * Math.abs(y);
    if (!same) return `has ${x} at ${i}, expected ${y}`;
  }
  return undefined;
};

/** What is wrong with the results of a case, by the graph's names for its outputs. */
const wrongIn = (
  imported: ImportedGraph,
  results: ReadonlyMap<string, Tensor>,
  expected: ReadonlyMap<string, Tensor>,
): string | undefined => {
  for (const v of imported.graph.outputs) {
    const name = imported.names.get(v.name) ?? "";
    const want = expected.get(name);
    const wrong = want && difference(results.get(v.name), want);
    if (wrong !== undefined) return `output '${name}' ${wrong}`;
  }
  return undefined;
};

interface Prepared {
  readonly imported: ImportedGraph;
  /** by the graph's names */
  readonly inputs: ReadonlyMap<string, Tensor>;
  readonly expected: ReadonlyMap<string, Tensor>;
}

const prepare = (c: SuiteCase): Prepared => {
  const { inputs, expected } = suiteData(c);
  const imported = importFor(readOnnx(c.model), c.model, inputs);
  verify(imported.graph);
  const given = imported.graph.inputs.map((v) => [v.name, inputs.get(imported.names.get(v.name) ?? "") as Tensor] as const);
  return { imported, inputs: new Map(given), expected };
};

/** Runs a case on the interpreter; gives why it does not pass. */
export const onReference = (c: SuiteCase): string | undefined => {
  const { imported, inputs, expected } = prepare(c);
  return wrongIn(imported, evaluate(imported.graph, inputs, imported.weight), expected);
};

/** Several graphs as one, every name with what it is of in front. */
const together = (
  parts: readonly { readonly mark: string; readonly prepared: Prepared }[],
): { graph: Graph; tensors: Map<string, Stored> } => {
  const tensors = new Map<string, Stored>();
  const whole = { inputs: [] as Value[], weights: [] as Weight[], ops: [] as Op[], outputs: [] as Value[] };
  for (const { mark, prepared } of parts) {
    const { graph } = prepared.imported;
    const values = new Map<string, Value>();
    const own = (v: Value): Value => {
      const known = values.get(v.name) ?? { ...v, name: `${mark}${v.name}` };
      values.set(v.name, known);
      return known;
    };
    whole.inputs.push(...graph.inputs.map(own));
    for (const { value, source } of graph.weights) {
      const renamed = source.kind === "tensor" ? { ...source, tensor: `${mark}${source.tensor}` } : source;
      whole.weights.push({ value: own(value) as Weight["value"], source: renamed });
    }
    for (const op of graph.ops) whole.ops.push({ ...op, inputs: op.inputs.map(own), outputs: op.outputs.map(own), origin: mark });
    whole.outputs.push(...graph.outputs.map(own));
    for (const [name, stored] of prepared.imported.tensors) tensors.set(`${mark}${name}`, stored);
  }
  return { graph: { name: "suite", symbols: [], states: [], ...whole }, tensors };
};

/** Cases in one program: enough that the compiler reads its headers seldom. */
const atOnce = 160;

/** Runs cases on a target, many as one graph; gives why each that does not pass does not. */
export const onTargets = async (
  cases: readonly SuiteCase[],
  target: string,
): Promise<ReadonlyMap<SuiteCase, string | undefined>> => {
  const results = new Map<SuiteCase, string | undefined>();
  const ready: { readonly c: SuiteCase; readonly mark: string; readonly prepared: Prepared }[] = [];
  for (const [i, c] of cases.entries()) {
    try {
      const prepared = prepare(c);
      // alone first: what lacks a kernel must not stop the others
      const model = onnxModel(c.model, prepared.imported, defaultOptions);
      await compile(model, { ...defaultOptions, attention: target, ffn: target, emit: "kernels" }, silent);
      ready.push({ c, mark: `c${i}_`, prepared });
    } catch (error) {
      results.set(
        c,
        failure(() => {
          throw error;
        }),
      );
    }
  }
  for (let from = 0; from < ready.length; from += atOnce) {
    const part = ready.slice(from, from + atOnce);
    const { graph, tensors } = together(part);
    const names = new Map([...graph.inputs, ...graph.outputs].map((v) => [v.name, v.name]));
    const inputs = new Map(
      part.flatMap(({ mark, prepared }) => [...prepared.inputs].map(([n, t]) => [`${mark}${n}`, t] as const)),
    );
    const model = onnxModel("suite.onnx", { graph, tensors, names, weight: literalWeight }, defaultOptions);
    const made = await onTarget(model, graph, inputs, { target, isa: "baseline" }, silent);
    for (const { c, mark, prepared } of part) {
      const own = prepared.imported.graph.outputs.map((v) => [v.name, made.get(`${mark}${v.name}`) as Tensor] as const);
      results.set(c, wrongIn(prepared.imported, new Map(own), prepared.expected));
    }
  }
  return results;
};

export const failure = (work: () => string | undefined): string | undefined => {
  try {
    return work();
  } catch (error) {
    if (error instanceof UserError) return error.message;
    return `${(error as Error).stack}`;
  }
};

const main = async (): Promise<void> => {
  const flag = (name: string): string | undefined => {
    const at = process.argv.indexOf(name);
    return at < 0 ? undefined : process.argv[at + 1];
  };
  const only = flag("--only") ?? "";
  const target = flag("--target") ?? "reference";
  const cases = suiteCases().filter((c) => c.name.includes(only));
  const results =
    target === "reference"
      ? new Map(cases.map((c) => [c, failure(() => onReference(c))] as const))
      : await onTargets(cases, target);
  const counts = { ort: [0, 0], others: [0, 0] };
  for (const c of cases) {
    const why = results.get(c);
    const count = c.ort ? counts.ort : counts.others;
    count[why === undefined ? 0 : 1] = (count[why === undefined ? 0 : 1] as number) + 1;
    if (why === undefined) continue;
    const text = why.replaceAll("\n", " ").replace(/.*model\.onnx: /, "");
    process.stdout.write(`${c.ort ? "" : "(not in ONNX Runtime) "}${c.name}: ${text.slice(0, only ? 3000 : 260)}\n`);
  }
  const say = ([right, wrong]: readonly number[]): string => `${right} of ${(right as number) + (wrong as number)}`;
  process.stdout.write(`${target}: pass ${say(counts.ort)} that ONNX Runtime passes, ${say(counts.others)} others\n`);
};

if (/onnx_suite\.[jt]s$/.test(process.argv[1] ?? "")) await main();
