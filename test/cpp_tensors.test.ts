/**
 * Kernels of the C++ backend for tensors of any rank against the interpreter, on every instruction set this machine has: sizes that a launch
 * brings, none among them; random shapes; rows in segments; products around the sizes of blocks. Threads change no bit.
 */
import { beforeAll, describe, expect, test } from "vitest";
import { assemble } from "../backends/cpp/assemble.ts";
import cpp from "../backends/cpp/index.ts";
import { errorOf } from "../backends/kernel_cases.ts";
import {
  type Attrs,
  Builder,
  concrete,
  type Dim,
  type Draw,
  type DType,
  decode,
  drawTensor,
  dtypes,
  encode,
  evaluate,
  type Graph,
  isFloat,
  type Op,
  randomNumbers,
  type Tensor,
  type TensorType,
  tensor,
  type Value,
} from "../ir/index.ts";
import { buildProgram, isasOf, type KernelRun, runKernels } from "./native.ts";

// --- kernels of this test in one program ----------------------------------------------------------------------------------------

interface Job {
  readonly name: string;
  readonly graph: Graph;
  readonly op: Op;
  readonly draws: readonly Draw[];
  readonly text: string;
  readonly scratch: number;
}

/** Sizes by symbol. */
type Values = Readonly<Record<string, number>>;

const limits: Values = { T: 64, B: 8, S: 64, P: 64, M: 128, N: 128, K: 1200 };
const symbols = Object.entries(limits).map(([name, max]) => ({ name, min: 0, max, multiple: 1, source: "host" as const }));

const jobOf = (title: string, build: (b: Builder) => readonly Value[], draws: readonly Draw[] = []): Job => {
  const name = `k_${title}`; // no name of a header's
  const b = new Builder(name, symbols);
  for (const v of build(b)) b.output(v);
  const graph = b.build();
  const op = graph.ops[0] as Op;
  const why: string[] = [];
  const target = { arch: "any", symbols, isWeight: () => false, decline: (reason: string) => void why.push(reason) as undefined };
  for (const template of cpp.kernels) {
    const plan = template.match(op, target);
    if (plan) return { name, graph, op, draws, text: template.render(plan.context, name), scratch: plan.scratch };
  }
  throw new Error(`${name}: ${why.join("; ")}`);
};

const oneOp = (name: string, kind: string, types: readonly TensorType[], attrs: Attrs = {}, draws: readonly Draw[] = []): Job =>
  jobOf(
    name,
    (b) =>
      b.ops(
        kind,
        types.map((t, i) => b.input(`x${i}`, t)),
        attrs,
      ),
    draws,
  );

/** A body as one op `fused`. */
const oneBody = (
  name: string,
  types: readonly TensorType[],
  build: (b: Builder, x: readonly Value[]) => readonly Value[],
): Job => {
  const inner = new Builder("body");
  const outputs = build(
    inner,
    types.map((t, i) => inner.input(`i${i}`, t)),
  );
  const body = { ...inner.build(), outputs };
  return jobOf(name, (b) =>
    b.fused(
      types.map((t, i) => b.input(`x${i}`, t)),
      body,
    ),
  );
};

const libraryOf = (jobs: readonly Job[]): string =>
  buildProgram(
    assemble({
      role: "attention",
      arch: "any",
      kernels: jobs.map(({ name, text, scratch }) => ({ name, about: "", text, scratch })),
    }),
    ["-DS3_AMX_EMULATED=ON"],
  );

/** A job on drawn inputs of some sizes. */
interface Trial {
  readonly job: Job;
  readonly inputs: ReadonlyMap<string, Tensor>;
  readonly symbols: ReadonlyMap<string, number>;
  readonly what: string;
}

