/** Modules of transformers in pieces, as TorchScript's exporter writes what has no operator of its own in older opsets. */
import type { Exporter } from "./exporter.ts";

/** x W, without a bias */
export const linear = (e: Exporter, name: string, x: string, from: number, to: number): string =>
  e.module(name, () => e.node("MatMul", [x, e.weight("weight", [from, to], 1.7 / Math.sqrt(from))]));

/** x / sqrt(mean x^2 + eps) w */
export const rmsNorm = (e: Exporter, name: string, x: string, size: number): string =>
  e.module(name, () => {
    const mean = e.node("ReduceMean", [e.node("Pow", [x, e.floats(2)])], { axes: [-1] });
    const root = e.node("Sqrt", [e.node("Add", [mean, e.floats(1e-6)])]);
    const normal = e.node("Mul", [x, e.node("Div", [e.floats(1), root])]);
    return e.node("Mul", [e.weight("weight", [size], 0.3, 1), normal]);
  });

/** (x - mean) / sqrt(variance + eps) w + b */
export const layerNorm = (e: Exporter, name: string, x: string, size: number): string =>
  e.module(name, () => {
    const centred = e.node("Sub", [x, e.node("ReduceMean", [x], { axes: [-1] })]);
    const variance = e.node("ReduceMean", [e.node("Pow", [centred, e.floats(2)])], { axes: [-1] });
    const root = e.node("Sqrt", [e.node("Add", [variance, e.floats(1e-5)])]);
    const scaled = e.node("Mul", [e.node("Div", [centred, root]), e.weight("weight", [size], 0.3, 1)]);
    return e.node("Add", [scaled, e.weight("bias", [size], 0.1)]);
  });

/** [batch, sequence, heads * dim] to [batch, heads, sequence, dim] */
export const heads = (e: Exporter, x: string, count: number, dim: number): string =>
  e.node("Transpose", [e.reshape(x, [x, 0], [x, 1], count, dim)], { perm: [0, 2, 1, 3] });

/** [batch, heads, sequence, dim] to [batch, sequence, heads * dim] */
export const joined = (e: Exporter, x: string, size: number): string => {
  const t = e.node("Transpose", [x], { perm: [0, 2, 1, 3] });
  return e.reshape(t, [t, 0], [t, 1], size);
};

/** cos and sin of positions [batch, sequence] times inverse frequencies, [batch, 1, sequence, dim] */
export const rotaryTables = (e: Exporter, positions: string, dim: number): readonly [cos: string, sin: string] =>
  e.module("rotary_emb", () => {
    const frequencies = Array.from({ length: dim / 2 }, (_, i) => 10000 ** ((-2 * i) / dim));
    const inverse = e.reshape(e.floats(...frequencies), 1, dim / 2, 1);
    const rows = e.node("Unsqueeze", [e.node("Cast", [positions], { to: 1 }), e.ints(1)]);
    const angles = e.node("Transpose", [e.node("MatMul", [inverse, rows])], { perm: [0, 2, 1] });
    const both = e.node("Unsqueeze", [e.node("Concat", [angles, angles], { axis: -1 }), e.ints(1)]);
    return [e.node("Cos", [both]), e.node("Sin", [both])];
  });

/** x cos + rotate_half(x) sin */
export const rotated = (e: Exporter, x: string, [cos, sin]: readonly [string, string], dim: number): string => {
  const part = (from: number, to: number): string => e.node("Slice", [x, e.ints(from), e.ints(to), e.ints(3), e.ints(1)]);
  const half = e.node("Concat", [e.node("Neg", [part(dim / 2, 2 ** 40)]), part(0, dim / 2)], { axis: -1 });
  return e.node("Add", [e.node("Mul", [x, cos]), e.node("Mul", [half, sin])]);
};

/** Each KV head for `groups` query heads. */
export const repeated = (e: Exporter, x: string, count: number, groups: number, dim: number): string => {
  const apart = e.node("Unsqueeze", [x, e.ints(2)]);
  const shape = e.node("Concat", [e.size(x, 0), e.ints(count), e.ints(groups), e.size(x, 2), e.ints(dim)], { axis: 0 });
  return e.reshape(e.node("Expand", [apart, shape]), [x, 0], count * groups, [x, 2], dim);
};

/** 0 where a query at its place after `past` tokens may look, the least float elsewhere: [1, 1, sequence, past + sequence] */
export const causalMask = (e: Exporter, query: string, key: string): string =>
  e.module("mask", () => {
    const scalar = (x: string): string => e.node("Squeeze", [x, e.ints(0)]);
    const [rows, columns] = [scalar(e.size(query, 2)), scalar(e.size(key, 2))];
    const range = (to: string): string =>
      e.node("Range", [e.node("Squeeze", [e.ints(0), e.ints(0)]), to, e.node("Squeeze", [e.ints(1), e.ints(0)])]);
    const place = e.node("Add", [e.node("Unsqueeze", [range(rows), e.ints(1)]), e.node("Sub", [columns, rows])]);
    const hidden = e.node("Greater", [e.node("Unsqueeze", [range(columns), e.ints(0)]), place]);
    const mask = e.node("Where", [hidden, e.floats(-3.4028234663852886e38), e.floats(0)]);
    return e.node("Unsqueeze", [mask, e.ints(0, 1)]);
  });

/** softmax(q k^T scale + mask) v */
export const attention = (e: Exporter, q: string, k: string, v: string, mask: string, scale: number): string => {
  const scores = e.node("Mul", [e.node("MatMul", [q, e.node("Transpose", [k], { perm: [0, 1, 3, 2] })]), e.floats(scale)]);
  const weights = e.node("Softmax", [e.node("Add", [scores, mask])], { axis: -1 });
  return e.node("MatMul", [weights, v]);
};

/** silu(x Wgate) (x Wup) Wdown */
export const swiglu = (e: Exporter, x: string, size: number, inner: number): string => {
  const gate = linear(e, "gate_proj", x, size, inner);
  const active = e.node("Mul", [gate, e.node("Sigmoid", [gate])]);
  return linear(e, "down_proj", e.node("Mul", [active, linear(e, "up_proj", x, size, inner)]), inner, size);
};
