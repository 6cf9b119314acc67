/**
 * Kernels of the C family for ops on tensors of any rank: movement, indices, products of batches, order, and elementwise ops whose shapes are
 * none that row kernels take. What a template needs is worked out here; a target brings the templates, `kernels/NAME.hbs`.
 */

import { addDim, ceilDivDim, type Dim, divDim, mulDim, multipleOf, product, tokenSymbol } from "../ir/dim.ts";
import type { Graph, Op, Value } from "../ir/graph.ts";
import { knowledge } from "../ir/ops/index.ts";
import { dtypeBytes, isFloat, type TensorType, typeText } from "../ir/type.ts";
import type { KernelContext, KernelTemplate } from "./backend.ts";
import { elementStatements, fill, loadElement, rowBody, storeElement, variableType } from "./c_family.ts";
import {
  isMultiple,
  type Loops,
  loopsOf,
  type Nest,
  nestOf,
  offsetText,
  perTokenOf,
  rowIndices,
  rowsText,
  type Squares,
  squaresOf,
  stridesOf,
  type Walk,
  walkOf,
  widened,
  widening,
} from "./nest.ts";
import { dialect, storage } from "./scalar.ts";
import { Sizes } from "./sizes.ts";
import { loadTemplate } from "./template.ts";

const typeOf = (values: readonly Value[], i: number): TensorType => values[i]?.type as TensorType;
const shapeOf = (v: Value): readonly Dim[] => (v.type as TensorType).shape;
const storageOf = (v: Value): string => storage[v.type.dtype];
const integer = (op: Op, name: string, otherwise?: number): number =>
  (op.attrs[name] as number | undefined) ?? (otherwise as number);

const aboutOf = (what: string, { inputs, outputs }: Pick<Op, "inputs" | "outputs">): string => {
  const types = (values: readonly Value[]): string => values.map((v) => typeText(v.type)).join(", ");
  return `${what} ${types(inputs)} -> ${types(outputs)}`;
};

/** The arguments of a kernel as pointers: in0, in1 ... and out0 ... */
const argumentsOf = (
  { inputs, outputs }: Pick<Op, "inputs" | "outputs">,
  type: (v: Value) => string = storageOf,
): { type: string; name: string; index: number; note: string }[] => {
  const all = [
    ...inputs.map((v, i) => ({ v, name: `in${i}`, type: `const ${type(v)}` })),
    ...outputs.map((v, i) => ({ v, name: `out${i}`, type: type(v) })),
  ];
  return all.map(({ v, ...named }, index) => ({ ...named, index, note: typeText(v.type) }));
};

// --- nests of elements and copies -----------------------------------------------------------------------------------------------

/** What a template places for one nest. */
interface NestContext {
  readonly rows: string;
  readonly most: string;
  readonly setup: readonly string[];
  readonly outer: Loops["outer"];
  /** what follows inside, before a loop over neighbours, of which there is one or none */
  readonly lines: readonly string[];
  readonly inner: readonly { readonly from: string; readonly to: string; readonly lines: readonly string[] }[];
  readonly lanes: number;
}

const withLoops = (loops: Loops, lines: readonly string[], element: readonly string[]): NestContext => ({
  rows: loops.rows,
  most: loops.most,
  setup: loops.setup,
  outer: loops.outer,
  lines,
  inner: element.length === 0 ? [] : [{ ...loops.inner, lines: element }],
  lanes: loops.lanes,
});

const plus = (pointer: string, offset: string): string => (offset === "0" ? pointer : `${pointer} + ${offset}`);

/** A pointer some elements ahead, with the line that declares it, or the argument itself when it is not ahead. */
const ahead = (type: string, argument: string, offset: string): { readonly name: string; readonly lines: readonly string[] } =>
  offset === "0"
    ? { name: argument, lines: [] }
    : { name: `${argument}_at`, lines: [`${type} *const ${argument}_at = ${plus(argument, offset)};`] };

/** As `ahead` for arguments of copies, which point to nothing in particular: elements may be wider than their dtype. */
const castAhead = (type: string, argument: string, offset: string): string =>
  `${type} *const ${argument}_at = ${plus(`static_cast<${type} *>(${argument})`, offset)};`;

