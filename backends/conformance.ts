/**
 * The conformance kit: every sample of every op, put to a backend. Which are matched, whether they render and assemble, and, given a runner
 * for the target's programs, whether the numbers are those of the interpreter. `step3c backend check` prints the report.
 */

import { evalDim } from "../ir/dim.ts";
import { type Case, sampleCase } from "../ir/draw.ts";
import { evaluate, kvState } from "../ir/evaluate.ts";
import type { Op, Value } from "../ir/graph.ts";
import { allKnowledge, knowledge } from "../ir/ops/index.ts";
import { decode, encode, powerOfTwo } from "../ir/round.ts";
import type { Tensor } from "../ir/tensor.ts";
import { type DType, dtypeBytes, isFloat, type KvType, type TensorType, typeText } from "../ir/type.ts";
import type { Backend, KernelPlan, KvLayout, RenderedKernel, Target } from "./backend.ts";

/** What runs a target's programs: native code beside the test, a simulator, a machine far away. */
export interface KernelRunner {
  /** builds what `assemble` gave */
  build(files: ReadonlyMap<string, string>): KernelProgram;
}

export interface KernelProgram {
  /** ways in which the program can run here (instruction sets); each is checked */
  readonly variants: readonly string[];
  /** runs launches one by one; gives the bytes of the arguments that each wrote */
  run(variant: string, launches: readonly KernelLaunch[]): readonly (readonly Uint8Array[])[];
}

export interface KernelLaunch {
  readonly kernel: string;
  /** token rows of the one segment */
  readonly rows: number;
  /** read: bytes given; written: a size in bytes; both: bytes given and wanted back */
  readonly args: readonly ({ readonly read: Uint8Array } | { readonly written: number } | { readonly both: Uint8Array })[];
}

export interface SampleResult {
  readonly op: string;
  readonly sample: string;
  /** matched: a kernel was rendered; declined: no template does it; broken: the backend threw */
  readonly status: "matched" | "declined" | "broken";
  readonly why?: string;
  readonly kernel?: string;
  /** per variant: the largest error in units of what is allowed (see `errorOf`); absent when nothing ran */
  readonly errors?: Readonly<Record<string, number>>;
}

export interface Report {
  readonly backend: string;
  readonly arch: string;
  readonly results: readonly SampleResult[];
  /** core ops (neither elementwise nor with an expansion) of which no sample is matched: a vendor's to-do list */
  readonly lacking: readonly string[];
  readonly ran: boolean;
  /** nothing broken, nothing wrong */
  readonly ok: boolean;
}

/** Ops that move values between ranks: the schedule does them, not kernels. */
const exchanges: readonly string[] = ["dispatch", "collect"];

interface Step {
  readonly op: Op;
  readonly plan: KernelPlan;
  readonly kernel: RenderedKernel;
}
interface Prepared {
  readonly op: string;
  readonly sample: string;
  readonly given: Case;
  readonly kv: KvLayout | undefined;
  readonly steps: readonly Step[];
}

/** Puts every sample to a backend. `only` restricts the ops. */
export const checkBackend = (
  backend: Backend,
  options: {
    readonly arch?: string;
    readonly runner?: KernelRunner;
    /** takes the program and the file of cases with which `step3-selftest` checks it elsewhere */
    readonly pack?: (program: ReadonlyMap<string, string>, cases: Uint8Array) => void;
    readonly only?: readonly string[];
    readonly seed?: number;
  } = {},
): Report => {
  const arch = options.arch ?? (backend.arches[0] as string);
  const results: SampleResult[] = [];
  const prepared: Prepared[] = [];
  const texts = new Map<string, RenderedKernel>();
  for (const known of allKnowledge) {
    if (exchanges.includes(known.name) || (options.only && !options.only.includes(known.name))) continue;
    for (const [i, sample] of known.samples.entries()) {
      const given = sampleCase(known.name, sample, (options.seed ?? 1) + i);
      const found = prepare(backend, arch, known.name, sample.name, given, texts);
      if ("status" in found) results.push(found);
      else prepared.push(found);
    }
  }
  const files = assembled(backend, arch, [...texts.values()]);
  options.pack?.(files, caseFile(prepared));
  const checked = options.runner === undefined ? prepared.map(matched) : runAll(prepared, options.runner.build(files));
  const all = [...results, ...checked];
  const lacking = allKnowledge
    .filter((k) => !k.scalar && !k.expand && k.name !== "fused" && !exchanges.includes(k.name))
    .map((k) => k.name)
    .filter((name) => !options.only || options.only.includes(name))
    .filter((name) => !all.some((r) => r.op === name && r.status === "matched"));
  const wrong = (r: SampleResult): boolean => Object.values(r.errors ?? {}).some((e) => !(e <= 1));
  return {
    backend: backend.name,
    arch,
    results: all,
    lacking,
    ran: options.runner !== undefined,
    ok: !all.some((r) => r.status === "broken" || wrong(r)),
  };
};

