import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import { certify } from "../compiler/certify.ts";
import { memoryReport } from "../compiler/memory.ts";
import { readStep3 } from "../compiler/models/step3.ts";
import { runPasses } from "../compiler/pass.ts";
import { passes } from "../compiler/passes/index.ts";
import { withHomes } from "../compiler/schedule.ts";
import { type WireFacts, wireContract, wireHash } from "../compiler/wire.ts";
import { checkSchedule, checkShared } from "../ir/check.ts";
import { UserError } from "../ir/error.ts";
import type { Graph } from "../ir/graph.ts";
import { parseGraph } from "../ir/parse.ts";
import type { Buffer, RankProgram, Schedule, Step } from "../ir/schedule.ts";
import { parseSchedule, printSchedule } from "../ir/schedule_text.ts";
import { certified, layeredGraph, scheduleOf, smallShape, step3Shape, tinyShape } from "./schedule_graphs.ts";
import { Contents, run } from "./schedule_machine.ts";

const accepted = (s: Schedule): void => {
  const verdict = checkSchedule(s, certify(s));
  expect(verdict.ok ? "" : verdict.reason).toBe("");
};
const steps = (s: Schedule, rank: string): string[] => {
  const text = printSchedule(s);
  const from = text.indexOf(`rank ${rank} on`);
  const to = text.indexOf("\nrank ", from);
  return text
    .slice(from, to < 0 ? text.length : to)
    .split("\n")
    .filter((line) => /^ *\d+ /.test(line))
    .map((line) => line.trim());
};
const buffer = (p: RankProgram | undefined, name: string): Buffer => p?.buffers.find((b) => b.name === name) as Buffer;

/** Two exchanges on one FFN rank. `b` is not needed by what is sent after it is made. */
const twoExchanges = `
graph two
symbol T 0..8 host
input i i32[T]
weight w bf16[4,64] = tensor "w"
weight v bf16[64,64] = tensor "v"
x bf16[T,64] = gather(w, i) @attention
t bf16[T,64] = silu(x) @attention
t0 bf16[T,64] = dispatch(t) {exchange: 0, ranks: 1} @attention
b bf16[T,64] = neg(x) @attention
y bf16[T,64] = linear(t0, v) @ffn0
p bf16[T,64] = collect(y) {exchange: 0} @attention
z bf16[T,64] = add(p, b) @attention
z0 bf16[T,64] = dispatch(z) {exchange: 1, ranks: 1} @attention
u bf16[T,64] = linear(z0, v) @ffn0
q bf16[T,64] = collect(u) {exchange: 1} @attention
r bf16[T,64] = mul(q, x) @attention
output r
`;

/** Graphs in text, so that a reader sees what is scheduled. */
const graphOf = (text: string): Graph => parseGraph(text, "test.step3");

