import { spawnSync } from "node:child_process";
import { dirname, join } from "node:path";
import { UserError } from "../ir/error.ts";
import { readManifest } from "./bundle.ts";
import { buildBundle } from "./native.ts";
import type { Progress } from "./progress.ts";
import { qualify } from "./qualification.ts";

/**
 * Builds a bundle and runs the self-test that it carries: kernels on drawn inputs against what the interpreter made of them. Gives the report
 * and records what was shown; throws a UserError with exit code 3 that names the kernels that are wrong. Kernels too large to carry inputs for
 * have no case, and are named.
 */
export const checkNumbers = async (bundle: string, progress: Progress): Promise<string> => {
  const manifest = readManifest(bundle);
  const native = await buildBundle(bundle, manifest, progress);
  const selftest = join(dirname(native.runner), "step3-selftest");
  const report: string[] = [];
  for (const { role, target, kernels } of manifest.programs) {
    const library = role === "attention" ? native.attention : (native.ffn as string);
    progress.phase(`running the self-test of ${role}`);
    const { status, stdout, stderr } = spawnSync(selftest, [join(bundle, "selftest", `${role}.cases`), library, "--verbose"], {
      encoding: "utf8",
      maxBuffer: 1 << 28,
    });
    progress.end();
    const lines = stdout.trimEnd().split("\n");
    const wrong = lines.filter((line) => line.startsWith("WRONG"));
    if (wrong.length > 0)
      throw new UserError(
        [`${bundle}: the ${role} program computes something else than the interpreter here:`, ...wrong].join("\n  "),
        3,
      );
    if (status !== 0)
      throw new UserError(`${bundle}: the self-test of ${role} ended with ${status}: ${stderr.trim()}`, status === 1 ? 1 : 3);
    const tested = new Set(lines.map((line) => /^right (\w+):/.exec(line)?.[1]));
    const others = kernels.map((k) => k.name).filter((name) => !tested.has(name));
    report.push(
      `numbers: ${role} on ${target}: ${tested.size - (tested.has(undefined) ? 1 : 0)} of ${kernels.length} kernels are what the interpreter says` +
        `${others.length === 0 ? "" : `; without a case, being too large: ${others.join(", ")}`}`,
    );
    if (others.length === 0) qualify(bundle, manifest, "numerics_checked", { ...native.shown, role }, progress);
  }
  return `${report.join("\n")}\n`;
};
