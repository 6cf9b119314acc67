/**
 * Contractions of activations with weights: linear, scaled_linear and their grouped forms, alone or in a `fused` whose other ops are elementwise:
 * one, which may use what experts gave (`combine`) and may have its result quantised in groups of columns, two of the same rows and sizes whose
 * results meet, with the same behind them, or several of the same rows whose results do not meet. Here sizes, layouts and the epilogue are worked out, and which of the kernels does it: contract_hopper.cuh or contract_ampere.cuh
 * where the matrix units have the types and the product is large enough to fill some of them, contract.cuh otherwise. Only the first takes several
 * contractions and quantises.
 */
import type { Dim } from "../../ir/dim.ts";
import type { Op, Value } from "../../ir/graph.ts";
import { type DType, dtypeBytes, type TensorType, typeText } from "../../ir/type.ts";
import type { ContextValue, Inexact, KernelContext, KernelPlan, KernelTemplate, Target } from "../backend.ts";
import { type Dialect, elementStatements, loadElement, rowsOf, storeElement, tokenSymbol } from "../c_family.ts";
import {
  aboutContraction,
  type Contraction,
  contractionsOf,
  dtypeOf,
  fitsResult,
  operandsOf,
  placeOf,
  quantisedColumns,
} from "../contraction.ts";
import { dialect, storage } from "../scalar.ts";
import { Sizes } from "../sizes.ts";
import { loadTemplate } from "../template.ts";
import { linesOf, tileRows, tiles } from "./layout.ts";

const operandTypes: Readonly<Record<string, string>> = { xs: "float", ws: "float", ids: "int32_t" };

/** Four neighbouring columns of one row: what is read first, statements for column i of them, what is written last; `inputs`: by index. */
interface Epilogue {
  readonly inputs: readonly number[];
  readonly combines: readonly ContextValue[];
  readonly reads: readonly ContextValue[];
  readonly lines: readonly string[];
  readonly writes: readonly ContextValue[];
  /** outputs that are the codes and scales of what is quantised */
  readonly codes: number;
  readonly scales: number;
}

/** Divisions do not wait for the few whose divisors are very large or small, and powers are by the instruction for them. */
const epilogueDialect: Dialect = {
  ...dialect,
  unary: { ...dialect.unary, exp: "exponential_near($0)" },
  binary: { ...dialect.binary, div: "divided($0, $1)" },
};

