/** One rank of each side standing for four of each: the same messages in sum, the same kernels, and whole rounds that run. */
import { spawnSync } from "node:child_process";
import { existsSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { foldBundle, foldSchedule } from "../bench/emulate.ts";
import { readJson, readManifest } from "../compiler/bundle.ts";
import { buildBundle } from "../compiler/native.ts";
import { silent } from "../compiler/progress.ts";
import type { Schedule, Step } from "../ir/schedule.ts";
import { compileSample, workspace } from "./sample.ts";

const work = workspace("emulate");
afterAll(work.remove);
const ranks = 4;
let bundle: string;
let schedule: Schedule;
let folded: Schedule;
beforeAll(async () => {
  bundle = await compileSample(join(work.path, "four.s3"), {
    ranks: { attention: ranks, ffn: ranks },
    precision: "fp8",
    kv: "fp8",
    maxBatch: 96,
  });
  schedule = readJson(join(bundle, "schedule-decode.json")) as Schedule;
  folded = foldSchedule(schedule, ranks);
});

/** Bytes that a slot carries one way in an exchange of a type, over all keys of the ranks that are there. */
const carried = (s: Schedule, direction: "a2f" | "f2a", type: string, slot: number): Map<string, number> => {
  const found = s.types.find((t) => t.name === type);
  const fields = new Map((direction === "a2f" ? found?.push : found?.pull)?.map((f) => [f.name, f.bytes]));
  const bytes = new Map<string, number>();
  for (const k of s.keys) {
    if (k.direction !== direction || k.a !== 0 || k.slot !== slot) continue;
    const name = k.field.replace(/_\d+$/, "");
    const size = fields.get(k.field) ?? 0;
    if (size > 0) bytes.set(name, (bytes.get(name) ?? 0) + size);
  }
  return bytes;
};

describe("the schedule", () => {
  test("carries what rank 0 exchanges with all ranks, but for what is drawn", () => {
    for (const type of ["dense", "moe"])
      for (let slot = 0; slot < schedule.slots; slot++) {
        const [before, after] = [carried(schedule, "a2f", type, slot), carried(folded, "a2f", type, slot)];
        for (const name of ["tok", "scl"]) expect(after.get(name)).toBe(before.get(name));
        for (const name of ["ids", "wgt", "head"]) expect(after.get(name)).toBe((before.get(name) ?? 0) / ranks || undefined);
        expect(carried(folded, "f2a", type, slot)).toEqual(carried(schedule, "f2a", type, slot));
      }
  });

  test("has the kernels of both ranks as they are, and one message instead of four", () => {
    const launches = (s: Schedule, rank: string): Step[] =>
      s.programs.find((p) => p.rank.name === rank)?.steps.filter((step) => step.op === "launch") ?? [];
    const count = (s: Schedule, op: Step["op"]): number =>
      s.programs.find((p) => p.rank.name === "f0")?.steps.filter((step) => step.op === op).length ?? 0;
    for (const rank of ["a0", "f0"]) expect(launches(folded, rank)).toEqual(launches(schedule, rank));
    expect(count(folded, "accept") * ranks).toBe(count(schedule, "accept"));
    expect(count(folded, "reply") * ranks).toBe(count(schedule, "reply"));
  });

  test("lets every reply follow the launch that it followed", () => {
    const f0 = (s: Schedule): readonly Step[] => s.programs.find((p) => p.rank.name === "f0")?.steps ?? [];
    const followed = (s: Schedule): unknown[] =>
      f0(s).flatMap((step) => (step.op === "reply" && step.to === 0 ? [f0(s)[step.after]] : []));
    expect(followed(folded)).toEqual(followed(schedule));
  });
});

test("refuses what it cannot fold, and a folder that is there", async () => {
  const uneven = await compileSample(join(work.path, "uneven.s3"), { ranks: { attention: 2, ffn: 1 } });
  expect(() => foldBundle(uneven, join(work.path, "out"))).toThrow(/has 2A1F; as many of each are needed/);
  expect(() => foldBundle(join(work.path, "none"), join(work.path, "out"))).toThrow(/no such bundle/);
  expect(existsSync(join(work.path, "out"))).toBe(false);
  expect(() => foldBundle(bundle, uneven)).toThrow(/exists; remove it or choose another folder/);
});

test("rounds run, and say how long they took", { timeout: 600_000 }, async () => {
  const out = join(work.path, "one.s3");
  foldBundle(bundle, out);
  const { runner, attention, ffn = "" } = await buildBundle(bundle, readManifest(bundle), silent);
  const rounds = (...flags: string[]): ReturnType<typeof spawnSync> =>
    spawnSync(
      join(dirname(runner), "step3-rounds"),
      ["--bundle", out, "--program-attention", attention, "--program-ffn", ffn, "--rounds", "5", ...flags],
      { encoding: "utf8" },
    );
  const { status, stdout, stderr } = rounds("--context", "200", "--skew", "1");
  expect(stderr).toBe("");
  expect(status).toBe(0);
  const report = JSON.parse(stdout as string) as { rows: number; slots: number; round_ms: { count: number; p50: number } };
  expect(report).toMatchObject({ rows: 32, slots: 3, context: 200, skew: 1, round_ms: { count: 5 } });
  expect(report.round_ms.p50).toBeGreaterThan(0);
  const trace = join(work.path, "trace.json");
  const several = rounds("--context", "200", "--rows", "8,16", "--trace", trace);
  expect(several.stderr).toBe("");
  const lines = (several.stdout as string).trim().split("\n");
  for (const [i, rows] of [8, 16].entries()) {
    const part = JSON.parse(lines[i] as string) as { rows: number; tokens_per_second: number; computing: Record<string, number> };
    expect(part.rows).toBe(rows);
    expect(part.tokens_per_second).toBeGreaterThan(0);
    for (const rank of ["a0", "f0"]) expect(part.computing[rank]).toBeGreaterThan(0);
    for (const rank of ["a0", "f0"]) expect(part.computing[rank]).toBeLessThan(1);
  }
  const { traceEvents } = JSON.parse(readFileSync(trace, "utf8")) as { traceEvents: { ph: string; args: { round?: number } }[] };
  expect(new Set(traceEvents.filter((x) => x.ph === "X").map((x) => x.args.round)).size).toBeLessThanOrEqual(5);
  expect(rounds("--rows", "33").status).toBe(2);
  expect(rounds("--context", "100000").stderr).toMatch(
    /^step3-rounds: --context 100000: the bundle is for at most \d+ tokens\n$/,
  );
  writeFileSync(join(out, "schedule-decode.json"), readFileSync(join(out, "schedule-decode.json"), "utf8").slice(0, 1000));
  expect(rounds().status).toBe(1);
  rmSync(out, { recursive: true });
});
