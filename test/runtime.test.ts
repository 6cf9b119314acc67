import { type ChildProcess, spawn, spawnSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { RankProgram, Schedule, Step } from "../ir/schedule.ts";
import { buildRuntime, type Native } from "./runtime/build.ts";
import {
  type Bundle,
  context,
  generated,
  H,
  logitsAfter,
  makeBundle,
  makeEvalBundle,
  makeSizesBundle,
  type Shape,
  safetensors,
  small,
  V,
  writeBundle,
} from "./runtime/fixture.ts";

let native: Native;
let checked: Native; // address and undefined behaviour
let raced: Native;
const scratch: string = mkdtempSync(join(tmpdir(), "step3-runtime-"));
afterAll(() => rmSync(scratch, { recursive: true, force: true }));
beforeAll(() => {
  native = buildRuntime("plain");
  checked = buildRuntime("address,undefined");
  raced = buildRuntime("thread");
}, 1_800_000);

interface Request {
  readonly prompt_ids: readonly number[];
  readonly max_tokens?: number;
  readonly temperature?: number;
  readonly seed?: number;
}
interface Result {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
  readonly events: readonly Event[];
  readonly stderr: string;
  readonly ms: number;
}
interface Event {
  readonly prompt: number;
  readonly token?: number;
  readonly tokens?: readonly number[];
  readonly stop?: string;
  readonly error?: string;
  readonly nll?: number;
  readonly count?: number;
}

/** How long each of the random searches for a crash goes on. */
const searchSeconds = Number(process.env.STEP3C_SEARCH_SECONDS ?? 4);

let folders = 0;
const folder = (): string => join(scratch, `b${folders++}`);
const bundleOf = (shape: Partial<Shape> = {}, spoil?: (b: Bundle) => void): string => {
  const bundle = makeBundle({ ...small, ...shape });
  spoil?.(bundle);
  return writeBundle(folder(), bundle);
};
const programs = (build: Native): string[] => ["--program-attention", build.program, "--program-ffn", build.program];
const eventsOf = (stdout: string): Event[] =>
  stdout
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => JSON.parse(line) as Event);
const lines = (requests: readonly (Request | string)[]): string =>
  requests.map((r) => `${typeof r === "string" ? r : JSON.stringify(r)}\n`).join("");

const run = (
  bundle: string,
  requests: readonly (Request | string)[],
  flags: readonly string[] = [],
  build: Native = native,
  env: Record<string, string> = {},
): Result => {
  const from = Date.now();
  const { status, signal, stdout, stderr } = spawnSync(build.runner, ["--bundle", bundle, ...programs(build), ...flags], {
    input: lines(requests),
    encoding: "utf8",
    timeout: 60_000,
    env: {
      ...process.env,
      ...env,
      ASAN_OPTIONS: "exitcode=99",
      UBSAN_OPTIONS: "exitcode=99",
      TSAN_OPTIONS: "exitcode=99 halt_on_error=1",
    },
  });
  return { code: status, signal, events: eventsOf(stdout), stderr, ms: Date.now() - from };
};

/** A rank, or all ranks, in the background. */
const begin = (
  bundle: string,
  requests: readonly Request[],
  flags: readonly string[],
  env: Record<string, string> = {},
  build: Native = native,
): { child: ChildProcess; done: Promise<Result> } => {
  const from = Date.now();
  const child = spawn(build.runner, ["--bundle", bundle, ...programs(build), ...flags], { env: { ...process.env, ...env } });
  let stdout = "";
  let stderr = "";
  child.stdout.on("data", (d: Buffer) => (stdout += d.toString()));
  child.stderr.on("data", (d: Buffer) => (stderr += d.toString()));
  child.stdin.on("error", () => {});
  child.stdin.end(lines(requests));
  const done = new Promise<Result>((resolve) =>
    child.on("close", (code, signal) => resolve({ code, signal, events: eventsOf(stdout), stderr, ms: Date.now() - from })),
  );
  return { child, done };
};

let sessions = 0;
const session = (): string[] => ["--transport", "shm", "--session", `test-${process.pid}-${sessions++}`];
const ranksOf = (shape: Shape, flags: readonly string[]): string[][] => [
  ...Array.from({ length: shape.attention }, (_, a) => ["--role", "attention", "--rank", String(a), ...flags]),
  ...Array.from({ length: shape.ffn }, (_, f) => ["--role", "ffn", "--rank", String(f), ...flags]),
];
const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

const finals = (events: readonly Event[]): Map<number, Event> =>
  new Map(events.filter((e) => e.token === undefined).map((e) => [e.prompt, e]));
const tokensOf = (r: Result): Record<number, unknown> =>
  Object.fromEntries([...finals(r.events)].sort(([a], [b]) => a - b).map(([i, e]) => [i, { tokens: e.tokens, stop: e.stop }]));
const expected = (requests: readonly Request[], ffn: number): Record<number, unknown> =>
  Object.fromEntries(requests.map((r, i) => [i, generated(r.prompt_ids, r.max_tokens ?? 128, ffn)]));

const many: readonly Request[] = Array.from({ length: 16 }, (_, i) => ({
  prompt_ids: Array.from({ length: 1 + ((i * 5) % 11) }, (_, j) => (i * 7 + j * 3) % 30),
  max_tokens: 1 + ((i * 3) % 9),
}));

