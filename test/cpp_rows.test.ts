/**
 * Row and token kernels of the C++ backend against the interpreter, on every instruction set this machine has: every sample of every op,
 * conversions code by code, functions over their ranges, and random fused bodies. Everything that is rounded correctly must be equal to the
 * bit; instruction sets must agree to the bit in all; a row's result must not depend on the other rows, the segments or the threads.
 */
import { execFileSync } from "node:child_process";
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { describe, expect, test } from "vitest";
import type { Backend, KernelTemplate } from "../backends/backend.ts";
import { checkBackend, type KernelRunner, type SampleResult } from "../backends/conformance.ts";
import { assemble } from "../backends/cpp/assemble.ts";
import { rowKernel } from "../backends/cpp/rows.ts";
import { errorOf } from "../backends/kernel_cases.ts";
import { tensorKernels } from "../backends/tensors.ts";
import { tokenKernels } from "../backends/tokens.ts";
import {
  Builder,
  concrete,
  type DType,
  decode,
  drawTensor,
  dtypes,
  encode,
  evaluate,
  floatValue,
  type Graph,
  knowledge,
  type Op,
  randomNumbers,
  roundTo,
  type Tensor,
  type TensorType,
  tensor,
  type Value,
} from "../ir/index.ts";
import { buildProgram, isasOf, runKernels } from "./native.ts";

const root = join(dirname(fileURLToPath(import.meta.url)), "..");
const templates = new URL("../backends/cpp/index.ts", import.meta.url);
const kernels: readonly KernelTemplate[] = [
  ...tokenKernels(templates),
  rowKernel,
  ...tensorKernels({ templates, knowsSymbols: true }),
];
/** Row kernels have nothing of their own for the matrix unit: amx is avx512 to them. */
const isas = ["baseline", "avx2", "avx512"];
const options = [`-DS3_ISAS=${isas.join(";")}`];

// --- samples ------------------------------------------------------------------------------------------------------------------

const runner: KernelRunner = {
  build(files) {
    // hundreds of kernels, a third of the compiler's time: the random ones further down are built as bundles build theirs
    const library = buildProgram(files, [...options, "-DS3_OPTIMISE=-O1"]);
    return {
      variants: isasOf(library),
      run: (isa, launches) =>
        runKernels(
          library,
          launches.map((l) => ({ kernel: l.kernel, isa, threads: 2, rows: [l.rows], dims: l.dims, args: l.args })),
        ).map((r) => r.outputs),
    };
  },
};

test("every sample of every op that has no contraction or cache", { timeout: 900_000 }, () => {
  const backend: Backend = { name: "rows", api: 1, device: "cpp", arches: ["any"], dtypes, kernels, assemble };
  const report = checkBackend(backend, { runner });
  const contractions = ["linear", "scaled_linear", "grouped_linear", "scaled_grouped_linear"];
  const others = [...contractions, "sdpa", "kv_append", "attention"];
  expect(report.lacking).toEqual(others);
  const epilogues = knowledge("fused").samples.filter((s) => s.body?.ops.some((op) => contractions.includes(op.kind)));
  const expected = (r: SampleResult): boolean =>
    others.includes(r.op) || (r.op === "fused" && epilogues.some((s) => s.name === r.sample));
  expect(report.results.filter((r) => r.status !== "matched" && !expected(r))).toEqual([]);
  const wrong = report.results.filter((r) => Object.values(r.errors ?? {}).some((e) => !(e <= 0.25)));
  expect(wrong).toEqual([]);
  expect(report.ok).toBe(true);
});

// --- kernels of this test in one program --------------------------------------------------------------------------------------

interface Job {
  readonly name: string;
  readonly graph: Graph;
  readonly op: Op;
  readonly inputs: ReadonlyMap<string, Tensor>;
  readonly tokens: number;
  readonly text: string;
}

const jobOf = (
  name: string,
  build: (b: Builder) => readonly Value[],
  tokens: number,
  inputs: ReadonlyMap<string, Tensor>,
): Job => {
  const b = new Builder(name, [{ name: "T", min: 0, max: 1024, multiple: 1, source: "host" }]);
  for (const v of build(b)) b.output(v);
  const graph = b.build();
  const op = graph.ops[0] as Op;
  const why: string[] = [];
  const target = { arch: "any", symbols: graph.symbols, decline: (reason: string): undefined => void why.push(reason) };
  for (const template of kernels) {
    const plan = template.match(op, target);
    if (plan) return { name, graph, op, inputs, tokens, text: template.render(plan.context, name) };
  }
  throw new Error(`${name}: ${why.join("; ")}`);
};

