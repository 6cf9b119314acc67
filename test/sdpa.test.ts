/** Attention of heads as tensors by the C++ backend: every sample against the interpreter, ragged sizes, and bits that no thread changes. */
import { describe, expect, test } from "vitest";
import type { Backend } from "../backends/backend.ts";
import { checkBackend, type KernelRunner } from "../backends/conformance.ts";
import { assemble } from "../backends/cpp/assemble.ts";
import { sdpaKernel } from "../backends/cpp/sdpa.ts";
import { errorOf } from "../backends/kernel_cases.ts";
import {
  type Attrs,
  concrete,
  type DType,
  decode,
  drawTensor,
  dtypes,
  encode,
  inferTypes,
  knowledge,
  type Op,
  randomNumbers,
  type Tensor,
  type TensorType,
  tensor,
} from "../ir/index.ts";
import { buildProgram, isasOf, runKernels } from "./native.ts";

const options = ["-DS3_ISAS=baseline;avx2;avx512"];

test("every sample", { timeout: 600_000 }, () => {
  const backend: Backend = { name: "sdpa", api: 1, device: "cpp", arches: ["any"], dtypes, kernels: [sdpaKernel], assemble };
  const runner: KernelRunner = {
    build(files) {
      const library = buildProgram(files, options);
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
  const report = checkBackend(backend, { runner, only: ["sdpa"] });
  expect(report.results.filter((r) => r.status !== "matched")).toEqual([]);
  const wrong = report.results.filter((r) => Object.values(r.errors ?? {}).some((e) => !(e <= 1)));
  expect(wrong).toEqual([]);
});

interface Case {
  readonly name: string;
  readonly dtype: DType;
  readonly heads: readonly [number, number];
  readonly dims: readonly [number, number];
  readonly bias?: TensorType;
  readonly attrs?: Attrs;
}

const cases: readonly Case[] = [
  { name: "f32", dtype: "f32", heads: [2, 2], dims: [24, 24] },
  { name: "grouped", dtype: "bf16", heads: [6, 2], dims: [40, 17], bias: tensor("f32", ["B", 1, "S", "L"]) },
  { name: "causal", dtype: "f16", heads: [4, 1], dims: [64, 64], attrs: { causal: "last", to: "f32" } },
  { name: "masked", dtype: "f32", heads: [2, 1], dims: [16, 16], bias: tensor("bool", ["S", "L"]), attrs: { causal: "first" } },
];
const sizes: readonly (readonly [B: number, S: number, L: number])[] = [
  [1, 1, 1],
  [2, 1, 97],
  [1, 33, 48],
  [2, 50, 145],
  [1, 70, 5],
  [1, 3, 0],
];

describe("ragged sizes", () => {
  const symbols = ["B", "S", "L"].map((name) => ({ name, min: 0, max: 200, multiple: 1, source: "host" as const }));
  const made = cases.map((c, n) => {
    const inputs = [
      tensor(c.dtype, ["B", c.heads[0], "S", c.dims[0]]),
      tensor(c.dtype, ["B", c.heads[1], "L", c.dims[0]]),
      tensor(c.dtype, ["B", c.heads[1], "L", c.dims[1]]),
      ...(c.bias ? [c.bias] : []),
    ];
    const attrs: Attrs = { scale: 0.2, ...c.attrs };
    const op: Op = {
      kind: "sdpa",
      attrs,
      inputs: inputs.map((type, i) => ({ name: `x${i}`, type })),
      outputs: inferTypes("sdpa", inputs, attrs).map((type) => ({ name: "y", type })),
    };
    const plan = sdpaKernel.match(op, { arch: "any", symbols, decline: () => undefined });
    if (plan === undefined) throw new Error(`no kernel for ${c.name}`);
    const kernel = { name: `k${n}`, about: plan.about, text: sdpaKernel.render(plan.context, `k${n}`), scratch: plan.scratch };
    return { ...c, op, kernel };
  });

  test("agree with the interpreter, and threads change no bit", { timeout: 600_000 }, () => {
    const library = buildProgram(assemble({ role: "attention", arch: "any", kernels: made.map((m) => m.kernel) }), options);
    const random = randomNumbers(5);
    for (const { name, op, kernel } of made)
      for (const [B, S, L] of sizes) {
        const values = new Map(Object.entries({ B, S, L }));
        const inputs = op.inputs.map((v) => {
          const type = concrete(v.type as TensorType, values);
          return drawTensor(type, type.dtype === "bool" ? { below: 2 } : "normal", random);
        });
        const type = concrete(op.outputs[0]?.type as TensorType, values);
        const expected = knowledge("sdpa").evaluate(inputs, op.attrs, [type])[0] as Tensor;
        const bytes = encode(type.dtype, expected.data).length;
        for (const isa of isasOf(library)) {
          const results = runKernels(
            library,
            [1, 2, 3].map((threads) => ({
              kernel: kernel.name,
              isa,
              threads,
              rows: [0],
              dims: [B, S, L],
              args: [...inputs.map((t) => ({ read: encode(t.dtype, t.data) })), { written: bytes }],
            })),
          ).map((r) => r.outputs[0] as Uint8Array);
          const at = `${name} ${isa} B ${B} S ${S} L ${L}`;
          expect(errorOf(expected, decode(type.dtype, results[0] as Uint8Array)), at).toBeLessThanOrEqual(1);
          for (const other of results.slice(1)) expect(other, at).toEqual(results[0]);
        }
      }
  });
});
