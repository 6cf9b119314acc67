/**
 * Makes one attention rank and one FFN rank stand for N of each: a bundle for NAMF becomes one for 1A1F in which each of the two has the weights,
 * the kernels, the rows and the bytes that it has among all. What the other ranks would send is sent by the one that is there: the attention
 * rank pushes its tokens once for every attention rank and gets as many partials back. Choices of experts of the rows that stand for other
 * attention ranks are not sent, since copies would cluster; whoever runs it draws them (`step3-rounds`).
 *
 *   npm run bench:emulate -- BUNDLE OUT
 *
 * Left out: what is between hosts (all bytes go over the one link between two GPUs), the other ranks' delays, and one message a rank instead of
 * one message a slot with all of its bytes.
 */
import { cpSync, existsSync, mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { readJson, readManifest } from "../compiler/bundle.ts";
import { UserError } from "../ir/error.ts";
import type { ExchangeType, Field, Key, RankProgram, Schedule, Step } from "../ir/schedule.ts";

/** Fields that are drawn where the rows stand for another rank's; the header of such rows never changes. */
const drawn: readonly string[] = ["ids", "wgt", "head"];
const stands = (name: string, rank: number): string => (rank === 0 ? name : `${name}_${rank}`);

/** Steps that are kept, with the numbers of those they follow. */
const keepSteps = (steps: readonly Step[], keep: (step: Step) => boolean): Step[] => {
  const now = new Map<number, number>();
  const kept: Step[] = [];
  steps.forEach((step, i) => {
    if (!keep(step)) return;
    now.set(i, kept.length);
    kept.push("after" in step && step.after >= 0 ? { ...step, after: now.get(step.after) as number } : step);
  });
  return kept;
};

/** One of each side, for `ranks` of each. */
export const foldSchedule = (schedule: Schedule, ranks: number): Schedule => {
  const program = (name: string): RankProgram => {
    const found = schedule.programs.find((p) => p.rank.name === name);
    if (found === undefined) throw new Error(`no rank ${name}`);
    return found;
  };
  const [a0, f0] = [program("a0"), program("f0")];
  const keys: Key[] = [];
  const own = schedule.keys.filter((k) => k.a === 0);
  for (const slot of Array.from({ length: schedule.slots }, (_, i) => i)) {
    const of = (direction: Key["direction"], f: number): Key[] =>
      own.filter((k) => k.slot === slot && k.direction === direction && k.f === f);
    const first = of("a2f", 0);
    const tensors = first.filter((k) => k.field !== "head");
    const header = first.filter((k) => k.field === "head");
    // attention rank 0 to FFN rank j is, by symmetry, attention rank j to FFN rank 0
    for (let j = 0; j < ranks; j++)
      for (const k of tensors)
        if (j === 0 || !drawn.includes(k.field)) keys.push({ ...k, field: stands(k.field, j), segment: j });
    keys.push(...header.map((k) => ({ ...k, segment: 0 })));
    const partial = of("f2a", 0);
    for (let j = 0; j < ranks; j++)
      for (const [i, k] of of("f2a", j).entries())
        keys.push({ ...k, f: 0, field: stands(k.field, j), source: (partial[i] as Key).source, segment: j });
  }
  const wide = (fields: readonly Field[]): Field[] => {
    const last = fields.filter((f) => f.name === "head");
    const others = fields.filter((f) => f.name !== "head");
    const copies = Array.from({ length: ranks - 1 }, (_, j) =>
      others.filter((f) => !drawn.includes(f.name)).map((f) => ({ ...f, name: stands(f.name, j + 1) })),
    );
    return [...others, ...copies.flat(), ...last];
  };
  const types: ExchangeType[] = schedule.types.map((t) => ({ ...t, push: wide(t.push), pull: wide(t.pull) }));
  return {
    ...schedule,
    types,
    keys: keys.map((k, i) => ({ ...k, key: i })),
    programs: [
      a0,
      {
        ...f0,
        steps: keepSteps(f0.steps, (s) => (s.op === "accept" ? s.from === 0 : s.op === "reply" ? s.to === 0 : true)),
      },
    ],
  };
};

/** Folds a bundle into the new folder `out`. Weights, programs and the runtime are copied as they are. */
export const foldBundle = (bundle: string, out: string): void => {
  const manifest = readManifest(bundle);
  if (manifest.attention !== manifest.ffn)
    throw new UserError(`${bundle}: has ${manifest.attention}A${manifest.ffn}F; as many of each are needed`);
  if (existsSync(out)) throw new UserError(`${out}: exists; remove it or choose another folder`);
  mkdirSync(out, { recursive: true });
  for (const folder of ["programs", "runtime", "weights"])
    if (existsSync(join(bundle, folder))) cpSync(join(bundle, folder), join(out, folder), { recursive: true });
  const weights = manifest.weights.filter((w) => w.rank === "a0" || w.rank === "f0");
  const folded = { ...manifest, attention: 1, ffn: 1, weights, schedules: ["decode"] };
  writeFileSync(join(out, "manifest.json"), `${JSON.stringify(folded, null, 1)}\n`);
  const schedule = readJson(join(bundle, "schedule-decode.json")) as Schedule;
  writeFileSync(join(out, "schedule-decode.json"), `${JSON.stringify(foldSchedule(schedule, manifest.ffn))}\n`);
  writeFileSync(join(out, "COMPLETE"), "folded\n");
};

if (import.meta.url === pathToFileURL(process.argv[1] ?? "").href) {
  const [bundle, out] = process.argv.slice(2);
  try {
    if (bundle === undefined || out === undefined) throw new UserError("usage: npm run bench:emulate -- BUNDLE OUT", 2);
    foldBundle(bundle, out);
  } catch (error) {
    if (!(error instanceof UserError)) throw error;
    process.stderr.write(`${error.message}\n`);
    process.exitCode = error.exitCode;
  }
}