const libraryOf = (jobs: readonly Job[]): string =>
  buildProgram(
    assemble({
      role: "attention",
      arch: "any",
      kernels: jobs.map((j) => ({ name: j.name, about: "", text: j.text, scratch: 0 })),
    }),
    options,
  );

const sizeOf = (v: Value, tokens: number): number =>
  concrete(v.type as TensorType, new Map([["T", tokens]])).shape.reduce((a, b) => a * b, 1);
const bytesOf = (v: Value, tokens: number): number =>
  encode((v.type as TensorType).dtype, new Float64Array(sizeOf(v, tokens))).length;

/** Results of jobs, by job and output. */
const runJobs = (library: string, jobs: readonly Job[], isa: string): readonly (readonly Uint8Array[])[] =>
  runKernels(
    library,
    jobs.map((j) => ({
      kernel: j.name,
      isa,
      threads: 2,
      rows: [j.tokens],
      args: [
        ...j.op.inputs.map((v) => ({ read: encode(v.type.dtype, (j.inputs.get(v.name) as Tensor).data) })),
        ...j.op.outputs.map((v) => ({ written: bytesOf(v, j.tokens) })),
      ],
    })),
  ).map((r) => r.outputs);

const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString("hex");

/** The first difference of two tensors of one dtype to the bit, in words; undefined when there is none. NaNs are equal. */
const difference = (dtype: DType, expected: ArrayLike<number>, bytes: Uint8Array): string | undefined => {
  const got = decode(dtype, bytes);
  for (let i = 0; i < expected.length; i++)
    if (!Object.is(expected[i], got[i])) return `element ${i} is ${got[i]}, not ${expected[i]}`;
  return undefined;
};

// --- conversions --------------------------------------------------------------------------------------------------------------

const next = (x: number, up: boolean): number => {
  const view = new DataView(new ArrayBuffer(4));
  view.setFloat32(0, x);
  const bits = view.getInt32(0);
  if (x === 0) return up ? 2 ** -149 : -(2 ** -149);
  view.setInt32(0, bits + (x > 0 === up ? 1 : -1));
  return view.getFloat32(0);
};

/** Every value of a small float, what lies half way to the next, and the f32 neighbours of both. */
const edgesOf = (dtype: "bf16" | "f16" | "e4m3" | "e5m2"): number[] => {
  const count = dtype === "bf16" || dtype === "f16" ? 65536 : 256;
  const values = Array.from({ length: count }, (_, code) => floatValue(dtype, code)).filter((x) => Number.isFinite(x) && x >= 0);
  values.sort((a, b) => a - b);
  return values.flatMap((x, i) => {
    const half = Math.fround((x + (values[i + 1] ?? x * 1.5)) / 2);
    return [x, next(x, true), half, next(half, true), next(half, false), -x, -half, -next(half, true)];
  });
};
const special = [
  0,
  -0,
  Infinity,
  -Infinity,
  NaN,
  2 ** -149,
  -(2 ** -149),
  3.4028234663852886e38,
  448,
  464,
  465,
  57344,
  61439,
  61440,
  65504,
  65519,
  65520,
];
const integers = [
  -0.5,
  0.5,
  1.5,
  2.5,
  126.5,
  127.5,
  128.5,
  -128.5,
  -129,
  255.5,
  256,
  32767.5,
  32768,
  -32768.5,
  65535.5,
  65536,
  2 ** 24 + 1,
  2 ** 31,
  -(2 ** 31),
  2 ** 32,
  3e9,
  1e20,
  -1e20,
];

const columns = 512;
const tensorOf = (dtype: DType, data: readonly number[]): Tensor => {
  const rows = Math.max(1, Math.ceil(data.length / columns));
  const padded = new Float64Array(rows * columns);
  data.forEach((x, i) => {
    padded[i] = roundTo(dtype, x);
  });
  return { kind: "tensor", dtype, shape: [rows, columns], data: padded };
};

