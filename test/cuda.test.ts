/**
 * The CUDA backend without a GPU: everything is matched, joined kernels are what is asked for, and every emitted file compiles for each
 * architecture where nvcc is. What the kernels compute is checked by `npm run test:gpu`.
 */
import { spawn, spawnSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { checkBackend } from "../backends/conformance.ts";
import cuda from "../backends/cuda/index.ts";
import { compile, defaultOptions } from "../compiler/compile.ts";
import { silent } from "../compiler/progress.ts";
import { step3ConfigJson } from "./checkpoint.ts";

const sample = fileURLToPath(new URL("../samples/step3-tiny", import.meta.url));
const nvcc = ["nvcc", "/usr/local/cuda/bin/nvcc"].find((name) => spawnSync(name, ["--version"]).status === 0);
const root = mkdtempSync(join(tmpdir(), "step3c-cuda-"));
afterAll(() => rmSync(root, { recursive: true }));

describe("every sample of every op", () => {
  for (const arch of cuda.arches)
    test(`is matched for ${arch}`, () => {
      const report = checkBackend(cuda, { arch });
      expect(report.results.filter((r) => r.status !== "matched")).toEqual([]);
      expect(report.lacking).toEqual([]);
    });
});

const kernelsOf = async (precision: "bf16" | "fp8" | "int8", model = sample, ranks = defaultOptions.ranks): Promise<string[]> => {
  const options = { ...defaultOptions, attention: "cuda", ffn: "cuda", precision, kv: precision, weights: false, ranks };
  const printed = await compile(model, { ...options, emit: "kernels" }, silent);
  return [...printed.matchAll(/^\/\/ (?:attention|ffn) k\d+_\w+: (.*)$/gm)].map((m) => m[1] as string);
};

const twoSides = { attention: 1, ffn: 2 };
/** A model whose experts are large enough for the matrix units, the shared one on two ranks too. */
const mlps = (): string => {
  const model = join(root, "mlps");
  mkdirSync(model, { recursive: true });
  const sizes = { hidden: 512, intermediate: 512, moeIntermediate: 256, shared: 512 };
  writeFileSync(join(model, "config.json"), JSON.stringify(step3ConfigJson({ sizes })));
  return model;
};

describe("kernels of the sample", () => {
  test("the cache is written by one kernel, rotation and quantisation included", async () => {
    for (const [precision, steps] of [
      ["bf16", "k rotary, v"],
      ["fp8", "k rotary quantise, v quantise"],
      ["int8", "k rotary quantise, v quantise"],
    ] as const) {
      const appends = (await kernelsOf(precision)).filter((about) => about.includes("kv_append"));
      expect(appends).toHaveLength(1);
      expect(appends[0]).toContain(steps);
    }
  });

  test("contractions of the same rows are one launch when they are large enough for the matrix units", async () => {
    const model = join(root, "wide");
    mkdirSync(model);
    writeFileSync(
      join(model, "config.json"),
      JSON.stringify(step3ConfigJson({ sizes: { hidden: 512, queryRank: 256, headDim: 128 } })),
    );
    for (const [precision, kind] of [
      ["bf16", "linear bf16"],
      ["fp8", "scaled_linear e4m3"],
      ["int8", "scaled_linear i8"],
    ] as const) {
      const joined = (await kernelsOf(precision, model)).filter(
        (about) => about.includes(" and linear ") || about.includes(" and scaled_linear "),
      );
      expect(joined).toHaveLength(1);
      expect(joined[0]?.split(" and ").map((about) => about.startsWith(kind))).toEqual([true, true, true]);
    }
    const apart = (await kernelsOf("fp8")).filter((about) => about.includes(" and scaled_linear "));
    expect(apart).toEqual([]);
  });

  test("what an expert makes of a token by two weights meets in one launch", async () => {
    const model = join(root, "experts");
    mkdirSync(model);
    writeFileSync(join(model, "config.json"), JSON.stringify(step3ConfigJson({ sizes: { hidden: 512, moeIntermediate: 256 } })));
    for (const [precision, kind] of [
      ["bf16", "grouped_linear bf16"],
      ["fp8", "scaled_grouped_linear e4m3"],
      ["int8", "scaled_grouped_linear i8"],
    ] as const) {
      const met = (await kernelsOf(precision, model)).filter((about) => about.includes(" x 2 "));
      expect(met).toHaveLength(1);
      expect(met[0]?.startsWith(kind) && met[0].endsWith("silu, mul, cast")).toBe(true);
    }
  });

  test("all of an MLP on one rank of several is one launch: experts, the shared one beside them, and the sum over both", async () => {
    for (const precision of ["bf16", "fp8"] as const) {
      const chains = (await kernelsOf(precision, mlps(), twoSides)).filter((about) => about.includes("combine"));
      expect(chains).toHaveLength(1);
      const [sides, sums, ...more] = (chains[0] as string).split(/, then (?=(?:scaled_)?(?:grouped_)?linear)/);
      expect(more).toEqual([]);
      const beside = (sides as string).split(" and ");
      expect(beside.map((part) => [part.includes("grouped"), part.includes(" x 2 ")]).sort()).toEqual([
        [false, true],
        [true, true],
      ]);
      // the shared one's last contraction waits for no expert
      const last = (sums as string).split(" and ");
      expect(last.map((part) => [part.includes("grouped"), part.includes("combine")])).toEqual([
        [true, false],
        [false, true],
      ]);
    }
    expect(
      (await kernelsOf("int8", mlps(), twoSides)).filter((about) => / then (?:scaled_)?(?:grouped_)?linear/.test(about)),
    ).toEqual([]);
  });

  test("experts are chosen by one kernel", async () => {
    expect((await kernelsOf("bf16")).filter((about) => /topk|max sub exp/.test(about))).toEqual([
      "softmax and topk f32[T,8] -> f32[T,3], i32[T,3]",
    ]);
  });
});

describe.skipIf(nvcc === undefined)(`emitted files compile${nvcc === undefined ? " (no nvcc here: not checked)" : ""}`, () => {
  const programs = new Map<string, Map<string, string>>();
  beforeAll(() => {
    const only = [
      "linear",
      "scaled_linear",
      "scaled_grouped_linear",
      "attention",
      "kv_append",
      "sample",
      "topk",
      "gather",
      "rotary",
      "softmax",
    ];
    for (const arch of cuda.arches)
      checkBackend(cuda, { arch, only, pack: (files) => void programs.set(`samples of ops for ${arch}`, new Map(files)) });
  });

  /** Runs nvcc on files of a folder, two at a time; gives what it says of those that do not compile. */
  const compileAll = async (folder: string, files: readonly string[], arch: string): Promise<string[]> => {
    const left = [...files];
    const faults: string[] = [];
    const codes = arch === "sm_90a" ? "arch=compute_90a,code=sm_90a" : "arch=compute_80,code=sm_80";
    const worker = async (): Promise<void> => {
      for (let file = left.pop(); file !== undefined; file = left.pop()) {
        const args = [
          "-std=c++17",
          "-O1",
          `-gencode=${codes}`,
          "-diag-suppress=177",
          "-I.",
          "-Idriver",
          "-c",
          file,
          "-o",
          `${file}.o`,
        ];
        const child = spawn(nvcc as string, args, { cwd: folder, stdio: ["ignore", "pipe", "pipe"] });
        const said: string[] = [];
        for (const stream of [child.stdout, child.stderr]) stream.on("data", (data: Buffer) => said.push(data.toString()));
        const code = await new Promise((done) => child.on("close", done));
        if (code !== 0 || said.length > 0) faults.push(`${file}: ${said.join("").slice(0, 2000)}`);
      }
    };
    await Promise.all([worker(), worker()]);
    return faults;
  };

  for (const arch of ["sm_90a", "sm_80"])
    test(`the sample for ${arch}`, { timeout: 600_000 }, async () => {
      const bundle = join(root, `${arch}.s3`);
      const target = `cuda:${arch}`;
      await compile(
        sample,
        { ...defaultOptions, attention: target, ffn: target, precision: "fp8", kv: "fp8", weights: false, out: bundle },
        silent,
      );
      for (const role of ["attention", "ffn"]) {
        const folder = join(bundle, "programs", role);
        const list = spawnSync("find", [".", "-name", "*.cu"], { cwd: folder, encoding: "utf8" }).stdout.trim().split("\n");
        expect(list.length).toBeGreaterThan(3);
        expect(await compileAll(folder, list, arch)).toEqual([]);
      }
    });

  for (const precision of ["bf16", "fp8"] as const)
    test(`all of an MLP in one launch, ${precision}`, { timeout: 600_000 }, async () => {
      const bundle = join(root, `mlps-${precision}.s3`);
      const options = { ...defaultOptions, attention: "cuda", ffn: "cuda", precision, kv: precision, weights: false };
      await compile(mlps(), { ...options, ranks: twoSides, out: bundle }, silent);
      const folder = join(bundle, "programs", "ffn");
      const files = readdirSync(folder).filter((name) => name.endsWith(".cu"));
      const chains = files.filter((name) => /hopper::Stage<\w+, 2>/.test(readFileSync(join(folder, name), "utf8")));
      expect(chains).toHaveLength(1);
      expect(await compileAll(folder, chains, "sm_90a")).toEqual([]);
    });

  const large: readonly (readonly [arch: string, calls: readonly string[]])[] = [
    ["sm_90a", ["attend_hopper<bf16, bf16", "attend_hopper<bf16, e4m3"]],
    ["sm_80", ["ampere::Bf16, 128>(", "ampere::E4m3, 128>(", "ampere::Int8, 128>("]],
  ];
  for (const [arch, calls] of large)
    test(`samples that matrix units of ${arch} do`, { timeout: 600_000 }, async () => {
      const files = programs.get(`samples of ops for ${arch}`) as Map<string, string>;
      const folder = join(root, `units-${arch}`);
      for (const [path, text] of files) {
        mkdirSync(dirname(join(folder, path)), { recursive: true });
        writeFileSync(join(folder, path), text);
      }
      const list = calls.map((call) => [...files].find(([, text]) => text.includes(call))?.[0]);
      expect(list).not.toContain(undefined);
      expect(await compileAll(folder, list as string[], arch)).toEqual([]);
    });

  for (const arch of cuda.arches)
    test(`samples of ops on tensors of any rank for ${arch}`, { timeout: 600_000 }, async () => {
      let files: ReadonlyMap<string, string> = new Map();
      const only = ["transpose", "concat", "iota", "take", "put", "cumulate", "sort", "matmul", "reduce", "rope", "sdpa"];
      checkBackend(cuda, {
        arch,
        only,
        pack: (all) => {
          files = all;
        },
      });
      const folder = join(root, `tensors-${arch}`);
      for (const [path, text] of files) {
        mkdirSync(dirname(join(folder, path)), { recursive: true });
        writeFileSync(join(folder, path), text);
      }
      // products take the compiler longer: one sum of floats, one of doubles, and one attention
      const sums = ["float sums[4][4]", "double sums[4][4]", "  sdpa<"].map(
        (sum) => [...files].find(([, text]) => text.includes(sum))?.[0],
      );
      expect(sums).not.toContain(undefined);
      const rows = [...files.keys()].filter((path) => /^rows_\d+\.cu$/.test(path));
      expect(await compileAll(folder, [...rows, ...(sums as string[])], arch)).toEqual([]);
    });

  test("the driver is plain C++", () => {
    const files = programs.get("samples of ops for sm_80") as Map<string, string>;
    const folder = join(root, "driver");
    for (const [path, text] of files) {
      mkdirSync(dirname(join(folder, path)), { recursive: true });
      writeFileSync(join(folder, path), text);
    }
    const include = ["/usr/local/cuda/include", "/usr/include"].find((path) =>
      existsSync(join(path, "cuda_runtime.h")),
    ) as string;
    const flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", `-isystem${include}`, "-I.", "-Idriver"];
    const { status, stderr } = spawnSync(process.env.CXX ?? "c++", [...flags, "driver/cuda.cpp"], {
      cwd: folder,
      encoding: "utf8",
    });
    expect(stderr).toBe("");
    expect(status).toBe(0);
  });
});
