import { describe, expect, test } from "vitest";
import { createChecker } from "../ir/check.ts";
import { certified, layeredGraph, step3Shape } from "./schedule_graphs.ts";
import { mutantKinds, mutants } from "./schedule_mutants.ts";

describe("mutants of a 61-layer 2A2F schedule of three micro-batches", () => {
  const { schedule, certificate } = certified(layeredGraph(step3Shape(2)), { attention: 2, microBatches: 3 });
  const check = createChecker();
  test("the schedule itself is accepted", () => {
    expect(check(schedule, certificate)).toMatchObject({ ok: true });
  });
  for (const kind of mutantKinds)
    test(`${kind}: rejected at every site`, { timeout: 120_000 }, () => {
      let sites = 0;
      const t = performance.now();
      const rules: Record<string, [number, string]> = {};
      const missed: string[] = [];
      for (const mutant of mutants(schedule, kind)) {
        sites++;
        const verdict = check(mutant.schedule, certificate);
        if (verdict.ok || verdict.rule === "certificate" || verdict.rule === "form") missed.push(`${mutant.site}: ${verdict.ok ? "accepted" : verdict.reason}`);
        else rules[verdict.rule] = [(rules[verdict.rule]?.[0] ?? 0) + 1, rules[verdict.rule]?.[1] ?? verdict.reason];
      }
      console.log(kind, sites, (performance.now() - t).toFixed(0), rules, missed.length);
      expect(missed.slice(0, 5)).toEqual([]);
      expect(sites).toBeGreaterThan(0);
    });
});