/** One elementwise op over all of `data`. */
const elementJob = (name: string, kind: string, data: Tensor, attrs: Record<string, string> = {}): Job =>
  jobOf(
    name,
    (b) => b.ops(kind, [b.input("x", tensor(data.dtype, ["T", columns]))], attrs),
    data.shape[0] as number,
    new Map([["x", data]]),
  );

const conversions = (): Job[] => {
  const random = randomNumbers(7);
  const scattered = Array.from({ length: 4000 }, () => (random() - 0.5) * 2 ** Math.floor(random() * 60 - 40));
  const f32 = [...special, ...integers, ...scattered];
  const targets: readonly DType[] = ["bf16", "f16", "e4m3", "e5m2", "i8", "u8", "i16", "u16", "i32", "u32", "bool", "f64"];
  const jobs = targets.map((to) => {
    const edges = to === "bf16" || to === "f16" || to === "e4m3" || to === "e5m2" ? edgesOf(to) : [];
    return elementJob(`from_f32_to_${to}`, "cast", tensorOf("f32", [...f32, ...edges]), { to });
  });
  for (const from of ["bf16", "f16", "e4m3", "e5m2"] as const) {
    const count = from === "bf16" || from === "f16" ? 65536 : 256;
    const all = Array.from({ length: count }, (_, code) => floatValue(from, code));
    jobs.push(elementJob(`from_${from}_to_f32`, "cast", tensorOf(from, all), { to: "f32" }));
  }
  for (const from of ["i8", "u8", "i16", "u16", "i32", "u32", "i64", "bool"] as const)
    jobs.push(elementJob(`from_${from}_to_f32`, "cast", tensorOf(from, [...integers, ...special]), { to: "f32" }));
  // one rounding, not two: half way between two values of the target, and a little more than f32 can tell
  const nearHalves = (to: "bf16" | "f16" | "e4m3" | "e5m2"): number[] =>
    edgesOf(to)
      .filter((_, i) => i % 7 === 2)
      .flatMap((x) => [x * (1 + 2 ** -40), x * (1 - 2 ** -40), x]);
  for (const to of ["bf16", "f16", "e4m3", "e5m2"] as const)
    jobs.push(elementJob(`from_f64_to_${to}`, "cast", tensorOf("f64", nearHalves(to)), { to }));
  jobs.push(
    elementJob(
      "from_i32_to_bf16",
      "cast",
      tensorOf("i32", [16842752 + 65536, 16842753 + 65536, 2 ** 30 + 2 ** 22 + 1, ...integers]),
      { to: "bf16" },
    ),
  );
  for (const kind of ["floor", "ceil", "nearest", "sqrt", "reciprocal", "abs", "neg"])
    jobs.push(
      elementJob(
        `${kind}_exact`,
        kind,
        tensorOf("f32", [...f32, 8388607.5, 8388608, -8388609, 4194303.5, 0.49999997, -0.7, -0.3]),
      ),
    );
  return jobs;
};

// --- functions ----------------------------------------------------------------------------------------------------------------

/** Allowed ulps of a function, where its arguments lie, and the function in double. */
const functions: Readonly<Record<string, { ulps: number; from: number; to: number }>> = {
  exp: { ulps: 1.5, from: -104, to: 89 },
  log: { ulps: 1.5, from: 0, to: 8 },
  tanh: { ulps: 2, from: -10, to: 10 },
  erf: { ulps: 2.5, from: -5, to: 5 },
  sin: { ulps: 0.6, from: -1e4, to: 1e4 },
  cos: { ulps: 0.6, from: -1e4, to: 1e4 },
  rsqrt: { ulps: 1.5, from: 0, to: 1e6 },
  sigmoid: { ulps: 3, from: -80, to: 80 },
  silu: { ulps: 3, from: -80, to: 80 },
};
const functionJobs = (): Job[] =>
  Object.entries(functions).map(([kind, { from, to }], n) => {
    const random = randomNumbers(100 + n);
    const inside = Array.from({ length: 20_000 }, () => from + (to - from) * random());
    const small = Array.from({ length: 2_000 }, () => (from < 0 ? random() - 0.5 : random()) * 2 ** -Math.floor(random() * 140));
    return elementJob(`function_${kind}`, kind, tensorOf("f32", [...special, ...inside, ...small]));
  });

