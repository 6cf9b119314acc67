/** Operators on elements, and conversions between data types. */
import { type DType, dtypeBytes, isFloat } from "../../../../ir/type.ts";
import type { Call, Lowering } from "../call.ts";
import type { Emitter, Item } from "../emitter.ts";
import { irDType } from "../types.ts";

/** Floats of 16 bits and fewer are computed in f32, as ONNX Runtime and the definitions of functions have it, and rounded once. */
export const wide = (e: Emitter, x: Item): Item => (isFloat(x.type.dtype) && dtypeBytes(x.type.dtype) < 4 ? e.cast(x, "f32") : x);
/** `work` on operands in f32 where they are narrower, the result in the first one's dtype. */
export const inWide = (e: Emitter, xs: readonly Item[], work: (...xs: Item[]) => Item): Item => {
  const [first] = xs as readonly [Item];
  return e.cast(work(...xs.map((x) => wide(e, x))), first.type.dtype);
};

/** Operands of one element become scalars where another has their axes: kernels then hold them as numbers. */
const scalars = (e: Emitter, xs: readonly Item[]): readonly Item[] => {
  const one = (x: Item): boolean => !x.runs && x.type.shape.every((d) => d === 1) && e.tensorOf(x) !== undefined;
  const rank = Math.max(...xs.map((x) => (one(x) ? 0 : x.type.shape.length)));
  return xs.map((x) => (one(x) && x.type.shape.length > 0 && x.type.shape.length <= rank ? e.reshape(x, []) : x));
};

export const binary = (e: Emitter, kind: string, x: Item, y: Item): Item => e.op(kind, scalars(e, [x, y]));

/** x, and y with x's axes: before opset 7, `broadcast` puts y's axes beside those of x from `axis` on, the last ones unless given. */
const operands = (c: Call): readonly [Item, Item] => {
  const [x, y] = [c.x(0), c.x(1)];
  if (c.opset >= 7 || !c.flag("broadcast", false) || !c.hasAttribute("axis")) return [x, y];
  const rank = x.type.shape.length;
  const after = rank - c.axis(c.int("axis"), rank) - y.type.shape.length;
  if (after < 0) c.fail(`axis ${c.int("axis")} leaves no room for ${y.type.shape.length} axes`);
  return [x, c.e.reshape(y, [...y.type.shape, ...Array.from({ length: after }, () => 1)])];
};

/** Integers are computed in i64 and put back modulo 2^bits. */
const arithmetic =
  (kind: "add" | "sub" | "mul"): Lowering =>
  (c) => {
    const [x, y] = operands(c);
    const { dtype } = x.type;
    if (isFloat(dtype)) return inWide(c.e, [x, y], (a, b) => binary(c.e, kind, a, b));
    if (dtype === "i64") return binary(c.e, kind, x, y);
    return wrap(c.e, binary(c.e, kind, c.e.cast(x, "i64"), c.e.cast(y, "i64")), dtype);
  };

/** Conversion as C has it. */
export const wrap = (e: Emitter, x: Item, to: DType): Item =>
  x.type.dtype === to ? x : e.op("cast", [x], { to, overflow: "wrap" });

const divide: Lowering = (c) => {
  const [x, y] = operands(c);
  const { dtype } = x.type;
  if (isFloat(dtype)) return inWide(c.e, [x, y], (a, b) => binary(c.e, "div", a, b));
  if (x.known()?.kind === "dims") {
    // sizes are not negative: rounding down and towards 0 agree
    const by = c.e.dimsOf(y);
    if (by?.length === 1 && typeof by[0] === "number" && by[0] > 0) return c.e.quotients(c.e.dimsOf(x) ?? [], by[0], x);
  }
  const quotient = binary(c.e, "div", c.e.cast(x, "f64"), c.e.cast(y, "f64"));
  return wrap(c.e, quotient, dtype);
};

/** The remainder with y's sign (fmod 0), or with x's (fmod 1). */
const modulo: Lowering = (c) => {
  const [x, y] = [c.x(0), c.x(1)];
  const rest = (a: Item, b: Item): Item => binary(c.e, "remainder", a, b);
  if (c.int("fmod", 0) === 1) return inWide(c.e, [x, y], rest);
  if (isFloat(x.type.dtype)) c.fail("floats need fmod = 1");
  const r = rest(x, y);
  if (x.type.dtype.startsWith("u")) return r;
  const zero = c.e.number(0, x.type.dtype);
  const signs = c.e.op("equal", [binary(c.e, "less", r, zero), binary(c.e, "less", y, zero)]);
  const other = c.e.op("and", [c.e.op("not", [signs]), c.e.op("not", [c.e.op("equal", [r, zero])])]);
  return c.e.op("where", [other, binary(c.e, "add", r, y), r]);
};

