/** Normalisations in pieces: RMSNorm and LayerNorm over the last axis, in whatever float, with the weight on either side. */
import type { Builder } from "../../../ir/build.ts";
import { product } from "../../../ir/dim.ts";
import type { Op, Value } from "../../../ir/graph.ts";
import type { DType } from "../../../ir/type.ts";
import { cast, type Look, miss, near, type Pattern, pattern, reshaped, shapeOf, typeOf } from "./look.ts";

interface Norm {
  readonly x: Value;
  readonly eps: number;
}

/** A vector along the last axis of `like`. */
const vector = (v: Value, like: Value, what: string): Value => {
  const columns = shapeOf(like).at(-1);
  const fits = shapeOf(v).length <= shapeOf(like).length && shapeOf(v).at(-1) === columns && product(shapeOf(v)) === columns;
  return fits ? v : miss(`the ${what} '${v.name}' is no vector along the last axis`);
};

/** x / sqrt(mean x^2 + eps) */
const normal = (g: Look, v: Value): Norm => {
  const { x, s } = g.overRoot(v);
  return near(() => {
    const { x: mean, number: eps } = g.plusNumber(s, "what the root is of");
    const squared = g.square(g.mean(mean));
    if (!g.same(squared, x)) miss(`the squares are of '${squared.name}', and '${x.name}' is divided`);
    if (typeof shapeOf(x).at(-1) !== "number") miss("the last axis has no fixed size");
    return { x, eps };
  });
};

/** (x - mean x) / sqrt(mean (x - mean x)^2 + eps) */
const centredNormal = (g: Look, v: Value): Norm => {
  const { x: centred, eps } = normal(g, v);
  return near(() => {
    const op = g.made(centred, "sub", "what is divided");
    const [x, mean] = op.inputs as readonly [Value, Value];
    const of = g.mean(mean);
    if (!g.same(of, x)) miss(`the mean is of '${of.name}', and is taken from '${x.name}'`);
    return { x: g.operand(x), eps };
  });
};

interface Scaled {
  readonly eps: number;
  readonly dtype: DType;
  /** x and the vectors */
  readonly operands: readonly Value[];
}
const weighted = (g: Look, op: Op, of: (v: Value) => Norm): Norm & { readonly w: Value } =>
  g.both(op, (a, b) => {
    const found = of(a);
    return near(() => ({ ...found, w: vector(b, found.x, "weight") }));
  });

const built =
  (kind: string) =>
  (b: Builder, { eps, dtype, operands: [x, ...vectors] }: Scaled, op: Op): Value => {
    const columns = shapeOf(x as Value).at(-1) as number;
    const given = [x as Value, ...vectors.map((v) => reshaped(b, v, [columns]))].map((v) => cast(b, v, dtype));
    return cast(b, b.op(kind, given, { eps }), typeOf(op.outputs[0] as Value).dtype);
  };

export const rmsNorm: Pattern = pattern<Scaled>({
  name: "rms_norm",
  roots: ["mul"],
  match(op, g) {
    const { x, eps, w } = weighted(g, op, (v) => normal(g, v));
    g.sized(op, x);
    return { eps, ...g.narrowed(op, [x, w]) };
  },
  build: built("rms_norm"),
});

export const layerNorm: Pattern = pattern<Scaled>({
  name: "layer_norm",
  roots: ["add"],
  match: (op, g) =>
    g.both(op, (a, b) => {
      const { x, eps, w } = weighted(g, g.made(a, "mul"), (v) => centredNormal(g, v));
      return near(() => {
        const bias = vector(b, x, "bias");
        g.sized(op, x);
        return { eps, ...g.narrowed(op, [x, w, bias]) };
      });
    }),
  build: built("layer_norm"),
});
