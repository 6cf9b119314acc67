/**
 * The contraction and attention kernels of the C++ backend against the interpreter, on every instruction set this machine has and on the
 * emulated matrix unit: ragged sizes, row counts around the blocks, several segments, outputs that start poisoned, and the promise that a
 * row's bits depend on nothing but that row.
 */
import { beforeAll, describe, expect, test } from "vitest";
import type { KernelPlan, KernelTemplate, Layout, Target } from "../backends/backend.ts";
import { assemble } from "../backends/cpp/assemble.ts";
import { attentionKernels, kv } from "../backends/cpp/attention.ts";
import { panels } from "../backends/cpp/layout.ts";
import { linearKernels } from "../backends/cpp/linear.ts";
import {
  type Attrs,
  Builder,
  type Dim,
  type DType,
  decode,
  drawTensor,
  dtypeBytes,
  encode,
  inferTypes,
  type KvState,
  type KvType,
  knowledge,
  kvState,
  type Op,
  randomNumbers,
  roundTo,
  type Tensor,
  type TensorType,
  type Type,
  tensor,
} from "../ir/index.ts";
import { buildProgram, type KernelArgument, type KernelRun, runKernels } from "./native.ts";

const isas = ["baseline", "avx2", "avx512", "amx"];
const symbols = [{ name: "T", min: 0, max: 200, multiple: 1, source: "host" as const }];
const templates: readonly KernelTemplate[] = [...linearKernels, ...attentionKernels];

// --- kernels ------------------------------------------------------------------------------------------------------------------

interface Kernel {
  readonly name: string;
  readonly op: Op;
  readonly plan: KernelPlan;
  readonly text: string;
}

const kernelOf = (name: string, op: Op, weights: boolean): Kernel => {
  const reasons: string[] = [];
  const target: Target = {
    arch: "any",
    symbols,
    isWeight: () => weights,
    decline: (why) => void reasons.push(why) as undefined,
  };
  for (const template of templates) {
    const plan = template.match(op, target);
    if (plan) return { name, op, plan, text: template.render(plan.context, name) };
  }
  throw new Error(`no kernel for ${op.kind}: ${reasons.join("; ")}`);
};

const opOf = (kind: string, inputs: readonly Type[], attrs: Attrs): Op => ({
  kind,
  inputs: inputs.map((type, i) => ({ name: `x${i}`, type })),
  attrs,
  outputs: inferTypes(kind, inputs, attrs).map((type, i) => ({ name: `y${i}`, type })),
});

/** One translation unit, so that kernels share what they instantiate. */
const build = (kernels: readonly Kernel[], options: readonly string[]): string => {
  const rendered = kernels.map(({ name, plan, text }) => ({ name, about: plan.about, text, scratch: plan.scratch }));
  const files = new Map(assemble({ role: "ffn", arch: "any", kernels: rendered }));
  const units = [...files.keys()].filter((f) => /^kernels_\d+\.cpp$/.test(f));
  files.set("kernels_0.cpp", units.map((u) => files.get(u)).join("\n"));
  for (const u of units.slice(1)) files.set(u, "// in kernels_0.cpp\n");
  return buildProgram(files, options);
};

const instructionSets = (library: string, run: Omit<KernelRun, "isa">): readonly string[] => {
  const usable = isas.filter((isa) => {
    try {
      runKernels(library, [{ ...run, isa }]);
      return true;
    } catch (error) {
      if (/this machine has no/.test((error as Error).message)) return false;
      throw error;
    }
  });
  expect(usable).toContain("baseline");
  return usable;
};

const bytesOf = (t: Tensor): Uint8Array => encode(t.dtype, t.data);
const packed = (layout: Layout, t: Tensor): Uint8Array => {
  const [rows, columns] = t.shape.slice(-2) as [number, number];
  const matrices = t.shape.length === 3 ? (t.shape[0] as number) : 1;
  const bytes = bytesOf(t);
  const size = rows * columns * dtypeBytes(t.dtype);
  const parts = Array.from({ length: matrices }, (_, i) =>
    layout.pack({ bytes: bytes.subarray(i * size, (i + 1) * size), dtype: t.dtype, rows, columns }),
  );
  return Buffer.concat(parts);
};