const power: Lowering = (c) => {
  const [x, y] = operands(c);
  const { dtype } = x.type;
  const exponent = c.e.tensorOf(y);
  const base = isFloat(dtype) ? wide(c.e, x) : c.e.cast(x, "f64");
  const two =
    exponent?.data[0] === 2 && isFloat(dtype) && y.type.shape.every((d) => d === 1) && y.type.shape.length <= x.type.shape.length;
  const result = two ? c.e.op("mul", [base, base]) : binary(c.e, "pow", base, c.e.cast(y, base.type.dtype));
  return isFloat(dtype) ? c.e.cast(result, dtype) : wrap(c.e, result, dtype);
};

const unary =
  (kind: string, attrs: Readonly<Record<string, string>> = {}): Lowering =>
  (c) =>
    inWide(c.e, [c.x0], (x) => c.e.op(kind, [x], attrs));

/** A formula of one operand, in f32 or f64. */
const formula =
  (work: (e: Emitter, x: Item, c: Call, n: (value: number) => Item) => Item): Lowering =>
  (c) =>
    inWide(c.e, [c.x0], (x) => work(c.e, x, c, (value) => c.e.number(value, x.type.dtype)));

/** The smallest integer of a type has no positive counterpart in it: it stays. */
const signless =
  (kind: "neg" | "abs"): Lowering =>
  (c) => {
    const { dtype } = c.x0.type;
    if (isFloat(dtype)) return c.e.op(kind, [c.x0]);
    if (dtype.startsWith("u")) return kind === "abs" ? c.x0 : c.fail(`must be signed, got ${dtype}`);
    return wrap(c.e, c.e.op(kind, [c.e.cast(c.x0, "i64")]), dtype);
  };

const compare =
  (kind: string, swapped: boolean = false): Lowering =>
  (c) => {
    const [x, y] = operands(c);
    return swapped ? binary(c.e, kind, y, x) : binary(c.e, kind, x, y);
  };
const logic =
  (kind: string): Lowering =>
  (c) =>
    binary(c.e, kind, ...operands(c));

/** Operands, of which there is at least one. */
const terms = (c: Call): readonly Item[] => [c.x0, ...c.inputs.slice(1).map((_, i) => c.x(i + 1))];
const extreme =
  (kind: "maximum" | "minimum"): Lowering =>
  (c) =>
    terms(c).reduce((a, b) => binary(c.e, kind, a, b));
const sum = (c: Call): Item => {
  return inWide(c.e, terms(c), (...xs) => xs.reduce((a, b) => binary(c.e, "add", a, b)));
};

const clip: Lowering = (c) => {
  const x = c.x0;
  const limit = (i: number, name: string): Item | undefined =>
    c.opset < 11 ? (c.hasAttribute(name) ? c.e.number(c.float(name), x.type.dtype) : undefined) : c.optional(i);
  const [low, high] = [limit(1, "min"), limit(2, "max")];
  const raised = low ? binary(c.e, "maximum", x, low) : x;
  return high ? binary(c.e, "minimum", raised, high) : raised;
};

/** Conversion: floats to integers towards 0 and modulo 2^bits, `saturate` for e4m3. */
export const convert = (c: Call, x: Item, name: string): Item => {
  const to = irDType(name);
  const from = x.type.dtype;
  if (to === "bool") return c.e.op("not", [binary(c.e, "equal", x, c.e.number(0, from))]);
  const bits = /^[ui][24]$/.test(name) ? Number(name.slice(1)) : 0;
  if (bits > 0) {
    // narrower than a byte: modulo 2^bits within the byte
    const whole = wrap(c.e, isFloat(from) ? c.e.op("trunc", [c.e.cast(x, "f64")]) : c.e.cast(x, "f64"), "i64");
    const code = c.e.op("bit_and", [whole, c.e.number(2 ** bits - 1, "i64")]);
    if (name.startsWith("u")) return { ...c.e.cast(code, to), narrow: name };
    const negative = binary(c.e, "less", c.e.number(2 ** (bits - 1) - 1, "i64"), code);
    const signed = c.e.op("where", [negative, binary(c.e, "sub", code, c.e.number(2 ** bits, "i64")), code]);
    return { ...c.e.cast(signed, to), narrow: name };
  }
  if (!isFloat(to)) return wrap(c.e, x, to);
  if (to === "e4m3" && !c.flag("saturate", true)) return wrap(c.e, x, to);
  if (to === "e5m2" && c.flag("saturate", true) && isFloat(from)) {
    const [low, high] = [-57344, 57344].map((v) => c.e.number(v, "f64")) as [Item, Item];
    const x64 = c.e.cast(x, "f64");
    return c.e.cast(binary(c.e, "minimum", binary(c.e, "maximum", x64, low), high), to);
  }
  return c.e.cast(x, to);
};

