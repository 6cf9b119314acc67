/**
 * Packs what a machine with an NVIDIA GPU needs to check the CUDA backend, which needs nvcc and CMake there but no Node.js: every sample of every
 * op for each architecture, bundles with GPUs on both sides or on one, with what the C++ backend makes of the same prompts, and single layers
 * of Step-3 in its full size, whose weights are drawn on that machine (layer.py). Runs it here when there is a GPU.
 *
 *   npm run test:gpu [-- --out DIR] [-- --pack-only] [-- --parts kernels,bundles,layers]
 */
import { spawnSync } from "node:child_process";
import { copyFileSync, cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join, resolve } from "node:path";
import { checkBackend } from "../../backends/conformance.ts";
import cuda from "../../backends/cuda/index.ts";
import { compile, defaultOptions } from "../../compiler/compile.ts";
import { packageRoot } from "../../compiler/package_root.ts";
import { silent } from "../../compiler/progress.ts";
import { type Step3Sizes, step3ConfigJson, writeStep3Checkpoint } from "../checkpoint.ts";

const root = packageRoot();
const flags = process.argv.slice(2);
const flagValue = (flag: string): string | undefined => (flags.includes(flag) ? flags[flags.indexOf(flag) + 1] : undefined);
const out = resolve(flagValue("--out") ?? "gpu-tests");
const parts = (flagValue("--parts") ?? "kernels,bundles,layers").split(",");

const write = (path: string, content: string | Uint8Array): void => {
  mkdirSync(dirname(path), { recursive: true });
  writeFileSync(path, content);
};

/** The CLI in a process of its own: bundles are built and run natively. */
const step3c = (...args: string[]): void => {
  const { status, stderr } = spawnSync(process.execPath, [join(root, "dist", "compiler", "cli.js"), ...args], {
    encoding: "utf8",
  });
  if (status !== 0) throw new Error(`step3c ${args.join(" ")} ended with ${status}: ${stderr}`);
};

/** Kernels alone: a program of all samples of all ops, and the file of cases. */
const packKernels = (): void => {
  for (const arch of cuda.arches) {
    const report = checkBackend(cuda, {
      arch,
      pack: (program, cases) => {
        for (const [path, text] of program) write(join(out, "kernels", arch, "program", path), text);
        write(join(out, "kernels", arch, "cases"), cases);
      },
    });
    const lacking = report.results.filter((r) => r.status !== "matched");
    if (lacking.length > 0) throw new Error(`cuda:${arch} lacks ${lacking.map((r) => `${r.op} '${r.sample}'`).join(", ")}`);
  }
};

const prompts = [0, 1, 2] as const;

const floats = (path: string): Float32Array => {
  const bytes = readFileSync(path);
  return new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
};
/** By the Frobenius norm. */
const relativeError = (got: Float32Array, reference: Float32Array): number => {
  const squares = (x: (i: number) => number): number => reference.reduce((sum, _, i) => sum + x(i) ** 2, 0);
  return Math.sqrt(squares((i) => (got[i] as number) - (reference[i] as number)) / squares((i) => reference[i] as number));
};

type Precision = "bf16" | "fp8" | "int8";
const pairs: readonly (readonly [attention: string, ffn: string, precision: Precision, ranks: readonly [number, number]])[] = [
  ["cuda", "cuda", "bf16", [1, 1]],
  ["cuda", "cuda", "fp8", [1, 1]],
  ["cuda", "cuda", "int8", [1, 1]],
  ["cuda:sm_80", "cuda:sm_80", "fp8", [1, 1]],
  ["cuda", "cpp", "fp8", [1, 1]],
  ["cpp", "cuda", "fp8", [1, 1]],
  ["cuda", "cuda", "fp8", [2, 2]],
  ["cuda", "cuda", "bf16", [1, 2]],
];

