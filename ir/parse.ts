/**
 * Reads the textual form of a graph (see print.ts). Whitespace and line ends separate, `;` starts a comment. There are no reserved words:
 * `input f32[T] = ...` defines a value named input. Types of results may be left out; those given are checked.
 */
import {
  createToken,
  EmbeddedActionsParser,
  EOF,
  type IParserErrorMessageProvider,
  type IToken,
  Lexer,
  type TokenType,
} from "chevrotain";
import type { Attr, Attrs } from "./attr.ts";
import { type Dim, type DimSymbol, parseDim } from "./dim.ts";
import { UserError } from "./error.ts";
import {
  type Graph,
  isStored,
  type Op,
  type Place,
  type Slice,
  type StoredSource,
  type Value,
  type Weight,
  type WeightSource,
} from "./graph.ts";
import { inferTypes, nearestWord } from "./ops/index.ts";
import { type DType, dtypes, type KvType, sameType, type Type, tensor, typeText } from "./type.ts";
import { verify, verifySource, verifySymbols, verifyType } from "./verify.ts";

const token = (name: string, pattern: RegExp | string, label: string): TokenType =>
  createToken({ name, pattern, label, line_breaks: false });

const Blank = createToken({ name: "Blank", pattern: /[ \t\r\n]+/, group: Lexer.SKIPPED, line_breaks: true });
const Comment = createToken({ name: "Comment", pattern: /;[^\r\n]*/, group: Lexer.SKIPPED, line_breaks: false });
const Text = token("Text", /"(?:[^"\\\r\n]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"/, "a string");
const Word = token("Word", /[A-Za-z_][A-Za-z0-9_]*/, "a name");
const Extent = token("Extent", /\d+x\d+/, "an extent such as 128x128");
const Num = token("Num", /\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/, "a number");
const Dots = token("Dots", "..", "'..'");
const Equals = token("Equals", "=", "'='");
const Comma = token("Comma", ",", "','");
const Colon = token("Colon", ":", "':'");
const At = token("At", "@", "'@'");
const Open = token("Open", "(", "'('");
const Close = token("Close", ")", "')'");
const OpenSquare = token("OpenSquare", "[", "'['");
const CloseSquare = token("CloseSquare", "]", "']'");
const OpenBrace = token("OpenBrace", "{", "'{'");
const CloseBrace = token("CloseBrace", "}", "'}'");
const Less = token("Less", "<", "'<'");
const Greater = token("Greater", ">", "'>'");
const Plus = token("Plus", "+", "'+'");
const Minus = token("Minus", "-", "'-'");
const Star = token("Star", "*", "'*'");
const Slash = token("Slash", "/", "'/'");
const brackets = [Open, Close, OpenSquare, CloseSquare, OpenBrace, CloseBrace];
const punctuation = [Equals, Comma, Colon, At, ...brackets, Less, Greater, Plus, Minus, Star, Slash];
const tokens = [Blank, Comment, Text, Word, Extent, Num, Dots, ...punctuation];
const lexer = new Lexer(tokens, { ensureOptimizations: true, positionTracking: "full" });

/** What the parser makes: the graph with names for values and tokens for blame. */
interface RawValue {
  readonly name: IToken;
  readonly type: Type | undefined;
}
interface RawOp {
  readonly results: readonly RawValue[];
  readonly kind: IToken;
  readonly inputs: readonly IToken[];
  readonly attrs: Attrs;
  readonly place: string | undefined;
  readonly origin: string | undefined;
  readonly body: RawGraph | undefined;
}
interface RawGraph {
  readonly name: IToken;
  readonly symbols: { readonly at: IToken; readonly symbol: DimSymbol }[];
  readonly inputs: RawValue[];
  readonly states: RawValue[];
  readonly weights: { readonly value: RawValue; readonly source: WeightSource }[];
  readonly ops: RawOp[];
  readonly outputs: IToken[];
}

const found = (t: IToken): string =>
  t.tokenType === EOF || t.tokenType === undefined ? "the end of the text" : `'${t.image.slice(0, 40)}'`;