const trialOf = (job: Job, values: Values, seed: number): Trial => {
  const of = new Map(Object.entries({ ...limits, ...values }));
  const random = randomNumbers(seed);
  const inputs = job.op.inputs.map((v, i): [string, Tensor] => [
    v.name,
    drawTensor(concrete(v.type as TensorType, of), job.draws[i] ?? "normal", random),
  ]);
  return { job, inputs: new Map(inputs), symbols: of, what: `${job.name} at ${JSON.stringify(values)}` };
};

const bytesOf = (v: Value, of: ReadonlyMap<string, number>): number =>
  encode(v.type.dtype, new Float64Array(concrete(v.type as TensorType, of).shape.reduce((a, b) => a * b, 1))).length;

const runOf = (t: Trial, isa: string, threads: number): KernelRun => ({
  kernel: t.job.name,
  isa,
  threads,
  rows: [t.symbols.get("T") as number],
  dims: symbols.map((s) => t.symbols.get(s.name) as number),
  args: [
    ...t.job.op.inputs.map((v) => ({ read: encode(v.type.dtype, (t.inputs.get(v.name) as Tensor).data) })),
    ...t.job.op.outputs.map((v) => ({ written: bytesOf(v, t.symbols) })),
  ],
});

const referenceOf = (t: Trial): readonly Tensor[] => [
  ...evaluate(t.job.graph, t.inputs, undefined, undefined, t.symbols).values(),
];

/** What is wrong with results, in words: anything that is not equal where nothing is summed up, and more than is allowed elsewhere. */
const faultOf = (t: Trial, expected: readonly Tensor[], outputs: readonly Uint8Array[], exact: boolean): string | undefined => {
  for (const [i, tensor_] of expected.entries()) {
    const got = decode(tensor_.dtype, outputs[i] as Uint8Array);
    const wrong = got.findIndex((x, k) => !Object.is(x, tensor_.data[k]));
    if (exact && wrong >= 0)
      return `${t.what}, output ${i}: element ${wrong} is ${got[wrong]}, not ${tensor_.data[wrong]}\n${t.job.text}`;
    const error = errorOf(tensor_, got);
    if (!(error <= 1)) return `${t.what}, output ${i}: ${error} of what is allowed\n${t.job.text}`;
  }
  return undefined;
};

const hex = (outputs: readonly Uint8Array[]): string => outputs.map((o) => Buffer.from(o).toString("hex")).join();

const check = (library: string, trials: readonly Trial[], exact: (job: Job) => boolean): void => {
  const expected = trials.map(referenceOf);
  for (const isa of isasOf(library)) {
    const [one, three] = [1, 3].map((threads) =>
      runKernels(
        library,
        trials.map((t) => runOf(t, isa, threads)),
      ),
    );
    trials.forEach((t, i) => {
      const outputs = one?.[i]?.outputs as readonly Uint8Array[];
      expect(faultOf(t, expected[i] as readonly Tensor[], outputs, exact(t.job)), isa).toBeUndefined();
      expect(hex(three?.[i]?.outputs as readonly Uint8Array[]) === hex(outputs), `${t.what} with 3 threads on ${isa}`).toBe(true);
    });
  }
};

/** Ops that give elements as they are, or round what is computed exactly. */
const moving = [
  "reshape",
  "bitcast",
  "transpose",
  "slice",
  "broadcast",
  "concat",
  "iota",
  "size",
  "take",
  "sort",
  "add",
  "where",
];
const isExact = (job: Job): boolean => moving.includes(job.op.kind);

// --- sizes that a launch brings -------------------------------------------------------------------------------------------------

const f32 = (...shape: readonly Dim[]): TensorType => tensor("f32", shape);
const i64 = (...shape: readonly Dim[]): TensorType => tensor("i64", shape);