// --- choosing -----------------------------------------------------------------------------------------------------------------

/** Rows of logits: scattered, with ties, with infinities, with a NaN, flat, and one far above all others. */
const logitRows = (rows: number, columns: number, random: () => number): Tensor => {
  const data = new Float64Array(rows * columns);
  for (let r = 0; r < rows; r++) {
    const kind = r % 8;
    for (let c = 0; c < columns; c++) {
      const x = (random() + random() + random() - 1.5) * 12;
      data[r * columns + c] = Math.fround(kind === 1 ? Math.round(x) : kind === 5 ? -0 : x);
    }
    const somewhere = r * columns + Math.floor(random() * columns);
    if (kind === 2) data[somewhere] = -Infinity;
    if (kind === 3) data[somewhere] = Number.NaN;
    if (kind === 4) data[somewhere] = Infinity;
    if (kind === 5) data[somewhere] = 0;
    if (kind === 6) data[somewhere] = 200;
  }
  return { kind: "tensor", dtype: "f32", shape: [rows, columns], data };
};

const choosingJobs = (): Job[] => {
  const random = randomNumbers(11);
  const rows = 240;
  const list = (dtype: DType, element: (r: number) => number): Tensor => ({
    kind: "tensor",
    dtype,
    shape: [rows],
    data: Float64Array.from({ length: rows }, (_, r) => roundTo(dtype, element(r))),
  });
  const sample = (columns: number): Job =>
    jobOf(
      `sample_${columns}`,
      (b) =>
        b.ops("sample", [
          b.input("logits", tensor("f32", ["T", columns])),
          b.input("temperature", tensor("f32", ["T"])),
          b.input("top_p", tensor("f32", ["T"])),
          b.input("seed", tensor("u32", ["T"])),
          b.input("position", tensor("i32", ["T"])),
        ]),
      rows,
      new Map([
        ["logits", logitRows(rows, columns, random)],
        ["temperature", list("f32", (r) => [0, 0.2, 0.7, 1, 4][r % 5] as number)],
        ["top_p", list("f32", (r) => [1, 0.9, 0.5, 0.05, 0, 0.99, 2][r % 7] as number)],
        ["seed", list("u32", () => Math.floor(random() * 2 ** 32))],
        ["position", list("i32", (r) => r * 977)],
      ]),
    );
  const topk = (columns: number, k: number): Job =>
    jobOf(
      `topk_${columns}_${k}`,
      (b) => b.ops("topk", [b.input("p", tensor("f32", ["T", columns]))], { k }),
      rows,
      new Map([["p", logitRows(rows, columns, random)]]),
    );
  return [sample(1), sample(37), sample(700), topk(48, 3), topk(131, 131), topk(9, 1)];
};

// --- random fused bodies ------------------------------------------------------------------------------------------------------

type Draw = () => number;
const choose = <X>(random: Draw, xs: readonly X[]): X => xs[Math.floor(random() * xs.length)] as X;

/** Values of a body under construction: how many columns they have, and whether they have rows. */
interface Pool {
  readonly v: Value;
  readonly width: number;
  readonly bare: boolean;
}

/**
 * A random body in the row normal form. `exact`: only ops whose result is correctly rounded, over many dtypes, NaN and infinity included;
 * else f32 functions and sums, bounded so that errors stay small.
 */