/** The index of an element of the inner loop from the pointer of its walk. */
const indexOf = (sizes: Sizes, step: Dim): string => (step === 0 ? "0" : step === 1 ? "i" : `i * ${sizes.text(step)}`);

const elementOfBytes: Readonly<Record<number, string>> = {
  1: "uint8_t",
  2: "uint16_t",
  4: "uint32_t",
  8: "uint64_t",
  16: "sixteen_bytes",
};

/** A copy of elements of `bytes` each. Walks are those of the argument `from` and of the result. */
const copyNest = (sizes: Sizes, from: string, bytes: number, given: Nest): NestContext => {
  const factor = widening(given, 2, bytes);
  const nest = widened(given, 2, factor);
  const type = elementOfBytes[factor * bytes] as string;
  const pointers = (offsets: readonly string[]): readonly string[] => [
    castAhead(`const ${type}`, from, offsets[0] as string),
    castAhead(type, "out0", offsets[1] as string),
  ];
  const squares = squaresOf(sizes, nest);
  if (squares !== undefined) return squareCopy(squares, from, pointers(squares.offsets));
  const loops = loopsOf(sizes, nest);
  const { from: first, to: last } = loops.inner;
  const whole = loops.steps.every((s) => s === 1);
  const copy = `copy_elements(out0_at, ${from}_at, ${first}, ${last});`;
  const [read, write] = loops.steps.map((s) => indexOf(sizes, s));
  const element = `out0_at[${write}] = ${from}_at[${read}];`;
  return withLoops(loops, [...pointers(loops.offsets), ...(whole ? [copy] : [])], whole ? [] : [element]);
};

const squareCopy = (s: Squares, from: string, pointers: readonly string[]): NestContext => {
  const copy = `transpose_square(${from}_at, ${s.fromStep}, ${s.fromSide}, out0_at, ${s.toStep}, ${s.toSide});`;
  return { rows: s.rows, most: s.most, setup: s.setup, outer: [], lines: [...pointers, copy], inner: [], lanes: 256 };
};

const contiguous = (shape: readonly Dim[]): Walk => ({ strides: stridesOf(shape), start: 0 });

type NestsOf = (op: Op, sizes: Sizes) => readonly NestContext[];

/** Axis 0 counts tokens by segments when inputs and the result agree in it. */
const tokensOf = (op: Op): number => {
  const shapes = [...op.inputs, ...op.outputs].map(shapeOf);
  return perTokenOf(shapeOf(op.outputs[0] as Value)[0], shapes);
};

const copyOf = (op: Op, sizes: Sizes, from: Walk): readonly NestContext[] => {
  const { shape, dtype } = typeOf(op.outputs, 0);
  return [copyNest(sizes, "in0", dtypeBytes(dtype), nestOf(shape, [from, contiguous(shape)], tokensOf(op)))];
};

/** The same bytes: rows of tokens where both sides have them first, all of it otherwise. */
const sameBytes: NestsOf = (op, sizes) => {
  const [x, y] = [typeOf(op.inputs, 0), typeOf(op.outputs, 0)];
  const [perToken, perTokenBefore] = [perTokenOf(y.shape[0], [y.shape]), perTokenOf(x.shape[0], [x.shape])];
  const byTokens = perToken !== 0 && perTokenBefore !== 0;
  const each = byTokens ? mulDim(perToken, product(y.shape.slice(1))) : product(y.shape);
  const shape = byTokens ? [tokenSymbol, each] : [each];
  const walk = contiguous(shape);
  return [copyNest(sizes, "in0", dtypeBytes(y.dtype), nestOf(shape, [walk, walk], byTokens ? 1 : 0))];
};

const transpose: NestsOf = (op, sizes) => {
  const strides = stridesOf(shapeOf(op.inputs[0] as Value));
  return copyOf(op, sizes, { strides: (op.attrs.perm as readonly number[]).map((p) => strides[p] as Dim), start: 0 });
};

