/**
 * Packs what a machine with an NVIDIA GPU, nvcc, CMake and PyTorch needs to time the attention side of Step-3 beside its peers: bundles of four
 * layers in full size for each precision, without weights; and the FFN side with its experts split in several ways. Runs it here when there is a GPU.
 *
 *   npm run bench:gpu [-- --out DIR] [-- --pack-only]
 */
import { spawnSync } from "node:child_process";
import { copyFileSync, cpSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { type CompileOptions, compile, defaultOptions } from "../../compiler/compile.ts";
import type { Role } from "../../compiler/emit.ts";
import { packageRoot } from "../../compiler/package_root.ts";
import { silent } from "../../compiler/progress.ts";
import { type Step3Sizes, step3ConfigJson } from "../../test/checkpoint.ts";

const root = packageRoot();
const flags = process.argv.slice(2);
const out = resolve(flags.includes("--out") ? (flags[flags.indexOf("--out") + 1] ?? "") : "gpu-bench");

/** Step-3's attention. What the FFN is does not matter here, and the vocabulary is small: one of peers.py's shapes must not be mistaken for it. */
const sizes = {
  hidden: 7168,
  layers: 4,
  heads: 64,
  kvHeads: 1,
  headDim: 256,
  queryRank: 2048,
  intermediate: 18432,
  vocabulary: 3072,
  maxPosition: 33024,
  moeLayers: [],
};

/** The FFN of a dense and a MoE layer, which together have all of its kernels; up to 4096 rows of all attention ranks together. */
const ffnSizes = { ...sizes, layers: 2, moeLayers: [1], experts: 48, topK: 3, moeIntermediate: 5120, shared: 5120 };
const mostTokens = 4096;
const splits = {
  ep8: { ranks: 8, ffnSplit: "ep" },
  ep16: { ranks: 16, ffnSplit: "ep" },
  tp8: { ranks: 8, ffnSplit: "tp" },
} as const;

const work = mkdtempSync(join(tmpdir(), "step3c-bench-"));
rmSync(out, { recursive: true, force: true });

/** A bundle of which step3-bench times one side, weights drawn, constants too. */
const pack = async (name: string, side: Role, of: Partial<Step3Sizes>, options: Partial<CompileOptions>): Promise<void> => {
  const bundle = join(work, name);
  writeFileSync(join(work, "config.json"), `${JSON.stringify(step3ConfigJson({ sizes: of }))}\n`);
  const all = { ...defaultOptions, attention: "cuda", ffn: "cuda", weights: false, microBatches: 1, ...options, out: bundle };
  await compile(work, all, silent);
  for (const path of [
    "manifest.json",
    "costs.json",
    "schedule-prefill.json",
    "schedule-decode.json",
    "COMPLETE",
    `programs/${side}`,
  ])
    cpSync(join(bundle, path), join(out, side, name, path), { recursive: true });
};
for (const precision of ["bf16", "fp8"] as const)
  await pack(precision, "attention", sizes, { precision, kv: precision, maxBatch: 256, maxContext: sizes.maxPosition });
for (const [name, { ranks, ffnSplit }] of Object.entries(splits))
  await pack(name, "ffn", ffnSizes, {
    precision: "fp8",
    kv: "fp8",
    ranks: { attention: ranks, ffn: ranks },
    ffnSplit,
    maxBatch: mostTokens / ranks,
    maxContext: 4096,
  });
rmSync(work, { recursive: true });
cpSync(join(root, "runtime"), join(out, "runtime"), { recursive: true });
for (const file of ["run.sh", "peers.py", "ffn.py"]) copyFileSync(join(root, "bench", "gpu", file), join(out, file));
const commit = spawnSync("git", ["rev-parse", "--short", "HEAD"], { cwd: root, encoding: "utf8" });
writeFileSync(join(out, "commit"), commit.status === 0 ? commit.stdout : "unknown\n");

const hasGpu = spawnSync("nvidia-smi", ["-L"]).status === 0;
if (flags.includes("--pack-only") || !hasGpu)
  process.stdout.write(
    `${out}: packed. ${hasGpu ? "" : "There is no NVIDIA GPU here; "}copy it to a machine with one, nvcc, CMake and PyTorch, and run there: bash run.sh\n`,
  );
else process.exitCode = spawnSync("bash", [join(out, "run.sh")], { stdio: "inherit" }).status ?? 1;