const messages: IParserErrorMessageProvider = {
  buildMismatchTokenMessage: ({ expected, actual }) => `expected ${expected.LABEL ?? expected.name}, found ${found(actual)}`,
  buildNotAllInputParsedMessage: ({ firstRedundant }) => `expected the end of the text, found ${found(firstRedundant)}`,
  buildNoViableAltMessage: ({ expectedPathsPerAlt, actual }) => {
    const labels = expectedPathsPerAlt.flatMap((alt) => alt.map((path) => path[0]?.LABEL ?? path[0]?.name ?? ""));
    return `expected ${[...new Set(labels)].join(" or ")}, found ${found(actual[0] as IToken)}`;
  },
  buildEarlyExitMessage: ({ expectedIterationPaths, actual }) =>
    `expected ${[...new Set(expectedIterationPaths.map((p) => p[0]?.LABEL ?? ""))].join(" or ")}, found ${found(actual[0] as IToken)}`,
};

/** An error with the token it is about; `parseGraph` adds file, line and column. */
class Blame extends Error {
  readonly token: IToken;
  constructor(message: string, at: IToken) {
    super(message);
    this.token = at;
  }
}

const declarations = ["graph", "symbol", "input", "weight", "state", "output"] as const;

const stringOf = (t: IToken): string => {
  try {
    return JSON.parse(t.image) as string;
  } catch {
    throw new Blame("a string holds a control character; write it as \\u and four digits", t);
  }
};
const integerOf = (t: IToken): number => {
  const n = Number(t.image);
  if (!Number.isSafeInteger(n)) throw new Blame(`expected a whole number, found '${t.image}'`, t);
  return n;
};
const extentOf = (t: IToken): readonly [number, number] => {
  const [a, b] = t.image.split("x").map(Number) as [number, number];
  if (!Number.isSafeInteger(a) || !Number.isSafeInteger(b)) throw new Blame(`'${t.image.slice(0, 40)}' is too large`, t);
  return [a, b];
};
const dtypeOf = (t: IToken): DType => {
  const dtype = dtypes.find((d) => d === t.image);
  if (dtype === undefined) throw new Blame(`expected a dtype (${dtypes.join(", ")}), found '${t.image.slice(0, 40)}'`, t);
  return dtype;
};

/** Longer ones are nothing a person or a pass writes, and multiplying them out takes long. */
const dimLimit = 200;
const dimOf = (text: string, at: IToken): Dim => {
  if (text.length > dimLimit) throw new Blame(`a dimension is longer than ${dimLimit} characters`, at);
  try {
    return parseDim(text);
  } catch (error) {
    throw new Blame((error as Error).message, at);
  }
};

class GraphParser extends EmbeddedActionsParser {
  constructor() {
    super(tokens, { maxLookahead: 1, errorMessageProvider: messages, recoveryEnabled: false, skipValidations: false });
    this.performSelfAnalysis();
  }

  /** Is the next statement such a declaration? Its word is also a good name for a value, which an '=', ',' or a type follows. */
  private declares(word: (typeof declarations)[number]): boolean {
    if (this.LA(1).image !== word) return false;
    const [second, third] = [this.LA(2).tokenType, this.LA(3).tokenType];
    if (second === Equals || second === Comma) return false;
    return second !== Word || (third !== OpenSquare && third !== Less);
  }

  /** Takes a certain word. */
  private keyword(index: number, ...words: readonly string[]): IToken {
    const t = this.consume(index, Word);
    this.ACTION(() => {
      if (!words.includes(t.image)) throw new Blame(`expected ${words.map((w) => `'${w}'`).join(" or ")}, found ${found(t)}`, t);
    });
    return t;
  }

  readonly graph: () => RawGraph = this.RULE("graph", (): RawGraph => {
    this.keyword(1, "graph");
    const name = this.CONSUME2(Word);
    const g: RawGraph = { name, symbols: [], inputs: [], states: [], weights: [], ops: [], outputs: [] };
    this.MANY(() => {
      this.OR({
        DEF: [
          { GATE: () => this.declares("symbol"), ALT: () => g.symbols.push(this.SUBRULE(this.symbol)) },
          { GATE: () => this.declares("input"), ALT: () => g.inputs.push(this.SUBRULE(this.argument)) },
          { GATE: () => this.declares("state"), ALT: () => g.states.push(this.SUBRULE(this.state)) },
          { GATE: () => this.declares("weight"), ALT: () => g.weights.push(this.SUBRULE(this.weight)) },
          { GATE: () => this.declares("output"), ALT: () => g.outputs.push(this.SUBRULE(this.output)) },
          { ALT: () => g.ops.push(this.SUBRULE(this.op)) },
        ],
        IGNORE_AMBIGUITIES: true,
      });
    });
    return g;
  });