const randomJob = (seed: number, exact: boolean): Job => {
  const random = randomNumbers(seed * 7919 + (exact ? 1 : 2));
  const axes = choose(random, [["T"], ["T"], ["3*T"], ["T", 3], [4]] as const);
  const n = choose(random, [7, 16, 33, 130, 300, exact ? 2500 : 64]);
  const group = choose(random, [5, 16, 32, 64]);
  const groups = Math.ceil(n / group);
  const tokens = 5;
  const symbols = new Map([["T", tokens]]);
  const body = new Builder("row");
  const outer: TensorType[] = [];
  const given: Tensor[] = [];
  const pool: Pool[] = [];
  const type = (dtype: DType, width: number, bare: boolean): TensorType =>
    tensor(dtype, [...(bare ? [] : axes), ...(bare && width === 1 ? [] : [width])]);
  const input = (dtype: DType, width: number, bare: boolean): void => {
    const t = type(dtype, width, bare);
    given.push(drawTensor(concrete(t, symbols), choose(random, ["normal", "positive", "unit"] as const), random));
    outer.push(t);
    pool.push({ v: body.input(`i${pool.length}`, t), width, bare });
  };
  const floats: readonly DType[] = exact ? ["f32", "f32", "bf16", "f16"] : ["f32"];
  input(choose(random, floats), n, false);
  input(choose(random, floats), choose(random, [n, 1, groups]), false);
  input(choose(random, floats), n, true);
  if (random() < 0.5) input(choose(random, floats), 1, true);
  if (exact && random() < 0.4) input(choose(random, ["i8", "i32", "e4m3", "bool"] as const), n, false);

  const dtypeOf = (p: Pool): DType => (p.v.type as TensorType).dtype;
  const add = (kind: string, from: readonly Pool[], attrs: Record<string, string | number>, width: number): Pool => {
    const made = {
      v: body.op(
        kind,
        from.map((p) => p.v),
        attrs,
      ),
      width,
      bare: from.every((p) => p.bare),
    };
    pool.push(made);
    return made;
  };
  const cast = (p: Pool, to: DType): Pool => (dtypeOf(p) === to ? p : add("cast", [p], { to }, p.width));
  const widest = (from: readonly Pool[]): number => Math.max(...from.map((p) => p.width));
  const fits = (a: Pool, b: Pool): boolean => a.width === b.width || a.width === 1 || b.width === 1;
  const some = (ok: (p: Pool) => boolean): Pool | undefined => {
    const found = pool.filter(ok);
    return found.length === 0 ? undefined : choose(random, random() < 0.6 ? found.slice(-4) : found);
  };
  const number = (p: Pool): boolean => dtypeOf(p) !== "bool";
  const isFloat = (p: Pool): boolean => /^(f|bf|e)/.test(dtypeOf(p));
  const steps = 4 + Math.floor(random() * 9);
  for (let i = 0; i < steps; i++) {
    const x = some(number) as Pool;
    const r = random();
    if (r < 0.2) {
      const unary = exact
        ? ["neg", "abs", "sqrt", "floor", "ceil", "nearest"]
        : ["tanh", "sigmoid", "silu", "gelu", "erf", "neg", "cos"];
      const kind = choose(random, isFloat(x) ? unary : ["neg", "abs"]);
      add(kind, [x], {}, x.width);
    } else if (r < 0.55) {
      const y = some((p) => number(p) && fits(p, x)) as Pool;
      const kinds = exact ? ["add", "sub", "mul", "maximum", "minimum", ...(isFloat(x) ? ["div"] : [])] : ["add", "sub", "mul"];
      const pair = [x, cast(y, dtypeOf(x))];
      const made = add(choose(random, kinds), pair, {}, widest(pair));
      if (!exact) add("tanh", [made], {}, made.width);
    } else if (r < 0.65 && exact) {
      const y = some((p) => number(p) && fits(p, x)) as Pool;
      const pair = [x, cast(y, dtypeOf(x))];
      const condition = add(choose(random, ["less", "less_equal", "equal"]), pair, {}, widest(pair));
      add("where", [condition, ...pair], {}, widest(pair));
    } else if (r < 0.78) {
      const wide = some((p) => number(p) && !p.bare && (p.width === n || p.width === groups));
      if (!wide) continue;
      const fn = choose(random, exact ? ["max", "min", "amax"] : ["sum", "mean", "max", "amax"]);
      const grouped = wide.width === n && random() < 0.5;
      const made = add("reduce", [wide], { fn, ...(grouped ? { group } : {}) }, grouped ? groups : 1);
      if (!exact) add("tanh", [made], {}, made.width);
    } else if (r < 0.88) {
      const narrow = some((p) => !p.bare && p.width === groups && groups > 1);
      if (narrow) add("spread", [narrow], { group, size: n }, n);
    } else if (exact)
      add("cast", [x], { to: choose(random, ["f32", "bf16", "f16", "e4m3", "i8", "i32", "e5m2"] as const) }, x.width);
    else pool.push({ v: body.op("const", [], { value: random() * 2 - 1, dtype: "f32" }), width: 1, bare: true });
  }
  const made = body.build();
  const used = new Set(made.ops.flatMap((op) => op.inputs.map((v) => v.name)));
  const withRows = new Set(pool.filter((p) => !p.bare).map((p) => p.v));
  const results = made.ops.map((op) => op.outputs[0] as Value).filter((v) => withRows.has(v));
  const sinks = results.filter((v) => !used.has(v.name));
  const also = results.filter((v) => used.has(v.name) && random() < 0.15);
  const outputs = [...sinks, ...also];
  if (outputs.length === 0) return randomJob(seed + 1000, exact);
  const inputs = new Map(given.map((t, i): [string, Tensor] => [`x${i}`, t]));
  return jobOf(
    `${exact ? "exact" : "smooth"}_${seed}`,
    (b) =>
      b.fused(
        outer.map((t, i) => b.input(`x${i}`, t)),
        { ...made, outputs },
      ),
    tokens,
    inputs,
  );
};