describe("generation", () => {
  const shapes: [string, Partial<Shape>][] = [
    ["1A1F", {}],
    ["2A1F", { attention: 2 }],
    ["1A2F", { ffn: 2 }],
    ["2A2F, 4 slots", { attention: 2, ffn: 2, slots: 4 }],
    ["one slot of one row", { slots: 1, decodeRows: 1, prefillRows: 1, maxBatch: 1 }],
    ["prompts wait for pages", { pages: 5 }],
  ];
  for (const [name, shape] of shapes)
    it(`${name}: many prompts at once give what each gives alone`, () => {
      const bundle = bundleOf(shape);
      const want = expected(many, shape.ffn ?? 1);
      for (const transport of ["local", "shm"]) {
        const r = run(bundle, many, ["--strict", "--transport", transport]);
        expect(r.stderr).toBe("");
        expect(r.code).toBe(0);
        expect(tokensOf(r)).toEqual(want);
        // events come as tokens do
        for (const [i, e] of finals(r.events))
          expect(r.events.filter((x) => x.prompt === i && x.token !== undefined).map((x) => x.token)).toEqual(e.tokens);
      }
    });

  it("logits are the same bytes from local and shm, any number of slots, threads and companions", () => {
    const want = new Map(
      many.map((r, i) => {
        const { tokens } = generated(r.prompt_ids, r.max_tokens ?? 128, 2);
        return [
          i,
          Buffer.from(
            Float32Array.from(tokens.flatMap((_, t) => logitsAfter([...r.prompt_ids, ...tokens.slice(0, t)], 2))).buffer,
          ),
        ];
      }),
    );
    for (const [slots, attention, flags] of [
      [1, 1, []],
      [3, 2, ["--threads", "3"]],
      [2, 1, ["--transport", "shm"]],
      [4, 2, ["--transport", "shm", "--threads", "2"]],
    ] as const) {
      const bundle = bundleOf({ ffn: 2, slots, attention });
      const file = join(scratch, "logits");
      expect(run(bundle, many, [...flags, "--logits", file]).code).toBe(0);
      for (const [i, bytes] of want) expect(readFileSync(`${file}.${i}`).equals(bytes), `slots ${slots}, prompt ${i}`).toBe(true);
      expect(run(bundle, [many[3] as Request], [...flags, "--logits", file]).code).toBe(0);
      expect(readFileSync(file).equals(want.get(3) as Buffer)).toBe(true);
    }
    expect(readdirSync(scratch).filter((f) => f.endsWith(".part"))).toEqual([]);
  });

  it("stops at end of text, at max_tokens and where the context ends", () => {
    const prompts = Array.from({ length: 30 }, (_, i) => ({ prompt_ids: [i] }));
    const r = run(bundleOf(), prompts);
    expect(tokensOf(r)).toEqual(expected(prompts, 1));
    const stops = new Set([...finals(r.events).values()].map((e) => e.stop));
    expect(stops).toEqual(new Set(["eos", "length"]));
    const full = Array.from({ length: context }, () => 1);
    expect(finals(run(bundleOf(), [{ prompt_ids: full }, { prompt_ids: [1], max_tokens: 0 }]).events)).toEqual(
      new Map([
        [0, { prompt: 0, tokens: generated(full, 1, 1).tokens, stop: "length" }],
        [1, { prompt: 1, tokens: [], stop: "length" }],
      ]),
    );
  });

  it("a prompt at fault says why, the others go on, the exit code is 1", () => {
    const r = run(bundleOf(), [
      { prompt_ids: [] },
      { prompt_ids: [1, 2, 3], max_tokens: 2 },
      { prompt_ids: Array.from({ length: context + 1 }, () => 1) },
      { prompt_ids: [99] },
      { prompt_ids: [30] },
      "not json",
      '{"prompt_ids":"abc"}',
      '{"prompt_ids":[1],"temperature":-1}',
      { prompt_ids: [4], max_tokens: 1 },
    ]);
    expect(r.code).toBe(1);
    expect(r.stderr).toBe("");
    const errors = [...finals(r.events)].sort(([a], [b]) => a - b).map(([, e]) => e.error);
    expect(errors[0]).toMatch(/empty/);
    expect(errors[1]).toBeUndefined();
    expect(errors[2]).toMatch(/17 tokens, longer than the context of 16/);
    expect(errors[3]).toMatch(/token id 99 is not in the vocabulary of 32/);
    expect(errors[4]).toMatch(/token id 30 is refused: image token: this bundle has no vision tower/);
    expect(errors[5]).toMatch(/line 6: not valid JSON at byte 0/);
    expect(errors[6]).toMatch(/line 7: .*expected an array/);
    expect(errors[7]).toMatch(/temperature is 0 or more/);
    expect(errors[8]).toBeUndefined();
  });

  it("a prompt that the KV pool can never hold is refused, not waited for", () => {
    const r = run(bundleOf({ pages: 3 }), [
      { prompt_ids: Array.from({ length: 9 }, () => 1) },
      { prompt_ids: [1], max_tokens: 100 },
    ]);
    expect(finals(r.events).get(0)?.error).toMatch(/9 tokens, the KV cache holds 8/);
    expect(finals(r.events).get(1)?.tokens).toEqual(generated([1], 7, 1).tokens);
  });

  it("sampling is keyed by seed and position, not by slot or company", () => {
    const requests = [5, 6, 5].map((seed) => ({ prompt_ids: [1, 2], max_tokens: 4, temperature: 1, seed }));
    const want = (seed: number): number[] => [1, 2, 3, 4].map((p) => (seed * 31 + p) % V);
    const r = finals(run(bundleOf({ attention: 2 }), requests).events);
    expect([0, 1, 2].map((i) => r.get(i)?.tokens)).toEqual([want(5), want(6), want(5)]);
  });

  it("--score gives the sum of -log p and the logits of every position", () => {
    const ids = [3, 1, 4, 1, 5, 9, 2, 6, 5];
    const all = ids.map((_, t) => logitsAfter(ids.slice(0, t + 1), 1));
    const nll = ids.slice(1).reduce((sum, id, t) => {
      const row = all[t] as number[];
      const most = Math.max(...row);
      return sum + most + Math.log(row.reduce((s, x) => s + Math.exp(x - most), 0)) - (row[id] as number);
    }, 0);
    const file = join(scratch, "scored");
    for (const transport of ["local", "shm"]) {
      const r = run(
        bundleOf(),
        [{ prompt_ids: ids }, { prompt_ids: [7] }, { prompt_ids: [] }],
        ["--score", "--logits", file, "--transport", transport],
      );
      expect(r.code).toBe(1);
      expect(finals(r.events).get(0)?.count).toBe(8);
      expect(finals(r.events).get(0)?.nll).toBeCloseTo(nll, 9);
      expect(finals(r.events).get(1)).toEqual({ prompt: 1, nll: 0, count: 0 });
      expect(finals(r.events).get(2)?.error).toMatch(/empty/);
      expect(readFileSync(`${file}.0`).equals(Buffer.from(Float32Array.from(all.flat()).buffer))).toBe(true);
    }
  });

  it("--no-weights bundles are filled from the seed, the same each time", () => {
    const bundle = bundleOf({ seeded: true, ffn: 2 });
    const files = ["local", "shm"].map((transport) => {
      const file = join(scratch, `seeded-${transport}`);
      expect(run(bundle, [{ prompt_ids: [1, 2, 3], max_tokens: 3 }], ["--transport", transport, "--logits", file]).code).toBe(0);
      return readFileSync(file);
    });
    expect(files[0]?.equals(files[1] as Buffer)).toBe(true);
    const values = new Float32Array(new Uint8Array(files[0] as Buffer).buffer);
    expect(new Set(values).size).toBeGreaterThan(V);
    expect(values.every((v) => Number.isFinite(v))).toBe(true);
  });

  it("--stats and --trace: a process for every rank, a thread for every slot, rows per expert", () => {
    for (const transport of ["local", "shm"]) {
      const stats = join(scratch, "stats.json");
      const trace = join(scratch, "trace.json");
      const r = run(bundleOf({ attention: 2, ffn: 2 }), many, ["--transport", transport, "--stats", stats, "--trace", trace]);
      expect(r.code).toBe(0);
      const s = JSON.parse(readFileSync(stats, "utf8"));
      const total = many.reduce((n, _, i) => n + (finals(r.events).get(i)?.tokens?.length ?? 0), 0);
      expect(s.tokens).toBe(total);
      expect(s.time_to_first_token_ms.count).toBe(many.length);
      expect(s.time_per_token_ms.count).toBe(total - many.length);
      expect(s.time_per_token_ms.p99).toBeGreaterThanOrEqual(s.time_per_token_ms.p50);
      expect(s.ranks.map((x: { rank: string }) => x.rank)).toEqual(["a0", "a1", "f0", "f1"]);
      expect(s.rows_per_value).toHaveLength(1);
      const rows = s.rows_per_value[0];
      expect([rows.exchange, rows.field, rows.rows.length]).toEqual([0, "ids", 4]);
      // two experts for every row that was computed: all prompt tokens, and all generated ones but the last of each
      const computed = many.reduce((n, p) => n + p.prompt_ids.length, 0) + total - many.length;
      expect(rows.rows.reduce((a: number, b: number) => a + b, 0)).toBe(2 * computed);

      const events = JSON.parse(readFileSync(trace, "utf8")).traceEvents as Record<string, unknown>[];
      expect(new Set(events.map((e) => e.pid))).toEqual(new Set([0, 1, 2, 3]));
      const steps = events.filter((e) => e.ph === "X");
      expect(new Set(steps.filter((e) => e.pid === 0).map((e) => e.tid))).toEqual(new Set([0, 1, 2, 3]));
      expect(new Set(steps.map((e) => e.name))).toEqual(
        new Set([
          "agree",
          "embed",
          "route",
          "post moe",
          "wait moe",
          "merge2",
          "copy",
          "post dense",
          "wait dense",
          "head",
          "accept moe",
          "experts",
          "reply moe",
          "accept dense",
          "dense",
          "reply dense",
        ]),
      );
      expect(steps.every((e) => (e.ts as number) >= 0 && (e.dur as number) >= 0)).toBe(true);
    }
  });
});

