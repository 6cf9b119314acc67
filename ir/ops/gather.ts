import { bytesOf, type ConcreteTensor, tensorOf } from "../bind.ts";
import { UserError } from "../error.ts";
import * as expect from "../expect.ts";
import type { Knowledge, Sample } from "../op.ts";
import type { Tensor } from "../tensor.ts";
import { type DType, tensor } from "../type.ts";

const infer: Knowledge["infer"] = (inputs) => {
  expect.count(inputs, ["table", "index"]);
  const table = expect.tensorAt(inputs, 0, "table");
  const index = expect.tensorAt(inputs, 1, "index");
  expect.rank(table, 2, "table");
  expect.dtype(index, ["i32"], "index");
  expect.rank(index, 1, "index");
  return [tensor(table.dtype, [expect.dimAt(index, 0), expect.dimAt(table, 1)])];
};

const sample = (name: string, rows: number, columns: number, dtype: DType): Sample => ({
  name,
  inputs: [tensor(dtype, [rows, columns]), tensor("i32", ["T"])],
  attrs: {},
  values: ["normal", { below: rows }],
  symbols: { T: 5 },
});

export const gather: Knowledge = {
  name: "gather",
  summary: "table[V, H], index i32[T] -> [T, H]: row index[t] of the table",
  attrs: {},
  inputs: ["table", "index"],
  rowwise: "row",
  infer,
  evaluate(inputs, _, [out]) {
    const [table, index] = inputs as readonly [Tensor, Tensor];
    const type = out as ConcreteTensor;
    const [rows, columns] = table.shape as readonly [number, number];
    const result = new Float64Array(index.data.length * columns);
    index.data.forEach((row, t) => {
      if (row < 0 || row >= rows) throw new UserError(`gather: index ${row} of row ${t} is outside a table of ${rows} rows`);
      result.set(table.data.subarray(row * columns, (row + 1) * columns), t * columns);
    });
    return [tensorOf(type, result)];
  },
  cost(inputs, attrs, symbols) {
    const [out] = infer(inputs, attrs);
    // the rows taken, not the table
    return { flops: 0, bytes: 2 * bytesOf(out as ConcreteTensor, symbols) + bytesOf(inputs[1] as ConcreteTensor, symbols) };
  },
  samples: [
    sample("bf16", 32, 16, "bf16"),
    sample("ragged", 7, 131, "f32"),
    sample("codes", 9, 8, "e4m3"),
    sample("one row", 1, 4, "f32"),
  ],
};
