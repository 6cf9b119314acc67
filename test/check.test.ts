import { describe, expect, test } from "vitest";
import { certify } from "../compiler/certify.ts";
import { type Certificate, type CheckRule, checkSchedule, checkShared, createChecker, type Verdict } from "../ir/check.ts";
import type { Schedule, Step } from "../ir/schedule.ts";
import { certified, layeredGraph, scheduleOf, smallShape, step3Shape, tinyShape } from "./schedule_graphs.ts";
import { Contents, type Outcome, randomOf, run } from "./schedule_machine.ts";
import { type MutantKind, mutantKinds, mutants, randomEdit } from "./schedule_mutants.ts";

const ruleOf = (verdict: Verdict): CheckRule | "accepted" => (verdict.ok ? "accepted" : verdict.rule);

/** What the checker may call each kind of mistake, and how the first of them reads. */
const expected: Readonly<Record<MutantKind, readonly [rules: readonly CheckRule[], first: readonly (string | RegExp)[]]>> = {
  "dropped reply": [
    ["exchange"],
    ["f0 step 20: accept s0 #1 from a0, and s0 #0 has no reply to a0", "a0 step 42: wait s0 #0 waits for that reply forever"],
  ],
  "other order on one side": [
    ["order", "exchange"],
    [
      "a0 step 13: post s1 dense #0 is number 0 that a0 sends to f0, and",
      "f0 step 0: accept s0 #0 from a0 is number 0 on f0: s1 #0 against s0 #0",
    ],
  ],
  "posted again before the wait": [
    ["slot"],
    ["a0 step 13: post s0 dense #0 and", "a0 step 55: post s0 dense #1: s0 is posted again, and no wait comes between"],
  ],
  "changed source of a key": [
    ["keys", "unwritten"],
    [/^key \d+ a2f a0 f0 s0 scl: scl0 -> scl0$/, "a0 has scl0 already for s0 tok: a buffer of a key serves no other (K1, K2)"],
  ],
  "lengths that differ by one row": [
    ["length"],
    [/^a0: tok0, source of s0 tok: 1 x e4m3\[T,7168\], 64512 bytes each; the field is .* 57344 bytes each \(K3\)$/],
  ],
  "overlapping live ranges": [
    ["overlap"],
    ["a0: tok0 (exchange 0..57344) and", "a0: scl0 (exchange 0..1792) live for the whole round and share memory"],
  ],
  "one slot too few": [
    ["keys", "slot", "exchange"],
    [/^key \d+ a2f a0 f0 s2 tok: tok2 -> tok2: there are 2 attention ranks, 2 FFN ranks and 2 slots$/],
  ],
  "FFN rank skips a layer": [
    ["exchange", "unwritten"],
    [
      "f0 step 0: accept s0 #1 from a0: s0 #0 from a0 is due first",
      "a0 step 13: post s0 dense #0 is not accepted by f0 before it",
    ],
  ],
  "cycle between micro-batches": [
    ["deadlock"],
    [
      "a0 step 27: wait s0 #0 waits for f0 step 7: reply s0 #0 to a0, which comes after",
      "f0 step 6: accept s1 #0 from a0 waits for a0 step 28: post s1 dense #0, which comes after the first",
    ],
  ],
  "receive that nothing fills": [
    ["keys", "slot", "exchange"],
    ["s0 tok between a0 and f0 has no key: nothing fills it on f0 (K2, K4)"],
  ],
  "accept from only some": [
    ["exchange"],
    ["f0 step 4: reply s0 #0 to a0, and s0 #0 was not accepted from a0", "a0 step 13: post s0 dense #0 fills that slot"],
  ],
};