describe("evaluation of a graph", () => {
  it("reads and writes raw tensors by name", () => {
    const bundle = writeBundle(folder(), makeEvalBundle());
    const inputs = join(scratch, "in");
    const outputs = join(scratch, "out");
    for (const f of [inputs, outputs]) mkdirSync(f, { recursive: true });
    const x = Float32Array.from({ length: 3 * H }, (_, i) => i / 2);
    writeFileSync(join(inputs, "layer_x.bin"), Buffer.from(x.buffer));
    const flags = ["--eval", "--inputs", inputs, "--outputs", outputs, "--rows"];
    const r = run(bundle, [], [...flags, "3"]);
    expect(r.stderr).toBe("");
    expect(r.code).toBe(0);
    expect([...new Float32Array(new Uint8Array(readFileSync(join(outputs, "y.bin"))).buffer)]).toEqual([...x].map((v) => 2 * v));
    expect(run(bundle, [], [...flags, "2"])).toMatchObject({
      code: 1,
      stderr: expect.stringMatching(/input 'layer\/x': .* has 96 bytes.* 64.*--rows/),
    });
    expect(run(bundle, [], [...flags, "5"])).toMatchObject({ code: 1, stderr: expect.stringMatching(/--rows 5: .* at most 4/) });
    rmSync(join(inputs, "layer_x.bin"));
    expect(run(bundle, [], [...flags, "3"])).toMatchObject({
      code: 1,
      stderr: expect.stringMatching(/layer_x\.bin cannot be opened/),
    });
  });

  describe("of several symbols", () => {
    const floats = (file: string): number[] => [...new Float32Array(new Uint8Array(readFileSync(file)).buffer)];
    /** Runs the graph at one size, on drawn inputs; gives outputs and what they should be. */
    const at = (bundle: string, size: { B: number; T: number; S: number; P: number }, flags: string[] = [], build = native) => {
      const [inputs, outputs] = [folder(), folder()];
      for (const f of [inputs, outputs]) mkdirSync(f);
      const { B, T, S, P } = size;
      const drawn = (name: string, n: number): number[] => {
        const data = Float32Array.from({ length: n }, (_, i) => (i * 7 + name.length) % 31);
        writeFileSync(join(inputs, `${name}.bin`), Buffer.from(data.buffer));
        return [...data];
      };
      const [x, past] = [drawn("x", B * S), drawn("past", P * B)];
      drawn("rows", T * 8);
      const symbols = ["--rows", String(T), "--symbols", `B=${B},S=${S},P=${P}`];
      const result = run(bundle, [], ["--eval", "--inputs", inputs, "--outputs", outputs, ...symbols, ...flags], build);
      const turned = Array.from({ length: S * B }, (_, i) => x[(i % B) * S + Math.floor(i / B)] as number);
      return {
        result,
        got: () => ({ all: floats(join(outputs, "all.bin")), told: floats(join(outputs, "told.bin")) }),
        expected: { all: [...past, ...turned], told: Array.from({ length: T }, () => [B, T, S, P, 0, 0, 0, 0]).flat() },
      };
    };

    it("one bundle runs at any size, kernels find the sizes, outputs have theirs", () => {
      const bundle = writeBundle(folder(), makeSizesBundle());
      for (const size of [
        { B: 1, T: 3, S: 2, P: 0 },
        { B: 3, T: 0, S: 6, P: 1 },
        { B: 4, T: 2, S: 8, P: 6 },
      ])
        for (const build of [native, checked])
          for (const flags of [[], ["--threads", "3"], ["--strict"]]) {
            const { result, got, expected } = at(bundle, size, flags, build);
            expect([result.code, result.stderr]).toEqual([0, ""]);
            expect(got()).toEqual(expected);
          }
    });

    it.each([
      ["above the maximum", { B: 5 }, /--symbols B=5: the graph was compiled for 1 to 4/],
      ["below the minimum", { S: 0 }, /--symbols S=0: the graph was compiled for 2 to 8, a multiple of 2/],
      ["no multiple", { S: 5 }, /--symbols S=5: .* a multiple of 2/],
      ["more rows", { T: 4 }, /--rows 4: the schedule holds at most 3/],
    ])("%s: refused, with the limit", (_, change, why) => {
      const { result } = at(writeBundle(folder(), makeSizesBundle()), { B: 2, T: 1, S: 4, P: 1, ...change });
      expect(result.code).toBe(1);
      expect(result.stderr).toMatch(why);
    });

    it("values that are missing, unknown, or badly written are named", () => {
      const bundle = writeBundle(folder(), makeSizesBundle());
      const given = (symbols: string): Result =>
        run(bundle, [], ["--eval", "--inputs", scratch, "--outputs", scratch, "--rows", "1", "--symbols", symbols]);
      expect(given("B=1,S=2")).toMatchObject({
        code: 1,
        stderr: expect.stringMatching(/symbol P has no value; add --symbols P=N/),
      });
      expect(given("B=1,S=2,P=0,Q=1")).toMatchObject({
        code: 1,
        stderr: expect.stringMatching(/Q=1: the graph has no such symbol/),
      });
      expect(given("B=1,S=2,P=0,T=1")).toMatchObject({ code: 1, stderr: expect.stringMatching(/T is what --rows gives/) });
      for (const text of ["B", "B=", "=1", "B=1,,S=2", "B=1,B=1", "B=-1", "B=1,"]) expect(given(text).code).toBe(2);
    });

    it("rows that other symbols define must be theirs", () => {
      const bundle = makeSizesBundle();
      bundle.schedules = bundle.schedules.map((s) => ({
        ...s,
        symbols: s.symbols.map((x) => (x.name === "T" ? { ...x, is: "B-1" } : x)),
      }));
      const path = writeBundle(folder(), bundle);
      expect(at(path, { B: 3, T: 2, S: 2, P: 1 }).result).toMatchObject({ code: 0, stderr: "" });
      expect(at(path, { B: 3, T: 3, S: 2, P: 1 }).result).toMatchObject({
        code: 1,
        stderr: expect.stringMatching(/symbol T is given as 3, and is B-1 = 2/),
      });
    });

    it("a size that comes out negative is refused", () => {
      const bundle = makeSizesBundle();
      const [program] = bundle.schedules[0]?.programs ?? [];
      const output = program?.buffers.find((b) => b.binds === "all") as { shape: unknown };
      output.shape = ["S-P", "B"];
      const { result } = at(writeBundle(folder(), bundle), { B: 1, T: 1, S: 2, P: 3 });
      expect(result).toMatchObject({
        code: 1,
        stderr: expect.stringMatching(/'all' cannot be with B=1, T=1, S=2, P=3: .*'S-P' is -1/),
      });
    });

    it("buffers smaller than a shape may become are refused", () => {
      const bundle = makeSizesBundle();
      const [program] = bundle.schedules[0]?.programs ?? [];
      const output = program?.buffers.find((b) => b.binds === "all") as { shape: unknown };
      output.shape = ["20-P", "B"];
      const { result } = at(writeBundle(folder(), bundle), { B: 1, T: 1, S: 2, P: 3 });
      expect(result).toMatchObject({ code: 1, stderr: expect.stringMatching(/smaller than its shape/) });
    });
  });
});

