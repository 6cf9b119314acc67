/** Conversions between floats and codes with a scale and a zero point, and products of codes. Formulas are those of ONNX's definitions. */
import { ceilDivDim, type Dim, mulDim, product } from "../../../../ir/dim.ts";
import { type DType, dtypeBytes, isFloat } from "../../../../ir/type.ts";
import type { Call, Lowering } from "../call.ts";
import type { Emitter, Item } from "../emitter.ts";
import { irDType } from "../types.ts";
import { binary, convert, typeOf, wide } from "./elementwise.ts";

/** Each element of the axis `size` times, one after another, and of these the first `count`. */
const repeated = (e: Emitter, x: Item, axis: number, size: number, count: Dim): Item => {
  const { shape } = x.type;
  const own = shape[axis] as Dim;
  const wider = [...shape.slice(0, axis + 1), size, ...shape.slice(axis + 1)];
  const apart = e.reshape(x, wider.with(axis + 1, 1));
  const all = e.reshape(e.broadcast(apart, wider), shape.with(axis, mulDim(own, size)));
  return e.slice(all, axis, 0, count);
};

/** A scale or zero point in a shape that broadcasts to x's: one for all, one for each index of `axis`, or one for each block of it. */
const spread = (c: Call, p: Item, x: Item): Item => {
  const { shape } = x.type;
  const own = p.type.shape;
  const block = c.int("block_size", 0);
  if (product(own) === 1 && block === 0) return c.e.reshape(p, []);
  const axis = c.axis(c.int("axis", 1), shape.length);
  if (block === 0) {
    if (own.length !== 1) c.fail(`a scale for each index of an axis must be a vector, got ${own.length} axes`);
    return c.e.reshape(
      p,
      shape.map((_, i): Dim => (i === axis ? (own[0] as Dim) : 1)),
    );
  }
  if (own.length !== shape.length || own[axis] !== ceilDivDim(shape[axis] as Dim, block))
    c.fail(`scales of shape [${own.join(",")}] are not those of blocks of ${block} along axis ${axis} of [${shape.join(",")}]`);
  return repeated(c.e, p, axis, block, shape[axis] as Dim);
};

/** The least and the greatest code of an integer type. */
const range = (name: string): readonly [number, number] => {
  const bits = Number(name.slice(1));
  return name.startsWith("u") ? [0, 2 ** bits - 1] : [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1];
};
const clamped = (e: Emitter, x: Item, [low, high]: readonly [number, number]): Item => {
  const n = (v: number): Item => e.number(v, x.type.dtype);
  return e.op("minimum", [e.op("maximum", [x, n(low)]), n(high)]);
};

/** clamp(nearest(x / scale) + zero point), ties to even; of fp8 the conversion of x / scale. */
const quantize: Lowering = (c) => {
  const { e } = c;
  const zero = c.optional(2);
  const given = c.int("output_dtype", 0);
  const name = zero ? (zero.narrow ?? zero.type.dtype) : given === 0 ? "u8" : typeOf(c, given);
  const asked = c.int("precision", 0);
  const ofScale = c.dtype(1);
  const precision: DType = asked !== 0 ? irDType(typeOf(c, asked)) : isFloat(ofScale) ? ofScale : "f32";
  const at = (x: Item): Item => wide(e, e.cast(x, precision));
  // the quotient is rounded to the precision, and goes on in f32
  const quotient = wide(e, e.cast(binary(e, "div", at(c.x0), at(spread(c, c.x(1), c.x0))), precision));
  if (name.startsWith("e")) return convert(c, quotient, name);
  const whole = e.op("nearest", [quotient]);
  const sum = zero ? binary(e, "add", whole, e.cast(spread(c, zero, c.x0), whole.type.dtype)) : whole;
  const codes = e.cast(clamped(e, sum, range(name)), irDType(name));
  return name === codes.type.dtype ? codes : { ...codes, narrow: name };
};

/** (x - zero point) * scale */
const dequantize: Lowering = (c) => {
  const { e } = c;
  const given = c.int("output_dtype", 0);
  const to = given === 0 ? c.dtype(1) : irDType(typeOf(c, given));
  const as = (x: Item): Item => e.cast(x, "f32");
  const x = as(c.x0);
  const from = c.has(2) ? binary(e, "sub", x, as(spread(c, c.x(2), c.x0))) : x;
  return e.cast(binary(e, "mul", from, as(spread(c, c.x(1), c.x0))), to);
};