describe("order of steps", () => {
  const s = scheduleOf(graphOf(twoExchanges), { attention: 2, microBatches: 2 });
  test("an attention rank posts every micro-batch before it waits for the first, and works while the FFN side does", () => {
    expect(steps(s, "a0")).toEqual([
      "0 launch k_gather (w, in0.i) -> (x.0) rows head0 s0",
      "1 launch k_silu (x.0) -> (tok0) rows head0 s0",
      "2 post s0 dense #0 after 1",
      "3 launch k_neg (x.0) -> (b.0) rows head0 s0",
      "4 launch k_gather (w, in1.i) -> (x.1) rows head1 s1",
      "5 launch k_silu (x.1) -> (tok1) rows head1 s1",
      "6 post s1 dense #0 after 5",
      "7 launch k_neg (x.1) -> (b.1) rows head1 s1",
      "8 wait s0 #0",
      "9 launch k_add (back0.0, b.0) -> (tok0) rows head0 s0",
      "10 post s0 dense #1 after 9",
      "11 wait s1 #0",
      "12 launch k_add (back1.0, b.1) -> (tok1) rows head1 s1",
      "13 post s1 dense #1 after 12",
      "14 wait s0 #1",
      "15 launch k_mul (back0.0, x.0) -> (out0.r) rows head0 s0",
      "16 wait s1 #1",
      "17 launch k_mul (back1.0, x.1) -> (out1.r) rows head1 s1",
    ]);
    accepted(s);
  });
  test("an FFN rank accepts a micro-batch from all attention ranks, runs once, and replies to each", () => {
    expect(steps(s, "f0").slice(0, 10)).toEqual([
      "0 accept s0 #0 from a0",
      "1 accept s0 #0 from a1",
      "2 launch k_linear (tok0, v) -> (back0) rows head0 s0",
      "3 reply s0 #0 to a0 after 2",
      "4 reply s0 #0 to a1 after 2",
      "5 accept s1 #0 from a0",
      "6 accept s1 #0 from a1",
      "7 launch k_linear (tok1, v) -> (back1) rows head1 s1",
      "8 reply s1 #0 to a0 after 7",
      "9 reply s1 #0 to a1 after 7",
    ]);
  });
  test("the order of the graph's ops does not matter", () => {
    const g = graphOf(twoExchanges);
    const late = g.ops.findIndex((op) => op.kind === "neg");
    const moved = [...g.ops];
    moved.splice(1, 0, ...moved.splice(late, 1));
    expect(scheduleOf({ ...g, ops: moved }, { attention: 2, microBatches: 2 })).toEqual(s);
  });
  test("without exchanges every attention rank has the whole program, its header an input", () => {
    const whole = scheduleOf(layeredGraph(smallShape(2, 0)), { attention: 2, microBatches: 1 });
    expect(whole.programs.map((p) => p.rank.name)).toEqual(["a0", "a1"]);
    expect(whole.keys).toEqual([]);
    expect(buffer(whole.programs[0], "head0")).toMatchObject({ region: "input", bytes: 64 });
    accepted(whole);
  });
});

describe("any ranks, any micro-batches", () => {
  for (const ffn of [0, 1, 2, 3, 4])
    test(`1 to 4 attention ranks, ${ffn} FFN ranks, 1 to 4 micro-batches, prefill and decode: accepted`, () => {
      const graph = layeredGraph(smallShape(3, ffn));
      for (const attention of [1, 2, 3, 4])
        for (const microBatches of [1, 2, 3, 4]) {
          const both = [
            scheduleOf(graph, { attention, microBatches, maxRows: 24, name: "prefill" }),
            scheduleOf(graph, { attention, microBatches, maxRows: 3, name: "decode" }),
          ];
          for (const s of both) accepted(s);
          expect(checkShared(both)).toBeUndefined();
        }
    });
  test("a small one gives the same results in every interleaving", () => {
    const { schedule } = certified(layeredGraph(tinyShape(2, 2)), { attention: 2, microBatches: 2, maxRows: 1, weightBytes: 8 });
    const contents = new Contents();
    const outcomes = new Set(Array.from({ length: 20 }, (_, seed) => JSON.stringify(run(schedule, contents, seed))));
    expect([...outcomes].filter((o) => o.includes("fault"))).toEqual([]);
    expect(outcomes.size).toBe(1);
  });
});