describe("ranks in processes of their own", () => {
  const shape: Shape = { ...small, attention: 2, ffn: 2 };

  it("meet in any order and share the prompts", async () => {
    const bundle = writeBundle(folder(), makeBundle(shape));
    const ranks = ranksOf(shape, session()).map((flags) => flags);
    const started = [];
    for (const flags of [ranks[3], ranks[0], ranks[2], ranks[1]] as string[][]) {
      started.push(begin(bundle, many, flags));
      await sleep(50);
    }
    const results = await Promise.all(started.map((s) => s.done));
    for (const r of results) expect([r.code, r.stderr]).toEqual([0, ""]);
    expect(tokensOf({ ...(results[0] as Result), events: results.flatMap((r) => r.events) })).toEqual(expected(many, 2));
  });

  it("take the session from a file of peers", async () => {
    const bundle = bundleOf();
    const peers = join(scratch, "peers.json");
    writeFileSync(peers, JSON.stringify({ session: `test-${process.pid}-peers` }));
    const flags = ["--transport", "shm", "--peers", peers];
    const results = await Promise.all(ranksOf(small, flags).map((f) => begin(bundle, many, f).done));
    expect(results.map((r) => r.code)).toEqual([0, 0]);
  });

  it("refuse a peer with another wire contract, both hashes named on both sides", async () => {
    const [left, right] = [makeBundle(small), makeBundle({ ...small, source: "another" })];
    const [flags] = [session()];
    const results = await Promise.all([
      begin(writeBundle(folder(), left), many, ["--role", "attention", "--rank", "0", ...flags]).done,
      begin(writeBundle(folder(), right), many, ["--role", "ffn", "--rank", "0", ...flags]).done,
    ]);
    for (const r of results) {
      expect(r.code).toBe(3);
      expect(r.stderr).toContain(left.manifest.wire);
      expect(r.stderr).toContain(right.manifest.wire);
      expect(r.stderr.trim().split("\n")).toHaveLength(1);
    }
  });

  it("refuse a peer whose messages have another length (K3)", async () => {
    const other = makeBundle({ ...small, decodeRows: 3, prefillRows: 5 });
    const mine = makeBundle(small);
    const flags = session();
    const results = await Promise.all([
      begin(writeBundle(folder(), mine), many, ["--role", "attention", "--rank", "0", ...flags]).done,
      begin(writeBundle(folder(), other), many, ["--role", "ffn", "--rank", "0", ...flags]).done,
    ]);
    for (const r of results)
      expect(r).toMatchObject({ code: 3, stderr: expect.stringMatching(/contract K3|ended before the first round/) });
    expect(results.map((r) => r.stderr).join()).toMatch(/sends 128 bytes, rank f0 expects 160 \(contract K3\)/);
  });

  it("name the rank that does not come", async () => {
    const r = await begin(bundleOf(), many, ["--role", "attention", "--rank", "0", ...session(), "--timeout", "1"]).done;
    expect(r).toMatchObject({ code: 3, stderr: expect.stringMatching(/waited 1 s for rank f0 of session/) });
  });

  it("refuse a second rank of the same name", async () => {
    const bundle = bundleOf();
    const flags = ["--role", "attention", "--rank", "0", ...session()];
    const first = begin(bundle, many, flags);
    await sleep(300);
    expect(await begin(bundle, many, flags).done).toMatchObject({
      code: 3,
      stderr: expect.stringMatching(/already has a rank a0/),
    });
    first.child.kill("SIGINT");
    expect((await first.done).stderr).toMatch(/interrupted/);
  });

  const long = Array.from({ length: 200 }, (_, i) => ({ prompt_ids: [1 + (i % 20)], max_tokens: 100 }));
  for (let victim = 0; victim < 4; victim++)
    it(`all end within 2 s, exit code 3, when rank ${["a0", "a1", "f0", "f1"][victim]} is killed, and nothing is left behind`, async () => {
      const before = readdirSync("/dev/shm");
      const bundle = writeBundle(folder(), makeBundle(shape));
      const flags = session();
      const started = ranksOf(shape, flags).map((f) => begin(bundle, long, f, { STEP3_TEST_SLEEP_MS: "20" }));
      await sleep(700);
      const at = Date.now();
      started[victim]?.child.kill("SIGKILL");
      const results = await Promise.all(started.map((s) => s.done));
      expect(Date.now() - at).toBeLessThan(2000);
      for (const [i, r] of results.entries()) {
        if (i === victim) {
          expect(r.signal).toBe("SIGKILL");
          continue;
        }
        expect(r.code).toBe(3);
        expect(r.stderr).toMatch(/rank [af][01] \(process \d+\) (ended unexpectedly|failed)/);
        expect(r.stderr.trim().split("\n")).toHaveLength(1);
      }
      expect(readdirSync("/dev/shm")).toEqual(before);
    });

  it("end even in the middle of a long kernel", async () => {
    const bundle = bundleOf();
    const started = ranksOf(small, session()).map((f) => begin(bundle, long, f, { STEP3_TEST_SLEEP_MS: "20000" }));
    await sleep(700);
    const at = Date.now();
    started[0]?.child.kill("SIGKILL");
    expect(await started[1]?.done).toMatchObject({
      code: 3,
      stderr: expect.stringMatching(/rank a0 .* ended unexpectedly while rank f0 was computing/),
    });
    expect(Date.now() - at).toBeLessThan(2000);
  });

  it("forked together: a killed rank ends them all with one line", async () => {
    const bundle = writeBundle(folder(), makeBundle(shape));
    const { child, done } = begin(bundle, long, ["--transport", "shm"], { STEP3_TEST_SLEEP_MS: "20" });
    await sleep(700);
    const children = spawnSync("pgrep", ["-P", String(child.pid)], { encoding: "utf8" })
      .stdout.trim()
      .split("\n")
      .map(Number);
    expect(children).toHaveLength(4);
    const at = Date.now();
    process.kill(children[2] as number, "SIGKILL");
    const r = await done;
    expect(Date.now() - at).toBeLessThan(2000);
    expect(r).toMatchObject({ code: 3, stderr: `step3-run: rank f0 (process ${children[2]}) was ended by signal 9 (Killed)\n` });
  });

  it("a crash is told as ours: exit code 70 and the kernel's name", async () => {
    for (const transport of ["local", "shm"]) {
      const r = await begin(bundleOf(), many, ["--transport", transport], { STEP3_TEST_CRASH: "1" }).done;
      expect(r).toMatchObject({ code: 70, stderr: expect.stringMatching(/crashed \(SIGSEGV\) in kernel experts/) });
    }
  });

  it("SIGINT ends a run cleanly, unfinished prompts say so", async () => {
    for (const transport of ["local", "shm"]) {
      const { child, done } = begin(bundleOf(), long, ["--transport", transport], { STEP3_TEST_SLEEP_MS: "20" });
      await sleep(700);
      child.kill("SIGINT");
      const r = await done;
      expect([r.signal, r.stderr]).toEqual(["SIGINT", "step3-run: interrupted\n"]);
      expect(finals(r.events).size).toBe(long.length);
      expect(finals(r.events).get(199)?.error).toBe("interrupted");
    }
  });
});

