/** Linears whose weights are chosen per row: one matrix per expert, and the combination of what the chosen experts gave. */
import type { Attrs } from "../attr.ts";
import { bytesOf, type ConcreteTensor, cost, elements, type Symbols, tensorOf } from "../bind.ts";
import { type Dim, dimText, mulDim } from "../dim.ts";
import * as expect from "../expect.ts";
import type { Cost, Knowledge, Sample } from "../op.ts";
import { rounder } from "../round.ts";
import type { Tensor } from "../tensor.ts";
import { type DType, isFloat, type TensorType, type Type, tensor } from "../type.ts";

/** [T*J, N] of x[R, K], w[E, N, K], ids i32[T, J]; R is T, a row for each token, or T*J, a row for each pair. */
const pairShape = (x: TensorType, w: TensorType, ids: TensorType): readonly [Dim, Dim] => {
  expect.rank(x, 2, "x");
  expect.rank(w, 3, "w");
  expect.rank(ids, 2, "ids");
  expect.dtype(ids, ["i32"], "ids");
  expect.constantDim(w, 0, "w");
  expect.sameDim(expect.constantDim(w, 2, "w"), expect.constantDim(x, 1, "x"), "columns of w and x");
  const pairs = mulDim(expect.dimAt(ids, 0), expect.constantDim(ids, 1, "ids"));
  const rows = expect.dimAt(x, 0);
  if (rows !== expect.dimAt(ids, 0) && rows !== pairs)
    expect.fail(
      `x must have a row for each token (${dimText(expect.dimAt(ids, 0))}) or for each pair (${dimText(pairs)}), got ${dimText(rows)}`,
    );
  return [pairs, expect.constantDim(w, 1, "w")];
};

/** For each pair row: the row of x and the owned expert, -1 for those of other ranks. */
const routes = (x: Tensor, experts: number, ids: Tensor, attrs: Attrs): { row: number; expert: number }[] => {
  const first = expect.int(attrs, "first", 0, 0);
  const perToken = ids.shape[1] as number;
  const byPair = x.shape[0] === ids.data.length;
  return Array.from(ids.data, (id, p) => {
    const expert = id - first;
    return { row: byPair ? p : Math.floor(p / perToken), expert: expert >= 0 && expert < experts ? expert : -1 };
  });
};

/** Results start as this: zeros, or what shows when somebody reads rows that are nobody's. */
const unwritten = (elementCount: number, type: ConcreteTensor, attrs: Attrs): Float64Array => {
  const result = new Float64Array(elementCount);
  return expect.flag(attrs, "owned", false) && isFloat(type.dtype) ? result.fill(Number.NaN) : result;
};

/** Rows of the result that may hold anything, of an op with `owned`: pairs of experts that are not in w. */
export const unownedRows = (w: Tensor, ids: Tensor, attrs: Attrs): readonly number[] => {
  if (!expect.flag(attrs, "owned", false)) return [];
  const from = expect.int(attrs, "first", 0, 0);
  return Array.from(ids.data.keys()).filter((p) => {
    const expert = (ids.data[p] as number) - from;
    return expert < 0 || expert >= (w.shape[0] as number);
  });
};

const groupedCost = (inputs: readonly Type[], outputs: readonly Type[], symbols: Symbols): Cost => {
  const k = (inputs[0] as TensorType).shape[1] as number;
  return cost(2 * k * elements(outputs[0] as TensorType, symbols), [...inputs, ...outputs], symbols);
};

const choiceAttrs = {
  first: "the global number of the first expert of w; 0 unless given. Pairs of experts that are not in w give zeros",
  owned: "true: rows of pairs whose expert is not in w hold anything instead, since nobody reads them",
};

const inferGrouped: Knowledge["infer"] = (inputs, attrs) => {
  expect.count(inputs, ["x", "w", "ids"]);
  const x = expect.tensorAt(inputs, 0, "x");
  const w = expect.tensorAt(inputs, 1, "w");
  if (!isFloat(x.dtype)) expect.fail(`x must be a float, got ${x.dtype}`);
  expect.dtype(w, [x.dtype], "w");
  expect.int(attrs, "first", 0, 0);
  expect.flag(attrs, "owned", false);
  return [tensor(expect.dtypeAttr(attrs, "to", x.dtype), pairShape(x, w, expect.tensorAt(inputs, 2, "ids")))];
};

