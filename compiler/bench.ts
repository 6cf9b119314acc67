/** `step3c bench`: times the kernels and segments of a bundle on this machine and holds them against what the machine can do at best. */
import { spawn } from "node:child_process";
import { renameSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { UserError } from "../ir/error.ts";
import { benchPage } from "./bench_page.ts";
import { type BenchReport, benchText, type Measured, type Side, sideOf } from "./bench_report.ts";
import { readJson, readManifest } from "./bundle.ts";
import type { Costs } from "./costs.ts";
import type { Role } from "./emit.ts";
import { buildBundle } from "./native.ts";
import type { Progress } from "./progress.ts";

/** The flags of `step3c bench`; their help texts in cli.ts say what they mean. */
export interface BenchOptions {
  readonly schedule?: string;
  readonly rows?: number;
  readonly context?: number;
  readonly threads?: number;
  readonly role?: Role;
  readonly json?: boolean;
  readonly html?: string;
}

/** Measures, and gives the text or the JSON to print; writes the page where one is asked for. */
export const bench = async (bundle: string, options: BenchOptions, progress: Progress): Promise<string> => {
  const manifest = readManifest(bundle);
  if (options.schedule !== undefined && !manifest.schedules.includes(options.schedule))
    throw new UserError(`--schedule ${options.schedule}: the bundle has ${manifest.schedules.join(" and ")}`, 2);
  const roles = manifest.programs.map((p) => p.role).filter((role) => options.role === undefined || role === options.role);
  if (roles.length === 0) throw new UserError(`--role ${options.role}: the bundle has no such side`, 2);
  const costs = readJson(join(bundle, "costs.json")) as Costs;
  const native = await buildBundle(bundle, manifest, progress);
  const sides: Side[] = [];
  for (const role of roles) {
    progress.phase(`measuring ${role}`);
    const program = role === "attention" ? native.attention : native.ffn;
    const flag = (name: string, value: string | number | undefined): string[] =>
      value === undefined ? [] : [name, String(value)];
    const args = [
      ...flag("--bundle", bundle),
      ...flag("--role", role),
      ...flag("--program", program),
      ...flag("--schedule", options.schedule),
      ...flag("--rows", options.rows),
      ...flag("--context", options.context),
      ...flag("--threads", options.threads),
    ];
    const measured = JSON.parse(await step3Bench(join(dirname(native.runner), "step3-bench"), args)) as Measured;
    sides.push(sideOf(measured, costs));
  }
  progress.end();
  const report: BenchReport = { bundle, model: manifest.model.name, sides };
  if (options.html !== undefined) {
    const part = `${options.html}.part`;
    try {
      writeFileSync(part, benchPage(report));
      renameSync(part, options.html);
    } catch (error) {
      throw new UserError(`--html ${options.html}: ${(error as Error).message}`);
    }
  }
  return options.json ? `${JSON.stringify(report)}\n` : benchText(report);
};

/** Its standard output; a UserError with its own words when it fails. */
const step3Bench = async (command: string, args: readonly string[]): Promise<string> => {
  const child = spawn(command, args, { stdio: ["ignore", "pipe", "pipe"] });
  const [out, err]: [string[], string[]] = [[], []];
  child.stdout.on("data", (data: Buffer) => out.push(data.toString()));
  child.stderr.on("data", (data: Buffer) => err.push(data.toString()));
  const [code, signal] = await new Promise<[number | null, NodeJS.Signals | null]>((done, fail) => {
    child.on("error", fail);
    child.on("close", (...end) => done(end));
  });
  const said = err.join("").trim();
  if (code === 1 || code === 2 || code === 3)
    throw new UserError(said === "" ? `step3-bench ended with code ${code}` : said, code);
  if (code !== 0) throw new Error(`step3-bench ended with ${signal ?? `code ${code}`}: ${said}`);
  return out.join("");
};
