/** Elementwise ops, one table: numpy broadcasting, operands of one dtype, one Scalar expression per op, rounded once to the result's dtype. */
import { compileScalar, scalarFlops } from "../arithmetic.ts";
import type { Attrs } from "../attr.ts";
import { type ConcreteTensor, cost, elements, tensorOf } from "../bind.ts";
import * as expect from "../expect.ts";
import type { Knowledge, Sample } from "../op.ts";
import { rounder } from "../round.ts";
import { arg, bin, lit, type Scalar, un } from "../scalar.ts";
import type { Tensor } from "../tensor.ts";
import { type DType, dtypeBytes, dtypes, isFloat, type TensorType, tensor } from "../type.ts";

const numbers: readonly DType[] = dtypes.filter((d) => d !== "bool");
const floats: readonly DType[] = dtypes.filter(isFloat);
const integers: readonly DType[] = numbers.filter((d) => !isFloat(d));

interface Row {
  readonly name: string;
  readonly summary: string;
  readonly inputs: readonly string[];
  readonly accepts: readonly DType[];
  readonly attrs?: Readonly<Record<string, string>>;
  /** the result's dtype when it is not the operands' */
  readonly result?: (attrs: Attrs) => DType;
  readonly scalar: (args: readonly Scalar[], attrs: Attrs) => Scalar;
  /** what samples draw for each operand */
  readonly draw?: NonNullable<Sample["values"]>;
  readonly sampleAttrs?: readonly Attrs[];
  readonly sampleDtypes: readonly DType[];
  /** the first operand is a bool whatever the others are */
  readonly condition?: true;
}

const x = arg(0);
const y = arg(1);
/** `Array<Scalar>` position i; the arity was checked by infer. */
const at = (args: readonly Scalar[], i: number): Scalar => args[i] ?? arg(i);
const substitute = (s: Scalar, args: readonly Scalar[]): Scalar => {
  if (s.op === "const") return s;
  if (s.op === "arg") return at(args, s.index);
  if (s.op === "select") return { op: "select", if: substitute(s.if, args), x: substitute(s.x, args), y: substitute(s.y, args) };
  if (s.op === "round") return { op: "round", dtype: s.dtype, x: substitute(s.x, args) };
  if ("y" in s) return { op: s.op, x: substitute(s.x, args), y: substitute(s.y, args) };
  return { op: s.op, x: substitute(s.x, args) };
};

const unary = (name: string, formula: string, body: Scalar, draw?: "positive" | "unit"): Row => ({
  name,
  summary: `${formula}, elementwise; x any shape, float`,
  inputs: ["x"],
  accepts: floats,
  scalar: (args) => substitute(body, args),
  ...(draw === undefined ? {} : { draw: [draw] }),
  sampleDtypes: ["f32", "bf16", "f16"],
});
/** As `unary`, for ops that integers have too. */
const unaryAny = (name: string, formula: string, body: Scalar): Row => ({
  ...unary(name, formula, body),
  summary: `${formula}, elementwise; x any shape, number`,
  accepts: numbers,
  sampleDtypes: ["f32", "bf16", "i32"],
});
const binary = (
  name: string,
  formula: string,
  body: Scalar,
  accepts: readonly DType[],
  sampleDtypes: readonly DType[],
  draw?: Row["draw"],
): Row => ({
  name,
  summary: `${formula}, elementwise with broadcasting; integers clamp`,
  inputs: ["x", "y"],
  accepts,
  scalar: (args) => substitute(body, args),
  ...(draw === undefined ? {} : { draw }),
  sampleDtypes,
});
const compare = (name: string, formula: string, op: "lt" | "le" | "eq"): Row => ({
  ...binary(name, formula, bin(op, x, y), dtypes, ["f32", "bf16", "i32"], [{ below: 4 }, { below: 4 }]),
  summary: `${formula}, elementwise with broadcasting; bool result, false with NaN`,
  result: () => "bool",
});
const logic = (name: string, formula: string, body: Scalar, inputs: readonly string[]): Row => ({
  name,
  summary: `${formula}, elementwise with broadcasting; bool`,
  inputs,
  accepts: ["bool"],
  scalar: (args) => substitute(body, args),
  draw: inputs.map(() => ({ below: 2 })),
  sampleDtypes: ["bool"],
});

