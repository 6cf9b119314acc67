/**
 * The conformance kit: every sample of every op, put to a backend. Which are matched, whether they render and assemble, and, given a runner
 * for the target's programs, whether the numbers are those of the interpreter. `step3c backend check` prints the report.
 */

import { type Case, sampleCase } from "../ir/draw.ts";
import type { Op } from "../ir/graph.ts";
import { allKnowledge, knowledge } from "../ir/ops/index.ts";
import type { Tensor } from "../ir/tensor.ts";
import { type KvType, typeText } from "../ir/type.ts";
import type { Backend, RenderedKernel, Target } from "./backend.ts";
import {
  CaseMemory,
  type CaseStep,
  caseFile,
  errorOf,
  inexactOf,
  isUnread,
  type KernelCase,
  type KernelLaunch,
  referenceOf,
} from "./kernel_cases.ts";

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

/** A sample for which the backend has kernels. */
interface Prepared extends KernelCase {
  readonly op: string;
  readonly sample: string;
  /** of the op itself, not of what fills or reads its cache */
  readonly kernel: string;
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
  const steps: CaseStep[] = [];
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
    const kernel = (steps.find((s) => s.op.kind === op) as CaseStep).kernel;
    return { name: `${op} '${sample}' (${kernel})`, op, sample, kernel, given, kv, steps };
  } catch (error) {
    return { op, sample, status: "broken", why: (error as Error).message };
  }
};

const chooseKernel = (backend: Backend, op: Op, target: Target, texts: Map<string, RenderedKernel>): CaseStep | undefined => {
  for (const template of backend.kernels) {
    const plan = template.match(op, target);
    if (!plan) continue;
    const text = template.render(plan.context, "KERNEL");
    const known = texts.get(text);
    const layouts = plan.layouts ?? {};
    if (known) return { op, kernel: known.name, layouts, inexact: plan.inexact };
    const name = `k${texts.size}_${op.kind}`;
    const kernel = { name, about: plan.about, text: template.render(plan.context, name), scratch: plan.scratch };
    texts.set(text, kernel);
    return { op, kernel: name, layouts, inexact: plan.inexact };
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
  kernel: p.kernel,
});

const runAll = (prepared: readonly Prepared[], program: KernelProgram): SampleResult[] => {
  const references = prepared.map(referenceOf);
  const errors = prepared.map((): Record<string, number> => ({}));
  for (const variant of program.variants) {
    const memories = prepared.map((p) => new CaseMemory(p));
    // the first ops of all cases together, then the second ones: few runs of the program
    for (let n = 0; n < Math.max(0, ...prepared.map((p) => p.steps.length)); n++) {
      const now = prepared.flatMap((p, i) =>
        p.steps.slice(n, n + 1).map((step) => ({ step, memory: memories[i] as CaseMemory })),
      );
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
        errorOf(references[i]?.get(v.name) as Tensor, (memories[i] as CaseMemory).read(v), inexactOf(p), isUnread(p, v)),
      );
      (errors[i] as Record<string, number>)[variant] = Math.max(...worst);
    });
  }
  return prepared.map((p, i) => ({ ...matched(p), errors: errors[i] as Record<string, number> }));
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
