/**
 * Speed of the C++ kernels on this machine, as ratios from one run.
 *   npm run build && node dist/bench/cpu.js [--quick] [--threads 1,2]
 *
 * 1. f32 linear with constant weights against onnxruntime's MatMul on the same shapes and threads. Both keep one set of weights; runs of the
 *    two are interleaved; times are medians. What a call of onnxruntime through Node.js costs by itself (a 1 x 16 x 16 MatMul) is taken
 *    off its times.
 * 2. A row times a matrix of 64 Mi weights (bf16, fp8, int8): bytes of weights a second against what this machine reads with as many
 *    threads, measured between the runs, the best of two ways of reading. The matrix is larger than the caches.
 */
import { spawn, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import onnxProto from "onnx-proto";
import * as ort from "onnxruntime-node";
import type { KernelPlan, Target } from "../backends/backend.ts";
import { assemble } from "../backends/cpp/assemble.ts";
import { linearKernels } from "../backends/cpp/linear.ts";
import { loadText, sourceFile } from "../backends/template.ts";
import { packageRoot } from "../compiler/package_root.ts";
import { type DType, dtypeBytes, inferTypes, type Op, type TensorType, tensor } from "../ir/index.ts";

const { onnx } = onnxProto;
const quick = process.argv.includes("--quick");
const threadsAt = process.argv.indexOf("--threads");
const threadCounts = threadsAt < 0 ? [1, 2] : (process.argv[threadsAt + 1] ?? "1").split(",").map(Number);
const shapes = [
  [1024, 1024],
  [4096, 1024],
  [1024, 4096],
  [4096, 4096],
] as const;
const rowCounts = [1, 4, 16, 64] as const;
const rounds = quick ? 5 : 9;
const settleMilliseconds = 100;

// --- kernels ------------------------------------------------------------------------------------------------------------------

interface Kernel {
  readonly name: string;
  readonly op: Op;
  readonly plan: KernelPlan;
  readonly text: string;
}

const kernelOf = (name: string, kind: string, types: readonly TensorType[], attrs: Op["attrs"]): Kernel => {
  const outputs = inferTypes(kind, types, attrs).map((type, i) => ({ name: `y${i}`, type }));
  const op: Op = { kind, inputs: types.map((type, i) => ({ name: `x${i}`, type })), attrs, outputs };
  const target: Target = {
    arch: "any",
    symbols: [{ name: "T", min: 0, max: 64, multiple: 1, source: "host" }],
    decline: () => undefined,
  };
  for (const template of linearKernels) {
    const plan = template.match(op, target);
    if (plan) return { name, op, plan, text: template.render(plan.context, name) };
  }
  throw new Error(`no kernel for ${name}`);
};

const gemmName = (n: number, k: number): string => `f32_${n}x${k}`;
const gemms = shapes.map(([n, k]) => kernelOf(gemmName(n, k), "linear", [tensor("f32", ["T", k]), tensor("f32", [n, k])], {}));
const [gemvRows, gemvColumns] = [16384, 4096];
const scaled = (dtype: DType, block: readonly [number, number]): readonly TensorType[] => [
  tensor(dtype, ["T", gemvColumns]),
  tensor("f32", ["T", Math.ceil(gemvColumns / block[1])]),
  tensor(dtype, [gemvRows, gemvColumns]),
  tensor("f32", [Math.ceil(gemvRows / block[0]), Math.ceil(gemvColumns / block[1])]),
];
const gemvs = [
  kernelOf("bf16_row", "linear", [tensor("bf16", ["T", gemvColumns]), tensor("bf16", [gemvRows, gemvColumns])], {}),
  kernelOf("fp8_row", "scaled_linear", scaled("e4m3", [128, 128]), { to: "bf16", block: [128, 128] }),
  kernelOf("int8_row", "scaled_linear", scaled("i8", [1, gemvColumns]), { to: "bf16", block: [1, gemvColumns] }),
];

const tool = (file: string, args: readonly string[]): void => {
  const result = spawnSync(file, args, { encoding: "utf8", maxBuffer: 64 << 20 });
  if (result.error) throw result.error;
  if (result.status !== 0) throw new Error(`${file} ${args.join(" ")} failed:\n${result.stdout}\n${result.stderr}`);
};

/** The library of the kernels and the program that times them, built once per content. */
const build = (): { readonly library: string; readonly runner: string } => {
  const kernels = [...gemms, ...gemvs].map(({ name, plan, text }) => ({ name, about: plan.about, text, scratch: plan.scratch }));
  const files = assemble({ role: "ffn", arch: "any", kernels });
  const runnerSource = sourceFile(new URL("./cpu_kernels.cpp", import.meta.url));
  const hash = createHash("sha256").update(loadText(new URL("./cpu_kernels.cpp", import.meta.url)));
  for (const [name, text] of files) hash.update(name).update(text);
  const folder = join(packageRoot(), ".cache", `bench-cpu-${hash.digest("hex").slice(0, 16)}`);
  if (!existsSync(folder)) {
    process.stderr.write("building the kernels\n");
    const work = `${folder}.${process.pid}`;
    mkdirSync(work, { recursive: true });
    for (const [name, text] of files) writeFileSync(join(work, name), text);
    tool("cmake", ["-S", work, "-B", join(work, "build")]);
    tool("cmake", ["--build", join(work, "build"), "--parallel"]);
    tool(process.env.CXX ?? "c++", [
      "-std=c++20",
      "-O3",
      "-march=native",
      "-Wno-psabi",
      "-pthread",
      `-I${work}`,
      runnerSource,
      "-o",
      join(work, "runner"),
      "-ldl",
    ]);
    renameSync(work, folder);
  }
  return { library: join(folder, "build", "libprogram.so"), runner: join(folder, "runner") };
};

/** The process that runs our kernels. */
const startRunner = async (): Promise<{ isa: string; ask(line: string): Promise<string>; end(): void }> => {
  const { library, runner } = build();
  const child = spawn(runner, [library], { stdio: ["pipe", "pipe", "inherit"] });
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  const answer = async (): Promise<string> => {
    const { value, done } = await lines.next();
    if (done) throw new Error("the kernel runner ended");
    return value;
  };
  const isa = await answer();
  return {
    isa,
    ask: (line) => {
      child.stdin.write(`${line}\n`);
      return answer();
    },
    end: () => void child.stdin.end(),
  };
};

const kinds: Readonly<Partial<Record<DType, string>>> = { f32: "f", bf16: "b", e4m3: "e", i8: "i" };

/** The command that makes a kernel's arguments for `rows` rows. */
const kernelCommand = ({ name, op, plan }: Kernel, rows: number): string => {
  const size = (t: TensorType): number =>
    t.shape.reduce((n: number, d) => n * (typeof d === "number" ? d : rows), 1) * dtypeBytes(t.dtype);
  const args = op.inputs.map(({ type }, i) => {
    const t = type as TensorType;
    const layout = plan.layouts?.[i];
    const [n, k] = t.shape as readonly [number, number];
    return `${kinds[t.dtype]} ${layout ? layout.bytes(n, k, t.dtype) : size(t)}`;
  });
  return `kernel ${name} ${rows} ${args.length + 1} ${args.join(" ")} o ${size(op.outputs[0]?.type as TensorType)}`;
};

// --- onnxruntime --------------------------------------------------------------------------------------------------------------

const matmulModel = (rows: number, n: number, k: number): Uint8Array => {
  const weights = Float32Array.from({ length: k * n }, (_, i) => ((i * 7919) % 2003) / 1001 - 1);
  const value = (name: string, dims: readonly number[]) => ({
    name,
    type: { tensorType: { elemType: 1, shape: { dim: dims.map((dimValue) => ({ dimValue })) } } },
  });
  const graph = {
    name: "matmul",
    node: [{ opType: "MatMul", input: ["x", "w"], output: ["y"] }],
    initializer: [{ name: "w", dataType: 1, dims: [k, n], rawData: new Uint8Array(weights.buffer) }],
    input: [value("x", [rows, k])],
    output: [value("y", [rows, n])],
  };
  return onnx.ModelProto.encode(
    onnx.ModelProto.fromObject({ irVersion: 8, opsetImport: [{ domain: "", version: 17 }], graph }),
  ).finish();
};

/** Gives a function that runs the MatMul so often and gives nanoseconds of each run. */
const onnxruntime = async (
  rows: number,
  n: number,
  k: number,
  threads: number,
): Promise<{ time(repeats: number): Promise<number[]>; release(): Promise<void> }> => {
  const session = await ort.InferenceSession.create(matmulModel(rows, n, k), {
    intraOpNumThreads: threads,
    interOpNumThreads: 1,
    executionProviders: ["cpu"],
  });
  const x = new ort.Tensor("float32", new Float32Array(rows * k).fill(0.5), [rows, k]);
  const y = new ort.Tensor("float32", new Float32Array(rows * n), [rows, n]);
  return {
    time: async (repeats) => {
      const times: number[] = [];
      await session.run({ x }, { y });
      for (let i = 0; i < repeats; i++) {
        const start = process.hrtime.bigint();
        await session.run({ x }, { y });
        times.push(Number(process.hrtime.bigint() - start));
      }
      return times;
    },
    release: () => session.release(),
  };
};

// --- tables -------------------------------------------------------------------------------------------------------------------

const median = (times: readonly number[]): number => [...times].sort((a, b) => a - b)[times.length >> 1] as number;
const least = (times: readonly number[]): number => Math.min(...times);
const numbers = (line: string): number[] => line.trim().split(" ").map(Number);
const ms = (ns: number): string => (ns / 1e6).toFixed(3).padStart(9);
const print = (line: string): void => void process.stdout.write(`${line}\n`);

const runner = await startRunner();
print(`instruction set: ${runner.isa}`);

for (const threads of threadCounts) {
  const empty = await onnxruntime(1, 16, 16, threads);
  const overhead = median(await empty.time(200));
  await empty.release();
  print(
    `\nf32 linear [M,K] x [N,K], ${threads} thread${threads === 1 ? "" : "s"}; a call of onnxruntime costs ${(overhead / 1e3).toFixed(0)} us, taken off`,
  );
  print("    N     K   M   ours ms    onnxruntime ms   ours GFLOP/s   onnxruntime / ours: medians   minima");
  for (const [n, k] of shapes)
    for (const rows of rowCounts) {
      const kernel = gemms.find((g) => g.name === gemmName(n, k)) as Kernel;
      const ours = await runner.ask(kernelCommand(kernel, rows));
      const theirs = await onnxruntime(rows, n, k, threads);
      const repeats = Math.max(3, Math.min(40, Math.round(1.5e8 / (rows * n * k * 0.02 + n * k * 0.4))));
      const mine: number[] = [];
      const other: number[] = [];
      for (let round = 0; round < rounds; round++) {
        // onnxruntime's threads spin on after a run, and ours would share the processors with them; both begin after a rest
        await sleep(settleMilliseconds);
        mine.push(...numbers(await runner.ask(`time ${ours} ${threads} ${repeats}`)));
        await sleep(settleMilliseconds);
        other.push(...(await theirs.time(repeats)).map((t) => t - overhead));
      }
      await theirs.release();
      print(
        `${String(n).padStart(5)} ${String(k).padStart(5)} ${String(rows).padStart(3)} ${ms(median(mine))} ${ms(median(other))}         ` +
          `${((2 * rows * n * k) / median(mine)).toFixed(1).padStart(6)}          ${(median(other) / median(mine)).toFixed(2).padStart(6)}` +
          `                       ${(least(other) / least(mine)).toFixed(2).padStart(6)}`,
      );
    }
}

const readMegabytes = 256;
for (const threads of threadCounts) {
  print(`\none row x [${gemvRows},${gemvColumns}], ${threads} thread${threads === 1 ? "" : "s"}`);
  print("weights   GB/s   reading memory GB/s   share");
  for (const kernel of gemvs) {
    const index = await runner.ask(kernelCommand(kernel, 1));
    const weight = kernel.op.inputs[kernel.op.inputs.length === 2 ? 1 : 2]?.type as TensorType;
    const bytes = gemvRows * gemvColumns * dtypeBytes(weight.dtype);
    const mine: number[] = [];
    const read: number[] = [];
    for (let round = 0; round < rounds; round++) {
      mine.push(...numbers(await runner.ask(`time ${index} ${threads} 5`)));
      read.push(...numbers(await runner.ask(`read ${readMegabytes} ${threads} 3`)));
    }
    const speed = bytes / median(mine);
    const limit = (readMegabytes * 2 ** 20) / median(read);
    print(
      `${kernel.name.replace("_row", "").padEnd(7)} ${speed.toFixed(1).padStart(6)}   ${limit.toFixed(1).padStart(19)}   ${((100 * speed) / limit).toFixed(0).padStart(4)} %`,
    );
  }
}
runner.end();
