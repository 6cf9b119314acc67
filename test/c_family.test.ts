import { describe, expect, test } from "vitest";
import { type Dialect, elementStatements, fill, planRows, renderScalar, rowBody, rowsOf } from "../backends/c_family.ts";
import { rowKernel } from "../backends/cpp/rows.ts";
import { dialect } from "../backends/scalar.ts";
import {
  arg,
  Builder,
  bin,
  type Graph,
  lit,
  type Op,
  type Scalar,
  type TensorType,
  tensor,
  un,
  type Value,
} from "../ir/index.ts";

const target = { arch: "any", symbols: [], decline: (): undefined => undefined };

/** The kernel of a body, as one op `fused`. */
const kernelOf = (body: Graph): string => {
  const b = new Builder("g");
  b.fused(
    body.inputs.map((v) => b.input(v.name, v.type as TensorType)),
    body,
  );
  const plan = rowKernel.match(b.build().ops[0] as Op, target);
  return plan ? rowKernel.render(plan.context, "k") : "declined";
};
const bodyOf = (make: (b: Builder) => readonly Value[]): Graph => {
  const b = new Builder("row");
  const outputs = make(b);
  return { ...b.build(), outputs };
};
/** The lines inside the loop over rows, without what loads pointers. */
const rowLines = (text: string): string[] =>
  text
    .split("\n")
    .map((l) => l.trim())
    .filter(
      (l) => l !== "" && !/^(#include|\/\/|void|const \w+ \*|\w+ \*const|for \(rows|const int64_t row|\}|S3_INDEPENDENT)/.test(l),
    );
const whyNot = (body: Graph): string => {
  const why: string[] = [];
  planRows(dialect, body, (reason) => {
    why.push(reason);
    return undefined;
  });
  return why.join("; ");
};

describe("scalar expressions", () => {
  const sigmoid = bin("div", lit(1), bin("add", lit(1), un("exp", un("neg", arg(0)))));
  const cases: readonly [what: string, s: Scalar, operands: string[], wide: boolean, text: string][] = [
    ["operators and functions", sigmoid, ["x"], false, "(1.0f / (1.0f + exponential_of((-x))))"],
    ["in the wide type", sigmoid, ["x"], true, "(1.0 / (1.0 + exponential_of((-x))))"],
    [
      "select of a comparison",
      { op: "select", if: bin("lt", arg(0), arg(1)), x: arg(0), y: lit(0) },
      ["a", "b"],
      false,
      "((a < b ? 1.0f : 0.0f) != 0 ? a : 0.0f)",
    ],
    ["rounding inside", { op: "round", dtype: "bf16", x: bin("mul", arg(0), arg(0)) }, ["a"], false, "round_bf16((a * a))"],
    ["NaN-aware minimum", bin("min", arg(0), arg(1)), ["a", "b"], false, "smaller_of(a, b)"],
  ];
  for (const [what, s, operands, wide, text] of cases)
    test(what, () => expect(renderScalar(dialect, s, operands, wide)).toBe(text));

  const literals: readonly [value: number, narrow: string, wide: string][] = [
    [1, "1.0f", "1.0"],
    [-2.5, "(-2.5f)", "(-2.5)"],
    [0.1, "0.1f", "0.1"],
    [1e-5, "0.00001f", "0.00001"],
    [1e-9, "1e-9f", "1e-9"],
    [16777217, "16777216.0f", "16777217.0"],
    [Math.fround(0.1), "0.1f", "0.10000000149011612"],
    [-0, "(-0.0f)", "(-0.0)"],
    [Infinity, "infinity", "(double)infinity"],
    [-Infinity, "(-infinity)", "(-(double)infinity)"],
    [Number.NaN, "not_a_number", "(double)not_a_number"],
    [3.4028234663852886e38, "3.4028235e+38f", "3.4028234663852886e+38"],
    [2 ** -149, "1e-45f", "1.401298464324817e-45"],
  ];
  for (const [value, narrow, wide] of literals)
    test(`literal ${Object.is(value, -0) ? "-0" : value}`, () => {
      expect(dialect.literal(value, false)).toBe(narrow);
      expect(dialect.literal(value, true)).toBe(wide);
    });

  test("another language is another table", () => {
    const shader: Dialect = {
      ...dialect,
      name: "shader",
      unary: { ...dialect.unary, exp: "exp($0)" },
      select: "select($2, $1, $0 != 0.0)",
    };
    expect(renderScalar(shader, sigmoid, ["x"], false)).toBe("(1.0f / (1.0f + exp((-x))))");
    expect(renderScalar(shader, { op: "select", if: arg(0), x: arg(1), y: arg(2) }, ["c", "a", "b"], false)).toBe(
      "select(b, a, c != 0.0)",
    );
    expect(fill("$1 $0 $1", "a", "b")).toBe("b a b");
  });
});

describe("epilogues", () => {
  test("elementwise ops after a contraction, every rounding kept", () => {
    const body = bodyOf((b) => {
      const sum = b.input("acc", tensor("f32", ["T", 8]));
      const bias = b.op("add", [sum, b.input("bias", tensor("f32", [8]))]);
      const rounded = b.op("cast", [b.op("silu", [bias])], { to: "bf16" });
      const scaled = b.op("mul", [rounded, b.op("const", [], { value: 0.5, dtype: "bf16" })]);
      return [b.op("cast", [scaled], { to: "f32" })];
    });
    const names = new Map([
      ["acc", "sums[i]"],
      ["bias", "bias[n + i]"],
    ]);
    const { lines, spell } = elementStatements(dialect, body.ops, (v) => names.get(v.name) as string);
    expect(lines).toEqual([
      "const float add0 = sums[i] + bias[n + i];",
      "const float silu1 = add0 / (1.0f + exponential_of((-add0)));",
      "const float cast2 = round_bf16(silu1);",
      "const float mul4 = round_bf16(cast2 * 0.5f);",
    ]);
    expect(spell(body.outputs[0] as Value)).toBe("mul4");
  });
});

describe("rows", () => {
  const f32 = (n: number): TensorType => tensor("f32", ["T", n]);

  test("text depends on kinds, types and attributes, not on names", () => {
    const layer = (n: number): Graph =>
      bodyOf((b) => {
        const x = b.input(`layer${n}_x`, f32(96));
        return [b.op("mul", [x, b.input(`layer${n}_w`, tensor("f32", [96]))], {}, [`layer${n}_out`])];
      });
    expect(kernelOf(layer(3))).toBe(kernelOf(layer(41)));
    expect(kernelOf(layer(3))).not.toContain("layer3");
  });

  test("a cheap value is computed again in a later stage", () => {
    const text = kernelOf(
      bodyOf((b) => {
        const x = b.op("add", [b.input("x", f32(40)), b.input("y", f32(40))]);
        return [b.op("div", [x, b.op("reduce", [b.op("mul", [x, x])], { fn: "sum" })])];
      }),
    );
    expect(rowLines(text)).toEqual([
      "alignas(64) float mul1_row[40];",
      "for (int64_t i = 0; i < 40; ++i) {",
      "const float x0 = in0_row[i];",
      "const float x1 = in1_row[i];",
      "const float add0 = x0 + x1;",
      "const float mul1 = add0 * add0;",
      "mul1_row[i] = mul1;",
      "const float sum2 = sum(mul1_row, 40);",
      "for (int64_t i = 0; i < 40; ++i) {",
      "const float x0 = in0_row[i];",
      "const float x1 = in1_row[i];",
      "const float add0 = x0 + x1;",
      "out0_row[i] = add0 / sum2;",
    ]);
  });

  test("a dear value is kept for a later stage, in the buffer that its reduction reads", () => {
    const text = kernelOf(
      bodyOf((b) => {
        const e = b.op("exp", [b.input("x", f32(40))]);
        return [b.op("div", [e, b.op("reduce", [e], { fn: "sum" })])];
      }),
    );
    expect(rowLines(text)).toEqual([
      "alignas(64) float exp0_row[40];",
      "for (int64_t i = 0; i < 40; ++i) {",
      "const float x0 = in0_row[i];",
      "const float exp0 = exponential_of(x0);",
      "exp0_row[i] = exp0;",
      "const float sum1 = sum(exp0_row, 40);",
      "for (int64_t i = 0; i < 40; ++i) {",
      "out0_row[i] = exp0_row[i] / sum1;",
    ]);
  });

  test("what only a later stage reads is computed there", () => {
    const text = kernelOf(
      bodyOf((b) => {
        const x = b.input("x", f32(40));
        const gate = b.op("silu", [b.input("g", f32(40))]);
        return [b.op("mul", [gate, b.op("add", [x, b.op("reduce", [x], { fn: "max" })])])];
      }),
    );
    const lines = rowLines(text);
    expect(lines.filter((l) => l.startsWith("for"))).toHaveLength(1);
    expect(lines[0]).toBe("const float max1 = max(in0_row, 40);");
    expect(lines.some((l) => l.startsWith("alignas"))).toBe(false);
  });

  test("values of one column are statements of the row", () => {
    const text = kernelOf(
      bodyOf((b) => {
        const scale = b.op("sqrt", [b.op("abs", [b.input("s", f32(1))])]);
        return [b.op("mul", [b.input("x", f32(12)), scale]), scale];
      }),
    );
    expect(rowLines(text)).toEqual([
      "const float x0 = in0[row];",
      "const float abs0 = magnitude(x0);",
      "const float sqrt1 = square_root(abs0);",
      "out1[row] = sqrt1;",
      "for (int64_t i = 0; i < 12; ++i) {",
      "const float x1 = in1_row[i];",
      "out0_row[i] = x1 * sqrt1;",
    ]);
  });

  test("groups: a loop over them when one group serves, an index when another does", () => {
    const text = kernelOf(
      bodyOf((b) => {
        const spread = (name: string, group: number): Value => {
          const narrow = b.input(name, f32(Math.ceil(100 / group)));
          return b.op("spread", [narrow], { group, size: 100 });
        };
        return [b.op("mul", [b.op("add", [b.input("x", f32(100)), spread("a", 32)]), spread("b", 50)])];
      }),
    );
    expect(rowLines(text)).toEqual([
      "for (int64_t g = 0; g < 4; ++g) {",
      "const float x1_group = in1_row[g];",
      "const int64_t last = g == 3 ? 100 : (g + 1) * 32;",
      "for (int64_t i = g * 32; i < last; ++i) {",
      "const float x0 = in0_row[i];",
      "const float add1 = x0 + x1_group;",
      "out0_row[i] = add1 * in2_row[i / 50];",
    ]);
  });

  test("broadcasting over row axes", () => {
    const text = kernelOf(
      bodyOf((b) => [b.op("add", [b.input("x", tensor("f32", ["2*T", 3, 8])), b.input("y", tensor("f32", [3, 1]))])]),
    );
    expect(text).toContain("rows::of_tokens(c, 6, 1)");
    expect(text).toContain("const float x1 = in1[row % 3];");
  });

  test("one wide row without reductions is cut into tiles", () => {
    const wide = bodyOf((b) => [b.op("neg", [b.input("x", f32(5000))])]);
    expect(kernelOf(wide)).toContain("rows::of_tokens(c, 1, 3)");
    const scalarToo = bodyOf((b) => [b.op("neg", [b.input("x", f32(5000))]), b.op("neg", [b.input("y", f32(1))])]);
    expect(kernelOf(scalarToo)).toContain("rows::of_tokens(c, 1, 1)");
  });

  test("integers of 32 bits compute in double, comparisons give 0 and 1", () => {
    const text = kernelOf(
      bodyOf((b) => {
        const [x, y] = [b.input("x", tensor("i32", ["T", 4])), b.input("y", tensor("i32", ["T", 4]))];
        return [b.op("add", [x, y]), b.op("less", [x, y])];
      }),
    );
    expect(rowLines(text)).toContain("const double x0 = value(in0_row[i]);");
    expect(rowLines(text)).toContain("out0_row[i] = to_i32(x0 + x1);");
    expect(rowLines(text)).toContain("out1_row[i] = to_bool(x0 < x1 ? 1.0f : 0.0f);");
  });

  const declined: readonly [what: string, body: () => Graph, why: string][] = [
    [
      "rows that are no multiple of tokens",
      () => bodyOf((b) => [b.op("neg", [b.input("x", tensor("f32", ["T+1", 4]))])]),
      "T+1 rows are not a multiple of T",
    ],
    [
      "rows of another symbol",
      () => bodyOf((b) => [b.op("neg", [b.input("x", tensor("f32", ["S", 4]))])]),
      "S rows are not a multiple of T",
    ],
    [
      "tokens on another axis",
      () => bodyOf((b) => [b.op("neg", [b.input("x", tensor("f32", [4, "T", 2]))])]),
      "only the first axis may depend on T",
    ],
    [
      "outputs of different rows",
      () => bodyOf((b) => [b.op("neg", [b.input("x", f32(4))]), b.op("neg", [b.input("w", tensor("f32", [4]))])]),
      "results differ in rows: f32[T,4], f32[4]",
    ],
    [
      "a row too large for the stack",
      () => bodyOf((b) => [b.op("reduce", [b.op("exp", [b.input("x", f32(1_000_000))])], { fn: "sum" })]),
      "a row needs 4000000 bytes of intermediate values",
    ],
  ];
  for (const [what, body, why] of declined) test(`declined: ${what}`, () => expect(whyNot(body())).toBe(why));

  test("which ops have a row body", () => {
    const b = new Builder("g");
    const x = b.input("x", tensor("bf16", ["T", 64]));
    b.op("rms_norm", [x, b.input("w", tensor("bf16", [64]))]);
    b.op("neg", [x]);
    b.op("linear", [x, b.input("v", tensor("bf16", [8, 64]))]);
    b.op("rotary", [x, b.input("t", tensor("f32", [9, 64])), b.input("p", tensor("i32", ["T"]))], { heads: 1, dim: 64 });
    const kinds = b.build().ops.map((op) =>
      rowBody(op)
        ?.ops.map((o) => o.kind)
        .join(" "),
    );
    expect(kinds).toEqual(["cast mul reduce const add rsqrt mul cast mul", "neg", undefined, undefined]);
    expect([rowsOf(5), rowsOf("T"), rowsOf("3*T"), rowsOf("T+1")]).toEqual([
      { perToken: false, count: 5 },
      { perToken: true, count: 1 },
      { perToken: true, count: 3 },
      undefined,
    ]);
  });
});