describe("mutants of a 61-layer 2A2F schedule of three micro-batches", () => {
  const { schedule, certificate } = certified(layeredGraph(step3Shape(2)), { attention: 2, microBatches: 3 });
  const check = createChecker();
  test("the schedule itself is accepted, and what is not proved is said", () => {
    const verdict = check(schedule, certificate);
    expect(verdict).toMatchObject({
      ok: true,
      summary: expect.stringMatching(/^2A2F, \d+ steps, 61 exchanges on 3 slots, 72 keys, /),
    });
    expect(verdict.ok && verdict.unproved[0]).toMatch(/a kernel touches only its arguments/);
  });
  for (const kind of mutantKinds)
    test(`${kind}: rejected at every site, in at most three lines`, { timeout: 300_000 }, () => {
      const [rules, first] = expected[kind];
      const wrong: string[] = [];
      let sites = 0;
      for (const mutant of mutants(schedule, kind)) {
        const verdict = check(mutant.schedule, certificate);
        if (
          verdict.ok ||
          !rules.includes(verdict.rule) ||
          verdict.lines.length > 3 ||
          !/[af]\d|exchange/.test(verdict.lines[0] as string)
        )
          wrong.push(`${mutant.site}: ${verdict.ok ? "accepted" : `${verdict.rule}: ${verdict.reason}`}`);
        if (sites++ === 0)
          expect(verdict.ok ? [] : verdict.lines).toEqual(first.map((x) => (x instanceof RegExp ? expect.stringMatching(x) : x)));
        // what the checker remembers of other mutants makes no difference
        if (sites % 499 === 0) expect(verdict).toEqual(checkSchedule(mutant.schedule, certificate));
      }
      expect(wrong.slice(0, 5)).toEqual([]);
      expect(sites).toBeGreaterThan(300);
    });
});

describe("agreement with a machine that runs schedules in random interleavings", () => {
  const sizes = (random: () => number): readonly [layers: number, attention: number, ffn: number, slots: number] => {
    const upTo = (n: number): number => 1 + Math.floor(random() * n);
    return [upTo(2), upTo(2), upTo(2), upTo(2)];
  };
  const small = (random: () => number): ReturnType<typeof certified> => {
    const [layers, attention, ffn, microBatches] = sizes(random);
    return certified(layeredGraph(tinyShape(layers, ffn)), { attention, microBatches, maxRows: 1, weightBytes: 8 });
  };
  /** Whether all of some interleavings end, without a fault, in the same results. */
  const sound = (schedule: Schedule, contents: Contents, interleavings: number, results?: string): boolean => {
    let first: string | undefined = results;
    for (let seed = 0; seed < interleavings; seed++) {
      const outcome: Outcome = run(schedule, contents, seed);
      if ("fault" in outcome || outcome.outputs !== (first ?? outcome.outputs)) return false;
      first = outcome.outputs;
    }
    return true;
  };
  const resultsOf = (schedule: Schedule, contents: Contents): string => {
    const outcome = run(schedule, contents, 1);
    return "fault" in outcome ? expect.fail(outcome.fault) : outcome.outputs;
  };

  test("every kind of mutant goes wrong there too", { timeout: 300_000 }, () => {
    for (const seed of [3, 4, 5]) {
      const random = randomOf(seed);
      const { schedule, certificate } = certified(layeredGraph(tinyShape(2, 2)), {
        attention: 2,
        microBatches: 1 + (seed % 3),
        maxRows: 1,
        weightBytes: 8,
      });
      const contents = new Contents();
      const results = resultsOf(schedule, contents);
      const check = createChecker();
      for (const kind of mutantKinds)
        for (const mutant of mutants(schedule, kind)) {
          expect(ruleOf(check(mutant.schedule, certificate))).not.toBe("accepted");
          if (random() > 0.03) continue;
          expect([kind, mutant.site, sound(mutant.schedule, contents, 60, results)]).toEqual([kind, mutant.site, false]);
        }
    }
  });

  test("random edits: what is accepted never goes wrong; what is rejected does, or breaks a rule on paper", {
    timeout: 300_000,
  }, () => {
    const counts = { accepted: 0, wrong: 0, paper: 0 };
    const quiet: string[] = [];
    for (let seed = 0; seed < 6; seed++) {
      const random = randomOf(seed + 100);
      const { schedule, certificate } = small(random);
      const contents = new Contents();
      const results = resultsOf(schedule, contents);
      for (let k = 0; k < 50; k++) {
        const [site, edited] = randomEdit(schedule, random);
        let verdict = checkSchedule(edited, certificate);
        if (!verdict.ok && verdict.rule === "certificate") verdict = checkSchedule(edited, certify(edited));
        if (verdict.ok) {
          counts.accepted++;
          expect([site, sound(edited, contents, 12)]).toEqual([site, true]);
        } else if (sound(edited, contents, 40, results)) {
          // a launch that names another slot than its buffers, weights with gaps, permanent memory that is shared at different times
          counts.paper++;
          // anything else is a race that few interleavings run into
          if (!["slot", "weights", "overlap"].includes(verdict.rule) && sound(edited, contents, 1000, results))
            quiet.push(`${site}: ${verdict.reason}`);
        } else counts.wrong++;
      }
    }
    expect(quiet).toEqual([]);
    expect(counts.accepted).toBeGreaterThan(80);
    expect(counts.wrong).toBeGreaterThan(80);
  });
});