const slice: NestsOf = (op, sizes) => {
  const { shape } = typeOf(op.inputs, 0);
  const [axis, start] = [integer(op, "axis"), integer(op, "start")];
  const strides = stridesOf(shape);
  const stride = strides[axis] as Dim;
  const first = start < 0 ? addDim(shape[axis] as Dim, start) : start;
  return copyOf(op, sizes, { strides: strides.with(axis, mulDim(stride, integer(op, "step", 1))), start: mulDim(first, stride) });
};

const broadcast: NestsOf = (op, sizes) =>
  copyOf(op, sizes, walkOf(shapeOf(op.inputs[0] as Value), shapeOf(op.outputs[0] as Value)));

const concat: NestsOf = (op, sizes) => {
  const { shape, dtype } = typeOf(op.outputs, 0);
  const axis = integer(op, "axis");
  const strides = stridesOf(shape);
  let place: Dim = 0;
  return op.inputs.flatMap((v, i) => {
    const own = shapeOf(v);
    const to = { strides, start: mulDim(place, strides[axis] as Dim) };
    place = addDim(place, own[axis] as Dim);
    if (own.includes(0)) return [];
    return [copyNest(sizes, `in${i}`, dtypeBytes(dtype), nestOf(own, [contiguous(own), to], tokensOf(op)))];
  });
};

/** Walks of a take: of x (along the axis, the index says where it is), of the result, and of the index. */
const take: NestsOf = (op, sizes) => {
  const [x, index, out] = [typeOf(op.inputs, 0), typeOf(op.inputs, 1), typeOf(op.outputs, 0)];
  const axis = integer(op, "axis");
  const [before, extent, after] = [x.shape.slice(0, axis), x.shape[axis] as Dim, product(x.shape.slice(axis + 1))];
  if (extent === 0) return []; // nothing can be taken from nothing
  const shape = [...before, product(index.shape), after];
  const walks: Walk[] = [
    { strides: stridesOf([...before, extent, after]).with(axis, 0), start: 0 },
    contiguous(shape),
    { strides: shape.map((_, i) => (i === axis ? 1 : 0)), start: 0 },
  ];
  // where the axis of tokens is not the first of the nest, the index's axes are one with it
  const perToken = shape[0] === out.shape[0] ? perTokenOf(out.shape[0], [x.shape, index.shape, out.shape]) : 0;
  const given = nestOf(shape, walks, perToken);
  const bytes = dtypeBytes(x.dtype);
  const factor = [16, 8, 4, 2].find((f) => widening(given, 2, bytes) % f === 0 && isMultiple(after, f)) ?? 1;
  const nest = widened(given, 2, factor);
  const type = elementOfBytes[factor * bytes] as string;
  const loops = loopsOf(sizes, nest);
  const [fromX, to, fromIndex] = loops.offsets as [string, string, string];
  const [stepX, stepOut, stepIndex] = loops.steps as [Dim, Dim, Dim];
  const distance = sizes.text(divDim(after, factor));
  const place = `clamped_index(in1_at[${indexOf(sizes, stepIndex)}], ${sizes.text(extent)})${distance === "1" ? "" : ` * ${distance}`}`;
  const indices = castAhead(`const ${storage[index.dtype]}`, "in1", fromIndex);
  const result = castAhead(type, "out0", to);
  const nothing = typeof extent === "number" ? [] : [`if (${sizes.text(extent)} == 0) continue;`];
  const inLoop = stepIndex !== 0;
  const from = castAhead(`const ${type}`, "in0", inLoop ? fromX : fromX === "0" ? place : `${fromX} + ${place}`);
  const lines = [...nothing, indices, from, result];
  if (!inLoop && stepX === 1 && stepOut === 1)
    return [withLoops(loops, [...lines, `copy_elements(out0_at, in0_at, ${loops.inner.from}, ${loops.inner.to});`], [])];
  const read = indexOf(sizes, stepX);
  const taken = inLoop ? (read === "0" ? place : `${read} + ${place}`) : read;
  return [withLoops(loops, lines, [`out0_at[${indexOf(sizes, stepOut)}] = in0_at[${taken}];`])];
};