/** `number`: of the contraction in the op; `results`: of the whole op. */
const epilogueOf = (
  number: number,
  work: Contraction,
  results: readonly Value[],
  rows: Dim,
  columns: number,
  target: Target,
): Epilogue | undefined => {
  const sums = [work.contraction, ...(work.partner ? [work.partner] : [])].map((o) => o.outputs[0] as Value);
  const sumName = (n: number): string => (work.partner === undefined ? "sum" : `sum${n}`);
  const { quantised } = work;
  if (!fitsResult(work, rows, columns, target)) return undefined;
  const read = new Set<number>();
  const indexOf = (v: Value): number => {
    const index = work.inputs.findIndex((input) => input.name === v.name);
    if (index < 0) throw new Error(`${v.name} is neither an input nor a result of the body`);
    read.add(index);
    return index;
  };
  const combines = work.combines.map((o, i) => {
    const [y, ids, weights] = o.inputs.map(indexOf) as [number, number, number];
    const { first = 0, count } = o.attrs as { readonly first?: number; readonly count?: number };
    const choices = ((o.inputs[1] as Value).type as TensorType).shape[1] as number;
    const end = count === undefined ? "INT32_MAX" : String(first + count);
    return { number: i, y, ids, weights, choices, first, end, columns, whole: columns % 4 === 0 };
  });
  const { lines, spell } = elementStatements(epilogueDialect, work.rest, (v) => {
    const summed = sums.findIndex((sum) => sum.name === v.name);
    if (summed >= 0) return sumName(summed);
    const combined = work.combines.findIndex((o) => o.outputs[0]?.name === v.name);
    if (combined >= 0) return `combined${combined}[i]`;
    const index = indexOf(v);
    const place = placeOf(v, rows, columns) as string;
    const apart = place === "0" || place === "row";
    return loadElement(dialect, dtypeOf(v), apart ? `in${index}` : `read.four${number}_${index}`, apart ? place : "i");
  });
  const inputs = [...read].sort((a, b) => a - b);
  const combined = new Set(combines.flatMap(({ y, ids, weights }) => [y, ids, weights]));
  const indexOfResult = (v: Value | undefined): number => results.findIndex((o) => o.name === v?.name);
  const written = work.outputs
    .filter((v) => v.name !== quantised?.codes.name && v.name !== quantised?.scales.name)
    .map((v) => ({ v, index: indexOfResult(v) }));
  return {
    inputs,
    combines,
    reads: inputs
      .filter((index) => !combined.has(index))
      .map((index) => ({ index, value: work.inputs[index] as Value }))
      .map(({ index, value }) => ({ index, type: storage[dtypeOf(value)], place: placeOf(value, rows, columns) as string }))
      .filter(({ place }) => place === "at" || place === "column"),
    lines: [
      ...sums.map((sum, n) => {
        const own = work.partner === undefined ? "sums[i]" : `sums[${n}][i]`;
        return `const float ${sumName(n)} = ${dtypeOf(sum) === "f32" ? own : `round_${dtypeOf(sum)}(${own})`};`;
      }),
      ...lines,
      ...written.map(({ v, index }) => storeElement(dialect, dtypeOf(v), `result${index}`, "i", spell(v))),
      ...(quantised === undefined ? [] : [`wanted[i] = ${spell(quantised.from)};`]),
    ],
    writes: written.map(({ v, index }) => ({ index, type: storage[dtypeOf(v)] })),
    codes: indexOfResult(quantised?.codes),
    scales: indexOfResult(quantised?.scales),
  };
};

/** How a launcher spells the address of an input or a result, and whether the launch itself writes what it reads there. */
export interface Pointer {
  readonly value: string;
  readonly within: boolean;
}

/**
 * What contraction_results.hbs makes results of sums with; undefined when an epilogue does not fit. `kept`: of which parts the results are packed as
 * their rows are. `waits`: the part whose sums of rows with experts' results wait for these. All parts have the same inputs.
 */
export const finishOf = (
  parts: readonly Contraction[],
  results: readonly Value[],
  target: Target,
  pointerOf: (v: Value, type: string) => Pointer,
  kept: (part: Contraction) => boolean = () => false,
  waits?: Contraction,
): KernelContext | undefined => {
  const sizes = parts.map(operandsOf);
  const epilogues = parts.map((part, i) =>
    epilogueOf(i, part, results, sizes[i]?.rows as Dim, sizes[i]?.columns as number, target),
  );
  if (!epilogues.every((e): e is Epilogue => e !== undefined)) return undefined;
  const inputs = parts[0]?.inputs ?? [];
  // the same instructions for all: they take time to come
  const alike =
    new Set(epilogues.map((e) => e.lines.join("\n"))).size === 1 &&
    epilogues.every((e) => e.reads.length + e.writes.length === 0);
  const read = [...new Set(epilogues.flatMap((e) => e.inputs))].sort((a, b) => a - b);
  const field = (v: Value, name: string, prefix: string): ContextValue => {
    const type = prefix + storage[dtypeOf(v)];
    return { type, name, note: typeText(v.type), ...pointerOf(v, type) };
  };
  const weights = sizes.map(({ columns }, i) => ({
    number: i,
    columns,
    whole: columns % 4 === 0,
    groups: Math.ceil(columns / quantisedColumns),
    quantisedColumns,
    kept: kept(parts[i] as Contraction),
    waits: waits !== undefined && parts[i] === waits,
    alone: parts.length === 1,
    alike,
    ...(epilogues[i] as Epilogue),
  }));
  return {
    fields: [
      ...read.map((index) => field(inputs[index] as Value, `in${index}`, "const ")),
      ...results.map((v, i) => field(v, `out${i}`, "")),
    ],
    weights,
    valued: alike ? weights.slice(0, 1) : weights,
    combines: epilogues.flatMap((e) => e.combines),
    waits: weights.filter((w) => w.waits).map((w) => ({ ...(w.combines[0] as KernelContext), number: w.number }))[0] ?? false,
    turned:
      parts.every((part) => part.partner === undefined && part.quantised === undefined) &&
      epilogues.every((e, i) => e.reads.length === 0 && (e.combines.length === 0 || parts[i] === waits)),
    pairs: parts[0]?.partner !== undefined,
    quantises: parts[0]?.quantised !== undefined,
    keeps: parts.some(kept),
  };
};

