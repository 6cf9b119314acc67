import { UserError } from "./error.ts";

/**
 * Dimensions. A dim is a non-negative integer, or the canonical text of an integer expression over declared symbols:
 * sums of products with integer coefficients, and floor division by a positive constant, such as `3*T`, `T+1` or `(T+127)/128`.
 * Two dims are equal when their canonical forms are, so `===` compares them and JSON stores them as they are.
 */
export type Dim = number | string;

/** The symbol of the token axis: kernels find the rows of each segment in its header, and only they travel between ranks. */
export const tokenSymbol = "T";

/** A declared size. `source` says who knows it at run time; allocation uses `max`. */
export interface DimSymbol {
  readonly name: string;
  readonly min: number;
  readonly max: number;
  readonly multiple: number;
  readonly source: "host" | "device";
  /** its value, where other symbols define it */
  readonly is?: Dim;
}

/** coefficient by monomial; a monomial is its sorted atoms joined by `*`, the constant term is the empty monomial */
type Polynomial = ReadonlyMap<string, number>;

export const dimText = (d: Dim): string => String(d);

const constant = (n: number): Polynomial => new Map(n === 0 ? [] : [["", n]]);

const plus = (a: Polynomial, b: Polynomial, sign: 1 | -1): Polynomial => {
  const sum = new Map(a);
  for (const [monomial, coefficient] of b) {
    const c = (sum.get(monomial) ?? 0) + sign * coefficient;
    if (c === 0) sum.delete(monomial);
    else sum.set(monomial, c);
  }
  return sum;
};

/** Products of sums grow fast. */
const mostTerms = 1000;

const times = (a: Polynomial, b: Polynomial): Polynomial => {
  const product = new Map<string, number>();
  for (const [ma, ca] of a)
    for (const [mb, cb] of b) {
      const monomial = [...splitAtoms(ma), ...splitAtoms(mb)].sort().join("*");
      const c = (product.get(monomial) ?? 0) + ca * cb;
      if (c === 0) product.delete(monomial);
      else product.set(monomial, c);
      if (product.size > mostTerms) throw new UserError(`a size is a sum of more than ${mostTerms} products`);
    }
  return product;
};

/** Splits a monomial at the `*` outside parentheses. */
const splitAtoms = (monomial: string): string[] => {
  const atoms: string[] = [];
  let depth = 0;
  let atom = "";
  for (const ch of monomial) {
    if (ch === "(") depth++;
    if (ch === ")") depth--;
    if (ch === "*" && depth === 0) {
      atoms.push(atom);
      atom = "";
    } else atom += ch;
  }
  if (atom !== "") atoms.push(atom);
  return atoms;
};

const render = (p: Polynomial): Dim => {
  const constantTerm = p.get("") ?? 0;
  const monomials = [...p.keys()].filter((m) => m !== "").sort();
  if (monomials.length === 0) return constantTerm;
  for (const c of p.values()) if (!Number.isSafeInteger(c)) throw new UserError("a size has a factor beyond 2^53");
  let text = "";
  for (const m of monomials) {
    const c = p.get(m) as number;
    // a quotient is in parentheses where it does not come first: what is before it is not divided
    const factors = [...(Math.abs(c) === 1 ? [] : [String(Math.abs(c))]), ...splitAtoms(m)];
    const magnitude = factors.map((f, i) => (i > 0 && f.startsWith("(") ? `(${f})` : f)).join("*");
    text += c < 0 ? `-${magnitude}` : `${text === "" ? "" : "+"}${magnitude}`;
  }
  if (constantTerm !== 0) text += constantTerm < 0 ? String(constantTerm) : `+${constantTerm}`;
  return text;
};

const divide = (p: Polynomial, by: number): Polynomial => {
  const whole = new Map<string, number>();
  const rest = new Map<string, number>();
  for (const [m, c] of p) {
    const q = m === "" ? Math.floor(c / by) : c % by === 0 ? c / by : 0;
    const r = c - q * by;
    if (q !== 0) whole.set(m, q);
    if (r !== 0) rest.set(m, r);
  }
  const left = [...rest.keys()].some((m) => m !== "");
  return left ? plus(whole, new Map([[`(${render(rest)})/${by}`, 1]]), 1) : whole;
};