const iota: NestsOf = (op, sizes) => {
  const { shape, dtype } = typeOf(op.outputs, 0);
  const axis = integer(op, "axis");
  const counted: Walk = { strides: shape.map((_, i) => (i === axis ? 1 : 0)), start: 0 };
  const loops = loopsOf(sizes, nestOf(shape, [counted, contiguous(shape)], perTokenOf(undefined, [])));
  const [index, to] = loops.offsets as [string, string];
  const out = ahead(storage[dtype], "out0", to);
  const own = loops.steps[0] === 0 ? index : index === "0" ? "i" : `${index} + i`;
  const at = indexOf(sizes, loops.steps[1] as Dim);
  return [withLoops(loops, out.lines, [storeElement(dialect, dtype, out.name, at, `static_cast<double>(${own})`)])];
};

/** Both halves of a row at a time. */
const rope: NestsOf = (op, sizes) => {
  const { shape, dtype } = typeOf(op.outputs, 0);
  const half = divDim(shape.at(-1) as Dim, 2);
  const operands = [
    ...["x", "cos", "sin"].map((name, i) => ({
      name,
      v: op.inputs[i] as Value,
      argument: `in${i}`,
      type: `const ${storage[dtype]}`,
    })),
    { name: "y", v: op.outputs[0] as Value, argument: "out0", type: storage[dtype] },
  ];
  const walks = operands.flatMap(({ v }) => [0, half].map((start): Walk => ({ ...walkOf(shapeOf(v), shape), start })));
  const loops = loopsOf(sizes, nestOf(shape.with(-1, half), walks, tokensOf(op)));
  const [pointers, loads]: [string[], string[]] = [[], []];
  operands.forEach(({ name, argument, type }, n) => {
    for (const i of [0, 1]) {
      pointers.push(`${type} *const ${name}${i}_at = ${plus(argument, loops.offsets[2 * n + i] as string)};`);
      const load = loadElement(dialect, dtype, `${name}${i}_at`, indexOf(sizes, loops.steps[2 * n + i] as Dim));
      if (name !== "y") loads.push(`const ${variableType(dialect, dtype)} ${name}${i} = ${load};`);
    }
  });
  const at = indexOf(sizes, loops.steps.at(-1) as Dim);
  return [
    withLoops(loops, pointers, [
      ...loads,
      storeElement(dialect, dtype, "y0_at", at, "(x0 * cos0 - x1 * sin0)"),
      storeElement(dialect, dtype, "y1_at", at, "(x1 * cos1 + x0 * sin1)"),
    ]),
  ];
};

const size: NestsOf = (op, sizes) => {
  const extent = shapeOf(op.inputs[0] as Value)[integer(op, "axis")] as Dim;
  const loops = loopsOf(sizes, nestOf([], [], 0));
  return [withLoops(loops, [], [`out0[i] = ${sizes.text(extent)};`])];
};

/** Elementwise ops whose results have one shape: what each element needs is computed for it, whatever the shapes of values before it are. */
const elementNest = (sizes: Sizes, body: Graph, outputs: readonly Value[]): NestContext => {
  const shape = shapeOf(outputs[0] as Value);
  const needed = new Set<Value>(outputs);
  const ops = [...body.ops].reverse().filter((op) => {
    const isNeeded = op.outputs.some((v) => needed.has(v));
    if (isNeeded) for (const v of op.inputs) needed.add(v);
    return isNeeded;
  });
  const inputs = body.inputs.filter((v) => needed.has(v));
  const values = [...inputs, ...outputs];
  const perToken = perTokenOf(shape[0], [...values, ...ops.flatMap((op) => op.outputs)].map(shapeOf));
  const nest = nestOf(
    shape,
    values.map((v) => walkOf(shapeOf(v), shape)),
    perToken,
  );
  const loops = loopsOf(sizes, nest);
  const before: string[] = [];
  const lines: string[] = [];
  const names = new Map<Value, string>();
  inputs.forEach((v, n) => {
    const i = body.inputs.indexOf(v);
    const pointer = ahead(`const ${storageOf(v)}`, `in${i}`, loops.offsets[n] as string);
    const step = loops.steps[n] as Dim;
    const load = loadElement(dialect, v.type.dtype, pointer.name, indexOf(sizes, step));
    before.push(...pointer.lines);
    (step === 0 ? before : lines).push(`const ${variableType(dialect, v.type.dtype)} x${i} = ${load};`);
    names.set(v, `x${i}`);
  });
  const element = elementStatements(dialect, ops.reverse(), (v) => names.get(v) as string);
  lines.push(...element.lines);
  outputs.forEach((v, n) => {
    const pointer = ahead(storageOf(v), `out${body.outputs.indexOf(v)}`, loops.offsets[inputs.length + n] as string);
    before.push(...pointer.lines);
    const at = indexOf(sizes, loops.steps[inputs.length + n] as Dim);
    lines.push(storeElement(dialect, v.type.dtype, pointer.name, at, element.spell(v)));
  });
  return withLoops(loops, before, lines);
};