const groupedSample = (
  name: string,
  rows: Dim,
  e: number,
  n: number,
  k: number,
  j: number,
  attrs: Attrs,
  below = e,
  tokens = 5,
): Sample => ({
  name,
  inputs: [tensor("bf16", [rows, k]), tensor("bf16", [e, n, k]), tensor("i32", ["T", j])],
  attrs,
  values: ["normal", "normal", { below }],
  symbols: { T: tokens },
});

export const groupedLinear: Knowledge = {
  name: "grouped_linear",
  summary:
    "x[R, K], w[E, N, K], ids i32[T, J] -> [T*J, N]: pair row p = t*J+j is x's row p (R = T*J) or t (R = T) times matrix ids[t, j] - first",
  attrs: { to: "dtype of the result; x's unless given", ...choiceAttrs },
  inputs: ["x", "w", "ids"],
  rowwise: "row",
  infer: inferGrouped,
  evaluate(inputs, attrs, [out]) {
    const [x, w, ids] = inputs as readonly [Tensor, Tensor, Tensor];
    const type = out as ConcreteTensor;
    const [experts, columns, k] = w.shape as readonly [number, number, number];
    const round = rounder(type.dtype);
    const result = unwritten(ids.data.length * columns, type, attrs);
    routes(x, experts, ids, attrs).forEach(({ row, expert }, p) => {
      if (expert < 0) return;
      for (let n = 0; n < columns; n++) {
        let sum = 0;
        const weight = (expert * columns + n) * k;
        for (let i = 0; i < k; i++) sum += (x.data[row * k + i] as number) * (w.data[weight + i] as number);
        result[p * columns + n] = round(sum);
      }
    });
    return [tensorOf(type, result)];
  },
  cost: (inputs, attrs, symbols) => groupedCost(inputs, inferGrouped(inputs, attrs), symbols),
  samples: [
    groupedSample("a row for each token", "T", 8, 40, 64, 3, { to: "f32" }),
    groupedSample("a row for each pair", "3*T", 8, 64, 40, 3, { to: "f32" }),
    groupedSample("ragged, bf16 result", "T", 5, 33, 131, 2, {}),
    groupedSample("a rank's experts", "T", 4, 16, 24, 3, { to: "f32", first: 4 }, 12),
    groupedSample("nothing of others' experts", "T", 4, 128, 1024, 3, { to: "f32", owned: true }, 12),
    groupedSample("one expert a token", "T", 3, 8, 16, 1, { to: "f32" }),
    // large enough for matrix units
    groupedSample("large, experts without rows", "T", 4, 514, 256, 2, { to: "f32" }, 3, 70),
    groupedSample("large, one expert has all rows", "2*T", 3, 300, 448, 2, {}, 1, 70),
    groupedSample("large, ragged, a rank's experts", "T", 2, 515, 261, 3, { to: "f32", first: 2 }, 6, 20),
  ],
};

const scaledNames = ["x", "xs", "w", "ws", "ids"];

const inferScaled: Knowledge["infer"] = (inputs, attrs) => {
  expect.count(inputs, scaledNames);
  const [x, xs, w, ws, ids] = scaledNames.map((n, i) => expect.tensorAt(inputs, i, n)) as unknown as readonly [
    TensorType,
    TensorType,
    TensorType,
    TensorType,
    TensorType,
  ];
  expect.dtype(x, ["e4m3", "i8"], "x");
  expect.dtype(w, [x.dtype], "w");
  expect.dtype(xs, ["f32"], "xs");
  expect.dtype(ws, ["f32"], "ws");
  const shape = pairShape(x, w, ids);
  expect.int(attrs, "first", 0, 0);
  expect.flag(attrs, "owned", false);
  const [bn, bk] = expect.pair(attrs, "block");
  const blocks = Math.ceil(expect.constantDim(x, 1, "x") / bk);
  expect.rank(xs, 2, "xs");
  expect.rank(ws, 3, "ws");
  expect.sameDim(expect.dimAt(xs, 0), expect.dimAt(x, 0), "rows of xs and x");
  expect.sameDim(expect.dimAt(xs, 1), blocks, `columns of xs, one for ${bk} columns of x`);
  expect.sameDim(expect.dimAt(ws, 0), expect.dimAt(w, 0), "experts of ws and w");
  expect.sameDim(expect.dimAt(ws, 1), Math.ceil((shape[1] as number) / bn), `rows of ws, one for ${bn} rows of w`);
  expect.sameDim(expect.dimAt(ws, 2), blocks, `columns of ws, one for ${bk} columns of w`);
  return [tensor(expect.dtypeAttr(attrs, "to"), shape)];
};