describe("the transport of queues, on a stand-in for accelerators whose work is late at random", () => {
  const direct: Partial<Shape> = { device: "stand-in" };
  const late = { STEP3_TEST_DELAY_US: "300" };
  const onDirect = (build: Native, flags: readonly string[] = []): string[] => [
    "--program-attention",
    build.direct,
    "--program-ffn",
    build.direct,
    "--transport",
    "cuda",
    ...flags,
  ];
  /** Every rank in a process of its own; by rank. */
  const apart = (shape: Shape, requests: readonly Request[], env: Record<string, string>, build = native): Promise<Result[]> => {
    const bundle = writeBundle(folder(), makeBundle(shape));
    const flags = onDirect(build, session().slice(2));
    return Promise.all(ranksOf(shape, flags).map((f) => begin(bundle, requests, f, env, build).done));
  };
  const gathered = (results: readonly Result[]): Result => ({
    ...(results[0] as Result),
    events: results.flatMap((r) => r.events),
  });

  const shapes: [string, Partial<Shape>][] = [
    ["1A1F", {}],
    ["2A2F, 4 slots", { attention: 2, ffn: 2, slots: 4 }],
    ["3A1F, one slot", { attention: 3, slots: 1 }],
  ];
  for (const [name, shape] of shapes)
    it(`${name}: as from local, in one process and in several`, async () => {
      const want = expected(many, shape.ffn ?? 1);
      const together = run(bundleOf({ ...shape, ...direct }), many, onDirect(native), native, late);
      expect([together.code, together.stderr]).toEqual([0, ""]);
      expect(tokensOf(together)).toEqual(want);
      const results = await apart({ ...small, ...shape, ...direct }, many, late);
      for (const r of results) expect([r.code, r.stderr]).toEqual([0, ""]);
      expect(tokensOf(gathered(results))).toEqual(want);
    });

  it("rows per expert are counted without a stop in the round", () => {
    const stats = join(scratch, "stats.json");
    for (const attention of [1, 2]) {
      const r = run(bundleOf({ attention, ...direct }), many, onDirect(native, ["--stats", stats]), native, late);
      expect([r.code, r.stderr]).toEqual([0, ""]);
      const made = many.reduce((n, _, i) => n + (finals(r.events).get(i)?.tokens?.length ?? 0), 0);
      const computed = many.reduce((n, p) => n + p.prompt_ids.length, 0) + made - many.length;
      const { rows } = JSON.parse(readFileSync(stats, "utf8")).rows_per_value[0] as { rows: number[] };
      expect(rows.reduce((x, y) => x + y, 0)).toBe(2 * computed);
    }
  });

  it("--trace shows what the devices did when, one thing after another", () => {
    const trace = join(scratch, "trace.json");
    const r = run(bundleOf({ attention: 2, ffn: 2, ...direct }), many, onDirect(native, ["--trace", trace]), native, late);
    expect([r.code, r.stderr]).toEqual([0, ""]);
    type Event = { ph: string; pid: number; name: string; ts: number; dur: number };
    const events = (JSON.parse(readFileSync(trace, "utf8")).traceEvents as Event[]).filter((e) => e.ph === "X");
    const names = (pid: number): Set<string> => new Set(events.filter((e) => e.pid === pid).map((e) => e.name));
    expect(names(0)).toEqual(new Set(["agree", "embed and 1 more", "wait moe", "merge2 and 1 more", "wait dense"]));
    expect(names(2)).toEqual(new Set(["agree", "accept moe", "experts", "accept dense", "dense"]));
    for (const pid of [0, 1, 2, 3]) {
      let done = 0;
      for (const e of events.filter((x) => x.pid === pid && x.name !== "agree")) {
        expect(e.ts).toBeGreaterThanOrEqual(done - 0.01);
        expect(e.dur).toBeGreaterThanOrEqual(0);
        done = e.ts + e.dur;
      }
    }
  });

  const shape: Shape = { ...small, attention: 2, ffn: 2, ...direct };
  it("no data races, no bad addresses, nothing undefined", async () => {
    for (const [build, flags] of [
      [raced, []],
      [raced, ["--stats", join(scratch, "s.json")]],
      [checked, []],
    ] as const) {
      const r = run(bundleOf(shape), many, onDirect(build, flags), build, late);
      expect([r.code, r.stderr]).toEqual([0, ""]);
      expect(tokensOf(r)).toEqual(expected(many, 2));
    }
    // not for races: what orders two threads must not go through another process
    for (const r of await apart(shape, many, late, checked)) expect([r.code, r.stderr]).toEqual([0, ""]);
  });

  const long = Array.from({ length: 200 }, (_, i) => ({ prompt_ids: [1 + (i % 20)], max_tokens: 100 }));
  for (let victim = 0; victim < 4; victim++)
    it(`all end within 2 s, exit code 3, when rank ${["a0", "a1", "f0", "f1"][victim]} is killed`, async () => {
      const bundle = writeBundle(folder(), makeBundle(shape));
      const flags = onDirect(native, session().slice(2));
      const started = ranksOf(shape, flags).map((f) => begin(bundle, long, f, { ...late, STEP3_TEST_SLEEP_MS: "20" }));
      await sleep(700);
      const at = Date.now();
      started[victim]?.child.kill("SIGKILL");
      const results = await Promise.all(started.map((s) => s.done));
      expect(Date.now() - at).toBeLessThan(2000);
      for (const [i, r] of results.entries()) {
        if (i === victim) continue;
        expect([r.code, r.stderr.trim().split("\n").length]).toEqual([3, 1]);
        expect(r.stderr).toMatch(/rank [af][01] \(process \d+\) (ended unexpectedly|failed)/);
      }
    });

  it("a rank that fails in the middle of a round takes the others along, whose queues wait for it", async () => {
    const env = { ...late, STEP3_TEST_BREAK: "20" };
    const message = /rank f[01]: launching: the test breaks it/;
    const together = run(bundleOf(shape), many, onDirect(native), native, env);
    expect(together).toMatchObject({ code: 70, stderr: expect.stringMatching(message) });
    const results = await apart(shape, many, env);
    for (const r of [together, ...results]) expect(r.ms).toBeLessThan(3000);
    // of the two that break, one may hear of the other first
    for (const r of results) expect(r.stderr).toMatch(message);
    expect(new Set(results.map((r) => r.code))).toEqual(new Set([3, 70]));
    expect(results.slice(0, 2).map((r) => r.code)).toEqual([3, 3]);
  });

  it("a peer with another wire contract, and one with another transport, are refused on both sides", async () => {
    for (const [other, transport, message] of [
      ["another", "cuda", /the wire contracts differ/],
      [
        undefined,
        "shm",
        /rank (a0|f0) runs with --transport (cuda|shm), rank (a0|f0) with --transport (cuda|shm); give all ranks the same/,
      ],
    ] as const) {
      const flags = session().slice(2);
      const left = bundleOf(direct);
      const right = bundleOf(transport === "shm" ? {} : { ...direct, ...(other === undefined ? {} : { source: other }) });
      const results = await Promise.all([
        begin(left, many, ["--role", "attention", "--rank", "0", ...onDirect(native, flags)]).done,
        begin(right, many, [
          "--role",
          "ffn",
          "--rank",
          "0",
          ...(transport === "shm" ? [] : onDirect(native)),
          "--transport",
          transport,
          ...flags,
        ]).done,
      ]);
      for (const r of results) expect(r).toMatchObject({ code: 3, stderr: expect.stringMatching(message) });
    }
  });

  it("a device that cannot exchange by itself: the rank is named, and the transport that would do", () => {
    for (const [devices, rank] of [
      [{}, "[af]0"],
      [{ ...direct, ffnDevice: "cpp" }, "f0"],
      [{ ffnDevice: "stand-in" }, "a0"],
    ] as const)
      expect(run(bundleOf(devices), many, onDirect(native))).toMatchObject({
        code: 3,
        stderr: expect.stringMatching(
          new RegExp(`the device of rank ${rank} does not exchange through its own memory; use --transport shm`),
        ),
      });
    expect(run(bundleOf(direct), many, [...onDirect(native), "--strict"])).toMatchObject({
      code: 2,
      stderr: expect.stringMatching(/--strict needs device memory that the host can read/),
    });
  });
});