describe("buffers", () => {
  const s = scheduleOf(layeredGraph(smallShape(2, 2)), { attention: 3, microBatches: 2, maxRows: 8 });
  const [a0, , , f0, f1] = s.programs;
  test("FFN ranks hold the rows of every attention rank; rows may come several to a token", () => {
    expect(buffer(f0, "tok1")).toMatchObject({ region: "exchange", segments: 3, bytes: 3 * 8 * 256, slot: 1 });
    expect(buffer(f0, "head0")).toMatchObject({ segments: 3, bytes: 3 * 64 });
    expect(buffer(f1, "l1_f1_eg.0")).toMatchObject({ shape: ["2*T", 128], segments: 3, bytes: 3 * 16 * 128 * 4 });
    expect(buffer(a0, "back0.1")).toMatchObject({ segments: 1, bytes: 8 * 256 * 2 });
  });
  test("inputs, outputs, states and weights say what they bind", () => {
    expect(buffer(a0, "in1.ids")).toMatchObject({ region: "input", binds: "ids", slot: 1, bytes: 32 });
    expect(buffer(a0, "out0.logits")).toMatchObject({ region: "output", binds: "logits", slot: 0 });
    expect(buffer(a0, "kv1")).toMatchObject({ region: "state", binds: "kv1", bytes: 4 * 4096, offset: 4 * 4096 });
    expect(buffer(a0, "lm_head")).toMatchObject({ region: "weights", binds: "lm_head", segments: 1 });
  });
  test("weights lie one after another, padded to 64 bytes, so that a file of them is the region", () => {
    for (const p of s.programs) {
      let end = 0;
      for (const b of p.buffers) {
        if (b.region !== "weights") continue;
        expect([b.offset, b.bytes % 64]).toEqual([end, 0]);
        end += b.bytes;
      }
      expect(p.memory.weights).toBe(end);
    }
  });
  test("a state that an op changes is an inout, one it reads an in", () => {
    const launch = (kernel: string): Step => a0?.steps.find((x) => x.op === "launch" && x.kernel === kernel) as Step;
    expect(launch("k_kv_append")).toMatchObject({
      in: ["l0_kr.0", "l0_vv.0", "in0.pages", "in0.position"],
      inout: ["kv0"],
      out: [],
    });
    expect(launch("k_attention")).toMatchObject({ in: ["l0_qr.0", "kv0", "in0.pages", "in0.position"] });
  });
  test("exchange types name their tensors; the header goes last; ids say how many experts they choose among", () => {
    expect(s.types.map((t) => [t.name, t.push.map((f) => f.name).join(), t.pull.map((f) => f.name).join()])).toEqual([
      ["dense", "tok,scl,head", "back"],
      ["moe", "tok,scl,ids,wgt,head", "back"],
    ]);
    expect(s.types[1]?.push[2]).toEqual({ name: "ids", dtype: "i32", shape: ["T", 2], bytes: 64, below: 8 });
  });
  test("scratch of the whole model needs little more than what is in use at once", () => {
    for (const { buffers, steps: program, memory } of scheduleOf(layeredGraph(step3Shape(2)), { attention: 1, microBatches: 3 })
      .programs) {
      const size = new Map(buffers.filter((b) => b.region === "scratch").map((b) => [b.name, b.bytes]));
      const last = new Map<string, number>();
      const names = (x: Step): string[] => (x.op === "launch" ? [...x.in, ...x.out] : []);
      for (const [at, x] of program.entries()) for (const n of names(x)) last.set(n, at);
      let used = 0;
      let most = 0;
      const live = new Set<string>();
      program.forEach((x, at) => {
        for (const n of names(x)) if (size.has(n) && !live.has(n)) used += size.get(live.add(n) && n) as number;
        most = Math.max(most, used);
        for (const n of new Set(names(x))) if (last.get(n) === at && live.delete(n)) used -= size.get(n) as number;
      });
      expect(memory.scratch).toBeLessThan(1.3 * most);
    }
  });
  test("the memory report adds the schedules up, and counts weights and KV once", () => {
    const graph = layeredGraph(smallShape(2, 1));
    const both = ["prefill", "decode"].map((name) =>
      scheduleOf(graph, { attention: 1, microBatches: 2, name, maxRows: name === "prefill" ? 32 : 4 }),
    );
    const [a, f] = memoryReport(both, (role) => (role === "ffn" ? 1000 : 0));
    const m = both.map((x) => (x.programs[0] as RankProgram).memory);
    expect(a).toMatchObject({
      rank: "a0",
      weights: m[0]?.weights,
      kv: m[1]?.state,
      exchange: Number(m[0]?.exchange) + Number(m[1]?.exchange),
    });
    expect(f).toMatchObject({ rank: "f0", kv: 0, io: 0 });
    for (const r of [a, f])
      expect(r?.total).toBe(Number(r?.weights) + Number(r?.kv) + Number(r?.exchange) + Number(r?.scratch) + Number(r?.io));
  });
});