  private readonly symbol = this.RULE("symbol", (): { at: IToken; symbol: DimSymbol } => {
    this.keyword(1, "symbol");
    const name = this.CONSUME2(Word);
    const min = this.CONSUME1(Num);
    this.CONSUME(Dots);
    const max = this.CONSUME2(Num);
    const multiple = this.OPTION({
      GATE: () => this.LA(1).image === "multiple",
      DEF: () => {
        this.CONSUME3(Word);
        return this.CONSUME3(Num);
      },
    });
    const source = this.keyword(4, "host", "device");
    const is = this.OPTION2({
      GATE: () => this.LA(1).image === "is",
      DEF: () => {
        this.CONSUME5(Word);
        return this.SUBRULE(this.dim);
      },
    });
    return this.ACTION(() => ({
      at: name,
      symbol: {
        name: name.image,
        min: integerOf(min),
        max: integerOf(max),
        multiple: multiple === undefined ? 1 : integerOf(multiple),
        source: source.image as DimSymbol["source"],
        ...(is === undefined ? {} : { is: dimOf(is, name) }),
      },
    }));
  });

  private readonly argument = this.RULE("argument", (): RawValue => {
    this.keyword(1, "input");
    return { name: this.CONSUME2(Word), type: this.SUBRULE(this.type) };
  });

  private readonly state = this.RULE("state", (): RawValue => {
    this.keyword(1, "state");
    return { name: this.CONSUME2(Word), type: this.SUBRULE(this.type) };
  });

  private readonly output = this.RULE("output", (): IToken => {
    this.keyword(1, "output");
    return this.CONSUME2(Word);
  });

  private readonly weight = this.RULE("weight", (): { value: RawValue; source: WeightSource } => {
    this.keyword(1, "weight");
    const value = { name: this.CONSUME2(Word), type: this.SUBRULE(this.type) };
    this.CONSUME(Equals);
    return { value, source: this.SUBRULE(this.source) };
  });

  private readonly op = this.RULE("op", (): RawOp => {
    const results: RawValue[] = [];
    this.AT_LEAST_ONE_SEP({
      SEP: Comma,
      DEF: () => {
        const name = this.CONSUME1(Word);
        const type = this.OPTION1(() => this.SUBRULE(this.type));
        results.push({ name, type });
      },
    });
    this.CONSUME(Equals);
    const kind = this.CONSUME2(Word);
    const inputs: IToken[] = [];
    this.CONSUME(Open);
    this.MANY_SEP({ SEP: Comma, DEF: () => inputs.push(this.CONSUME3(Word)) });
    this.CONSUME(Close);
    const attrs = this.OPTION2({
      GATE: () => this.LA(2).tokenType === CloseBrace || this.LA(3).tokenType === Colon,
      DEF: () => this.SUBRULE(this.attrs),
    });
    const place = this.OPTION3(() => {
      this.CONSUME(At);
      return this.CONSUME4(Word).image;
    });
    const origin = this.OPTION4({
      GATE: () =>
        this.LA(1).image === "from" &&
        this.LA(2).tokenType !== Equals &&
        this.LA(2).tokenType !== Comma &&
        this.LA(2).tokenType !== Word,
      DEF: () => {
        this.CONSUME5(Word);
        const text = this.CONSUME(Text);
        return this.ACTION(() => stringOf(text));
      },
    });
    const body = this.OPTION5(() => {
      this.CONSUME(OpenBrace);
      const g = this.SUBRULE(this.graph);
      this.CONSUME(CloseBrace);
      return g;
    });
    return { results, kind, inputs, attrs: attrs ?? {}, place, origin, body };
  });

