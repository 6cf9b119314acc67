import { type ConcreteTensor, cost, elements, tensorOf } from "../bind.ts";
import type { Dim } from "../dim.ts";
import * as expect from "../expect.ts";
import type { Knowledge, Sample } from "../op.ts";
import type { Tensor } from "../tensor.ts";
import { type DType, type TensorType, tensor } from "../type.ts";
import { descending } from "./topk.ts";

const infer: Knowledge["infer"] = (inputs, attrs) => {
  expect.count(inputs, ["x"]);
  const x = expect.tensorAt(inputs, 0, "x");
  if (x.dtype === "bool") expect.fail("x must be a number, got bool");
  expect.flag(attrs, "descending", false);
  const n = x.shape.at(-1) ?? expect.fail("x must have an axis");
  const count =
    attrs.count === undefined ? n : (expect.dims(attrs, "count")[0] ?? expect.fail("attribute 'count' must be one dim"));
  if (typeof n === "number" && typeof count === "number" && count > n) expect.fail(`${count} of ${n} elements`);
  const shape: readonly Dim[] = [...x.shape.slice(0, -1), count];
  return [tensor(x.dtype, shape), tensor("i32", shape)];
};

const sample = (name: string, dtype: DType, attrs: Sample["attrs"], columns: number = 12, below?: number): Sample => ({
  name,
  inputs: [tensor(dtype, ["T", columns])],
  attrs,
  ...(below === undefined ? {} : { values: [{ below }] }),
  symbols: { T: 3 },
});

export const sort: Knowledge = {
  name: "sort",
  summary: "[..., N] -> values [..., count], places i32[..., count]: the last axis in order; equal ones by place, NaN last",
  attrs: { descending: "true: the largest first", count: "how many of the first are given; all unless given" },
  inputs: ["x"],
  rowwise: "row",
  infer,
  evaluate([input], attrs, outputs) {
    const x = input as Tensor;
    const [type, placeType] = outputs as readonly [ConcreteTensor, ConcreteTensor];
    const n = x.shape.at(-1) as number;
    const count = type.shape.at(-1) as number;
    const down = expect.flag(attrs, "descending", false);
    const rows = n === 0 ? 0 : x.data.length / n;
    const values = new Float64Array(rows * count);
    const places = new Float64Array(rows * count);
    for (let r = 0; r < rows; r++) {
      const row = x.data.subarray(r * n, (r + 1) * n);
      const order = descending(down ? row : row.map((v) => -v)).slice(0, count);
      order.forEach((place, i) => {
        values[r * count + i] = row[place] as number;
        places[r * count + i] = place;
      });
    }
    return [tensorOf(type, values), tensorOf(placeType, places)];
  },
  cost(inputs, attrs, symbols) {
    const n = elements(inputs[0] as TensorType, symbols);
    return cost(n * Math.ceil(Math.log2(n + 1)), [...inputs, ...infer(inputs, attrs)], symbols);
  },
  samples: [
    sample("ascending", "f32", {}),
    sample("descending", "f32", { descending: true }),
    sample("ties", "i64", { descending: true }, 20, 4),
    sample("the least five, bf16", "bf16", { count: [5] }, 33),
    sample("one column", "i32", {}, 1),
  ],
};
