/**
 * Contractions of activations with weights: linear, scaled_linear and their grouped forms, alone or in a `fused` with elementwise ops, which may
 * use what experts gave (`combine`) and whose result may be quantised in groups of columns. Here sizes, layouts and the epilogue are worked out,
 * and which of the kernels does it: contract_hopper.cuh or contract_ampere.cuh where the matrix units have the types and the product is large
 * enough to fill some of them, contract.cuh otherwise.
 */
import type { Dim } from "../../ir/dim.ts";
import type { Op, Value } from "../../ir/graph.ts";
import { type DType, dtypeBytes, type TensorType, typeText } from "../../ir/type.ts";
import type { ContextValue, KernelPlan, KernelTemplate, Target } from "../backend.ts";
import { elementStatements, loadElement, rowsOf, storeElement, tokenSymbol } from "../c_family.ts";
import {
  aboutContraction,
  type Contraction,
  contractionOf,
  dtypeOf,
  fitsResult,
  operandsOf,
  placeOf,
  quantisedColumns,
} from "../contraction.ts";
import { dialect, storage } from "../scalar.ts";
import { loadTemplate } from "../template.ts";
import { linesOf, tileRows, tiles } from "./layout.ts";

const operandTypes: Readonly<Record<string, string>> = { xs: "float", ws: "float", ids: "int32_t" };

/** Four neighbouring columns of one row: what is read first, statements for column i of them, what is written last. */
interface Epilogue {
  readonly fields: readonly ContextValue[];
  readonly combines: readonly ContextValue[];
  readonly reads: readonly ContextValue[];
  readonly lines: readonly string[];
  readonly writes: readonly ContextValue[];
  readonly quantises: boolean;
  /** of the outputs: codes and their scales */
  readonly codes: number;
  readonly scales: number;
}

const epilogueOf = (work: Contraction, rows: Dim, columns: number, target: Target): Epilogue | undefined => {
  const sum = work.contraction.outputs[0] as Value;
  const { quantised } = work;
  if (!fitsResult(work, rows, columns, target)) return undefined;
  const read = new Set<number>();
  const indexOf = (v: Value): number => {
    const index = work.inputs.findIndex((input) => input.name === v.name);
    if (index < 0) throw new Error(`${v.name} is neither an input nor a result of the body`);
    read.add(index);
    return index;
  };
  const combines = work.combines.map((o, number) => {
    const [y, ids, weights] = o.inputs.map(indexOf) as [number, number, number];
    const { first = 0, count } = o.attrs as { readonly first?: number; readonly count?: number };
    const choices = ((o.inputs[1] as Value).type as TensorType).shape[1] as number;
    return { number, y, ids, weights, choices, first, end: count === undefined ? "INT32_MAX" : String(first + count) };
  });
  const { lines, spell } = elementStatements(dialect, work.rest, (v) => {
    if (v.name === sum.name) return "sum";
    const combined = work.combines.findIndex((o) => o.outputs[0]?.name === v.name);
    if (combined >= 0) return `combined${combined}[i]`;
    const index = indexOf(v);
    const place = placeOf(v, rows, columns) as string;
    const apart = place === "0" || place === "row";
    return loadElement(dialect, dtypeOf(v), apart ? `in${index}` : `read.four${index}`, apart ? place : "i");
  });
  const whole = new Set(combines.flatMap(({ y, ids, weights }) => [y, ids, weights]));
  const inputs = [...read].sort((a, b) => a - b).map((index) => ({ index, value: work.inputs[index] as Value }));
  const outputIndex = (v: Value | undefined): number => work.outputs.findIndex((o) => o.name === v?.name);
  const written = work.outputs
    .map((v, index) => ({ v, index }))
    .filter(({ v }) => v.name !== quantised?.codes.name && v.name !== quantised?.scales.name);
  return {
    fields: [
      ...inputs.map(({ index, value }) => ({
        type: `const ${storage[dtypeOf(value)]}`,
        name: `in${index}`,
        index,
        note: typeText(value.type),
      })),
      ...work.outputs.map((v, i) => ({
        type: storage[dtypeOf(v)],
        name: `out${i}`,
        index: work.inputs.length + i,
        note: typeText(v.type),
      })),
    ],
    combines,
    reads: inputs
      .filter(({ index }) => !whole.has(index))
      .map(({ index, value }) => ({ index, type: storage[dtypeOf(value)], place: placeOf(value, rows, columns) as string }))
      .filter(({ place }) => place === "at" || place === "column"),
    lines: [
      `const float sum = ${dtypeOf(sum) === "f32" ? "sums[i]" : `round_${dtypeOf(sum)}(sums[i])`};`,
      ...lines,
      ...written.map(({ v, index }) => storeElement(dialect, dtypeOf(v), `result${index}`, "i", spell(v))),
      ...(quantised === undefined ? [] : [`wanted[i] = ${spell(quantised.from)};`]),
    ],
    writes: written.map(({ v, index }) => ({ index, type: storage[dtypeOf(v)] })),
    quantises: quantised !== undefined,
    codes: outputIndex(quantised?.codes),
    scales: outputIndex(quantised?.scales),
  };
};

/** Types of operands that products of the matrix units take, with the scales that go with them: rows and columns of w that share one. */
const unitOf = (dtype: DType, block: readonly [number, number] | undefined, inner: number): string | undefined => {
  if (dtype === "bf16" && block === undefined) return "Bf16";
  if (dtype === "e4m3" && block?.[0] === tileRows && block[1] === 128) return "E4m3";
  if (dtype === "i8" && block?.[0] === 1 && block[1] >= inner) return "Int8";
  return undefined;
};
/** Smaller products leave nearly all of a tile or of the processor idle. */
const leastProduct = 1 << 17;
/** Matrices that pack_rows.cuh counts rows of. */
const mostMatrices = 384;
/** Bytes of packed rows that a launch keeps; more rows go one part after the other. */
const mostPackedBytes = 96 << 20;
/** Bytes of the sums that blocks leave which share k on Ampere: most_sharing of 128 rows and columns. */
const sharedSums = 264 * 128 * 128 * 4;
/** Attention ranks whose rows one launch of the other side may have. */
const mostSegments = 32;

