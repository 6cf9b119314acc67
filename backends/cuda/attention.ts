/** Attention over a paged cache, the kernel that writes it, and the geometry of its pages, which nothing else reads. */
import type { Graph, Op, Value } from "../../ir/graph.ts";
import { type DType, dtypeBytes, type KvType, typeText } from "../../ir/type.ts";
import type { Inexact, KernelTemplate, KvLayout, Target } from "../backend.ts";
import { appendContext, hasTokenRows, pagesOf, stateOf, tensorOf } from "../cache.ts";
import { type Producers, producersOf, recognise } from "../recognise.ts";
import { dialect, storage } from "../scalar.ts";
import { loadTemplate } from "../template.ts";

const pageTokens = 64;
const cacheTypes: readonly DType[] = ["f32", "f16", "bf16", "e4m3", "i8"];
const roundUp = (n: number, multiple: number): number => Math.ceil(n / multiple) * multiple;

/** Pages of a cache: see attention.cuh for what lies in one. */
export const kv = (type: KvType): KvLayout => {
  if (!cacheTypes.includes(type.dtype)) throw new Error(`no cache of ${type.dtype}`);
  const bytes = dtypeBytes(type.dtype);
  const scales = bytes === 1 ? 2 * pageTokens * 4 : 0;
  return { pageTokens, pageBytes: type.heads * roundUp(2 * pageTokens * type.dim * bytes + scales, 128) };
};

/** What does a shape on an architecture: a function, its header, and its scratch. */
interface Choice {
  readonly function: string;
  readonly header: string;
  readonly scratch: number;
  readonly inexact?: Inexact;
}

/** Bytes that blocks leave for each other: two parts for each of 132 at most, f32 sums of 64 queries with maximum and total. */
const partialBytes = (dim: number): number => 2 * 132 * (64 * dim * 4 + 64 * 8);

/** Matrix units pay from 8 query heads of a KV head on; fewer leave most of their rows empty. */
const choose = (q: DType, type: KvType, group: number, scale: number, target: Target): Choice => {
  const matrix = q === "bf16" && group >= 8 && [64, 128, 256].includes(type.dim) && scale > 0;
  if (!matrix || !["bf16", "e4m3", "i8"].includes(type.dtype))
    return { function: "attend_plain", header: "attention.cuh", scratch: 0 };
  const scratch = partialBytes(type.dim);
  if (target.arch === "sm_90a" && type.dtype !== "i8")
    return {
      function: "attend_hopper",
      header: "attend_hopper.cuh",
      scratch,
      inexact: type.dtype === "e4m3" ? inCodes : inBf16,
    };
  return { function: "attend_warps", header: "attention.cuh", scratch, inexact: type.dtype === "bf16" ? inBf16 : inF16 };
};

const inBf16: Inexact = { ofLargest: 2 ** -8, why: "weights of the softmax are multiplied as bf16" };
const inF16: Inexact = { ofLargest: 2 ** -10, why: "weights of the softmax are multiplied as f16" };
const inCodes: Inexact = {
  ofLargest: 2 ** -7,
  why: "queries and weights of the softmax are sums of two codes, and the 8-bit units of Hopper keep about 13 bits of a sum",
};

const attentionTemplate = loadTemplate(new URL("./kernels/attention.hbs", import.meta.url));
const appendTemplate = loadTemplate(new URL("./kernels/kv_append.hbs", import.meta.url));

/** Attention with what makes its queries and what becomes of its results, as values of a body. */
interface Reader {
  readonly attention: Op;
  /** rotates the queries */
  readonly rotary: Op | undefined;
  /** codes and scales of the results, when these are quantised */
  readonly quantised: readonly [Value, Value] | undefined;
}

/** An op as a body of its own. */
const bodyOf = (op: Op): Graph => ({
  name: op.kind,
  symbols: [],
  inputs: op.inputs,
  states: [],
  weights: [],
  ops: [op],
  outputs: op.outputs,
});

/** Columns of a result that share a scale. */
const resultGroup = 128;

/** Marks the ops that make a value of another one. */
const account = (makers: Producers, v: Value, from: Value, seen: Set<Op>): void => {
  const op = makers.get(v.name);
  if (op === undefined || v.name === from.name) return;
  seen.add(op);
  for (const input of op.inputs) account(makers, input, from, seen);
};

