/**
 * Contractions of activations with weights: linear, scaled_linear and their grouped forms, alone or as the first op of a `fused` whose other
 * ops are elementwise. Here sizes, layouts and the epilogue are worked out, and which of the kernels does it: contract_hopper.cuh where the
 * matrix units have the types and the product is large enough to fill some of them, contract.cuh otherwise.
 */
import type { Dim } from "../../ir/dim.ts";
import type { Graph, Op, Value } from "../../ir/graph.ts";
import { knowledge } from "../../ir/ops/index.ts";
import { type DType, type TensorType, typeText } from "../../ir/type.ts";
import type { ContextValue, KernelPlan, KernelTemplate, Target } from "../backend.ts";
import { elementStatements, loadElement, rowsOf, storeElement, tokenSymbol } from "../c_family.ts";
import { dialect, storage } from "../scalar.ts";
import { loadTemplate } from "../template.ts";
import { linesOf, tileRows, tiles } from "./layout.ts";

/** Operands of each kind, in order. */
const operandNames: Readonly<Record<string, readonly string[]>> = {
  linear: ["x", "w"],
  scaled_linear: ["x", "xs", "w", "ws"],
  grouped_linear: ["x", "w", "ids"],
  scaled_grouped_linear: ["x", "xs", "w", "ws", "ids"],
};
const operandTypes: Readonly<Record<string, string>> = { xs: "float", ws: "float", ids: "int32_t" };

const shapeOf = (v: Value): readonly Dim[] => (v.type as TensorType).shape;
const dtypeOf = (v: Value): DType => v.type.dtype;

/** An op seen as a contraction and what follows it: a body whose inputs are the op's inputs. */
interface Work {
  readonly contraction: Op;
  readonly rest: readonly Op[];
  readonly inputs: readonly Value[];
  readonly outputs: readonly Value[];
}

const workOf = (op: Op): Work | undefined => {
  if (op.kind in operandNames) return { contraction: op, rest: [], inputs: op.inputs, outputs: op.outputs };
  const [first, ...rest] = op.body?.ops ?? [];
  if (op.kind !== "fused" || first === undefined || !(first.kind in operandNames)) return undefined;
  if (!rest.every((o) => knowledge(o.kind).scalar !== undefined || o.kind === "const")) return undefined;
  const body = op.body as Graph;
  return { contraction: first, rest, inputs: body.inputs, outputs: body.outputs };
};

/** Where the element of a value lies that belongs to element [row, column] of the result; undefined when it has none. */
const placeOf = (v: Value, rows: Dim, columns: number): "0" | "row" | "column" | "at" | undefined => {
  const shape = shapeOf(v);
  if (v.type.kind !== "tensor" || shape.length > 2) return undefined;
  const [row, column] = [shape.length === 2 ? shape[0] : 1, shape.at(-1) ?? 1];
  if ((row !== rows && row !== 1) || (column !== columns && column !== 1)) return undefined;
  if (row === 1) return column === 1 ? "0" : "column";
  return column === 1 && columns !== 1 ? "row" : "at";
};

/** Four neighbouring columns of one row: what is read first, statements for column i of them, what is written last. */
interface Epilogue {
  readonly fields: readonly ContextValue[];
  readonly reads: readonly ContextValue[];
  readonly lines: readonly string[];
  readonly writes: readonly ContextValue[];
}

const epilogueOf = (work: Work, rows: Dim, columns: number, target: Target): Epilogue | undefined => {
  const sum = work.contraction.outputs[0] as Value;
  const values = [...work.rest.flatMap((o) => [...o.inputs, ...o.outputs]), ...work.outputs];
  const misfit = values.find((v) => placeOf(v, rows, columns) === undefined);
  if (misfit) return target.decline(`${typeText(misfit.type)} does not lie along the contraction's result`);
  if (work.outputs.some((v) => placeOf(v, rows, columns) !== "at"))
    return target.decline("an epilogue has results of the shape of the contraction's");
  const read = new Set<number>();
  const { lines, spell } = elementStatements(dialect, work.rest, (v) => {
    if (v.name === sum.name) return "sum";
    const index = work.inputs.findIndex((input) => input.name === v.name);
    if (index < 0) throw new Error(`${v.name} is neither an input nor a result of the body`);
    read.add(index);
    const place = placeOf(v, rows, columns) as string;
    const apart = place === "0" || place === "row";
    return loadElement(dialect, dtypeOf(v), apart ? `in${index}` : `four${index}`, apart ? place : "i");
  });
  const inputs = [...read].sort((a, b) => a - b).map((index) => ({ index, value: work.inputs[index] as Value }));
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
    reads: inputs
      .map(({ index, value }) => ({ index, type: storage[dtypeOf(value)], place: placeOf(value, rows, columns) as string }))
      .filter(({ place }) => place === "at" || place === "column"),
    lines: [
      `const float sum = ${dtypeOf(sum) === "f32" ? "sums[i]" : `round_${dtypeOf(sum)}(sums[i])`};`,
      ...lines,
      ...work.outputs.map((v, i) => storeElement(dialect, dtypeOf(v), `result${i}`, "i", spell(v))),
    ],
    writes: work.outputs.map((v, index) => ({ index, type: storage[dtypeOf(v)] })),
  };
};