describe("launches that are still queued when a message leaves", () => {
  const { schedule, certificate } = certified(layeredGraph(smallShape(2, 1)), { attention: 1, microBatches: 1 });
  const [a0, f0] = schedule.programs as [Schedule["programs"][number], Schedule["programs"][number]];
  type Launch = Step & { op: "launch" };
  const reading = (steps: readonly Step[], name: string): Launch =>
    steps.find((x) => x.op === "launch" && x.in.includes(name)) as Launch;
  /** the program with a launch that reads `name` and writes nothing, right before step `at`; messages still leave after the launches they did */
  const withReader = (r: number, at: number, name: string): Verdict => {
    const programs = schedule.programs.map((p, i) => {
      if (i !== r) return p;
      const extra: Step = { ...reading(p.steps, name), in: [name], out: [] };
      const moved = p.steps.map((x) =>
        (x.op === "post" || x.op === "reply") && x.after >= at ? { ...x, after: x.after + 1 } : x,
      );
      return { ...p, steps: [...moved.slice(0, at), extra, ...moved.slice(at)] };
    });
    return checkSchedule({ ...schedule, programs }, certificate);
  };
  const at = (p: typeof a0, op: Step["op"], exchange: number): number =>
    p.steps.findIndex((x) => x.op === op && x.op !== "launch" && x.exchange === exchange);

  test("one that reads what was accepted, behind the launch the reply follows", () => {
    const verdict = withReader(1, at(f0, "reply", 0), "tok0");
    expect(verdict).toMatchObject({
      rule: "in flight",
      lines: [/reads tok of s0 #0 from a0/, /post s0 moe #1 may overwrite it/].map((x) => expect.stringMatching(x)),
    });
  });
  test("one that reads what came back, behind the launch the next post follows", () => {
    const verdict = withReader(0, at(a0, "post", 1), "back0.0");
    expect(verdict).toMatchObject({
      rule: "in flight",
      lines: [/lets peers overwrite back/, /may not have read it yet/].map((x) => expect.stringMatching(x)),
    });
  });
  test("a kernel that writes what it reads", () => {
    const steps = f0.steps.map(
      (x): Step => (x.op === "launch" && x.out.includes("back0") ? { ...x, in: [...x.in, "back0"] } : x),
    );
    expect(checkSchedule({ ...schedule, programs: [a0, { ...f0, steps }] }, certificate)).toMatchObject({ ok: false });
    const second = f0.steps.map(
      (x, i): Step =>
        x.op === "launch" && x.out.includes("back0") && i > at(f0, "reply", 0) ? { ...x, in: [...x.in, "back0"] } : x,
    );
    expect(checkSchedule({ ...schedule, programs: [a0, { ...f0, steps: second }] }, certificate)).toMatchObject({
      rule: "overlap",
    });
  });
});

describe("certificate", () => {
  const { schedule, certificate } = certified(layeredGraph(smallShape(3, 2)), { attention: 2, microBatches: 2 });
  const refused = (change: Partial<Certificate>, line: RegExp): void =>
    expect(checkSchedule(schedule, { ...certificate, ...change })).toMatchObject({
      rule: "certificate",
      reason: expect.stringMatching(line),
    });
  test("every clock counts", () => {
    const random = randomOf(7);
    for (let i = 0; i < 200; i++) {
      const r = Math.floor(random() * 4);
      const clocks = certificate.clocks.map((list) => list.slice());
      const mine = clocks[r] as number[];
      const at = Math.floor(random() * mine.length);
      mine[at] = (mine[at] as number) + (random() < 0.5 ? 1 : -1);
      refused({ clocks }, /^certificate: .* comes after \d+ steps of [af]\d, and its clock says -?\d+$/);
    }
  });
  test("every reuse of memory has its edge, and there are no others", () => {
    certificate.reuse.forEach((edges, r) => {
      for (const [i, edge] of edges.entries()) {
        const other = (list: readonly (readonly number[])[]): Partial<Certificate> => ({
          reuse: certificate.reuse.map((x, k) => (k === r ? list : x)) as unknown as Certificate["reuse"],
        });
        refused(other(edges.filter((_, k) => k !== i)), /no edge says that .* takes memory of/);
        refused(other(edges.map((x, k) => (k === i ? [edge[0] + 1, edge[1], edge[2], edge[3]] : x))), /the edge says/);
        refused(other([...edges, [edge[0], edge[1], edge[2], edge[2]]]), /the edge says|an edge says so/);
      }
    });
  });
  test("one of another schedule, or none, is refused", () => {
    refused({ wire: "0" }, /it is of schedule decode, wire 0/);
    refused({ clocks: [] }, /it has no clocks or edges/);
    for (const none of [undefined, null, 1, "x", [], {}])
      expect(checkSchedule(schedule, none as unknown as Certificate)).toMatchObject({ rule: "certificate" });
  });
});

describe("facts of the manifest", () => {
  const { schedule, certificate } = certified(layeredGraph(smallShape(2, 2)), { attention: 2, microBatches: 2 });
  const weights = schedule.programs
    .slice(1)
    .map((p) => ({ rank: p.rank.role === "attention" ? "attention" : p.rank.name, bytes: p.memory.weights }));
  const facts = {
    wire: schedule.wire,
    attention: 2,
    ffn: 2,
    microBatches: 2,
    weights,
    kv: { pages: 4, pageBytes: 4096, pageTokens: 16 },
  };
  test("are held against the schedule", () => {
    expect(checkSchedule(schedule, certificate, facts)).toMatchObject({ ok: true });
    for (const [change, rule] of [
      [{ wire: "00" }, "form"],
      [{ attention: 3 }, "form"],
      [{ microBatches: 3 }, "form"],
      [{ kv: { pages: 5, pageBytes: 4096, pageTokens: 16 } }, "state"],
      [{ weights: weights.map((w) => ({ ...w, bytes: w.bytes + 64 })) }, "weights"],
      [{ weights: weights.slice(1) }, "weights"],
    ] as const)
      expect(ruleOf(checkSchedule(schedule, certificate, { ...facts, ...change }))).toBe(rule);
  });
  test("weights and states of all schedules of a bundle lie at the same place", () => {
    const programs = schedule.programs.map((p) => ({
      ...p,
      buffers: p.buffers.map((b) => (b.name === "kv1" ? { ...b, offset: b.offset + 64 } : b)),
    }));
    expect(checkShared([schedule, schedule])).toBeUndefined();
    expect(checkShared([schedule, { ...schedule, name: "prefill", programs }])).toMatch(
      /^a0: kv1 \(state .*\) in schedule decode, kv1 .* in prefill$/,
    );
  });
});

describe("whatever the JSON holds", () => {
  const { schedule, certificate } = certified(layeredGraph(smallShape(2, 1)), { attention: 1, microBatches: 2 });
  const text = JSON.stringify(schedule);
  test("a changed byte gives a verdict, never a crash", () => {
    const random = randomOf(1);
    let parsed = 0;
    for (let i = 0; i < 1500; i++) {
      const at = Math.floor(random() * text.length);
      const byte = String.fromCharCode(32 + Math.floor(random() * 95));
      let changed: Schedule;
      try {
        changed = JSON.parse(text.slice(0, at) + byte + text.slice(at + 1)) as Schedule;
      } catch {
        continue;
      }
      parsed++;
      const verdict = checkSchedule(changed, certificate);
      expect(verdict.ok || verdict.reason.length > 0).toBe(true);
    }
    expect(parsed).toBeGreaterThan(300);
  });
  test("a value of another kind, or a missing one, gives a verdict, never a crash", () => {
    const random = randomOf(2);
    for (let i = 0; i < 800; i++) {
      const changed = JSON.parse(text) as Record<string, unknown>;
      let at: Record<string, unknown> = changed;
      for (;;) {
        const keys = Object.keys(at);
        const key = keys[Math.floor(random() * keys.length)] as string;
        const inner = at[key];
        if (typeof inner === "object" && inner !== null && Object.keys(inner).length > 0 && random() < 0.8) {
          at = inner as Record<string, unknown>;
          continue;
        }
        if (random() < 0.3) delete at[key];
        else at[key] = [null, -1, 1e300, 0.5, "", "x", [], {}, [null], Number.NaN][Math.floor(random() * 10)];
        break;
      }
      const verdict = checkSchedule(changed as unknown as Schedule, certificate);
      expect(verdict.ok || verdict.lines.length > 0).toBe(true);
    }
  });
  test("sizes that would not fit in memory are refused before anything is made of them", () => {
    const large = scheduleOf(layeredGraph(smallShape(1, 1)), { attention: 1, microBatches: 1 });
    expect(ruleOf(checkSchedule({ ...large, slots: 1e9 }, certificate))).toBe("form");
    expect(ruleOf(checkSchedule({ ...large, exchanges: Array.from({ length: 200_000 }, () => "dense") }, certificate))).toBe(
      "form",
    );
  });
});
