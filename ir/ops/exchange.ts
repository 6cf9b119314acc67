/** What crosses between the two sides: both ops run on the attention side and change nothing. */
import { cost } from "../bind.ts";
import * as expect from "../expect.ts";
import type { Knowledge, Sample } from "../op.ts";
import type { Tensor } from "../tensor.ts";
import { type Type, tensor } from "../type.ts";

const exchange = "its number in the graph: 0, 1 ... in program order, the same for the dispatch and the collect that answers it";

const tensors = (inputs: readonly Type[], what: string): readonly Type[] => {
  if (inputs.length === 0) expect.fail(`takes at least one ${what}`);
  return inputs.map((_, i) => expect.tensorAt(inputs, i, `${what} ${i}`));
};

const inferDispatch: Knowledge["infer"] = (inputs, attrs) => {
  expect.int(attrs, "exchange", 0);
  const values = tensors(inputs, "value");
  return Array.from({ length: expect.int(attrs, "ranks", 1, 1) }, () => values).flat();
};

const moe = [tensor("e4m3", ["T", 40]), tensor("f32", ["T", 1]), tensor("i32", ["T", 3]), tensor("f32", ["T", 3])];
const values: Sample["values"] = ["normal", "positive", { below: 8 }, "unit"];

export const dispatch: Knowledge = {
  name: "dispatch",
  summary: "values... -> the same values on each FFN rank, rank by rank: attention to FFN",
  attrs: {
    exchange,
    ranks: "FFN ranks; 1, the default, before the graph is sharded",
    experts: "among how many experts of all ranks integers choose, where ranks have experts of their own",
  },
  inputs: ["values..."],
  rowwise: "row",
  infer: inferDispatch,
  evaluate: (inputs, attrs) => Array.from({ length: expect.int(attrs, "ranks", 1, 1) }, () => inputs).flat(),
  cost: (inputs, attrs, symbols) => cost(0, [...inputs, ...inferDispatch(inputs, attrs)], symbols),
  samples: [
    { name: "one rank", inputs: [tensor("bf16", ["T", 40])], attrs: { exchange: 0 }, symbols: { T: 4 } },
    { name: "three ranks", inputs: moe, attrs: { exchange: 1, ranks: 3 }, values, symbols: { T: 4 } },
  ],
};

const inferCollect: Knowledge["infer"] = (inputs, attrs) => {
  expect.int(attrs, "exchange", 0);
  return tensors(inputs, "partial");
};

export const collect: Knowledge = {
  name: "collect",
  summary: "partials..., one of each FFN rank -> the same, on the attention side: FFN to attention",
  attrs: { exchange },
  inputs: ["partials..."],
  rowwise: "row",
  infer: inferCollect,
  evaluate: (inputs) => inputs as readonly Tensor[],
  cost: (inputs, attrs, symbols) => cost(0, [...inputs, ...inferCollect(inputs, attrs)], symbols),
  samples: [
    { name: "one rank", inputs: [tensor("bf16", ["T", 40])], attrs: { exchange: 0 }, symbols: { T: 4 } },
    {
      name: "two ranks",
      inputs: [tensor("bf16", ["T", 40]), tensor("bf16", ["T", 40])],
      attrs: { exchange: 3 },
      symbols: { T: 4 },
    },
  ],
};
