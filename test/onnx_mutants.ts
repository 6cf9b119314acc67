/** Models of few nodes made wrong: what exporters never write, and what a damaged or hostile file may say. */
import type { DType, Tensor } from "../ir/index.ts";
import { randomNumbers, rounder } from "../ir/index.ts";
import type { Attribute, MadeModel, MadeNode } from "./onnx_maker.ts";

const extremes = [0, -1, 1, 2, 3, 17, -7, 2 ** 31 - 1, -(2 ** 31), 2 ** 40, 2 ** 53 - 1, -(2 ** 53 - 1)];
const dtypes: readonly DType[] = ["f32", "f64", "f16", "i64", "i32", "u8", "bool", "bf16", "e4m3", "u64"];

/** The model with one thing about it changed. */
export const mutant = (m: MadeModel, seed: number): MadeModel => {
  const random = randomNumbers(seed);
  const below = (n: number): number => Math.floor(random() * n);
  const pick = <T>(xs: readonly T[]): T => xs[below(xs.length)] as T;
  const tensor = (dtype: DType, shape: readonly number[]): Tensor => ({
    kind: "tensor",
    dtype,
    shape,
    data: Float64Array.from({ length: shape.reduce((a, b) => a * b, 1) }, () => rounder(dtype)(pick(extremes))),
  });
  const attribute = (): Attribute =>
    pick<() => Attribute>([
      () => ({ i: pick(extremes) }),
      () => ({ f: pick([0, -1, Number.NaN, Infinity, 1e38]) }),
      () => ({ s: pick(["", "LEFT", "reflect", "ij,jk->ik", "...", "\u0000", "add"]) }),
      () => ({ ints: Array.from({ length: below(4) }, () => pick(extremes)) }),
      () => ({ floats: [pick(extremes)] }),
      () => ({ t: tensor(pick(dtypes), pick([[], [1], [0], [3], [2, 2]])) }),
      () => ({ g: { inputs: [], nodes: [], outputs: [] } }),
    ])();
  const changed = (n: MadeNode): MadeNode => {
    const names = Object.keys(n.attributes);
    const known = [...m.inputs, ...m.constants].map((v) => v.name);
    const inputs = [...n.inputs];
    switch (below(7)) {
      case 0:
        return { ...n, attributes: Object.fromEntries(Object.entries(n.attributes).filter(([k]) => k !== pick(names))) };
      case 1:
        return names.length === 0
          ? { ...n, attributes: { [pick(["axis", "axes", "keepdims", "to", "perm", "mode", "k", "shape"])]: attribute() } }
          : { ...n, attributes: { ...n.attributes, [pick(names)]: attribute() } };
      case 2:
        inputs.splice(below(inputs.length), 1);
        return { ...n, inputs };
      case 3:
        inputs[below(inputs.length)] = "";
        return { ...n, inputs };
      case 4:
        if (known.length > 0) inputs[below(inputs.length)] = pick(known);
        return { ...n, inputs };
      case 5:
        if (known.length > 0) inputs.push(pick(known), pick(known));
        return { ...n, inputs };
      default:
        return { ...n, op: pick(m.nodes).op };
    }
  };
  const other = (t: Tensor): Tensor =>
    pick<() => Tensor>([
      () => ({ ...t, data: t.data.map(() => rounder(t.dtype)(pick(extremes))) }),
      () => ({ ...t, data: t.data.map((x, i) => (i === 0 ? rounder(t.dtype)(pick(extremes)) : x)) }),
      () => tensor(t.dtype, pick([[], [1], [0], [2, 3], [1, 1, 1, 1, 1, 1, 1], [4]])),
      () => tensor(pick(dtypes), t.shape),
    ])();
  const kind = below(10);
  if (kind < 6 || m.constants.length + m.inputs.length === 0) {
    const at = below(m.nodes.length);
    return { ...m, nodes: m.nodes.with(at, changed(m.nodes[at] as MadeNode)) };
  }
  if (kind < 9 && m.constants.length > 0) {
    const at = below(m.constants.length);
    return { ...m, constants: m.constants.map((c, i) => (i === at ? { ...c, tensor: other(c.tensor) } : c)) };
  }
  if (kind < 9) {
    const at = below(m.inputs.length);
    return {
      ...m,
      inputs: m.inputs.map((v, i) => {
        const t = i === at ? other(v.tensor) : v.tensor;
        return { name: v.name, tensor: t, dims: t.shape };
      }),
    };
  }
  return { ...m, opset: 1 + below(28) };
};