const known = new WeakMap<Tensor, Uint8Array>();
/** The bytes of a tensor as a kernel reads it, made once. */
const encoded = (t: Tensor, layout?: Layout): Uint8Array => {
  const found = known.get(t) ?? (layout ? packed(layout, t) : bytesOf(t));
  known.set(t, found);
  return found;
};

// --- contractions -------------------------------------------------------------------------------------------------------------

interface ContractionCase {
  readonly kernel: Kernel;
  readonly inputs: readonly Tensor[];
  /** rows of axis 0 per token, by input; undefined for weights */
  readonly perToken: readonly (number | undefined)[];
  /** of the result: rows per token, columns, dtype */
  readonly result: { readonly perToken: number; readonly columns: number; readonly dtype: DType };
  /** the result before rounding, and how far sums in f32 may be from it */
  readonly exact: Float64Array;
  readonly bound: Float64Array;
}

/** All rows there are; runs take some of them. */
const tokens = 101;
const runsOfRows: readonly (readonly number[])[] = [[1], [2], [3], [5], [17], [65], [0], [3, 0, 5], [2, 17]];

const concreteType = (t: Type, rows: number): TensorType & { shape: number[] } => {
  const type = t as TensorType;
  return {
    ...type,
    shape: type.shape.map((d) => (typeof d === "number" ? d : d === "T" ? rows : Number.parseInt(d, 10) * rows)),
  };
};
const perToken = (d: Dim | undefined): number | undefined =>
  typeof d !== "string" ? undefined : d === "T" ? 1 : Number.parseInt(d, 10);

const evaluateOp = (op: Op, inputs: readonly Tensor[], dtype: DType): Float64Array => {
  const type = { ...concreteType(op.outputs[0]?.type as Type, tokens), dtype };
  return (knowledge(op.kind).evaluate(inputs, op.attrs, [type], op.body)[0] as Tensor).data;
};

const draws = (op: Op): readonly Parameters<typeof drawTensor>[1][] => {
  const ids = { below: 6 };
  switch (op.kind) {
    case "scaled_linear":
      return ["normal", "positive", "normal", "positive"];
    case "scaled_grouped_linear":
      return ["normal", "positive", "normal", "positive", ids];
    case "grouped_linear":
      return ["normal", "normal", ids];
    default:
      return ["normal", "normal"];
  }
};

let seed = 1;
const contractionCase = (name: string, kind: string, types: readonly Type[], attrs: Attrs, weights = true): ContractionCase => {
  const op = opOf(kind, types, attrs);
  const random = randomNumbers(seed++);
  const inputs = types.map((t, i) => drawTensor(concreteType(t, tokens), draws(op)[i] ?? "normal", random));
  const magnitudes = inputs.map((t) => ({ ...t, data: t.data.map(Math.abs) }));
  const sums = evaluateOp(op, magnitudes, "f64");
  const k = (types[0] as TensorType).shape[1] as number;
  const [{ type: result }] = op.outputs as unknown as readonly [{ type: TensorType }];
  return {
    kernel: kernelOf(name, op, weights),
    inputs,
    perToken: types.map((t) => perToken((t as TensorType).shape[0])),
    result: { perToken: perToken(result.shape[0]) ?? 0, columns: result.shape[1] as number, dtype: result.dtype },
    exact: evaluateOp(op, inputs, "f64"),
    // one rounding for each addition and product, one for each scale
    bound: sums.map((s) => (k + 8) * 2 ** -24 * 1.01 * s),
  };
};

const rowBytes = (t: Tensor): number => t.shape.slice(1).reduce((a, b) => a * b, 1) * dtypeBytes(t.dtype);
const unwritten = 0xa5;

