/** The sample models: cut in two like a checkpoint's, compiled once, and right at several sizes, as ONNX Runtime has it. */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import { readManifest } from "../compiler/bundle.ts";
import { checkBundle } from "../compiler/check_bundle.ts";
import { compile, defaultOptions } from "../compiler/compile.ts";
import { evalGraph } from "../compiler/eval.ts";
import { readNpy, writeNpy } from "../compiler/npy.ts";
import { silent } from "../compiler/progress.ts";
import { randomNumbers, type Tensor } from "../ir/index.ts";
import { models } from "../samples/onnx/make.ts";
import { Ort } from "./ort.ts";
import { shareBuilds } from "./sample.ts";

shareBuilds();
const folder = mkdtempSync(join(tmpdir(), "step3c-onnx-samples-"));
afterAll(() => rmSync(folder, { recursive: true }));

/** Shapes of the caches' last axes, and whether there are positions. */
const facts: Readonly<
  Record<
    string,
    { readonly size: number; readonly heads: number; readonly key: number; readonly value: number; readonly positions: boolean }
  >
> = {
  gpt2: { size: 48, heads: 4, key: 12, value: 12, positions: false },
  qwen3_moe: { size: 64, heads: 2, key: 16, value: 16, positions: true },
  deepseek_mla: { size: 64, heads: 4, key: 24, value: 16, positions: true },
};

const inputsOf = (name: string, batch: number, sequence: number, past: number): Map<string, Tensor> => {
  const { size, heads, key, value, positions } = facts[name] as (typeof facts)[string];
  const random = randomNumbers(batch * 1000 + sequence * 10 + past);
  const normal = (shape: readonly number[]): Tensor => ({
    kind: "tensor",
    dtype: "f32",
    shape,
    data: Float64Array.from({ length: shape.reduce((a, b) => a * b, 1) }, () => Math.fround(2 * random() - 1)),
  });
  const places = Float64Array.from({ length: batch * sequence }, (_, i) => past + (i % sequence));
  return new Map([
    ["hidden_states", normal([batch, sequence, size])],
    ["past_key_values.0.key", normal([batch, heads, past, key])],
    ["past_key_values.0.value", normal([batch, heads, past, value])],
    ...(positions ? [["position_ids", { kind: "tensor", dtype: "i64", shape: [batch, sequence], data: places }] as const] : []),
  ]);
};

const ort = new Ort();
afterAll(() => ort.close());
/** What ONNX Runtime computes. */
const oracle = async (model: Uint8Array, inputs: ReadonlyMap<string, Tensor>): Promise<ReadonlyMap<string, Tensor>> => {
  const result = await ort.runBytes(model, inputs);
  if (!("outputs" in result)) throw new Error(`ONNX Runtime: ${JSON.stringify(result)}`);
  return result.outputs;
};

/** batch, sequence, past */
const sizes: readonly (readonly [number, number, number])[] = [
  [1, 7, 0],
  [2, 1, 9],
  [2, 16, 32],
];

describe.each(Object.keys(models))("%s", (name) => {
  const path = join(folder, `${name}.onnx`);
  const bundle = join(folder, `${name}.s3`);
  const dim = new Map([
    ["batch", [1, 2] as const],
    ["sequence", [1, 16] as const],
    ["past", [0, 32] as const],
  ]);
  const model = (models[name] as () => Uint8Array)();
  writeFileSync(path, model);

  test("is cut between attention and FFN, and its schedule is proven", async () => {
    const printed = await compile(path, { ...defaultOptions, dim, out: bundle, explain: "partition" }, silent);
    expect(printed).toContain("1 branch to the FFN side");
    await compile(path, { ...defaultOptions, dim, out: bundle }, silent);
    const { programs } = readManifest(bundle);
    expect(programs.map((p) => p.role)).toEqual(["attention", "ffn"]);
    const [onAttention, onFfn] = programs.map((p) => p.kernels.map((k) => k.about.split(" ")[0]));
    expect(onFfn).toEqual(expect.arrayContaining(name === "qwen3_moe" ? ["grouped_linear", "combine"] : ["linear"]));
    // experts are chosen on the attention side, and only the chosen ones are computed
    if (name === "qwen3_moe") expect([onAttention?.includes("topk"), onFfn?.includes("linear")]).toEqual([true, false]);
    expect(checkBundle(bundle, silent)).toBeTruthy();
  });

  test("is what ONNX Runtime computes, at every size", async () => {
    for (const [i, s] of sizes.entries()) {
      const work = join(folder, `${name}-${i}`);
      mkdirSync(work);
      const input = [...inputsOf(name, ...s)].map(([key, t]) => {
        writeNpy(join(work, `${key}.npy`), t);
        return `${key}=${join(work, `${key}.npy`)}`;
      });
      const want = await oracle(model, inputsOf(name, ...s));
      for (const [source, target] of [
        [bundle, {}],
        [path, { target: "reference" }],
      ] as const) {
        await evalGraph(source, { input, out: work, ...target }, silent);
        for (const [key, t] of want) {
          const got = readNpy(join(work, `${key}.npy`), "f32");
          expect(got.shape).toEqual(t.shape);
          const norm = Math.hypot(...t.data);
          const error = Math.hypot(...got.data.map((x, j) => x - (t.data[j] as number)));
          expect(error, `${key} at ${s} from ${source}`).toBeLessThanOrEqual(2e-6 * norm);
        }
      }
    }
  }, 120_000);
});

test("the experts of qwen3_moe are shared out to FFN ranks", async () => {
  const path = join(folder, "qwen3_moe.onnx");
  const bundle = join(folder, "ranks.s3");
  const dim = new Map([
    ["batch", [1, 2] as const],
    ["sequence", [1, 16] as const],
    ["past", [0, 32] as const],
  ]);
  await compile(path, { ...defaultOptions, dim, ranks: { attention: 1, ffn: 2 }, out: bundle }, silent);
  const onFfn = readManifest(bundle).programs.filter((p) => p.role === "ffn");
  for (const { kernels } of onFfn) expect(kernels.map((k) => k.about).join("\n")).toContain("x f32[3,48,64]");
  expect(checkBundle(bundle, silent)).toBeTruthy();
  const given = inputsOf("qwen3_moe", 2, 5, 3);
  const work = join(folder, "ranks");
  mkdirSync(work);
  const input = [...given].map(([key, t]) => {
    writeNpy(join(work, `${key}.npy`), t);
    return `${key}=${join(work, `${key}.npy`)}`;
  });
  await evalGraph(bundle, { input, out: work }, silent);
  const reference = (await oracle((models.qwen3_moe as () => Uint8Array)(), given)).get("output") as Tensor;
  const got = readNpy(join(work, "output.npy"), "f32");
  const error = Math.hypot(...got.data.map((x, j) => x - (reference.data[j] as number)));
  expect(error).toBeLessThanOrEqual(2e-6 * Math.hypot(...reference.data));
}, 60_000);