// --- contracts -----------------------------------------------------------------------------------------------------------------------

type Mutable<T> = { -readonly [K in keyof T]: T[K] extends object ? Mutable<T[K]> : T[K] };
/** Spoils the steps of one rank in every schedule; the `after` numbers follow the steps that they mean. */
const editSteps =
  (rank: string, edit: (steps: readonly Step[]) => readonly Step[]) =>
  (bundle: Bundle): void => {
    bundle.schedules = bundle.schedules.map((s): Schedule => {
      const programs = s.programs.map((p): RankProgram => {
        if (p.rank.name !== rank) return p;
        const edited = edit(p.steps);
        const steps = edited.map((step, i): Step => {
          if (!("after" in step)) return step;
          const at = edited.indexOf(p.steps[step.after] as Step);
          return { ...step, after: at < i ? at : -1 };
        });
        return { ...p, steps };
      });
      return { ...s, programs };
    });
  };
const inserted = (steps: readonly Step[], at: number, step: Step): Step[] => [...steps.slice(0, at), step, ...steps.slice(at)];
const moved = (steps: readonly Step[], from: number, to: number): Step[] => {
  const list = [...steps];
  list.splice(to, 0, ...list.splice(from, 1));
  return list;
};
const launch = (slot: number, kernel: string, inputs: string[], out: string[]): Step => ({
  op: "launch",
  kernel,
  in: inputs,
  out,
  rows: `head${slot}`,
  slot,
});
const find = (steps: readonly Step[], op: Step["op"], slot: number, exchange: number, peer?: number): number =>
  steps.findIndex(
    (s) =>
      s.op === op &&
      s.slot === slot &&
      "exchange" in s &&
      s.exchange === exchange &&
      (peer === undefined || ("from" in s && s.from === peer) || ("to" in s && s.to === peer)),
  );