/** A run over the first rows of the case's inputs: segment i starts at token `offset` of the data, and at i * stride in memory. */
const contractionRun = (c: ContractionCase, rows: readonly number[], threads: number, isa: string, from = 0): KernelRun => {
  const stride = Math.max(1, ...rows) + 1;
  const args = c.inputs.map((t, i): KernelArgument => {
    const per = c.perToken[i];
    const layout = c.kernel.plan.layouts?.[i];
    const bytes = encoded(t, layout);
    if (per === undefined) return { read: bytes };
    const row = rowBytes(t) * per;
    // rows past a segment's are rubbish: nobody may use them
    const memory = new Uint8Array(rows.length * stride * row).fill(0xff);
    let token = from;
    rows.forEach((count, segment) => {
      memory.set(bytes.subarray(token * row, (token + count) * row), segment * stride * row);
      token += count;
    });
    return { read: memory };
  });
  const { perToken: per, columns, dtype } = c.result;
  args.push({ written: rows.length * stride * per * columns * dtypeBytes(dtype) });
  return { kernel: c.kernel.name, isa, threads, rows, stride, args };
};

/** Rows of a run's result, in the order of tokens; checks that nothing else was written. */
const writtenRows = (c: ContractionCase, rows: readonly number[], output: Uint8Array): Uint8Array => {
  const { perToken: per, columns, dtype } = c.result;
  const stride = Math.max(1, ...rows) + 1;
  const row = per * columns * dtypeBytes(dtype);
  const parts: Uint8Array[] = [];
  rows.forEach((count, segment) => {
    const start = segment * stride * row;
    parts.push(output.subarray(start, start + count * row));
    expect(output.subarray(start + count * row, start + stride * row).every((b) => b === unwritten)).toBe(true);
  });
  return Buffer.concat(parts);
};