/** Types of operands that Hopper's products take, with the scales that go with them: rows and columns of w that share one. */
const hopperOperand = (dtype: DType, block: readonly [number, number] | undefined, inner: number): string | undefined => {
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
    const work = workOf(op);
    if (work === undefined || work.contraction.kind.includes("grouped") !== grouped) return undefined;
    const { contraction } = work;
    const names = operandNames[contraction.kind] as readonly string[];
    const operand = (name: string): Value => contraction.inputs[names.indexOf(name)] as Value;
    const indexOf = (name: string): number => work.inputs.findIndex((v) => v.name === operand(name).name);
    const [x, w, result] = [operand("x"), operand("w"), contraction.outputs[0] as Value];
    const scaled = names.includes("ws");

    if (["f64", "i32", "u32", "i64", "u64"].includes(dtypeOf(w)) || dtypeOf(result) === "f64")
      return target.decline(`${dtypeOf(x)} x ${dtypeOf(w)} contraction to ${dtypeOf(result)}: sums are f32`);
    const [columns, inner] = shapeOf(w).slice(-2) as unknown as readonly [number, number];
    const matrices = grouped ? (shapeOf(w)[0] as number) : 1;
    const rows = shapeOf(result)[0] as Dim;
    const counted = rowsOf(rows);
    if (counted === undefined) return target.decline(`${rows} rows are not a multiple of the tokens`);
    if (inner === 0 || columns === 0) return target.decline("a contraction without elements");
    const epilogue = epilogueOf(work, rows, columns, target);
    if (epilogue === undefined) return undefined;

    const block = scaled ? (contraction.attrs.block as readonly [number, number]) : undefined;
    const isWeight = (name: string): boolean => target.isWeight?.(op.inputs[indexOf(name)] as Value) ?? true;
    const packable = target.arch === "sm_90a" && isWeight("w") && (!scaled || isWeight("ws")) && matrices <= mostMatrices;
    const unit = packable && columns * inner >= leastProduct ? hopperOperand(dtypeOf(w), block, inner) : undefined;

    // on the FFN side nobody knows here how many segments a launch will have
    const most = target.symbols.find((s) => s.name === tokenSymbol)?.max ?? 1;
    const perSegment = counted.perToken ? most * counted.count : counted.count;
    const places = counted.perToken && op.place?.startsWith("ffn") ? mostSegments * perSegment : perSegment;
    const lines = linesOf(inner, dtypeOf(w));
    const { window, bytes } = scratchOf(places, matrices, lines, unit === "E4m3" ? lines : unit === "Int8" ? 1 : 0);

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
    const kinds = [...new Set(work.rest.map((o) => o.kind))].filter((k) => k !== "const");
    const about = `${contraction.kind} ${typeText(x.type)} x ${typeText(w.type)} -> ${work.outputs.map((v) => typeText(v.type)).join(", ")}${
      kinds.length > 0 ? `, then ${kinds.join(", ")}` : ""
    }`;
    return {
      context: {
        about,
        header: unit === undefined ? "contract.cuh" : "contract_hopper.cuh",
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
        choices: grouped ? (shapeOf(operand("ids"))[1] as number) : 1,
        first: (contraction.attrs.first as number | undefined) ?? 0,
        rowPerToken: grouped && shapeOf(x)[0] === shapeOf(operand("ids"))[0],
      },
      scratch: unit === undefined ? 0 : bytes,
      layouts: unit === undefined ? {} : { [indexOf("w")]: tiles },
      about,
      ...(unit === "E4m3" ? { inexact: codeSums } : {}),
    };
  };

/** Within a block of 128 columns; blocks are added up in f32. */
const codeSums = { ofLargest: 2 ** -11, why: "the 8-bit units of Hopper keep about 13 bits of a sum" };

const template = (name: string, grouped: boolean): KernelTemplate => {
  const text = loadTemplate(new URL(`./kernels/${name}.hbs`, import.meta.url));
  return { name, match: match(grouped), render: (context, symbol) => text({ ...context, name: symbol }) };
};

export const linearKernels: readonly KernelTemplate[] = [template("linear", false), template("grouped_linear", true)];
