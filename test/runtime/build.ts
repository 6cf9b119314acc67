/** Builds the runtime and the test programs, plain and under sanitizers, and the fuzzer. CMake rebuilds only what changed. */
import { spawnSync } from "node:child_process";
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

export type Variant = "plain" | "address,undefined" | "thread";

export interface Native {
  readonly runner: string;
  readonly program: string;
  /** built under address checks only */
  readonly fuzz: string;
}

const root = fileURLToPath(new URL("../..", import.meta.url));

/** Warnings are errors here. Throws with the compiler's words when something does not build. */
export const buildRuntime = (variant: Variant): Native => {
  const directory = join(root, ".cache", "runtime", variant.replace(",", "-"));
  mkdirSync(directory, { recursive: true });
  const command = (...args: string[]): void => {
    const { status, stdout, stderr, error } = spawnSync("cmake", args, { encoding: "utf8" });
    if (error) throw error;
    if (status !== 0) throw new Error(`cmake ${args.join(" ")}:\n${stdout}\n${stderr}`);
  };
  command("-S", join(root, "test", "runtime"), "-B", directory, `-DSTEP3_SANITIZE=${variant === "plain" ? "" : variant}`);
  const targets = variant === "address,undefined" ? [] : ["--target", "step3-run", "program"];
  command("--build", directory, "--parallel", "2", ...targets);
  return {
    runner: join(directory, "runtime", "step3-run"),
    program: join(directory, "libprogram.so"),
    fuzz: join(directory, "fuzz"),
  };
};
