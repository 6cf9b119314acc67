/** Operators of com.microsoft on weights in codes, which become floats when the model is read, and mixtures of experts. */
import { ceilDivDim, type Dim, mulDim, product } from "../../../../ir/dim.ts";
import { rounder } from "../../../../ir/round.ts";
import type { Tensor } from "../../../../ir/tensor.ts";
import { type DType, isFloat, tensor } from "../../../../ir/type.ts";
import type { Call, Lowering } from "../call.ts";
import type { Item } from "../emitter.ts";
import { dimAt } from "./attention.ts";
import { binary } from "./elementwise.ts";

/** A weight that is made of constants of the model when somebody asks for its elements. */
const made = (c: Call, from: number, shape: readonly number[], dtype: DType, read: () => Float64Array): Item =>
  c.e.stored({
    type: tensor(dtype, shape),
    name: c.node.inputs[from] ?? "w",
    read: () => ({ kind: "tensor", dtype, shape, data: read() }),
  });

const constantsOnly = (c: Call, inputs: readonly number[]): void => {
  for (const i of inputs)
    if (c.optional(i)?.runs) c.fail(`input ${i} must be a constant: weights in codes are decoded when the model is read`);
};
const numbersOf = (c: Call, shape: readonly Dim[]): readonly number[] =>
  shape.map((d) => (typeof d === "number" ? d : c.fail(`a weight's sizes must be numbers, got '${d}'`)));

/** Rows of codes along an axis of `size`, of which `block` share a scale and a zero point; `inner` elements lie beside each. */
interface Codes {
  readonly rows: number;
  readonly size: number;
  readonly inner: number;
  readonly block: number;
  /** bits of a code: below 8, several fill a byte from its lowest bit on, and a row ends with its last byte */
  readonly bits: number;
}
/** Code i of a row that starts at byte `start`. */
const codeAt = (bytes: Float64Array, start: number, i: number, bits: number): number => {
  const perByte = 8 / bits;
  return Math.floor((bytes[start + Math.floor(i / perByte)] as number) / 2 ** ((i % perByte) * bits)) % 2 ** bits;
};
/** Zero points in rows of `count`, which start with a byte of their own; or `otherwise` where there are none. */
const zeroPoints = (zeros: Tensor | undefined, bits: number, count: number, otherwise: number): ((i: number) => number) => {
  if (zeros === undefined) return () => otherwise;
  if (bits === 8 || isFloat(zeros.dtype)) return (i) => zeros.data[i] as number;
  const bytes = Math.ceil((count * bits) / 8);
  return (i) => codeAt(zeros.data, Math.floor(i / count) * bytes, i % count, bits);
};
/** (code - zero) * scale */
const decoded = (codes: Tensor, scales: Tensor, zeroAt: (i: number) => number, how: Codes, dtype: DType): Float64Array => {
  const { rows, size, inner, block, bits } = how;
  const round = rounder(dtype);
  const blocks = Math.ceil(size / block);
  const result = new Float64Array(rows * size * inner);
  const bytes = codes.data.length / rows;
  let at = 0;
  for (let r = 0; r < rows; r++)
    for (let i = 0; i < size; i++)
      for (let j = 0; j < inner; j++) {
        const code = bits < 8 ? codeAt(codes.data, r * bytes, i, bits) : (codes.data[at] as number);
        const group = (r * blocks + Math.floor(i / block)) * inner + j;
        result[at++] = round((code - zeroAt(group)) * (scales.data[group] as number));
      }
  return result;
};

const matmulNBits: Lowering = (c) => {
  const { e } = c;
  const [k, n, bits, block] = [c.int("K"), c.int("N"), c.int("bits", 4), c.int("block_size")];
  if (![2, 4, 8].includes(bits)) c.fail(`bits must be 2, 4 or 8, got ${bits}`);
  if (c.has(4)) c.fail("g_idx is not supported");
  constantsOnly(c, [1, 2, 3]);
  const { dtype } = c.x0.type;
  const blocks = Math.ceil(k / block);
  if (product(c.shape(1)) !== n * blocks * ((block * bits) / 8) || product(c.shape(2)) !== n * blocks)
    c.fail(`codes and scales must be those of ${n} rows of ${blocks} blocks`);
  const w = made(c, 1, [n, k], dtype, () => {
    const zeros = zeroPoints(c.has(3) ? c.constant(3) : undefined, bits, blocks, 2 ** (bits - 1));
    return decoded(c.constant(1), c.constant(2), zeros, { rows: n, size: k, inner: 1, block, bits }, dtype);
  });
  const lead = c.shape(0).slice(0, -1);
  const rows = e.reshape(c.x0, [product(lead), k]);
  const bias = c.optional(5);
  const y = bias
    ? e.cast(binary(e, "add", e.op("linear", [rows, w], { to: "f32" }), e.cast(bias, "f32")), dtype)
    : e.op("linear", [rows, w]);
  return e.reshape(y, [...lead, n]);
};

