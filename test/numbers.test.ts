import { describe, expect, test } from "vitest";
import { erf } from "../ir/arithmetic.ts";
import { type DType, decode, encode, floatCode, floatValue, nearestEven, randomNumbers, rounder, roundTo } from "../ir/index.ts";

/** The next double towards +infinity or -infinity. */
const beside = (x: number, up: boolean): number => {
  const view = new DataView(new ArrayBuffer(8));
  view.setFloat64(0, x);
  const bits = view.getBigInt64(0);
  view.setBigInt64(0, bits + (x > 0 === up ? 1n : -1n));
  return view.getFloat64(0);
};

/** Straight from the definition of a binary format with `e` exponent and `m` significand bits. */
const byDefinition = (code: number, e: number, m: number, fn: boolean): number => {
  const sign = (code >> (e + m)) & 1 ? -1 : 1;
  const field = (code >> m) & ((1 << e) - 1);
  const fraction = code & ((1 << m) - 1);
  const bias = (1 << (e - 1)) - 1;
  const last = (1 << e) - 1;
  if (field === last && !fn) return fraction === 0 ? sign * Infinity : NaN;
  if (field === last && fraction === (1 << m) - 1) return NaN;
  return field === 0 ? sign * fraction * 2 ** (1 - bias - m) : sign * (1 + fraction / 2 ** m) * 2 ** (field - bias);
};

const formats = [
  { dtype: "bf16", e: 8, m: 7, fn: false },
  { dtype: "f16", e: 5, m: 10, fn: false },
  { dtype: "e4m3", e: 4, m: 3, fn: true },
  { dtype: "e5m2", e: 5, m: 2, fn: false },
] as const;

describe.each(formats)("$dtype", ({ dtype, e, m, fn }) => {
  const codes = 1 << (1 + e + m);
  const half = codes / 2;

  test("every code has the value of the definition and comes back", () => {
    const wrong: number[] = [];
    for (let code = 0; code < codes; code++) {
      const value = floatValue(dtype, code);
      const back = floatCode(dtype, value);
      const same = Number.isNaN(value) ? Number.isNaN(floatValue(dtype, back)) : back === code;
      if (!same || !Object.is(value, byDefinition(code, e, m, fn))) wrong.push(code);
    }
    expect(wrong).toEqual([]);
  });

  test("between neighbours: to the nearest, ties to even, from doubles just beside the tie", () => {
    // positive finite codes are consecutive and ordered
    let failures = 0;
    for (let code = 0; code + 1 < half; code++) {
      const [low, high] = [floatValue(dtype, code), floatValue(dtype, code + 1)];
      if (!Number.isFinite(high)) break;
      const tie = low + (high - low) / 2;
      const even = code % 2 === 0 ? low : high;
      for (const sign of [1, -1]) {
        if (!Object.is(roundTo(dtype, sign * tie), sign * even)) failures++;
        if (!Object.is(roundTo(dtype, sign * beside(tie, false)), sign * low)) failures++;
        if (!Object.is(roundTo(dtype, sign * beside(tie, true)), sign * high)) failures++;
        if (!Object.is(roundTo(dtype, sign * low), sign * low)) failures++;
      }
    }
    expect(failures).toBe(0);
  });

  test("past the largest", () => {
    let top = half - 1;
    while (!Number.isFinite(floatValue(dtype, top))) top--;
    const max = floatValue(dtype, top);
    const step = max - floatValue(dtype, top - 1);
    const over = fn ? max : Infinity;
    expect(roundTo(dtype, beside(max + step / 2, false))).toBe(max);
    expect(roundTo(dtype, max + step / 2)).toBe(over);
    expect(roundTo(dtype, -max - step)).toBe(-over);
    for (const x of [1e39, 1e300, Number.MAX_VALUE, Infinity]) {
      expect(roundTo(dtype, x)).toBe(over);
      expect(roundTo(dtype, -x)).toBe(-over);
    }
    expect(roundTo(dtype, NaN)).toBeNaN();
  });

  test("the rounding for loops is the same", () => {
    const round = rounder(dtype);
    const random = randomNumbers(5);
    const different: number[] = [];
    const try1 = (x: number): void => {
      if (!Object.is(round(x), roundTo(dtype, x))) different.push(x);
    };
    for (let k = -1074; k <= 1023; k++)
      for (const j of [0, 2 ** -52, 2 ** -24, 0.25, 0.5, 1 - 2 ** -52, random(), random()])
        for (const s of [1, -1]) try1(s * 2 ** k * (1 + j));
    for (const x of [0, -0, NaN, Infinity, -Infinity, 5e-324, Number.MAX_VALUE]) try1(x);
    expect(different).toEqual([]);
  });

  test("tiny numbers keep their sign", () => {
    for (const x of [5e-324, 1e-300, 2 ** -1022]) {
      expect(roundTo(dtype, x)).toBe(0);
      expect(Object.is(roundTo(dtype, -x), -0)).toBe(true);
    }
    expect(Object.is(roundTo(dtype, -0), -0)).toBe(true);
  });

  test("monotone over doubles of all sizes", () => {
    let last = 0;
    const down: number[] = [];
    for (let k = -1074; k <= 1023; k++)
      for (let j = 0; j < 16; j++) {
        const x = 2 ** k * (1 + j / 16);
        const y = roundTo(dtype, x);
        if (!(y >= last)) down.push(x);
        last = y;
      }
    expect(down).toEqual([]);
  });
});