  readonly type: () => Type = this.RULE("type", (): Type => {
    const word = this.CONSUME1(Word);
    return this.OR([
      {
        ALT: () => {
          const shape: Dim[] = [];
          this.CONSUME(OpenSquare);
          this.MANY_SEP({
            SEP: Comma,
            DEF: () => {
              const at = this.LA(1);
              const text = this.SUBRULE(this.dim);
              this.ACTION(() => shape.push(dimOf(text, at)));
            },
          });
          this.CONSUME(CloseSquare);
          return this.ACTION((): Type => tensor(dtypeOf(word), shape));
        },
      },
      {
        ALT: () => {
          this.CONSUME(Less);
          const dtype = this.CONSUME2(Word);
          this.CONSUME(Comma);
          const extent = this.CONSUME(Extent);
          this.CONSUME(Greater);
          return this.ACTION((): Type => {
            if (word.image !== "kv") throw new Blame(`expected 'kv', found ${found(word)}`, word);
            const kinds: readonly KvType["dtype"][] = ["bf16", "f32", "e4m3", "i8"];
            const kind = kinds.find((d) => d === dtype.image);
            if (kind === undefined) throw new Blame(`expected ${kinds.join(", ")}, found ${found(dtype)}`, dtype);
            const [heads, dim] = extentOf(extent);
            return { kind: "kv", dtype: kind, heads, dim };
          });
        },
      },
    ]);
  });

  /** The text of a dimension; dim.ts reads it. */
  private readonly dim = this.RULE("dim", (): string => {
    const parts: string[] = [];
    this.OPTION(() => parts.push(this.CONSUME1(Minus).image));
    parts.push(this.SUBRULE1(this.atom));
    this.MANY(() => {
      parts.push(
        this.OR([
          { ALT: () => this.CONSUME(Plus).image },
          { ALT: () => this.CONSUME2(Minus).image },
          { ALT: () => this.CONSUME(Star).image },
          { ALT: () => this.CONSUME(Slash).image },
        ]),
      );
      parts.push(this.SUBRULE2(this.atom));
    });
    return this.ACTION(() => parts.join(""));
  });

  private readonly atom = this.RULE("atom", (): string =>
    this.OR([
      { ALT: () => this.CONSUME(Num).image },
      { ALT: () => this.CONSUME(Word).image },
      {
        ALT: () => {
          this.CONSUME(Open);
          const inner = this.SUBRULE(this.dim);
          this.CONSUME(Close);
          return `(${inner})`;
        },
      },
    ]),
  );

  private readonly attrs = this.RULE("attrs", (): Attrs => {
    const entries: [IToken, Attr][] = [];
    this.CONSUME(OpenBrace);
    this.MANY_SEP({
      SEP: Comma,
      DEF: () => {
        const name = this.CONSUME(Word);
        this.CONSUME(Colon);
        entries.push([name, this.SUBRULE(this.attr)]);
      },
    });
    this.CONSUME(CloseBrace);
    return this.ACTION(() => {
      entries.forEach(([name], i) => {
        if (entries.some(([other], j) => j < i && other.image === name.image))
          throw new Blame(`attribute '${name.image}' is given twice`, name);
      });
      return Object.fromEntries(entries.map(([name, value]) => [name.image, value]));
    });
  });

  private readonly attr = this.RULE(
    "attr",
    (): Attr =>
      this.OR([
        { ALT: () => this.SUBRULE(this.scalar) },
        {
          ALT: () => {
            const items: (number | string | boolean)[] = [];
            const open = this.CONSUME(OpenSquare);
            this.MANY_SEP({ SEP: Comma, DEF: () => items.push(this.SUBRULE2(this.scalar)) });
            this.CONSUME(CloseSquare);
            return this.ACTION((): Attr => {
              if (items.every((x) => typeof x === "number")) return items as number[];
              if (items.every((x) => typeof x === "string")) return items as string[];
              throw new Blame("a list holds numbers or strings, not both", open);
            });
          },
        },
      ]),
  );

  private readonly scalar = this.RULE("scalar", (): number | string | boolean =>
    this.OR([
      {
        ALT: () => {
          const text = this.CONSUME(Text);
          return this.ACTION(() => stringOf(text));
        },
      },
      {
        GATE: () => !["inf", "nan"].includes(this.LA(1).image),
        ALT: () => {
          const word = this.CONSUME(Word).image;
          return word === "true" ? true : word === "false" ? false : word;
        },
      },
      { ALT: () => this.SUBRULE(this.number) },
    ]),
  );