const prepare = (
  backend: Backend,
  arch: string,
  op: string,
  sample: string,
  given: Case,
  texts: Map<string, RenderedKernel>,
): Prepared | SampleResult => {
  const types = [...given.graph.states, ...given.graph.ops.flatMap((o) => [...o.inputs, ...o.outputs])].map((v) => v.type);
  const foreign = types.find((t) => !backend.dtypes.includes(t.dtype));
  if (foreign) return { op, sample, status: "declined", why: `the backend has no ${foreign.dtype}` };
  const steps: Step[] = [];
  try {
    const state = given.graph.states[0]?.type as KvType | undefined;
    const kv = state && backend.kv?.(state);
    if (state && !kv) return { op, sample, status: "declined", why: `no cache for ${typeText(state)}` };
    for (const o of given.graph.ops) {
      const why: string[] = [];
      const target: Target = {
        arch,
        symbols: given.graph.symbols,
        ...(kv ? { kv } : {}),
        decline: (reason) => void why.push(reason) as undefined,
      };
      const found = chooseKernel(backend, o, target, texts);
      if (found === undefined) {
        const shape = `${o.kind}(${o.inputs.map((v) => typeText(v.type)).join(", ")})`;
        return { op, sample, status: "declined", why: [shape, ...new Set(why)].join("; ") };
      }
      steps.push(found);
    }
    return { op, sample, given, kv, steps };
  } catch (error) {
    return { op, sample, status: "broken", why: (error as Error).message };
  }
};

const chooseKernel = (backend: Backend, op: Op, target: Target, texts: Map<string, RenderedKernel>): Step | undefined => {
  for (const template of backend.kernels) {
    const plan = template.match(op, target);
    if (!plan) continue;
    const text = template.render(plan.context, "KERNEL");
    const known = texts.get(text);
    if (known) return { op, plan, kernel: known };
    const name = `k${texts.size}_${op.kind}`;
    const kernel = { name, about: plan.about, text: template.render(plan.context, name), scratch: plan.scratch };
    texts.set(text, kernel);
    return { op, plan, kernel };
  }
  return undefined;
};

const assembled = (backend: Backend, arch: string, kernels: readonly RenderedKernel[]): ReadonlyMap<string, string> => {
  const files = backend.assemble({ role: "attention", arch, kernels });
  if (!files.has("CMakeLists.txt")) throw new Error(`backend ${backend.name}: assemble gives no CMakeLists.txt`);
  for (const path of files.keys())
    if (path.startsWith("/") || path.split("/").includes(".."))
      throw new Error(`backend ${backend.name}: assemble writes outside: ${path}`);
  return files;
};

const matched = (p: Prepared): SampleResult => ({
  op: p.op,
  sample: p.sample,
  status: "matched",
  kernel: (p.steps.find((s) => s.op.kind === p.op) as Step).kernel.name,
});

/** Bytes of a value in memory: row-major, or packed as the plan wants it. */
const bytesOf = (tensor: Tensor, step: Step, input: number): Uint8Array => {
  const bytes = encode(tensor.dtype, tensor.data);
  const layout = step.plan.layouts?.[input];
  if (!layout) return bytes;
  const columns = tensor.shape.at(-1) ?? 1;
  const rows = tensor.shape.at(-2) ?? 1;
  const matrix = rows * columns * dtypeBytes(tensor.dtype);
  const packed = layout.bytes(rows, columns, tensor.dtype);
  const matrices = matrix === 0 ? 0 : bytes.length / matrix;
  const out = new Uint8Array(packed * matrices);
  for (let i = 0; i < matrices; i++)
    out.set(layout.pack({ bytes: bytes.subarray(i * matrix, (i + 1) * matrix), dtype: tensor.dtype, rows, columns }), i * packed);
  return out;
};

