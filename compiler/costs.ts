/** What a launch of each kernel has to do, as functions of the rows it gets, other sizes at their maxima: `costs.json` of a bundle, from what is known of the ops. */
import { bytesOf } from "../ir/bind.ts";
import { type Dim, mulDim, tokenSymbol } from "../ir/dim.ts";
import type { Graph, Op, Value } from "../ir/graph.ts";
import { expertBytes } from "../ir/ops/grouped.ts";
import { knowledge } from "../ir/ops/index.ts";
import type { TensorType } from "../ir/type.ts";
import { type Emission, type Role, roleOf } from "./emit.ts";

/** By role, then by kernel. */
export type Costs = { readonly format: 1 } & Readonly<Record<Role, Readonly<Record<string, KernelCost>>>>;

export interface KernelCost {
  /** the op and its shapes */
  readonly about: string;
  /** what its products are made with: a narrower type has the higher peak */
  readonly unit: "f32" | "bf16" | "fp8" | "int8";
  readonly flops: Work;
  /** each operand once, each result once, weights once a launch */
  readonly bytes: Work;
  /** of weights that rows choose among: the launch argument i32[rows, n] with the choices, and which numbers are this rank's */
  readonly experts?: { readonly argument: number; readonly first: number; readonly count: number };
}

/** base + row * rows + rowContext * context + expert * experts + pair * pairs. */
export interface Work {
  readonly base: number;
  readonly row: number;
  /** each cached token: for flops of each row, for bytes of each sequence, whose rows read them together */
  readonly rowContext: number;
  /** each expert that some row chose */
  readonly expert: number;
  /** each choice of an expert that is this rank's */
  readonly pair: number;
}

/** Costs of the kernels of a graph. Kernels are one when their text is, so the first op of each speaks for the others. */
export const costsOf = (emission: Emission): Costs => {
  const costs: Record<Role, Record<string, KernelCost>> = { attention: {}, ffn: {} };
  for (const op of emission.graph.ops) {
    if (!emission.has(op)) continue;
    const kernel = emission.kernelOf(op);
    costs[roleOf(op.place)][kernel.name] ??= { about: kernel.about, ...costOf(op, emission.graph) };
  }
  return { format: 1, ...costs };
};

/** An op, or one of its body, and its inputs as those of the op. */
interface Part {
  readonly op: Op;
  index(input: string): number;
}

const partsOf = (op: Op, wanted: (op: Op) => boolean): readonly Part[] => {
  const parts = wanted(op) ? [op] : (op.body?.ops.filter(wanted) ?? []);
  return parts.map((part) => {
    const inputs = part === op ? op.inputs : (op.body as Graph).inputs;
    return {
      op: part,
      index: (input) => {
        const value = part.inputs[knowledge(part.kind).inputs.indexOf(input)];
        return inputs.findIndex((v) => v.name === value?.name);
      },
    };
  });
};

/** The contractions, or attention, that an op is or holds. */
const productsOf = (op: Op): readonly Part[] => partsOf(op, ({ kind }) => kind.endsWith("linear") || kind === "attention");

const unitOf = (product: Part | undefined, op: Op): KernelCost["unit"] => {
  if (product === undefined) return "f32";
  const { dtype } = (op.inputs[product.index(product.op.kind === "attention" ? "state" : "w")] as Value).type;
  if (dtype === "f32" || dtype === "f64") return "f32";
  if (product.op.kind === "attention" || dtype === "bf16" || dtype === "f16") return "bf16"; // its rows stay bf16 whatever the cache is
  return dtype === "i8" ? "int8" : "fp8";
};

/** Bytes of one pair's row, of all values that have a row for each of `ids`. */
const bytesOfPair = (values: readonly Value[], ids: TensorType): number => {
  const [tokens, choices] = ids.shape as readonly [Dim, number];
  return values.reduce((sum, { type }) => {
    const isOfPairs = type.kind === "tensor" && choices > 1 && type.shape[0] === mulDim(tokens, choices);
    return isOfPairs ? sum + bytesOf(type, new Map([[tokenSymbol, 1]])) / choices : sum;
  }, 0);
};

const costOf = (op: Op, graph: Graph): Omit<KernelCost, "about"> => {
  const types = op.inputs.map((v) => v.type);
  const at = (rows: number, context: number): { flops: number; bytes: number } => {
    const symbols = new Map(graph.symbols.map((s) => [s.name, s.name === tokenSymbol ? rows : s.max]));
    return knowledge(op.kind).cost(types, op.attrs, symbols.set("context", context), op.body);
  };
  const [none, row, token] = [at(0, 0), at(1, 0), at(1, 1)];
  const work = (of: "flops" | "bytes"): Work => ({
    base: none[of],
    row: row[of] - none[of],
    rowContext: token[of] - row[of],
    expert: 0,
    pair: 0,
  });
  const [flops, bytes] = [work("flops"), work("bytes")];
  const products = productsOf(op);
  const [product] = products;
  const unit = unitOf(product, op);
  const [combine] = partsOf(op, ({ kind }) => kind === "combine");
  const choosing = products.filter((one) => one.op.kind.endsWith("grouped_linear"));
  const [chooses] = choosing;
  if (chooses !== undefined) {
    // weights are read of the experts that were chosen, and products made of the choices that are this rank's
    const typeOf = (name: string): TensorType => types[chooses.index(name)] as TensorType;
    const [w, ids] = [typeOf("w"), typeOf("ids")];
    const [count] = w.shape as readonly [number, number, number];
    let [expert, pair] = [0, 0];
    for (const one of choosing) {
      const [, columns, inner] = (types[one.index("w")] as TensorType).shape as readonly [number, number, number];
      pair += 2 * columns * inner;
      for (const at of [one.index("w"), one.index("ws")])
        if (at >= 0) expert += expertBytes(types[at] as TensorType, 1, new Map());
    }
    const choices = ids.shape[1] as number;
    const pairBytes = chooses.op.attrs.owned === true ? bytesOfPair([...op.inputs, ...op.outputs], ids) : 0;
    return {
      unit,
      flops: { ...flops, row: flops.row - pair * choices, pair },
      bytes: { ...bytes, base: bytes.base - expert * count, row: bytes.row - pairBytes * choices, expert, pair: pairBytes },
      experts: { argument: chooses.index("ids"), first: (chooses.op.attrs.first as number | undefined) ?? 0, count },
    };
  }
  if (combine !== undefined && typeof combine.op.attrs.count === "number") {
    const ids = types[combine.index("ids")] as TensorType;
    const pairBytes = bytesOfPair([op.inputs[combine.index("y")] as Value], ids);
    return {
      unit,
      flops,
      bytes: { ...bytes, row: bytes.row - pairBytes * (ids.shape[1] as number), pair: pairBytes },
      experts: {
        argument: combine.index("ids"),
        first: (combine.op.attrs.first as number | undefined) ?? 0,
        count: combine.op.attrs.count,
      },
    };
  }
  return { unit, flops, bytes };
};
