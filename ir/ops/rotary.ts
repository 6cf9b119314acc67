import { type ConcreteTensor, cost, elements, tensorOf } from "../bind.ts";
import { UserError } from "../error.ts";
import * as expect from "../expect.ts";
import type { Knowledge, Sample } from "../op.ts";
import { rounder } from "../round.ts";
import type { Tensor } from "../tensor.ts";
import { type DType, isFloat, type TensorType, tensor } from "../type.ts";

const infer: Knowledge["infer"] = (inputs, attrs) => {
  expect.count(inputs, ["x", "table", "position"]);
  const x = expect.tensorAt(inputs, 0, "x");
  const table = expect.tensorAt(inputs, 1, "table");
  const position = expect.tensorAt(inputs, 2, "position");
  const heads = expect.int(attrs, "heads", 1);
  const dim = expect.int(attrs, "dim", 2);
  if (dim % 2 !== 0) expect.fail(`dim must be even, got ${dim}`);
  expect.rank(x, 2, "x");
  if (!isFloat(x.dtype)) expect.fail(`x must be a float, got ${x.dtype}`);
  expect.sameDim(expect.dimAt(x, 1), heads * dim, `columns of x and ${heads} heads of ${dim}`);
  expect.rank(table, 2, "table");
  expect.dtype(table, ["f32"], "table");
  expect.sameDim(expect.dimAt(table, 1), dim, "columns of table and dim");
  expect.rank(position, 1, "position");
  expect.dtype(position, ["i32"], "position");
  expect.sameDim(expect.dimAt(position, 0), expect.dimAt(x, 0), "rows of position and x");
  return [x];
};

const sample = (name: string, heads: number, dim: number, dtype: DType): Sample => ({
  name,
  inputs: [tensor(dtype, ["T", heads * dim]), tensor("f32", [32, dim]), tensor("i32", ["T"])],
  attrs: { heads, dim },
  values: ["normal", "normal", { below: 32 }],
  symbols: { T: 5 },
});

export const rotary: Knowledge = {
  name: "rotary",
  summary:
    "x[T, heads*dim], table f32[C, dim], position i32[T] -> x turned: per head (a, b) -> (a cos - b sin, b cos + a sin), " +
    "a the first and b the second half, cos in the table's columns 0..dim/2-1, sin in the others",
  attrs: { heads: "heads in a row of x", dim: "elements of a head; even" },
  inputs: ["x", "table", "position"],
  rowwise: "row",
  infer,
  evaluate(inputs, attrs, [out]) {
    const [x, table, position] = inputs as readonly [Tensor, Tensor, Tensor];
    const type = out as ConcreteTensor;
    const heads = expect.int(attrs, "heads", 1);
    const dim = expect.int(attrs, "dim", 2);
    const half = dim / 2;
    const round = rounder(type.dtype);
    const result = new Float64Array(x.data.length);
    position.data.forEach((p, t) => {
      if (p < 0 || p >= (table.shape[0] as number))
        throw new UserError(`rotary: position ${p} of row ${t} is outside a table of ${table.shape[0]} positions`);
      for (let h = 0; h < heads; h++)
        for (let i = 0; i < half; i++) {
          const at = (t * heads + h) * dim + i;
          const [a, b] = [x.data[at] as number, x.data[at + half] as number];
          const cos = table.data[p * dim + i] as number;
          const sin = table.data[p * dim + half + i] as number;
          result[at] = round(a * cos - b * sin);
          result[at + half] = round(b * cos + a * sin);
        }
    });
    return [tensorOf(type, result)];
  },
  cost(inputs, _, symbols) {
    const [x, table, position] = inputs as readonly [TensorType, TensorType, TensorType];
    // of the table, the rows in use
    const used = tensor("f32", [expect.dimAt(position, 0), expect.dimAt(table, 1)]);
    return cost(3 * elements(x, symbols), [x, x, used, position], symbols);
  },
  samples: [
    sample("one head", 1, 64, "bf16"),
    sample("many heads", 8, 32, "bf16"),
    sample("ragged", 3, 22, "f32"),
    sample("two elements a head", 2, 2, "f32"),
  ],
};