describe("--strict", () => {
  const cases: [string, string, Partial<Shape>, (b: Bundle) => void, RegExp][] = [
    [
      "K1: a launch writes a push source in flight",
      "K1",
      {},
      editSteps("a0", (steps) => inserted(steps, find(steps, "post", 1, 0) + 1, launch(1, "copy", ["x1"], ["tok1"]))),
      /slot 1, step \d+ \(launch copy\): writes push source 'tok1' while exchange 0, posted by step \d+, is in flight/,
    ],
    [
      "K1: a kernel writes a push source that it should only read",
      "K1",
      {},
      editSteps("a0", (steps) => inserted(steps, find(steps, "post", 1, 0) + 1, launch(1, "stray", ["tok1"], []))),
      /slot 1, step \d+ \(wait\): buffer 'tok1' changed while exchange 0, posted by step \d+, was in flight/,
    ],
    [
      "K2: a slot is posted again before its wait",
      "K2",
      {},
      editSteps("a0", (steps) => {
        const wait = find(steps, "wait", 0, 0);
        // what reads the replies goes too, so that the second post is the first thing wrong
        return steps.filter(
          (s, i) => i !== wait && !(s.op === "launch" && s.slot === 0 && i > wait && i < find(steps, "post", 0, 1)),
        );
      }),
      /slot 0, step \d+ \(post\): posts exchange 1 while exchange 0, posted by step \d+, has not been waited for/,
    ],
    [
      "K2: an FFN rank reads a receive slot after its reply",
      "K2",
      {},
      editSteps("f0", (steps) => moved(steps, find(steps, "reply", 2, 0), find(steps, "reply", 2, 0) - 1)),
      /slot 2, step \d+ \(launch experts\): reads receive slot 'tok2', which holds nothing from rank a0 that was not replied to/,
    ],
    [
      "K2: a receive slot changes before it was replied to",
      "K2",
      {},
      editSteps("f0", (steps) => inserted(steps, find(steps, "reply", 2, 0), launch(2, "stray", ["tok2"], []))),
      /slot 2, step \d+ \(reply\): buffer 'tok2' was overwritten before the exchange that rank a0 pushed was replied to/,
    ],
    [
      "K4: a launch does not wait for all attention ranks",
      "K4",
      { attention: 2 },
      editSteps("f0", (steps) => moved(steps, find(steps, "accept", 1, 0, 1), find(steps, "accept", 1, 0, 1) + 1)),
      /slot 1, step \d+ \(launch experts\): reads receive slot 'tok1' before rank a1's push has been accepted/,
    ],
    [
      "K5: replies are read before the wait",
      "K5",
      {},
      editSteps("a0", (steps) => moved(steps, find(steps, "wait", 1, 0), find(steps, "wait", 1, 0) + 1)),
      /slot 1, step \d+ \(launch merge1\): reads 'back1.0' before the wait for exchange 0, posted by step \d+/,
    ],
    [
      "K5: a post is never waited for",
      "K5",
      {},
      editSteps("a0", (steps) => steps.slice(0, find(steps, "wait", 2, 1))),
      /slot 2, step \d+ \(post\): posts exchange 1, which is never waited for/,
    ],
    [
      "K5: an FFN rank does not reply",
      "K5",
      { attention: 2, ffn: 2 },
      editSteps("f1", (steps) => steps.filter((_, i) => i !== find(steps, "reply", 2, 1, 1))),
      /slot 2, step \d+ \(accept\): accepts exchange 1 from rank a1, which is never replied to/,
    ],
    [
      "K6: a reply buffer is written before the slot's next push",
      "K6",
      {},
      editSteps("f0", (steps) =>
        steps.map((s, i) => (s.op === "launch" && i === find(steps, "accept", 0, 1) + 1 ? { ...s, out: ["back1"] } : s)),
      ),
      /slot 1, step \d+ \(launch dense\): writes reply buffer 'back1' before the next push from rank a0 has been accepted/,
    ],
    [
      "K6: a reply buffer changes before the slot's next push",
      "K6",
      {},
      editSteps("f0", (steps) => inserted(steps, find(steps, "reply", 0, 0) + 1, launch(0, "stray", ["back0"], []))),
      /slot 0, step \d+ \(accept\): buffer 'back0' changed after the reply to rank a0 and before its next push/,
    ],
  ];
  for (const [name, contract, shape, spoil, message] of cases)
    it(name, () => {
      for (const transport of ["local", "shm"]) {
        const r = run(bundleOf(shape, spoil), many, ["--strict", "--transport", transport, "--timeout", "20"]);
        expect(r.stderr).toMatch(message);
        expect(r.stderr).toMatch(new RegExp(`strict: schedule (prefill|decode), rank [af]\\d, .*\\(contract ${contract}\\)`));
        expect(r.stderr.trim().split("\n")).toHaveLength(1);
        expect(r.code).toBe(3);
      }
    });

  const refused: [string, (b: Bundle) => void, RegExp][] = [
    [
      "K1: a key changes its source",
      (b) => {
        for (const s of b.schedules) {
          const keys = s.keys as Mutable<Schedule["keys"]>;
          keys.push({ ...(keys.find((k) => k.slot === 1 && k.field === "tok") as (typeof keys)[number]), source: "tok0" });
        }
      },
      /slot 1, field 'tok' has two keys between a0 and f0, with sources 'tok1' and 'tok0' \(contract K1\)/,
    ],
    [
      "K3: one end of a key is shorter",
      (b) => {
        for (const s of b.schedules)
          for (const t of s.types as Mutable<Schedule["types"]>) {
            const f = t.push[0] as { shape: unknown; bytes: number };
            f.shape = ["T", 2 * H];
            f.bytes *= 2;
          }
      },
      /slot 0, field 'tok': buffer 'tok0' of rank a0 has \d+ bytes in 1 segments, the exchange needs \d+ .*\(contract K3\)/,
    ],
    [
      "K4: a push reaches only some FFN ranks",
      (b) => {
        b.schedules = b.schedules.map((s) => ({
          ...s,
          keys: s.keys.filter((k) => !(k.f === 1 && k.slot === 2 && k.field === "ids")),
        }));
      },
      /slot 2: no key carries 'ids' from a0 to f1, though every exchange reaches every FFN rank \(contract K4\)/,
    ],
  ];
  for (const [name, spoil, message] of refused)
    it(`${name}: refused when the bundle is read, strict or not`, () => {
      const r = run(bundleOf({ ffn: 2 }, spoil), many);
      expect(r).toMatchObject({ code: 1, stderr: expect.stringMatching(message) });
    });
});

// --- what must never fall -----------------------------------------------------------------------------------------------------------

