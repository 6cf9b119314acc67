/**
 * Conversion of a generated, sharded bf16 checkpoint into bundles: MB/s of checkpoint beside `cp` of the same bytes, and peak memory.
 *   node dist/bench/convert.js [--gb 8] [--dir FOLDER]
 * It needs two and a half times as much free disk, and leaves nothing behind.
 */
import { spawnSync } from "node:child_process";
import { cpSync, mkdtempSync, readdirSync, rmSync, statfsSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { compile, defaultOptions } from "../compiler/compile.ts";
import { silent } from "../compiler/progress.ts";
import { type Step3Sizes, writeStep3Checkpoint } from "../test/checkpoint.ts";

const base = {
  hidden: 2048,
  heads: 16,
  kvHeads: 1,
  headDim: 128,
  queryRank: 512,
  intermediate: 6144,
  vocabulary: 32000,
} as const;
const experts = { experts: 16, topK: 3, moeIntermediate: 2048, shared: 2048, maxPosition: 4096 } as const;

/** As many layers, the first one dense, as make about `bytes`. */
const sizesFor = (bytes: number): Step3Sizes => {
  const mlp = 3 * base.hidden * 2;
  const attention =
    2 *
    (base.hidden * (base.queryRank + 2 * base.headDim + base.heads * base.headDim) + base.queryRank * base.heads * base.headDim);
  const layer = attention + mlp * (experts.experts * experts.moeIntermediate + experts.shared);
  const rest = 4 * base.vocabulary * base.hidden + attention + mlp * base.intermediate;
  return { ...base, ...experts, layers: 1 + Math.max(1, Math.round((bytes - rest) / layer)) };
};

const bytesIn = (directory: string): number =>
  readdirSync(directory, { recursive: true, encoding: "utf8" }).reduce((n, path) => n + statSync(join(directory, path)).size, 0);

const timed = (work: () => void): number => {
  const start = performance.now();
  work();
  return (performance.now() - start) / 1000;
};

/** Waits until earlier writes are on the disk, so that each measurement begins with an idle one. */
const settle = (): void => void spawnSync("sync");

interface Measured {
  readonly seconds: number;
  readonly peak: number;
}

const report = (what: string, bytes: number, seconds: number, note: string): void => {
  process.stdout.write(
    `${what.padEnd(14)} ${seconds.toFixed(1).padStart(7)} s ${(bytes / 1e6 / seconds).toFixed(0).padStart(6)} MB/s  ${note}\n`,
  );
};

/** One conversion in this process, reported as JSON: memory is measured apart from the generator's. */
const convertOne = async (checkpoint: string, out: string, precision: "bf16" | "fp8" | "int8"): Promise<void> => {
  const start = performance.now();
  await compile(checkpoint, { ...defaultOptions, out, precision }, silent);
  const measured: Measured = { seconds: (performance.now() - start) / 1000, peak: process.resourceUsage().maxRSS * 1024 };
  process.stdout.write(JSON.stringify(measured));
};

const all = (gigabytes: number, parent: string): void => {
  const wanted = gigabytes * 1e9;
  const { bavail, bsize } = statfsSync(parent);
  if (bavail * bsize < 2.5 * wanted) throw new Error(`${parent}: ${(2.5 * gigabytes).toFixed(0)} GB of free space are needed`);
  const directory = mkdtempSync(join(parent, "step3c-convert-"));
  try {
    const checkpoint = join(directory, "checkpoint");
    const sizes = sizesFor(wanted);
    const making = timed(() => writeStep3Checkpoint(checkpoint, { sizes, shards: Math.ceil(gigabytes), pooled: true }));
    const bytes = bytesIn(checkpoint);
    report("generated", bytes, making, `${(bytes / 1e9).toFixed(2)} GB, ${sizes.layers} layers`);
    const copy = join(directory, "copy");
    settle();
    report(
      "cp",
      bytes,
      timed(() => cpSync(checkpoint, copy, { recursive: true })),
      "the same bytes",
    );
    rmSync(copy, { recursive: true });
    for (const precision of ["bf16", "fp8", "int8"] as const) {
      const out = join(directory, precision);
      settle();
      const child = spawnSync(
        process.execPath,
        [fileURLToPath(import.meta.url), "--one", precision, "--dir", checkpoint, "--out", out],
        {
          encoding: "utf8",
          stdio: ["ignore", "pipe", "inherit"],
        },
      );
      if (child.status !== 0) throw new Error(`the conversion to ${precision} failed`);
      const { seconds, peak } = JSON.parse(child.stdout) as Measured;
      report(
        `bf16 to ${precision}`,
        bytes,
        seconds,
        `peak ${(peak / 1e6).toFixed(0)} MB of memory, bundle ${(bytesIn(out) / 1e9).toFixed(2)} GB`,
      );
      rmSync(out, { recursive: true });
    }
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
};

const { values } = parseArgs({
  options: {
    gb: { type: "string", default: "8" },
    dir: { type: "string", default: tmpdir() },
    one: { type: "string" },
    out: { type: "string" },
  },
});
if (values.one === "bf16" || values.one === "fp8" || values.one === "int8")
  await convertOne(values.dir, values.out ?? "", values.one);
else all(Number(values.gb), values.dir);