/** Data types by their numbers in TensorProto. */
const typeNames: readonly (string | undefined)[] =
  "f32 u8 i8 u16 i16 i32 i64 string bool f16 f64 u32 u64 complex64 complex128 bf16 e4m3 e4m3fnuz e5m2 e5m2fnuz u4 i4 e2m1 e8m0 u2 i2".split(
    " ",
  );
export const typeOf = (c: Call, code: number): string => typeNames[code - 1] ?? c.fail(`data type ${code} is none of ONNX's`);

const isInf: Lowering = (c) => {
  const [positive, negative] = [c.flag("detect_positive", true), c.flag("detect_negative", true)];
  const x = c.x0;
  const is = (value: number): Item => binary(c.e, "equal", x, c.e.number(value, x.type.dtype));
  if (positive && negative) return binary(c.e, "or", is(Infinity), is(-Infinity));
  return positive ? is(Infinity) : negative ? is(-Infinity) : c.e.broadcast(c.e.number(0, "bool"), x.type.shape);
};

const sign: Lowering = (c) => {
  const x = c.x0;
  const n = (v: number): Item => c.e.number(v, x.type.dtype);
  const positive = binary(c.e, "less", n(0), x);
  const negative = binary(c.e, "less", x, n(0));
  const ofNegative = x.type.dtype.startsWith("u") ? n(0) : c.e.op("where", [negative, n(-1), binary(c.e, "mul", x, n(0))]);
  return c.e.op("where", [positive, n(1), ofNegative]);
};

/** x shifted: multiplied by, or divided by, a power of 2. */
const bitShift: Lowering = (c) => {
  const [x, y] = [c.x(0), c.x(1)];
  const factor = c.e.op("pow", [c.e.number(2, "f64"), c.e.cast(y, "f64")]);
  const x64 = c.e.cast(x, "f64");
  const left = c.text("direction") === "LEFT";
  return wrap(c.e, left ? binary(c.e, "mul", x64, factor) : c.e.op("floor", [binary(c.e, "div", x64, factor)]), x.type.dtype);
};
const bitNot: Lowering = (c) => {
  const { dtype } = c.x0.type;
  return binary(c.e, "sub", c.e.number(dtype.startsWith("u") ? 2 ** (8 * dtypeBytes(dtype)) - 1 : -1, dtype), c.x0);
};

/** Slopes of channels, before opset 7 a vector whatever axes follow them. */
const slopeOf = (c: Call): Item => {
  const slope = c.x(1);
  if (c.opset >= 7 || slope.type.shape.length !== 1 || c.rank(0) < 2) return slope;
  return c.e.reshape(slope, [
    ...slope.type.shape,
    ...c
      .shape(0)
      .slice(2)
      .map(() => 1),
  ]);
};

const softplus = (e: Emitter, x: Item, n: (v: number) => Item): Item => {
  // max(x, 0) + log(1 + e^-|x|)
  const rest = e.op("log", [e.op("add", [n(1), e.op("exp", [e.op("neg", [e.op("abs", [x])])])])]);
  return e.op("add", [e.op("maximum", [x, n(0)]), rest]);
};
const hardSigmoid = (e: Emitter, x: Item, n: (v: number) => Item, alpha: number, beta: number): Item =>
  e.op("maximum", [n(0), e.op("minimum", [n(1), e.op("add", [e.op("mul", [x, n(alpha)]), n(beta)])])]);
const elu = (e: Emitter, x: Item, n: (v: number) => Item, alpha: number): Item =>
  e.op("where", [e.op("less", [x, n(0)]), e.op("mul", [n(alpha), e.op("sub", [e.op("exp", [x]), n(1)])]), x]);

