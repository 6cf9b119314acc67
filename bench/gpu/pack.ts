/**
 * Packs what a machine with an NVIDIA GPU, nvcc, CMake and PyTorch needs to time the attention side of Step-3 beside its peers: bundles of four
 * layers in full size for each precision, without weights. Runs it here when there is a GPU.
 *
 *   npm run bench:gpu [-- --out DIR] [-- --pack-only]
 */
import { spawnSync } from "node:child_process";
import { copyFileSync, cpSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { compile, defaultOptions } from "../../compiler/compile.ts";
import { packageRoot } from "../../compiler/package_root.ts";
import { silent } from "../../compiler/progress.ts";
import { step3ConfigJson } from "../../test/checkpoint.ts";

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

const work = mkdtempSync(join(tmpdir(), "step3c-bench-"));
writeFileSync(join(work, "config.json"), `${JSON.stringify(step3ConfigJson({ sizes }))}\n`);
rmSync(out, { recursive: true, force: true });
mkdirSync(join(out, "bundles"), { recursive: true });
for (const precision of ["bf16", "fp8"] as const) {
  const bundle = join(work, precision);
  const both = { attention: "cuda", ffn: "cuda", precision, kv: precision, weights: false } as const;
  const most = { microBatches: 1, maxBatch: 256, maxContext: sizes.maxPosition };
  await compile(work, { ...defaultOptions, ...both, ...most, out: bundle }, silent);
  // step3-bench draws weights, constants too; the FFN side is not timed
  for (const path of [
    "manifest.json",
    "costs.json",
    "schedule-prefill.json",
    "schedule-decode.json",
    "COMPLETE",
    "programs/attention",
  ])
    cpSync(join(bundle, path), join(out, "bundles", precision, path), { recursive: true });
}
rmSync(work, { recursive: true });
cpSync(join(root, "runtime"), join(out, "runtime"), { recursive: true });
for (const file of ["run.sh", "peers.py"]) copyFileSync(join(root, "bench", "gpu", file), join(out, file));
const commit = spawnSync("git", ["rev-parse", "--short", "HEAD"], { cwd: root, encoding: "utf8" });
writeFileSync(join(out, "commit"), commit.status === 0 ? commit.stdout : "unknown\n");

const hasGpu = spawnSync("nvidia-smi", ["-L"]).status === 0;
if (flags.includes("--pack-only") || !hasGpu)
  process.stdout.write(
    `${out}: packed. ${hasGpu ? "" : "There is no NVIDIA GPU here; "}copy it to a machine with one, nvcc, CMake and PyTorch, and run there: bash run.sh\n`,
  );
else process.exitCode = spawnSync("bash", [join(out, "run.sh")], { stdio: "inherit" }).status ?? 1;
