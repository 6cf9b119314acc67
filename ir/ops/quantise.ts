import { type ConcreteTensor, cost, elements, tensorOf } from "../bind.ts";
import * as expect from "../expect.ts";
import type { Value } from "../graph.ts";
import type { Knowledge, Sample } from "../op.ts";
import { rounder } from "../round.ts";
import type { Tensor } from "../tensor.ts";
import { type DType, isFloat, type TensorType, tensor } from "../type.ts";

const codeTypes = ["e4m3", "i8"] as const;
/** The magnitude that the largest element of a group is scaled to. */
const largest = { e4m3: 448, i8: 127 } as const;

const groupOf = (columns: number, attrs: Parameters<Knowledge["infer"]>[1]): number =>
  expect.int(attrs, "group", 0, 0) || columns;

const infer: Knowledge["infer"] = (inputs, attrs) => {
  expect.count(inputs, ["x"]);
  const x = expect.tensorAt(inputs, 0, "x");
  if (!isFloat(x.dtype)) expect.fail(`x must be a float, got ${x.dtype}`);
  const n = expect.constantDim(x, -1, "x");
  if (n === 0) expect.fail("cannot quantise an axis of no elements");
  const to = expect.word(attrs, "to", codeTypes);
  return [tensor(to, x.shape), tensor("f32", [...x.shape.slice(0, -1), Math.ceil(n / groupOf(n, attrs))])];
};

const sample = (name: string, columns: number, to: string, group: number, dtype: DType = "bf16"): Sample => ({
  name,
  inputs: [tensor(dtype, ["T", columns])],
  attrs: { to, ...(group === 0 ? {} : { group }) },
  symbols: { T: 4 },
});

export const quantise: Knowledge = {
  name: "quantise",
  summary:
    "x[..., N] -> codes [..., N], scales f32[..., ceil(N/group)]: scale = amax / 448 (e4m3) or / 127 (i8), 1 where that is 0",
  attrs: { to: "`e4m3` or `i8`", group: "columns that share a scale; 0, the default, is the whole row" },
  inputs: ["x"],
  rowwise: "row",
  infer,
  evaluate([input], attrs, outputs) {
    const x = input as Tensor;
    const [codesType, scalesType] = outputs as readonly [ConcreteTensor, ConcreteTensor];
    const to = expect.word(attrs, "to", codeTypes);
    const n = codesType.shape.at(-1) as number;
    const group = groupOf(n, attrs);
    const groups = scalesType.shape.at(-1) as number;
    const round = rounder(to);
    const f32 = Math.fround;
    const codes = new Float64Array(x.data.length);
    const scales = new Float64Array((x.data.length / n) * groups);
    for (let i = 0; i < scales.length; i++) {
      const row = Math.floor(i / groups) * n;
      const from = row + (i % groups) * group;
      const end = Math.min(row + n, from + group);
      let amax = 0;
      for (let c = from; c < end; c++) amax = Math.max(amax, Math.abs(f32(x.data[c] as number)));
      const scale = f32(amax / largest[to]);
      scales[i] = scale === 0 ? 1 : scale;
      for (let c = from; c < end; c++) codes[c] = round(f32(f32(x.data[c] as number) / (scales[i] as number)));
    }
    return [tensorOf(codesType, codes), tensorOf(scalesType, scales)];
  },
  cost: (inputs, attrs, symbols) =>
    cost(4 * elements(inputs[0] as TensorType, symbols), [...inputs, ...infer(inputs, attrs)], symbols),
  expand(b, op) {
    const x = op.inputs[0] as Value;
    const type = x.type as TensorType;
    const to = expect.word(op.attrs, "to", codeTypes);
    const n = expect.constantDim(type, -1, "x");
    const group = groupOf(n, op.attrs);
    const number = (value: number): Value => b.op("const", [], { value, dtype: "f32" });
    const wide = type.dtype === "f32" ? x : b.op("cast", [x], { to: "f32" });
    const raw = b.op("div", [b.op("reduce", [wide], { fn: "amax", group }), number(largest[to])]);
    const scales = b.op("where", [b.op("equal", [raw, number(0)]), number(1), raw]);
    const scaled = b.op("div", [wide, b.op("spread", [scales], { group, size: n })]);
    return [b.op("cast", [scaled], { to }), scales];
  },
  samples: [
    sample("fp8 activations", 256, "e4m3", 128),
    sample("fp8, a short last group", 300, "e4m3", 128),
    sample("fp8, fewer columns than a group", 40, "e4m3", 128),
    sample("int8 rows", 256, "i8", 0),
    sample("int8 rows, ragged", 77, "i8", 0, "f32"),
    sample("kv heads", 96, "e4m3", 32),
    sample("int8 kv heads", 96, "i8", 32),
  ],
};