const bits = (name: string, formula: string, op: "bit_and" | "bit_or" | "bit_xor"): Row => ({
  ...binary(name, formula, bin(op, x, y), integers, ["i32", "u8", "i64"], [{ below: 100 }, { below: 100 }]),
  summary: `${formula}, elementwise with broadcasting; integers, to 2^53`,
});

const half = lit(0.5);
const one = lit(1);
const sigmoid = bin("div", one, bin("add", one, un("exp", un("neg", x))));
/** 0.5 x (1 + erf(x / sqrt 2)) */
const geluErf = bin("mul", bin("mul", half, x), bin("add", one, un("erf", bin("mul", x, lit(Math.SQRT1_2)))));
/** 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), Hendrycks and Gimpel 2016 */
const cubic = bin("add", x, bin("mul", lit(0.044715), bin("mul", x, bin("mul", x, x))));
const geluTanh = bin("mul", bin("mul", half, x), bin("add", one, un("tanh", bin("mul", lit(Math.sqrt(2 / Math.PI)), cubic))));

/** x as C converts it: modulo 2^bits to integers; beyond e4m3's range NaN, from halfway to the number that 480 would be. */
const wrapped = (to: DType, v: Scalar): Scalar => {
  if (to === "bool") return v;
  if (to === "e4m3") return { op: "select", if: bin("le", un("abs", v), lit(464)), x: v, y: lit(Number.NaN) };
  if (isFloat(to)) return v;
  const modulus = 2 ** (8 * dtypeBytes(to));
  const rest = bin("fmod", un("trunc", v), lit(modulus));
  const least = to.startsWith("u") ? 0 : -modulus / 2;
  const raised: Scalar = { op: "select", if: bin("lt", rest, lit(least)), x: bin("add", rest, lit(modulus)), y: rest };
  return { op: "select", if: bin("le", lit(least + modulus), rest), x: bin("sub", rest, lit(modulus)), y: raised };
};

const wide: readonly DType[] = ["f32", "bf16", "f16"];
const withIntegers: readonly DType[] = ["f32", "bf16", "i32"];