const ofSymbols: readonly Job[] = [
  oneOp("add_vector", "add", [f32("B", "S", 64), f32(64)]),
  oneOp("add_column", "add", [f32("B", "S", "P+S"), f32("B", "S", 1)]),
  oneOp("add_mask", "add", [f32("B", 4, "S", "P+S"), f32("B", 1, "S", "P+S")]),
  oneOp("add_in_between", "add", [tensor("bf16", ["S", 1, "B", 6]), tensor("bf16", [3, 1, 6])]),
  oneOp("add_scalars", "add", [f32("S"), f32()]),
  oneOp("where_causal", "where", [tensor("bool", ["S", "P+S"]), f32("B", 2, "S", "P+S"), f32()]),
  oneBody("fused_two_shapes", [f32("B", "S", 8), f32("S", 8)], (b, [x, y]) => {
    const s = b.op("silu", [y as Value]);
    return [b.op("mul", [x as Value, s]), s];
  }),
  oneOp("heads", "transpose", [f32("B", "S", 4, 8)], { perm: [0, 2, 1, 3] }),
  oneOp("heads_back", "transpose", [tensor("bf16", ["B", 4, "S", 6])], { perm: [0, 2, 1, 3] }),
  oneOp("keys", "transpose", [f32("B", "S", 40)], { perm: [0, 2, 1] }),
  oneOp("keys_back", "transpose", [tensor("u8", ["B", 40, "S"])], { perm: [0, 2, 1] }),
  oneOp("halves", "transpose", [f32("B", "(S+1)/2", "P", 3)], { perm: [2, 1, 0, 3] }),
  oneOp("matrix", "transpose", [tensor("f16", ["S", "P"])], { perm: [1, 0] }),
  oneOp("before", "slice", [f32("B", "P+S", 8)], { axis: 1, start: 0, size: ["P"] }),
  oneOp("after", "slice", [f32("B", "P+1", 3)], { axis: 1, start: -1, size: ["1"] }),
  oneOp("backwards", "slice", [f32("B", "S")], { axis: 1, start: -1, size: ["S"], step: -1 }),
  oneOp("cache", "concat", [f32("B", 2, "P", 8), f32("B", 2, "S", 8)], { axis: 2 }),
  oneOp("ends", "concat", [tensor("i8", ["S", "P"]), tensor("i8", ["S", 3])], { axis: 1 }),
  oneOp("repeat", "broadcast", [f32("B", 1, 8)], { shape: ["B", "S", "8"] }),
  oneOp("repeat_rows", "broadcast", [tensor("bool", ["S"])], { shape: ["B", "P", "S"] }),
  oneOp("join", "reshape", [f32("B", "S", 4, 8)], { shape: ["B*S", "32"] }),
  oneOp("positions", "iota", [], { shape: ["S"], axis: 0, dtype: "i64" }),
  oneOp("columns", "iota", [], { shape: ["B", "P+S"], axis: 1, dtype: "f32" }),
  oneOp("rows", "iota", [], { shape: ["B", "S", "5"], axis: 1, dtype: "i32" }),
  oneOp("length", "size", [f32("B", "P+S")], { axis: 1 }),
  oneOp("embedding", "take", [tensor("bf16", [50, 24]), i64("B", "S")], { axis: 0 }, ["normal", { below: 50 }]),
  oneOp("choice", "take", [f32("B", 7, "S"), tensor("i32", [2, 2])], { axis: 1 }, ["normal", { below: 7 }]),
  oneOp("letters", "take", [tensor("u8", [300]), i64("S")], { axis: 0 }, ["normal", { below: 300 }]),
  oneOp("column", "take", [f32("S", 5), i64()], { axis: 1 }, ["normal", { below: 5 }]),
  oneOp("first", "take", [f32("B", "P+1", 3), i64(1)], { axis: 1 }, ["normal", { below: 1 }]),
  oneOp("puts", "put", [f32("S+1"), i64("B"), f32("B")], { fn: "add" }, ["normal", { below: 1 }, "normal"]),
  oneOp("scores", "matmul", [f32("B", 4, "S", 8), f32("B", 4, 8, "P+S")]),
  oneOp("mixed", "matmul", [f32("B", 4, "S", "P+S"), f32("B", 1, "P+S", 8)]),
  oneOp("project", "matmul", [f32("B", "S", 16), f32(16, 24)]),
  oneOp("sums", "cumulate", [f32("B", "S")], {}),
  oneOp("order", "sort", [f32("B", "S")], { descending: true }),
  oneOp("best", "sort", [f32("B", "S+3")], { count: [3] }),
  oneOp("total", "reduce", [f32("B", "S", 33)], { fn: "sum" }),
  oneOp("product", "reduce", [f32("B", 3, "S", 5)], { fn: "prod" }),
  oneOp("probabilities", "softmax", [f32("B", 2, "S", 40)]),
  oneOp("norm", "rms_norm", [f32("S", "B", 24), f32(24)], { eps: 0.001 }, ["normal", "positive"]),
  oneOp("rows_of_weights", "linear", [tensor("bf16", ["B*S", 16]), tensor("bf16", [24, 16])], { to: "f32" }),
  oneBody("fused_norm", [f32("B", "S", 24), f32("S", 1), f32(24)], (b, [x, y, w]) => {
    const sum = b.op("add", [x as Value, y as Value]);
    const mean = b.op("reduce", [sum], { fn: "mean" });
    return [sum, b.op("mul", [b.op("sub", [sum, mean]), w as Value])];
  }),
  // tokens that are not the first axis
  oneOp("tokens_last", "transpose", [f32("T", 9)], { perm: [1, 0] }),
  oneOp("tokens_in_between", "softmax", [f32(2, "T", 6)]),
];
const atSizes: readonly Values[] = [
  { T: 1, B: 1, S: 1, P: 0 },
  { T: 5, B: 2, S: 5, P: 3 },
  { T: 0, B: 0, S: 4, P: 1 },
  { T: 7, B: 2, S: 0, P: 7 },
  { T: 40, B: 3, S: 40, P: 33 },
  { T: 3, B: 1, S: 64, P: 64 },
];

