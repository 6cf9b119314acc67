/**
 * The textual form of a schedule, for people and for tests: it prints, and a printed one parses to the same schedule, bit by bit. Whitespace
 * and line ends separate, `;` starts a comment. Ranks with equal programs are written once: `rank a1 on cpp as a0`.
 *
 *     schedule decode abi 1 wire "9f3c" slots 2
 *     dim T 0..8 by 1 host
 *     dim N 0..32 by 1 host is "4*T"
 *     exchange dense = tok e4m3[T,256] 2048 bytes, head u8[64] 64 bytes -> back bf16[T,256] 4096 bytes
 *     order dense, moe x 56, dense
 *     key 65536 a2f a0 f0 s0 tok: tok0 -> tok0
 *     rank a0 on cpp
 *     memory weights 4096 state 0 exchange 6208 scratch 4096 input 64 output 64
 *     buffer tok0 e4m3[T,256] exchange @ 0 2048 bytes s0
 *      0 launch k0_embed (embed, in0.ids) -> (tok0) rows head0 s0
 *      1 post s0 dense #0 after 0
 *      2 wait s0 #0
 *     rank f0 on cpp
 *     ...
 *      0 accept s0 #0 from a0
 *      1 launch k0_linear (tok0, w) -> (back0) rows head0 s0
 *      2 reply s0 #0 to a0 after 1
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
import { type Dim, parseDim } from "./dim.ts";
import { UserError } from "./error.ts";
import type { Buffer, ExchangeType, Field, Key, Rank, RankProgram, Schedule, Step } from "./schedule.ts";
import { type DType, dtypes } from "./type.ts";

// --- printing ------------------------------------------------------------------------------------------------------------------

/** The text of a schedule. */
export const printSchedule = (s: Schedule): string => {
  const lines = [`schedule ${nameText(s.name)} abi ${s.abi} wire ${JSON.stringify(s.wire)} slots ${s.slots}`];
  for (const d of s.symbols)
    lines.push(
      `dim ${nameText(d.name)} ${d.min}..${d.max} by ${d.multiple} ${d.source}${d.is === undefined ? "" : ` is ${JSON.stringify(String(d.is))}`}`,
    );
  for (const t of s.types) {
    const fields = (list: readonly Field[]): string => list.map(fieldText).join(", ");
    lines.push(`exchange ${nameText(t.name)} = ${fields(t.push)} -> ${fields(t.pull)}`);
  }
  if (s.exchanges.length > 0) lines.push(`order ${runs(s.exchanges)}`);
  for (const k of s.keys)
    lines.push(
      `key ${k.key} ${k.direction} a${k.a} f${k.f} s${k.slot} ${nameText(k.field)}: ${nameText(k.source)} -> ${nameText(k.target)}`,
    );
  const written = new Map<string, string>(); // program without its rank -> rank
  for (const p of s.programs) {
    const head = `rank ${p.rank.name} on ${nameText(p.rank.target)}`;
    const body = programText(p);
    const same = written.get(body);
    lines.push(same === undefined ? `${head}\n${body}` : `${head} as ${same}`);
    if (same === undefined) written.set(body, p.rank.name);
  }
  return `${lines.join("\n")}\n`;
};

const words = [
  "schedule",
  "dim",
  "exchange",
  "order",
  "key",
  "rank",
  "memory",
  "buffer",
  "launch",
  "post",
  "wait",
  "accept",
  "reply",
  "abi",
  "wire",
  "slots",
  "by",
  "bytes",
  "below",
  "x",
  "on",
  "as",
  "for",
  "inout",
  "rows",
  "after",
  "from",
  "to",
  "is",
] as const;
type WordName = (typeof words)[number];

const plainName = /^[A-Za-z_][\w.]*$/;
const nameText = (name: string): string =>
  plainName.test(name) && !(words as readonly string[]).includes(name) ? name : JSON.stringify(name);
const typeText = (dtype: DType, shape: readonly Dim[]): string => `${dtype}[${shape.join(",")}]`;
const fieldText = (f: Field): string =>
  `${nameText(f.name)} ${typeText(f.dtype, f.shape)} ${f.bytes} bytes${f.below === undefined ? "" : ` below ${f.below}`}`;