const k128 = { to: "f32", block: [128, 128] };
const sizes: readonly (readonly [n: number, k: number])[] = [
  [1, 1],
  [15, 2],
  [17, 127],
  [33, 129],
  [96, 600],
  [130, 64],
];
const plain = sizes.flatMap(([n, k]) => [
  contractionCase(`f32_${n}_${k}`, "linear", [tensor("f32", ["T", k]), tensor("f32", [n, k])], {}),
  contractionCase(`bf16_${n}_${k}`, "linear", [tensor("bf16", ["T", k]), tensor("bf16", [n, k])], n % 2 ? { to: "f32" } : {}),
]);
const scaledTypes = (dtype: DType, n: number, k: number, [bn, bk]: readonly [number, number]): Type[] => [
  tensor(dtype, ["T", k]),
  tensor("f32", ["T", Math.ceil(k / bk)]),
  tensor(dtype, [n, k]),
  tensor("f32", [Math.ceil(n / bn), Math.ceil(k / bk)]),
];
const scaled = sizes.flatMap(([n, k]) => [
  contractionCase(`fp8_${n}_${k}`, "scaled_linear", scaledTypes("e4m3", n, k, [128, 128]), k128),
  contractionCase(`int8_${n}_${k}`, "scaled_linear", scaledTypes("i8", n, k, [1, k]), { to: "bf16", block: [1, k] }),
]);
const odd = [
  contractionCase("fp8_odd_blocks", "scaled_linear", scaledTypes("e4m3", 50, 75, [24, 31]), { to: "f32", block: [24, 31] }),
  contractionCase("int8_small_blocks", "scaled_linear", scaledTypes("i8", 20, 40, [3, 1]), { to: "f32", block: [3, 1] }),
  contractionCase("plain_f16", "linear", [tensor("f16", ["T", 40]), tensor("f16", [16, 40])], { to: "f32" }),
  contractionCase("plain_e5m2", "linear", [tensor("e5m2", ["T", 33]), tensor("e5m2", [5, 33])], { to: "f32" }),
  contractionCase("plain_e4m3", "linear", [tensor("e4m3", ["T", 33]), tensor("e4m3", [20, 33])], { to: "f32" }),
  contractionCase("pairs", "linear", [tensor("bf16", ["3*T", 64]), tensor("bf16", [24, 64])], {}),
  contractionCase("f32_computed", "linear", [tensor("f32", ["T", 31]), tensor("f32", [19, 31])], {}, false),
  contractionCase("bf16_computed", "linear", [tensor("bf16", ["T", 31]), tensor("bf16", [19, 31])], { to: "f32" }, false),
];
const groupedTypes = (dtype: DType, rows: Dim, e: number, n: number, k: number, j: number): Type[] => [
  tensor(dtype, [rows, k]),
  tensor(dtype, [e, n, k]),
  tensor("i32", ["T", j]),
];
const scaledGroupedTypes = (
  dtype: DType,
  rows: Dim,
  e: number,
  n: number,
  k: number,
  j: number,
  [bn, bk]: readonly [number, number],
): Type[] => [
  tensor(dtype, [rows, k]),
  tensor("f32", [rows, Math.ceil(k / bk)]),
  tensor(dtype, [e, n, k]),
  tensor("f32", [e, Math.ceil(n / bn), Math.ceil(k / bk)]),
  tensor("i32", ["T", j]),
];
const grouped = [
  contractionCase("group_tokens", "grouped_linear", groupedTypes("bf16", "T", 6, 40, 64, 3), { to: "f32" }),
  contractionCase("group_pairs", "grouped_linear", groupedTypes("bf16", "3*T", 6, 33, 131, 3), {}),
  contractionCase("group_some", "grouped_linear", groupedTypes("f32", "T", 3, 17, 20, 2), { first: 2 }),
  contractionCase("group_computed", "grouped_linear", groupedTypes("f16", "T", 6, 17, 20, 1), { to: "f32" }, false),
  contractionCase("group_fp8", "scaled_grouped_linear", scaledGroupedTypes("e4m3", "T", 6, 40, 160, 3, [32, 128]), {
    to: "f32",
    block: [32, 128],
  }),
  contractionCase("group_int8", "scaled_grouped_linear", scaledGroupedTypes("i8", "2*T", 3, 24, 131, 2, [1, 131]), {
    to: "f32",
    block: [1, 131],
    first: 1,
  }),
];

const contractions = [...plain, ...scaled, ...odd, ...grouped];

const fusedColumns = 40;
const fusedOp = (): Op => {
  const body = new Builder("body", symbols);
  const x = body.input("i0", tensor("bf16", ["T", 64]));
  const w = body.input("i1", tensor("bf16", [fusedColumns, 64]));
  const gate = body.input("i2", tensor("f32", ["T", fusedColumns]));
  const bias = body.input("i3", tensor("f32", [fusedColumns]));
  const weight = body.input("i4", tensor("f32", ["T", 1]));
  const sum = body.op("linear", [x, w], { to: "f32" });
  const biased = body.op("add", [sum, bias]);
  const half = body.op("const", [], { value: 0.5, dtype: "f32" });
  const product = body.op("mul", [body.op("mul", [body.op("silu", [gate]), biased]), weight]);
  body.output(body.op("cast", [body.op("mul", [product, half])], { to: "bf16" }));
  const graph = body.build();
  const inputs = graph.inputs.map((v, i) => ({ ...v, name: `x${i}` }));
  return { kind: "fused", inputs, attrs: {}, body: graph, outputs: [{ name: "y", type: graph.outputs[0]?.type as Type }] };
};

const epilogue = kernelOf("epilogue", fusedOp(), true);

