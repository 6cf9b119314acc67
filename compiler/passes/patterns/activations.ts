/** Functions of elements in pieces: SiLU, and GELU by erf and by tanh; and softmax over the last axis. */
import type { Op, Value } from "../../../ir/graph.ts";
import { cast, either, isNumber, type Look, miss, near, type Pattern, type Product, pattern, typeOf } from "./look.ts";

/** x of 1 / (1 + e^-x) */
const sigmoidOf = (g: Look, v: Value): Value => {
  const op = g.maker(g.bare(v));
  const [x, y] = (op?.inputs ?? []) as [Value, Value];
  if (op?.kind === "sigmoid") return x;
  if (op?.kind === "div") g.constant(x, 1, "the dividend");
  return op?.kind === "div" || op?.kind === "reciprocal"
    ? logisticOf(g, op.kind === "div" ? y : x)
    : miss(`'${v.name}' is no sigmoid`);
};
/** x of 1 + e^-x */
const logisticOf = (g: Look, v: Value): Value => {
  const { x: power, number } = g.plusNumber(v, "the divisor");
  if (number !== 1) miss(`the divisor adds ${number}, not 1`);
  const exponent = g.made(power, "exp", "what 1 is added to").inputs[0] as Value;
  const { by, factors } = g.product(exponent);
  return by === -1 && factors.length === 1 ? (factors[0] as Value) : miss("the exponent is not -x");
};

/** Patterns of f64 stay as they are: the ops compute in f32. */
const notDouble = (op: Op): void => {
  if (typeOf(op.outputs[0] as Value).dtype === "f64") miss("it is f64");
};

export const silu: Pattern = pattern<Value>({
  name: "silu",
  roots: ["mul", "div"],
  match(op, g) {
    notDouble(op);
    const gated = (x: Value, gate: Value): Value => {
      if (!g.same(x, gate)) near(() => miss(`the sigmoid is of '${g.bare(gate).name}', and '${g.bare(x).name}' is multiplied`));
      g.sized(op, x);
      return g.operand(x);
    };
    if (op.kind === "mul") return g.both(op, (x, y) => gated(x, sigmoidOf(g, y)));
    const [x, y] = op.inputs as readonly [Value, Value];
    return gated(x, logisticOf(g, y));
  },
  build: (b, x, op) => b.op("silu", [cast(b, x, typeOf(op.outputs[0] as Value).dtype)]),
});

/** What is left of a product's factors without the first that `is` takes, and what that made of it. */
const without = <R>(g: Look, { by, factors }: Product, is: (v: Value) => R): { readonly rest: Product; readonly found: R } =>
  either(
    ...factors.map((f, i) => (): { readonly rest: Product; readonly found: R } => ({
      found: is(f),
      rest: { by, factors: factors.filter((_, j) => j !== i) },
    })),
    () => miss(`'${g.bare(factors[0] as Value).name}' has no such factor`),
  );

/** The operand of 1 + f(y) */
const onePlus = (g: Look, v: Value, fn: string): Value => {
  const { x, number } = g.plusNumber(v, "a factor");
  if (number !== 1) miss(`a factor adds ${number}, not 1`);
  return g.made(x, fn, "what 1 is added to").inputs[0] as Value;
};

/** `by` times x^power, and nothing else */
const monomial = (g: Look, v: Value, x: Value, by: number, power: number, what: string): void => {
  const p = g.product(v);
  const degree = p.factors.reduce((sum, f) => {
    const op = g.maker(f);
    const exponent = op?.kind === "pow" ? g.number(op.inputs[1]) : undefined;
    if (g.same(f, x)) return sum + 1;
    return exponent !== undefined && g.same(op?.inputs[0] as Value, x) ? sum + exponent : Number.NaN;
  }, 0);
  if (degree !== power) miss(`${what} is not of '${x.name}'${power === 1 ? "" : ` to the power ${power}`}`);
  if (!isNumber(p.by, by)) miss(`${what} has the factor ${p.by}, not ${by}`);
};