const rows: readonly Row[] = [
  binary("add", "x + y", bin("add", x, y), numbers, withIntegers),
  binary("sub", "x - y", bin("sub", x, y), numbers, withIntegers),
  binary("mul", "x * y", bin("mul", x, y), numbers, withIntegers),
  binary("div", "x / y (floats)", bin("div", x, y), floats, wide, ["normal", "positive"]),
  binary("maximum", "the larger, NaN if either is", bin("max", x, y), numbers, withIntegers),
  binary("minimum", "the smaller, NaN if either is", bin("min", x, y), numbers, withIntegers),
  binary("pow", "x to the power y (floats)", bin("pow", x, y), floats, wide, ["positive", "normal"]),
  unaryAny("neg", "-x", un("neg", x)),
  unaryAny("abs", "|x|", un("abs", x)),
  unary("exp", "e^x", un("exp", x)),
  unary("log", "natural logarithm", un("log", x), "positive"),
  unary("sqrt", "square root", un("sqrt", x), "positive"),
  unary("rsqrt", "1 / sqrt x", un("rsqrt", x), "positive"),
  unary("reciprocal", "1 / x", bin("div", one, x), "positive"),
  unary("tanh", "tanh x", un("tanh", x)),
  unary("erf", "the error function", un("erf", x)),
  unary("sigmoid", "1 / (1 + e^-x)", sigmoid),
  unary("silu", "x / (1 + e^-x)", bin("div", x, bin("add", one, un("exp", un("neg", x))))),
  {
    ...unary("gelu", "Gaussian error linear unit", geluErf),
    attrs: { approximate: "`none` (by erf, the default) or `tanh`" },
    scalar: (args, attrs) =>
      substitute(expect.word(attrs, "approximate", ["none", "tanh"], "none") === "tanh" ? geluTanh : geluErf, args),
    sampleAttrs: [{}, { approximate: "tanh" }],
  },
  unary("sin", "sin x", un("sin", x)),
  unary("cos", "cos x", un("cos", x)),
  unary("tan", "tan x", un("tan", x)),
  unary("asin", "arc sine", un("asin", x), "unit"),
  unary("acos", "arc cosine", un("acos", x), "unit"),
  unary("atan", "arc tangent", un("atan", x)),
  unary("sinh", "hyperbolic sine", un("sinh", x)),
  unary("cosh", "hyperbolic cosine", un("cosh", x)),
  unary("asinh", "inverse hyperbolic sine", un("asinh", x)),
  unary("acosh", "inverse hyperbolic cosine; NaN below 1", un("acosh", x), "positive"),
  unary("atanh", "inverse hyperbolic tangent", un("atanh", x), "unit"),
  unary("floor", "the integer at or below x", un("floor", x)),
  unary("ceil", "the integer at or above x", un("ceil", x)),
  unary("trunc", "the integer next to x towards 0", un("trunc", x)),
  unary("nearest", "the nearest integer, ties to even", un("nearest", x)),
  binary("remainder", "x - y * trunc(x / y)", bin("fmod", x, y), numbers, withIntegers, ["normal", "positive"]),
  bits("bit_and", "the bits that x and y have", "bit_and"),
  bits("bit_or", "the bits that x or y have", "bit_or"),
  bits("bit_xor", "the bits that one of x and y has", "bit_xor"),
  compare("less", "x < y", "lt"),
  compare("less_equal", "x <= y", "le"),
  compare("equal", "x = y", "eq"),
  logic("and", "x and y", bin("and", x, y), ["x", "y"]),
  logic("or", "x or y", bin("or", x, y), ["x", "y"]),
  logic("not", "not x", un("not", x), ["x"]),
  {
    name: "where",
    summary: "x where the condition holds, else y; elementwise with broadcasting; condition bool, x and y of one dtype",
    inputs: ["condition", "x", "y"],
    accepts: dtypes,
    condition: true,
    scalar: (args) => ({ op: "select", if: at(args, 0), x: at(args, 1), y: at(args, 2) }),
    draw: [{ below: 2 }, "normal", "normal"],
    sampleDtypes: ["f32", "bf16", "i32"],
  },
  {
    name: "cast",
    summary: "x in another dtype: to nearest, ties to even; e4m3 saturates to +-448, integers clamp and take NaN as 0, or wrap",
    inputs: ["x"],
    accepts: dtypes,
    attrs: {
      to: "the dtype of the result",
      overflow: "`clamp` (the default) or `wrap`: integers as C has them, towards 0 and modulo 2^bits; of e4m3, NaN",
    },
    result: (attrs) => expect.dtypeAttr(attrs, "to"),
    scalar: (args, attrs) => {
      const to = expect.dtypeAttr(attrs, "to");
      return expect.word(attrs, "overflow", ["clamp", "wrap"], "clamp") === "wrap" ? wrapped(to, at(args, 0)) : at(args, 0);
    },
    sampleAttrs: [
      { to: "f32" },
      { to: "bf16" },
      { to: "e4m3" },
      { to: "i8" },
      { to: "i32" },
      { to: "i8", overflow: "wrap" },
      { to: "u16", overflow: "wrap" },
    ],
    sampleDtypes: ["f32", "bf16", "e4m3", "i8", "i32", "f16"],
  },
];

/** Shapes that samples put operands in: equal, a row vector, a column, a scalar, columns that are no multiple of 128, rank 1. */
const shapes: readonly { readonly name: string; readonly of: (operand: number) => TensorType["shape"] }[] = [
  { name: "equal shapes", of: () => ["T", 16] },
  { name: "row vector", of: (i) => (i === 0 ? ["T", 129] : [129]) },
  { name: "column", of: (i) => (i === 0 ? ["T", 1] : ["T", 33]) },
  { name: "scalar", of: (i) => (i === 0 ? ["T", 7] : []) },
  { name: "pairs of tokens", of: () => ["3*T", 5] },
  { name: "rank 3 against rank 2", of: (i) => (i === 0 ? [2, 3, 4] : [3, 1]) },
  { name: "rank 1", of: () => ["T"] },
];