/** Bytes of the file that runtime/selftest.cpp describes, front to back. */
class CaseFile {
  private readonly parts: Uint8Array[] = [];
  u8(x: number): void {
    this.parts.push(Uint8Array.of(x));
  }
  u32(x: number): void {
    this.parts.push(new Uint8Array(Uint32Array.of(x).buffer));
  }
  u64(x: number): void {
    this.parts.push(new Uint8Array(BigUint64Array.of(BigInt(x)).buffer));
  }
  text(s: string): void {
    const bytes = new TextEncoder().encode(s);
    this.u32(bytes.length);
    this.parts.push(bytes);
  }
  bytes(b: Uint8Array): void {
    this.parts.push(b);
  }
  doubles(x: Float64Array): void {
    this.parts.push(new Uint8Array(x.buffer, x.byteOffset, x.byteLength));
  }
  done(): Uint8Array {
    const all = new Uint8Array(this.parts.reduce((n, p) => n + p.length, 0));
    let at = 0;
    for (const p of this.parts) {
      all.set(p, at);
      at += p.length;
    }
    return all;
  }
}

/** Cases for `step3-selftest`, which runs them where the target is. */
const caseFile = (prepared: readonly Prepared[]): Uint8Array => {
  const file = new CaseFile();
  file.bytes(new TextEncoder().encode("S3KT0001"));
  file.u32(prepared.length);
  for (const p of prepared) {
    file.text(`${p.op} '${p.sample}' (${(p.steps.find((s) => s.op.kind === p.op) as Step).kernel.name})`);
    const memory = new Memory(p);
    // a buffer for each value that is not packed, and one for each way in which a weight is
    const buffers: { readonly kind: 0 | 1 | 2; readonly bytes: number; readonly given?: Uint8Array }[] = [];
    const places = new Map<string, number>();
    const launches = p.steps.map((step) => {
      const { args, kernel, rows } = memory.launch(step);
      const kv = (v: Value): boolean => v.type.kind === "kv";
      const changes = step.op.outputs.some(kv);
      const inputs = step.op.inputs.map((v, i) => ({ v, i })).filter(({ v }) => !changes || !kv(v));
      const values = [
        ...inputs.map(({ v, i }) => ({ v, key: step.plan.layouts?.[i] ? `${v.name} ${step.plan.layouts[i].name}` : v.name })),
        ...step.op.inputs.filter((v) => changes && kv(v)).map((v) => ({ v, key: v.name })),
        ...step.op.outputs.filter((v) => !kv(v)).map((v) => ({ v, key: v.name })),
      ];
      const places_ = values.map(({ v, key }, n) => {
        const state = kv(v) ? (p.given.graph.states[0] as Value).name : key;
        const known = places.get(state);
        if (known !== undefined) return known;
        const arg = args[n] as KernelLaunch["args"][number];
        places.set(state, buffers.length);
        if ("written" in arg) buffers.push({ kind: 1, bytes: arg.written });
        else {
          const given = "read" in arg ? arg.read : arg.both;
          buffers.push({ kind: "read" in arg && !kv(v) ? 0 : 2, bytes: given.length, given });
        }
        return buffers.length - 1;
      });
      memory.keep(
        step,
        args.flatMap((a) => ("both" in a ? [a.both] : "written" in a ? [new Uint8Array(a.written)] : [])),
      );
      return { kernel, rows, args: places_ };
    });
    file.u32(buffers.length);
    for (const b of buffers) {
      file.u8(b.kind);
      file.u64(b.bytes);
      if (b.given) file.bytes(b.given);
    }
    file.u32(launches.length);
    for (const l of launches) {
      file.text(l.kernel);
      file.u32(l.rows);
      file.u32(l.args.length);
      for (const a of l.args) file.u32(a);
    }
    const reference = referenceOf(p);
    file.u32(p.given.graph.outputs.length);
    for (const v of p.given.graph.outputs) {
      const expected = reference.get(v.name) as Tensor;
      file.u32(places.get(v.name) as number);
      file.text(expected.dtype);
      file.u64(expected.data.length);
      file.doubles(expected.data);
      file.doubles(Float64Array.from(expected.data, allowance(expected)));
    }
  }
  return file.done();
};

