import { bindSymbols, cost } from "../bind.ts";
import * as expect from "../expect.ts";
import type { Graph } from "../graph.ts";
import { interpret } from "../interpret.ts";
import type { Datum, Knowledge } from "../op.ts";
import { sameType, typeText } from "../type.ts";

const bodyOf = (body: Graph | undefined): Graph => body ?? expect.fail("needs a body");

/** Several ops as one kernel, every rounding kept. Its meaning is its body's, so it is made with the registry it looks ops up in. */
export const fusedWith = (knowledge: (kind: string) => Knowledge): Knowledge => ({
  name: "fused",
  summary:
    "inputs... -> the outputs of its body: a row kernel of elementwise, reduce and spread ops, or one contraction and its epilogue",
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
    const symbols = bindSymbols([
      ...body.inputs.map((v, i) => ({ ...v, datum: inputs[i] as Datum })),
      ...body.outputs.flatMap((v, i) => {
        const type = outputs[i];
        if (type?.kind !== "tensor") return [];
        return [
          {
            ...v,
            datum: {
              kind: "tensor",
              dtype: type.dtype,
              shape: type.shape as readonly number[],
              data: new Float64Array(0),
            } as Datum,
          },
        ];
      }),
    ]);
    interpret(body.ops, values, symbols, knowledge);
    return body.outputs.map((v) => values.get(v.name) as Datum);
  },
  cost(inputs, _, symbols, given) {
    const body = bodyOf(given);
    const flops = body.ops.reduce(
      (n, op) =>
        n +
        knowledge(op.kind).cost(
          op.inputs.map((v) => v.type),
          op.attrs,
          symbols,
          op.body,
        ).flops,
      0,
    );
    return cost(flops, [...inputs, ...body.outputs.map((v) => v.type)], symbols);
  },
  samples: [],
});
