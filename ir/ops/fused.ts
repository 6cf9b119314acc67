import type { Attrs } from "../attr.ts";
import { bindSymbols, bytesOf } from "../bind.ts";
import * as expect from "../expect.ts";
import type { Graph, Op, Value } from "../graph.ts";
import { interpret } from "../interpret.ts";
import type { Datum, Knowledge, Sample } from "../op.ts";
import { sameType, type TensorType, type Type, tensor, typeText } from "../type.ts";

type Lookup = (kind: string) => Knowledge;

const bodyOf = (body: Graph | undefined): Graph => body ?? expect.fail("needs a body");

/** An op of a sample's body: its kind, its operands (`i0` ... are inputs, `t0` ... results of the ops before), its attributes. */
type Line = readonly [kind: string, operands: string, attrs?: Attrs];

const sampleOf = (
  knowledge: Lookup,
  name: string,
  inputs: readonly TensorType[],
  body: readonly Line[],
  outputs: string,
  values?: Sample["values"],
): Sample => {
  const known = new Map<string, Value>(inputs.map((type, i) => [`i${i}`, { name: `i${i}`, type }]));
  const named = (names: string): Value[] => names.split(" ").flatMap((n) => known.get(n) ?? []);
  const arguments_ = [...known.values()];
  const ops = body.map(([kind, operands, attrs = {}], i): Op => {
    const taken = named(operands);
    const types = taken.map((v) => v.type);
    const result = { name: `t${i}`, type: knowledge(kind).infer(types, attrs)[0] as TensorType };
    known.set(result.name, result);
    return { kind, inputs: taken, attrs, outputs: [result] };
  });
  const graph = { name: "body", symbols: [], inputs: arguments_, states: [], weights: [], ops, outputs: named(outputs) };
  return { name, inputs, attrs: {}, body: graph, symbols: { T: 5 }, ...(values ? { values } : {}) };
};

const samplesWith = (knowledge: Lookup): readonly Sample[] => {
  const sample = (...rest: Parameters<typeof sampleOf> extends [Lookup, ...infer R] ? R : never): Sample =>
    sampleOf(knowledge, ...rest);
  const f32 = (value: number): Line => ["const", "", { value, dtype: "f32" }];
  const cast = (x: string, to: string): Line => ["cast", x, { to }];
  const wide = tensor("f32", ["T", 40]);
  const narrow = tensor("bf16", ["T", 130]);
  return [
    sample("swiglu", [wide, wide], [["silu", "i0"], ["mul", "t0 i1"], cast("t1", "bf16")], "t2"),
    sample(
      "residual and norm",
      [narrow, narrow, tensor("bf16", [130])],
      [
        cast("i0", "f32"),
        cast("i1", "f32"),
        ["add", "t0 t1"],
        cast("t2", "bf16"),
        cast("t3", "f32"),
        ["mul", "t4 t4"],
        ["reduce", "t5", { fn: "mean" }],
        f32(1e-5),
        ["add", "t6 t7"],
        ["rsqrt", "t8"],
        ["mul", "t4 t9"],
        cast("t10", "bf16"),
        ["mul", "t11 i2"],
      ],
      "t3 t12",
      ["normal", "normal", "positive"],
    ),
    sample(
      "product, quantised in groups with a short last one",
      [narrow, narrow],
      [
        ["mul", "i0 i1"],
        cast("t0", "f32"),
        ["reduce", "t1", { fn: "amax", group: 32 }],
        f32(448),
        ["div", "t2 t3"],
        f32(0),
        ["equal", "t4 t5"],
        f32(1),
        ["where", "t6 t7 t4"],
        ["spread", "t8", { group: 32, size: 130 }],
        ["div", "t1 t9"],
        cast("t10", "e4m3"),
      ],
      "t11 t8",
    ),
    sample(
      "one column without its axis",
      [tensor("f32", ["T"]), tensor("f32", ["T"])],
      [["mul", "i0 i1"], f32(0.5), ["add", "t0 t1"]],
      "t2",
    ),
    sample(
      "linear, bias and rounding",
      [tensor("bf16", ["T", 72]), tensor("bf16", [40, 72]), tensor("f32", [40])],
      [["linear", "i0 i1", { to: "f32" }], ["add", "t0 i2"], cast("t1", "bf16")],
      "t2",
    ),
    sample(
      "linear, residual",
      [tensor("bf16", ["T", 131]), tensor("bf16", [37, 131]), tensor("f32", ["T", 37])],
      [
        ["linear", "i0 i1", { to: "f32" }],
        ["add", "t0 i2"],
      ],
      "t1",
    ),
    sample(
      "experts' swiglu",
      [tensor("bf16", ["T", 24]), tensor("bf16", [4, 40, 24]), tensor("i32", ["T", 3]), tensor("f32", ["3*T", 40])],
      [["grouped_linear", "i0 i1 i2", { to: "f32" }], ["silu", "t0"], ["mul", "t1 i3"], cast("t2", "bf16")],
      "t3",
      ["normal", "normal", { below: 4 }, "normal"],
    ),
    sample(
      "scaled linear and epilogue",
      [
        tensor("i8", ["T", 64]),
        tensor("f32", ["T", 1]),
        tensor("i8", [24, 64]),
        tensor("f32", [24, 1]),
        tensor("f32", ["T", 24]),
      ],
      [
        ["scaled_linear", "i0 i1 i2 i3", { to: "f32", block: [1, 64] }],
        ["mul", "t0 i4"],
      ],
      "t1",
      ["normal", "positive", "normal", "positive", "normal"],
    ),
  ];
};

