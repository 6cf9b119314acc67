/** `step3c bench`: costs as worked out by hand, a whole measurement of the sample, and what times are said to mean. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { bench } from "../compiler/bench.ts";
import { benchPage } from "../compiler/bench_page.ts";
import { type BenchReport, benchText, type Measured, sideOf } from "../compiler/bench_report.ts";
import { readJson, readManifest } from "../compiler/bundle.ts";
import type { Costs, KernelCost } from "../compiler/costs.ts";
import { silent } from "../compiler/progress.ts";
import { isPlain, step3c } from "./cli.ts";
import { compileSample, workspace } from "./sample.ts";

const work = workspace("bench");
afterAll(work.remove);
let bundle = "";
let costs: Costs;
beforeAll(async () => {
  bundle = await compileSample(join(work.path, "tiny.s3"));
  costs = readJson(join(bundle, "costs.json")) as Costs;
});

const costOf = (role: "attention" | "ffn", about: string): KernelCost => {
  const found = Object.values(costs[role]).find((k) => k.about.startsWith(about));
  if (!found) throw new Error(`no kernel is about ${about}`);
  return found;
};
const none = { base: 0, row: 0, rowContext: 0, expert: 0, pair: 0 };

describe("costs.json", () => {
  test("a linear: its weights once, a row of each side", () => {
    expect(costOf("attention", "linear bf16[T,256] x bf16[128,256] -> bf16[T,128]")).toMatchObject({
      unit: "bf16",
      flops: { ...none, row: 2 * 128 * 256 },
      bytes: { ...none, base: 2 * 128 * 256, row: 2 * (256 + 128) },
    });
  });

  test("attention: K and V of every cached token, the page table and the rows", () => {
    const { maxContext, kv } = readManifest(bundle);
    const [heads, dim, pages] = [8, 64, maxContext / (kv?.pageTokens ?? 0)];
    expect(costOf("attention", "attention of 8 heads")).toMatchObject({
      unit: "bf16",
      flops: { ...none, rowContext: 2 * 2 * heads * dim },
      bytes: { ...none, row: 2 * 2 * heads * dim + 4 * pages + 4, rowContext: 2 * 2 * dim },
    });
  });

  test("a grouped linear: the weights of each chosen expert, products of each choice", () => {
    expect(costOf("ffn", "grouped_linear bf16[T,256] x bf16[8,256,256] -> f32[3*T,256]")).toMatchObject({
      flops: { ...none, pair: 2 * 256 * 256 },
      bytes: { ...none, row: 2 * 256 + 4 * 3 + 4 * 3 * 256, expert: 2 * 256 * 256 },
      experts: { argument: 2, first: 0, count: 8 },
    });
  });
});

/** Tags nest and end; nothing is fetched. */
const wellFormed = (html: string): void => {
  const open: string[] = [];
  for (const [, end, name, self] of html.matchAll(/<(\/?)([a-z][a-z0-9]*)(?:\s+[a-z-]+="[^"<>]*")*\s*(\/?)>/gi)) {
    if (end) expect(open.pop()).toBe(name);
    else if (!self) open.push(name as string);
  }
  expect(open).toEqual([]);
  const outside = html.replace(/<style>[\s\S]*?<\/style>/, "").replace(/<[^<>]+>/g, "");
  expect(outside).not.toMatch(/[<>]/);
  expect(html).not.toMatch(/https?:|url\(|<script|<link/);
};

describe("a measurement", () => {
  test("of the sample has every kernel, as JSON and on the page", async () => {
    const html = join(work.path, "page.html");
    const text = await bench(bundle, { rows: 2, context: 32, threads: 1, json: true, html }, silent);
    const report = JSON.parse(text) as BenchReport;
    const page = readFileSync(html, "utf8");
    wellFormed(page);
    for (const { role, kernels } of readManifest(bundle).programs) {
      const side = report.sides.find((s) => s.role === role);
      expect(side?.kernels.map((k) => k.name).sort()).toEqual(kernels.map((k) => k.name).sort());
      expect(side).toMatchObject({ schedule: "decode", rows: 2, senders: 1 });
      for (const k of side?.kernels ?? []) {
        expect(k.time, k.name).toBeGreaterThan(0);
        expect(Number.isFinite(k.percent), k.name).toBe(true);
        expect(page).toContain(k.name);
      }
      for (const s of side?.segments ?? []) expect(s.time).toBeGreaterThan(0);
      expect(side?.round.time).toBeGreaterThan(0);
    }
    const grouped = report.sides.flatMap((s) => s.kernels).filter((k) => k.experts !== undefined);
    expect(grouped.length).toBeGreaterThan(0);
    for (const k of grouped) {
      expect(k.pairs).toBe(2 * 3);
      expect(k.experts).toBeGreaterThanOrEqual(3);
      expect(k.experts).toBeLessThanOrEqual(6);
    }
  }, 300_000);

  test.each([
    [["--rows", "0"], /at least 1/],
    [["--rows", "1000"], /slots of 6/],
    [["--context", "100000"], /at most 512 tokens/],
    [["--schedule", "nonsense"], /prefill and decode/],
    [["--role", "both"], /attention, ffn/],
  ])("%j is a usage error", (flags, message) => {
    const outcome = step3c(["bench", bundle, ...flags]);
    expect(outcome.err).toMatch(message);
    expect(outcome.code).toBe(2);
    expect(isPlain(outcome)).toBe(true);
  });
});

describe("what times mean", () => {
  /** 1 GB/s and 1 GFLOP/s, so that a floor is a nanosecond for a byte or an operation; a launch takes a microsecond */
  const measured = (time: number, half: number, ceilings: Measured["ceilings"]): Measured => ({
    rank: "a0",
    role: "attention",
    target: "x",
    threads: 0,
    schedule: "decode",
    slots: 1,
    rows: 8,
    senders: 1,
    context: 100,
    ceilings,
    groups: [{ kernels: ["k"], count: 2, time: { median: time, least: time, most: time } }],
    round: { median: 2 * time, least: 2 * time, most: 2 * time },
    kernels: [{ name: "k", launches: 2, distinct: 2, full: load(8, time), half: load(4, half) }],
  });
  const load = (rows: number, t: number) => ({
    rows,
    rowContext: 100 * rows,
    sequenceContext: 100,
    experts: 0,
    pairs: 0,
    time: { median: t, least: t, most: t },
  });
  const machine = { launch: 1000, read: 1e9, f32: 1e9 };
  const cost = (bytes: Partial<KernelCost["bytes"]>, flops: Partial<KernelCost["flops"]>): Costs => ({
    format: 1,
    attention: {
      k: { about: "a kernel <of> & for tests", unit: "f32", bytes: { ...none, ...bytes }, flops: { ...none, ...flops } },
    },
    ffn: {},
  });
  const reason = (time: number, half: number, of: Costs): unknown => sideOf(measured(time, half, machine), of).kernels[0]?.reason;

  test("the floor is the later of memory and products; flops count cached tokens of rows, bytes those of sequences", () => {
    const side = sideOf(measured(20_000, 10_000, machine), cost({ rowContext: 50 }, { rowContext: 20 }));
    expect(side.kernels[0]).toMatchObject({ bytes: 5000, flops: 16_000, time: 20, floor: 16, percent: 80, reason: null });
    expect(side.segments[0]).toMatchObject({ count: 2, time: 20, floor: 16, percent: 80 });
    expect(side.round).toMatchObject({ time: 40, floor: 32, percent: 80, kernels: 40 });
  });

  test.each([
    ["launch-bound", 4000, 4000, cost({ row: 100 }, {})],
    ["latency", 10_000, 5000, cost({ row: 100 }, {})],
    ["few rows", 20_000, 19_000, cost({ row: 1000 }, {})],
    ["below memory", 20_000, 19_000, cost({ base: 8000 }, {})],
    ["below memory", 20_000, 10_000, cost({ row: 1000 }, {})],
    ["below products", 20_000, 10_000, cost({ row: 100 }, { row: 1000 })],
    ["from caches", 5000, 2500, cost({ row: 1000 }, {})],
    [null, 10_000, 5000, cost({ row: 1000 }, {})],
  ])("%s", (why, time, half, of) => {
    expect(reason(time, half, of)).toBe(why);
  });

  test("a program without ceilings has times and no percents", () => {
    const side = sideOf(measured(5000, 2500, {}), cost({ row: 1000 }, { row: 1 }));
    expect(side.kernels[0]).toMatchObject({ time: 5, floor: null, percent: null, reason: null });
    const report = { bundle: "b", model: "m", sides: [side] };
    expect(benchText(report)).toContain("measures no ceilings");
    wellFormed(benchPage(report));
  });
});
