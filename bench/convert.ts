/**
 * Conversion of a generated, sharded bf16 checkpoint into bundles: MB/s of checkpoint beside `cp` of the same bytes, and peak memory.
 *   node dist/bench/convert.js [--gb 8] [--rounds 3] [--dir FOLDER]
 * Each round copies once and converts once to every precision, since the speed of a disk, and of memory that a virtual machine has to ask
 * for, changes from minute to minute; the table gives medians. It needs two and a half times as much free disk, and leaves nothing behind.
 */
import { spawnSync } from "node:child_process";
import { mkdtempSync, readdirSync, rmSync, statfsSync, statSync } from "node:fs";
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

const median = (values: readonly number[]): number => [...values].sort((a, b) => a - b)[values.length >> 1] as number;

const finish = (command: string, args: readonly string[]): string => {
  const child = spawnSync(command, args, { encoding: "utf8", stdio: ["ignore", "pipe", "inherit"] });
  if (child.status !== 0) throw new Error(`${command} ${args.join(" ")} failed`);
  return child.stdout;
};

/** One conversion in this process, reported as JSON: memory is measured apart from the generator's. */
const convertOne = async (checkpoint: string, out: string, precision: "bf16" | "fp8" | "int8"): Promise<void> => {
  const start = performance.now();
  await compile(checkpoint, { ...defaultOptions, out, precision }, silent);
  const measured: Measured = { seconds: (performance.now() - start) / 1000, peak: process.resourceUsage().maxRSS * 1024 };
  process.stdout.write(JSON.stringify(measured));
};

const precisions = ["bf16", "fp8", "int8"] as const;

const all = (gigabytes: number, rounds: number, parent: string): void => {
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
    const copies: number[] = [];
    const runs = precisions.map((precision) => ({ precision, out: join(directory, precision), done: [] as Measured[], size: 0 }));
    for (let round = 1; round <= rounds; round++) {
      const copy = join(directory, "copy");
      settle();
      copies.push(timed(() => void finish("cp", ["-r", checkpoint, copy])));
      rmSync(copy, { recursive: true });
      for (const run of runs) {
        settle();
        const { precision, out } = run;
        const self = fileURLToPath(import.meta.url);
        run.done.push(
          JSON.parse(finish(process.execPath, [self, "--one", precision, "--dir", checkpoint, "--out", out])) as Measured,
        );
        run.size = bytesIn(out);
        rmSync(out, { recursive: true });
      }
      const all = [copies.at(-1), ...runs.map((run) => run.done.at(-1)?.seconds)];
      process.stdout.write(`round ${round}: ${all.map((s) => s?.toFixed(1)).join(", ")} s\n`);
    }
    const copying = median(copies);
    report("cp", bytes, copying, "the same bytes");
    for (const { precision, done, size } of runs) {
      const seconds = median(done.map((m) => m.seconds));
      const peak = Math.max(...done.map((m) => m.peak));
      const share = `${((100 * copying) / seconds).toFixed(0)} % of cp's speed`;
      report(
        `bf16 to ${precision}`,
        bytes,
        seconds,
        `${share}, peak ${(peak / 1e6).toFixed(0)} MB, bundle ${(size / 1e9).toFixed(2)} GB`,
      );
    }
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
};

const { values } = parseArgs({
  options: {
    gb: { type: "string", default: "8" },
    rounds: { type: "string", default: "3" },
    dir: { type: "string", default: tmpdir() },
    one: { type: "string" },
    out: { type: "string" },
  },
});
if (values.one === "bf16" || values.one === "fp8" || values.one === "int8")
  await convertOne(values.dir, values.out ?? "", values.one);
else all(Number(values.gb), Math.max(1, Number(values.rounds)), values.dir);