const referenceOf = (p: Prepared): ReadonlyMap<string, Tensor> => {
  const states = new Map(p.given.graph.states.map((s) => [s.name, kvState(p.kv?.pageTokens)]));
  return evaluate(p.given.graph, p.given.inputs, undefined, states, p.given.symbols);
};

const runAll = (prepared: readonly Prepared[], program: KernelProgram): SampleResult[] => {
  const references = prepared.map(referenceOf);
  const errors = prepared.map((): Record<string, number> => ({}));
  for (const variant of program.variants) {
    const memories = prepared.map((p) => new Memory(p));
    // the first ops of all cases together, then the second ones: few runs of the program
    for (let n = 0; n < Math.max(0, ...prepared.map((p) => p.steps.length)); n++) {
      const now = prepared.flatMap((p, i) => p.steps.slice(n, n + 1).map((step) => ({ step, memory: memories[i] as Memory })));
      const written = program.run(
        variant,
        now.map(({ step, memory }) => memory.launch(step)),
      );
      now.forEach(({ step, memory }, i) => {
        memory.keep(step, written[i] as readonly Uint8Array[]);
      });
    }
    prepared.forEach((p, i) => {
      const worst = p.given.graph.outputs.map((v) =>
        errorOf(references[i]?.get(v.name) as Tensor, (memories[i] as Memory).read(v)),
      );
      (errors[i] as Record<string, number>)[variant] = Math.max(...worst);
    });
  }
  return prepared.map((p, i) => ({ ...matched(p), errors: errors[i] as Record<string, number> }));
};

/** The values of one case, as bytes. */
class Memory {
  private readonly given: Prepared;
  private readonly bytes: Map<string, Uint8Array> = new Map();

  constructor(given: Prepared) {
    this.given = given;
    const most = Math.max(
      0,
      ...[...given.given.inputs.values()].filter((t) => t.dtype === "i32" && t.shape.length === 2).flatMap((t) => [...t.data]),
    );
    for (const s of given.given.graph.states) this.bytes.set(s.name, new Uint8Array((most + 1) * (given.kv?.pageBytes ?? 0)));
  }

  private sizeOf(v: Value): number {
    const t = v.type as TensorType;
    return t.shape.reduce<number>((n, d) => n * evalDim(d, this.given.given.symbols), dtypeBytes(t.dtype));
  }

  /** Arguments in the order of a schedule's launches: read, changed, written. */
  launch(step: Step): KernelLaunch {
    const changes = step.op.outputs.some((v) => v.type.kind === "kv");
    const reads = step.op.inputs.flatMap((v, i) => {
      if (changes && v.type.kind === "kv") return [];
      const given = this.given.given.inputs.get(v.name);
      return [{ read: given ? bytesOf(given, step, i) : (this.bytes.get(v.name) as Uint8Array) }];
    });
    const both = step.op.inputs
      .filter((v) => changes && v.type.kind === "kv")
      .map((v) => ({ both: this.bytes.get(v.name) as Uint8Array }));
    const written = step.op.outputs.filter((v) => v.type.kind !== "kv").map((v) => ({ written: this.sizeOf(v) }));
    return { kernel: step.kernel.name, rows: this.given.given.symbols.get("T") ?? 1, args: [...reads, ...both, ...written] };
  }

  keep(step: Step, written: readonly Uint8Array[]): void {
    const outputs = [
      ...step.op.outputs.filter((v) => v.type.kind === "kv"),
      ...step.op.outputs.filter((v) => v.type.kind !== "kv"),
    ];
    outputs.forEach((v, i) => {
      this.bytes.set(v.name, written[i] as Uint8Array);
    });
  }

  read(v: Value): Float64Array {
    return decode(v.type.dtype, this.bytes.get(v.name) as Uint8Array);
  }
}

