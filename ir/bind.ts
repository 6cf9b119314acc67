/** Giving symbols their values: concrete types, sizes in bytes, and the symbols that concrete shapes imply. */
import { type Dim, type DimSymbol, dimSymbols, dimText, evalDim, solveDim } from "./dim.ts";
import { UserError } from "./error.ts";
import type { Cost, Datum } from "./op.ts";
import type { Tensor } from "./tensor.ts";
import { dtypeBytes, type TensorType, type Type, typeText } from "./type.ts";

export type Symbols = ReadonlyMap<string, number>;

export interface ConcreteTensor extends TensorType {
  readonly shape: readonly number[];
}

/** The type with numbers for dims; a UserError when one is negative. */
export const concrete = (t: TensorType, symbols: Symbols): ConcreteTensor => ({
  ...t,
  shape: t.shape.map((d) => {
    const size = evalDim(d, symbols);
    if (size < 0) throw new UserError(`${typeText(t)}${symbolText(t, symbols)}: dimension '${d}' is ${size}`);
    return size;
  }),
});

/** Elements of a tensor type once its symbols have values; 0 for a state, whose size the graph does not know. */
export const elements = (t: Type, symbols: Symbols): number =>
  t.kind === "kv" ? 0 : t.shape.reduce((n: number, d) => n * evalDim(d, symbols), 1);

export const bytesOf = (t: Type, symbols: Symbols): number => (t.kind === "kv" ? 0 : elements(t, symbols) * dtypeBytes(t.dtype));

/** A Cost with each operand read once and each result written once. */
export const cost = (flops: number, types: readonly Type[], symbols: Symbols): Cost => ({
  flops,
  bytes: types.reduce((n, t) => n + bytesOf(t, symbols), 0),
});

/** The symbols that others define, added to those given. */
export const withDefined = (symbols: readonly DimSymbol[], values: Symbols): Symbols => {
  const all = new Map(values);
  for (const { name, is } of symbols)
    if (is !== undefined && !all.has(name) && dimSymbols(is).every((s) => all.has(s))) all.set(name, evalDim(is, all));
  return all;
};

/** A value with its type and what it holds. */
export interface Bound {
  readonly name: string;
  readonly type: Type;
  readonly datum: Datum;
}

/**
 * The symbols that shapes imply, added to those given. A size settles a symbol that is just multiplied and added to in its dim, once the others
 * there have values: `T`, `3*T`, or `P+S` where another shape says what S is. Other expressions are checked once their symbols are known.
 * Throws a UserError naming the value whose shape, dtype or rank does not fit.
 */
export const bindSymbols = (pairs: readonly Bound[], given: Symbols = new Map()): Symbols => {
  const symbols = new Map(given);
  const misfit = ({ name, type, datum }: Bound): never => {
    const got = datum.kind === "kv" ? "a state" : typeText({ kind: "tensor", dtype: datum.dtype, shape: datum.shape });
    throw new UserError(
      `'${name}' should be ${typeText(type)}${symbolText(type, symbols)}, got ${type.kind === "kv" && datum.kind !== "kv" ? "a tensor" : got}`,
    );
  };
  for (const pair of pairs) {
    const { type, datum } = pair;
    if (type.kind !== datum.kind) misfit(pair);
    if (type.kind === "kv" || datum.kind === "kv") continue;
    if (type.dtype !== datum.dtype || type.shape.length !== datum.shape.length) misfit(pair);
  }
  const unknown = (d: Dim): string[] => dimSymbols(d).filter((s) => !symbols.has(s));
  for (let settled = true; settled; ) {
    settled = false;
    for (const pair of pairs)
      for (const { dim, size } of axesOf(pair)) {
        const [name, ...others] = unknown(dim);
        if (name === undefined || others.length > 0) continue;
        const value = solveDim(dim, size, name, symbols);
        if (value === undefined) continue;
        if (!Number.isInteger(value) || value < 0) misfit(pair);
        symbols.set(name, value);
        settled = true;
      }
  }
  for (const pair of pairs)
    for (const { dim, size } of axesOf(pair)) if (unknown(dim).length === 0 && evalDim(dim, symbols) !== size) misfit(pair);
  return symbols;
};

const axesOf = ({ type, datum }: Bound): readonly { readonly dim: Dim; readonly size: number }[] =>
  type.kind === "kv" || datum.kind === "kv" ? [] : type.shape.map((dim, i) => ({ dim, size: datum.shape[i] as number }));

/** Throws a UserError that says where symbols, which have no values, stand. */
export const unbound = (names: readonly string[], pairs: readonly Bound[]): never => {
  const where = pairs.filter(
    ({ type }) => type.kind !== "kv" && type.shape.some((d) => dimSymbols(d).some((s) => names.includes(s))),
  );
  throw new UserError(
    `the sizes of the inputs do not say what ${names.join(" and ")} ${names.length > 1 ? "are" : "is"}${where.length === 0 ? ": no input has such a dimension" : `, from ${where.map(({ name, type }) => `'${name}' ${typeText(type)}`).join(", ")} alone`}`,
  );
};

/** Throws a UserError that names input, axis, size and limit when the value of a symbol that shapes imply is none that was declared. */
export const checkRanges = (declared: readonly DimSymbol[], pairs: readonly Bound[], values: Symbols): void => {
  for (const { name, min, max, multiple, is } of declared) {
    const value = values.get(name);
    if (is !== undefined && value !== undefined && value !== evalDim(is, values))
      throw new UserError(`${name} is ${is} = ${evalDim(is, values)}, and by the sizes of the inputs ${value}`);
    if (value === undefined || (value >= min && value <= max && value % multiple === 0)) continue;
    const places = pairs.flatMap((pair) => axesOf(pair).map(({ dim, size }, axis) => ({ input: pair.name, axis, dim, size })));
    const place = places.find(({ dim }) => dim === name) ?? places.find(({ dim }) => dimSymbols(dim).includes(name));
    const where = place === undefined ? "" : `input '${place.input}' has size ${place.size} on axis ${place.axis}`;
    const so =
      place?.dim === name ? ` (${name})` : `${place === undefined ? "" : ` (${place.dim}), so that `}${name} is ${value}`;
    throw new UserError(
      `${where}${so}; ${name} is at least ${min} and at most ${max}${multiple === 1 ? "" : `, a multiple of ${multiple}`}`,
    );
  }
};

const symbolText = (type: Type, symbols: Symbols): string => {
  const names = type.kind === "kv" ? [] : [...new Set(type.shape.flatMap(dimSymbols))];
  const known = names.filter((n) => symbols.has(n)).map((n) => `${n} = ${dimText(symbols.get(n) as number)}`);
  return known.length === 0 ? "" : ` with ${known.join(", ")}`;
};

/** A tensor of the interpreter; `data` is taken as it is. */
export const tensorOf = (t: ConcreteTensor, data: Float64Array): Tensor => ({
  kind: "tensor",
  dtype: t.dtype,
  shape: t.shape,
  data,
});
