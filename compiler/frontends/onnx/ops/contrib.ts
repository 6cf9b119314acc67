/** The other operators of com.microsoft, ONNX Runtime's own: normalisations, functions of elements and products. */
import type { Dim } from "../../../../ir/dim.ts";
import { isFloat } from "../../../../ir/type.ts";
import type { Call, Lowering } from "../call.ts";
import type { Item } from "../emitter.ts";
import { binary, inWide, wide } from "./elementwise.ts";
import { normalised } from "./normalise.ts";
import { matmul } from "./products.ts";

/** x / sqrt(mean x^2 + epsilon), rounded, times scale */
const rms = (c: Call, x: Item, scale: Item, eps: number): Item => c.e.op("rms_norm", [x, c.e.cast(scale, x.type.dtype)], { eps });

const simplified: Lowering = (c) => {
  const axis = c.axis(c.int("axis", -1), c.rank(0));
  const eps = c.float("epsilon", 1e-5);
  const last = axis === c.rank(0) - 1 && c.rank(1) === 1 && !c.wants(1);
  if (last && typeof c.shape(1)[0] === "number") return rms(c, c.x0, c.x(1), eps);
  const { y, inverse } = normalised(c, wide(c.e, c.x0), axis, eps, false);
  const scaled = binary(c.e, "mul", y, c.e.cast(c.x(1), y.type.dtype));
  return [c.e.cast(scaled, c.dtype(0)), inverse];
};

/** Of input + skip + bias, which is the fourth result. */
const skipped =
  (work: (c: Call, sum: Item) => readonly [Item, Item?, Item?]): Lowering =>
  (c) => {
    const bias = c.optional(c.node.op === "SkipLayerNormalization" ? 4 : 3);
    const sum = inWide(c.e, [c.x(0), c.x(1), ...(bias ? [bias] : [])], (x, ...rest) =>
      rest.reduce((a, b) => binary(c.e, "add", a, b), x as Item),
    );
    const [y, mean, inverse] = work(c, sum);
    return [y, mean, inverse, sum];
  };

const skipSimplified = skipped((c, sum) => [rms(c, sum, c.x(2), c.float("epsilon", 1e-12))]);
const skipLayerNorm = skipped((c, sum) => {
  const { e } = c;
  const { y, mean, inverse } = normalised(c, wide(e, sum), sum.type.shape.length - 1, c.float("epsilon", 1e-12), true);
  const scaled = binary(e, "mul", y, e.cast(c.x(2), y.type.dtype));
  const moved = c.has(3) ? binary(e, "add", scaled, e.cast(c.x(3), y.type.dtype)) : scaled;
  return [e.cast(moved, sum.type.dtype), mean, inverse];
});

/** Rows of the tables for words, places and segments, added and normalised; how many tokens a mask leaves; the sum. */
const embedLayerNorm: Lowering = (c) => {
  const { e } = c;
  const [batch, rows] = c.shape(0) as [Dim, Dim];
  const taken = (table: number, ids: Item): Item => wide(e, e.op("take", [c.x(table), ids], { axis: 0 }));
  const places = c.optional(8) ?? e.iota([1, rows], 1);
  const parts = [taken(2, c.x(0)), taken(3, places), ...(c.has(1) && c.has(4) ? [taken(4, c.x(1))] : [])];
  const sum = parts.reduce((a, b) => binary(e, "add", a, b));
  const { y } = normalised(c, sum, 2, c.float("epsilon", 1e-12), true);
  const scaled = binary(e, "add", binary(e, "mul", y, wide(e, c.x(5))), wide(e, c.x(6)));
  const { dtype } = c.x(2).type;
  const seen = (): Item =>
    c.has(7)
      ? e.reshape(e.op("reduce", [e.cast(c.x(7), "i32")], { fn: "sum" }), [batch])
      : e.broadcast(e.number(0, "i32"), [batch]);
  return [e.cast(scaled, dtype), c.wants(1) ? seen() : undefined, c.wants(2) ? e.cast(sum, dtype) : undefined];
};

const gelu =
  (approximate: "none" | "tanh"): Lowering =>
  (c) =>
    inWide(c.e, [c.x0, ...(c.has(1) ? [c.x(1)] : [])], (x, bias) =>
      c.e.op("gelu", [bias ? binary(c.e, "add", x as Item, bias) : (x as Item)], { approximate }),
    );
/** x sigmoid(alpha x) */
const quickGelu: Lowering = (c) =>
  inWide(c.e, [c.x0], (x) =>
    c.e.op("mul", [x, c.e.op("sigmoid", [c.e.op("mul", [x, c.e.number(c.float("alpha", 1.702), x.type.dtype)])])]),
  );

/** alpha A B; of each operand the first axis is moved behind the batch's (`transBatch`), and the last two change places (`trans`). */
const fusedMatmul: Lowering = (c) => {
  const arranged = (x: Item, which: string): Item => {
    const rank = x.type.shape.length;
    if (rank < 2) return x;
    const axes = x.type.shape.map((_, i) => i);
    const moved = c.flag(`transBatch${which}`, false) ? [...axes.slice(1, -1), 0, rank - 1] : axes;
    const [row, column] = moved.slice(-2) as [number, number];
    return c.e.transpose(x, c.flag(`trans${which}`, false) ? [...moved.slice(0, -2), column, row] : moved);
  };
  if (!isFloat(c.dtype(0))) c.fail(`operands must be floats, got ${c.dtype(0)}`);
  return inWide(c.e, [arranged(c.x(0), "A"), arranged(c.x(1), "B")], (a, b) => {
    const product = matmul(c, a as Item, b as Item);
    const alpha = c.float("alpha", 1);
    return alpha === 1 ? product : binary(c.e, "mul", product, c.e.number(alpha, product.type.dtype));
  });
};

export const contrib: Readonly<Record<string, Lowering>> = {
  SimplifiedLayerNormalization: simplified,
  SkipSimplifiedLayerNormalization: skipSimplified,
  SkipLayerNormalization: skipLayerNorm,
  EmbedLayerNormalization: embedLayerNorm,
  Gelu: gelu("none"),
  BiasGelu: gelu("none"),
  FastGelu: gelu("tanh"),
  QuickGelu: quickGelu,
  FusedMatMul: fusedMatmul,
};
/** Of ONNX Runtime, in ONNX's own domain. */
export const contribOfOnnx: Readonly<Record<string, Lowering>> = { SimplifiedLayerNormalization: simplified };
