/**
 * What has been shown about a bundle on this machine: for each of its programs and the target it was built for, whether it was compiled,
 * simulated, ran, and had its numbers checked. False until shown. It lies beside the bundle, in `<bundle>.build/qualification.json`, with a
 * record for each pair of bundle and toolchain: neither a bundle compiled again nor another compiler inherits anything.
 */
import { existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import type { Manifest } from "../ir/bundle.ts";
import { bundleHash } from "./bundle.ts";
import type { Progress } from "./progress.ts";

const steps = ["compiled", "simulated", "ran", "numerics_checked"] as const;
export type Step = (typeof steps)[number];
type Role = Manifest["programs"][number]["role"];

/** One program and target; `isa` is the instruction set it was built for, where one was named. */
export type ProgramRecord = {
  readonly role: Role;
  readonly target: string;
  readonly isa: string;
} & Readonly<Record<Step, boolean>>;

export interface Qualification {
  /** hash of the bundle */
  readonly bundle: string;
  /** what built it, with versions */
  readonly toolchain: string;
  readonly programs: readonly ProgramRecord[];
}

const pathOf = (bundle: string): string => join(`${resolve(bundle)}.build`, "qualification.json");

/** Every record of the file, of other bundles too that had this one's name; none where there is no file or it cannot be read. */
const readAll = (bundle: string): readonly Qualification[] => {
  try {
    const { format, records } = JSON.parse(readFileSync(pathOf(bundle), "utf8")) as {
      format?: number;
      records?: Qualification[];
    };
    return format === 1 && Array.isArray(records) ? records : [];
  } catch {
    return [];
  }
};

/** What has been shown about this bundle, one record a toolchain. */
export const qualificationsOf = (bundle: string): readonly Qualification[] => {
  const hash = bundleHash(bundle);
  return readAll(bundle).filter((q) => q.bundle === hash);
};

/** What a step was shown with. */
export interface Shown {
  readonly toolchain: string;
  /** absent: every instruction set that the program's own build makes */
  readonly isa?: string;
  /** absent: every program of the bundle */
  readonly role?: Role;
}

/**
 * Records that a step has been shown for the programs of a bundle: `compiled` by the build, `ran` by a run that ended well, and
 * `numerics_checked` by whoever has compared their numbers with a reference. Where the record cannot be written, a note says so.
 */
export const qualify = (bundle: string, manifest: Manifest, step: Step, shown: Shown, progress: Progress): void => {
  const hash = bundleHash(bundle);
  const all = readAll(bundle);
  const isIt = (q: Qualification): boolean => q.bundle === hash && q.toolchain === shown.toolchain;
  const isa = shown.isa ?? "all";
  const programs = [...(all.find(isIt)?.programs ?? [])];
  let changed = false;
  for (const { role, target } of manifest.programs) {
    if (shown.role !== undefined && shown.role !== role) continue;
    const known = programs.findIndex((p) => p.role === role && p.target === target && p.isa === isa);
    const none: ProgramRecord = { role, target, isa, compiled: false, simulated: false, ran: false, numerics_checked: false };
    const before = programs[known] ?? none;
    if (before[step]) continue;
    programs.splice(known < 0 ? programs.length : known, 1, { ...before, [step]: true });
    changed = true;
  }
  if (!changed) return;
  const records = [...all.filter((q) => !isIt(q)), { bundle: hash, toolchain: shown.toolchain, programs }];
  const path = pathOf(bundle);
  try {
    mkdirSync(join(path, ".."), { recursive: true });
    const work = `${path}.${process.pid}`;
    writeFileSync(work, `${JSON.stringify({ format: 1, records }, null, 1)}\n`);
    renameSync(work, path);
  } catch (error) {
    progress.note(
      `${path}: cannot be written (${(error as NodeJS.ErrnoException).code}); what was shown about this bundle is lost`,
    );
  }
};

/** Lines for people, of every record of the bundle. */
export const qualificationLines = (bundle: string): string[] => {
  if (!existsSync(pathOf(bundle))) return ["not built here"];
  const records = qualificationsOf(bundle);
  if (records.length === 0) return ["not built here since it was compiled"];
  return records.flatMap(({ toolchain, programs }) => [
    `built here with ${toolchain}:`,
    ...programs.map((p) => {
      const said = (shown: boolean): string =>
        steps
          .filter((step) => p[step] === shown)
          .map((step) => step.replace("_", " "))
          .join(", ");
      const [yes, no] = [said(true), said(false)];
      return `  ${p.role} on ${p.target} (${p.isa}): ${yes === "" ? "nothing shown" : yes}${no === "" ? "" : `; not ${no}`}`;
    }),
  ]);
};