class DimReader {
  private at = 0;
  private readonly text: string;
  constructor(text: string) {
    this.text = text;
  }
  read(): Polynomial {
    const p = this.sum();
    if (this.at !== this.text.length) this.fail();
    return p;
  }
  private fail(): never {
    throw new Error(`dimension '${this.text}': unexpected '${this.text.slice(this.at, this.at + 1)}' at ${this.at}`);
  }
  private take(ch: string): boolean {
    if (this.text[this.at] !== ch) return false;
    this.at++;
    return true;
  }
  private sum(): Polynomial {
    let p = this.take("-") ? plus(constant(0), this.product(), -1) : this.product();
    for (;;) {
      if (this.take("+")) p = plus(p, this.product(), 1);
      else if (this.take("-")) p = plus(p, this.product(), -1);
      else return p;
    }
  }
  private product(): Polynomial {
    let p = this.atom();
    for (;;) {
      if (this.take("*")) p = times(p, this.atom());
      else if (this.take("/")) {
        const by = this.number();
        if (by <= 0) this.fail();
        p = divide(p, by);
      } else return p;
    }
  }
  private number(): number {
    const digits = /^\d+/.exec(this.text.slice(this.at))?.[0];
    if (digits === undefined) this.fail();
    this.at += digits.length;
    return Number(digits);
  }
  private atom(): Polynomial {
    if (this.take("(")) {
      const p = this.sum();
      if (!this.take(")")) this.fail();
      return p;
    }
    const name = /^[A-Za-z_]\w*/.exec(this.text.slice(this.at))?.[0];
    if (name === undefined) return constant(this.number());
    this.at += name.length;
    return new Map([[name, 1]]);
  }
}

const read = (d: Dim): Polynomial => (typeof d === "number" ? constant(d) : new DimReader(d).read());

/** Reads a dim in any spelling and gives its canonical form; throws on bad syntax. */
export const parseDim = (text: string): Dim => render(read(text.replace(/\s+/g, "")));
export const addDim = (a: Dim, b: Dim): Dim =>
  typeof a === "number" && typeof b === "number" ? a + b : render(plus(read(a), read(b), 1));
export const subDim = (a: Dim, b: Dim): Dim =>
  typeof a === "number" && typeof b === "number" ? a - b : render(plus(read(a), read(b), -1));
export const mulDim = (a: Dim, b: Dim): Dim =>
  typeof a === "number" && typeof b === "number" ? a * b : render(times(read(a), read(b)));
/** Floor division by a positive constant. */
export const divDim = (a: Dim, by: number): Dim => (typeof a === "number" ? Math.floor(a / by) : render(divide(read(a), by)));
export const ceilDivDim = (a: Dim, by: number): Dim => divDim(addDim(a, by - 1), by);
export const product = (dims: readonly Dim[]): Dim => dims.reduce(mulDim, 1);

/** The value of a dim once its symbols have values, or it has one as a whole; throws when a symbol has none. */
export const evalDim = (d: Dim, values: ReadonlyMap<string, number>): number => {
  if (typeof d === "number") return d;
  const whole = values.get(d);
  if (whole !== undefined) return whole;
  let sum = 0;
  for (const [monomial, coefficient] of read(d)) {
    let term = coefficient;
    for (const atom of splitAtoms(monomial)) {
      const quotient = quotientOf(atom);
      const value = quotient ? Math.floor(evalDim(quotient.of, values) / quotient.by) : values.get(atom);
      if (value === undefined) throw new Error(`dimension '${d}': symbol '${atom}' has no value`);
      term *= value;
    }
    sum += term;
  }
  return sum;
};

/** What a dim never exceeds, whatever its symbols are within their ranges; throws when a symbol is not declared. */
export const mostOf = (d: Dim, symbols: readonly DimSymbol[]): number => rangeOf(d, symbols)[1];

