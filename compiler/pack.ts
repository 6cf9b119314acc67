/** Puts a compiled model into a bundle: weights, sealed schedules with their certificates, programs, the runtime's sources, manifest. */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import type { KvLayout } from "../backends/backend.ts";
import type { Manifest, WeightsFile } from "../ir/bundle.ts";
import { checkSchedule } from "../ir/check.ts";
import type { Weight } from "../ir/graph.ts";
import type { RankProgram, Schedule } from "../ir/schedule.ts";
import { type BundleWriter, createBundle } from "./bundle.ts";
import { certify } from "./certify.ts";
import type { CompileOptions } from "./compile.ts";
import { costsOf } from "./costs.ts";
import type { Emission, Role, Side } from "./emit.ts";
import { memoryReport } from "./memory.ts";
import { type Model, tokenizerPaths } from "./model.ts";
import { packageRoot } from "./package_root.ts";
import type { Progress } from "./progress.ts";
import { selftest } from "./selftest.ts";
import { tokenizerFiles } from "./tokenizer.ts";
import { version } from "./version.ts";
import { isConstant, type PlacedWeight, seededSource, type WeightsPlan, writeWeights } from "./weights.ts";
import { withWire } from "./wire.ts";

export interface Compiled {
  readonly model: Model;
  readonly options: CompileOptions;
  readonly sides: Readonly<Record<Role, Side>>;
  readonly emission: Emission;
  readonly kv?: KvLayout;
  /** not sealed: their wire hash needs the source's, which is known once the weights have been read */
  readonly schedules: readonly Schedule[];
}

/** What stands for the weights of a bundle without them. */
const weightSeed = 1;

/** Writes the bundle and gives its path. It appears under its name only when it is complete. */
export const packBundle = async (compiled: Compiled, progress: Progress): Promise<string> => {
  const { model, options, emission } = compiled;
  const out = options.out ?? `${model.name}.s3`;
  const bundle = createBundle(out);
  const abandon = (): void => {
    bundle.abandon();
    process.exit(130);
  };
  process.once("SIGINT", abandon);
  try {
    const { source, weights } = await packWeights(compiled, bundle, progress);
    const manifest = manifestOf(compiled, source, weights);
    const schedules = withWire(manifest, compiled.schedules);
    for (const s of schedules) {
      const certificate = certify(s);
      const verdict = checkSchedule(s, certificate, { wire: s.wire });
      if (!verdict.ok) throw new Error(`the checker rejects the schedule '${s.name}' that was just made: ${verdict.reason}`);
      bundle.json(`schedule-${s.name}.json`, s);
      bundle.json(`certificate-${s.name}.json`, certificate);
    }
    for (const { role } of manifest.programs) {
      const { backend, arch } = compiled.sides[role];
      for (const [path, text] of backend.assemble({ role, arch, kernels: emission.kernels[role] }))
        bundle.text(`programs/${role}/${path}`, text);
      bundle.bytes(`selftest/${role}.cases`, selftest(emission, role, compiled.kv));
    }
    bundle.json("costs.json", costsOf(emission));
    packRuntime(bundle);
    for (const { name, path } of tokenizerPaths(model, tokenizerFiles)) bundle.text(name, readFileSync(path, "utf8"));
    bundle.text("manifest.json", `${JSON.stringify({ ...manifest, wire: schedules[0]?.wire ?? "" }, null, 1)}\n`);
    bundle.finish();
    progress.end();
    return out;
  } catch (error) {
    bundle.abandon();
    throw error;
  } finally {
    process.removeListener("SIGINT", abandon);
  }
};

/** Attention ranks hold the same weights and share a file; each FFN rank has its own. */
const fileOf = (rank: RankProgram["rank"]): string => (rank.role === "attention" ? "attention" : `ffn${rank.index}`);