const roundUp = (n: number, to: number): number => Math.ceil(n / to) * to;

/** Rows that scratch has room for, and its bytes: the sizes of `Packed` in pack_rows.cuh. */
const scratchOf = (
  places: number,
  matrices: number,
  lines: number,
  scales: number,
): { readonly window: number; readonly bytes: number } => {
  const window = Math.min(places, Math.max(256, Math.floor(mostPackedBytes / (lines * 128))));
  const packed = roundUp(window + 8 * matrices + 256, 32);
  return { window, bytes: packed * (128 * lines + 4 * scales + 4) + roundUp(window, 32) * 4 + (matrices + 1) * 8 };
};

const match =
  (grouped: boolean) =>
  (op: Op, target: Target): KernelPlan | undefined => {
    const work = contractionOf(op);
    if (work === undefined || work.contraction.kind.includes("grouped") !== grouped) return undefined;
    const { contraction } = work;
    const { names, operand, indexOf, x, w, result, scaled, rows, columns, inner, matrices, choices, rowPerToken } =
      operandsOf(work);

    if (["f64", "i32", "u32", "i64", "u64"].includes(dtypeOf(w)) || dtypeOf(result) === "f64")
      return target.decline(`${dtypeOf(x)} x ${dtypeOf(w)} contraction to ${dtypeOf(result)}: sums are f32`);
    const counted = rowsOf(rows);
    if (counted === undefined) return target.decline(`${rows} rows are not a multiple of the tokens`);
    if (inner === 0 || columns === 0) return target.decline("a contraction without elements");
    const epilogue = epilogueOf(work, rows, columns, target);
    if (epilogue === undefined) return undefined;

    const block = scaled ? (contraction.attrs.block as readonly [number, number]) : undefined;
    const isWeight = (name: string): boolean => target.isWeight?.(op.inputs[indexOf(name)] as Value) ?? true;
    const packable = isWeight("w") && (!scaled || isWeight("ws")) && matrices <= mostMatrices;
    const unit = packable && columns * inner >= leastProduct ? unitOf(dtypeOf(w), block, inner) : undefined;
    const family = target.arch === "sm_90a" ? "hopper" : "ampere";
    const zeros = grouped && contraction.attrs.owned !== true;
    if (epilogue.quantises && (unit === undefined || unit === "Int8" || family !== "hopper"))
      return target.decline("contractions whose results are quantised are for Hopper's units and groups of columns");
    if (epilogue.quantises && zeros) return target.decline("quantised results of experts that are not there");

    // on the FFN side nobody knows here how many segments a launch will have
    const most = target.symbols.find((s) => s.name === tokenSymbol)?.max ?? 1;
    const perSegment = counted.perToken ? most * counted.count : counted.count;
    const places = counted.perToken && op.place?.startsWith("ffn") ? mostSegments * perSegment : perSegment;
    const lines = linesOf(inner, dtypeOf(w));
    const { window, bytes } = scratchOf(places, matrices, lines, unit === "E4m3" ? lines : unit === "Int8" ? 1 : 0);

    // rows that copies find stay where they are
    const stays = !grouped && (inner * dtypeBytes(dtypeOf(w))) % 16 === 0;

    const operands: ContextValue[] = names.map((name) => {
      const packed = unit !== undefined && name === "w";
      const type = packed ? "uint8_t" : (operandTypes[name] ?? storage[dtypeOf(operand(name))]);
      return {
        name,
        index: indexOf(name),
        type: `const ${type}`,
        note: `${typeText(operand(name).type)}${packed ? ` in ${tiles.name}` : ""}`,
      };
    });
    const about = aboutContraction(work, x, w);
    return {
      context: {
        about,
        header: unit === undefined ? "contract.cuh" : `contract_${family}.cuh`,
        family,
        unit: unit ?? "",
        columns,
        inner,
        group: block === undefined ? inner : Math.min(block[1], inner),
        block: block?.[0] ?? columns,
        whole: columns % 4 === 0,
        operands,
        ...epilogue,
        scaled,
        xs: scaled ? "xs" : "nullptr",
        ws: scaled ? "ws" : "nullptr",
        matrices,
        perToken: counted.perToken,
        count: counted.count,
        mostRows: places <= 64 ? 64 : 128,
        window,
        choices,
        first: (contraction.attrs.first as number | undefined) ?? 0,
        rowPerToken,
        zeros,
        quantisedColumns,
        groups: Math.ceil(columns / quantisedColumns),
      },
      scratch: unit === undefined ? 0 : (stays ? 0 : bytes) + (family === "ampere" && !grouped ? sharedSums : 0),
      layouts: unit === undefined ? {} : { [indexOf("w")]: tiles },
      about,
      ...(unit === "E4m3" && family === "hopper" ? { inexact: codeSums } : {}),
    };
  };

/** Within a block of 128 columns; blocks are added up in f32. */
const codeSums = { ofLargest: 2 ** -11, why: "the 8-bit units of Hopper keep about 13 bits of a sum" };

const template = (name: string, grouped: boolean): KernelTemplate => {
  const text = loadTemplate(new URL(`./kernels/${name}.hbs`, import.meta.url));
  return { name, match: match(grouped), render: (context, symbol) => text({ ...context, name: symbol }) };
};

export const linearKernels: readonly KernelTemplate[] = [template("linear", false), template("grouped_linear", true)];