describe("contractions", () => {
  let library: string;
  let usable: readonly string[];
  beforeAll(() => {
    library = build([...contractions.map((c) => c.kernel), epilogue], ["-DS3_AMX_EMULATED=ON"]);
    usable = instructionSets(library, contractionRun(contractions[0] as ContractionCase, [1], 1, ""));
  }, 600_000);

  test.each(contractions.map((c) => [c.kernel.name, c] as const))("%s: near the interpreter, each row its own bits", (_, c) => {
    for (const isa of usable) {
      const [whole] = runKernels(library, [contractionRun(c, [tokens], 1, isa)]);
      const reference = writtenRows(c, [tokens], whole?.outputs[0] as Uint8Array);
      const values = decode(c.result.dtype, reference);
      const wrong = [...values].findIndex((v, i) => {
        const [x, bound] = [c.exact[i] as number, c.bound[i] as number];
        return !(v >= roundTo(c.result.dtype, x - bound) && v <= roundTo(c.result.dtype, x + bound));
      });
      expect(wrong, `${isa}: element ${wrong} is ${values[wrong]}, should be ${c.exact[wrong]} +- ${c.bound[wrong]}`).toBe(-1);

      const variants = [
        { rows: [tokens], threads: 2, from: 0 },
        { rows: [tokens], threads: 3, from: 0 },
        ...runsOfRows.map((rows, i) => ({ rows, threads: 1 + (i % 3), from: rows[0] === 1 ? 77 : 0 })),
      ];
      const results = runKernels(
        library,
        variants.map(({ rows, threads, from }) => contractionRun(c, rows, threads, isa, from)),
      );
      const row = c.result.perToken * c.result.columns * dtypeBytes(c.result.dtype);
      variants.forEach(({ rows, threads, from }, i) => {
        const got = writtenRows(c, rows, results[i]?.outputs[0] as Uint8Array);
        const same = Buffer.from(got).equals(reference.subarray(from * row, from * row + got.length));
        expect(same, `${isa}: rows ${rows} with ${threads} threads`).toBe(true);
      });
    }
  });

  test("every e4m3 code, as weight and as activation, and NaN stays in its column and row", () => {
    const c = contractions.find((o) => o.kernel.name === "plain_e4m3") as ContractionCase;
    const [x, w] = c.inputs as [Tensor, Tensor];
    const codes = decode(
      "e4m3",
      Uint8Array.from({ length: 256 }, (_, i) => i),
    );
    for (const isa of usable) {
      const identity = { ...c, inputs: [{ ...x, data: x.data.map((_, i) => (i % 33 === Math.floor(i / 33) % 33 ? 1 : 0)) }, w] };
      // column n of w holds codes 13 n .. 13 n + 32: row r of an identity times it gives code 13 n + r
      const weights = w.data.map((_, i) => codes[(13 * Math.floor(i / 33) + (i % 33)) % 256] as number);
      const columns = [...Array(20).keys()].filter((n) => !weights.slice(n * 33, n * 33 + 33).some(Number.isNaN));
      const run = contractionRun({ ...identity, inputs: [identity.inputs[0] as Tensor, { ...w, data: weights }] }, [33], 1, isa);
      const got = decode("f32", writtenRows(c, [33], runKernels(library, [run])[0]?.outputs[0] as Uint8Array));
      for (let r = 0; r < 33; r++)
        for (let n = 0; n < 20; n++)
          if (columns.includes(n))
            expect(got[r * 20 + n], `${isa} row ${r} column ${n}`).toBe(weights[n * 33 + r] === 0 ? 0 : weights[n * 33 + r]);
          else expect(got[r * 20 + n]).toBeNaN();
      expect(columns.length).toBeLessThan(20);
      // and row r of these activations times an identity gives code 2 r + n
      const activations = x.data.map((_, i) => codes[(2 * Math.floor(i / 33) + (i % 33)) % 256] as number);
      const unit = w.data.map((_, i) => (i % 33 === Math.floor(i / 33) ? 1 : 0));
      const back = contractionRun(
        {
          ...c,
          inputs: [
            { ...x, data: activations },
            { ...w, data: unit },
          ],
        },
        [tokens],
        1,
        isa,
      );
      const rows = decode("f32", writtenRows(c, [tokens], runKernels(library, [back])[0]?.outputs[0] as Uint8Array));
      for (let r = 0; r < tokens; r++) {
        const nan = activations.slice(r * 33, r * 33 + 33).some(Number.isNaN);
        for (let n = 0; n < 20; n++)
          if (nan) expect(rows[r * 20 + n]).toBeNaN();
          else expect(rows[r * 20 + n]).toBe(activations[r * 33 + n] === 0 ? 0 : activations[r * 33 + n]);
      }
    }
  });

  test("and what follows one is one kernel that rounds where the graph does", () => {
    const { op, plan } = epilogue;
    const random = randomNumbers(99);
    const inputs = op.inputs.map((v) => drawTensor(concreteType(v.type, tokens), "normal", random));
    const exact = evaluateOp(op, inputs, "bf16");
    const args = inputs.map((t, i): KernelArgument => {
      const layout = plan.layouts?.[i];
      return { read: layout ? packed(layout, t) : bytesOf(t) };
    });
    args.push({ written: tokens * fusedColumns * 2 });
    for (const isa of usable) {
      const [one, two] = runKernels(
        library,
        [1, 2].map((threads) => ({ kernel: "epilogue", isa, threads, rows: [tokens], args })),
      );
      expect(two?.outputs).toEqual(one?.outputs);
      const got = decode("bf16", one?.outputs[0] as Uint8Array);
      got.forEach((v, i) => {
        const x = exact[i] as number;
        expect(Math.abs(v - x), `${isa} element ${i}: ${v} for ${x}`).toBeLessThanOrEqual(2 ** -8 * Math.abs(x) + 1e-5);
      });
    }
  });
});

