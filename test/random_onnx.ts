/**
 * Random ONNX models, the same for a seed everywhere: up to eight nodes over the operators that have kernels in ONNX Runtime, of any opset that
 * it reads. Results are outputs, so that a difference is found where it arises. Numbers stay where functions are well conditioned, and what
 * jumps (rounding, comparisons, places of extremes) is given numbers that are exact.
 */
import { type DType, isFloat, type Tensor } from "../ir/index.ts";
import { type Body, dtypeCode, type MadeModel } from "./onnx_maker.ts";
import {
  type Attributes,
  broadcastOf,
  count,
  fits,
  type Known,
  Maker,
  mostElements,
  type Result,
  type Wanted,
} from "./random_onnx_maker.ts";

const floats: readonly DType[] = ["f32", "f32", "f64", "f16"];
const wideFloats: readonly DType[] = ["f32", "f32", "f64"];
const ints: readonly DType[] = ["i64", "i32", "i8", "u8", "i16", "u16", "u32", "u64"];
const arithmetic: readonly DType[] = ["f32", "f32", "f64", "f16", "i32", "i64"];
const narrowFloats: readonly DType[] = ["f32", "f32", "f16"];
const reducible: readonly DType[] = ["f32", "f32", "f64", "f16", "i32", "i64"];
const everything: readonly DType[] = ["f32", "f32", "f64", "f16", ...ints];
const any: readonly DType[] = ["f32", "f32", "f64", "i64", "i32", "u8", "i8", "bool"];

/** Makes a node, or none where no operand fits. */
type Recipe = (m: Maker, op: string) => void;
type Entry = readonly [op: string, since: number, recipe: Recipe];

// --- elements ---

const unary =
  (
    dtypes: readonly DType[],
    wanted: Wanted = {},
    more: (m: Maker) => Attributes = () => ({}),
    exact: boolean = false,
    result?: DType,
  ): Recipe =>
  (m, op) => {
    const x = m.value(dtypes, wanted);
    m.node(op, [x], more(m), [{ dtype: result ?? x.dtype, shape: x.shape, exact: exact && x.exact }]);
  };
/** Of numbers that are not large, so that results are well conditioned. */
const small: Wanted = { test: (k) => k.bound <= 8 };
const wildExact: Wanted = { draw: "wild", exact: true };

const binary =
  (
    dtypes: readonly DType[] | ((m: Maker) => readonly DType[]),
    draws: readonly ("normal" | "positive" | "wild")[] = ["normal", "normal"],
    how: "arithmetic" | "compare" | "exact" = "exact",
  ): Recipe =>
  (m, op) => {
    const x = m.value(typeof dtypes === "function" ? dtypes(m) : dtypes, {
      draw: draws[0] ?? "normal",
      exact: how === "compare",
    });
    const y = how === "compare" ? m.fresh(x.dtype, m.partner(x).shape, draws[1]) : m.partner(x, draws[1]);
    const [a, b] = draws[0] === draws[1] && m.chance(0.3) ? [y, x] : [x, y];
    const bound = op === "Mul" ? a.bound * b.bound : op === "Div" ? a.bound * 4 : a.bound + b.bound;
    m.node(op, [a, b], {}, [
      {
        dtype: how === "compare" ? "bool" : x.dtype,
        shape: broadcastOf(a.shape, b.shape),
        bound: isFloat(x.dtype) ? bound : 2 ** 32,
        exact: how === "compare" || (a.exact && b.exact && (how === "exact" || x.dtype !== "f16")),
      },
    ]);
  };

const variadic =
  (dtypes: (m: Maker) => readonly DType[], draw: "normal" | "wild"): Recipe =>
  (m, op) => {
    const x = m.value(dtypes(m), { draw });
    const xs = [x];
    while (xs.length < 4 && m.chance(0.6)) {
      const y = m.partner(xs[0] as Known, draw);
      if (
        xs.every((z) => fits(y.shape, z.shape)) &&
        count(broadcastOf(y.shape, ...xs.map((z) => z.shape))) <= mostElements &&
        fits(y.shape, broadcastOf(...xs.map((z) => z.shape)))
      )
        xs.push(y);
    }
    const bound = xs.reduce((a, b) => a + b.bound, 0);
    const whole = op === "Max" || op === "Min";
    m.node(op, xs, {}, [
      { dtype: x.dtype, shape: broadcastOf(...xs.map((z) => z.shape)), bound, exact: whole && xs.every((z) => z.exact) },
    ]);
  };

const integerDivide: Recipe = (m, op) => {
  const x = m.value(["i32", "i64"], { draw: "wild" });
  const y = m.partner(x, "positive");
  m.node(op, [x, y], {}, [{ dtype: x.dtype, shape: broadcastOf(x.shape, y.shape) }]);
};

const modulo: Recipe = (m, op) => {
  const dtype = m.pick([...ints, "f32", "f64", "f16"] as const);
  const x = m.value([dtype], { draw: isFloat(dtype) || dtype === "i32" ? "normal" : "wild", exact: true });
  const y = m.partner(x, "positive");
  const negative = !dtype.startsWith("u") && m.chance(0.4);
  const shape = negative ? y.shape : undefined;
  const by = shape
    ? m.constantOf({ kind: "tensor", dtype, shape, data: m.elements(dtype, count(shape), "positive").map((v) => -v) })
    : y;
  const attributes: Attributes = isFloat(dtype) || m.chance(0.3) ? { fmod: { i: 1 } } : {};
  m.node(op, [x, by], attributes, [{ dtype, shape: broadcastOf(x.shape, by.shape) }]);
};

const power: Recipe = (m, op) => {
  const base = m.opset < 12 ? m.pick(["f32", "f64"] as const) : m.pick(["f32", "f32", "f64", "i32", "i64"] as const);
  const x = isFloat(base) ? m.value([base], { draw: "positive" }) : m.fresh(base);
  const exponent =
    m.opset < 12 ? base : isFloat(base) ? m.pick(["f32", "f64", "i32", "i64"] as const) : m.pick(["i32", "i64"] as const);
  const drawn = m.partner(x, "positive", exponent);
  const powers = isFloat(exponent) ? drawn : m.constantOf(m.below3(exponent, drawn.shape));
  const y = m.chance(0.2) ? m.scalarOf(exponent, 2, m.pick([[], [1]])) : powers;
  m.node(op, [x, y], {}, [{ dtype: base, shape: broadcastOf(x.shape, y.shape), exact: !isFloat(base), bound: 1e4 }]);
};

const clip: Recipe = (m, op) => {
  const dtypes: readonly DType[] = m.opset < 12 ? ["f32", "f16"] : ["f32", "f64", "f16", "i8", "u8", "i32", "u32", "i64", "u64"];
  const x = m.value(dtypes, { draw: "wild" });
  const [low, high] = [m.chance(0.7), m.chance(0.7)];
  const least = x.dtype.startsWith("u") ? 2 : -1;
  if (m.opset < 11)
    m.node(op, [x], { ...(low && { min: { f: -1 } }), ...(high && { max: { f: 1.5 } }) }, [{ dtype: x.dtype, shape: x.shape }]);
  else
    m.node(
      op,
      [
        x,
        low ? m.scalarOf(x.dtype, least) : undefined,
        high ? m.scalarOf(x.dtype, m.pick([5, 5, -3].slice(0, x.dtype.startsWith("u") ? 2 : 3))) : undefined,
      ],
      {},
      [{ dtype: x.dtype, shape: x.shape }],
    );
};

