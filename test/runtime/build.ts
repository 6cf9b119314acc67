/** Builds the runtime and the test programs, plain and under sanitizers, and the fuzzer. CMake rebuilds only what changed. */
import { spawnSync } from "node:child_process";
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

export type Variant = "plain" | "address,undefined" | "thread";

export interface Native {
  readonly runner: string;
  readonly program: string;
  /** the same for the stand-in of an accelerator, with its driver */
  readonly direct: string;
  /** built under address checks only */
  readonly fuzz: string;
}

const root = fileURLToPath(new URL("../..", import.meta.url));

/** Throws with the compiler's words when something does not build. */
const cmake = (name: string, source: string, configure: readonly string[], build: readonly string[] = []): string => {
  const directory = join(root, ".cache", "runtime", name);
  mkdirSync(directory, { recursive: true });
  for (const args of [
    ["-S", join(root, source), "-B", directory, ...configure],
    ["--build", directory, "--parallel", "2", ...build],
  ]) {
    const { status, stdout, stderr, error } = spawnSync("cmake", args, { encoding: "utf8" });
    if (error) throw error;
    if (status !== 0) throw new Error(`cmake ${args.join(" ")}:\n${stdout}\n${stderr}`);
  }
  return directory;
};

/** The program that checks kernels; in a folder of its own, so that test files can build side by side. */
export const buildSelftest = (): string =>
  join(cmake("selftest", "runtime", ["-DSTEP3_WERROR=ON"], ["--target", "step3-selftest"]), "step3-selftest");

/** Warnings are errors here. */
export const buildRuntime = (variant: Variant): Native => {
  const sanitize = `-DSTEP3_SANITIZE=${variant === "plain" ? "" : variant}`;
  const targets = variant === "address,undefined" ? [] : ["--target", "step3-run", "program", "direct"];
  const directory = cmake(variant.replace(",", "-"), join("test", "runtime"), [sanitize], targets);
  return {
    runner: join(directory, "runtime", "step3-run"),
    program: join(directory, "libprogram.so"),
    direct: join(directory, "libdirect.so"),
    fuzz: join(directory, "fuzz"),
  };
};