/** To u8 by the range of x with 0 in it. */
const dynamicQuantize: Lowering = (c) => {
  const { e } = c;
  const n = (v: number): Item => e.number(v, "f32");
  const flat = e.reshape(c.x0, [product(c.shape(0))]);
  const extreme = (fn: "max" | "min"): Item => e.reshape(e.op("reduce", [flat], { fn }), []);
  const low = e.op("minimum", [extreme("min"), n(0)]);
  const high = e.op("maximum", [extreme("max"), n(0)]);
  const raw = e.op("div", [e.op("sub", [high, low]), n(255)]);
  const scale = e.op("where", [e.op("equal", [raw, n(0)]), n(1), raw]);
  const zero = e.op("nearest", [clamped(e, e.op("neg", [e.op("div", [low, scale])]), [0, 255])]);
  const whole = e.op("nearest", [binary(e, "div", c.x0, scale)]);
  return [e.cast(binary(e, "add", whole, zero), "u8"), scale, e.cast(zero, "u8")];
};

/** A zero point or scale of each row of a, or of each column of b: a vector is one of rows where `rows`. */
const perRow = (e: Emitter, p: Item, rows: boolean): Item => {
  const { shape } = p.type;
  if (product(shape) === 1) return e.reshape(p, []);
  return rows && shape.length === 1 ? e.reshape(p, [shape[0] as Dim, 1]) : p;
};
/** The codes without their zero point, in f64: products of codes are below 2^53, and exact. */
const centred = (e: Emitter, x: Item, zero: Item | undefined, rows: boolean): Item => {
  const whole = e.cast(x, "f64");
  return zero ? binary(e, "sub", whole, e.cast(perRow(e, zero, rows), "f64")) : whole;
};
/** a times b; vectors are rows on the left and columns on the right. */
const productOf = (e: Emitter, a: Item, b: Item): Item => {
  const [left, right] = [a.type.shape, b.type.shape];
  const result = e.op("matmul", [
    left.length === 1 ? e.reshape(a, [1, left[0] as Dim]) : a,
    right.length === 1 ? e.reshape(b, [right[0] as Dim, 1]) : b,
  ]);
  const { shape } = result.type;
  const kept = shape.filter(
    (_, i) => !(left.length === 1 && i === shape.length - 2) && !(right.length === 1 && i === shape.length - 1),
  );
  return e.reshape(result, kept);
};

const matmulInteger: Lowering = (c) => {
  const product = productOf(c.e, centred(c.e, c.x(0), c.optional(2), true), centred(c.e, c.x(1), c.optional(3), false));
  return c.e.op("cast", [product], { to: "i32", overflow: "wrap" });
};

/** clamp(nearest(a b * (a_scale * b_scale / y_scale) + y_zero_point)) */
const qLinearMatmul: Lowering = (c) => {
  const { e } = c;
  const product = productOf(e, centred(e, c.x(0), c.optional(2), true), centred(e, c.x(3), c.optional(5), false));
  const scale = (i: number, rows: boolean): Item => e.cast(perRow(e, c.x(i), rows), "f32");
  const factor = binary(e, "div", binary(e, "mul", scale(1, true), scale(4, false)), scale(6, true));
  const real = binary(e, "mul", product, e.cast(factor, "f64"));
  const { dtype } = c.x(7).type;
  if (isFloat(dtype) || dtypeBytes(dtype) !== 1) c.fail(`results must be i8 or u8, got ${dtype}`);
  const sum = binary(e, "add", e.op("nearest", [real]), e.cast(perRow(e, c.x(7), true), "f64"));
  return e.cast(clamped(e, sum, range(dtype)), dtype);
};

/** ONNX Runtime has them too. */
export const conversions: Readonly<Record<string, Lowering>> = { QuantizeLinear: quantize, DequantizeLinear: dequantize };
export const quantisations: Readonly<Record<string, Lowering>> = {
  ...conversions,
  DynamicQuantizeLinear: dynamicQuantize,
  MatMulInteger: matmulInteger,
  QLinearMatMul: qLinearMatmul,
};