const packWeights = async (
  { model, options, emission, schedules }: Compiled,
  bundle: BundleWriter,
  progress: Progress,
): Promise<{ source: string; weights: WeightsFile[] }> => {
  const known = new Map(emission.graph.weights.map((w) => [w.value.name, w]));
  const plans = new Map<string, PlacedWeight[]>();
  const programs = schedules[0]?.programs ?? [];
  for (const { rank, buffers } of programs) {
    if (plans.has(fileOf(rank))) continue;
    const placed = buffers.filter((b) => b.region === "weights").map((b) => place(known.get(b.binds ?? b.name), emission, b));
    plans.set(fileOf(rank), placed);
  }
  if (options.weights) {
    progress.phase("packing weights");
    const files: WeightsPlan[] = [...plans].map(([name, weights]) => ({
      path: bundle.file(`weights/${name}.safetensors`),
      weights,
    }));
    const written = await writeWeights(model.checkpoint, files, { configuration: model.configuration, progress: progress.at });
    for (const [i, name] of [...plans.keys()].entries())
      bundle.digest(`weights/${name}.safetensors`, written.files[i]?.digest ?? "");
    const weights = programs.map(({ rank, memory }) => ({
      rank: rank.name,
      file: `weights/${fileOf(rank)}.safetensors`,
      bytes: memory.weights,
    }));
    return { source: written.source ?? "", weights };
  }
  const constants = new Map<string, PlacedWeight>();
  let offset = 0;
  for (const placed of [...plans.values()].flat()) {
    if (!isConstant(placed.weight) || constants.has(placed.weight.value.name)) continue;
    constants.set(placed.weight.value.name, { ...placed, offset });
    offset += placed.bytes;
  }
  if (constants.size > 0) {
    const path = "weights/constants.safetensors";
    const written = await writeWeights(undefined, [{ path: bundle.file(path), weights: [...constants.values()] }]);
    bundle.digest(path, written.files[0]?.digest ?? "");
  }
  const weights = programs.map(({ rank, memory }) => ({ rank: rank.name, seed: weightSeed, bytes: memory.weights }));
  return { source: await seededSource(model.configuration, weightSeed), weights };
};

const place = (
  weight: Weight | undefined,
  emission: Emission,
  { name, offset, bytes }: { name: string; offset: number; bytes: number },
): PlacedWeight => {
  if (!weight) throw new Error(`buffer ${name} binds no weight of the graph`);
  const layout = emission.layoutOf(weight.value.name);
  return { weight, offset, bytes: Math.ceil(bytes / 64) * 64, ...(layout ? { layout } : {}) };
};

const manifestOf = (
  { model, options, sides, emission, kv, schedules }: Compiled,
  source: string,
  weights: WeightsFile[],
): Manifest => {
  const roles = (["attention", "ffn"] as const).filter((role) => emission.kernels[role].length > 0);
  const policy = model.language;
  return {
    format: 1,
    step3c: version(),
    model: model.facts,
    source,
    wire: "",
    precision: { weights: policy ? options.precision : "none", kv: policy ? options.kv : "none" },
    attention: options.ranks.attention,
    ffn: roles.includes("ffn") ? options.ranks.ffn : 0,
    split: options.ffnSplit,
    microBatches: schedules[0]?.slots ?? 1,
    maxBatch: options.maxBatch,
    maxContext: model.maxContext,
    symbols: emission.graph.symbols,
    programs: roles.map((role) => ({
      role,
      target: sides[role].backend.name,
      device: sides[role].backend.device,
      kernels: emission.kernels[role].map(({ name, about, scratch }) => ({ name, about, scratch })),
    })),
    schedules: schedules.map((s) => s.name),
    ...(kv ? { kv: { ...kv, pages: model.pages } } : {}),
    weights,
    memory: memoryReport(schedules, (role) => Math.max(0, ...emission.kernels[role].map((k) => k.scratch))),
  };
};

/** The native runtime's sources: a bundle is built where it runs, without Node.js. */
const packRuntime = (bundle: BundleWriter): void => {
  const root = join(packageRoot(), "runtime");
  const files = readdirSync(root, { recursive: true, encoding: "utf8" }).filter((path) =>
    /(\.(h|cpp)|CMakeLists\.txt)$/.test(path),
  );
  for (const path of files.sort()) bundle.text(`runtime/${path}`, readFileSync(join(root, path), "utf8"));
};