const stored: Readonly<Partial<Record<DType, { readonly bits: number; readonly least: number }>>> = {
  bf16: { bits: 8, least: -133 },
  f16: { bits: 11, least: -24 },
  e4m3: { bits: 4, least: -9 },
  e5m2: { bits: 3, least: -16 },
};

/** The distance of neighbours at |x| in a dtype of few bits. */
const spacing = (dtype: DType, x: number): number => {
  const format = stored[dtype];
  if (format === undefined || !Number.isFinite(x)) return 0;
  const exponent = x === 0 ? -1074 : Math.floor(Math.log2(Math.abs(x)));
  return powerOfTwo(Math.max(format.least, exponent - (format.bits - 1)));
};

/**
 * The largest error of a tensor in units of what is allowed: at most 1 is right. Allowed are, for floats, 2^-17 of the element and 2^-19 of
 * the largest (sums in f32, in any order, and functions good to a few ulp), and one step to a neighbour in a dtype of fewer bits; for codes
 * of 8-bit integers one step; nothing for other integers and for NaN and infinity.
 */
export const errorOf = (reference: Tensor, got: ArrayLike<number>): number => {
  const { data } = reference;
  if (got.length !== data.length) return Number.POSITIVE_INFINITY;
  const allowed = allowance(reference);
  let worst = 0;
  for (let i = 0; i < data.length; i++) {
    const [a, b] = [data[i] as number, got[i] as number];
    if (a === b || (Number.isNaN(a) && Number.isNaN(b))) continue;
    const error = Math.abs(a - b) / allowed(a);
    worst = Math.max(worst, Number.isNaN(error) ? Number.POSITIVE_INFINITY : error);
  }
  return worst;
};

/** What an element of a tensor may differ by, given what it should be. */
const allowance = ({ data, dtype }: Tensor): ((x: number) => number) => {
  if (!isFloat(dtype)) return () => (dtype === "i8" || dtype === "u8" ? 1 : 0);
  const largest = data.reduce((m, x) => (Number.isFinite(x) ? Math.max(m, Math.abs(x)) : m), 0);
  return (x) => Math.abs(x) * 2 ** -17 + largest * 2 ** -19 + spacing(dtype, x);
};

/** The report for people: one line an op, then everything that is wrong or lacking. */
export const reportText = (report: Report): string => {
  const taken = report.results.filter((r) => r.status === "matched").length;
  const verdict = report.ok ? (report.ran ? "all of them right" : "nothing broken") : "SOMETHING IS WRONG";
  const lines = [
    `backend ${report.backend}, architecture ${report.arch}: ${taken} of ${report.results.length} samples matched, ${verdict}`,
  ];
  const ops = [...new Set(report.results.map((r) => r.op))];
  const width = Math.max(...ops.map((o) => o.length));
  for (const op of ops) {
    const own = report.results.filter((r) => r.op === op);
    const of = (status: SampleResult["status"]): number => own.filter((r) => r.status === status).length;
    const errors = own.flatMap((r) => Object.values(r.errors ?? {}));
    const numbers = errors.length === 0 ? "" : `, largest error ${Math.max(...errors).toFixed(2)} of what is allowed`;
    const declined = of("declined") === 0 ? "" : `, ${of("declined")} declined`;
    const broken = of("broken") === 0 ? "" : `, ${of("broken")} BROKEN`;
    lines.push(`  ${op.padEnd(width)}  ${of("matched")} of ${own.length} samples matched${declined}${broken}${numbers}`);
  }
  for (const r of report.results) {
    if (r.status === "broken") lines.push(`broken: ${r.op} '${r.sample}': ${r.why}`);
    for (const [variant, error] of Object.entries(r.errors ?? {}))
      if (!(error <= 1))
        lines.push(`wrong: ${r.op} '${r.sample}' on ${variant} (${r.kernel}): ${error.toPrecision(3)} of what is allowed`);
  }
  for (const op of report.lacking) lines.push(`to do: ${op}: ${knowledge(op).summary}`);
  if (!report.ran) lines.push("numbers were not checked: no runner for this target");
  return `${lines.join("\n")}\n`;
};