const scaledSample = (
  name: string,
  rows: Dim,
  sizes: readonly [e: number, n: number, k: number, j: number],
  codes: DType,
  block: readonly [number, number],
  attrs: Attrs = {},
  below: number = sizes[0],
  tokens = 5,
): Sample => {
  const [e, n, k, j] = sizes;
  const blocks = Math.ceil(k / block[1]);
  return {
    name,
    inputs: [
      tensor(codes, [rows, k]),
      tensor("f32", [rows, blocks]),
      tensor(codes, [e, n, k]),
      tensor("f32", [e, Math.ceil(n / block[0]), blocks]),
      tensor("i32", ["T", j]),
    ],
    attrs: { to: "f32", block, ...attrs },
    values: ["normal", "positive", "normal", "positive", { below }],
    symbols: { T: tokens },
  };
};

export const scaledGroupedLinear: Knowledge = {
  name: "scaled_grouped_linear",
  summary:
    "x codes[R, K], xs f32[R, ceil(K/bk)], w codes[E, N, K], ws f32[E, ceil(N/bn), ceil(K/bk)], ids i32[T, J] -> [T*J, N]: " +
    "grouped_linear with the scales of scaled_linear",
  attrs: { to: "dtype of the result", block: "[bn, bk]: rows and columns of w that share a scale", ...choiceAttrs },
  inputs: scaledNames,
  rowwise: "row",
  infer: inferScaled,
  evaluate(inputs, attrs, [out]) {
    const [x, xs, w, ws, ids] = inputs as readonly [Tensor, Tensor, Tensor, Tensor, Tensor];
    const type = out as ConcreteTensor;
    const [experts, columns, k] = w.shape as readonly [number, number, number];
    const [bn, bk] = expect.pair(attrs, "block");
    const blocks = Math.ceil(k / bk);
    const rowBlocks = ws.shape[1] as number;
    const round = rounder(type.dtype);
    const result = unwritten(ids.data.length * columns, type, attrs);
    routes(x, experts, ids, attrs).forEach(({ row, expert }, p) => {
      if (expert < 0) return;
      for (let n = 0; n < columns; n++) {
        const weight = (expert * columns + n) * k;
        const scales = (expert * rowBlocks + Math.floor(n / bn)) * blocks;
        let sum = 0;
        for (let g = 0; g < blocks; g++) {
          let dot = 0;
          for (let i = g * bk; i < Math.min(k, (g + 1) * bk); i++)
            dot += (x.data[row * k + i] as number) * (w.data[weight + i] as number);
          sum += dot * (xs.data[row * blocks + g] as number) * (ws.data[scales + g] as number);
        }
        result[p * columns + n] = round(sum);
      }
    });
    return [tensorOf(type, result)];
  },
  cost: (inputs, attrs, symbols) => groupedCost(inputs, inferScaled(inputs, attrs), symbols),
  samples: [
    scaledSample("fp8, a row for each token", "T", [4, 256, 128, 3], "e4m3", [128, 128]),
    scaledSample("fp8, a row for each pair, ragged", "2*T", [3, 130, 200, 2], "e4m3", [128, 128]),
    scaledSample("int8 channels", "T", [6, 24, 131, 3], "i8", [1, 131]),
    scaledSample("fp8, nothing of others' experts", "T", [4, 256, 512, 3], "e4m3", [128, 128], { owned: true }, 12),
    scaledSample("a rank's experts, bf16", "3*T", [2, 16, 40, 3], "i8", [1, 40], { to: "bf16", first: 2 }, 6),
    // large enough for matrix units
    scaledSample("large, fp8, experts without rows", "T", [4, 514, 256, 2], "e4m3", [128, 128], {}, 3, 70),
    scaledSample("large, fp8, one expert has all rows", "2*T", [3, 300, 448, 2], "e4m3", [128, 128], { to: "bf16" }, 1, 70),
    scaledSample("large, int8, a rank's experts", "T", [2, 515, 261, 3], "i8", [1, 261], { first: 2 }, 6, 20),
  ],
};