// --- attention ----------------------------------------------------------------------------------------------------------------

interface AttentionCase {
  readonly name: string;
  readonly cache: KvType;
  readonly heads: number;
  readonly query: DType;
}

const attentionCases: readonly AttentionCase[] = [
  { name: "one_kv_head", cache: { kind: "kv", dtype: "bf16", heads: 1, dim: 80 }, heads: 29, query: "bf16" },
  { name: "grouped", cache: { kind: "kv", dtype: "bf16", heads: 2, dim: 22 }, heads: 6, query: "bf16" },
  { name: "as_many", cache: { kind: "kv", dtype: "f32", heads: 3, dim: 17 }, heads: 3, query: "f32" },
  { name: "fp8", cache: { kind: "kv", dtype: "e4m3", heads: 1, dim: 64 }, heads: 13, query: "f32" },
  { name: "int8", cache: { kind: "kv", dtype: "i8", heads: 2, dim: 35 }, heads: 4, query: "f16" },
];

/** Rows of a launch: a token of a sequence. */
interface Token {
  readonly sequence: number;
  readonly position: number;
}
const lengths = [70, 33, 1, 32];
const tableColumns = 5;
const poolPages = 12;
/** pages of each sequence; the third shares none, unused entries are page 0 */
const tables = [
  [3, 1, 7, 9, 0],
  [2, 11, 0, 0, 0],
  [5, 0, 0, 0, 0],
  [8, 0, 0, 0, 0],
];
const everyToken: readonly Token[] = lengths.flatMap((n, sequence) =>
  Array.from({ length: n }, (_, position) => ({ sequence, position })),
);

const attentionKernelsOf = (c: AttentionCase): readonly [Kernel, Kernel] => {
  const width = c.cache.heads * c.cache.dim;
  const table = [tensor("i32", ["T", tableColumns]), tensor("i32", ["T"])];
  const rows = tensor(c.cache.dtype, ["T", width]);
  const scales = tensor("f32", ["T", c.cache.heads]);
  const coded = c.cache.dtype === "e4m3" || c.cache.dtype === "i8";
  const append = opOf("kv_append", [c.cache, ...(coded ? [rows, scales, rows, scales] : [rows, rows]), ...table], {});
  const attention = opOf("attention", [tensor(c.query, ["T", c.heads * c.cache.dim]), c.cache, ...table], {
    heads: c.heads,
    scale: 1 / Math.sqrt(c.cache.dim),
  });
  return [kernelOf(`append_${c.name}`, append, true), kernelOf(`attention_${c.name}`, attention, true)];
};