const samplesOf = (row: Row): readonly Sample[] => {
  const one = row.inputs.length === 1;
  const usable = one ? shapes.filter((s) => !["column", "scalar", "rank 3 against rank 2"].includes(s.name)) : shapes;
  return (row.sampleAttrs ?? [{}]).flatMap((attrs) =>
    row.sampleDtypes.flatMap((dtype, d) =>
      usable
        // every shape in the first dtype, then a few of them in each other
        .filter((_, i) => d === 0 || i % 3 === 1)
        .map((shape) => ({
          name: `${shape.name}, ${dtype}${Object.entries(attrs).map(([k, v]) => `, ${k} ${v}`)}`,
          inputs: row.inputs.map((_, i) => tensor(row.condition && i === 0 ? "bool" : dtype, shape.of(i))),
          attrs,
          ...(row.draw === undefined ? {} : { values: row.draw }),
          symbols: { T: 5 },
        })),
    ),
  );
};

/** Element strides of an operand in the iteration space of the result; 0 along broadcast axes. */
const stridesIn = (operand: readonly number[], result: readonly number[]): number[] => {
  const strides = result.map(() => 0);
  let stride = 1;
  for (let i = operand.length - 1; i >= 0; i--) {
    const size = operand[i] as number;
    if (size !== 1) strides[i + result.length - operand.length] = stride;
    stride *= size;
  }
  return strides;
};

/** Applies f to broadcast operands; the result's elements in row-major order. */
const mapBroadcast = (
  operands: readonly Tensor[],
  shape: readonly number[],
  f: (args: ArrayLike<number>) => number,
): Float64Array => {
  const result = new Float64Array(shape.reduce((n, d) => n * d, 1));
  const strides = operands.map((t) => stridesIn(t.shape, shape));
  const offsets = operands.map(() => 0);
  const args = new Float64Array(operands.length);
  const index = shape.map(() => 0);
  for (let i = 0; i < result.length; i++) {
    for (let k = 0; k < operands.length; k++) args[k] = (operands[k] as Tensor).data[offsets[k] as number] as number;
    result[i] = f(args);
    for (let axis = shape.length - 1; axis >= 0; axis--) {
      const n = (index[axis] as number) + 1;
      const wraps = n === shape[axis];
      index[axis] = wraps ? 0 : n;
      const step = wraps ? 1 - n : 1;
      for (let k = 0; k < operands.length; k++)
        offsets[k] = (offsets[k] as number) + step * ((strides[k] as number[])[axis] as number);
      if (!wraps) break;
    }
  }
  return result;
};

const knowledgeOf = (row: Row): Knowledge => {
  const infer: Knowledge["infer"] = (inputs, attrs) => {
    expect.count(inputs, row.inputs);
    const operands = inputs.map((_, i) => expect.tensorAt(inputs, i, row.inputs[i] as string));
    const [first, ...rest] = row.condition ? operands.slice(1) : operands;
    if (first === undefined) return expect.fail("takes inputs");
    if (row.condition) expect.dtype(operands[0] as TensorType, ["bool"], "condition");
    expect.dtype(first, row.accepts, row.inputs[row.condition ? 1 : 0] as string);
    for (const t of rest)
      if (t.dtype !== first.dtype)
        expect.fail(`operands must have one dtype, got ${operands.map((o) => o.dtype).join(", ")}; cast one of them`);
    // reading the attributes here is what rejects bad ones
    row.scalar(
      operands.map((_, i) => arg(i)),
      attrs,
    );
    return [tensor(row.result?.(attrs) ?? first.dtype, expect.broadcast(operands))];
  };
  return {
    name: row.name,
    summary: row.summary,
    attrs: row.attrs ?? {},
    inputs: row.inputs,
    rowwise: "row",
    infer,
    scalar: row.scalar,
    evaluate(inputs, attrs, [out]) {
      const result = out as ConcreteTensor;
      const compute = compileScalar(
        row.scalar(
          inputs.map((_, i) => arg(i)),
          attrs,
        ),
      );
      const round = rounder(result.dtype);
      return [
        tensorOf(
          result,
          mapBroadcast(inputs as readonly Tensor[], result.shape, (args) => round(compute(args))),
        ),
      ];
    },
    cost(inputs, attrs, symbols) {
      const outputs = infer(inputs, attrs);
      const each = scalarFlops(
        row.scalar(
          inputs.map((_, i) => arg(i)),
          attrs,
        ),
      );
      return cost(each * elements(outputs[0] as TensorType, symbols), [...inputs, ...outputs], symbols);
    },
    samples: samplesOf(row),
  };
};

export const elementwise: readonly Knowledge[] = rows.map(knowledgeOf);