const inferCombine: Knowledge["infer"] = (inputs, attrs) => {
  expect.count(inputs, ["y", "ids", "wgt"]);
  const y = expect.tensorAt(inputs, 0, "y");
  const ids = expect.tensorAt(inputs, 1, "ids");
  const weights = expect.tensorAt(inputs, 2, "wgt");
  expect.rank(y, 2, "y");
  expect.rank(ids, 2, "ids");
  expect.rank(weights, 2, "wgt");
  expect.dtype(y, ["f32"], "y");
  expect.dtype(ids, ["i32"], "ids");
  expect.dtype(weights, ["f32"], "wgt");
  const perToken = expect.constantDim(ids, 1, "ids");
  expect.sameDim(expect.dimAt(weights, 0), expect.dimAt(ids, 0), "rows of wgt and ids");
  expect.sameDim(expect.dimAt(weights, 1), perToken, "columns of wgt and ids");
  expect.sameDim(expect.dimAt(y, 0), mulDim(expect.dimAt(ids, 0), perToken), "rows of y and pairs of ids");
  expect.int(attrs, "first", 0, 0);
  expect.int(attrs, "count", 0, 0);
  return [tensor("f32", [expect.dimAt(ids, 0), expect.dimAt(y, 1)])];
};

const combineSample = (name: string, h: number, j: number, attrs: Attrs): Sample => ({
  name,
  inputs: [tensor("f32", [j === 1 ? "T" : `${j}*T`, h]), tensor("i32", ["T", j]), tensor("f32", ["T", j])],
  attrs,
  values: ["normal", { below: 8 }, "unit"],
  symbols: { T: 5 },
});

export const combine: Knowledge = {
  name: "combine",
  summary: "y f32[T*J, H], ids i32[T, J], wgt f32[T, J] -> f32[T, H]: the sum over j, ascending, of wgt y, of owned experts only",
  attrs: {
    first: "the global number of the first owned expert; 0 unless given",
    count: "owned experts; absent: all from `first` on",
  },
  inputs: ["y", "ids", "wgt"],
  rowwise: "row",
  infer: inferCombine,
  evaluate(inputs, attrs, [out]) {
    const [y, ids, weights] = inputs as readonly [Tensor, Tensor, Tensor];
    const type = out as ConcreteTensor;
    const [tokens, columns] = type.shape as readonly [number, number];
    const perToken = ids.shape[1] as number;
    const from = expect.int(attrs, "first", 0, 0);
    const end = attrs.count === undefined ? Number.POSITIVE_INFINITY : from + expect.int(attrs, "count", 0);
    const result = new Float64Array(tokens * columns);
    for (let t = 0; t < tokens; t++)
      for (let j = 0; j < perToken; j++) {
        const p = t * perToken + j;
        const id = ids.data[p] as number;
        if (id < from || id >= end) continue;
        for (let c = 0; c < columns; c++)
          result[t * columns + c] =
            (result[t * columns + c] as number) + (weights.data[p] as number) * (y.data[p * columns + c] as number);
      }
    return [tensorOf(type, result.map(Math.fround))];
  },
  cost: (inputs, attrs, symbols) =>
    cost(2 * elements(inputs[0] as TensorType, symbols), [...inputs, ...inferCombine(inputs, attrs)], symbols),
  samples: [
    combineSample("all experts", 64, 3, {}),
    combineSample("a rank's experts", 131, 3, { first: 2, count: 3 }),
    combineSample("one expert a token", 16, 1, { first: 0, count: 8 }),
    combineSample("no expert", 8, 2, { first: 4, count: 0 }),
  ],
};

/** Bytes that a grouped linear really reads when `experts` of its experts are chosen; used by planners. */
export const expertBytes = (w: TensorType, experts: number, symbols: Symbols): number =>
  (bytesOf(w, symbols) / expect.constantDim(w, 0, "w")) * experts;