export const elementwise: Readonly<Record<string, Lowering>> = {
  Add: arithmetic("add"),
  Sub: arithmetic("sub"),
  Mul: arithmetic("mul"),
  Div: divide,
  Mod: modulo,
  Pow: power,
  Max: extreme("maximum"),
  Min: extreme("minimum"),
  Sum: sum,
  Mean: (c) => inWide(c.e, [sum(c)], (x) => c.e.op("div", [x, c.e.number(c.inputs.length, x.type.dtype)])),
  Clip: clip,
  Neg: signless("neg"),
  Abs: signless("abs"),
  Sign: sign,
  Floor: unary("floor"),
  Ceil: unary("ceil"),
  Round: unary("nearest"),
  Sqrt: unary("sqrt"),
  Reciprocal: unary("reciprocal"),
  Exp: unary("exp"),
  Log: unary("log"),
  Sin: unary("sin"),
  Cos: unary("cos"),
  Tan: unary("tan"),
  Asin: unary("asin"),
  Acos: unary("acos"),
  Atan: unary("atan"),
  Sinh: unary("sinh"),
  Cosh: unary("cosh"),
  Asinh: unary("asinh"),
  Acosh: unary("acosh"),
  Atanh: unary("atanh"),
  Tanh: unary("tanh"),
  Erf: unary("erf"),
  Sigmoid: unary("sigmoid"),
  Relu: (c) => binary(c.e, "maximum", c.x0, c.e.number(0, c.dtype(0))),
  Gelu: (c) => inWide(c.e, [c.x0], (x) => c.e.op("gelu", [x], { approximate: c.text("approximate", "none") })),
  Swish: formula((e, x, c, n) => {
    const alpha = c.float("alpha", 1);
    return alpha === 1 ? e.op("silu", [x]) : e.op("mul", [x, e.op("sigmoid", [e.op("mul", [n(alpha), x])])]);
  }),
  HardSigmoid: formula((e, x, c, n) => hardSigmoid(e, x, n, c.float("alpha", 0.2), c.float("beta", 0.5))),
  HardSwish: formula((e, x, _, n) => e.op("mul", [x, hardSigmoid(e, x, n, Math.fround(1 / 6), 0.5)])),
  Softplus: formula((e, x, _, n) => softplus(e, x, n)),
  Softsign: formula((e, x, _, n) => e.op("div", [x, e.op("add", [n(1), e.op("abs", [x])])])),
  Mish: formula((e, x, _, n) => e.op("mul", [x, e.op("tanh", [softplus(e, x, n)])])),
  Elu: formula((e, x, c, n) => elu(e, x, n, c.float("alpha", 1))),
  Selu: formula((e, x, c, n) =>
    e.op("mul", [n(c.float("gamma", 1.0507009873554805)), elu(e, x, n, c.float("alpha", 1.6732632423543772))]),
  ),
  Celu: formula((e, x, c, n) => {
    const alpha = c.float("alpha", 1);
    const below = e.op("mul", [n(alpha), e.op("sub", [e.op("exp", [e.op("div", [x, n(alpha)])]), n(1)])]);
    return e.op("add", [e.op("maximum", [x, n(0)]), e.op("minimum", [n(0), below])]);
  }),
  LeakyRelu: formula((e, x, c, n) => e.op("where", [e.op("less", [x, n(0)]), e.op("mul", [n(c.float("alpha", 0.01)), x]), x])),
  ThresholdedRelu: formula((e, x, c, n) => e.op("where", [e.op("less", [n(c.float("alpha", 1)), x]), x, n(0)])),
  Shrink: formula((e, x, c, n) => {
    const [bias, lambd] = [c.float("bias", 0), c.float("lambd", 0.5)];
    const above = e.op("where", [e.op("less", [n(lambd), x]), e.op("sub", [x, n(bias)]), n(0)]);
    return e.op("where", [e.op("less", [x, n(-lambd)]), e.op("add", [x, n(bias)]), above]);
  }),
  PRelu: (c) =>
    inWide(c.e, [c.x(0), slopeOf(c)], (x, slope) =>
      c.e.op("where", [binary(c.e, "less", x, c.e.number(0, x.type.dtype)), binary(c.e, "mul", slope, x), x]),
    ),
  Equal: compare("equal"),
  Less: compare("less"),
  LessOrEqual: compare("less_equal"),
  Greater: compare("less", true),
  GreaterOrEqual: compare("less_equal", true),
  And: logic("and"),
  Or: logic("or"),
  Xor: (c) => c.e.op("not", [binary(c.e, "equal", c.x(0), c.x(1))]),
  Not: (c) => c.e.op("not", [c.x0]),
  BitwiseAnd: logic("bit_and"),
  BitwiseOr: logic("bit_or"),
  BitwiseXor: logic("bit_xor"),
  BitwiseNot: bitNot,
  BitShift: bitShift,
  IsNaN: (c) => c.e.op("not", [c.e.op("equal", [c.x0, c.x0])]),
  IsInf: isInf,
  Where: (c) => c.e.op("where", scalars(c.e, [c.x(0), c.x(1), c.x(2)])),
  Cast: (c) => convert(c, c.x0, typeOf(c, c.int("to"))),
  CastLike: (c) => convert(c, c.x0, c.x(1).narrow ?? c.x(1).type.dtype),
  BitCast: (c) => c.e.op("bitcast", [c.x0], { to: irDType(typeOf(c, c.int("to"))) }),
  Identity: (c) => c.x0,
  Dropout: (c) => {
    // at inference nothing is dropped
    const training = c.opset >= 12 && c.has(2) ? c.constant(2).data[0] !== 0 : false;
    const ratio = c.opset >= 12 ? (c.has(1) ? (c.constant(1).data[0] as number) : 0.5) : c.float("ratio", 0.5);
    if (training && ratio !== 0) c.fail("training_mode is set; export the model for inference");
    const mask = (): Item => c.e.broadcast(c.e.number(1, "bool"), c.shape(0));
    return [c.x0, c.wants(1) ? mask() : undefined];
  },
};
