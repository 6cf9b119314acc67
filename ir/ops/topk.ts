import { type ConcreteTensor, cost, elements, tensorOf } from "../bind.ts";
import * as expect from "../expect.ts";
import type { Knowledge, Sample } from "../op.ts";
import type { Tensor } from "../tensor.ts";
import { type TensorType, tensor } from "../type.ts";

const infer: Knowledge["infer"] = (inputs, attrs) => {
  expect.count(inputs, ["p"]);
  const p = expect.tensorAt(inputs, 0, "p");
  expect.rank(p, 2, "p");
  expect.dtype(p, ["f32"], "p");
  const k = expect.int(attrs, "k", 1);
  if (k > expect.constantDim(p, 1, "p")) expect.fail(`k is ${k}, p has ${p.shape[1]} columns`);
  const shape = [expect.dimAt(p, 0), k];
  return [tensor("f32", shape), tensor("i32", shape)];
};

/** Indices of a row from the largest value down; equal values by index, NaN last. */
export const descending = (row: Float64Array): number[] =>
  Array.from(row.keys()).sort((a, b) => {
    const [x, y] = [row[a] as number, row[b] as number];
    if (Number.isNaN(x) || Number.isNaN(y)) return Number(Number.isNaN(x)) - Number(Number.isNaN(y)) || a - b;
    return x === y ? a - b : x > y ? -1 : 1;
  });

const sample = (name: string, columns: number, k: number, ties = false): Sample => ({
  name,
  inputs: [tensor("f32", ["T", columns])],
  attrs: { k },
  values: [ties ? { below: 3 } : "unit"],
  symbols: { T: 6 },
});

export const topk: Knowledge = {
  name: "topk",
  summary:
    "p f32[T, E] -> values f32[T, k], ids i32[T, k]: the k largest of each row, descending, ties to the lower index, NaN last",
  attrs: { k: "how many" },
  inputs: ["p"],
  rowwise: "row",
  infer,
  evaluate([input], _, outputs) {
    const p = input as Tensor;
    const [valuesType, idsType] = outputs as readonly [ConcreteTensor, ConcreteTensor];
    const [rows, k] = valuesType.shape as readonly [number, number];
    const columns = p.shape[1] as number;
    const values = new Float64Array(rows * k);
    const ids = new Float64Array(rows * k);
    for (let r = 0; r < rows; r++) {
      const row = p.data.subarray(r * columns, (r + 1) * columns);
      descending(row)
        .slice(0, k)
        .forEach((id, j) => {
          values[r * k + j] = row[id] as number;
          ids[r * k + j] = id;
        });
    }
    return [tensorOf(valuesType, values), tensorOf(idsType, ids)];
  },
  cost: (inputs, attrs, symbols) =>
    cost(expect.int(attrs, "k", 1) * elements(inputs[0] as TensorType, symbols), [...inputs, ...infer(inputs, attrs)], symbols),
  samples: [
    sample("router", 48, 3),
    sample("ties", 16, 3, true),
    sample("all", 5, 5),
    sample("the best", 131, 1),
    sample("one column", 1, 1),
  ],
};