/** Types of operands that products of the matrix units take, with the scales that go with them: rows and columns of w that share one. */
export const unitOf = (dtype: DType, block: readonly [number, number] | undefined, inner: number): string | undefined => {
  if (dtype === "bf16" && block === undefined) return "Bf16";
  if (dtype === "e4m3" && block?.[0] === tileRows && block[1] === 128) return "E4m3";
  if (dtype === "i8" && block?.[0] === 1 && block[1] >= inner) return "Int8";
  return undefined;
};
/** Smaller products leave nearly all of a tile or of the processor idle. */
export const leastProduct: number = 1 << 17;
/** Matrices that pack_rows.cuh counts rows of. */
const mostMatrices = 384;
/** Bytes of packed rows that a launch keeps; more rows go one part after the other. */
const mostPackedBytes = 96 << 20;
/** Weights of one launch: the arguments of a kernel have room for their maps. */
const mostWeights = 4;
/** Rows from which on results of dense contractions are quantised as they are made, or made of two contractions. */
export const leastQuantisedRows = 128;
/** Bytes of the sums that blocks leave which share k on Ampere: most_sharing of 128 rows and columns. */
const sharedSums = 264 * 128 * 128 * 4;
/** Bytes of the sums that blocks leave for others to go on with on Hopper: most_dealt of them, 256 rows and 128 columns each. */
export const dealtSums: number = 144 * 256 * 128 * 4;
/** Attention ranks whose rows one launch of the other side may have. */
export const mostSegments = 32;

/** of s3_head */
const headBytes = 64;

export const roundUp = (n: number, to: number): number => Math.ceil(n / to) * to;

/** Bytes of as many packed rows: the sizes of `Packed` in pack_rows.cuh. */
export const packedBytes = (window: number, matrices: number, lines: number, scales: number): number =>
  roundUp(window + 8 * matrices + 256, 32) * (128 * lines + 4 * scales + 4) + roundUp(window, 32) * 4 + (matrices + 1) * 8;

/** Rows that scratch has room for, and its bytes. */
const scratchOf = (
  places: number,
  matrices: number,
  lines: number,
  scales: number,
): { readonly window: number; readonly bytes: number } => {
  const window = Math.min(places, Math.max(256, Math.floor(mostPackedBytes / (lines * 128))));
  return { window, bytes: packedBytes(window, matrices, lines, scales) };
};

/** Contractions of a launch, partners too. */
export const multipliedOf = (parts: readonly Contraction[]): readonly Contraction[] =>
  parts.flatMap((work) => [work, ...(work.partner === undefined ? [] : [{ ...work, contraction: work.partner }])]);