describe("values with unusual lives", () => {
  const wire = (s: Schedule): string[] => s.types.flatMap((t) => [...t.push, ...t.pull].map((f) => f.name));
  const right = (s: Schedule): void => {
    accepted(s);
    const contents = new Contents();
    const outcomes = new Set(Array.from({ length: 10 }, (_, seed) => JSON.stringify(run(s, contents, seed))));
    expect([...outcomes].filter((o) => o.includes("fault"))).toEqual([]);
    expect(outcomes.size).toBe(1);
  };
  const small = { attention: 2, microBatches: 2, maxRows: 2, weightBytes: 8 };

  test("what was sent, or came back, and is read later than the next exchange has a tensor of its own", () => {
    const text = twoExchanges.replace("mul(q, x)", "mul(q, t)").replace("add(p, b)", "add(p, b)");
    const s = scheduleOf(graphOf(text), small);
    expect(wire(s)).toEqual(["tok", "head", "back", "tok_1", "head", "back"]);
    right(s);
    const back = scheduleOf(graphOf(twoExchanges.replace("mul(q, x)", "mul(q, p)")), small);
    expect(wire(back)).toEqual(["tok", "head", "back", "tok", "head", "back_1"]);
    right(back);
  });
  test("what an FFN rank keeps for a later exchange has one too", () => {
    const s = scheduleOf(graphOf(twoExchanges.replace("linear(z0, v)", "add(z0, t0)")), small);
    expect(wire(s)).toEqual(["tok", "head", "back", "tok_1", "head", "back"]);
    right(s);
  });
  test("a value sent twice, an input sent, a result handed out as it came: copied", () => {
    const twice = withHomes(graphOf(twoExchanges.replace("dispatch(z)", "dispatch(t)").replace("mul(q, x)", "mul(q, z)")));
    expect(twice.ops.find((op) => op.kind === "cast")?.outputs[0]?.name).toBe("t_copy");
    right(scheduleOf(twice, small));
    const handed = withHomes(graphOf(twoExchanges.replace("output r", "output q\noutput r")));
    expect(handed.outputs.map((v) => v.name)).toEqual(["q", "r"]);
    expect(handed.ops.find((op) => op.kind === "cast")?.inputs[0]?.name).toBe("q_received");
    right(scheduleOf(handed, small));
    expect(withHomes(handed)).toBe(handed);
  });
  test("what cannot be scheduled is refused in words", () => {
    const refuse = (text: string, what: RegExp): void => void expect(() => scheduleOf(graphOf(text), small)).toThrow(what);
    refuse(
      twoExchanges.replace("dispatch(z)", "dispatch(t)").replace("mul(q, x)", "mul(q, z)"),
      /t, which is sent already; it needs a copy/,
    );
    const g = graphOf(twoExchanges);
    const ops = g.ops.map((op) => (op.attrs.exchange === 1 ? { ...op, attrs: { ...op.attrs, exchange: 2 } } : op));
    expect(() => scheduleOf({ ...g, ops }, small)).toThrow(/exchange 1 of 3 lacks its dispatch/);
    expect(() => scheduleOf(graphOf(twoExchanges), { attention: 300, microBatches: 1 })).toThrow(UserError);
    expect(() => scheduleOf(graphOf(twoExchanges), { attention: 1, microBatches: 0 })).toThrow(
      /0 micro-batches: choose 1 to 256/,
    );
  });
});