/** Whole models: a checkpoint of drawn weights whose sizes the matrix units take, and the sample. */
const packBundles = async (): Promise<void> => {
  const work = mkdtempSync(join(tmpdir(), "step3c-gpu-"));
  const sizes = {
    hidden: 256,
    layers: 2,
    heads: 8,
    headDim: 64,
    queryRank: 128,
    intermediate: 512,
    vocabulary: 512,
    experts: 4,
    topK: 4,
  };
  const drawn = join(work, "drawn");
  // on two FFN ranks the shared expert is still large enough for a launch with the others
  writeStep3Checkpoint(drawn, { sizes: { ...sizes, moeIntermediate: 256, shared: 512 } });
  // heads as Step-3 has them, and little else
  const mfa = join(work, "mfa");
  const few = { layers: 1, heads: 64, headDim: 256, moeIntermediate: 256, shared: 256, moeLayers: [0] };
  writeStep3Checkpoint(mfa, { sizes: { ...sizes, ...few } });
  const ids = Array.from({ length: 3 }, (_, p) =>
    Array.from({ length: 90 + p }, (_, i) => (i * 37 + p * 101 + 5) % sizes.vocabulary),
  );
  const lines = ids.map((prompt_ids) => `${JSON.stringify({ prompt_ids })}\n`).join("");
  for (const model of ["drawn", "mfa"]) write(join(work, `${model}.jsonl`), lines);
  const held = readFileSync(join(root, "samples", "step3-tiny", "heldout.ids.jsonl"), "utf8")
    .split("\n")
    .slice(0, 3);
  const firsts = held.map((line) => (JSON.parse(line) as { prompt_ids: number[] }).prompt_ids.slice(0, 150));
  write(join(work, "sample.jsonl"), firsts.map((prompt_ids) => `${JSON.stringify({ prompt_ids })}\n`).join(""));
  const models = [
    ...pairs.map((pair) => ({ model: "drawn", source: drawn, pair })),
    { model: "mfa", source: mfa, pair: ["cuda", "cuda", "bf16", [1, 1]] as const },
    { model: "mfa", source: mfa, pair: ["cuda", "cuda", "fp8", [1, 1]] as const },
    { model: "sample", source: join(root, "samples", "step3-tiny"), pair: ["cuda", "cuda", "fp8", [1, 1]] as const },
  ];
  /** logits of the C++ backend, made once for each model and precision */
  const references = new Map<string, string>();
  const referenceOf = async (model: string, source: string, precision: Precision): Promise<string> => {
    const key = `${model}-${precision}`;
    const known = references.get(key);
    if (known !== undefined) return known;
    const bundle = join(work, `${key}.s3`);
    const file = join(work, `${key}.f32`);
    await compile(source, { ...defaultOptions, precision, kv: precision, out: bundle }, silent);
    step3c("score", bundle, "--ids", join(work, `${model}.jsonl`), "--logits", file);
    references.set(key, file);
    return file;
  };
  for (const { model, source, pair } of models) {
    const [attention, ffn, precision, [a, f]] = pair;
    const name = `${model}-${attention}-${ffn}-${precision}-${a}A${f}F`.replaceAll(":", "_");
    const options = { ...defaultOptions, precision, kv: precision, ranks: { attention: a, ffn: f } };
    await compile(source, { ...options, attention, ffn, out: join(out, "bundles", name) }, silent);
    copyFileSync(join(work, `${model}.jsonl`), join(out, "bundles", `${name}.jsonl`));
    const expected = await referenceOf(model, source, precision);
    const exact = await referenceOf(model, source, "bf16");
    for (const p of prompts) {
      copyFileSync(`${expected}.${p}`, join(out, "bundles", `${name}.expected.${p}`));
      // A sum that is rounded the other way becomes another code, so targets that sum in another order differ by as much as the precision
      // itself costs, once enough layers have passed. They may differ by no more than that.
      const bound = Math.max(0.02, relativeError(floats(`${expected}.${p}`), floats(`${exact}.${p}`)));
      write(join(out, "bundles", `${name}.bound.${p}`), `${bound.toPrecision(3)}\n`);
    }
  }
  rmSync(work, { recursive: true });
};

/** Step-3's own sizes, but for one layer, a small vocabulary and a context that the prompts of layer.py fit into. */
const full: Partial<Step3Sizes> = {
  hidden: 7168,
  layers: 1,
  heads: 64,
  headDim: 256,
  queryRank: 2048,
  intermediate: 18432,
  vocabulary: 2048,
  experts: 48,
  topK: 3,
  moeIntermediate: 5120,
  shared: 5120,
  maxPosition: 1280,
};

/** One layer of each kind, without weights: those of a layer with experts are 11 GB. */
const packLayers = async (): Promise<void> => {
  for (const [kind, moeLayers] of [["dense", []] as const, ["moe", [0]] as const])
    for (const precision of ["bf16", "fp8"] as const) {
      const layer = join(out, "layers", `${kind}-${precision}`);
      write(`${layer}.config/config.json`, `${JSON.stringify(step3ConfigJson({ sizes: { ...full, moeLayers } }))}\n`);
      const options = { ...defaultOptions, attention: "cuda", ffn: "cuda", precision, kv: precision, weights: false };
      await compile(`${layer}.config`, { ...options, out: `${layer}.s3` }, silent);
    }
  copyFileSync(join(root, "test", "gpu", "layer.py"), join(out, "layer.py"));
};

rmSync(out, { recursive: true, force: true });
mkdirSync(join(out, "bundles"), { recursive: true });
if (parts.includes("kernels")) packKernels();
if (parts.includes("bundles")) await packBundles();
if (parts.includes("layers")) await packLayers();
cpSync(join(root, "runtime"), join(out, "runtime"), { recursive: true });
copyFileSync(join(root, "test", "gpu", "run.sh"), join(out, "run.sh"));
const commit = spawnSync("git", ["rev-parse", "--short", "HEAD"], { cwd: root, encoding: "utf8" });
write(join(out, "commit"), commit.status === 0 ? commit.stdout : "unknown\n");

const hasGpu = spawnSync("nvidia-smi", ["-L"]).status === 0;
if (flags.includes("--pack-only") || !hasGpu)
  process.stdout.write(
    `${out}: packed. ${hasGpu ? "" : "There is no NVIDIA GPU here; "}copy it to a machine with one, nvcc and CMake, and run there: bash run.sh\n`,
  );
else process.exitCode = spawnSync("bash", [join(out, "run.sh")], { stdio: "inherit" }).status ?? 1;