/** `dense, moe x 56, dense` */
const runs = (names: readonly string[]): string => {
  const parts: string[] = [];
  for (let i = 0; i < names.length; ) {
    let n = 1;
    while (names[i + n] === names[i]) n++;
    parts.push(`${nameText(names[i] as string)}${n > 1 ? ` x ${n}` : ""}`);
    i += n;
  }
  return parts.join(", ");
};

const programText = ({ buffers, steps, memory }: RankProgram): string => {
  const lines = [`memory ${regions.map((r) => `${r} ${memory[r]}`).join(" ")}`];
  for (const b of buffers) {
    const segments = b.segments === 1 ? "" : ` x ${b.segments}`;
    const slot = b.slot === undefined ? "" : ` s${b.slot}`;
    const binds = b.binds === undefined ? "" : ` for ${nameText(b.binds)}`;
    lines.push(
      `buffer ${nameText(b.name)} ${typeText(b.dtype, b.shape)}${segments} ${b.region} @ ${b.offset} ${b.bytes} bytes${slot}${binds}`,
    );
  }
  const width = String(steps.length - 1).length;
  for (const [at, step] of steps.entries()) lines.push(`${String(at).padStart(width + 1)} ${stepText(step)}`);
  return lines.join("\n");
};

const list = (names: readonly string[]): string => `(${names.map(nameText).join(", ")})`;

const stepText = (s: Step): string => {
  switch (s.op) {
    case "launch": {
      const inout = s.inout === undefined ? "" : ` inout ${list(s.inout)}`;
      return `launch ${nameText(s.kernel)} ${list(s.in)}${inout} -> ${list(s.out)} rows ${nameText(s.rows)} s${s.slot}`;
    }
    case "post":
      return `post s${s.slot} ${nameText(s.type)} #${s.exchange} after ${s.after}`;
    case "wait":
      return `wait s${s.slot} #${s.exchange}`;
    case "accept":
      return `accept s${s.slot} #${s.exchange} from a${s.from}`;
    case "reply":
      return `reply s${s.slot} #${s.exchange} to a${s.to} after ${s.after}`;
  }
};

// --- parsing -------------------------------------------------------------------------------------------------------------------

const regions = ["weights", "state", "exchange", "scratch", "input", "output"] as const;

const Name = createToken({ name: "Name", pattern: /[A-Za-z_][\w.]*/, label: "a name", line_breaks: false });
const token = (name: string, pattern: RegExp | string, label: string): TokenType =>
  createToken({ name, pattern, label, line_breaks: false });
