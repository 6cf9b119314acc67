/** Builds programs and runs single kernels of them, natively: for tests and benchmarks. */
import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const root = join(dirname(fileURLToPath(import.meta.url)), "..");
const cache = join(root, ".cache", "native");

const command = (file: string, args: readonly string[], cwd: string): string => {
  const result = spawnSync(file, args, { cwd, encoding: "utf8", maxBuffer: 64 << 20 });
  if (result.error) throw result.error;
  if (result.status !== 0) throw new Error(`${file} ${args.join(" ")} failed:\n${result.stdout}\n${result.stderr}`);
  return result.stdout;
};

/** Makes a folder under the cache once per content; `make` fills it. Safe against another process that makes the same. */
const once = (kind: string, content: readonly string[], make: (folder: string) => void): string => {
  const hash = createHash("sha256");
  for (const text of content) hash.update(text).update("\0");
  const folder = join(cache, `${kind}-${hash.digest("hex").slice(0, 20)}`);
  if (existsSync(folder)) return folder;
  mkdirSync(cache, { recursive: true });
  const work = mkdtempSync(`${folder}.`);
  make(work);
  try {
    renameSync(work, folder);
  } catch (error) {
    if (!existsSync(folder)) throw error;
    rmSync(work, { recursive: true });
  }
  return folder;
};

/**
 * Builds the files of a program (what `assemble` gives) with CMake; gives the path of the library. Built once per content and options.
 * Options: CMake cache entries, such as `-DS3_AMX_EMULATED=ON`.
 */
export const buildProgram = (files: ReadonlyMap<string, string>, options: readonly string[] = []): string => {
  const content = [...files].sort(([a], [b]) => (a < b ? -1 : 1)).flat();
  const folder = once("program", [...content, ...options], (work) => {
    for (const [name, text] of files) {
      mkdirSync(dirname(join(work, name)), { recursive: true });
      writeFileSync(join(work, name), text);
    }
    command("cmake", ["-S", ".", "-B", "build", ...options], work);
    command("cmake", ["--build", "build", "--parallel", "2"], work);
  });
  return join(folder, "build", "libprogram.so");
};

/** Builds test/native/run_kernel.cpp, or another program of that folder that needs nothing but runtime/step3.h. */
export const buildRunner = (name: string = "run_kernel"): string => {
  const source = join(root, "test", "native", `${name}.cpp`);
  const header = join(root, "runtime", "step3.h");
  const folder = once(name, [readFileSync(source, "utf8"), readFileSync(header, "utf8")], (work) => {
    command(
      process.env.CXX ?? "c++",
      ["-std=c++20", "-O1", "-pthread", `-I${dirname(header)}`, source, "-o", join(work, name), "-ldl"],
      work,
    );
  });
  return join(folder, name);
};

/** `read`: bytes given; `written`: a size; `both`: bytes given, and wanted back. */
export type KernelArgument = { readonly read: Uint8Array } | { readonly written: number } | { readonly both: Uint8Array };

export interface KernelRun {
  readonly kernel: string;
  /** absent: the best of this machine */
  readonly isa?: string;
  readonly threads?: number;
  /** runs the kernel so often and reports the fastest */
  readonly repeats?: number;
  /** rows of each segment */
  readonly rows: readonly number[];
  /** rows between segments; the most rows of one when absent */
  readonly stride?: number;
  /** values of the graph's symbols, in their order; none when absent */
  readonly dims?: readonly number[];
  readonly args: readonly KernelArgument[];
}

export interface KernelResult {
  readonly isa: string;
  readonly nanoseconds: number;
  /** the arguments that were written, in order; bytes that a kernel left alone are 0xA5 */
  readonly outputs: readonly Uint8Array[];
}

const u32 = (x: number): Buffer => {
  const b = Buffer.alloc(4);
  b.writeUInt32LE(x);
  return b;
};
const u64 = (x: number): Buffer => {
  const b = Buffer.alloc(8);
  b.writeBigUInt64LE(BigInt(x));
  return b;
};
const string = (s: string): Buffer => Buffer.concat([u32(Buffer.byteLength(s)), Buffer.from(s)]);

/** Runs kernels of a library, one after the other. Throws when one is not there, writes where it must not, or crashes. */
export const runKernels = (library: string, runs: readonly KernelRun[]): readonly KernelResult[] => {
  const request: Uint8Array[] = [u32(runs.length)];
  for (const r of runs) {
    request.push(string(r.kernel), string(r.isa ?? ""), u32(r.threads ?? 1), u32(r.repeats ?? 1));
    request.push(u32(r.rows.length), u32(r.stride ?? Math.max(0, ...r.rows)), ...r.rows.map(u32));
    request.push(u32(r.dims?.length ?? 0), ...(r.dims ?? []).map(u64), u32(r.args.length));
    for (const a of r.args) {
      if ("written" in a) request.push(u32(1), u64(a.written));
      else {
        const bytes = "read" in a ? a.read : a.both;
        request.push(u32("read" in a ? 0 : 2), u64(bytes.length), bytes);
      }
    }
  }
  const result = spawnSync(buildRunner(), [library], { input: Buffer.concat(request), maxBuffer: 2 ** 31 });
  if (result.error) throw result.error;
  const answer = result.stdout;
  let at = 0;
  const take = (bytes: number): Buffer => {
    if (at + bytes > answer.length)
      throw new Error(`run_kernel ended with ${result.signal ?? result.status} after ${at} bytes: ${result.stderr.toString()}`);
    at += bytes;
    return answer.subarray(at - bytes, at);
  };
  const text = (): string => take(take(4).readUInt32LE()).toString();
  return runs.map((r) => {
    let error: string;
    try {
      error = text();
    } catch (e) {
      throw new Error(`kernel ${r.kernel} on ${r.isa ?? "the best"}: ${(e as Error).message}`);
    }
    const isa = text();
    const nanoseconds = Number(take(8).readBigUInt64LE());
    const outputs = r.args.flatMap((a) =>
      "read" in a ? [] : [new Uint8Array(take("written" in a ? a.written : a.both.length))],
    );
    if (error !== "") throw new Error(`kernel ${r.kernel} on ${r.isa ?? "the best"}: ${error}`);
    return { isa, nanoseconds, outputs };
  });
};

export const runKernel = (library: string, run: KernelRun): KernelResult => runKernels(library, [run])[0] as KernelResult;

/** The instruction sets of a library that this machine can run. */
export const isasOf = (library: string): readonly string[] =>
  ["baseline", "avx2", "avx512", "amx"].filter((isa) => {
    try {
      runKernel(library, { kernel: "", isa, rows: [], args: [] });
    } catch (error) {
      return !/this machine has no/.test((error as Error).message);
    }
    return true;
  });