describe("attention", () => {
  const kernels = attentionCases.map(attentionKernelsOf);
  let library: string;
  beforeAll(() => {
    // nothing here uses the matrix unit: amx is avx512
    library = build(kernels.flat(), ["-DS3_ISAS=baseline;avx2;avx512"]);
  }, 600_000);

  test.each(attentionCases.map((c, i) => [c.name, c, kernels[i] as readonly [Kernel, Kernel]] as const))(
    "%s: near the interpreter, each row its own bits, stale tokens without effect",
    (_, c, [append, attention]) => {
      const random = randomNumbers(7);
      const draw = (op: Op, i: number): Tensor =>
        drawTensor(concreteType(op.inputs[i]?.type as Type, everyToken.length), "normal", random);
      const integers = (shape: number[], data: number[]): Tensor => ({
        kind: "tensor",
        dtype: "i32",
        shape,
        data: Float64Array.from(data),
      });
      const tableOf = (rows: readonly Token[]): Tensor =>
        integers(
          [rows.length, tableColumns],
          rows.flatMap((r) => tables[r.sequence] as number[]),
        );
      const positionOf = (rows: readonly Token[]): Tensor =>
        integers(
          [rows.length],
          rows.map((r) => r.position),
        );
      const indexOf = (r: Token): number => everyToken.findIndex((e) => e.sequence === r.sequence && e.position === r.position);
      const take = (t: Tensor, rows: readonly Token[]): Uint8Array => {
        const row = encoded(t).length / everyToken.length;
        return Buffer.concat(rows.map(indexOf).map((i) => encoded(t).subarray(i * row, (i + 1) * row)));
      };

      const cached = append.op.inputs.slice(1, -2).map((_, i) => {
        const t = draw(append.op, i + 1);
        return t.dtype === "f32" && t.shape[1] === c.cache.heads && c.cache.dtype !== "f32"
          ? { ...t, data: t.data.map((x) => roundTo("f32", 0.01 + Math.abs(x) / 8)) }
          : t;
      });
      const q = draw(attention.op, 0);
      const state: KvState = kvState(32);
      knowledge("kv_append").evaluate([state, ...cached, tableOf(everyToken), positionOf(everyToken)], {}, [c.cache]);
      const pageBytes = kv(c.cache).pageBytes;
      expect(kv(c.cache).pageTokens).toBe(32);
      const args = (tensors: readonly Tensor[], rows: readonly Token[]): KernelArgument[] =>
        [...tensors.map((t) => take(t, rows)), bytesOf(tableOf(rows)), bytesOf(positionOf(rows))].map((read) => ({ read }));

      const first = [...args(cached, everyToken), { both: new Uint8Array(poolPages * pageBytes).fill(0xff) }];
      for (const isa of instructionSets(library, { kernel: append.name, rows: [everyToken.length], args: first })) {
        // a pool of rubbish (every code of 0xff is NaN, or -1): written all at once by two threads, or bit by bit
        const [atOnce] = runKernels(library, [{ kernel: append.name, isa, threads: 2, rows: [everyToken.length], args: first }]);
        const pool = atOnce?.outputs[0] as Uint8Array;
        let steps = new Uint8Array(poolPages * pageBytes).fill(0xff);
        for (const part of [everyToken.slice(0, 5), everyToken.slice(5, 71), everyToken.slice(71)]) {
          const [step] = runKernels(library, [
            { kernel: append.name, isa, rows: [part.length], args: [...args(cached, part), { both: steps }] },
          ]);
          steps = step?.outputs[0] as Uint8Array<ArrayBuffer>;
        }
        expect(Buffer.from(steps).equals(Buffer.from(pool)), `${isa}: the cache`).toBe(true);

        const width = c.heads * c.cache.dim;
        const run = (rows: readonly Token[], threads: number): KernelRun => {
          const [query, table, position] = args([q], rows);
          return {
            kernel: attention.name,
            isa,
            threads,
            rows: [rows.length],
            args: [
              query,
              { read: pool },
              table,
              position,
              { written: rows.length * width * dtypeBytes(c.query) },
            ] as KernelArgument[],
          };
        };
        const last = lengths.map((n, sequence) => ({ sequence, position: n - 1 }));
        const shuffled = [...everyToken].sort(
          (a, b) => ((a.position * 37 + a.sequence) % 101) - ((b.position * 37 + b.sequence) % 101),
        );
        const launches = [everyToken, last, shuffled, [everyToken[69] as Token], everyToken.slice(40, 77), []];
        const runs = launches.flatMap((rows, i) => (i === 0 ? [1, 2, 3] : [1 + (i % 3)]).map((threads) => ({ rows, threads })));
        const results = runKernels(
          library,
          runs.map(({ rows, threads }) => run(rows, threads)),
        );
        const row = width * dtypeBytes(c.query);
        const reference = results[0]?.outputs[0] as Uint8Array;
        runs.forEach(({ rows, threads }, i) => {
          const expected = rows.map(indexOf).map((at) => reference.subarray(at * row, (at + 1) * row));
          expect(
            Buffer.concat(expected).equals(Buffer.from(results[i]?.outputs[0] as Uint8Array)),
            `${isa}: ${rows.length} rows, ${threads} threads`,
          ).toBe(true);
        });

        const type = concreteType(attention.op.outputs[0]?.type as Type, everyToken.length);
        const [exact] = knowledge("attention").evaluate(
          [q, state, tableOf(everyToken), positionOf(everyToken)],
          attention.op.attrs,
          [{ ...type, dtype: "f64" }],
        ) as [Tensor];
        const largest = exact.data.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
        const got = decode(c.query, reference);
        const wrong = [...got].findIndex((v, i) => {
          const x = exact.data[i] as number;
          const bound = 3e-6 * largest;
          return !(v >= roundTo(c.query, x - bound) && v <= roundTo(c.query, x + bound));
        });
        expect(wrong, `${isa}: element ${wrong} is ${got[wrong]}, should be ${exact.data[wrong]}`).toBe(-1);
      }
    },
  );
});