/** Several ops as one kernel, every rounding kept. Its meaning is its body's, so it is made with the registry it looks ops up in. */
export const fusedWith = (knowledge: Lookup): Knowledge => ({
  name: "fused",
  summary:
    "inputs... -> the outputs of its body: a row kernel of elementwise, reduce and spread ops, or contractions with what follows them",
  attrs: {},
  inputs: ["inputs..."],
  rowwise: "row",
  infer(inputs, _, given) {
    const body = bodyOf(given);
    if (inputs.length !== body.inputs.length) expect.fail(`body takes ${body.inputs.length} inputs, got ${inputs.length}`);
    body.inputs.forEach(({ name, type }, i) => {
      if (!sameType(type, inputs[i] as typeof type))
        expect.fail(`input '${name}' of the body is ${typeText(type)}, got ${typeText(inputs[i] as typeof type)}`);
    });
    return body.outputs.map((v) => v.type);
  },
  evaluate(inputs, _, outputs, given) {
    const body = bodyOf(given);
    const values = new Map<string, Datum>(body.inputs.map((v, i) => [v.name, inputs[i] as Datum]));
    // sizes come from the inputs, and from the results where no input has them
    const results = body.outputs.flatMap((v, i) => {
      const type = outputs[i];
      if (type?.kind !== "tensor") return [];
      const datum: Datum = { ...type, shape: type.shape as readonly number[], data: new Float64Array(0) };
      return [{ ...v, datum }];
    });
    const operands = [...body.inputs.map((v, i) => ({ ...v, datum: inputs[i] as Datum })), ...results];
    const symbols = new Map(bindSymbols(operands));
    // of a body, sums of symbols may be all that is known
    for (const { type, datum } of operands)
      if (type.kind === "tensor" && datum.kind === "tensor")
        for (const [i, d] of type.shape.entries()) if (typeof d === "string") symbols.set(d, datum.shape[i] as number);
    interpret(body.ops, values, symbols, knowledge);
    return body.outputs.map((v) => values.get(v.name) as Datum);
  },
  cost(inputs, _, symbols, given) {
    const body = bodyOf(given);
    const sum = (types: readonly Type[]): number => types.reduce((n, t) => n + bytesOf(t, symbols), 0);
    let [flops, states] = [0, 0];
    const read = new Map<string, number>(); // of tables: bytes of the rows in use
    for (const op of body.ops) {
      const types = op.inputs.map((v) => v.type);
      const own = knowledge(op.kind).cost(types, op.attrs, symbols, op.body);
      flops += own.flops;
      const more = own.bytes - sum([...types, ...op.outputs.map((v) => v.type)]);
      if (more > 0) states += more;
      const [table] = op.inputs.toSorted((x, y) => bytesOf(y.type, symbols) - bytesOf(x.type, symbols));
      if (more < 0 && table) read.set(table.name, (read.get(table.name) ?? 0) + bytesOf(table.type, symbols) + more);
    }
    const operands = inputs.map((type, i) => {
      const bytes = bytesOf(type, symbols);
      return Math.min(bytes, read.get(body.inputs[i]?.name ?? "") ?? bytes);
    });
    return { flops, bytes: operands.reduce((n, b) => n + b, 0) + sum(body.outputs.map((v) => v.type)) + states };
  },
  // made when asked for: the registry is not complete before this object is in it
  get samples() {
    return samplesWith(knowledge);
  },
});
