/** The command line as a user meets it: the built program in a process of its own. */
import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { packageRoot } from "../compiler/package_root.ts";
import { shareBuilds } from "./sample.ts";

export interface Outcome {
  readonly code: number | null;
  readonly out: string;
  readonly err: string;
}

/** Runs step3c. `node` is another Node.js to run it on. Needs `npm run build`, which test/run.sh does. */
export const step3c = (args: readonly string[], options: { readonly node?: string; readonly cwd?: string } = {}): Outcome => {
  const cli = join(packageRoot(), "dist/compiler/cli.js");
  if (!existsSync(cli)) throw new Error(`${cli} is not built; run npm run build`);
  shareBuilds();
  const run = spawnSync(options.node ?? process.execPath, [cli, ...args], {
    encoding: "utf8",
    timeout: 300_000,
    maxBuffer: 1 << 28,
    ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
  });
  return { code: run.status, out: run.stdout, err: run.stderr };
};

/** A failure for people: the exit code, one line, no stack. */
export const isPlain = (outcome: Outcome): boolean =>
  !/\n {4}at |node:internal|TypeError|RangeError/.test(outcome.err + outcome.out);