const gatherBlocks: Lowering = (c) => {
  const { e } = c;
  const [data, scales] = [c.x(0), c.x(2)];
  const own = numbersOf(c, data.type.shape);
  const bits = data.narrow ? Number(data.narrow.slice(1)) : c.int("bits", 4);
  const packed = data.narrow === undefined && bits < 8;
  const block = c.int("block_size", 128);
  const axis = c.axis(c.int("quantize_axis", 1), own.length);
  const last = own.length - 1;
  if (packed && axis !== last) c.fail("codes that share bytes must be quantised along the last axis");
  constantsOnly(c, [0, 2, 3]);
  const shape = packed ? own.with(last, ((own[last] as number) * 8) / bits) : own;
  const size = shape[axis] as number;
  const count = (dims: readonly number[]): number => dims.reduce((a, b) => a * b, 1);
  const how = {
    rows: count(shape.slice(0, axis)),
    size,
    inner: count(shape.slice(axis + 1)),
    block,
    bits: packed ? bits : 8,
  };
  const blocks = Math.ceil(size / block);
  const otherwise = data.narrow === undefined ? 2 ** (bits - 1) : 0;
  const { dtype } = scales.type;
  const table = made(c, 0, shape, dtype, () =>
    decoded(
      c.constant(0),
      c.constant(2),
      zeroPoints(c.has(3) ? c.constant(3) : undefined, how.bits, blocks, otherwise),
      how,
      dtype,
    ),
  );
  const from = c.axis(c.int("gather_axis", 0), own.length);
  const index = c.x(1);
  const extent = e.number(shape[from] as number, index.type.dtype);
  const negative = binary(e, "less", index, e.number(0, index.type.dtype));
  return e.op("take", [table, e.op("where", [negative, binary(e, "add", index, extent), index])], { axis: from });
};

// --- mixtures of experts ---

/** One linear of all experts: w[E, N, K] and a bias[E, N]. */
interface Experts {
  readonly w: Item;
  readonly bias: Item | undefined;
}

/** Rows `start`, `start + step`, ... of each expert's matrix. */
const rowsOf = (c: Call, of: Experts, from: number, start: number, step: number, count: number): Experts => {
  const bias = of.bias && c.e.slice(of.bias, 1, start, count, step);
  if (of.w.runs) return { w: c.e.slice(of.w, 1, start, count, step), bias };
  const [experts, n, k] = numbersOf(c, of.w.type.shape) as [number, number, number];
  const w = made(c, from, [experts, count, k], of.w.type.dtype, () => {
    const { data } = c.e.tensorOf(of.w) as Tensor;
    const result = new Float64Array(experts * count * k);
    for (let x = 0; x < experts; x++)
      for (let r = 0; r < count; r++) {
        const row = (x * n + start + r * step) * k;
        result.set(data.subarray(row, row + k), (x * count + r) * k);
      }
    return result;
  });
  return { w, bias };
};

/** gate sigmoid(alpha gate) (up + beta), gate at most and up within `swiglu_limit` */
const swiglu = (c: Call, gate: Item, up: Item): Item => {
  const { e } = c;
  const n = (v: number): Item => e.number(v, gate.type.dtype);
  const limit = c.hasAttribute("swiglu_limit") ? c.float("swiglu_limit") : Infinity;
  const [alpha, beta] = [c.float("activation_alpha", 1), c.float("activation_beta", 0)];
  const g = limit === Infinity ? gate : e.op("minimum", [gate, n(limit)]);
  const u = limit === Infinity ? up : e.op("minimum", [e.op("maximum", [up, n(-limit)]), n(limit)]);
  const act = alpha === 1 ? e.op("silu", [g]) : e.op("mul", [g, e.op("sigmoid", [e.op("mul", [g, n(alpha)])])]);
  return e.op("mul", [act, beta === 0 ? u : e.op("add", [u, n(beta)])]);
};

const activations: Readonly<Record<string, (c: Call, x: Item) => Item>> = {
  relu: (c, x) => binary(c.e, "maximum", x, c.e.number(0, x.type.dtype)),
  gelu: (c, x) => c.e.op("gelu", [x], { approximate: "tanh" }),
  silu: (c, x) => c.e.op("silu", [x]),
  identity: (_, x) => x,
};

/**
 * Each token's experts and their weights: the k largest of softmax of the router's scores, or of the scores with weights of their own
 * (`mixing`). Weights are divided by their sum where asked, and by QMoE without `mixing` always, as ONNX Runtime has it.
 */