// --- random shapes --------------------------------------------------------------------------------------------------------------

const choose = <X>(random: () => number, xs: readonly X[]): X => xs[Math.floor(random() * xs.length)] as X;

/** One op on a random shape, where no size or a size of 1 is as likely as any. */
const randomJob = (n: number): Job => {
  const random = randomNumbers(1000 + n);
  const below = (k: number): number => Math.floor(random() * k);
  const size = (): number => choose(random, [1, 1, 2, 3, 4, 8, 9, 16, 33, 40, ...(n % 8 === 0 ? [0] : [])]);
  const shape = Array.from({ length: 1 + below(4) }, size);
  while (shape.reduce((a, b) => a * b, 1) > 20_000) shape.pop();
  const rank = shape.length;
  const dtype = choose(random, ["f32", "f32", "bf16", "u8", "i64", "bool"] as const satisfies readonly DType[]);
  const axis = below(rank);
  const extent = shape[axis] as number;
  const name = `random_${n}`;
  const x = tensor(dtype, shape);
  const sparse = (): TensorType =>
    tensor(
      dtype,
      shape.slice(below(rank + 1)).map((d) => (random() < 0.4 ? 1 : d)),
    );
  switch (n % 8) {
    case 0:
    case 1:
      return oneOp(name, "transpose", [x], {
        perm: shape
          .map((_, i) => ({ i, at: random() }))
          .sort((a, b) => a.at - b.at)
          .map(({ i }) => i),
      });
    case 2: {
      const step = choose(random, [1, 1, 2, -1]);
      const count = Math.max(1, Math.floor(extent / Math.abs(step)) - below(2));
      const start = step < 0 ? extent - 1 : Math.min(below(2), extent - 1 - (count - 1) * step);
      return oneOp(name, "slice", [x], { axis, start: Math.max(0, start), size: [count], step });
    }
    case 3:
      return oneOp(name, "broadcast", [sparse()], { shape: [...(random() < 0.3 ? [2] : []), ...shape].map(String) });
    case 4: {
      const others = Array.from({ length: 1 + below(3) }, () => tensor(dtype, shape.with(axis, below(5))));
      return oneOp(name, "concat", [x, ...others], { axis });
    }
    case 5: {
      const index = tensor(
        choose(random, ["i32", "i64"] as const),
        Array.from({ length: below(3) }, () => 1 + below(4)),
      );
      return oneOp(name, "take", [x, index], { axis }, ["normal", { below: extent }]);
    }
    case 6:
      return oneOp(name, "where", [tensor("bool", sparse().shape), sparse(), x]);
    default:
      return dtype === "bool"
        ? oneOp(name, "iota", [], { shape: shape.map(String), axis, dtype: choose(random, ["i32", "bf16", "i64"] as const) })
        : oneOp(name, "add", [sparse(), x]);
  }
};
const randomJobs = Array.from({ length: 120 }, (_, n) => randomJob(n));

