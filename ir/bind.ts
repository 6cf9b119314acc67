/** Giving symbols their values: concrete types, sizes in bytes, and the symbols that concrete shapes imply. */
import { type Dim, type DimSymbol, dimSymbols, dimText, evalDim, multipleOf } from "./dim.ts";
import { UserError } from "./error.ts";
import type { Cost, Datum } from "./op.ts";
import type { Tensor } from "./tensor.ts";
import { dtypeBytes, type TensorType, type Type, typeText } from "./type.ts";

export type Symbols = ReadonlyMap<string, number>;

export interface ConcreteTensor extends TensorType {
  readonly shape: readonly number[];
}

/** The type with numbers for dims. */
export const concrete = (t: TensorType, symbols: Symbols): ConcreteTensor => ({
  ...t,
  shape: t.shape.map((d) => evalDim(d, symbols)),
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
  for (const s of symbols) if (s.is !== undefined && !all.has(s.name)) all.set(s.name, evalDim(s.is, all));
  return all;
};

const dimOf = (d: Dim, size: number, symbols: Map<string, number>): boolean => {
  const names = dimSymbols(d).filter((s) => !symbols.has(s));
  if (names.length === 0) return evalDim(d, symbols) === size;
  const name = names[0] as string;
  const factor = names.length === 1 ? multipleOf(d, name) : undefined;
  if (factor === undefined) return true;
  if (size % factor !== 0) return false;
  symbols.set(name, size / factor);
  return true;
};

/**
 * The symbols that shapes imply, added to those given: a dim `T` or `3*T` against a size settles T; other expressions are checked once
 * their symbols are known. Throws a UserError naming the value whose shape, dtype or rank does not fit.
 */
export const bindSymbols = (
  pairs: readonly { readonly name: string; readonly type: Type; readonly datum: Datum }[],
  given: Symbols = new Map(),
): Symbols => {
  const symbols = new Map(given);
  const misfit = (name: string, type: Type, got: string): never => {
    throw new UserError(`'${name}' should be ${typeText(type)}${symbolText(type, symbols)}, got ${got}`);
  };
  // twice: the second time checks the expressions whose symbols a later value settled
  for (let pass = 0; pass < 2; pass++)
    for (const { name, type, datum } of pairs) {
      if (type.kind !== datum.kind) misfit(name, type, datum.kind === "kv" ? "a state" : "a tensor");
      if (type.kind === "kv" || datum.kind === "kv") continue;
      const got = (): string => typeText({ kind: "tensor", dtype: datum.dtype, shape: datum.shape });
      if (type.dtype !== datum.dtype || type.shape.length !== datum.shape.length) misfit(name, type, got());
      type.shape.forEach((d, i) => {
        if (!dimOf(d, datum.shape[i] as number, symbols)) misfit(name, type, got());
      });
    }
  return symbols;
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