const Blank = createToken({ name: "Blank", pattern: /[ \t\r\n]+/, group: Lexer.SKIPPED, line_breaks: true });
const Comment = createToken({ name: "Comment", pattern: /;[^\r\n]*/, group: Lexer.SKIPPED, line_breaks: false });
const Text = token("Text", /"(?:[^"\\\r\n]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"/, "a string");
const Type = token("Type", /[a-z]\w*\[[^\]"\r\n]*\]/, "a type such as bf16[T,256]");
const Int = token("Int", /\d+/, "a number");
const Dots = token("Dots", "..", "'..'");
const Arrow = token("Arrow", "->", "'->'");
const Equals = token("Equals", "=", "'='");
const Comma = token("Comma", ",", "','");
const Colon = token("Colon", ":", "':'");
const At = token("At", "@", "'@'");
const Hash = token("Hash", "#", "'#'");
const Open = token("Open", "(", "'('");
const Close = token("Close", ")", "')'");
// longer ones first: `by` must not take the beginning of `bytes`
const word = Object.fromEntries(
  [...words]
    .sort((a, b) => b.length - a.length)
    .map((w) => [w, createToken({ name: `Word_${w}`, pattern: w, label: `'${w}'`, longer_alt: Name, line_breaks: false })]),
) as Record<WordName, TokenType>;
const tokens = [
  Blank,
  Comment,
  Text,
  Type,
  ...Object.values(word),
  Name,
  Int,
  Dots,
  Arrow,
  Equals,
  Comma,
  Colon,
  At,
  Hash,
  Open,
  Close,
];
const lexer = new Lexer(tokens, { ensureOptimizations: true, positionTracking: "full" });

const found = (t: IToken | undefined): string =>
  t === undefined || t.tokenType === EOF ? "the end of the text" : `'${t.image.slice(0, 40)}'`;
const either = (labels: readonly (string | undefined)[]): string => [...new Set(labels)].join(" or ");

const messages: IParserErrorMessageProvider = {
  buildMismatchTokenMessage: ({ expected, actual }) => `expected ${expected.LABEL ?? expected.name}, found ${found(actual)}`,
  buildNotAllInputParsedMessage: ({ firstRedundant }) => `expected the end of the text, found ${found(firstRedundant)}`,
  buildNoViableAltMessage: ({ expectedPathsPerAlt, actual }) =>
    `expected ${either(expectedPathsPerAlt.flatMap((alt) => alt.map((path) => path[0]?.LABEL)))}, found ${found(actual[0])}`,
  buildEarlyExitMessage: ({ expectedIterationPaths, actual }) =>
    `expected ${either(expectedIterationPaths.map((path) => path[0]?.LABEL))}, found ${found(actual[0])}`,
};

/** An error with the token it is about. */
class Blame extends Error {
  readonly token: IToken;
  constructor(message: string, at: IToken) {
    super(message);
    this.token = at;
  }
}

const integerOf = (t: IToken): number => {
  const n = Number(t.image);
  if (!Number.isSafeInteger(n)) throw new Blame(`'${t.image.slice(0, 40)}' is too large`, t);
  return n;
};

/** The number behind a letter: `s0`, `a1`, `f2`. */
const numbered = (t: IToken, letters: string, what: string): number => {
  const digits = letters.includes(t.image[0] as string) ? t.image.slice(1) : "";
  if (!/^(0|[1-9]\d{0,5})$/.test(digits)) throw new Blame(`expected ${what}, found ${found(t)}`, t);
  return Number(digits);
};

const dimOf = (t: IToken): Dim => {
  try {
    return parseDim(JSON.parse(t.image) as string);
  } catch (error) {
    throw new Blame((error as Error).message, t);
  }
};

const typeOf = (t: IToken): { readonly dtype: DType; readonly shape: readonly Dim[] } => {
  const open = t.image.indexOf("[");
  const dtype = dtypes.find((d) => d === t.image.slice(0, open));
  if (dtype === undefined) throw new Blame(`expected a type with a dtype (${dtypes.join(", ")}), found ${found(t)}`, t);
  const inside = t.image.slice(open + 1, -1).trim();
  if (inside.length > 400) throw new Blame("the dimensions are longer than 400 characters", t);
  try {
    return { dtype, shape: inside === "" ? [] : inside.split(",").map((d) => (/^\d{1,15}$/.test(d) ? Number(d) : parseDim(d))) };
  } catch (error) {
    throw new Blame((error as Error).message, t);
  }
};

type Body = Omit<RankProgram, "rank">;

/** One rule for each line; the rules make the schedule as they go. */
class ScheduleParser extends EmbeddedActionsParser {
  constructor() {
    super(tokens, { maxLookahead: 1, errorMessageProvider: messages, recoveryEnabled: false });
    this.performSelfAnalysis();
  }

  private readonly anyName = this.RULE("anyName", (): string =>
    this.OR([
      { ALT: () => this.CONSUME(Name).image },
      {
        ALT: () => {
          const t = this.CONSUME(Text);
          return this.ACTION(() => JSON.parse(t.image) as string);
        },
      },
    ]),
  );
  private readonly int = this.RULE("int", (): number => {
    const t = this.CONSUME(Int);
    return this.ACTION(() => integerOf(t));
  });
  private readonly slot = this.RULE("slot", (): number => {
    const t = this.CONSUME(Name);
    return this.ACTION(() => numbered(t, "s", "a slot such as s0"));
  });
  private readonly exchangeNumber = this.RULE("exchangeNumber", (): number => {
    this.CONSUME(Hash);
    return this.SUBRULE(this.int);
  });
  private readonly attentionRank = this.RULE("attentionRank", (): number => {
    const t = this.CONSUME(Name);
    return this.ACTION(() => numbered(t, "a", "an attention rank such as a0"));
  });
  private readonly after = this.RULE("after", (): number => {
    this.CONSUME(word.after);
    return this.SUBRULE(this.int);
  });

  readonly schedule: () => Schedule = this.RULE("schedule", (): Schedule => {
    this.CONSUME(word.schedule);
    const name = this.SUBRULE(this.anyName);
    this.CONSUME(word.abi);
    const abi = this.CONSUME(Int);
    this.CONSUME(word.wire);
    const wire = this.CONSUME(Text);
    this.CONSUME(word.slots);
    const slots = this.SUBRULE(this.int);
    const symbols: Schedule["symbols"][number][] = [];
    const types: ExchangeType[] = [];
    const exchanges: string[] = [];
    const keys: Key[] = [];
    const programs: RankProgram[] = [];
    this.MANY(() => {
      const symbol = this.SUBRULE(this.symbol);
      symbols.push(symbol);
    });
    this.MANY1(() => {
      const type = this.SUBRULE(this.exchange);
      types.push(type);
    });
    this.OPTION(() => this.SUBRULE(this.order, { ARGS: [exchanges] }));
    this.MANY2(() => {
      const key = this.SUBRULE(this.key);
      keys.push(key);
    });
    this.MANY3(() => {
      const program = this.SUBRULE(this.program, { ARGS: [programs] });
      programs.push(program);
    });
    return this.ACTION((): Schedule => {
      if (integerOf(abi) !== 1) throw new Blame(`expected abi 1, found ${found(abi)}`, abi);
      return { abi: 1, name, wire: JSON.parse(wire.image) as string, slots, symbols, exchanges, types, keys, programs };
    });
  });

  private readonly symbol = this.RULE("symbol", (): Schedule["symbols"][number] => {
    this.CONSUME(word.dim);
    const name = this.SUBRULE(this.anyName);
    const min = this.SUBRULE(this.int);
    this.CONSUME(Dots);
    const max = this.SUBRULE1(this.int);
    this.CONSUME(word.by);
    const multiple = this.SUBRULE2(this.int);
    const source = this.CONSUME(Name);
    const is = this.OPTION(() => {
      this.CONSUME(word.is);
      return this.CONSUME(Text);
    });
    return this.ACTION(() => {
      if (source.image !== "host" && source.image !== "device")
        throw new Blame(`expected 'host' or 'device', found ${found(source)}`, source);
      return { name, min, max, multiple, source: source.image, ...(is === undefined ? {} : { is: dimOf(is) }) };
    });
  });

  private readonly exchange = this.RULE("exchange", (): ExchangeType => {
    const push: Field[] = [];
    const pull: Field[] = [];
    this.CONSUME(word.exchange);
    const name = this.SUBRULE(this.anyName);
    this.CONSUME(Equals);
    this.AT_LEAST_ONE_SEP({
      SEP: Comma,
      DEF: () => {
        const field = this.SUBRULE(this.field);
        push.push(field);
      },
    });
    this.CONSUME(Arrow);
    this.AT_LEAST_ONE_SEP1({
      SEP: Comma,
      DEF: () => {
        const field = this.SUBRULE1(this.field);
        pull.push(field);
      },
    });
    return { name, push, pull };
  });

  private readonly field = this.RULE("field", (): Field => {
    const name = this.SUBRULE(this.anyName);
    const type = this.CONSUME(Type);
    const bytes = this.SUBRULE(this.int);
    this.CONSUME(word.bytes);
    const below = this.OPTION(() => {
      this.CONSUME(word.below);
      return this.SUBRULE1(this.int);
    });
    return this.ACTION(() => ({ name, ...typeOf(type), bytes, ...(below === undefined ? {} : { below }) }));
  });

  private readonly order = this.RULE("order", (exchanges: string[]): void => {
    this.CONSUME(word.order);
    this.AT_LEAST_ONE_SEP({
      SEP: Comma,
      DEF: () => {
        const name = this.SUBRULE(this.anyName);
        const times = this.OPTION(() => {
          this.CONSUME(word.x);
          return this.CONSUME(Int);
        });
        this.ACTION(() => {
          const n = times === undefined ? 1 : integerOf(times);
          if (times && n > 100_000) throw new Blame("more than 100000 exchanges", times);
          for (let i = 0; i < n; i++) exchanges.push(name);
        });
      },
    });
  });

  private readonly key = this.RULE("key", (): Key => {
    this.CONSUME(word.key);
    const key = this.SUBRULE(this.int);
    const direction = this.CONSUME(Name);
    const a = this.SUBRULE(this.attentionRank);
    const f = this.CONSUME1(Name);
    const slot = this.SUBRULE(this.slot);
    const field = this.SUBRULE(this.anyName);
    this.CONSUME(Colon);
    const source = this.SUBRULE1(this.anyName);
    this.CONSUME(Arrow);
    const target = this.SUBRULE2(this.anyName);
    return this.ACTION(() => {
      if (direction.image !== "a2f" && direction.image !== "f2a")
        throw new Blame(`expected 'a2f' or 'f2a', found ${found(direction)}`, direction);
      return { key, direction: direction.image, a, f: numbered(f, "f", "an FFN rank such as f0"), slot, field, source, target };
    });
  });

  private readonly program = this.RULE("program", (before: readonly RankProgram[]): RankProgram => {
    this.CONSUME(word.rank);
    const name = this.CONSUME(Name);
    this.CONSUME(word.on);
    const target = this.SUBRULE(this.anyName);
    const body = this.OR([
      {
        ALT: (): Body => {
          this.CONSUME(word.as);
          const other = this.CONSUME1(Name);
          return this.ACTION(() => {
            const found_ = before.find((p) => p.rank.name === other.image);
            if (!found_) throw new Blame(`there is no rank ${other.image} before this one`, other);
            const { buffers, steps, memory } = found_;
            return { buffers, steps, memory };
          });
        },
      },
      { ALT: (): Body => this.SUBRULE(this.body) },
    ]);
    return this.ACTION(() => {
      const index = numbered(name, "af", "a rank such as a0 or f0");
      const role = name.image.startsWith("a") ? "attention" : "ffn";
      const rank: Rank = { name: name.image as Rank["name"], role, index, target };
      return { rank, ...body };
    });
  });

  private readonly body = this.RULE("body", (): Body => {
    const memory: Record<string, number> = {};
    const buffers: Buffer[] = [];
    const steps: Step[] = [];
    this.CONSUME(word.memory);
    this.MANY(() => {
      const region = this.SUBRULE(this.region);
      const bytes = this.SUBRULE(this.int);
      this.ACTION(() => {
        memory[region] = bytes;
      });
    });
    this.MANY1(() => {
      const buffer = this.SUBRULE(this.buffer);
      buffers.push(buffer);
    });
    this.MANY2(() => {
      const at = this.CONSUME(Int);
      this.ACTION(() => {
        if (integerOf(at) !== steps.length) throw new Blame(`expected step ${steps.length}, found ${found(at)}`, at);
      });
      const step = this.SUBRULE(this.step);
      steps.push(step);
    });
    return this.ACTION(() => ({
      buffers,
      steps,
      memory: Object.fromEntries(regions.map((r) => [r, memory[r] ?? 0])) as RankProgram["memory"],
    }));
  });

  private readonly region = this.RULE("region", (): Buffer["region"] => {
    // `exchange` is a word of its own
    const t = this.OR([{ ALT: () => this.CONSUME(Name) }, { ALT: () => this.CONSUME(word.exchange) }]);
    return this.ACTION(() => {
      const region = regions.find((r) => r === t.image);
      if (region === undefined) throw new Blame(`expected a region (${regions.join(", ")}), found ${found(t)}`, t);
      return region;
    });
  });

  private readonly buffer = this.RULE("buffer", (): Buffer => {
    this.CONSUME(word.buffer);
    const name = this.SUBRULE(this.anyName);
    const type = this.CONSUME(Type);
    const segments = this.OPTION(() => {
      this.CONSUME(word.x);
      return this.SUBRULE(this.int);
    });
    const region = this.SUBRULE(this.region);
    this.CONSUME(At);
    const offset = this.SUBRULE1(this.int);
    const bytes = this.SUBRULE2(this.int);
    this.CONSUME(word.bytes);
    const slot = this.OPTION1(() => this.SUBRULE(this.slot));
    const binds = this.OPTION2(() => {
      this.CONSUME(word.for);
      return this.SUBRULE1(this.anyName);
    });
    return this.ACTION(() => ({
      name,
      region,
      ...typeOf(type),
      segments: segments ?? 1,
      offset,
      bytes,
      ...(slot === undefined ? {} : { slot }),
      ...(binds === undefined ? {} : { binds }),
    }));
  });

  private readonly names = this.RULE("names", (): string[] => {
    const all: string[] = [];
    this.CONSUME(Open);
    this.MANY_SEP({
      SEP: Comma,
      DEF: () => {
        const name = this.SUBRULE(this.anyName);
        all.push(name);
      },
    });
    this.CONSUME(Close);
    return all;
  });

  private readonly step = this.RULE(
    "step",
    (): Step =>
      this.OR([
        { ALT: (): Step => this.SUBRULE(this.launch) },
        {
          ALT: (): Step => {
            this.CONSUME(word.post);
            const slot = this.SUBRULE(this.slot);
            const type = this.SUBRULE(this.anyName);
            const exchange = this.SUBRULE(this.exchangeNumber);
            const after = this.SUBRULE(this.after);
            return { op: "post", slot, exchange, type, after };
          },
        },
        {
          ALT: (): Step => {
            this.CONSUME(word.wait);
            const slot = this.SUBRULE1(this.slot);
            const exchange = this.SUBRULE1(this.exchangeNumber);
            return { op: "wait", slot, exchange };
          },
        },
        {
          ALT: (): Step => {
            this.CONSUME(word.accept);
            const slot = this.SUBRULE2(this.slot);
            const exchange = this.SUBRULE2(this.exchangeNumber);
            this.CONSUME(word.from);
            const from = this.SUBRULE(this.attentionRank);
            return { op: "accept", slot, exchange, from };
          },
        },
        {
          ALT: (): Step => {
            this.CONSUME(word.reply);
            const slot = this.SUBRULE3(this.slot);
            const exchange = this.SUBRULE3(this.exchangeNumber);
            this.CONSUME(word.to);
            const to = this.SUBRULE1(this.attentionRank);
            const after = this.SUBRULE1(this.after);
            return { op: "reply", slot, exchange, to, after };
          },
        },
      ]),
  );

  private readonly launch = this.RULE("launch", (): Step => {
    this.CONSUME(word.launch);
    const kernel = this.SUBRULE(this.anyName);
    const inputs = this.SUBRULE(this.names);
    const inout = this.OPTION(() => {
      this.CONSUME(word.inout);
      return this.SUBRULE1(this.names);
    });
    this.CONSUME(Arrow);
    const out = this.SUBRULE2(this.names);
    this.CONSUME(word.rows);
    const rows = this.SUBRULE1(this.anyName);
    const slot = this.SUBRULE(this.slot);
    return { op: "launch", kernel, in: inputs, out, ...(inout === undefined ? {} : { inout }), rows, slot };
  });
}

const parser = new ScheduleParser();

/** The schedule of a text. Errors are UserErrors that start with `file:line:column` and say what was expected. */
export const parseSchedule = (text: string, file = "<text>"): Schedule => {
  const fail = (message: string, line: number | undefined, column: number | undefined): never => {
    const lines = text.trimEnd().split("\n");
    const at =
      line === undefined || Number.isNaN(line) ? [lines.length, (lines.at(-1) as string).length + 1] : [line, column ?? 1];
    throw new UserError(`${file}:${at.join(":")}: ${message}`);
  };
  const { tokens: all, errors } = lexer.tokenize(text);
  const [wrong] = errors;
  if (wrong) {
    const c = text[wrong.offset];
    const what =
      c === '"' ? "a string that does not end on its line, or has a bad escape" : `unexpected character ${JSON.stringify(c)}`;
    fail(what, wrong.line, wrong.column);
  }
  try {
    parser.input = all;
    const made = parser.schedule();
    const [error] = parser.errors;
    if (error) return fail(error.message, error.token.startLine, error.token.startColumn);
    return made;
  } catch (error) {
    if (error instanceof Blame) return fail(error.message, error.token.startLine, error.token.startColumn);
    throw error;
  }
};