/** Why contractions cannot share a launch; undefined when they can. */
const differenceOf = (parts: readonly Contraction[]): string | undefined => {
  const multiplied = multipliedOf(parts);
  const [first, ...others] = multiplied.map((work) => ({ op: work.contraction, operands: operandsOf(work) }));
  if (first === undefined || multiplied.length > mostWeights) return `${multiplied.length} contractions`;
  const about = (op: Op): string => JSON.stringify([op.kind, op.attrs.block ?? 0, op.attrs.first ?? 0, op.attrs.owned ?? false]);
  for (const { op, operands } of others) {
    if (about(op) !== about(first.op)) return "contractions of different kinds";
    const rows = operands.names.filter((name) => name !== "w" && name !== "ws");
    if (rows.some((name) => operands.operand(name).name !== first.operands.operand(name).name))
      return "contractions of different rows";
    if (dtypeOf(operands.w) !== dtypeOf(first.operands.w)) return "contractions with different types of weights";
  }
  return undefined;
};

const match =
  (grouped: boolean) =>
  (op: Op, target: Target): KernelPlan | undefined => {
    const parts = contractionsOf(op);
    const [work] = parts ?? [];
    if (parts === undefined || work === undefined) return undefined;
    if (parts.some(({ contraction }) => contraction.kind.includes("grouped") !== grouped)) return undefined;
    const plain = parts.every((part) => part.partner === undefined && part.combines.length === 0 && part.quantised === undefined);
    if (parts.length > 1 && !plain) return undefined;
    const difference = differenceOf(parts);
    if (difference !== undefined) return target.decline(difference);
    const { contraction } = work;
    const { names, operand, indexOf, x, w, scaled, rows, inner, matrices, choices, rowPerToken } = operandsOf(work);
    const all = multipliedOf(parts).map(operandsOf);
    const pairs = work.partner !== undefined;

    const strange = all.find(({ result }) => dtypeOf(result) === "f64")?.result;
    if (["f64", "i32", "u32", "i64", "u64"].includes(dtypeOf(w)) || strange)
      return target.decline(
        `${dtypeOf(x)} x ${dtypeOf(w)} contraction to ${dtypeOf(strange ?? all[0]?.result ?? w)}: sums are f32`,
      );
    const found = rowsOf(rows);
    // a kernel before the contraction counts such rows, into a header of their own
    const counts = found === undefined;
    if (counts && grouped) return target.decline(`${rows} rows are not a multiple of the tokens`);
    const counted = found ?? { perToken: true, count: 1 };
    const sizes = new Sizes(target);
    const rowsText = counts ? sizes.argument(rows) : "";
    if (inner === 0 || all.some(({ columns }) => columns === 0)) return target.decline("a contraction without elements");
    const results = parts.length === 1 ? work.outputs : (op.body?.outputs ?? []);
    const finish = finishOf(parts, results, target, (v, type) => {
      const result = results.indexOf(v);
      const index = result < 0 ? work.inputs.indexOf(v) : work.inputs.length + result;
      return { value: `argument<${type}>(c, ${index})`, within: false };
    });
    if (finish === undefined) return undefined;

    const block = scaled ? (contraction.attrs.block as readonly [number, number]) : undefined;
    const isWeight = (index: number): boolean => target.isWeight?.(op.inputs[index] as Value) ?? true;
    const packable =
      matrices <= mostMatrices && all.every((o) => isWeight(o.indexOf("w")) && (!scaled || isWeight(o.indexOf("ws"))));
    const elements = all.reduce((sum, { columns }) => sum + columns * inner, 0);
    const unit = packable && elements >= leastProduct ? unitOf(dtypeOf(w), block, inner) : undefined;
    const family = target.arch === "sm_90a" ? "hopper" : "ampere";
    if (all.length > 1 && (unit === undefined || family !== "hopper"))
      return target.decline("contractions are joined where Hopper's units do them");

    const zeros = grouped && contraction.attrs.owned !== true;
    const quantises = work.quantised !== undefined;
    if (quantises && (unit === undefined || unit === "Int8" || family !== "hopper"))
      return target.decline("contractions whose results are quantised are for Hopper's units and groups of columns");
    if (quantises && zeros) return target.decline("quantised results of experts that are not there");

    // on the FFN side nobody knows here how many segments a launch will have
    const most = counts ? sizes.largest(rows) : (target.symbols.find((s) => s.name === tokenSymbol)?.max ?? 1);
    if (most >= 2 ** 31) return target.decline(`as many as ${most} rows`);
    const perSegment = counted.perToken ? most * counted.count : counted.count;
    const places = !counts && counted.perToken && op.place?.startsWith("ffn") ? mostSegments * perSegment : perSegment;
    // who quantises has a group's columns, who has two sums has all of both: k is not divided, so there must be enough rows
    if ((quantises || pairs) && !grouped && perSegment < leastQuantisedRows)
      return target.decline(
        `${pairs ? "two contractions" : "quantised results"} of ${perSegment} rows, fewer than ${leastQuantisedRows}`,
      );
    const lines = linesOf(inner, dtypeOf(w));
    const { window, bytes } = scratchOf(places, matrices, lines, unit === "E4m3" ? lines : unit === "Int8" ? 1 : 0);

    const packed = unit !== undefined;
    const gathered = grouped || (inner * dtypeBytes(dtypeOf(w))) % 16 !== 0;
    const pointer = (name: string, v: Value, index: number, type: string = storage[dtypeOf(v)], note = ""): ContextValue => ({
      name,
      index,
      type: `const ${type}`,
      note: `${typeText(v.type)}${note}`,
    });
    const operands: ContextValue[] = [
      ...names
        .filter((name) => name !== "w" && name !== "ws")
        .map((name) => pointer(name, operand(name), indexOf(name), operandTypes[name])),
      ...all.flatMap((o, i) => [
        packed ? pointer(`w${i}`, o.w, o.indexOf("w"), "uint8_t", ` in ${tiles.name}`) : pointer(`w${i}`, o.w, o.indexOf("w")),
        ...(scaled ? [pointer(`ws${i}`, o.operand("ws"), o.indexOf("ws"), "float")] : []),
      ]),
    ];
    const about = parts.map((part, i) => aboutContraction(part, x, all[i]?.w ?? w)).join(" and ");
    const used = packed ? (gathered ? bytes : 0) + (family === "hopper" ? dealtSums : grouped ? 0 : sharedSums) : 0;
    const headAt = roundUp(used, 64);
    return {
      context: {
        about,
        counts,
        rows: rowsText,
        sizes: sizes.variables,
        headAt,
        mostCounted: most,
        header: packed ? `contract_${family}.cuh` : "contract.cuh",
        hopper: packed && family === "hopper",
        ampere: packed && family === "ampere",
        unit: unit ?? "",
        inner,
        group: block === undefined ? inner : Math.min(block[1], inner),
        block: block?.[0] ?? all[0]?.columns ?? 0,
        operands,
        ...finish,
        given: all.map(({ columns }, i) => ({ columns, w: `w${i}`, ws: scaled ? `ws${i}` : "nullptr" })),
        scaled,
        xs: scaled ? "xs" : "nullptr",
        matrices,
        perToken: counted.perToken,
        count: counted.count,
        mostRows: places <= 64 ? 64 : 128,
        window,
        choices,
        first: (contraction.attrs.first as number | undefined) ?? 0,
        rowPerToken,
        zeros,
      },
      scratch: counts ? headAt + headBytes : used,
      layouts: packed ? Object.fromEntries(all.map((o) => [o.indexOf("w"), tiles])) : {},
      about,
      ...(unit === "E4m3" && family === "hopper" ? { inexact: codeSums } : {}),
    };
  };

/** Within a block of 128 columns; blocks are added up in f32. */
export const codeSums: Inexact = { ofLargest: 2 ** -11, why: "the 8-bit units of Hopper keep about 13 bits of a sum" };

const template = (name: string, grouped: boolean): KernelTemplate => {
  const text = loadTemplate(new URL(`./kernels/${name}.hbs`, import.meta.url));
  return {
    name,
    match: match(grouped),
    render: (context, symbol) => text({ ...context, name: symbol, struct: `${symbol}_results` }),
  };
};

export const linearKernels: readonly KernelTemplate[] = [template("linear", false), template("grouped_linear", true)];
