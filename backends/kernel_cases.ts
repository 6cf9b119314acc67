/**
 * Cases for kernels: an op, or an op and the one that fills or reads its cache, on drawn inputs, with what the interpreter makes of them and
 * what a target may differ by. The conformance kit runs them here; as a file they travel with a program and `step3-selftest` runs them there.
 */
import { evalDim, tokenSymbol } from "../ir/dim.ts";
import type { Case } from "../ir/draw.ts";
import { evaluate, kvState } from "../ir/evaluate.ts";
import type { Op, Value } from "../ir/graph.ts";
import { unownedRows } from "../ir/ops/grouped.ts";
import { knowledge } from "../ir/ops/index.ts";
import { decode, encode, powerOfTwo } from "../ir/round.ts";
import type { Tensor } from "../ir/tensor.ts";
import { type DType, dtypeBytes, isFloat, type TensorType } from "../ir/type.ts";
import type { Inexact, KvLayout, Layout } from "./backend.ts";
import { isWide, rowsOf } from "./c_family.ts";

export interface KernelLaunch {
  readonly kernel: string;
  /** token rows of the one segment */
  readonly rows: number;
  /** values of the graph's symbols, in their order */
  readonly dims: readonly number[];
  /** the one of them that is the rows; absent: none is */
  readonly rowsDim?: number;
  /** read: bytes given; written: a size in bytes; both: bytes given and wanted back */
  readonly args: readonly ({ readonly read: Uint8Array } | { readonly written: number } | { readonly both: Uint8Array })[];
}

/** One launch of a case. */
export interface CaseStep {
  readonly op: Op;
  /** name of the kernel that does it */
  readonly kernel: string;
  /** of inputs that are packed */
  readonly layouts: Readonly<Record<number, Layout>>;
  /** of its kernel's plan */
  readonly inexact: Inexact | undefined;
}

/** A graph of one or two ops, its inputs, and the kernels that do the ops. */
export interface KernelCase {
  readonly name: string;
  readonly given: Case;
  readonly kv: KvLayout | undefined;
  readonly steps: readonly CaseStep[];
}