test("bf16 agrees with the upper half of f32 bits", () => {
  const view = new DataView(new ArrayBuffer(4));
  const wrong: number[] = [];
  for (let code = 0; code < 65536; code++) {
    view.setUint16(0, code);
    if (!Object.is(floatValue("bf16", code), view.getFloat32(0))) wrong.push(code);
  }
  expect(wrong).toEqual([]);
});

test("no double rounding: a double beside a tie that f32 would make a tie", () => {
  // 1 + 2^-8 is the tie between 1 and 1 + 2^-7; f32 cannot tell it from a bit more
  expect(roundTo("bf16", 1 + 2 ** -8 + 2 ** -50)).toBe(1 + 2 ** -7);
  expect(roundTo("bf16", 1 + 3 * 2 ** -8 - 2 ** -50)).toBe(1 + 2 ** -7);
  expect(roundTo("e4m3", 1 + 2 ** -4 + 2 ** -50)).toBe(1.125);
  expect(roundTo("f16", 1 + 2 ** -11 + 2 ** -50)).toBe(1 + 2 ** -10);
});

test("f32 and f64", () => {
  expect(roundTo("f32", 0.1)).toBe(Math.fround(0.1));
  expect(roundTo("f32", 1e39)).toBe(Infinity);
  expect(roundTo("f64", 0.1)).toBe(0.1);
});

