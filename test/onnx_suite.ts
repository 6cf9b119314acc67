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
import { importFor, tensorData } from "../compiler/frontends/onnx/import.ts";
import { type OnnxTensor, readOnnx, readOnnxTensor } from "../compiler/frontends/onnx.ts";
import { packageRoot } from "../compiler/package_root.ts";
import { evaluate } from "../ir/evaluate.ts";
import { isFloat, type Tensor, UserError, verify } from "../ir/index.ts";

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

/** Runs a case on the interpreter; gives why it does not pass. */
export const onReference = (c: SuiteCase): string | undefined => {
  const model = readOnnx(c.model);
  const { inputs, expected } = suiteData(c);
  const imported = importFor(model, c.model, inputs);
  verify(imported.graph);
  const given = new Map(imported.graph.inputs.map((v) => [v.name, inputs.get(imported.names.get(v.name) ?? "") as Tensor]));
  const results = evaluate(imported.graph, given, imported.weight);
  for (const v of imported.graph.outputs) {
    const name = imported.names.get(v.name) ?? "";
    const want = expected.get(name);
    const wrong = want && difference(results.get(v.name), want);
    if (wrong !== undefined) return `output '${name}' ${wrong}`;
  }
  return undefined;
};

export const failure = (work: () => string | undefined): string | undefined => {
  try {
    return work();
  } catch (error) {
    if (error instanceof UserError) return error.message;
    return `${(error as Error).stack}`;
  }
};

const main = (): void => {
  const flag = (name: string): string | undefined => {
    const at = process.argv.indexOf(name);
    return at < 0 ? undefined : process.argv[at + 1];
  };
  const only = flag("--only") ?? "";
  const cases = suiteCases().filter((c) => c.name.includes(only));
  const counts = { ort: [0, 0], others: [0, 0] };
  for (const c of cases) {
    const why = failure(() => onReference(c));
    const count = c.ort ? counts.ort : counts.others;
    count[why === undefined ? 0 : 1] = (count[why === undefined ? 0 : 1] as number) + 1;
    if (why !== undefined)
      process.stdout.write(
        `${c.ort ? "" : "(not in ONNX Runtime) "}${c.name}: ${why.replace(/.*model\.onnx: /, "").slice(0, only ? 3000 : 260)}\n`,
      );
  }
  const say = ([right, wrong]: readonly number[]): string => `${right} of ${(right as number) + (wrong as number)}`;
  process.stdout.write(`pass: ${say(counts.ort)} that ONNX Runtime passes, ${say(counts.others)} others\n`);
};

if (process.argv[1]?.endsWith("onnx_suite.js") || process.argv[1]?.endsWith("onnx_suite.ts")) main();