/** What a body does, when it is all that a kernel can do around attention. */
const readerOf = (body: Graph, attention: Op): Reader | undefined => {
  const makers = producersOf(body);
  const seen = new Set([attention]);
  const [q, , , position] = attention.inputs as readonly [Value, Value, Value, Value];
  const rotary = makers.get(q.name);
  if (rotary !== undefined) {
    const same = rotary.attrs.heads === attention.attrs.heads && rotary.inputs[2]?.name === position.name;
    if (rotary.kind !== "rotary" || !same || rotary.inputs.some((v) => makers.has(v.name))) return undefined;
    seen.add(rotary);
  }
  const result = attention.outputs[0] as Value;
  const codes = body.outputs.find((v) => v.type.dtype === "e4m3");
  const scales = body.outputs.find((v) => v.type.dtype === "f32");
  let quantised: Reader["quantised"];
  if (codes !== undefined && scales !== undefined && body.outputs.length === 2) {
    const attrs = { to: "e4m3", group: resultGroup };
    if (recognise(makers, [codes, scales], "quantise", [tensorOf(result)], attrs)?.[0]?.name !== result.name) return undefined;
    quantised = [codes, scales];
    for (const v of quantised) account(makers, v, result, seen);
  } else if (body.outputs.length > 1 || body.outputs[0]?.name !== result.name) return undefined;
  return body.ops.every((op) => seen.has(op)) ? { attention, rotary, quantised } : undefined;
};

/** An argument of a kernel, under the name that it has there. */
type Argument = { readonly name: string; readonly type: string; readonly index: number };

/** The arguments of a reader's kernel, and expressions of them for its queries and results. */
const operandsOf = (body: Graph, reader: Reader, hopper: boolean) => {
  const { attention, rotary, quantised } = reader;
  const given = (name: string, v: Value | undefined): Argument => ({
    name,
    type: `const ${v?.type.kind === "kv" ? "uint8_t" : storage[tensorOf(v).dtype]}`,
    index: body.inputs.findIndex((i) => i.name === v?.name),
  });
  const made = (name: string, v: Value): Argument => ({
    name,
    type: storage[tensorOf(v).dtype] as string,
    index: body.inputs.length + body.outputs.findIndex((o) => o.name === v.name),
  });
  const [q, pool, pages, position] = attention.inputs;
  const [x, table] = rotary?.inputs ?? [];
  const rotated = `RotatedQueries{q, table, ${rotary ? tensorOf(table).shape[0] : 0}}`;
  return {
    arguments: [
      ...(rotary ? [given("q", x), given("table", table)] : [given("q", q)]),
      given("pool", pool),
      given("pages", pages),
      given("position", position),
      ...(quantised ? [made("codes", quantised[0]), made("scales", quantised[1])] : [made("out", attention.outputs[0] as Value)]),
    ],
    queries: rotary ? rotated : hopper ? "Queries{q}" : "q",
    results: quantised ? "QuantisedResults{codes, scales}" : hopper ? "Results{out}" : "out",
  };
};

const attention: KernelTemplate = {
  name: "attention",
  match(op, target) {
    const body = op.body ?? bodyOf(op);
    const attention = body.ops.find((o) => o.kind === "attention");
    const type = attention && stateOf(attention);
    if (attention === undefined || type === undefined) return undefined;
    const reader = readerOf(body, attention);
    if (reader === undefined) return target.decline("not queries and results that this kernel makes");
    const q = tensorOf(attention.inputs[0]);
    if (q.dtype === "f64") return target.decline("attention of f64: sums are f32");
    if (!cacheTypes.includes(type.dtype)) return target.decline(`no cache of ${type.dtype}`);
    if (!hasTokenRows(attention)) return target.decline("attention has a row for each token");
    const heads = attention.attrs.heads as number;
    const group = heads / type.heads;
    const scale = attention.attrs.scale as number;
    const { scratch, inexact, ...chosen } = choose(q.dtype, type, group, scale, target);
    const hopper = chosen.function === "attend_hopper";
    const joined = reader.rotary !== undefined || reader.quantised !== undefined;
    if (joined && !hopper) return target.decline("only attention on Hopper rotates queries and quantises results");
    if (reader.quantised && (group * type.dim) % resultGroup !== 0)
      return target.decline(`heads of one KV head are not whole groups of ${resultGroup} columns`);
    const steps = `${reader.rotary ? "rotary, " : ""}attention${reader.quantised ? ", quantise" : ""}`;
    const about = `${steps} of ${heads} heads ${typeText(q)} over ${typeText(type)}`;
    return {
      context: {
        ...chosen,
        ...operandsOf(body, reader, hopper),
        about,
        type: storage[q.dtype],
        element: storage[type.dtype],
        kvHeads: type.heads,
        group,
        dim: type.dim,
        pages: pagesOf(attention),
        scale: dialect.literal(scale, false),
      },
      scratch,
      about,
      ...(inexact ? { inexact } : {}),
    };
  },
  render: (context, name) => attentionTemplate({ ...context, name }),
};

const append: KernelTemplate = {
  name: "kv_append",
  match(op, target) {
    const type = stateOf(op);
    if (op.kind !== "kv_append" || type === undefined) return undefined;
    if (!cacheTypes.includes(type.dtype)) return target.decline(`no cache of ${type.dtype}`);
    if (!hasTokenRows(op)) return target.decline("kv_append has a row for each token");
    const context = appendContext(op, type);
    return {
      context: { ...context, header: "attention.cuh", element: storage[type.dtype] },
      scratch: 0,
      about: context.about,
    };
  },
  render: (context, name) => appendTemplate({ ...context, name }),
};

export const attentionKernels: readonly KernelTemplate[] = [attention, append];