  private readonly number = this.RULE("number", (): number => {
    const sign = this.OPTION(() => this.CONSUME(Minus)) === undefined ? 1 : -1;
    return this.OR([
      { ALT: () => sign * Number(this.CONSUME(Num).image) },
      { ALT: () => sign * (this.keyword(1, "inf", "nan").image === "inf" ? Number.POSITIVE_INFINITY : Number.NaN) },
    ]);
  });

  private readonly source = this.RULE(
    "source",
    (): WeightSource =>
      this.OR({
        DEF: [
          {
            GATE: () => this.LA(1).image === "tensor",
            ALT: () => {
              this.CONSUME1(Word);
              const name = this.CONSUME1(Text);
              const slice = this.OPTION1(() => this.SUBRULE1(this.slice));
              return this.ACTION((): WeightSource => ({ kind: "tensor", tensor: stringOf(name), ...(slice ? { slice } : {}) }));
            },
          },
          {
            GATE: () => this.LA(1).image === "dequantised",
            ALT: () => {
              this.CONSUME2(Word);
              const name = this.CONSUME2(Text);
              this.keyword(3, "scales");
              const scales = this.CONSUME3(Text);
              this.keyword(4, "block");
              const block = this.CONSUME1(Extent);
              const slice = this.OPTION2(() => this.SUBRULE2(this.slice));
              return this.ACTION(
                (): WeightSource => ({
                  kind: "dequantised",
                  tensor: stringOf(name),
                  scales: stringOf(scales),
                  block: extentOf(block),
                  ...(slice ? { slice } : {}),
                }),
              );
            },
          },
          {
            GATE: () => ["codes", "scales"].includes(this.LA(1).image),
            ALT: () => {
              const kind = this.CONSUME5(Word);
              const to = this.CONSUME6(Word);
              this.keyword(7, "block");
              const block = this.CONSUME2(Extent);
              this.keyword(8, "of");
              this.CONSUME(Open);
              const of = this.SUBRULE(this.source);
              this.CONSUME(Close);
              const slice = this.OPTION3(() => this.SUBRULE3(this.slice));
              return this.ACTION(
                (): WeightSource => ({
                  kind: kind.image as "codes" | "scales",
                  of,
                  to: dtypeOf(to),
                  block: extentOf(block),
                  ...(slice ? { slice } : {}),
                }),
              );
            },
          },
          {
            GATE: () => this.LA(1).image === "rope",
            ALT: () => {
              this.CONSUME9(Word);
              this.keyword(10, "theta");
              const theta = this.SUBRULE1(this.number);
              this.keyword(11, "positions");
              const positions = this.CONSUME1(Num);
              this.keyword(12, "dim");
              const dim = this.CONSUME2(Num);
              return this.ACTION(
                (): WeightSource => ({ kind: "rope", theta, positions: integerOf(positions), dim: integerOf(dim) }),
              );
            },
          },
          {
            GATE: () => this.LA(1).image === "stacked",
            ALT: () => {
              const of: WeightSource[] = [];
              const word = this.keyword(14, "stacked");
              this.CONSUME2(Open);
              this.AT_LEAST_ONE_SEP({ SEP: Comma, DEF: () => of.push(this.SUBRULE5(this.source)) });
              this.CONSUME2(Close);
              return this.ACTION((): WeightSource => {
                const other = of.find((s) => !isStored(s));
                if (other) throw new Blame(`matrices of a stack are read from tensors, not ${other.kind}`, word);
                return { kind: "stacked", of: of as StoredSource[] };
              });
            },
          },
          {
            ALT: () => {
              const values: number[] = [];
              this.CONSUME(OpenSquare);
              this.MANY_SEP({ SEP: Comma, DEF: () => values.push(this.SUBRULE2(this.number)) });
              this.CONSUME(CloseSquare);
              return { kind: "literal", values } as WeightSource;
            },
          },
          {
            ALT: () => {
              this.keyword(13, "tensor", "dequantised", "codes", "scales", "stacked", "rope");
              return { kind: "literal", values: [] } as WeightSource;
            },
          },
        ],
        IGNORE_AMBIGUITIES: true,
      }),
  );