const exactJobs = Array.from({ length: 70 }, (_, i) => randomJob(i, true));
const smoothJobs = Array.from({ length: 25 }, (_, i) => randomJob(i, false));
const conversionJobs = conversions();
const accuracyJobs = functionJobs();
const choices = choosingJobs();
const everything = [...conversionJobs, ...choices, ...accuracyJobs, ...exactJobs, ...smoothJobs];

describe("kernels in one program", () => {
  let built: string | undefined;
  const library = (): string => {
    built ??= libraryOf(everything);
    return built;
  };
  const results = new Map<string, readonly (readonly Uint8Array[])[]>();
  const on = (isa: string): readonly (readonly Uint8Array[])[] => {
    const found = results.get(isa) ?? runJobs(library(), everything, isa);
    results.set(isa, found);
    return found;
  };
  const resultOf = (job: Job, isa: string): readonly Uint8Array[] => on(isa)[everything.indexOf(job)] as readonly Uint8Array[];
  const outputsOf = (job: Job): Tensor[] => [
    ...evaluate(job.graph, job.inputs, undefined, undefined, new Map([["T", job.tokens]])).values(),
  ];

  test("it builds", { timeout: 900_000 }, () => {
    expect(isasOf(library())).toContain("baseline");
  });

  test("instruction sets agree to the bit", () => {
    const [first, ...others] = isasOf(library());
    for (const isa of others)
      for (const [i, job] of everything.entries())
        expect((on(isa)[i] as Uint8Array[]).map(hex), `${job.name} on ${isa}\n${job.text}`).toEqual(
          (on(first as string)[i] as Uint8Array[]).map(hex),
        );
  });

  for (const [what, jobs] of [
    ["conversions are bit for bit the interpreter's", conversionJobs],
    ["top-k and sampling choose what the interpreter does", choices],
    ["random bodies of correctly rounded ops are bit for bit the interpreter's", exactJobs],
  ] as const)
    test(what, () => {
      for (const job of jobs) {
        const bytes = resultOf(job, "baseline");
        outputsOf(job).forEach((t, i) => {
          const found = difference(t.dtype, t.data, bytes[i] as Uint8Array);
          expect(found, `${job.name}, output ${i}\n${job.text}`).toBeUndefined();
        });
      }
    });

  test("random bodies of functions and sums are near the interpreter", () => {
    for (const job of smoothJobs) {
      const bytes = resultOf(job, "baseline");
      outputsOf(job).forEach((t, i) => {
        expect(errorOf(t, decode(t.dtype, bytes[i] as Uint8Array)), `${job.name}, output ${i}\n${job.text}`).toBeLessThanOrEqual(
          4,
        );
      });
    }
  });

  test("functions are good to a few ulps everywhere", () => {
    const worst: Record<string, number> = {};
    accuracyJobs.forEach((job, n) => {
      const [kind, { ulps }] = Object.entries(functions)[n] as [string, { ulps: number }];
      const expected = (outputsOf(job)[0] as Tensor).data;
      const got = decode("f32", resultOf(job, "baseline")[0] as Uint8Array);
      const x = (job.inputs.get("x") as Tensor).data;
      for (let i = 0; i < expected.length; i++) {
        const [a, b] = [expected[i] as number, got[i] as number];
        if (Object.is(a, b) || a === b) continue;
        const ulp = Math.max(2 ** -149, 2 ** (Math.floor(Math.log2(Math.abs(a))) - 23));
        // the reference is rounded itself: half an ulp of the difference is its own
        const error = Math.abs(a - b) / ulp;
        expect(error <= ulps + 0.5, `${kind}(${x[i]}) is ${b}, not ${a}`).toBe(true);
        worst[kind] = Math.max(worst[kind] ?? 0, error);
      }
    });
  });

  test("a row's bits depend on nothing but that row", () => {
    const jobs = [...exactJobs, ...smoothJobs].filter((j) =>
      j.op.outputs.every((v) => String((v.type as TensorType).shape[0]).includes("T")),
    );
    const isa = isasOf(library()).at(-1) as string;
    /** the tensors of a job with other tokens: `from` lists, for each token of a segment, the token of the original */
    const runs = jobs.map((job) => {
      const segments = [[4, 0], [], [2, 1, 3, 4], [3]];
      const stride = 4;
      const spreadOut = (v: Value): Uint8Array => {
        const t = job.inputs.get(v.name) as Tensor;
        const bytes = encode(t.dtype, t.data);
        if (!String((v.type as TensorType).shape[0]).includes("T")) return bytes;
        const each = bytes.length / job.tokens;
        const out = new Uint8Array(each * stride * segments.length).fill(0xff); // NaNs where no row is
        segments.forEach((tokens, s) => {
          tokens.forEach((token, r) => {
            out.set(bytes.subarray(token * each, (token + 1) * each), (s * stride + r) * each);
          });
        });
        return out;
      };
      const args = [
        ...job.op.inputs.map((v) => ({ read: spreadOut(v) })),
        ...job.op.outputs.map((v) => ({ written: bytesOf(v, stride * segments.length) })),
      ];
      return {
        job,
        segments,
        stride,
        run: { kernel: job.name, isa, threads: 3, rows: segments.map((s) => s.length), stride, args },
      };
    });
    const answers = runKernels(
      library(),
      runs.map((r) => r.run),
    );
    runs.forEach(({ job, segments, stride }, i) => {
      const whole = resultOf(job, isa);
      (answers[i]?.outputs ?? []).forEach((bytes, o) => {
        const original = whole[o] as Uint8Array;
        const each = original.length / job.tokens;
        const expected = new Uint8Array(bytes.length).fill(0xa5); // rows that are not there stay untouched
        segments.forEach((tokens, s) => {
          tokens.forEach((token, r) => {
            expected.set(original.subarray(token * each, (token + 1) * each), (s * stride + r) * each);
          });
        });
        expect(hex(bytes) === hex(expected), `${job.name}, output ${o}\n${job.text}`).toBe(true);
      });
    });
  });

  test("no function of one instruction set is shared with another", () => {
    for (const isa of isas) {
      const objects = join(dirname(library()), "CMakeFiles", `kernels_${isa}.dir`);
      const files = readdirSync(objects, { recursive: true, encoding: "utf8" }).filter((f) => f.endsWith(".o"));
      expect(files.length).toBeGreaterThan(1);
      for (const file of files) {
        const symbols = execFileSync("nm", ["-C", "--defined-only", "--extern-only", join(objects, file)], { encoding: "utf8" });
        const foreign = symbols
          .split("\n")
          .filter((line) => line !== "" && !line.includes(`s3::${isa}::`) && !/ (DW\.ref|_GLOBAL_OFFSET)/.test(line));
        expect(foreign).toEqual([]);
      }
    }
  });
});

