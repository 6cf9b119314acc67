/** Scalar expressions in double: what `scalar` of an op means. */
import { nearestEven, rounder } from "./round.ts";
import type { BinaryScalar, Scalar, UnaryScalar } from "./scalar.ts";

const twoOverRootPi = 2 / Math.sqrt(Math.PI);

/**
 * The error function to about 1 ulp. Below 2.5 the series erf x = 2/sqrt(pi) e^(-x^2) sum of 2^n x^(2n+1) / (1*3*..*(2n+1)), all terms
 * positive; above, 1 - erfc x by its continued fraction (Abramowitz and Stegun 7.1.6 and 7.1.14).
 */
export const erf = (x: number): number => {
  const a = Math.abs(x);
  if (Number.isNaN(x) || a === 0) return x;
  const sign = x < 0 ? -1 : 1;
  if (a > 6) return sign;
  if (a < 2.5) {
    let term = a;
    let sum = a;
    for (let n = 1; term > sum * 1e-18; n++) {
      term *= (2 * a * a) / (2 * n + 1);
      sum += term;
    }
    return sign * twoOverRootPi * Math.exp(-a * a) * sum;
  }
  let tail = a;
  for (let n = 60; n >= 1; n--) tail = a + n / 2 / tail;
  return sign * (1 - (twoOverRootPi * Math.exp(-a * a)) / (2 * tail));
};

const unary: Readonly<Record<UnaryScalar, (x: number) => number>> = {
  neg: (x) => -x,
  abs: Math.abs,
  exp: Math.exp,
  log: Math.log,
  sqrt: Math.sqrt,
  rsqrt: (x) => 1 / Math.sqrt(x),
  tanh: Math.tanh,
  erf,
  sin: Math.sin,
  cos: Math.cos,
  tan: Math.tan,
  asin: Math.asin,
  acos: Math.acos,
  atan: Math.atan,
  sinh: Math.sinh,
  cosh: Math.cosh,
  asinh: Math.asinh,
  acosh: Math.acosh,
  atanh: Math.atanh,
  floor: Math.floor,
  ceil: Math.ceil,
  trunc: Math.trunc,
  nearest: nearestEven,
  not: (x) => (x === 0 ? 1 : 0),
};

const binary: Readonly<Record<BinaryScalar, (x: number, y: number) => number>> = {
  add: (x, y) => x + y,
  sub: (x, y) => x - y,
  mul: (x, y) => x * y,
  div: (x, y) => x / y,
  fmod: (x, y) => x % y,
  min: Math.min,
  max: Math.max,
  // IEEE: 1 to any power is 1, and so is -1 to an infinite one; JavaScript gives NaN
  pow: (x, y) => (x === 1 || (x === -1 && Math.abs(y) === Infinity) ? 1 : x ** y),
  lt: (x, y) => (x < y ? 1 : 0),
  le: (x, y) => (x <= y ? 1 : 0),
  eq: (x, y) => (x === y ? 1 : 0),
  and: (x, y) => (x !== 0 && y !== 0 ? 1 : 0),
  or: (x, y) => (x !== 0 || y !== 0 ? 1 : 0),
  bit_and: (x, y) => Number(BigInt(x) & BigInt(y)),
  bit_or: (x, y) => Number(BigInt(x) | BigInt(y)),
  bit_xor: (x, y) => Number(BigInt(x) ^ BigInt(y)),
};

/** A function of the values of the arguments. */
export const compileScalar = (s: Scalar): ((args: ArrayLike<number>) => number) => {
  switch (s.op) {
    case "const": {
      const { value } = s;
      return () => value;
    }
    case "arg": {
      const { index } = s;
      return (args) => args[index] as number;
    }
    case "round": {
      const x = compileScalar(s.x);
      const round = rounder(s.dtype);
      return (args) => round(x(args));
    }
    case "select": {
      const [condition, x, y] = [compileScalar(s.if), compileScalar(s.x), compileScalar(s.y)];
      return (args) => (condition(args) !== 0 ? x(args) : y(args));
    }
    case "neg":
    case "abs":
    case "exp":
    case "log":
    case "sqrt":
    case "rsqrt":
    case "tanh":
    case "erf":
    case "sin":
    case "cos":
    case "tan":
    case "asin":
    case "acos":
    case "atan":
    case "sinh":
    case "cosh":
    case "asinh":
    case "acosh":
    case "atanh":
    case "floor":
    case "ceil":
    case "trunc":
    case "nearest":
    case "not": {
      const x = compileScalar(s.x);
      const f = unary[s.op];
      return (args) => f(x(args));
    }
    default: {
      const [x, y] = [compileScalar(s.x), compileScalar(s.y)];
      const f = binary[s.op];
      return (args) => f(x(args), y(args));
    }
  }
};

/** Arithmetic nodes of an expression: the flops of one element. */
export const scalarFlops = (s: Scalar): number => {
  if (s.op === "const" || s.op === "arg") return 0;
  if (s.op === "select") return 1 + scalarFlops(s.if) + scalarFlops(s.x) + scalarFlops(s.y);
  if (s.op === "round") return scalarFlops(s.x);
  return 1 + scalarFlops(s.x) + ("y" in s ? scalarFlops(s.y) : 0);
};
