/**
 * Contractions of activations with weights: linear, scaled_linear and their grouped forms. Alone or as part of a `fused`, of these forms:
 *
 *   one, then elementwise ops;
 *   several of the same rows, each with its own elementwise ops and results: the blocks of columns of one weight after those of the other;
 *   two of the same rows and sizes whose sums meet in elementwise ops (gate and up): a block has the same columns of both;
 *   either of the first and third with its result quantised in groups of columns, where a block has a whole group;
 *   a grouped one, then `combine` of its results: only pairs that have an expert are written and read.
 *
 * Here sizes, layouts and the epilogue are worked out, and which of the kernels does it: contract_hopper.cuh where the matrix units have the
 * types and the product is large enough to fill some of them, contract.cuh, which has the first form only, otherwise.
 */
import type { Dim } from "../../ir/dim.ts";
import type { Graph, Op, Value } from "../../ir/graph.ts";
import { knowledge } from "../../ir/ops/index.ts";
import { type DType, type TensorType, typeText } from "../../ir/type.ts";
import type { ContextValue, KernelPlan, KernelTemplate, Target } from "../backend.ts";
import { elementStatements, loadElement, rowsOf, storeElement, tokenSymbol } from "../c_family.ts";
import { producersOf, recognise } from "../recognise.ts";
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

/** A value of a body that is quantised in groups of columns, and what becomes of it. */
interface Quantised {
  readonly from: Value;
  readonly codes: Value;
  readonly scales: Value;
}

/** An op seen as contractions and what follows them: a body whose inputs are the op's inputs. */
interface Work {
  readonly contractions: readonly Op[];
  /** elementwise */
  readonly rest: readonly Op[];
  readonly quantised?: Quantised;
  readonly combine?: Op;
  readonly inputs: readonly Value[];
  readonly outputs: readonly Value[];
}

const operandOf = (contraction: Op, name: string): Value =>
  contraction.inputs[(operandNames[contraction.kind] as readonly string[]).indexOf(name)] as Value;

/** Columns that a block of a kernel has of a result, and so the groups in which it can quantise. */
const groupColumns = 128;

/** The quantisation that a body ends in, and the ops that make it. */
const quantisedOf = (body: Graph): { readonly quantised: Quantised; readonly ops: ReadonlySet<Op> } | undefined => {
  const makers = producersOf(body);
  const codes = body.outputs.find((v) => dtypeOf(v) === "e4m3");
  if (codes === undefined) return undefined;
  for (const scales of body.outputs.filter((v) => dtypeOf(v) === "f32"))
    for (const dtype of ["bf16", "f16", "f32"] as const) {
      const type: TensorType = { kind: "tensor", dtype, shape: shapeOf(codes) };
      const from = recognise(makers, [codes, scales], "quantise", [type], { to: "e4m3", group: groupColumns })?.[0];
      if (from === undefined) continue;
      const ops = new Set<Op>();
      const account = (v: Value): void => {
        const op = makers.get(v.name);
        if (op === undefined || v.name === from.name) return;
        ops.add(op);
        op.inputs.forEach(account);
      };
      account(codes);
      account(scales);
      return { quantised: { from, codes, scales }, ops };
    }
  return undefined;
};

const workOf = (op: Op, target: Target): Work | undefined => {
  if (op.kind in operandNames) return { contractions: [op], rest: [], inputs: op.inputs, outputs: op.outputs };
  const { body } = op;
  if (op.kind !== "fused" || body === undefined || !body.ops.some((o) => o.kind in operandNames)) return undefined;
  const contractions = body.ops.filter((o) => o.kind in operandNames);
  const combine = body.ops.find((o) => o.kind === "combine");
  const found = quantisedOf(body);
  const rest = body.ops.filter((o) => !contractions.includes(o) && o !== combine && (o.kind === "const" || !found?.ops.has(o)));
  const strange = rest.find((o) => knowledge(o.kind).scalar === undefined && o.kind !== "const");
  if (strange) return target.decline(`contractions with ${strange.kind}`);
  // every operand is an input, a sum or the result of an elementwise op
  const known = new Set(
    [...body.inputs, ...contractions.flatMap((o) => o.outputs), ...rest.flatMap((o) => o.outputs)].map((v) => v.name),
  );
  const given = new Set(body.inputs.map((v) => v.name));
  const whole =
    contractions.every((o) => o.inputs.every((v) => given.has(v.name))) &&
    [...rest.flatMap((o) => o.inputs), ...(found ? [found.quantised.from] : [])].every((v) => known.has(v.name)) &&
    body.outputs.every(
      (v) => known.has(v.name) || v === found?.quantised.codes || v === found?.quantised.scales || combine?.outputs[0] === v,
    );
  if (!whole) return target.decline("contractions of what others give");
  return {
    contractions,
    rest,
    ...(found === undefined ? {} : { quantised: found.quantised }),
    ...(combine === undefined ? {} : { combine }),
    inputs: body.inputs,
    outputs: body.outputs,
  };
};