  private readonly slice = this.RULE("slice", (): Slice => {
    const ranges: [IToken, IToken][] = [];
    this.CONSUME(OpenSquare);
    this.MANY_SEP({
      SEP: Comma,
      DEF: () => {
        const from = this.CONSUME1(Num);
        this.CONSUME(Colon);
        ranges.push([from, this.CONSUME2(Num)]);
      },
    });
    this.CONSUME(CloseSquare);
    return this.ACTION(() => ranges.map(([from, to]) => [integerOf(from), integerOf(to)] as const));
  });
}

// Chevrotain analyses a grammar once, at construction; a parser keeps nothing from one input to the next.
const parser = new GraphParser();

const depthLimit = 64;

/** The first bracket that opens deeper than anything sensible: what recursion below this would overflow on. */
const tooDeep = (all: readonly IToken[]): IToken | undefined => {
  let depth = 0;
  for (const t of all) {
    if (t.tokenType === Open || t.tokenType === OpenSquare || t.tokenType === OpenBrace) depth++;
    else if (t.tokenType === Close || t.tokenType === CloseSquare || t.tokenType === CloseBrace) depth--;
    if (depth > depthLimit) return t;
  }
  return undefined;
};

/** The type that a text such as `bf16[T,256]` or `kv<bf16,1x256>` names, dims in canonical form; a UserError when it is none. */
export const parseType = (text: string): Type => {
  const { tokens: all, errors } = lexer.tokenize(text);
  if (errors.length > 0) throw new UserError(`'${text.slice(0, 80)}' is not a type`);
  const deep = tooDeep(all);
  if (deep) throw new UserError(`brackets are nested more than ${depthLimit} deep`);
  try {
    parser.input = all;
    const type = parser.type();
    const [error] = parser.errors;
    if (error !== undefined) throw new UserError(error.message);
    return type;
  } catch (error) {
    throw error instanceof Blame ? new UserError(error.message) : error;
  }
};

/**
 * The graph of a text; verified. Errors are UserErrors that start with `file:line:column`. With `file`, ops that have no `from`
 * get its name and their line as origin.
 */
export const parseGraph = (text: string, file?: string): Graph => {
  const where = (line: number, column: number): string => `${file ?? "<text>"}:${line}:${column}`;
  const fail = (message: string, t: IToken | undefined): never => {
    // the token at the end of the text has no position
    if (t?.startLine !== undefined && t.startLine > 0)
      throw new UserError(`${where(t.startLine, t.startColumn ?? 1)}: ${message}`);
    const before = text.trimEnd().split(/\r\n|\r|\n/);
    throw new UserError(`${where(before.length, (before.at(-1) as string).length + 1)}: ${message}`);
  };
  const { tokens: all, errors } = lexer.tokenize(text);
  const [wrong] = errors;
  if (wrong !== undefined) {
    const c = text[wrong.offset];
    const what =
      c === '"' ? "a string that does not end on its line, or has a bad escape" : `unexpected character ${JSON.stringify(c)}`;
    throw new UserError(`${where(wrong.line ?? 1, wrong.column ?? 1)}: ${what}`);
  }
  const deep = tooDeep(all);
  if (deep) fail(`brackets are nested more than ${depthLimit} deep`, deep);
  try {
    parser.input = all;
    const raw = parser.graph();
    const [error] = parser.errors;
    if (error !== undefined) fail(error.message, error.token);
    return new Assembly(file, (t) => where(t.startLine ?? 1, t.startColumn ?? 1)).whole(raw);
  } catch (error) {
    if (error instanceof Blame) return fail(error.message, error.token);
    throw error;
  }
};

/** Puts values in the place of names. */
class Assembly {
  private readonly file: string | undefined;
  private readonly where: (t: IToken) => string;
  private readonly places = new Map<Op, string>();

  constructor(file: string | undefined, where: (t: IToken) => string) {
    this.file = file;
    this.where = where;
  }

  whole(raw: RawGraph): Graph {
    const g = this.graph(raw, undefined);
    // what an op is blamed for carries its place; the rest is about the whole
    const locate = (op: Op): string | undefined => this.places.get(op);
    try {
      verify(g, locate);
    } catch (error) {
      const located = error instanceof UserError && [...this.places.values()].some((p) => error.message.startsWith(`${p}: `));
      if (error instanceof UserError && !located) throw new UserError(`${this.file ?? "<text>"}: ${error.message}`);
      throw error;
    }
    return g;
  }