/** Bytes of a value in memory: row-major, or packed as the plan wants it. */
const bytesOf = (tensor: Tensor, step: CaseStep, input: number): Uint8Array => {
  const bytes = encode(tensor.dtype, tensor.data);
  const layout = step.layouts[input];
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

/** The values of one case, as bytes. */
export class CaseMemory {
  private readonly given: KernelCase;
  private readonly bytes: Map<string, Uint8Array> = new Map();

  constructor(given: KernelCase) {
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
  launch(step: CaseStep): KernelLaunch {
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
    const { graph, symbols } = this.given.given;
    const rowsDim = graph.symbols.findIndex((s) => s.name === tokenSymbol);
    return {
      kernel: step.kernel,
      rows: symbols.get(tokenSymbol) ?? 1,
      dims: graph.symbols.map((s) => symbols.get(s.name) ?? s.max),
      ...(rowsDim < 0 ? {} : { rowsDim }),
      args: [...reads, ...both, ...written],
    };
  }

  keep(step: CaseStep, written: readonly Uint8Array[]): void {
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

/** By what part of the largest result a case's kernels may be off. */
export const inexactOf = (c: KernelCase): number => c.steps.reduce((sum, step) => sum + (step.inexact?.ofLargest ?? 0), 0);

/** Elements of a result of a case that may hold anything: rows of experts that are not there. */
export const isUnread = (c: KernelCase, v: Value): ((element: number) => boolean) => {
  const rows = new Set<number>();
  let pairs = 0;
  for (const op of c.given.graph.ops)
    for (const inner of op.body?.ops ?? [op]) {
      if (inner.attrs.owned !== true) continue;
      const given = (name: string): Tensor | undefined => {
        const at = op.body === undefined ? -1 : op.body.inputs.findIndex((i) => i.name === name);
        return c.given.inputs.get(at < 0 ? name : (op.inputs[at] as Value).name);
      };
      const [w, ids] = [inner.inputs.at(inner.kind.startsWith("scaled") ? 2 : 1), inner.inputs.at(-1)].map((o) =>
        given((o as Value).name),
      ) as [Tensor | undefined, Tensor | undefined];
      if (w === undefined || ids === undefined) throw new Error(`${inner.kind} with 'owned' in a case of several ops`);
      pairs = ids.data.length;
      for (const row of unownedRows(w, ids, inner.attrs)) rows.add(row);
    }
  const size = (v.type as TensorType).shape.map((d) => evalDim(d, c.given.symbols));
  const columns = size.slice(1).reduce((n, d) => n * d, 1);
  return (element) => size[0] === pairs && rows.has(Math.floor(element / columns));
};

/** What the interpreter makes of a case. */
export const referenceOf = (p: KernelCase): ReadonlyMap<string, Tensor> => {
  const states = new Map(p.given.graph.states.map((s) => [s.name, kvState(p.kv?.pageTokens)]));
  return evaluate(p.given.graph, p.given.inputs, undefined, states, p.given.symbols);
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
  /** as f64 for dtypes that f32 does not hold, else as f32 */
  numbers(x: Float64Array, dtype: DType): void {
    const kept = isWide(dtype) ? x : Float32Array.from(x);
    this.parts.push(new Uint8Array(kept.buffer, kept.byteOffset, kept.byteLength));
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

/** Where the values of a case lie: a buffer for each value that is not packed, and one for each way in which a weight is. */
class Buffers {
  readonly all: { readonly kind: "read" | "written" | "both"; readonly bytes: number; readonly given?: Uint8Array }[] = [];
  private readonly places: Map<string, number> = new Map();

  /** The buffer of a launch's argument, which is made when it is new. */
  place(key: string, arg: KernelLaunch["args"][number], isState: boolean): number {
    const known = this.places.get(key);
    if (known !== undefined) return known;
    this.places.set(key, this.all.length);
    if ("written" in arg) this.all.push({ kind: "written", bytes: arg.written });
    else {
      const given = "read" in arg ? arg.read : arg.both;
      this.all.push({ kind: "read" in arg && !isState ? "read" : "both", bytes: given.length, given });
    }
    return this.all.length - 1;
  }

  of(key: string): number {
    return this.places.get(key) as number;
  }
}

/** Every op's values in the order of its kernel's arguments, with the name of the buffer that each lies in. */
const argumentsOf = (
  { op, layouts }: CaseStep,
  state: string,
): readonly { readonly key: string; readonly isState: boolean }[] => {
  const isState = (v: Value): boolean => v.type.kind === "kv";
  const changes = op.outputs.some(isState);
  const key = (v: Value, layout?: Layout): string => (isState(v) ? state : layout ? `${v.name} ${layout.name}` : v.name);
  return [
    ...op.inputs.flatMap((v, i) => (changes && isState(v) ? [] : [{ key: key(v, layouts[i]), isState: isState(v) }])),
    ...op.inputs.flatMap((v) => (changes && isState(v) ? [{ key: state, isState: true }] : [])),
    ...op.outputs.flatMap((v) => (isState(v) ? [] : [{ key: key(v), isState: false }])),
  ];
};

/** Whether an op may be on the FFN side, where the rows of each attention rank are a segment of their own: its tokens are rows, and nothing else varies. */
const dividesRows = (op: Op): boolean =>
  knowledge(op.kind).rowwise !== "none" &&
  [...op.inputs, ...op.outputs].every(
    ({ type }) =>
      type.kind === "kv" || type.shape.every((d, axis) => (axis === 0 ? rowsOf(d) !== undefined : typeof d === "number")),
  );

/** S3_NO_SYMBOL of step3.h */
const noSymbol = 2 ** 32 - 1;

/** The file of cases that `step3-selftest` runs where the target is. Values are kept as floats: the same bytes on every machine. */
export const caseFile = (cases: readonly KernelCase[]): Uint8Array => {
  const file = new CaseFile();
  file.bytes(new TextEncoder().encode("S3KT0002"));
  file.u32(cases.length);
  for (const c of cases) {
    file.text(c.name);
    const memory = new CaseMemory(c);
    const buffers = new Buffers();
    const state = c.given.graph.states[0]?.name ?? "";
    const launches = c.steps.map((step) => {
      const { args, ...launch } = memory.launch(step);
      const places = argumentsOf(step, state).map(({ key, isState }, n) =>
        buffers.place(key, args[n] as KernelLaunch["args"][number], isState),
      );
      memory.keep(
        step,
        args.flatMap((a) => ("both" in a ? [a.both] : "written" in a ? [new Uint8Array(a.written)] : [])),
      );
      return { ...launch, divides: dividesRows(step.op), places };
    });
    file.u32(buffers.all.length);
    for (const b of buffers.all) {
      file.u8(["read", "written", "both"].indexOf(b.kind));
      file.u64(b.bytes);
      if (b.given) file.bytes(b.given);
    }
    file.u32(launches.length);
    for (const l of launches) {
      file.text(l.kernel);
      file.u32(l.rows);
      file.u8(l.divides ? 1 : 0);
      file.u32(l.dims.length);
      for (const value of l.dims) file.u64(value);
      file.u32(l.rowsDim ?? noSymbol);
      file.u32(l.places.length);
      for (const place of l.places) file.u32(place);
    }
    const reference = referenceOf(c);
    file.u32(c.given.graph.outputs.length);
    for (const v of c.given.graph.outputs) {
      const { data, ...type } = reference.get(v.name) as Tensor;
      const expected = { ...type, data: isWide(type.dtype) ? data : data.map(Math.fround) };
      file.u32(buffers.of(v.name));
      file.text(expected.dtype);
      file.u64(data.length);
      file.numbers(expected.data, expected.dtype);
      const [allowed, anything] = [allowance(expected, inexactOf(c)), isUnread(c, v)];
      file.numbers(
        Float64Array.from(expected.data, (x, i) => (anything(i) ? Number.POSITIVE_INFINITY : allowed(x))),
        expected.dtype,
      );
    }
  }
  return file.done();
};

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
 * the largest (sums in f32, in any order, and functions good to a few ulp), or `inexact` of the largest where that is more, and one step to a neighbour in a dtype of fewer bits; for codes
 * of 8-bit integers one step; nothing for other integers and for NaN and infinity. Elements that are `unread` do not count.
 */
export const errorOf = (
  reference: Tensor,
  got: ArrayLike<number>,
  inexact: number = 0,
  unread: (element: number) => boolean = () => false,
): number => {
  const { data } = reference;
  if (got.length !== data.length) return Number.POSITIVE_INFINITY;
  const allowed = allowance(reference, inexact);
  let worst = 0;
  for (let i = 0; i < data.length; i++) {
    const [a, b] = [data[i] as number, got[i] as number];
    if (a === b || (Number.isNaN(a) && Number.isNaN(b)) || unread(i)) continue;
    const error = Math.abs(a - b) / allowed(a);
    worst = Math.max(worst, Number.isNaN(error) ? Number.POSITIVE_INFINITY : error);
  }
  return worst;
};

/** What an element of a tensor may differ by, given what it should be. */
const allowance = ({ data, dtype }: Tensor, inexact: number): ((x: number) => number) => {
  if (!isFloat(dtype)) return () => (dtype === "i8" || dtype === "u8" ? 1 : 0);
  const largest = data.reduce((m, x) => (Number.isFinite(x) ? Math.max(m, Math.abs(x)) : m), 0);
  return (x) => Math.abs(x) * 2 ** -17 + largest * Math.max(2 ** -19, inexact) + spacing(dtype, x);
};