/** Results that a block of columns has all that they are made of, and the contractions and elementwise ops that they are made by. */
interface Part {
  readonly contractions: readonly Op[];
  readonly rest: readonly Op[];
  readonly outputs: readonly Value[];
}

/** One part for each contraction when none of the results needs two, else one of them all. */
const partsOf = (work: Work): readonly Part[] => {
  const { contractions, rest } = work;
  const results = work.outputs.filter((v) => v !== work.quantised?.codes && v !== work.quantised?.scales);
  const ends = work.quantised === undefined ? results : [...results, work.quantised.from];
  const needs = new Map<string, Set<Op>>();
  for (const o of contractions) for (const v of o.outputs) needs.set(v.name, new Set([o]));
  for (const o of rest) {
    const all = new Set(o.inputs.flatMap((v) => [...(needs.get(v.name) ?? [])]));
    for (const v of o.outputs) needs.set(v.name, all);
  }
  if (ends.some((v) => needs.get(v.name)?.size !== 1)) return [{ contractions, rest, outputs: results }];
  return contractions.map((contraction) => ({
    contractions: [contraction],
    rest: rest.filter((o) => o.outputs.every((v) => [...(needs.get(v.name) ?? [])].every((c) => c === contraction))),
    outputs: results.filter((v) => needs.get(v.name)?.has(contraction)),
  }));
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

/** Four neighbouring columns of one row of a part: what is read first, statements for column i of them, what is written last. */
interface Epilogue {
  readonly inputs: readonly number[];
  readonly context: { readonly [key: string]: ContextValue };
}

const epilogueOf = (work: Work, part: Part, rows: Dim, columns: number, target: Target): Epilogue | undefined => {
  const sums = part.contractions.map((o) => o.outputs[0] as Value);
  const wanted = work.quantised?.from;
  const values = [...part.rest.flatMap((o) => [...o.inputs, ...o.outputs]), ...part.outputs, ...(wanted ? [wanted] : [])];
  const misfit = values.find((v) => placeOf(v, rows, columns) === undefined);
  if (misfit) return target.decline(`${typeText(misfit.type)} does not lie along the contraction's result`);
  if ([...part.outputs, ...(wanted ? [wanted] : [])].some((v) => placeOf(v, rows, columns) !== "at"))
    return target.decline("an epilogue has results of the shape of the contraction's");
  const read = new Set<number>();
  const { lines, spell } = elementStatements(dialect, part.rest, (v) => {
    const sum = sums.findIndex((s) => s.name === v.name);
    if (sum >= 0) return `sum${sum}`;
    const index = work.inputs.findIndex((input) => input.name === v.name);
    if (index < 0) throw new Error(`${v.name} is neither an input nor a result of the body`);
    read.add(index);
    const place = placeOf(v, rows, columns) as string;
    const apart = place === "0" || place === "row";
    return loadElement(dialect, dtypeOf(v), apart ? `in${index}` : `four${index}`, apart ? place : "i");
  });
  const inputs = [...read].sort((a, b) => a - b);
  const numbered = part.outputs.map((v) => ({ v, index: work.outputs.findIndex((o) => o.name === v.name) }));
  return {
    inputs,
    context: {
      columns,
      whole: columns % 4 === 0,
      reads: inputs
        .map((index) => ({ index, value: work.inputs[index] as Value }))
        .map(({ index, value }) => ({
          index,
          type: storage[dtypeOf(value)] as string,
          place: placeOf(value, rows, columns) as string,
        }))
        .filter(({ place }) => place === "at" || place === "column"),
      lines: [
        ...sums.map(
          (v, i) => `const float sum${i} = ${dtypeOf(v) === "f32" ? `sums[${i}][i]` : `round_${dtypeOf(v)}(sums[${i}][i])`};`,
        ),
        ...lines,
        ...numbered.map(({ v, index }) => storeElement(dialect, dtypeOf(v), `result${index}`, "i", spell(v))),
        ...(wanted === undefined ? [] : [`wanted[i] = ${spell(wanted)};`]),
      ],
      writes: numbered.map(({ v, index }) => ({ index, type: storage[dtypeOf(v)] as string })),
    },
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
const leastProduct = 1 << 14;
/** Matrices that pack_rows.cuh counts rows of. */
const mostMatrices = 384;
/** Bytes of packed rows that a launch keeps; more rows go one part after the other. */
const mostPackedBytes = 96 << 20;
/** Weights of one launch: the arguments of a kernel have room for their maps. */
const mostWeights = 4;
/** Bytes of results that a launch keeps until they are combined. */
const mostPairBytes = 1 << 30;
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

const same = (a: Value, b: Value): boolean => a.name === b.name;

/** Why contractions cannot share a launch; undefined when they can. */
const differenceOf = (contractions: readonly Op[], together: number): string | undefined => {
  const [first, ...others] = contractions as readonly [Op, ...Op[]];
  const text = (o: Op): string => JSON.stringify([o.attrs.block ?? 0, o.attrs.first ?? 0]);
  for (const o of others) {
    if (o.kind !== first.kind || text(o) !== text(first)) return "contractions of different kinds";
    const shared = (operandNames[o.kind] as readonly string[]).filter((name) => name !== "w" && name !== "ws");
    if (!shared.every((name) => same(operandOf(o, name), operandOf(first, name)))) return "contractions of different rows";
    const [a, b] = [operandOf(o, "w"), operandOf(first, "w")];
    if (dtypeOf(a) !== dtypeOf(b)) return "weights of different types";
    if (together > 1 && shapeOf(a).at(-2) !== shapeOf(b).at(-2)) return "weights of different sizes";
  }
  if (contractions.length > mostWeights || together > 2) return `${contractions.length} contractions`;
  return undefined;
};

/** Whether an op combines what a contraction gives, of just the experts that it has. */
const combines = (combine: Op, contraction: Op, matrices: number): boolean => {
  const [y, ids] = combine.inputs as readonly [Value, Value];
  const { first = 0, count = matrices } = combine.attrs;
  return (
    same(y, contraction.outputs[0] as Value) &&
    same(ids, operandOf(contraction, "ids")) &&
    first === (contraction.attrs.first ?? 0) &&
    count === matrices
  );
};

const match =
  (grouped: boolean) =>
  (op: Op, target: Target): KernelPlan | undefined => {
    const work = workOf(op, target);
    if (work === undefined || work.contractions.some((o) => o.kind.includes("grouped") !== grouped)) return undefined;
    const { contractions, combine, quantised } = work;
    const [contraction] = contractions as readonly [Op];
    const names = operandNames[contraction.kind] as readonly string[];
    const operand = (name: string): Value => operandOf(contraction, name);
    const indexOf = (v: Value): number => work.inputs.findIndex((input) => same(input, v));
    const [x, w, result] = [operand("x"), operand("w"), contraction.outputs[0] as Value];
    const scaled = names.includes("ws");

    const wide = contractions.find((o) => dtypeOf(o.outputs[0] as Value) === "f64");
    if (["f64", "i32", "u32", "i64", "u64"].includes(dtypeOf(w)) || wide)
      return target.decline(
        `${dtypeOf(x)} x ${dtypeOf(w)} contraction to ${dtypeOf((wide ?? contraction).outputs[0] as Value)}: sums are f32`,
      );
    const inner = shapeOf(w).at(-1) as number;
    const matrices = grouped ? (shapeOf(w)[0] as number) : 1;
    const columnsOf = (o: Op): number => shapeOf(operandOf(o, "w")).at(-2) as number;
    const rows = shapeOf(result)[0] as Dim;
    const counted = rowsOf(rows);
    if (counted === undefined) return target.decline(`${rows} rows are not a multiple of the tokens`);
    if (inner === 0 || contractions.some((o) => columnsOf(o) === 0)) return target.decline("a contraction without elements");

    // what is combined is written as it is summed up
    if (
      combine &&
      (contractions.length > 1 ||
        quantised ||
        work.rest.length > 0 ||
        work.outputs.length > 1 ||
        !combines(combine, contraction, matrices))
    )
      return target.decline("combine of other than a contraction's results");
    const parts = combine ? [{ contractions, rest: [], outputs: [result] }] : partsOf(work);
    const together = parts[0]?.contractions.length ?? 1;
    const difference = differenceOf(contractions, together);
    if (difference !== undefined) return target.decline(difference);
    if (parts.some((p) => p.outputs.length === 0 && quantised === undefined))
      return target.decline("a contraction without results");
    if (quantised && parts.length > 1) return target.decline("quantisation of one of several results");
    const seen = combine ? { ...work, outputs: [result] } : work;
    const epilogues = parts.map((p) => epilogueOf(seen, p, rows, columnsOf(p.contractions[0] as Op), target));
    if (!epilogues.every((e): e is Epilogue => e !== undefined)) return undefined;

    const block = scaled ? (contraction.attrs.block as readonly [number, number]) : undefined;
    const weights = contractions.map((o) => ({
      w: operandOf(o, "w"),
      ws: scaled ? operandOf(o, "ws") : undefined,
      columns: columnsOf(o),
    }));
    const isWeight = (v: Value): boolean => target.isWeight?.(op.inputs[indexOf(v)] as Value) ?? true;
    const packable =
      target.arch === "sm_90a" &&
      matrices <= mostMatrices &&
      weights.every(({ w, ws }) => isWeight(w) && (ws === undefined || isWeight(ws)));
    const elements = weights.reduce((sum, { columns }) => sum + columns * inner, 0);
    const unit = packable && elements >= leastProduct ? hopperOperand(dtypeOf(w), block, inner) : undefined;
    if (unit === undefined && (contractions.length > 1 || quantised || combine))
      return target.decline("contractions are joined where Hopper's units do them");
    if (quantised && unit === "Int8") return target.decline("quantisation of int8 products in groups");

    // on the FFN side nobody knows here how many segments a launch will have
    const most = target.symbols.find((s) => s.name === tokenSymbol)?.max ?? 1;
    const perSegment = counted.perToken ? most * counted.count : counted.count;
    const places = counted.perToken && op.place?.startsWith("ffn") ? mostSegments * perSegment : perSegment;
    const lines = linesOf(inner, dtypeOf(w));
    const { window, bytes } = scratchOf(places, matrices, lines, unit === "E4m3" ? lines : unit === "Int8" ? 1 : 0);
    const columns = columnsOf(contraction);
    const [kept, pairBytes] = [roundUp(bytes, 256), places * columns * 4];
    if (combine && pairBytes > mostPairBytes) return target.decline(`results of ${places} pairs are ${pairBytes} bytes`);

    const pointer = (v: Value, name: string, type: string = storage[dtypeOf(v)] as string, note: string = ""): ContextValue => ({
      name,
      index: indexOf(v),
      type: `const ${type}`,
      note: `${typeText(v.type)}${note}`,
    });
    const shared = names.filter((name) => name !== "w" && name !== "ws");
    const operands: ContextValue[] = [
      ...shared.map((name) => pointer(operand(name), name, operandTypes[name])),
      ...weights.flatMap(({ w, ws }, i) => [
        unit === undefined ? pointer(w, `w${i}`) : pointer(w, `w${i}`, "uint8_t", ` in ${tiles.name}`),
        ...(ws === undefined ? [] : [pointer(ws, `ws${i}`, "float")]),
      ]),
      ...(combine ? [pointer(combine.inputs[2] as Value, "weights_of_pairs", "float")] : []),
      ...(combine
        ? [
            {
              name: "sums_of_tokens",
              index: work.inputs.length,
              type: "float",
              note: typeText((combine.outputs[0] as Value).type),
            },
          ]
        : []),
    ];
    const read = [...new Set(epilogues.flatMap((e) => e.inputs))].sort((a, b) => a - b);
    const fields: ContextValue[] = [
      ...read.map((index) => {
        const v = work.inputs[index] as Value;
        const type = `const ${storage[dtypeOf(v)]}`;
        return { type, name: `in${index}`, from: `argument<${type}>(c, ${index})`, note: typeText(v.type) };
      }),
      ...seen.outputs.map((v, i) => {
        const type = storage[dtypeOf(v)] as string;
        const from = combine
          ? `reinterpret_cast<${type} *>(c.scratch + ${kept})`
          : `argument<${type}>(c, ${work.inputs.length + i})`;
        return { type, name: `out${i}`, from, note: typeText(v.type) };
      }),
    ];
    const outputIndex = (v: Value | undefined): number => work.outputs.findIndex((o) => o.name === v?.name);

    const kinds = [...new Set(work.rest.map((o) => o.kind))].filter((k) => k !== "const");
    if (quantised) kinds.push("quantise");
    if (combine) kinds.push("combine");
    const about = `${contraction.kind} ${typeText(x.type)} x ${weights.map((v) => typeText(v.w.type)).join(", ")} -> ${work.outputs.map((v) => typeText(v.type)).join(", ")}${
      kinds.length > 0 ? `, then ${kinds.join(", ")}` : ""
    }`;
    return {
      context: {
        about,
        headers: [unit === undefined ? "contract.cuh" : "contract_hopper.cuh", ...(combine ? ["combine_owned.cuh"] : [])],
        unit: unit ?? "",
        columns,
        inner,
        group: quantised ? groupColumns : block === undefined ? inner : Math.min(block[1], inner),
        groups: Math.ceil(columns / groupColumns),
        block: block?.[0] ?? columns,
        operands,
        fields,
        parts: epilogues.map((e, number) => ({ ...e.context, number })),
        together,
        quantises: quantised !== undefined,
        codes: outputIndex(quantised?.codes),
        scales: outputIndex(quantised?.scales),
        weights: weights.map(({ columns: of }, i) => ({ w: `w${i}`, ws: scaled ? `ws${i}` : "nullptr", columns: of })),
        scaled,
        xs: scaled ? "xs" : "nullptr",
        ws: scaled ? "ws0" : "nullptr",
        matrices,
        perToken: counted.perToken,
        count: counted.count,
        mostRows: places <= 64 ? 64 : 128,
        window,
        choices: grouped ? (shapeOf(operand("ids"))[1] as number) : 1,
        first: (contraction.attrs.first as number | undefined) ?? 0,
        rowPerToken: grouped && shapeOf(x)[0] === shapeOf(operand("ids"))[0],
        zeros: combine === undefined,
        combined: combine ? { whole: columns % 4 === 0, count: counted.count / (shapeOf(operand("ids"))[1] as number) } : false,
      },
      scratch: unit === undefined ? 0 : combine ? kept + pairBytes : bytes,
      layouts: unit === undefined ? {} : Object.fromEntries(weights.map((v) => [indexOf(v.w), tiles])),
      about,
      ...(quantised ? { inexact: quantisedSums } : unit !== "E4m3" ? {} : { inexact: together > 1 ? productsOfSums : codeSums }),
    };
  };

/** Within a block of 128 columns; blocks are added up in f32. */
const codeSums = { ofLargest: 2 ** -11, why: "the 8-bit units of Hopper keep about 13 bits of a sum" };
/** Of two such sums. */
const productsOfSums = { ...codeSums, ofLargest: 2 ** -9 };
const quantisedSums = { ofLargest: 2 ** -7, why: "a scale is of a value that another order of its sum may round the other way" };

const template = (name: string, grouped: boolean): KernelTemplate => {
  const text = loadTemplate(new URL(`./kernels/${name}.hbs`, import.meta.url));
  return { name, match: match(grouped), render: (context, symbol) => text({ ...context, name: symbol }) };
};

export const linearKernels: readonly KernelTemplate[] = [template("linear", false), template("grouped_linear", true)];