  private graph(raw: RawGraph, outer: readonly DimSymbol[] | undefined): Graph {
    if (outer !== undefined)
      for (const s of raw.symbols) throw new Blame("a body has the symbols of the graph around it; it declares none", s.at);
    const symbols = outer ?? raw.symbols.map((s) => s.symbol);
    verifySymbols(symbols, (message, symbol) => {
      throw new Blame(message, raw.symbols.findLast((s) => s.symbol === symbol)?.at ?? raw.name);
    });
    const values = new Map<string, Value>();
    const dims = new Set<Dim>();
    const define = <T extends Type>({ name }: RawValue, type: T): Value & { readonly type: T } => {
      if (values.has(name.image)) throw new Blame(`the name '${name.image}' is defined twice`, name);
      const value = { name: name.image, type };
      verifyType(value, symbols, dims, (message) => {
        throw new Blame(message, name);
      });
      values.set(value.name, value);
      return value;
    };
    const use = (t: IToken): Value => {
      const value = values.get(t.image);
      if (value !== undefined) return value;
      const near = nearestWord(t.image, [...values.keys()]);
      throw new Blame(`'${t.image}' is not defined here${near === undefined ? "" : `; the nearest name is '${near}'`}`, t);
    };
    const inputs = raw.inputs.map((v) => define(v, v.type as Type));
    const weights = raw.weights.map(({ value, source }): Weight => {
      if (value.type?.kind !== "tensor") throw new Blame(`weight '${value.name.image}' must be a tensor`, value.name);
      const made = define(value, value.type);
      verifySource(made, source, (message) => {
        throw new Blame(message, value.name);
      });
      return { value: made, source };
    });
    const states = raw.states.map((v) => {
      if (v.type?.kind !== "kv") throw new Blame(`state '${v.name.image}' must be kv<...>`, v.name);
      return define(v, v.type);
    });
    if (outer !== undefined)
      for (const { name } of [...raw.weights.map((w) => w.value), ...raw.states])
        throw new Blame("a body has no weights and no states; they are inputs of it", name);
    const ops: Op[] = [];
    for (const op of raw.ops) {
      const operands = op.inputs.map(use);
      const body = op.body === undefined ? undefined : this.graph(op.body, symbols);
      const outputs = this.results(op, operands, body).map((type, i) => define(op.results[i] as RawValue, type));
      const line = op.kind.startLine ?? 0;
      const origin = op.origin ?? (this.file === undefined || outer !== undefined ? undefined : `${baseName(this.file)}:${line}`);
      const made: Op = {
        kind: op.kind.image,
        inputs: operands,
        attrs: op.attrs,
        outputs,
        ...(body === undefined ? {} : { body }),
        ...(op.place === undefined ? {} : { place: op.place as Place }),
        ...(origin === undefined ? {} : { origin }),
      };
      this.places.set(made, this.where(op.kind));
      ops.push(made);
    }
    return { name: raw.name.image, symbols, inputs, states, weights, ops, outputs: raw.outputs.map(use) };
  }

  /** The types of an op's results; those in the text must be the same. */
  private results(op: RawOp, operands: readonly Value[], body: Graph | undefined): readonly Type[] {
    let types: readonly Type[];
    try {
      types = inferTypes(
        op.kind.image,
        operands.map((v) => v.type),
        op.attrs,
        body,
      );
    } catch (error) {
      throw error instanceof UserError ? new Blame(error.message, op.kind) : error;
    }
    if (types.length !== op.results.length)
      throw new Blame(`${op.kind.image}: gives ${types.length} results, ${op.results.length} named`, op.kind);
    types.forEach((type, i) => {
      const { name, type: given } = op.results[i] as RawValue;
      if (given !== undefined && !sameType(given, type))
        throw new Blame(`'${name.image}' should be ${typeText(type)}, is declared ${typeText(given)}`, name);
    });
    return types;
  }
}

const baseName = (file: string): string => file.slice(Math.max(file.lastIndexOf("/"), file.lastIndexOf("\\")) + 1);