/** y = sqrt(2/pi) (x + 0.044715 x^3), or with x taken out of the sum */
const tanhArgument = (g: Look, y: Value, x: Value): void => {
  const { by, factors } = g.product(y);
  if (!isNumber(by, Math.sqrt(2 / Math.PI))) miss(`tanh's operand has the factor ${by}, not sqrt(2/pi)`);
  const sum = factors.find((f) => g.maker(f)?.kind === "add") ?? miss("tanh's operand has no sum");
  const others = factors.filter((f) => f !== sum);
  const op = g.made(sum, "add");
  if (others.length === 0)
    g.both(op, (a, b) => {
      if (!g.same(a, x)) miss(`tanh is of no sum with '${x.name}'`);
      monomial(g, b, x, 0.044715, 3, "the cubic term");
    });
  else {
    if (others.length !== 1 || !g.same(others[0] as Value, x)) miss(`tanh's operand is no multiple of '${x.name}'`);
    g.both(op, (a, b) => {
      g.constant(a, 1, "the sum's first term");
      monomial(g, b, x, 0.044715, 2, "the square term");
    });
  }
};

interface Gelu {
  readonly x: Value;
  readonly approximate: "none" | "tanh";
}
export const gelu: Pattern = pattern<Gelu>({
  name: "gelu",
  roots: ["mul", "div"],
  match(op, g) {
    const [out] = op.outputs as readonly [Value];
    notDouble(op);
    const all = g.product(out);
    const { rest, found } = either(
      ...(["erf", "tanh"] as const).map((fn) => () => without(g, all, (v) => ({ fn, y: onePlus(g, v, fn) }))),
    );
    return near(() => {
      const [x, ...others] = rest.factors;
      if (x === undefined || others.length > 0)
        return miss(`1 + ${found.fn} has ${rest.factors.length} factors beside it, not 1`);
      if (!isNumber(rest.by, 0.5)) miss(`the product has the factor ${rest.by}, not 0.5`);
      if (found.fn === "erf") monomial(g, found.y, x, Math.SQRT1_2, 1, "erf's operand");
      else tanhArgument(g, found.y, x);
      g.sized(op, x);
      return { x, approximate: found.fn === "erf" ? "none" : "tanh" };
    });
  },
  build: (b, { x, approximate }, op) =>
    b.op("gelu", [cast(b, x, typeOf(op.outputs[0] as Value).dtype)], approximate === "tanh" ? { approximate } : {}),
});

export const softmax: Pattern = pattern<Value>({
  name: "softmax",
  roots: ["div", "mul"],
  match(op, g) {
    notDouble(op);
    const overSum = (powers: Value, sum: Value): Value => {
      const exp = g.made(powers, "exp", "the dividend");
      const total = g.made(sum, "reduce", "the divisor");
      return near(() => {
        if (total.attrs.fn !== "sum" || total.attrs.group !== undefined) miss("the divisor is no sum over the last axis");
        if (!g.same(total.inputs[0] as Value, powers)) miss("the sum is not of what is divided");
        const [x, most] = g.made(exp.inputs[0] as Value, "sub", "the exponent").inputs as readonly [Value, Value];
        const max = g.made(most, "reduce", "what is taken from the exponent");
        if (max.attrs.fn !== "max" || max.attrs.group !== undefined)
          miss("no maximum over the last axis is taken from the exponent");
        if (!g.same(max.inputs[0] as Value, x)) miss(`the maximum is not of '${x.name}'`);
        g.sized(op, x);
        return g.operand(x);
      });
    };
    const [x, y] = op.inputs as readonly [Value, Value];
    if (op.kind === "div") return overSum(x, y);
    return g.both(op, (a, b) => overSum(a, g.made(b, "reciprocal", "a factor").inputs[0] as Value));
  },
  build: (b, x, op) => b.op("softmax", [cast(b, x, typeOf(op.outputs[0] as Value).dtype)]),
});