/** Elementwise ops, alone or fused, whose row kernel there is not: nests for each shape that results have. */
const elementNests = (sizes: Sizes, body: Graph): readonly NestContext[] => {
  const outputs = body.outputs.filter((v) => !shapeOf(v).includes(0));
  const byShape = new Map<string, Value[]>();
  for (const v of outputs) {
    const shape = shapeOf(v).join();
    byShape.set(shape, [...(byShape.get(shape) ?? []), v]);
  }
  return [...byShape.values()].map((alike) => elementNest(sizes, body, alike));
};

// --- templates --------------------------------------------------------------------------------------------------------------------

/** What a target of the C family brings: its templates, and whether its launches know the values of symbols other than the tokens. */
export interface TensorTarget {
  /** a file beside the target's `kernels/` */
  readonly templates: URL;
  readonly knowsSymbols: boolean;
}

interface Planned {
  readonly about: string;
  readonly context: KernelContext;
}

const tensorKernel = (name: string, to: TensorTarget, plan: (op: Op, sizes: Sizes) => Planned | undefined): KernelTemplate => {
  const template = loadTemplate(new URL(`./kernels/${name}.hbs`, to.templates));
  return {
    name,
    match(op, target) {
      const sizes = new Sizes(target);
      const found = plan(op, sizes);
      if (found === undefined) return undefined;
      if (!to.knowsSymbols && sizes.symbols.length > 0)
        return target.decline(`sizes that depend on ${sizes.symbols.join(", ")}: only ${tokenSymbol} varies here`);
      const { about, context } = found;
      return { context: { ...context, about, sizes: sizes.variables }, about, scratch: 0 };
    },
    render: (context, symbol) => template({ ...context, name: symbol }),
  };
};

const moves: Readonly<Record<string, NestsOf>> = {
  reshape: sameBytes,
  bitcast: sameBytes,
  transpose,
  slice,
  broadcast,
  concat,
  take,
};
const makes: Readonly<Record<string, NestsOf>> = { iota, size, rope };

const nestsPlan = (about: string, nests: readonly NestContext[], args: ReturnType<typeof argumentsOf>): Planned => ({
  about,
  context: {
    arguments: args,
    nests: nests.map((n) => ({ ...n })),
    lanes: Math.max(1, ...nests.map((n) => n.lanes)),
    most: nests.map((n) => n.most),
  },
});

const nest = (op: Op, sizes: Sizes): Planned | undefined => {
  if ([...op.inputs, ...op.outputs].some((v) => v.type.kind !== "tensor")) return undefined;
  const about = aboutOf(op.kind, op);
  // whatever the op is, there is nothing to do
  if (op.outputs.every((v) => shapeOf(v).includes(0))) return nestsPlan(about, [], []);
  const moved = moves[op.kind]?.(op, sizes);
  if (moved !== undefined)
    return nestsPlan(
      about,
      moved,
      argumentsOf(op, (v) => (op.kind === "take" && v === op.inputs[1] ? storageOf(v) : "void")),
    );
  const made = makes[op.kind]?.(op, sizes);
  if (made !== undefined) return nestsPlan(about, made, argumentsOf(op));
  const body = rowBody(op);
  if (body === undefined || body.ops.some((o) => knowledge(o.kind).scalar === undefined)) return undefined;
  const kinds = body.ops.map((o) => o.kind).filter((kind) => kind !== "const");
  return nestsPlan(`${aboutOf("elements", body)}: ${kinds.join(" ")}`, elementNests(sizes, body), argumentsOf(body));
};