describe("integers", () => {
  const ranges: readonly [DType, number, number][] = [
    ["i8", -128, 127],
    ["u8", 0, 255],
    ["i16", -32768, 32767],
    ["u16", 0, 65535],
    ["i32", -(2 ** 31), 2 ** 31 - 1],
    ["u32", 0, 2 ** 32 - 1],
  ];
  test.each(ranges)("%s: nearest even, clamped, NaN is 0", (dtype, min, max) => {
    expect(roundTo(dtype, 2.5)).toBe(2);
    expect(roundTo(dtype, 3.5)).toBe(4);
    expect(roundTo(dtype, 2.5000001)).toBe(3);
    expect(Object.is(roundTo(dtype, -0.4), 0)).toBe(true);
    expect(roundTo(dtype, min - 0.4)).toBe(min);
    for (const x of [max + 0.5, max + 1, 1e20, Infinity]) expect(roundTo(dtype, x)).toBe(max);
    for (const x of [min - 1, -1e20, -Infinity]) expect(roundTo(dtype, x)).toBe(min);
    expect(roundTo(dtype, NaN)).toBe(0);
  });
  test("64 bits and bool", () => {
    expect(roundTo("i64", 1e300)).toBe(2 ** 63 - 1024);
    expect(roundTo("i64", -1e300)).toBe(-(2 ** 63));
    expect(roundTo("u64", 1e300)).toBe(2 ** 64 - 2048);
    expect(roundTo("i64", 2 ** 53 - 1)).toBe(2 ** 53 - 1);
    expect([0, -0, 0.1, NaN, -3].map((x) => roundTo("bool", x))).toEqual([0, 0, 1, 1, 1]);
  });
  test("nearestEven on large and odd numbers", () => {
    for (const x of [2 ** 51 + 1, 2 ** 52 + 1, 2 ** 53, 1e300, Infinity, -Infinity]) expect(nearestEven(x)).toBe(x);
    expect(nearestEven(2 ** 50 + 0.5)).toBe(2 ** 50);
    expect(nearestEven(2 ** 50 + 1.5)).toBe(2 ** 50 + 2);
    expect(Object.is(nearestEven(-0.5), -0)).toBe(true);
    expect(nearestEven(NaN)).toBeNaN();
  });
});

describe("bytes", () => {
  test("little endian", () => {
    expect([...encode("f32", [1, -2])]).toEqual([0, 0, 128, 63, 0, 0, 0, 192]);
    expect([...encode("bf16", [1, Math.PI])]).toEqual([128, 63, 73, 64]);
    expect([...encode("i32", [-2, 258])]).toEqual([254, 255, 255, 255, 2, 1, 0, 0]);
    expect([...encode("e4m3", [448, 1e9, -1, NaN])]).toEqual([0x7e, 0x7e, 0xb8, 0x7f]);
    expect([...encode("bool", [3, 0])]).toEqual([1, 0]);
    expect([...encode("i64", [-1])]).toEqual(Array.from({ length: 8 }, () => 255));
  });
  test.each(["f64", "f32", "f16", "bf16", "e4m3", "e5m2", "i64", "i32", "i16", "i8", "u64", "u32", "u16", "u8", "bool"] as const)(
    "%s comes back",
    (dtype) => {
      const values = [0, 1, 2, -3, 7.25, 100.7, -40000, 1e6, 3e9, -3e9, 1e18, NaN, Infinity, -Infinity].map((x) =>
        roundTo(dtype, x),
      );
      expect([...decode(dtype, encode(dtype, values))]).toEqual(values);
    },
  );
  test("at an odd offset, and half an element", () => {
    const bytes = Uint8Array.from([9, ...encode("f32", [1.5, 2.5])]);
    expect([...decode("f32", bytes.subarray(1))]).toEqual([1.5, 2.5]);
    expect(() => decode("f32", bytes.subarray(2))).toThrow("7 bytes");
  });
});

test("erf against published values", () => {
  // Abramowitz and Stegun, table 7.1, and Wolfram for the tails
  const table: readonly [number, number][] = [
    [0.1, 0.1124629160182849],
    [0.5, 0.5204998778130465],
    [1, 0.8427007929497149],
    [1.5, 0.9661051464753108],
    [2, 0.9953222650189527],
    [2.5, 0.999593047982555],
    [3, 0.9999779095030014],
    [4, 0.9999999845827421],
    [5, 0.9999999999984626],
  ];
  for (const [x, y] of table) {
    expect(Math.abs(erf(x) - y)).toBeLessThan(4e-16);
    expect(erf(-x)).toBe(-erf(x));
  }
  expect(erf(1e-20)).toBeCloseTo(1.128379167095512e-20, 30);
  expect([erf(0), erf(30), erf(-Infinity), erf(NaN)]).toEqual([0, 1, -1, NaN]);
  // both formulas meet
  expect(Math.abs(erf(2.4999999999999996) - erf(2.5))).toBeLessThan(4e-16);
});
