/** Sizes of tensors in texts of the C family: numbers, and expressions over the values that the graph's symbols have in a launch. */
import { type Dim, dimSymbols, mostOf, tokenSymbol } from "../ir/dim.ts";
import type { Target } from "./backend.ts";

/** Spells sizes for one kernel and remembers what they need. A symbol's value is a variable, numbered as the graph's symbols are. */
export class Sizes {
  private readonly target: Target;
  private readonly found = new Map<string, { readonly name: string; readonly value: string }>();

  constructor(target: Target) {
    this.target = target;
  }

  /** A number, a variable, or an expression in parentheses. */
  text(d: Dim): string {
    if (typeof d === "number") return String(d);
    for (const symbol of dimSymbols(d)) this.variable(symbol);
    const text = d.replace(/[A-Za-z_]\w*/g, (symbol) => this.variable(symbol)).replace(/[-+*/]/g, " $& ");
    return /^\w+$/.test(text) ? text : `(${text.trim()})`;
  }

  /** The same without the parentheses, for an argument of a function. */
  argument(d: Dim): string {
    return this.text(d).replace(/^\((.*)\)$/, "$1");
  }

  private variable(symbol: string): string {
    const known = this.found.get(symbol);
    if (known !== undefined) return known.name;
    const place = this.target.symbols.findIndex((s) => s.name === symbol);
    if (place < 0) throw new Error(`size '${symbol}' is no symbol of the graph`);
    const isToken = symbol === tokenSymbol;
    const made = isToken ? { name: "tokens", value: "all_tokens(c)" } : { name: `d${place}`, value: `size_of(c, ${place})` };
    this.found.set(symbol, made);
    return made.name;
  }

  /** What a size never exceeds. */
  largest(d: Dim): number {
    return Math.max(0, mostOf(d, this.target.symbols));
  }

  /** `const int64_t d0 = size_of(c, 0);` for each symbol that a text had */
  get variables(): readonly { readonly name: string; readonly value: string }[] {
    return [...this.found.values()];
  }

  /** The symbols that only the host knows the values of. */
  get symbols(): readonly string[] {
    return [...this.found.keys()].filter((s) => s !== tokenSymbol);
  }
}