const put = (op: Op, sizes: Sizes): Planned | undefined => {
  if (op.kind !== "put") return undefined;
  const { dtype, shape } = typeOf(op.inputs, 0);
  const fn = (op.attrs.fn as "set" | "add" | "mul" | "max" | "min" | undefined) ?? "set";
  const [old, update] = [loadElement(dialect, dtype, "out0", "at"), loadElement(dialect, dtype, "in2", "m")];
  const line =
    fn === "set" ? "out0[at] = in2[m];" : storeElement(dialect, dtype, "out0", "at", fill(dialect.binary[fn], old, update));
  const [count, updates] = [shape[0] as Dim, shapeOf(op.inputs[1] as Value)[0] as Dim];
  const context = {
    arguments: argumentsOf(op),
    count: sizes.text(count),
    updates: sizes.text(updates),
    line,
    most: String(sizes.largest(count)),
  };
  return { about: aboutOf(`put by ${fn}`, op), context };
};

/** The rows of all axes but the last, each in so many tiles. */
const leadingRows = (sizes: Sizes, shape: readonly Dim[], tiles: Dim): { readonly rows: string; readonly most: string } => {
  const lead = shape.slice(0, -1);
  return rowsText(sizes, lead, perTokenOf(lead[0], [shape]), sizes.argument(tiles), tiles);
};

const cumulate = (op: Op, sizes: Sizes): Planned | undefined => {
  if (op.kind !== "cumulate") return undefined;
  const { dtype, shape } = typeOf(op.inputs, 0);
  const fn = (op.attrs.fn as "sum" | "prod" | "max" | "min" | undefined) ?? "sum";
  const { pattern, start } = {
    sum: { pattern: dialect.binary.add, start: 0 },
    prod: { pattern: dialect.binary.mul, start: 1 },
    max: { pattern: dialect.binary.max, start: Number.NEGATIVE_INFINITY },
    min: { pattern: dialect.binary.min, start: Number.POSITIVE_INFINITY },
  }[fn];
  const context = {
    arguments: argumentsOf(op),
    ...leadingRows(sizes, shape, 1),
    columns: sizes.text(shape.at(-1) as Dim),
    start: dialect.literal(start, true),
    both: fill(pattern, "so", "x"),
    load: loadElement(dialect, dtype, "in_row", "at"),
    store: storeElement(dialect, dtype, "out_row", "at", "result"),
    exclusive: op.attrs.exclusive === true,
    reverse: op.attrs.reverse === true,
  };
  return { about: aboutOf(`cumulate by ${fn}`, op), context };
};

/** Elements of a row that a block of threads puts in order together. */
const sortedAtOnce = 256;

const sort = (op: Op, sizes: Sizes): Planned | undefined => {
  if (op.kind !== "sort") return undefined;
  const { shape } = typeOf(op.inputs, 0);
  const count = shapeOf(op.outputs[0] as Value).at(-1) as Dim;
  const columns = shape.at(-1) as Dim;
  const context = {
    arguments: argumentsOf(op),
    ...leadingRows(sizes, shape, 1),
    // where each element finds its own place
    parts: leadingRows(sizes, shape, ceilDivDim(columns, sortedAtOnce)),
    part: sortedAtOnce,
    columns: sizes.text(columns),
    count: sizes.text(count),
    descending: op.attrs.descending === true,
  };
  return { about: aboutOf("sort", op), context };
};

