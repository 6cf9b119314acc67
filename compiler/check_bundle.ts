import { closeSync, existsSync, openSync, readFileSync, readSync, statSync } from "node:fs";
import { join } from "node:path";
import type { Manifest } from "../ir/bundle.ts";
import { type Certificate, checkSchedule, checkShared } from "../ir/check.ts";
import { UserError } from "../ir/error.ts";
import type { Schedule } from "../ir/schedule.ts";
import { bundleHash, fileDigest, listFiles, readJson, readManifest } from "./bundle.ts";
import type { Costs } from "./costs.ts";
import type { Progress } from "./progress.ts";

/**
 * Verifies a bundle without building it: every file's hash, each schedule against its certificate with the independent checker,
 * and that programs and weights fit the manifest and the schedules. Gives the report; throws a UserError with exit code 3 otherwise.
 */
export const checkBundle = (bundle: string, progress: Progress): string => {
  const manifest = readManifest(bundle);
  const report: string[] = [`bundle ${bundle} ${bundleHash(bundle).slice(0, 16)}: ${manifest.model.name}`];
  report.push(checkHashes(bundle, progress));
  const names = manifest.programs.map((p) => ({ role: p.role, kernels: new Set(p.kernels.map((k) => k.name)) }));
  const schedules: Schedule[] = [];
  for (const name of manifest.schedules) {
    const schedule = readJson(join(bundle, `schedule-${name}.json`)) as Schedule;
    const certificate = readJson(join(bundle, `certificate-${name}.json`)) as Certificate;
    const { wire, attention, ffn, microBatches, kv, weights } = manifest;
    const verdict = checkSchedule(schedule, certificate, { wire, attention, ffn, microBatches, weights, ...(kv ? { kv } : {}) });
    if (!verdict.ok) return fail(`schedule ${name}: ${verdict.reason}`);
    for (const program of schedule.programs) {
      const kernels = names.find((p) => p.role === program.rank.role)?.kernels;
      for (const step of program.steps)
        if (step.op === "launch" && !kernels?.has(step.kernel))
          fail(`schedule ${name}: rank ${program.rank.name} launches ${step.kernel}, which no program of the manifest has`);
    }
    report.push(`schedule ${name}: ${verdict.summary}`);
    checkWeights(bundle, manifest, schedule);
    schedules.push(schedule);
  }
  checkCosts(bundle, manifest);
  const apart = checkShared(schedules);
  if (apart !== undefined) fail(`the schedules do not share weights and KV: ${apart}`);
  report.push(`weights: ${manifest.weights.map((w) => (w.file ? w.file : `${w.rank} drawn from seed ${w.seed}`)).join(", ")}`);
  report.push("not proved: that a kernel reads and writes only its arguments");
  return `${report.join("\n")}\n`;
};

const fail = (what: string): never => {
  throw new UserError(`${what}; the bundle is not sound, compile it again`, 3);
};

const checkHashes = (bundle: string, progress: Progress): string => {
  const lines = readFileSync(join(bundle, "SHA256SUMS"), "utf8").trimEnd().split("\n");
  const sums = new Map<string, string>();
  for (const line of lines) {
    const [, sum, path] = /^([0-9a-f]{64}) {2}(.+)$/.exec(line) ?? [];
    if (sum === undefined || path === undefined || path.split("/").includes(".."))
      return fail(`${bundle}/SHA256SUMS: bad line '${line.slice(0, 80)}'`);
    sums.set(path, sum);
  }
  const present = listFiles(bundle).filter((path) => path !== "SHA256SUMS" && path !== "COMPLETE");
  for (const path of present) if (!sums.has(path)) fail(`${join(bundle, path)}: is not listed in SHA256SUMS`);
  const total = present.reduce((sum, path) => sum + statSync(join(bundle, path)).size, 0);
  let done = 0;
  progress.phase("hashing");
  for (const [path, sum] of sums) {
    if (!existsSync(join(bundle, path))) fail(`${join(bundle, path)}: is listed in SHA256SUMS and missing`);
    const found = fileDigest(join(bundle, path), (bytes) => {
      done += bytes;
      progress.at(done, total);
    });
    if (found !== sum) fail(`${join(bundle, path)}: SHA-256 is ${found.slice(0, 16)}..., SHA256SUMS says ${sum.slice(0, 16)}...`);
  }
  progress.end();
  return `files: ${sums.size}, ${(total / 2 ** 20).toFixed(1)} MiB, all hashes right`;
};

/** The costs name every kernel of the manifest. */
const checkCosts = (bundle: string, manifest: Manifest): void => {
  const costs = readJson(join(bundle, "costs.json")) as Costs;
  for (const { role, kernels } of manifest.programs)
    for (const { name } of kernels)
      if (costs[role]?.[name] === undefined) fail(`costs.json: kernel ${name} of the ${role} side is missing`);
};

interface PackedHeader {
  readonly [name: string]: {
    readonly dtype: string;
    readonly shape: readonly number[];
    readonly data_offsets: readonly [number, number];
  };
}

/** Every weight buffer of a schedule is in its rank's file, at its offset, with its bytes. */
const checkWeights = (bundle: string, manifest: Manifest, schedule: Schedule): void => {
  const headers = new Map<string, PackedHeader>();
  for (const program of schedule.programs) {
    const entry = manifest.weights.find((w) => w.rank === program.rank.name || w.rank === program.rank.role);
    if (!entry) {
      fail(`manifest.json: no weights for rank ${program.rank.name}`);
      continue;
    }
    if (entry.file === undefined) continue;
    const header = headers.get(entry.file) ?? readHeader(join(bundle, entry.file));
    headers.set(entry.file, header);
    for (const buffer of program.buffers) {
      if (buffer.region !== "weights") continue;
      const found = header[buffer.binds ?? buffer.name];
      if (!found) fail(`${entry.file}: weight ${buffer.binds} of rank ${program.rank.name} is missing`);
      else if (found.data_offsets[0] !== buffer.offset || found.data_offsets[1] - found.data_offsets[0] < buffer.bytes)
        fail(
          `${entry.file}: weight ${buffer.binds} lies at ${found.data_offsets.join("..")}, schedule ${schedule.name} wants ${buffer.bytes} bytes at ${buffer.offset}`,
        );
    }
  }
};

const readHeader = (path: string): PackedHeader => {
  const descriptor = openSync(path, "r");
  try {
    const size = Buffer.alloc(8);
    readSync(descriptor, size, 0, 8, 0);
    const bytes = Number(size.readBigUInt64LE());
    if (bytes > statSync(path).size - 8) return fail(`${path}: header of ${bytes} bytes does not fit the file`);
    const text = Buffer.alloc(bytes);
    readSync(descriptor, text, 0, bytes, 8);
    return JSON.parse(text.toString()) as PackedHeader;
  } finally {
    closeSync(descriptor);
  }
};