type Range = readonly [least: number, most: number];

const rangeOf = (d: Dim, symbols: readonly DimSymbol[]): Range => {
  if (typeof d === "number") return [d, d];
  let [least, most] = [0, 0];
  for (const [monomial, coefficient] of read(d)) {
    let term: Range = [coefficient, coefficient];
    for (const atom of splitAtoms(monomial)) {
      const range = atomRange(atom, symbols);
      const ends = term.flatMap((a) => range.map((b) => a * b));
      term = [Math.min(...ends), Math.max(...ends)];
    }
    least += term[0];
    most += term[1];
  }
  return [least, most];
};

const atomRange = (atom: string, symbols: readonly DimSymbol[]): Range => {
  const quotient = quotientOf(atom);
  if (quotient !== undefined) {
    const [least, most] = rangeOf(quotient.of, symbols);
    return [Math.floor(least / quotient.by), Math.floor(most / quotient.by)];
  }
  const symbol = symbols.find((s) => s.name === atom);
  if (symbol === undefined) throw new Error(`symbol '${atom}' is not declared`);
  return [symbol.min, symbol.max];
};

/** The parts of an atom that is a floor division. */
const quotientOf = (atom: string): { readonly of: string; readonly by: number } | undefined => {
  const parts = /^\((.*)\)\/(\d+)$/.exec(atom);
  return parts ? { of: parts[1] as string, by: Number(parts[2]) } : undefined;
};

/**
 * The value of the one symbol without a value that makes a dim equal to `size`; may be no whole number, or negative. Undefined when every value
 * does, or none, or when the symbol is not just multiplied and added to.
 */
export const solveDim = (d: Dim, size: number, unknown: string, values: ReadonlyMap<string, number>): number | undefined => {
  let [factor, rest] = [0, 0];
  for (const [monomial, coefficient] of read(d)) {
    const atoms = splitAtoms(monomial);
    const others = atoms.filter((atom) => atom !== unknown);
    if (atoms.length - others.length > 1 || others.some((atom) => dimSymbols(atom).includes(unknown))) return undefined;
    const value = others.reduce((n, atom) => n * evalDim(atom, values), coefficient);
    if (others.length < atoms.length) factor += value;
    else rest += value;
  }
  return factor === 0 ? undefined : (size - rest) / factor;
};

/** The names of the symbols a dim mentions. */
export const dimSymbols = (d: Dim): string[] => (typeof d === "number" ? [] : [...new Set(d.match(/[A-Za-z_]\w*/g) ?? [])]);

/** A dim as a sum: of each term the coefficient, and its factors: symbols, and quotients of a dim by a constant. */
export const dimTerms = (
  d: Dim,
): readonly {
  readonly coefficient: number;
  readonly factors: readonly (string | { readonly of: Dim; readonly by: number })[];
}[] =>
  [...read(d)].map(([monomial, coefficient]) => ({
    coefficient,
    factors: splitAtoms(monomial).map((atom) => quotientOf(atom) ?? atom),
  }));

/** The dim with dims in the place of symbols. */
export const substituteDim = (d: Dim, by: ReadonlyMap<string, Dim>): Dim => {
  if (typeof d === "number" || dimSymbols(d).every((s) => !by.has(s))) return d;
  return dimTerms(d).reduce<Dim>((sum, { coefficient, factors }) => {
    const of = (f: (typeof factors)[number]): Dim =>
      typeof f === "string" ? (by.get(f) ?? f) : divDim(substituteDim(f.of, by), f.by);
    return addDim(sum, factors.map(of).reduce(mulDim, coefficient));
  }, 0);
};

/** The constant c when a dim is c*symbol (c >= 1), else undefined: rows that come c to a token. */
export const multipleOf = (d: Dim, symbol: string): number | undefined => {
  const p = read(d);
  const c = p.get(symbol);
  return p.size === 1 && c !== undefined && c >= 1 ? c : undefined;
};