/** Products of matrices. Without batches in b, a's are more of its rows. */
const matmul = (op: Op, sizes: Sizes): Planned | undefined => {
  if (op.kind !== "matmul") return undefined;
  const [a, b, out] = [typeOf(op.inputs, 0), typeOf(op.inputs, 1), typeOf(op.outputs, 0)];
  const lead = (t: TensorType): readonly Dim[] => t.shape.slice(0, -2);
  const [m, k, n] = [a.shape.at(-2), a.shape.at(-1), b.shape.at(-1)] as [Dim, Dim, Dim];
  const asRows = lead(b).every((d) => d === 1) && lead(a).length >= lead(b).length;
  const batch = asRows ? [] : lead(out);
  const height = asRows ? product([...lead(a), m]) : m;
  const perToken = perTokenOf(out.shape[0], [a.shape, b.shape, out.shape]);
  const bySegments = asRows && perToken !== 0;
  const matrices = (t: TensorType, elements: Dim): Walk => ({
    strides: walkOf(lead(t), batch).strides.map((s) => mulDim(s, elements)),
    start: 0,
  });
  const outMatrix = mulDim(m, n);
  const walks = [matrices(a, mulDim(m, k)), matrices(b, mulDim(k, n)), matrices(out, outMatrix)];
  const { shape, walks: merged } = nestOf(
    batch,
    asRows ? walks.map(() => ({ strides: [], start: 0 })) : walks,
    asRows ? 0 : perToken,
  );
  const { names, lines } = rowIndices(sizes, shape);
  const offsets = merged.map((w) => offsetText(sizes, names, w));
  const isFloatSum = isFloat(a.dtype) && a.dtype !== "f64";
  const sumType = isFloatSum ? "f32" : "f64";
  const context = {
    arguments: argumentsOf(op),
    result: storage[out.dtype],
    sum: storage[sumType],
    ...rowsText(sizes, shape, asRows ? 0 : perToken, "blocks.count", mulDim(ceilDivDim(height, 32), ceilDivDim(n, 32))),
    setup: lines(offsets),
    a: plus("in0", offsets[0] as string),
    b: plus("in1", offsets[1] as string),
    out: plus("out0", offsets[2] as string),
    matrices: sizes.text(product(batch)),
    bySegments,
    height: sizes.text(bySegments ? (multipleOf(height, tokenSymbol) as Dim) : height),
    inner: sizes.text(k),
    columns: sizes.text(n),
    store: storeElement(dialect, out.dtype, "out_row", "i", "sums_row[i]"),
  };
  return { about: aboutOf("matmul", op), context };
};

/** What starts a reduction, and how one more element, or the result of another lane, is taken in. */
const reductions: Readonly<Record<string, { readonly start: number; readonly both: string }>> = {
  sum: { start: 0, both: dialect.binary.add },
  mean: { start: 0, both: dialect.binary.add },
  prod: { start: 1, both: dialect.binary.mul },
  max: { start: Number.NEGATIVE_INFINITY, both: dialect.binary.max },
  min: { start: Number.POSITIVE_INFINITY, both: dialect.binary.min },
  amax: { start: 0, both: dialect.binary.max },
};

/** Reductions of a last axis whose size only a launch knows: row kernels have numbers for columns. */
const reduce = (op: Op, sizes: Sizes): Planned | undefined => {
  const fn = String(op.attrs.fn);
  const found = reductions[fn];
  if (op.kind !== "reduce" || found === undefined || integer(op, "group", 0) !== 0) return undefined;
  const { dtype, shape } = typeOf(op.inputs, 0);
  const columns = shape.at(-1);
  if (typeof columns !== "string") return undefined;
  const lead = shape.slice(0, -1);
  const element = loadElement(dialect, dtype, "in_row", "i + j");
  const context = {
    arguments: argumentsOf(op),
    ...rowsText(sizes, lead, perTokenOf(lead[0], [shape]), "1", 1),
    columns: sizes.text(columns),
    start: dialect.literal(found.start, true),
    load: fn === "amax" ? fill(dialect.unary.abs, `(double)(${element})`) : element,
    both: fill(found.both, "so", "x"),
    store: storeElement(dialect, dtype, "out0", "r.row", fn === "mean" ? "so / (double)columns" : "so"),
  };
  return { about: aboutOf(`reduce by ${fn}`, op), context };
};

/** The templates of a target, to be tried after those of rows: what these do well is left to them. */
export const tensorKernels = (to: TensorTarget): readonly KernelTemplate[] =>
  Object.entries({ nest, put, matmul, reduce, cumulate, sort }).map(([name, plan]) => tensorKernel(name, to, plan));
