/**
 * Rotary position embedding in pieces: x cos + (-b, a) sin, x's last axis being (a, b). The turns may come of anything: tables taken by
 * positions, or cosines of positions times frequencies.
 */
import type { Op, Value } from "../../../ir/graph.ts";
import type { DType } from "../../../ir/type.ts";
import { cast, type Look, miss, near, type Pattern, pattern, shapeOf, typeOf } from "./look.ts";

/** x of a half of x's last axis */
const halfOf = (g: Look, v: Value, which: "first" | "second"): Value => {
  const op = g.made(v, "slice", `the ${which} part`);
  const [x] = op.inputs as readonly [Value];
  const { axis, start, step = 1 } = op.attrs as { readonly axis: number; readonly start: number; readonly step?: number };
  const [columns, part] = [shapeOf(x).at(-1), shapeOf(op.outputs[0] as Value).at(-1)];
  if (step !== 1) miss(`the ${which} part is every element by ${step}, not a half: neighbours are turned, not halves`);
  if (axis !== shapeOf(x).length - 1) miss(`the ${which} part is of axis ${axis}, not the last`);
  if (typeof columns !== "number" || part !== columns / 2) return miss(`the ${which} part is ${part} of ${columns} elements`);
  const from = start < 0 ? start + columns : start;
  if (from !== (which === "first" ? 0 : columns / 2)) miss(`the ${which} part begins at ${from} of ${columns} elements`);
  return x;
};

/** x of (-b, a), x being (a, b) */
const rotatedHalves = (g: Look, v: Value): Value => {
  const op = g.made(v, "concat", "what the sines are for");
  return near(() => {
    const [left, right, ...more] = op.inputs as readonly [Value, Value, ...Value[]];
    if (right === undefined || more.length > 0) miss(`${op.inputs.length} parts are joined, not 2`);
    if (op.attrs.axis !== shapeOf(v).length - 1) miss(`parts are joined along axis ${op.attrs.axis}, not the last`);
    const { by, factors } = g.product(left);
    if (by !== -1 || factors.length !== 1) miss("the first part is not the second half with its sign changed");
    const [b, a] = [halfOf(g, factors[0] as Value, "second"), halfOf(g, right, "first")];
    return g.same(a, b) ? a : miss(`the halves are of '${a.name}' and '${b.name}'`);
  });
};

interface Turn {
  readonly dtype: DType;
  /** x, cos, sin */
  readonly operands: readonly Value[];
}

export const rope: Pattern = pattern<Turn>({
  name: "rope",
  roots: ["add"],
  match: (op: Op, g) =>
    g.both(op, (straight, turned) =>
      g.both(g.made(turned, "mul", "a term"), (rotated, sin) => {
        const x = rotatedHalves(g, rotated);
        return near(() =>
          g.both(g.made(straight, "mul", "the other term"), (same, cos) => {
            if (!g.same(same, x)) miss(`halves of '${x.name}' are turned, and '${same.name}' is not`);
            g.sized(op, x);
            for (const [table, name] of [
              [cos, "cosines"],
              [sin, "sines"],
            ] as const)
              if (shapeOf(table).length > shapeOf(x).length || shapeOf(table).at(-1) !== shapeOf(x).at(-1))
                miss(`the ${name} are not as many as elements of a row`);
            return g.narrowed(op, [x, cos, sin]);
          }),
        );
      }),
    ),
  build: (b, { dtype, operands }, op) =>
    cast(
      b,
      b.op(
        "rope",
        operands.map((v) => cast(b, v, dtype)),
      ),
      typeOf(op.outputs[0] as Value).dtype,
    ),
});