describe("spoiled bundles", () => {
  const wrong: [string, (b: Bundle) => void, RegExp][] = [
    [
      "format",
      (b) => Object.assign(b.manifest, { format: 2 }),
      /manifest\.json: at byte \d+: this runtime reads bundles of format 1/,
    ],
    [
      "wire of a schedule",
      (b) => Object.assign(b.schedules[0] as object, { wire: "0".repeat(64) }),
      /schedule-prefill\.json: .*not the wire hash of manifest/,
    ],
    [
      "region too small",
      (b) => Object.assign(b.schedules[1]?.programs[0]?.memory as object, { scratch: 64 }),
      /buffer '\w+' lies outside region scratch/,
    ],
    [
      "unknown kernel",
      (b) => Object.assign(b.schedules[0]?.programs[0]?.steps[0] as object, { kernel: "nope" }),
      /kernel 'nope' is not in the attention program/,
    ],
    [
      "unknown buffer",
      (b) => Object.assign(b.schedules[0]?.programs[0]?.steps[0] as object, { in: ["nope"] }),
      /rank a0 has no buffer 'nope'/,
    ],
    [
      "argument count",
      (b) => Object.assign(b.schedules[0]?.programs[0]?.steps[3] as object, { in: ["ids1"] }),
      /kernel 'embed' gets 3 arguments, its first launch has 5/,
    ],
    [
      "argument type",
      (b) => Object.assign(b.schedules[0]?.programs[0]?.steps[3] as object, { in: ["ids1", "position1", "seed1"] }),
      /argument 2 of kernel 'embed' is u32\[T\], its first launch has i32\[T,4\]/,
    ],
    ["state size", (b) => Object.assign(b.manifest.kv as object, { pages: 32 }), /state 'kv0' is not 32 pages of 64 bytes/],
    ["a rank too many", (b) => Object.assign(b.manifest, { attention: 2 }), /schedule-prefill\.json: .* 2 programs for 3 ranks/],
    [
      "device",
      (b) => Object.assign(b.manifest.programs[1] as object, { device: "npu" }),
      /no driver for device 'npu' of rank f0/,
    ],
    ["weights outside", (b) => Object.assign(b.manifest.weights[0] as object, { file: "../x" }), /lies inside the bundle/],
    [
      "weight missing",
      (b) => b.weights.set("weights/ffn0.safetensors", new Map()),
      /weights\/ffn0\.safetensors: tensor 'experts' is missing/,
    ],
    [
      "weight size",
      (b) => b.weights.get("weights/ffn0.safetensors")?.set("experts", new Uint8Array(128)),
      /tensor 'experts' has 128 bytes, the schedule wants 64/,
    ],
    [
      "dimension",
      (b) => Object.assign(b.schedules[0]?.programs[0]?.buffers.find((x) => x.name === "x0") as object, { shape: ["T*", 8] }),
      /dimension 'T\*' cannot be read/,
    ],
    [
      "symbol",
      (b) => Object.assign(b.schedules[0]?.programs[0]?.buffers.find((x) => x.name === "x0") as object, { shape: ["U", 8] }),
      /mentions 'U', which is not declared/,
    ],
    [
      "overlap",
      (b) => Object.assign(b.schedules[0]?.programs[0]?.buffers.find((x) => x.name === "ids1") as object, { offset: 0 }),
      /buffers '\w+' and '\w+' of rank a0 overlap in region input/,
    ],
  ];
  for (const [name, spoil, message] of wrong)
    it(`${name}: exit 1, one line`, () => {
      const r = run(bundleOf({}, spoil), many);
      expect(r.stderr).toMatch(message);
      expect([r.code, r.stderr.trim().split("\n").length, r.events]).toEqual([1, 1, []]);
    });

  it("truncated, missing and incomplete files: exit 1, the file named", () => {
    for (const [path, spoil, message] of [
      ["manifest.json", (b: Buffer) => b.subarray(0, 100), /manifest\.json: not valid JSON at byte 100/],
      ["schedule-decode.json", () => undefined, /schedule-decode\.json: cannot be opened/],
      ["COMPLETE", () => undefined, /no COMPLETE/],
      [
        "weights/ffn0.safetensors",
        (b: Buffer) => b.subarray(0, b.length - 1),
        /ffn0\.safetensors: .*outside the 63 bytes of data/,
      ],
      ["weights/ffn0.safetensors", () => Buffer.from([255, 255, 255, 255, 255, 255, 255, 255, 1]), /its header claims/],
      ["schedule-decode.json", () => Buffer.from("[".repeat(100_000)), /nested more than 64 deep/],
    ] as const) {
      const bundle = bundleOf();
      const changed = spoil(readFileSync(join(bundle, path)));
      rmSync(join(bundle, path));
      if (changed) writeFileSync(join(bundle, path), changed);
      expect(run(bundle, many)).toMatchObject({ code: 1, stderr: expect.stringMatching(message) });
    }
    expect(safetensors(new Map()).length).toBe(10);
  });

  it("byte flips under address and undefined-behaviour checks: the reader never falls", () => {
    const bundle = bundleOf({ attention: 2, ffn: 2 });
    const { status, stdout, stderr } = spawnSync(checked.fuzz, [bundle, join(scratch, "fuzz"), `${searchSeconds}`, "20250101"], {
      encoding: "utf8",
    });
    expect(stderr).toBe("");
    expect(status).toBe(0);
    expect(stdout).toMatch(/^\d+ spoiled bundles, \d+ refused/);
  });

  it("byte flips under address and undefined-behaviour checks: a run ends with an exit code of the contract", () => {
    const clean = bundleOf({ slots: 2 });
    const files = ["manifest.json", "schedule-prefill.json", "schedule-decode.json", "weights/ffn0.safetensors"];
    let seed = 12345;
    const random = (n: number): number => {
      seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
      return Math.floor((seed / 2 ** 32) * n);
    };
    const alphabet = "0123456789";
    const end = Date.now() + searchSeconds * 1000;
    const codes = new Map<number | null, number>();
    while (Date.now() < end) {
      const file = files[random(files.length)] as string;
      const whole = readFileSync(join(clean, file));
      const bytes = Buffer.from(whole);
      // digits become digits, so that many of the spoiled bundles are read to the end and run
      const digits = [...bytes.keys()].filter((i) => alphabet.includes(String.fromCharCode(bytes[i] as number)));
      const at = random(4) === 0 || digits.length === 0 ? random(bytes.length) : (digits[random(digits.length)] as number);
      const before = bytes[at] as number;
      bytes[at] = random(8) === 0 ? random(256) : alphabet.charCodeAt(random(10));
      writeFileSync(join(clean, file), bytes);
      const r = run(clean, many.slice(0, 4), ["--timeout", "1"], checked);
      writeFileSync(join(clean, file), whole);
      codes.set(r.code, (codes.get(r.code) ?? 0) + 1);
      expect([0, 1, 2, 3], `${file} byte ${at}: ${before} -> ${bytes[at]}: ${r.signal} ${r.stderr}`).toContain(r.code);
    }
    expect(codes.get(1) ?? 0).toBeGreaterThan(0);
  });
});

describe("under sanitizers", () => {
  for (const [name, build] of [
    ["address and undefined behaviour", () => checked],
    ["data races", () => raced],
  ] as const)
    it(name, () => {
      const bundle = bundleOf({ attention: 2, ffn: 2 });
      for (const flags of [
        ["--threads", "2"],
        ["--threads", "3", "--strict", "--trace", join(scratch, "t.json"), "--stats", join(scratch, "s.json")],
        ["--transport", "shm", "--threads", "2"],
      ]) {
        const r = run(bundle, many, flags, build());
        expect([r.code, r.stderr]).toEqual([0, ""]);
        expect(tokensOf(r)).toEqual(expected(many, 2));
      }
    });
});

describe("command line", () => {
  it("usage errors exit 2 and say what to do", () => {
    const bundle = bundleOf();
    for (const [flags, message] of [
      [["--frobnicate"], /unknown option '--frobnicate'; see step3-run --help/],
      [["--threads", "many"], /--threads takes a number from 1 to 1024, not 'many'/],
      [["--transport", "pigeon"], /--transport 'pigeon' is not local, shm or cuda/],
      [["--role", "ffn"], /--role and --rank go together/],
      [["--role", "ffn", "--rank", "0"], /--role needs a transport between processes/],
      [["--role", "ffn", "--rank", "7", ...session()], /the bundle has 1 ffn ranks/],
      [["--role", "ffn", "--rank", "0", "--transport", "shm"], /--role needs --session or --peers/],
      [["--transport", "shm", "--session", "a/b"], /--session 'a\/b': use letters/],
      [["--eval"], /--eval needs --inputs/],
      [["--logits"], /--logits needs a value/],
    ] as const)
      expect(run(bundle, [], flags)).toMatchObject({ code: 2, stderr: expect.stringMatching(message) });
    const { status, stdout } = spawnSync(native.runner, ["--help"], { encoding: "utf8" });
    expect([status, stdout.includes("exit codes: 0 done")]).toEqual([0, true]);
  });

  it("programs that are missing or not programs exit 1", () => {
    const bundle = bundleOf();
    expect(run(bundle, [], ["--program-ffn", "/nowhere.so"])).toMatchObject({
      code: 1,
      stderr: expect.stringMatching(/\/nowhere\.so: not there/),
    });
    expect(run(bundle, [], ["--program-ffn", join(bundle, "manifest.json")])).toMatchObject({
      code: 1,
      stderr: expect.stringMatching(/cannot be loaded/),
    });
    const foreign = bundleOf({}, (b) => Object.assign(b.manifest.programs[1]?.kernels[0] as object, { scratch: 64 }));
    expect(run(foreign, [])).toMatchObject({
      code: 1,
      stderr: expect.stringMatching(
        /kernel 'experts' is missing or not the one of manifest\.json; it was built from another bundle/,
      ),
    });
    expect(run(bundle, [], ["--isa", "abacus"])).toMatchObject({
      code: 1,
      stderr: expect.stringMatching(/no kernels for --isa abacus/),
    });
  });
});