// --- products -------------------------------------------------------------------------------------------------------------------

const products = (["f32", "bf16", "f16", "e4m3", "f64", "i32", "i8"] as const).map((dtype) =>
  oneOp(`product_${dtype}`, "matmul", [tensor(dtype, ["M", "K"]), tensor(dtype, ["K", "N"])], {
    to: isFloat(dtype) && dtype !== "f64" ? "f32" : dtype === "i8" ? "i32" : dtype,
  }),
);
const productSizes: readonly Values[] = [
  ...[1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 25].map((M) => ({ M, N: 1 + ((M * 19) % 70), K: 3 + ((M * 7) % 40) })),
  { M: 97, N: 33, K: 17 },
  { M: 128, N: 128, K: 64 },
  { M: 5, N: 16, K: 1100 },
  { M: 30, N: 100, K: 700 },
  { M: 0, N: 4, K: 4 },
  { M: 4, N: 0, K: 4 },
  { M: 4, N: 20, K: 0 },
];

// --- tokens in segments ---------------------------------------------------------------------------------------------------------

const byTokens: readonly Job[] = [
  oneOp("t_heads", "reshape", [tensor("bf16", ["T", 12])], { shape: ["T", "3", "4"] }),
  oneOp("t_pairs", "reshape", [tensor("i8", ["T", 6])], { shape: ["2*T", "3"] }),
  oneOp("t_turn", "transpose", [f32("T", 9, 10)], { perm: [0, 2, 1] }),
  oneOp("t_slice", "slice", [f32("2*T", 7)], { axis: 1, start: 2, size: [3] }),
  oneOp("t_repeat", "broadcast", [f32("T", 1, 5)], { shape: ["T", "3", "5"] }),
  oneOp("t_concat", "concat", [f32("T", 4), f32("T", 3)], { axis: 1 }),
  oneOp("t_take", "take", [f32("T", 6, 2), i64(3)], { axis: 1 }, ["normal", { below: 6 }]),
  oneOp("t_rows", "take", [f32(9, 5), i64("T")], { axis: 0 }, ["normal", { below: 9 }]),
  oneOp("t_bytes", "bitcast", [f32("T", 3)], { to: "u8" }),
  oneOp("t_sums", "cumulate", [f32("T", 8)], { reverse: true }),
  oneOp("t_sort", "sort", [f32("T", 8)]),
  oneOp("t_project", "matmul", [f32("T", 2, 8), f32(8, 20)]),
  oneOp("t_batches", "matmul", [f32("T", 3, 8), f32("T", 8, 4)]),
  oneBody("t_two_shapes", [f32("T", 1, 8), f32("T", 3, 8)], (b, [x, y]) => {
    const s = b.op("neg", [x as Value]);
    return [b.op("add", [y as Value, s]), s];
  }),
];

// --------------------------------------------------------------------------------------------------------------------------------