// --- layouts ------------------------------------------------------------------------------------------------------------------

describe("packed weights", () => {
  test.each([
    ["f32", 37, 131],
    ["bf16", 37, 131],
    ["bf16", 48, 64],
    ["e4m3", 37, 131],
    ["i8", 32, 128],
    ["i8", 20, 128],
    ["f16", 17, 9],
  ] as const)(
    "%s [%d, %d]: a tile of whole panels packs as its part of the matrix, wherever its bytes lie",
    (dtype, rows, columns) => {
      const layout = panels(dtype);
      const width = dtypeBytes(dtype);
      const whole = drawTensor({ kind: "tensor", dtype, shape: [rows, columns] }, "normal", randomNumbers(3));
      const bytes = encode(dtype, whole.data);
      const all = layout.pack({ bytes, dtype, rows, columns });
      expect(all.length).toBe(layout.bytes(rows, columns, dtype));
      const shifted = new Uint8Array(bytes.length + 1);
      shifted.set(bytes, 1);
      const parts: Uint8Array[] = [];
      for (let row = 0; row < rows; row += layout.rowBlock) {
        const count = Math.min(layout.rowBlock, rows - row);
        const tile = shifted.subarray(1 + row * columns * width, 1 + (row + count) * columns * width);
        parts.push(layout.pack({ bytes: tile, dtype, rows: count, columns }));
      }
      expect(Buffer.concat(parts).equals(Buffer.from(all))).toBe(true);
    },
  );
});