describe("wire contract", () => {
  const facts: WireFacts = {
    source: "ab".repeat(32),
    precision: { weights: "fp8", kv: "bf16" },
    attention: 2,
    ffn: 2,
    split: "ep",
  };
  const graph = layeredGraph(smallShape(2, 2));
  const base = scheduleOf(graph, { attention: 2, microBatches: 3 });
  const hash = (s: Schedule, f: WireFacts = facts): string => wireHash(f, [s]);
  test("kernels, offsets and weights are not in it, so that one side can be rebuilt alone", () => {
    const programs = base.programs.map((p) => ({
      ...p,
      rank: { ...p.rank, target: "other" },
      buffers: p.buffers.map((b) => ({ ...b, offset: b.offset + 64 })),
      steps: p.steps.map((x) => (x.op === "launch" ? { ...x, kernel: "other" } : x)),
    }));
    expect(hash({ ...base, programs })).toBe(hash(base));
    expect(hash(scheduleOf(graph, { attention: 2, microBatches: 3, weightBytes: 8 }))).toBe(hash(base));
  });
  test("rows, slots, ranks, tensors, order, source and precision are", () => {
    const others = [
      hash(scheduleOf(graph, { attention: 2, microBatches: 3, maxRows: 9 })),
      hash(scheduleOf(graph, { attention: 2, microBatches: 2 })),
      hash(scheduleOf(graph, { attention: 1, microBatches: 3 })),
      hash(scheduleOf(graph, { attention: 2, microBatches: 3, name: "prefill" })),
      hash({ ...base, exchanges: [...base.exchanges].reverse() }),
      hash(base, { ...facts, source: "cd".repeat(32) }),
      hash(base, { ...facts, split: "tp" }),
      hash(base, { ...facts, precision: { weights: "int8", kv: "bf16" } }),
    ];
    expect(new Set([...others, hash(base)]).size).toBe(others.length + 1);
  });
  test("it is canonical JSON", () => {
    const text = wireContract(facts, [base]);
    expect(text).toMatch(/^\{"abi":1,"attention":2,"ffn":2,"precision":\{"kv":"bf16","weights":"fp8"\}/);
    expect(JSON.stringify(JSON.parse(text))).toBe(text);
  });
});

describe("text of a schedule", () => {
  test("parses back to the same schedule, byte by byte", () => {
    for (const s of [
      scheduleOf(layeredGraph(step3Shape(2)), { attention: 2, microBatches: 3 }),
      scheduleOf(layeredGraph(smallShape(2, 0)), { attention: 2, microBatches: 2, name: "main" }),
      scheduleOf(graphOf(twoExchanges), { attention: 1, microBatches: 1 }),
    ]) {
      const text = printSchedule(s);
      expect(JSON.stringify(parseSchedule(text))).toBe(JSON.stringify(s));
      expect(printSchedule(parseSchedule(text))).toBe(text);
    }
  });
  test("names that are words of the language, or no names at all, are quoted", () => {
    const s = scheduleOf(graphOf(twoExchanges.replaceAll(/\bw\b/g, "rows").replaceAll(/\bv\b/g, "bytes")), {
      attention: 1,
      microBatches: 1,
    });
    const named: Schedule = {
      ...s,
      name: 'a "b"\n',
      programs: s.programs.map((p) => ({ ...p, rank: { ...p.rank, target: "@vendor/chip" } })),
    };
    expect(printSchedule(named)).toContain('launch k_gather ("rows", in0.i) -> (x.0)');
    expect(parseSchedule(printSchedule(named))).toEqual(named);
  });
  test("equal ranks are written once, repeated exchanges as a count", () => {
    const text = printSchedule(scheduleOf(layeredGraph(step3Shape(1)), { attention: 3, microBatches: 1 }));
    expect(text).toContain("\norder dense x 4, moe x 56, dense\n");
    expect(text).toContain("\nrank a1 on cpp as a0\nrank a2 on cpp as a0\n");
  });
  const good = printSchedule(scheduleOf(graphOf(twoExchanges), { attention: 1, microBatches: 1 }));
  for (const [what, from, to, error] of [
    ["a missing word", " slots 1", " slot 1", /^t:1:\d+: expected 'slots', found 'slot'$/],
    ["a step out of order", "\n 1 launch", "\n 7 launch", /^t:\d+:2: expected step 1, found '7'$/],
    [
      "an unknown dtype",
      "tok bf16[T,64]",
      "tok bf17[T,64]",
      /^t:3:\d+: expected a type with a dtype \(f64, .*\), found 'bf17\[T,64\]'$/,
    ],
    ["a bad dimension", "tok bf16[T,64]", "tok bf16[T+,64]", /^t:3:\d+: dimension/],
    [
      "an unknown region",
      "head0 u8[64] exchange",
      "head0 u8[64] cupboard",
      /^t:\d+:\d+: expected a region \(weights, .*\), found 'cupboard'$/,
    ],
    [
      "an unknown step",
      "wait s0 #0",
      "pause s0 #0",
      /^t:\d+:\d+: expected 'launch' or 'post' or 'wait' or 'accept' or 'reply', found 'pause'$/,
    ],
    ["a slot that is none", "wait s0 #0", "wait t0 #0", /^t:\d+:\d+: expected a slot such as s0, found 't0'$/],
    ["a string without end", 'wire "', 'wire "\n', /^t:1:\d+: a string that does not end on its line/],
    ["an odd character", "wait s0 #0", "wait s0 ~0", /^t:\d+:\d+: unexpected character "~"$/],
  ] as const)
    test(`${what}: line, column and what was expected`, () => {
      expect(good).toContain(from);
      const parse = (): Schedule => parseSchedule(good.replace(from, to), "t");
      expect(parse).toThrow(UserError);
      expect(parse).toThrow(error);
    });
  test("a text that ends too early says so", () => {
    expect(() => parseSchedule("schedule n abi 1 wire", "t")).toThrow(/^t:1:22: expected a string, found the end of the text$/);
    expect(() => parseSchedule("", "t")).toThrow(UserError);
  });
});

describe("the published model, through the passes", () => {
  const config = {
    model_type: "step3_text",
    hidden_size: 7168,
    intermediate_size: 18432,
    num_attention_heads: 64,
    num_attention_groups: 1,
    vocab_size: 128815,
    rms_norm_eps: 1e-5,
    moe_intermediate_size: 5120,
    moe_num_experts: 48,
    moe_top_k: 3,
    rope_theta: 500000,
    rope_scaling: null,
    max_position_embedding: 65536,
    share_expert_dim: 5120,
    share_q_dim: 2048,
    head_dim: 256,
    norm_expert_weight: false,
    torch_dtype: "bfloat16",
  };
  const directory = mkdtempSync(join(tmpdir(), "step3c-schedule-"));
  afterAll(() => rmSync(directory, { recursive: true }));
  const source = (layers: number): Graph => {
    const path = join(directory, `${layers}.json`);
    const moe = Array.from({ length: layers - 5 }, (_, i) => i + 4).join(",");
    writeFileSync(path, JSON.stringify({ ...config, num_hidden_layers: layers, moe_layers_enum: moe }));
    return readStep3(path, { weights: false }).graph(256, { maxContext: 1024, maxPages: 64 });
  };
  for (const [precision, layers] of [
    ["bf16", 7],
    ["int8", 7],
    ["fp8", 61],
  ] as const)
    test(`${precision}, ${layers} layers, 2A2F, three micro-batches: accepted`, { timeout: 60_000 }, () => {
      const graph = withHomes(runPasses(source(layers), passes({ precision, kv: precision, ffn: 2, split: "ep" })));
      const both = [
        scheduleOf(graph, { attention: 2, microBatches: 3, maxRows: 256, name: "prefill", weightBytes: 64 }),
        scheduleOf(graph, { attention: 2, microBatches: 3, maxRows: 128, name: "decode", weightBytes: 64 }),
      ];
      for (const s of both) {
        accepted(s);
        expect(s.exchanges.length).toBe(layers);
        expect(s.types.map((t) => t.push.map((f) => f.name).join())).toEqual(
          precision === "bf16" ? ["tok,head", "tok,ids,wgt,head"] : ["tok,scl,head", "tok,scl,ids,wgt,head"],
        );
        expect(s.types[1]?.push.find((f) => f.name === "ids")?.below).toBe(48);
      }
      expect(checkShared(both)).toBeUndefined();
    });
});