const castTypes: readonly DType[] = ["f32", "f64", "f16", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64", "bool"];
const cast: Recipe = (m, op) => {
  const to = m.pick(castTypes);
  // floats beyond an integer type's range are undefined in C
  const x = m.value(castTypes, { exact: true, test: (k) => !isFloat(k.dtype) || (Number.isFinite(k.bound) && k.bound < 100) });
  const wild = isFloat(to) || !isFloat(x.dtype) ? (m.chance(0.3) ? m.fresh(x.dtype, x.shape, "wild") : x) : x;
  const from = to.startsWith("u") && isFloat(x.dtype) ? m.fresh(x.dtype, x.shape, "positive") : wild;
  const bound = isFloat(to) ? from.bound : to === "u64" ? Infinity : 2 ** 32;
  if (op === "CastLike") m.node(op, [from, m.fresh(to)], {}, [{ dtype: to, shape: from.shape, bound }]);
  else m.node(op, [from], { to: { i: dtypeCode(to) } }, [{ dtype: to, shape: from.shape, bound }]);
};

/** Through a type that is no graph output. */
const castNarrow: Recipe = (m) => {
  if (m.opset < 19) return;
  const x = m.value(["f32", "f16"], { test: (k) => k.bound <= 400, exact: true });
  const [code, name] = m.pick([
    [16, "bf16"],
    [17, "e4m3"],
    [19, "e5m2"],
  ] as const);
  const inner = `${name}_${m.pool.length}`;
  m.within("Cast", x, inner, { to: { i: code } });
  m.node("Cast", [inner], { to: { i: 1 } }, [{ dtype: "f32", shape: x.shape, exact: true, bound: x.bound }]);
};

const shift: Recipe = (m, op) => {
  const x = m.value(["u8", "u32", "u64"], { draw: "wild", test: (k) => k.bound < 2 ** 33 });
  const shape = m.partner(x).shape;
  const y = m.constantOf({
    kind: "tensor",
    dtype: x.dtype,
    shape,
    data: Float64Array.from({ length: count(shape) }, () => m.below(x.dtype === "u8" ? 8 : 20)),
  });
  m.node(op, [x, y], { direction: { s: m.pick(["LEFT", "RIGHT"]) } }, [
    { dtype: x.dtype, shape: broadcastOf(x.shape, y.shape), bound: Infinity },
  ]);
};

const where: Recipe = (m, op) => {
  const x = m.value(["f32", "f32", "f64", "f16", "i32", "i64", "u8"], { draw: "wild" });
  const condition = m.partner(x, "normal", "bool");
  const shape = broadcastOf(condition.shape, x.shape);
  const y = m.partner({ ...x, shape }, "wild");
  m.node(op, [condition, x, y], {}, [{ dtype: x.dtype, shape: broadcastOf(shape, y.shape) }]);
};

const isInf: Recipe = (m, op) => {
  const x = m.value(m.opset < 20 ? ["f32", "f64"] : ["f32", "f64", "f16"], wildExact);
  const attributes = {
    ...(m.chance(0.4) && { detect_positive: { i: m.below(2) } }),
    ...(m.chance(0.4) && { detect_negative: { i: m.below(2) } }),
  };
  m.node(op, [x], attributes, [{ dtype: "bool", shape: x.shape, bound: 1 }]);
};

const prelu: Recipe = (m, op) => {
  const x = m.value(["f32"]);
  const lost = m.below(x.shape.length + 1);
  const slope = m.fresh(
    x.dtype,
    x.shape.slice(lost).map((d) => (m.chance(0.3) ? 1 : d)),
  );
  m.node(op, [x, slope], {}, [{ dtype: x.dtype, shape: x.shape, bound: x.bound * 3 }]);
};

// --- shapes ---

/** Sizes that have the elements of a shape. */
const otherShape = (m: Maker, n: number): number[] => {
  const shape: number[] = [];
  let rest = n;
  while (rest > 1) {
    const divisors = Array.from({ length: rest }, (_, i) => i + 1).filter((d) => rest % d === 0);
    const d = shape.length >= 4 ? rest : m.pick(divisors);
    shape.push(d);
    rest /= d;
    if (shape.length >= 5) break;
  }
  return m.shuffled(shape.length < 5 && m.chance(0.3) ? [...shape, 1] : shape);
};
const reshape: Recipe = (m, op) => {
  const x = m.value(any, { draw: "wild" });
  const n = count(x.shape);
  let shape = n === 0 ? [...x.shape] : otherShape(m, n);
  const asked = [...shape];
  if (n > 0 && asked.length > 0 && m.chance(0.4)) asked[m.below(asked.length)] = -1;
  let attributes: Attributes = {};
  if (n === 0) {
    if (m.opset >= 14 && m.chance(0.5)) {
      shape = m.shuffled([0, ...x.shape.filter((d) => d > 0)]);
      asked.splice(0, asked.length, ...shape);
      attributes = { allowzero: { i: 1 } };
    }
  } else
    asked.forEach((d, i) => {
      if (d === x.shape[i] && m.chance(0.3)) asked[i] = 0;
    });
  m.node(op, [x, m.integers(asked)], attributes, [{ dtype: x.dtype, shape }]);
};
const flatten: Recipe = (m, op) => {
  const x = m.value(m.opset < 9 ? floats : any, { draw: "wild", least: m.opset < 9 ? 1 : 0 });
  const rank = x.shape.length;
  const axis = m.between(0, rank);
  const at = m.opset >= 11 && axis < rank ? m.signed(axis, rank) : axis;
  m.node(op, [x], { axis: { i: at } }, [{ dtype: x.dtype, shape: [count(x.shape.slice(0, axis)), count(x.shape.slice(axis))] }]);
};
/** Axes as an attribute before `since`, as an input from then on. */
const axesAs = (m: Maker, axes: readonly number[], since: number): readonly [Attributes, string | undefined] =>
  m.opset < since ? [{ axes: { ints: axes } }, undefined] : [{}, m.integers(axes)];
const squeeze: Recipe = (m, op) => {
  const x = m.value(any, { draw: "wild", test: (k) => k.shape.includes(1) });
  const ones = x.shape.flatMap((d, i) => (d === 1 ? [i] : []));
  if (m.chance(0.3)) {
    m.node(op, [x], {}, [{ dtype: x.dtype, shape: x.shape.filter((d) => d !== 1) }]);
    return;
  }
  const axes = m.shuffled(ones).slice(0, m.between(1, ones.length));
  const [attributes, input] = axesAs(m, m.opset < 11 ? axes : axes.map((a) => m.signed(a, x.shape.length)), 13);
  m.node(op, [x, input], attributes, [{ dtype: x.dtype, shape: x.shape.filter((_, i) => !axes.includes(i)) }]);
};
const unsqueeze: Recipe = (m, op) => {
  const x = m.value(any, { draw: "wild", most: 4 });
  const rank = x.shape.length + m.between(1, 2);
  const axes = m.shuffled(Array.from({ length: rank }, (_, i) => i)).slice(0, rank - x.shape.length);
  const rest = [...x.shape];
  const shape = Array.from({ length: rank }, (_, i) => (axes.includes(i) ? 1 : (rest.shift() as number)));
  const [attributes, input] = axesAs(m, m.opset < 11 ? axes : axes.map((a) => m.signed(a, rank)), 13);
  m.node(op, [x, input], attributes, [{ dtype: x.dtype, shape }]);
};
const transpose: Recipe = (m, op) => {
  const x = m.value(any, { draw: "wild" });
  const given = m.chance(0.8);
  const perm = given ? m.shuffled(x.shape.map((_, i) => i)) : x.shape.map((_, i) => x.shape.length - 1 - i);
  m.node(op, [x], given ? { perm: { ints: perm } } : {}, [{ dtype: x.dtype, shape: perm.map((p) => x.shape[p] as number) }]);
};
const concat: Recipe = (m, op) => {
  const x = m.value(any, { draw: "wild", least: 1 });
  const axis = m.below(x.shape.length);
  const parts = [x];
  while (parts.length < 4 && m.chance(0.6))
    parts.push(m.chance(0.2) ? x : m.fresh(x.dtype, x.shape.with(axis, m.pick([0, 1, 2, 3])), "wild"));
  const size = parts.reduce((n, p) => n + (p.shape[axis] as number), 0);
  const at = m.opset < 11 ? axis : m.signed(axis, x.shape.length);
  m.node(op, parts, { axis: { i: at } }, [{ dtype: x.dtype, shape: x.shape.with(axis, size) }]);
};
const split: Recipe = (m, op) => {
  const x = m.value(["f32", "i32", "i64", "u8"], { draw: "wild", least: 1 });
  const axis = m.below(x.shape.length);
  const extent = x.shape[axis] as number;
  const parts = m.between(1, 3);
  const at = m.opset < 11 ? axis : m.signed(axis, x.shape.length);
  const attributes: Attributes = { axis: { i: at } };
  const result = (sizes: readonly number[]): Result[] => sizes.map((d) => ({ dtype: x.dtype, shape: x.shape.with(axis, d) }));
  if (m.chance(0.5)) {
    const cuts = Array.from({ length: parts - 1 }, () => m.between(0, extent)).sort((a, b) => a - b);
    const sizes = [...cuts, extent].map((c, i) => c - (i === 0 ? 0 : (cuts[i - 1] as number)));
    if (m.opset < 13) m.node(op, [x], { ...attributes, split: { ints: sizes } }, result(sizes));
    else m.node(op, [x, m.integers(sizes)], attributes, result(sizes));
    return;
  }
  const size = Math.ceil(extent / parts);
  if (m.opset < 18 ? extent % parts !== 0 : size * (parts - 1) >= extent) return;
  const sizes = Array.from({ length: parts }, (_, i) => Math.max(0, Math.min(size, extent - i * size)));
  m.node(op, [x], m.opset < 18 ? attributes : { ...attributes, num_outputs: { i: parts } }, result(sizes));
};
const slice: Recipe = (m, op) => {
  const x = m.value(any, { draw: "wild", least: 1 });
  const axes = m.some(x.shape.length);
  const starts: number[] = [];
  const ends: number[] = [];
  const steps: number[] = [];
  const shape = [...x.shape];
  for (const axis of axes) {
    const d = x.shape[axis] as number;
    const step = m.opset < 10 || m.chance(0.5) ? 1 : m.pick([1, 2, 3, -1, -1, -2, -5]);
    const bound = (): number =>
      m.pick([
        m.between(-d, d),
        m.between(-d - 3, d + 3),
        0,
        step > 0 ? 2147483647 : -2147483648,
        m.opset >= 10 ? 2 ** 53 - 1 : d,
        -(2 ** 53 - 1),
      ]);
    const [start, end] = [bound(), bound()];
    const [low, high] = step > 0 ? [0, d] : [-1, d - 1];
    const limit = (v: number, least: number): number => Math.min(high, Math.max(least, v < 0 ? v + d : v));
    shape[axis] = d === 0 ? 0 : Math.max(0, Math.ceil((limit(end, low) - limit(start, 0)) / step));
    starts.push(start);
    ends.push(end);
    steps.push(step);
  }
  const at = axes.map((a) => (m.opset < 10 ? a : m.signed(a, x.shape.length)));
  const result = [{ dtype: x.dtype, shape }];
  if (m.opset < 10) m.node(op, [x], { starts: { ints: starts }, ends: { ints: ends }, axes: { ints: at } }, result);
  else {
    const stepped = steps.some((s) => s !== 1) || m.chance(0.3);
    const whole = axes.every((a, i) => a === i) && axes.length === x.shape.length && m.chance(0.5);
    const index: DType = m.chance(0.2) && [...starts, ...ends].every((v) => Math.abs(v) < 2 ** 31) ? "i32" : "i64";
    const vector = (v: readonly number[]): string => m.integers(v, [v.length], index);
    m.node(
      op,
      [x, vector(starts), vector(ends), whole ? undefined : vector(at), stepped ? vector(steps) : undefined],
      {},
      result,
    );
  }
};
const expand: Recipe = (m, op) => {
  const x = m.value(any, { draw: "wild", most: 4 });
  const target = [
    ...(m.chance(0.4) ? [m.between(1, 3)] : []),
    ...x.shape.map((d) => (d === 1 ? m.pick([1, 2, 3]) : m.pick([d, d, 1]))),
  ];
  const cut = m.chance(0.2) ? target.slice(m.below(target.length + 1)) : target;
  const shape = broadcastOf(x.shape, cut);
  if (count(shape) > 2 * mostElements) return;
  m.node(op, [x, m.integers(cut)], {}, [{ dtype: x.dtype, shape }]);
};
const tile: Recipe = (m, op) => {
  const x = m.value(["f32", "f64", "i32", "i64", "u8", "bool"], { draw: "wild", test: (k) => count(k.shape) <= 60 });
  const repeats = x.shape.map(() => m.pick([1, 1, 2, 3, ...(m.chance(0.05) ? [0] : [])]));
  const shape = x.shape.map((d, i) => d * (repeats[i] as number));
  if (count(shape) > 2 * mostElements) return;
  m.node(op, [x, m.integers(repeats)], {}, [{ dtype: x.dtype, shape }]);
};
const pad: Recipe = (m, op) => {
  const mode = m.pick(["constant", "constant", "reflect", "edge", ...(m.opset >= 19 ? ["wrap"] : [])]);
  const x = m.value(
    m.opset < 11 ? wideFloats : ["f32", "f64", "i32", "i64", "i8", "u8", ...(m.opset >= 13 ? (["bool"] as const) : [])],
    {
      draw: "wild",
      least: 1,
      test: (k) => mode === "constant" || k.shape.every((d) => d > 0),
    },
  );
  const rank = x.shape.length;
  const axes = m.opset >= 18 && m.chance(0.3) ? m.some(rank) : x.shape.map((_, i) => i);
  const amount = (d: number): number =>
    mode === "constant"
      ? m.pick([0, 0, 1, 2, 3, ...(d > 2 ? [-1] : [])])
      : mode === "reflect"
        ? m.between(0, d - 1)
        : m.between(0, mode === "wrap" ? d : 3);
  const before = axes.map((a) => amount(x.shape[a] as number));
  const after = axes.map((a) => amount(x.shape[a] as number));
  const shape = [...x.shape];
  axes.forEach((a, i) => {
    shape[a] = (shape[a] as number) + (before[i] as number) + (after[i] as number);
  });
  if (count(shape) > 4 * mostElements) return;
  const pads = [...before, ...after];
  const attributes: Attributes = mode === "constant" && m.chance(0.5) ? {} : { mode: { s: mode } };
  const result = [{ dtype: x.dtype, shape }];
  if (m.opset < 11) m.node(op, [x], { ...attributes, pads: { ints: pads }, ...(m.chance(0.5) && { value: { f: 1.5 } }) }, result);
  else {
    const value = m.chance(0.5) ? m.scalarOf(x.dtype, 1) : undefined;
    const named = axes.length < rank || axes.some((a, i) => a !== i);
    m.node(
      op,
      [x, m.integers(pads), value, named ? m.integers(axes.map((a) => m.signed(a, rank))) : undefined],
      attributes,
      result,
    );
  }
};
const shapeOf: Recipe = (m, op) => {
  const x = m.value(any, { draw: "wild" });
  if (op === "Size") {
    m.node(op, [x], {}, [{ dtype: "i64", shape: [], bound: count(x.shape) }]);
    return;
  }
  const rank = x.shape.length;
  const part = m.opset >= 15 && m.chance(0.4);
  const [start, end] = [m.between(-rank - 1, rank + 1), m.between(-rank - 1, rank + 1)];
  const limit = (v: number): number => Math.min(rank, Math.max(0, v < 0 ? v + rank : v));
  const size = part ? Math.max(0, limit(end) - limit(start)) : rank;
  m.node(op, [x], part ? { start: { i: start }, end: { i: end } } : {}, [{ dtype: "i64", shape: [size], bound: 10 }]);
};
/** Sizes of another value decide a shape: what exporters write for sizes that are not known. */
const shapeArithmetic: Recipe = (m) => {
  const x = m.value(["f32", "i64"], { least: 2, draw: "wild", test: (k) => count(k.shape) > 0 });
  const [sizes] = m.node("Shape", [x], {}, [{ dtype: "i64", shape: [x.shape.length], bound: 10 }]) as [Known];
  const axis = m.below(x.shape.length);
  const d = x.shape[axis] as number;
  const scalar = m.chance(0.5);
  const [one] = m.node("Gather", [sizes, m.integers([axis], scalar ? [] : [1])], {}, [
    { dtype: "i64", shape: scalar ? [] : [1], bound: d },
  ]) as [Known];
  const [vector] = scalar
    ? m.opset < 13
      ? m.node("Unsqueeze", [one], { axes: { ints: [0] } }, [{ dtype: "i64", shape: [1], bound: d }])
      : m.node("Unsqueeze", [one, m.integers([0])], {}, [{ dtype: "i64", shape: [1], bound: d }])
    : [one];
  const [target] = m.node("Concat", [vector as Known, m.integers([-1])], { axis: { i: 0 } }, [
    { dtype: "i64", shape: [2], bound: 10 },
  ]) as [Known];
  m.node("Reshape", [x, target], {}, [{ dtype: x.dtype, shape: [d, count(x.shape) / d] }]);
};
const constantNode: Recipe = (m, op) => {
  const kind = m.opset < 12 ? "value" : m.pick(["value", "value_float", "value_int", "value_floats", "value_ints"]);
  if (kind === "value") {
    const t = m.tensor(m.pick(any), m.shape(), "wild");
    m.node(op, [], { value: { t } }, [{ dtype: t.dtype, shape: t.shape, bound: Infinity }]);
  } else if (kind === "value_float") m.node(op, [], { value_float: { f: 1.25 } }, [{ dtype: "f32", shape: [], bound: 2 }]);
  else if (kind === "value_int") m.node(op, [], { value_int: { i: -3 } }, [{ dtype: "i64", shape: [], bound: 3 }]);
  else if (kind === "value_floats")
    m.node(op, [], { value_floats: { floats: [0.5, -2] } }, [{ dtype: "f32", shape: [2], bound: 2 }]);
  else m.node(op, [], { value_ints: { ints: [1, -2, 3] } }, [{ dtype: "i64", shape: [3], bound: 3 }]);
};
const constantOfShape: Recipe = (m, op) => {
  const shape = m.shape();
  const dtype = m.pick(["f32", "f64", "i32", "i64", "u8", "bool", "f16"] as const);
  const value = m.chance(0.8) ? { value: { t: m.tensor(dtype, [1]) } } : {};
  m.node(op, [m.integers(shape)], value, [{ dtype: "value" in value ? dtype : "f32", shape, bound: 10 }]);
};
const range: Recipe = (m, op) => {
  const dtype = m.pick(["f32", "f64", "i16", "i32", "i64"] as const);
  const start = isFloat(dtype) ? m.below(9) / 4 - 1 : m.between(-5, 5);
  const step = (isFloat(dtype) ? m.pick([0.25, 0.5, 1, 1.5]) : m.between(1, 3)) * m.pick([1, -1]);
  const size = m.below(12);
  const limit = start + step * size - (m.chance(0.5) && size > 0 ? step / (isFloat(dtype) ? 2 : 1) : 0);
  const n = Math.max(0, Math.ceil((limit - start) / step));
  const scalar = (v: number): Known => m.scalarOf(dtype, v);
  m.node(op, [scalar(start), scalar(limit), scalar(step)], {}, [{ dtype, shape: [n], bound: 40 }]);
};
const trilu: Recipe = (m, op) => {
  const x = m.value(["f32", "f64", "i64"], { draw: "wild", least: 2 });
  const k = m.chance(0.5) ? m.integers([m.between(-4, 4)], []) : undefined;
  m.node(op, [x, k], m.chance(0.6) ? { upper: { i: m.below(2) } } : {}, [{ dtype: x.dtype, shape: x.shape }]);
};
const eyeLike: Recipe = (m, op) => {
  const x = m.value(["f32", "f64", "i32", "i64"], { draw: "wild", least: 2, most: 2 });
  const to = m.pick(["f32", "f64", "i32", "i64", "u64"] as const);
  const typed = m.chance(0.5);
  m.node(op, [x], { ...(typed && { dtype: { i: dtypeCode(to) } }), ...(m.chance(0.5) && { k: { i: m.between(-3, 3) } }) }, [
    { dtype: typed ? to : x.dtype, shape: x.shape, bound: 1 },
  ]);
};
const oneHot: Recipe = (m, op) => {
  const shape = m.shape(1, 3);
  const depth = m.between(1, 5);
  const [index, of, dtype] = m.pick([
    ["i64", "i64", "i64"],
    ["i64", "i64", "f32"],
    ["f32", "f32", "f32"],
    ["i32", "i32", "f32"],
  ] as const);
  const data = Float64Array.from({ length: count(shape) }, () => m.between(m.opset >= 11 ? -depth - 2 : 0, depth + 1));
  const indices = m.inputOf({ kind: "tensor", dtype: index, shape, data });
  const axis = m.between(0, shape.length);
  const at = m.chance(0.3) ? axis - shape.length - 1 : axis;
  const wide = [...shape.slice(0, axis), depth, ...shape.slice(axis)];
  const values = m.constantOf({ kind: "tensor", dtype, shape: [2], data: Float64Array.of(m.between(-2, 0), m.between(1, 5)) });
  const attributes: Attributes = axis === shape.length && m.chance(0.5) ? {} : { axis: { i: at } };
  m.node(op, [indices, m.scalarOf(of, depth, m.pick([[], [1]])), values], attributes, [{ dtype, shape: wide, bound: 5 }]);
};

// --- indices ---

const indexTensor = (
  m: Maker,
  shape: readonly number[],
  extent: number | ((i: number) => number),
  negative: boolean = true,
): Known => {
  const dtype = m.pick(["i64", "i64", "i32"] as const);
  const data = Float64Array.from({ length: count(shape) }, (_, i) => {
    const d = typeof extent === "number" ? extent : extent(i);
    return m.between(negative ? -d : 0, d - 1);
  });
  const tensor: Tensor = { kind: "tensor", dtype, shape, data };
  return m.chance(0.5) ? m.inputOf(tensor) : m.constantOf(tensor);
};
const full: Wanted = { draw: "wild", least: 1, test: (k) => count(k.shape) > 0 };
const gather: Recipe = (m, op) => {
  const x = m.value(any, full);
  const axis = m.below(x.shape.length);
  const shape = m.shape(0, 2);
  const index = indexTensor(m, shape, x.shape[axis] as number, m.opset >= 11);
  const result = [...x.shape.slice(0, axis), ...shape, ...x.shape.slice(axis + 1)];
  if (count(result) > 2 * mostElements || result.length > 6) return;
  m.node(op, [x, index], axis === 0 && m.chance(0.5) ? {} : { axis: { i: m.signed(axis, x.shape.length) } }, [
    { dtype: x.dtype, shape: result, exact: x.exact, bound: x.bound },
  ]);
};
const gatherElements: Recipe = (m, op) => {
  const x = m.value(any, full);
  const axis = m.below(x.shape.length);
  const shape = x.shape.map((d, i) => (i === axis ? m.between(1, 4) : m.between(1, d)));
  const index = indexTensor(m, shape, x.shape[axis] as number);
  m.node(op, [x, index], { axis: { i: m.signed(axis, x.shape.length) } }, [
    { dtype: x.dtype, shape, exact: x.exact, bound: x.bound },
  ]);
};
const tuples = (
  m: Maker,
  x: Known,
  batch: number,
): { readonly index: Known; readonly lead: readonly number[]; readonly rest: readonly number[] } => {
  const tuple = m.between(1, x.shape.length - batch);
  const lead = [...x.shape.slice(0, batch), ...m.shape(0, 2).map((d) => Math.max(1, d))];
  const index = indexTensor(m, [...lead, tuple], (i) => x.shape[batch + (i % tuple)] as number);
  const wide =
    index.dtype === "i64"
      ? index
      : m.constantOf({
          kind: "tensor",
          dtype: "i64",
          shape: index.shape,
          data: Float64Array.from({ length: count(index.shape) }, (_, i) => m.below(x.shape[batch + (i % tuple)] as number)),
        });
  return { index: wide, lead, rest: x.shape.slice(batch + tuple) };
};
const gatherNd: Recipe = (m, op) => {
  const x = m.value(["f32", "f64", "i32", "i64", "u8", "bool"], full);
  const batch = m.opset >= 12 ? m.below(x.shape.length) : 0;
  const { index, lead, rest } = tuples(m, x, batch);
  if (count([...lead, ...rest]) > 2 * mostElements) return;
  m.node(op, [x, index], batch > 0 ? { batch_dims: { i: batch } } : {}, [
    { dtype: x.dtype, shape: [...lead, ...rest], exact: x.exact, bound: x.bound },
  ]);
};
const reductionOf = (m: Maker, since: readonly [number, number]): string =>
  m.opset < since[0] ? "none" : m.pick(m.opset < since[1] ? ["none", "add", "mul"] : ["none", "add", "mul", "max", "min"]);
const scatterElements: Recipe = (m, op) => {
  if (op === "Scatter" && m.opset > 10) return;
  const x = m.value(["f32", "f64", "i32", "i64"], { ...full, draw: "normal" });
  const axis = m.below(x.shape.length);
  const reduction = reductionOf(m, [16, 18]);
  // without a reduction each place is written once: which of two writes stays is not said
  const extent = x.shape[axis] as number;
  const shape = x.shape.map((d, i) => m.between(1, i === axis && reduction !== "none" ? 4 : d));
  const along = shape[axis] as number;
  const order = m.shuffled(Array.from({ length: extent }, (_, i) => i));
  const inner = count(shape.slice(axis + 1));
  const data = Float64Array.from({ length: count(shape) }, (_, i) => {
    const at = reduction === "none" ? (order[Math.floor(i / inner) % along] as number) : m.below(extent);
    return m.opset >= 11 && m.chance(0.3) ? at - extent : at;
  });
  const index = m.inputOf({ kind: "tensor", dtype: m.pick(["i64", "i32"] as const), shape, data });
  const updates = m.fresh(x.dtype, shape);
  m.node(
    op,
    [x, index, updates],
    {
      axis: { i: op === "Scatter" ? axis : m.signed(axis, x.shape.length) },
      ...(reduction !== "none" && { reduction: { s: reduction } }),
    },
    [{ dtype: x.dtype, shape: x.shape, exact: false, bound: x.bound * 81 }],
  );
};
const scatterNd: Recipe = (m, op) => {
  const x = m.value(["f32", "f64", "i32", "i64"], { ...full, draw: "normal" });
  const reduction = reductionOf(m, [16, 18]);
  const tuple = m.between(1, x.shape.length);
  const places = count(x.shape.slice(0, tuple));
  const n = m.between(1, Math.min(4, places));
  const order = m.shuffled(Array.from({ length: places }, (_, i) => i));
  const data: number[] = [];
  for (let i = 0; i < n; i++) {
    let rest = reduction === "none" ? (order[i] as number) : m.below(places);
    const at: number[] = [];
    for (let a = tuple - 1; a >= 0; a--) {
      const d = x.shape[a] as number;
      at.unshift((rest % d) - (m.chance(0.2) ? d : 0));
      rest = Math.floor(rest / d);
    }
    data.push(...at);
  }
  const index = m.inputOf({ kind: "tensor", dtype: "i64", shape: [n, tuple], data: Float64Array.from(data) });
  const updates = m.fresh(x.dtype, [n, ...x.shape.slice(tuple)]);
  m.node(op, [x, index, updates], reduction !== "none" ? { reduction: { s: reduction } } : {}, [
    { dtype: x.dtype, shape: x.shape, exact: false, bound: x.bound * 81 },
  ]);
};

// --- reductions ---

const reduce =
  (dtypes: readonly DType[] | ((m: Maker) => readonly DType[]), since: number, draw: "normal" | "positive" = "normal"): Recipe =>
  (m, op) => {
    const wild = m.chance(0.25);
    const x = m.value(typeof dtypes === "function" ? dtypes(m) : dtypes, {
      draw: wild && (op === "ReduceMax" || op === "ReduceMin") ? "wild" : draw,
      test: (k) =>
        (count(k.shape) > 0 || wild) && (k.bound <= 100 || wild) && (op !== "ReduceProd" || k.bound ** count(k.shape) < 2 ** 31),
    });
    // products beyond the type are ONNX Runtime's own
    if (op === "ReduceProd" && !isFloat(x.dtype) && x.bound ** count(x.shape) >= 2 ** 31) return;
    const rank = x.shape.length;
    const keep = m.chance(0.5);
    const all = m.chance(0.2);
    const axes = all || rank === 0 ? [] : m.some(rank);
    const noop = all && m.opset >= since && m.chance(0.3);
    const attributes: Attributes = {
      ...(!keep || m.chance(0.3) ? { keepdims: { i: Number(keep) } } : {}),
      ...(noop && { noop_with_empty_axes: { i: 1 } }),
    };
    const signed = m.opset < 11 ? axes : axes.map((a) => m.signed(a, rank));
    const [more, input] = axes.length === 0 ? [{}, undefined] : axesAs(m, signed, since);
    const gone = axes.length === 0 ? x.shape.map((_, i) => i) : axes;
    const shape = noop
      ? x.shape
      : keep
        ? x.shape.map((d, i) => (gone.includes(i) ? 1 : d))
        : x.shape.filter((_, i) => !gone.includes(i));
    const n = noop ? 1 : count(gone.map((a) => x.shape[a] as number));
    const bound = op === "ReduceProd" ? Infinity : op === "ReduceSumSquare" ? n * x.bound ** 2 : n * x.bound + n;
    m.node(op, [x, input], { ...attributes, ...more }, [
      {
        dtype: x.dtype,
        shape,
        exact: x.exact && (op === "ReduceMax" || op === "ReduceMin" || !isFloat(x.dtype)),
        bound: isFloat(x.dtype) ? bound : 2 ** 32,
      },
    ]);
  };
const arg: Recipe = (m, op) => {
  const x = m.value(["f32", "f64", "f16", "i8", "u8", "i32", "i64"], {
    least: 1,
    exact: true,
    draw: m.chance(0.3) ? "wild" : "normal",
    test: (k) => count(k.shape) > 0,
  });
  const axis = m.below(x.shape.length);
  const keep = m.chance(0.5);
  const shape = keep ? x.shape.with(axis, 1) : x.shape.filter((_, i) => i !== axis);
  const last = m.opset >= 12 && m.chance(0.3);
  m.node(
    op,
    [x],
    {
      axis: { i: m.opset < 11 ? axis : m.signed(axis, x.shape.length) },
      keepdims: { i: Number(keep) },
      ...(last && { select_last_index: { i: 1 } }),
    },
    [{ dtype: "i64", shape, exact: true, bound: 7 }],
  );
};
const cumulate: Recipe = (m, op) => {
  const x = m.value(["f32", "f64", "i32", "i64"], { least: 1, test: (k) => k.bound <= 100 });
  const axis = m.integers([m.signed(m.below(x.shape.length), x.shape.length)], [], m.pick(["i64", "i32"] as const));
  m.node(op, [x, axis], { ...(m.chance(0.4) && { exclusive: { i: 1 } }), ...(m.chance(0.4) && { reverse: { i: 1 } }) }, [
    { dtype: x.dtype, shape: x.shape, exact: x.exact && !isFloat(x.dtype), bound: op === "CumProd" ? Infinity : x.bound * 7 },
  ]);
};
const topK: Recipe = (m, op) => {
  const x = m.value(m.opset < 11 ? ["f32"] : ["f32", "f64", "f16", "i8", "u8", "i16", "i32", "i64"], {
    least: 1,
    exact: true,
    draw: m.chance(0.3) ? "wild" : "normal",
    test: (k) => count(k.shape) > 0,
  });
  const axis = m.below(x.shape.length);
  const k = m.between(1, x.shape[axis] as number);
  const shape = x.shape.with(axis, k);
  const at = m.opset < 11 ? axis : m.signed(axis, x.shape.length);
  const attributes: Attributes = { axis: { i: at }, ...(m.opset >= 11 && m.chance(0.4) && { largest: { i: 0 } }) };
  m.node(op, [x, m.opset < 10 ? undefined : m.integers([k])], m.opset < 10 ? { ...attributes, k: { i: k } } : attributes, [
    { dtype: x.dtype, shape },
    { dtype: "i64", shape, bound: 7 },
  ]);
};

// --- products and normalisations ---

const matMul: Recipe = (m, op) => {
  const x = m.value(m.opset < 9 ? ["f32", "f64"] : ["f32", "f32", "f64", "f16", "i32", "i64", "u32", "u64"], {
    least: 1,
    most: 4,
    test: (k) => k.bound <= 100,
  });
  const k = x.shape.at(-1) as number;
  const n = m.between(1, 5);
  const lead = x.shape.slice(0, -2);
  // ONNX Runtime does not broadcast 0 against 1 here
  const kind = lead.includes(0) ? m.below(2) : m.below(4);
  const batch =
    kind === 2
      ? lead.slice(m.below(lead.length + 1)).map((d) => (m.chance(0.3) ? 1 : d))
      : kind === 3
        ? lead.map((d) => (d === 1 ? 2 : d))
        : [];
  const y = m.fresh(x.dtype, kind === 0 ? [k] : [...batch, k, n]);
  const rows = x.shape.length === 1 ? [] : [x.shape.at(-2) as number];
  m.node(op, [x, y], {}, [
    {
      dtype: x.dtype,
      shape: [...broadcastOf(lead, batch), ...rows, ...(kind === 0 ? [] : [n])],
      exact: x.exact && !isFloat(x.dtype),
      bound: x.bound * 10 * k,
    },
  ]);
};
const gemm: Recipe = (m, op) => {
  const [rows, k, n] = [m.between(1, 4), m.between(1, 5), m.between(1, 4)] as const;
  const [ta, tb] = [m.chance(0.4), m.chance(0.4)];
  const dtype = m.pick(wideFloats);
  const a = m.fresh(dtype, ta ? [k, rows] : [rows, k]);
  const b = m.fresh(dtype, tb ? [n, k] : [k, n]);
  const c = m.opset < 11 || m.chance(0.7) ? m.fresh(dtype, m.pick([[rows, n], [n], [1], [], [rows, 1], [1, n]])) : undefined;
  m.node(
    op,
    [a, b, c],
    {
      ...(ta && { transA: { i: 1 } }),
      ...(tb && { transB: { i: 1 } }),
      ...(m.chance(0.4) && { alpha: { f: 0.5 } }),
      ...(m.chance(0.4) && { beta: { f: m.pick([2, 0]) } }),
    },
    [{ dtype, shape: [rows, n], exact: false, bound: 80 }],
  );
};
const einsum: Recipe = (m, op) => {
  const dtype = m.pick(["f32", "f64", "i32", "i64"] as const);
  const sizes: Record<string, number> = { i: m.between(1, 4), j: m.between(1, 4), k: m.between(1, 3), l: m.between(1, 3) };
  const equation = m.pick([
    "ij,jk->ik",
    "ij,jk",
    "ij,ij->i",
    "ij->ji",
    "ij->",
    "ij->i",
    "ii->i",
    "ii->",
    "ii",
    "ij,kj,il->kl",
    "i,j->ij",
    "i,i->",
    "lij,ljk->lik",
    "...ij,...jk->...ik",
    "...i->...",
    "ijkl,ik->jl",
    "ij,j->i",
    "iji,j->i",
    "ij,ik,jk->",
    "...j,j",
  ]);
  const dots = m.shape(0, 2).map((d) => Math.max(1, d));
  const [left = "", right] = equation.split("->");
  const operands = left.split(",").map((t) => {
    const shape = [...(t.includes("...") ? dots : []), ...[...t.replace("...", "")].map((l) => sizes[l] as number)];
    return m.fresh(dtype, shape);
  });
  const letters = left.replaceAll(/[.,]/g, "");
  const once = [...new Set(letters)].filter((l) => letters.split(l).length === 2).sort();
  const output = right ?? `${left.includes("...") ? "..." : ""}${once.join("")}`;
  const shape = [...(output.includes("...") ? dots : []), ...[...output.replace("...", "")].map((l) => sizes[l] as number)];
  m.node(op, operands, { equation: { s: equation } }, [{ dtype, shape, exact: !isFloat(dtype), bound: 9 ** 3 * 64 }]);
};
const softmax: Recipe = (m, op) => {
  // masks have infinities
  const masked = m.chance(0.15);
  const x = masked ? m.fresh(m.pick(floats), m.shape(1), "wild") : m.value(floats, { least: 1, test: (k) => k.bound <= 30 });
  const axis = m.below(x.shape.length);
  const given = m.chance(0.7) || (m.opset < 13 && x.shape.length < 2);
  m.node(op, [x], given ? { axis: { i: m.opset < 11 ? axis : m.signed(axis, x.shape.length) } } : {}, [
    { dtype: x.dtype, shape: x.shape, exact: false, bound: op === "Softmax" ? 1 : 100 },
  ]);
};
const layerNorm: Recipe = (m, op) => {
  const x = m.value(["f32", "f64", "f16"], { least: 1, test: (k) => count(k.shape) > 0 && k.bound <= 100 && k.exact });
  const axis = m.below(x.shape.length);
  const own = x.shape.slice(axis);
  const scale = m.fresh(x.dtype, own);
  const bias = op === "LayerNormalization" && m.chance(0.5) ? m.fresh(x.dtype, own) : undefined;
  m.node(op, [x, scale, bias], { axis: { i: m.signed(axis, x.shape.length) }, ...(m.chance(0.5) && { epsilon: { f: 0.01 } }) }, [
    { dtype: x.dtype, shape: x.shape, exact: false, bound: 30 },
  ]);
};
const channelNorm: Recipe = (m, op) => {
  const groups = m.between(1, 3);
  const channels = op === "GroupNormalization" ? groups * m.between(1, 3) : m.between(1, 4);
  const x = m.fresh("f32", [m.between(1, 3), channels, ...Array.from({ length: m.between(1, 2) }, () => m.between(2, 4))]);
  const vector = (): Known => m.fresh("f32", [op === "GroupNormalization" && m.opset < 21 ? groups : channels]);
  m.node(
    op,
    [x, vector(), vector()],
    { epsilon: { f: 0.01 }, ...(op === "GroupNormalization" && { num_groups: { i: groups } }) },
    [{ dtype: "f32", shape: x.shape, exact: false, bound: 30 }],
  );
};
const lpNorm: Recipe = (m, op) => {
  const x = m.value(wideFloats, { least: 1, test: (k) => k.exact && count(k.shape) > 0 });
  m.node(
    op,
    [x],
    { axis: { i: m.signed(m.below(x.shape.length), x.shape.length) }, ...(m.chance(0.5) && { p: { i: m.between(1, 2) } }) },
    [{ dtype: x.dtype, shape: x.shape, exact: false, bound: 1 }],
  );
};

// --- branches and loops ---

const branch: Recipe = (m, op) => {
  const x = m.value(["f32", "i64", "f64"]);
  const name = `b${m.pool.length}`;
  const body = (kind: string): Body => ({
    inputs: [],
    nodes: [{ op: kind, inputs: [x.name], outputs: [`${name}_${kind}`], attributes: {} }],
    outputs: [{ name: `${name}_${kind}`, dtype: x.dtype }],
  });
  const condition = m.chance(0.7)
    ? m.scalarOf("bool", m.below(2), m.pick([[], [1]]))
    : m.inputOf({ kind: "tensor", dtype: "bool", shape: [], data: Float64Array.of(m.below(2)) });
  m.node(op, [condition], { then_branch: { g: body("Abs") }, else_branch: { g: body("Identity") } }, [
    { dtype: x.dtype, shape: x.shape },
  ]);
};
const loop: Recipe = (m, op) => {
  const x = m.value(["f32", "i64"], { test: (k) => k.bound <= 100 });
  const step = m.fresh(x.dtype, x.shape);
  const rounds = m.below(4) + Number(m.opset < 13);
  const [i, go, state, next, again, scan] = ["i", "go", "state", "next", "again", "scan"].map((n) => `${n}${m.pool.length}`) as [
    string,
    string,
    string,
    string,
    string,
    string,
  ];
  const scans = rounds > 0 && m.chance(0.5);
  const body: Body = {
    inputs: [
      { name: i, dtype: "i64", shape: [] },
      { name: go, dtype: "bool", shape: [] },
      { name: state, dtype: x.dtype, shape: x.shape },
    ],
    nodes: [
      { op: "Identity", inputs: [go], outputs: [again], attributes: {} },
      { op: "Add", inputs: [state, step.name], outputs: [next], attributes: {} },
      ...(scans ? [{ op: "Mul", inputs: [state, step.name], outputs: [scan], attributes: {} }] : []),
    ],
    outputs: [{ name: again, dtype: "bool" }, { name: next, dtype: x.dtype }, ...(scans ? [{ name: scan, dtype: x.dtype }] : [])],
  };
  m.node(
    op,
    [m.integers([rounds], m.pick([[], [1]])), m.chance(0.5) ? m.scalarOf("bool", 1) : undefined, x],
    { body: { g: body } },
    [
      { dtype: x.dtype, shape: x.shape, exact: false, bound: x.bound + 40 },
      ...(scans ? [{ dtype: x.dtype, shape: [rounds, ...x.shape], exact: false, bound: x.bound * 50 }] : []),
    ],
  );
};
const scan: Recipe = (m, op) => {
  if (m.opset < 9) return;
  const x = m.value(["f32", "i64"], { least: 1, most: 4, test: (k) => count(k.shape) > 0 && k.bound <= 100 });
  const axis = m.below(x.shape.length);
  const element = x.shape.filter((_, i) => i !== axis);
  const start = m.fresh(x.dtype, element);
  const [state, part, next, out] = ["state", "part", "next", "out"].map((n) => `${n}${m.pool.length}`) as [
    string,
    string,
    string,
    string,
  ];
  const body: Body = {
    inputs: [
      { name: state, dtype: x.dtype, shape: element },
      { name: part, dtype: x.dtype, shape: element },
    ],
    nodes: [
      { op: "Add", inputs: [state, part], outputs: [next], attributes: {} },
      { op: "Identity", inputs: [next], outputs: [out], attributes: {} },
    ],
    outputs: [
      { name: next, dtype: x.dtype },
      { name: out, dtype: x.dtype },
    ],
  };
  const outAxis = m.below(element.length + 1);
  const [back, outBack] = [m.below(2), m.below(2)];
  const stacked = [...element.slice(0, outAxis), x.shape[axis] as number, ...element.slice(outAxis)];
  m.node(
    op,
    [start, x],
    {
      body: { g: body },
      num_scan_inputs: { i: 1 },
      scan_input_axes: { ints: [m.opset < 11 ? axis : m.signed(axis, x.shape.length)] },
      scan_output_axes: { ints: [outAxis] },
      scan_input_directions: { ints: [back] },
      scan_output_directions: { ints: [outBack] },
    },
    [
      { dtype: x.dtype, shape: element, exact: false, bound: x.bound * 8 },
      { dtype: x.dtype, shape: stacked, exact: false, bound: x.bound * 8 },
    ],
  );
};

const dtypesByOpset =
  (since: number, old: readonly DType[], now: readonly DType[]) =>
  (m: Maker): readonly DType[] =>
    m.opset < since ? old : now;
const alpha = (m: Maker): Attributes => (m.chance(0.5) ? { alpha: { f: 0.375 } } : {});
const both = (m: Maker): Attributes => ({ ...alpha(m), ...(m.chance(0.5) && { beta: { f: 0.25 } }) });

// --- windows ---

/** Convolutions and pools over one or two axes. */
const windowed: Recipe = (m, op) => {
  const conv = op === "Conv";
  const groups = conv ? m.pick([1, 1, 2]) : 1;
  const channels = groups * m.between(1, 2);
  const sizes = Array.from({ length: m.between(1, 2) }, () => m.between(3, 6));
  const kernel = sizes.map(() => m.between(1, 3));
  const strides = sizes.map(() => m.between(1, 3));
  const dilations = sizes.map(() => (conv && m.chance(0.3) ? 2 : 1));
  const pads = [...kernel, ...kernel].map((k) => m.below(k));
  const places = sizes.map((size, i) => {
    const reach = size + (pads[i] as number) + (pads[i + sizes.length] as number);
    return Math.floor((reach - ((kernel[i] as number) - 1) * (dilations[i] as number) - 1) / (strides[i] as number)) + 1;
  });
  if (places.some((n) => n < 1)) return;
  const batch = m.between(1, 2);
  const x = m.fresh("f32", [batch, channels, ...sizes]);
  const attributes = {
    kernel_shape: { ints: kernel },
    ...(m.chance(0.8) && { strides: { ints: strides }, pads: { ints: pads } }),
    ...(dilations.some((d) => d > 1) && { dilations: { ints: dilations } }),
    ...(op === "AveragePool" && m.chance(0.5) && { count_include_pad: { i: 1 } }),
  };
  const plain = !("strides" in attributes);
  const shape = plain ? sizes.map((size, i) => size - ((kernel[i] as number) - 1) * (dilations[i] as number)) : places;
  if (shape.some((n) => n < 1)) return;
  if (!conv) {
    m.node(op, [x], attributes, [{ dtype: "f32", shape: [batch, channels, ...shape], exact: op === "MaxPool" }]);
    return;
  }
  const outputs = groups * m.between(1, 3);
  const w = m.fresh("f32", [outputs, channels / groups, ...kernel]);
  const bias = m.chance(0.5) ? m.fresh("f32", [outputs]) : undefined;
  const result: Result = { dtype: "f32", shape: [batch, outputs, ...shape], exact: false, bound: 500 };
  m.node(op, [x, w, bias], { ...attributes, group: { i: groups } }, [result]);
};

const globalPool: Recipe = (m, op) => {
  const x = m.fresh("f32", [m.between(1, 2), m.between(1, 3), m.between(1, 4), m.between(1, 4)]);
  m.node(op, [x], {}, [{ dtype: "f32", shape: [...x.shape.slice(0, 2), 1, 1], exact: op === "GlobalMaxPool" }]);
};

const blocks: Recipe = (m, op) => {
  const size = m.between(1, 2);
  const [n, channels, height, width] = [m.between(1, 2), m.between(1, 2), m.between(1, 3), m.between(1, 3)];
  const deep = [n, channels * size * size, height, width];
  const broad = [n, channels, height * size, width * size];
  const toSpace = op === "DepthToSpace";
  const x = m.fresh("f32", toSpace ? deep : broad);
  const mode = toSpace && m.chance(0.5) ? { mode: { s: "CRD" } } : {};
  m.node(op, [x], { blocksize: { i: size }, ...mode }, [{ dtype: "f32", shape: toSpace ? broad : deep, exact: true }]);
};

const batchNorm: Recipe = (m, op) => {
  const channels = m.between(1, 3);
  const x = m.fresh("f32", [m.between(1, 2), channels, m.between(1, 4)]);
  const vector = (draw: "normal" | "positive"): Known => m.fresh("f32", [channels], draw);
  const inputs = [x, vector("normal"), vector("normal"), vector("normal"), vector("positive")];
  m.node(op, inputs, { epsilon: { f: 0.01 } }, [{ dtype: "f32", shape: x.shape, exact: false }]);
};

const hardmax: Recipe = (m, op) => {
  const x = m.value(["f32"], { least: 1, exact: true, test: (k) => count(k.shape) > 0 });
  m.node(op, [x], { axis: { i: m.signed(m.below(x.shape.length), x.shape.length) } }, [{ dtype: "f32", shape: x.shape }]);
};

/** Every operator, the opset it is there from, and how a node of it is made. */
export const recipes: readonly Entry[] = [
  ...(["Add", "Sub", "Mul"] as const).map((op): Entry => [op, 7, binary(dtypesByOpset(14, arithmetic, everything))]),
  ["Add", 7, binary(["i32", "i64"], ["wild", "wild"])],
  ["Div", 7, binary(floats, ["normal", "positive"])],
  ["Div", 7, integerDivide],
  ["Mod", 10, modulo],
  ["Pow", 7, power],
  ["Max", 8, variadic(dtypesByOpset(12, ["f32", "f64"], ["f32", "f64", "f16", "i8", "u8", "i32", "i64", "u32", "u64"]), "wild")],
  ["Min", 8, variadic(dtypesByOpset(12, ["f32", "f64"], ["f32", "f64", "f16", "i8", "u8", "i32", "i64", "u32", "u64"]), "wild")],
  ["Sum", 8, variadic(() => ["f32", "f64", "f16"], "normal")],
  ["Mean", 8, variadic(() => narrowFloats, "normal")],
  ["Clip", 7, clip],
  ["Neg", 7, unary(["f32", "f64", "f16", "i8", "i16", "i32", "i64"], { draw: "wild" }, undefined, true)],
  [
    "Abs",
    7,
    unary(["f32", "f64", "f16", ...ints], { draw: "wild", test: (k) => isFloat(k.dtype) || k.bound < 100 }, undefined, true),
  ],
  ["Sign", 9, unary(["f32", "f64", "f16", ...ints], wildExact, undefined, true)],
  ...(["Floor", "Ceil"] as const).map((op): Entry => [op, 7, unary(floats, wildExact, undefined, true)]),
  ["Round", 11, unary(floats, wildExact, undefined, true)],
  ["Sqrt", 7, unary(floats, { draw: "positive" })],
  ["Reciprocal", 7, unary(floats, { draw: "positive" })],
  ["Exp", 7, unary(floats, small)],
  ["Log", 7, unary(floats, { draw: "positive" })],
  ...(["Sin", "Cos", "Atan"] as const).map((op): Entry => [op, 7, unary(narrowFloats, small)]),
  ["Tan", 7, unary(narrowFloats, { draw: "unit" })],
  ...(["Asin", "Acos"] as const).map((op): Entry => [op, 7, unary(narrowFloats, { draw: "unit" })]),
  ...(["Sinh", "Cosh", "Asinh"] as const).map((op): Entry => [op, 9, unary(narrowFloats, small)]),
  [
    "Acosh",
    9,
    (m, op) => {
      const x = m.constantOf({ kind: "tensor", dtype: "f32", shape: [4], data: Float64Array.of(1, 1.5, 3, 20) });
      m.node(op, [x], {}, [{ dtype: "f32", shape: [4], exact: false }]);
    },
  ],
  ["Atanh", 9, unary(narrowFloats, { draw: "unit" })],
  ["Erf", 9, unary(narrowFloats)],
  ["Tanh", 7, unary(floats)],
  ["Sigmoid", 7, unary(floats)],
  ["Relu", 7, unary(["f32", "f64", "f16"], { draw: "wild" }, undefined, true)],
  ["Relu", 14, unary(["i32", "i8"], { draw: "wild" }, undefined, true)],
  ["Gelu", 20, unary(narrowFloats, small, (m) => (m.chance(0.5) ? { approximate: { s: m.pick(["tanh", "none"]) } } : {}))],
  ["HardSigmoid", 7, unary(narrowFloats, {}, both)],
  ["HardSwish", 14, unary(narrowFloats)],
  ["Softplus", 7, unary(narrowFloats)],
  ["Softsign", 7, unary(narrowFloats)],
  ["Mish", 18, unary(narrowFloats, small)],
  ["Elu", 7, unary(narrowFloats, small, alpha)],
  ["Selu", 7, unary(narrowFloats, small, (m) => (m.chance(0.5) ? { alpha: { f: 1.5 }, gamma: { f: 1.25 } } : {}))],
  ["Celu", 12, unary(["f32"], small, alpha)],
  ["LeakyRelu", 7, unary(narrowFloats, {}, alpha)],
  ["ThresholdedRelu", 10, unary(narrowFloats, { exact: true }, alpha)],
  ["PRelu", 7, prelu],
  ["Equal", 7, binary(dtypesByOpset(11, ["bool", "i32", "i64"], ["bool", ...everything]), ["wild", "wild"], "compare")],
  ...(["Less", "Greater"] as const).map(
    (op): Entry => [op, 7, binary(dtypesByOpset(9, ["f32", "f64"], everything), ["wild", "wild"], "compare")],
  ),
  ...(["LessOrEqual", "GreaterOrEqual"] as const).map((op): Entry => [op, 12, binary(everything, ["wild", "wild"], "compare")]),
  ...(["And", "Or", "Xor"] as const).map((op): Entry => [op, 7, binary(["bool"])]),
  ["Not", 7, unary(["bool"], {}, undefined, true)],
  ...(["BitwiseAnd", "BitwiseOr", "BitwiseXor"] as const).map((op): Entry => [op, 18, binary(ints, ["wild", "wild"])]),
  ["BitwiseNot", 18, unary(["i8", "u8", "i16", "u16", "i32", "u32", "i64"], { draw: "wild" }, undefined, true)],
  ["BitShift", 11, shift],
  ["IsNaN", 9, unary(["f32", "f64", "f16"], wildExact, undefined, true, "bool")],
  ["IsInf", 10, isInf],
  ["Where", 9, where],
  ["Cast", 9, cast],
  ["Cast", 9, cast],
  ["Cast", 9, cast],
  ["CastLike", 15, cast],
  ["Cast", 19, castNarrow],
  ["Identity", 7, unary(any, { draw: "wild" }, undefined, true)],
  ["Dropout", 7, unary(["f32", "f64"], { draw: "wild" }, undefined, true)],
  ["Reshape", 7, reshape],
  ["Flatten", 7, flatten],
  ["Squeeze", 7, squeeze],
  ["Unsqueeze", 7, unsqueeze],
  ["Transpose", 7, transpose],
  ["Concat", 7, concat],
  ["Split", 7, split],
  ["Slice", 7, slice],
  ["Slice", 10, slice],
  ["Expand", 8, expand],
  ["Tile", 7, tile],
  ["Pad", 7, pad],
  ["Pad", 11, pad],
  ["Shape", 7, shapeOf],
  ["Size", 7, shapeOf],
  ["Reshape", 7, shapeArithmetic],
  ["Constant", 7, constantNode],
  ["ConstantOfShape", 9, constantOfShape],
  ["Range", 11, range],
  ["Trilu", 14, trilu],
  ["EyeLike", 9, eyeLike],
  ["OneHot", 9, oneHot],
  ["Gather", 7, gather],
  ["GatherElements", 11, gatherElements],
  ["GatherND", 11, gatherNd],
  ["Scatter", 9, scatterElements],
  ["ScatterElements", 11, scatterElements],
  ["ScatterND", 11, scatterNd],
  ["ReduceSum", 7, reduce(reducible, 13)],
  ["ReduceMean", 7, reduce(reducible, 18)],
  ["ReduceMax", 7, reduce((m) => (m.opset < 18 ? reducible : [...reducible, "i8", "u8"]), 18)],
  ["ReduceMin", 7, reduce((m) => (m.opset < 18 ? reducible : [...reducible, "i8", "u8"]), 18)],
  ["ReduceProd", 7, reduce(reducible, 18)],
  ["ReduceL1", 7, reduce(reducible, 18)],
  ["ReduceL2", 7, reduce(reducible, 18)],
  ["ReduceLogSum", 7, reduce(reducible, 18, "positive")],
  ["ReduceSumSquare", 7, reduce(reducible, 18)],
  ["ReduceLogSumExp", 7, reduce(reducible, 18)],
  ["ArgMax", 7, arg],
  ["ArgMin", 7, arg],
  ["CumSum", 11, cumulate],
  ["CumProd", 26, cumulate],
  ["TopK", 7, topK],
  ["MatMul", 7, matMul],
  ["MatMul", 7, matMul],
  ["Gemm", 7, gemm],
  ["Einsum", 12, einsum],
  ["Softmax", 7, softmax],
  ["LogSoftmax", 7, softmax],
  ["LayerNormalization", 17, layerNorm],
  ["RMSNormalization", 23, layerNorm],
  ["GroupNormalization", 18, channelNorm],
  ["InstanceNormalization", 7, channelNorm],
  ["LpNormalization", 7, lpNorm],
  ["BatchNormalization", 9, batchNorm],
  ["Hardmax", 13, hardmax],
  ["Conv", 7, windowed],
  ["MaxPool", 7, windowed],
  ["AveragePool", 7, windowed],
  ["GlobalAveragePool", 7, globalPool],
  ["GlobalMaxPool", 7, globalPool],
  ["SpaceToDepth", 7, blocks],
  ["DepthToSpace", 11, blocks],
  ["If", 7, branch],
  ["Loop", 11, loop],
  ["Scan", 9, scan],
];

/** The random model of a seed. */
export const randomModel = (seed: number): MadeModel => {
  const m = new Maker(seed);
  const there = recipes.filter(([, since]) => since <= m.opset);
  const nodes = m.between(1, 8);
  for (let i = 0; i < nodes || m.model().outputs.length === 0; i++) {
    const [op, , recipe] = m.pick(there);
    recipe(m, op);
  }
  return m.model();
};