const routed = (c: Call, router: Item, mixing: Item | undefined): { readonly ids: Item; readonly weights: Item } => {
  const { e } = c;
  const k = c.int("k", 1);
  if (c.int("use_sparse_mixer", 0) !== 0) c.fail("use_sparse_mixer is not supported");
  const scores = e.cast(router, "f32");
  const [values, ids] = e.ops("topk", [mixing ? scores : e.op("softmax", [scores])], { k }) as readonly [Item, Item];
  let weights = values;
  if (mixing) {
    const [tokens, experts] = router.type.shape as [Dim, Dim];
    const first = binary(e, "mul", e.iota([tokens, 1], 0), e.dims([experts], "i64", []));
    const index = binary(e, "add", first, e.cast(ids, "i64"));
    weights = e.op("take", [e.reshape(e.cast(mixing, "f32"), [mulDim(tokens, experts)]), index], { axis: 0 });
  }
  const whole = c.flag("normalize_routing_weights", false) || (c.node.op === "QMoE" && mixing === undefined);
  return { ids, weights: whole ? e.op("div", [weights, e.op("reduce", [weights], { fn: "sum" })]) : weights };
};

const mixture = (c: Call, fc1: Experts, fc2: Experts, fc3: Experts | undefined, mixing?: Item): Item => {
  const { e } = c;
  const { dtype } = c.x0.type;
  const { shape } = c.x0.type;
  const rows = e.reshape(c.x0, [product(shape.slice(0, -1)), dimAt(c.x0, -1)]);
  const { ids, weights } = routed(c, e.reshape(c.x(1), [dimAt(rows, 0), dimAt(c.x(1), -1)]), mixing);
  /** a row for each token and expert of its, in f32 */
  const through = (x: Item, { w, bias }: Experts): Item => {
    const y = e.op("grouped_linear", [x, e.cast(w, dtype), ids], { to: "f32" });
    if (bias === undefined) return y;
    return e.op("add", [y, e.reshape(e.cast(e.op("take", [bias, ids], { axis: 0 }), "f32"), y.type.shape)]);
  };
  const name = c.text("activation_type", "relu");
  const fusion = c.int("swiglu_fusion", 0);
  const wide_ = dimAt(fc1.w, 1) as number;
  let hidden: Item;
  if (name === "swiglu" && fusion === 0) {
    if (fc3 === undefined) return c.fail("swiglu with swiglu_fusion 0 needs fc3");
    hidden = swiglu(c, through(rows, fc1), through(rows, fc3));
  } else if (name === "swiglu") {
    const inner = wide_ / 2;
    const [step, second] = fusion === 1 ? [2, 1] : [1, inner];
    const [gate, up] = [rowsOf(c, fc1, 2, 0, step, inner), rowsOf(c, fc1, 2, second, step, inner)];
    hidden = swiglu(c, through(rows, gate), through(rows, up));
  } else {
    const act = activations[name] ?? c.fail(`activation_type '${name}' is not supported`);
    const gate = act(c, through(rows, fc1));
    hidden = fc3 ? e.op("mul", [gate, through(rows, fc3)]) : gate;
  }
  const y = e.op("combine", [through(e.cast(hidden, dtype), fc2), ids, weights]);
  return e.reshape(e.cast(y, dtype), shape);
};

const moe: Lowering = (c) => {
  const of = (i: number): Experts => ({ w: c.x(i), bias: c.optional(i + 1) });
  return mixture(c, of(2), of(4), c.has(6) ? of(6) : undefined);
};

const quantisedMoe: Lowering = (c) => {
  const bits = c.int("expert_weight_bits", 4);
  if (c.text("quant_type", "int") !== "int") c.fail("quant_type must be int");
  if (![2, 4, 8].includes(bits)) c.fail(`expert_weight_bits must be 2, 4 or 8, got ${bits}`);
  const { dtype } = c.x0.type;
  const of = (i: number, zeros: number): Experts => {
    constantsOnly(c, [i, i + 1, zeros]);
    const [experts, n, bytes] = numbersOf(c, c.shape(i)) as [number, number, number];
    const k = (bytes * 8) / bits;
    const asked = c.int("block_size", 0);
    const block = asked > 0 && c.rank(i + 1) === 3 ? asked : k;
    const scales = product(c.shape(i + 1));
    if (scales !== experts * n * (ceilDivDim(k, block) as number)) c.fail(`${scales} scales of ${experts} times ${n} rows`);
    const how = { rows: experts * n, size: k, inner: 1, block, bits };
    // zero points of blocks lie beside each other; those of whole rows beside those of the rows around
    const beside = block === k ? n : Math.ceil(k / block);
    const w = made(c, i, [experts, n, k], dtype, () => {
      const points = zeroPoints(c.has(zeros) ? c.constant(zeros) : undefined, bits, beside, 2 ** (bits - 1));
      return decoded(c.constant(i), c.constant(i + 1), points, how, dtype);
    });
    return { w, bias: c.optional(i + 2) };
  };
  return mixture(c, of(2, 11), of(5, 12), c.has(8) ? of(8, 13) : undefined, c.optional(14));
};

export const contribWeights: Readonly<Record<string, Lowering>> = {
  MatMulNBits: matmulNBits,
  GatherBlockQuantized: gatherBlocks,
  MoE: moe,
  QMoE: quantisedMoe,
};