// --- goldens ------------------------------------------------------------------------------------------------------------------

describe("generated C++ reads like this", () => {
  const f32 = (b: Builder, x: Value): Value => b.op("cast", [x], { to: "f32" });
  const bf16 = (b: Builder, x: Value): Value => b.op("cast", [x], { to: "bf16" });
  const goldens: Readonly<Record<string, (b: Builder) => readonly Value[]>> = {
    // the residual of a block, the norm of the next, and its input quantised for fp8
    norm_quantise: (b) => {
      const sum = bf16(
        b,
        b.op("add", [f32(b, b.input("x", tensor("bf16", ["T", 256]))), b.input("p", tensor("f32", ["T", 256]))]),
      );
      const wide = f32(b, sum);
      const mean = b.op("reduce", [b.op("mul", [wide, wide])], { fn: "mean" });
      const scale = b.op("rsqrt", [b.op("add", [mean, b.op("const", [], { value: 1e-5, dtype: "f32" })])]);
      const normal = f32(b, b.op("mul", [bf16(b, b.op("mul", [wide, scale])), b.input("w", tensor("bf16", [256]))]));
      const raw = b.op("div", [
        b.op("reduce", [normal], { fn: "amax", group: 128 }),
        b.op("const", [], { value: 448, dtype: "f32" }),
      ]);
      const zero = b.op("equal", [raw, b.op("const", [], { value: 0, dtype: "f32" })]);
      const scales = b.op("where", [zero, b.op("const", [], { value: 1, dtype: "f32" }), raw]);
      const codes = b.op("cast", [b.op("div", [normal, b.op("spread", [scales], { group: 128, size: 256 })])], { to: "e4m3" });
      return [sum, codes, scales];
    },
    // the gate of an expert: three rows of pairs for each token
    swiglu: (b) => {
      const [gate, up] = [b.input("g", tensor("f32", ["3*T", 5120])), b.input("u", tensor("f32", ["3*T", 5120]))];
      return [bf16(b, b.op("mul", [b.op("silu", [gate]), up]))];
    },
    softmax: (b) => {
      const x = b.input("x", tensor("f32", ["T", 48]));
      const powers = b.op("exp", [b.op("sub", [x, b.op("reduce", [x], { fn: "max" })])]);
      return [b.op("div", [powers, b.op("reduce", [powers], { fn: "sum" })])];
    },
    // along axes before and between those of its operands, tokens not first
    broadcast: (b) => {
      const x = b.input("x", tensor("f32", [2, "T", 3, 40]));
      return [
        b.op("silu", [
          b.op("mul", [b.op("add", [x, b.input("y", tensor("f32", ["T", 1, 40]))]), b.input("z", tensor("f32", [3, 1]))]),
        ]),
      ];
    },
  };
  const alone: Readonly<Record<string, (b: Builder) => readonly Value[]>> = {
    transposed_copy: (b) => b.ops("transpose", [b.input("x", tensor("bf16", ["T", 40, 33]))], { perm: [0, 2, 1] }),
  };
  const tokens = 6;
  const drawn = (values: readonly Value[], seed: number): ReadonlyMap<string, Tensor> => {
    const random = randomNumbers(seed);
    const symbols = new Map([["T", tokens]]);
    return new Map(values.map((v) => [v.name, drawTensor(concrete(v.type as TensorType, symbols), "normal", random)]));
  };
  const fused = Object.entries(goldens).map(([name, build], n) => {
    const inner = new Builder(name);
    const outputs = build(inner);
    const body = { ...inner.build(), outputs };
    const outer = (b: Builder): readonly Value[] =>
      b.fused(
        body.inputs.map((v) => b.input(v.name, v.type as TensorType)),
        body,
      );
    return jobOf(name, outer, tokens, drawn(body.inputs, n));
  });
  const single = Object.entries(alone).map(([name, build], n) => {
    const b = new Builder(name);
    build(b);
    return jobOf(name, build, tokens, drawn(b.build().inputs, n));
  });
  const jobs = [...fused, ...single];
  const folder = join(root, "test", "golden", "cpp");

  for (const job of jobs)
    test(`${job.name}.cpp`, () => {
      const golden = join(folder, `${job.name}.cpp`);
      if (process.env.BLESS === "1") writeFileSync(golden, job.text);
      expect(job.text).toBe(
        existsSync(golden) ? readFileSync(golden, "utf8") : "no golden yet: look at the output, then set BLESS=1",
      );
    });

  test("no golden is left over", () => {
    expect(readdirSync(folder).sort()).toEqual(jobs.map((j) => `${j.name}.cpp`).sort());
  });

  test("and computes what the interpreter does", { timeout: 300_000 }, () => {
    const library = libraryOf(jobs);
    for (const isa of isasOf(library)) {
      const results = runJobs(library, jobs, isa);
      jobs.forEach((job, i) => {
        const expected = [...evaluate(job.graph, job.inputs).values()];
        expected.forEach((t, o) => {
          const error = errorOf(t, decode(t.dtype, results[i]?.[o] as Uint8Array));
          expect(error, `${job.name}, output ${o}, ${isa}`).toBeLessThanOrEqual(1);
        });
      });
    }
  });
});