describe("kernels in one program", () => {
  let library: string;
  beforeAll(() => {
    library = libraryOf([...ofSymbols, ...randomJobs, ...products, ...byTokens]);
  }, 900_000);

  test("sizes that a launch brings, none among them", () => {
    const trials = ofSymbols.flatMap((job, i) => atSizes.map((values, n) => trialOf(job, values, 100 * i + n)));
    check(library, trials, isExact);
  });

  test("random shapes", () => {
    check(
      library,
      randomJobs.map((job, n) => trialOf(job, { T: 1 }, n)),
      isExact,
    );
  });

  test("products of every dtype, around the sizes of blocks", () => {
    const trials = products.flatMap((job, i) => productSizes.map((values, n) => trialOf(job, values, 100 * i + n)));
    check(library, trials, (job) => /f64|i32/.test(job.name));
  });

  test("a token's results depend on nothing but that token, wherever it is", () => {
    const segments = [[4, 0], [], [2, 1, 3], [3]];
    const stride = 4;
    const tokens = 5;
    for (const [n, job] of byTokens.entries()) {
      const whole = trialOf(job, { T: tokens }, n);
      const isToken = (v: Value): boolean => /T/.test(String((v.type as TensorType).shape[0]));
      const scattered = (bytes: Uint8Array, fill: number): Uint8Array => {
        const each = bytes.length / tokens;
        const out = new Uint8Array(each * stride * segments.length).fill(fill);
        segments.forEach((list, s) => {
          list.forEach((token, r) => {
            out.set(bytes.subarray(token * each, (token + 1) * each), (s * stride + r) * each);
          });
        });
        return out;
      };
      for (const isa of isasOf(library)) {
        const plain = runOf(whole, isa, 1);
        const [all] = runKernels(library, [plain]);
        const args = plain.args.map((a, i) => {
          if (!("read" in a)) return { written: ("written" in a ? a.written : 0) * ((stride * segments.length) / tokens) };
          return isToken(job.op.inputs[i] as Value) ? { read: scattered(a.read, 0xff) } : a;
        });
        const [apart] = runKernels(library, [{ ...plain, threads: 3, rows: segments.map((s) => s.length), stride, args }]);
        expect(faultOf(whole, referenceOf(whole), all?.outputs as readonly Uint8Array[], isExact(job)), isa).toBeUndefined();
        const expected = (all?.outputs ?? []).map((bytes) => scattered(bytes, 0xa5));
        expect(hex(apart?.outputs ?? []) === hex(expected), `${job.name} on ${isa}\n${job.text}`).toBe(true);
      }
    }
  });

  test("indices outside are those at the ends", () => {
    const given = {
      read: encode(
        "f32",
        Float64Array.from({ length: 300 }, (_, i) => i),
      ),
    };
    const job = ofSymbols.find((j) => j.name === "k_column") as Job;
    for (const [index, column] of [
      [-3, 0],
      [99, 4],
    ] as const) {
      const values = trialOf(job, { S: 60 }, 1);
      const run = { ...runOf(values, "baseline", 2), args: [given, { read: encode("i64", [index]) }, { written: 240 }] };
      const [result] = runKernels(library, [run]);
      expect([...decode("f32", result?.outputs[0] as Uint8Array)]).toEqual(Array.from({ length: 60 }, (_, i) => 5 * i + column));
    }
  });
});

test("results without elements need no kernel of their own", () => {
  for (const dtype of dtypes.filter((d) => d !== "bool"))
    for (const job of [
      oneOp("k", "neg", [tensor(isFloat(dtype) ? dtype : "i32", [0, 4])]),
      oneOp("k", "reduce", [tensor(dtype, [3, 0, 4])], { fn: "max" }),
      oneOp("k", "matmul", [tensor(dtype, [0, 4]), tensor(dtype, [4, 2])]),
    ])
      expect(job.text).not.toContain("for (");
});
