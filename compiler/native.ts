import { spawn, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import {
  accessSync,
  constants,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { availableParallelism, homedir } from "node:os";
import { join, resolve } from "node:path";
import type { Manifest } from "../ir/bundle.ts";
import { UserError } from "../ir/error.ts";
import type { Progress } from "./progress.ts";
import { qualify, type Shown } from "./qualification.ts";

/** What a bundle is once built on this machine. */
export interface NativeBuild {
  readonly runner: string;
  readonly attention: string;
  readonly ffn?: string;
  /** what it was built with, for the record of what it went on to show */
  readonly shown: Shown;
}

/**
 * Builds the runtime and the programs of a bundle with CMake, each once per content and toolchain, in `<bundle>.build/`
 * (or under STEP3C_BUILD_DIR, which many bundles may share). Needs cmake and a C++20 compiler; says so when one is missing.
 * Programs are built for the instruction set `isa`, or the best of this processor: a bundle's own CMake files build for all of them.
 * `brief`: the bundle is run once and thrown away. Its programs are built in a hurry, and the runtime is kept for the next one.
 */
export const buildBundle = async (
  bundle: string,
  manifest: Manifest,
  progress: Progress,
  isa: string | undefined = bestIsa(),
  brief: boolean = false,
): Promise<NativeBuild> => {
  const toolchain = findToolchain();
  const root = process.env.STEP3C_BUILD_DIR ?? `${resolve(bundle)}.build`;
  const built = async (part: string, product: string, options: readonly string[] = [], under = root): Promise<string> => {
    mkdirSync(under, { recursive: true });
    const source = join(bundle, part);
    const key = createHash("sha256")
      .update([toolchain.id, ...options].join("\n"))
      .update(treeHash(source))
      .digest("hex")
      .slice(0, 16);
    const directory = join(under, `${part.replace("/", "-")}-${key}`);
    const file = join(directory, product);
    if (!existsSync(file)) await cmake(source, directory, toolchain, options, progress, part);
    if (!existsSync(file)) throw new UserError(`building ${source} gave no ${product}: see ${join(directory, "build.log")}`, 3);
    return file;
  };
  const forIsa = [
    ...(isa === undefined ? [] : [`-DS3_ISAS=${isa}`, "--no-warn-unused-cli"]),
    ...(brief ? ["-DS3_OPTIMISE=-O1"] : []),
  ];
  // One after the other: each build already uses all cores.
  const runner = await built("runtime", "step3-run", [], brief ? keptRuntimes(root) : root);
  const attention = await built("programs/attention", "libprogram.so", forIsa);
  const hasFfn = manifest.programs.some((p) => p.role === "ffn");
  const shown: Shown = { toolchain: toolchain.id.replace("\n", ", "), ...(isa === undefined ? {} : { isa }) };
  const native = hasFfn
    ? { runner, attention, ffn: await built("programs/ffn", "libprogram.so", forIsa), shown }
    : { runner, attention, shown };
  qualify(bundle, manifest, "compiled", shown, progress);
  return native;
};

/** Where runtimes are kept for bundles that are not; where that cannot be written, with the bundle. */
const keptRuntimes = (otherwise: string): string => {
  if (process.env.STEP3C_BUILD_DIR !== undefined) return process.env.STEP3C_BUILD_DIR;
  const kept = join(process.env.XDG_CACHE_HOME ?? join(homedir(), ".cache"), "step3c");
  try {
    mkdirSync(kept, { recursive: true });
    accessSync(kept, constants.W_OK);
    return kept;
  } catch {
    return otherwise;
  }
};

/** The best instruction set of the processor that a program knows by name; undefined, for all of them, where it cannot be told. */
const bestIsa = (): string | undefined => {
  if (process.arch !== "x64" || !existsSync("/proc/cpuinfo")) return undefined;
  const flags = new Set(/^flags\s*:(.*)$/m.exec(readFileSync("/proc/cpuinfo", "utf8"))?.[1]?.trim().split(" "));
  const has = (...names: string[]): boolean => names.every((name) => flags.has(name));
  if (!has("avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe")) return "baseline";
  if (!has("avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl")) return "avx2";
  return has("amx_tile", "amx_bf16", "amx_int8") ? "amx" : "avx512";
};

interface Toolchain {
  readonly id: string;
  readonly compiler: string;
}

const findToolchain = (): Toolchain => {
  const cmakeVersion = versionOf("cmake");
  if (cmakeVersion === undefined)
    throw new UserError("cmake was not found on PATH; install it (Debian: apt-get install cmake) and run again", 1);
  const compiler = process.env.CXX ?? ["c++", "g++", "clang++"].find((name) => versionOf(name) !== undefined);
  const compilerVersion = compiler === undefined ? undefined : versionOf(compiler);
  if (compiler === undefined || compilerVersion === undefined)
    throw new UserError(
      `no C++ compiler was found (${compiler ?? "c++, g++, clang++"}); install one with C++20 (Debian: apt-get install g++) or set CXX, and run again`,
      1,
    );
  return { id: `${cmakeVersion}\n${compilerVersion}`, compiler };
};

const versionOf = (command: string): string | undefined => {
  const result = spawnSync(command, ["--version"], { encoding: "utf8" });
  return result.status === 0 ? result.stdout.split("\n")[0] : undefined;
};

const treeHash = (directory: string): Buffer => {
  const hash = createHash("sha256");
  const visit = (path: string, name: string): void => {
    if (statSync(path).isDirectory()) for (const entry of readdirSync(path).sort()) visit(join(path, entry), `${name}/${entry}`);
    else hash.update(`${name}\0`).update(readFileSync(path));
  };
  visit(directory, "");
  return hash.digest();
};

const cmake = async (
  source: string,
  directory: string,
  toolchain: Toolchain,
  options: readonly string[],
  progress: Progress,
  part: string,
): Promise<void> => {
  progress.phase(`building ${part} with ${toolchain.compiler}`);
  const work = `${directory}.${process.pid}`;
  rmSync(work, { recursive: true, force: true });
  mkdirSync(work, { recursive: true });
  const log: string[] = [];
  const step = (args: string[]): Promise<number> =>
    new Promise((done, fail) => {
      const child = spawn("cmake", args, { stdio: ["ignore", "pipe", "pipe"] });
      for (const stream of [child.stdout, child.stderr]) stream.on("data", (data: Buffer) => log.push(data.toString()));
      child.on("error", fail);
      child.on("close", (code) => done(code ?? 1));
    });
  const where = ["-S", resolve(source), "-B", work];
  const configure = [...where, "-DCMAKE_BUILD_TYPE=Release", `-DCMAKE_CXX_COMPILER=${toolchain.compiler}`, ...options];
  const code = (await step(configure)) || (await step(["--build", work, "--parallel", String(availableParallelism())]));
  const text = log.join("");
  writeFileSync(join(work, "build.log"), text);
  if (code !== 0) {
    const kept = `${directory}.failed`;
    rmSync(kept, { recursive: true, force: true });
    renameSync(work, kept);
    const first = text.split("\n").find((line) => /\berror\b|CMake Error/i.test(line)) ?? "no error line";
    throw new UserError(`building ${part} failed: ${first.trim()} (the whole log: ${join(kept, "build.log")})`, 3);
  }
  try {
    renameSync(work, directory);
  } catch (error) {
    // Another process finished the same build first: its result is as good.
    if (!existsSync(directory)) throw error;
    rmSync(work, { recursive: true, force: true });
  }
  progress.end();
};
