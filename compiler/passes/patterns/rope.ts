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
  /** turns are for half a row: both halves have the same */
  readonly halves: boolean;
}

/** x cos + (-b, a) sin */
const whole = (op: Op, g: Look): Turn =>
  g.both(op, (straight, turned) =>
    g.both(g.made(turned, "mul", "a term"), (rotated, sin) => {
      const x = rotatedHalves(g, rotated);
      return near(() =>
        g.both(g.made(straight, "mul", "the other term"), (same, cos) => {
          if (!g.same(same, x)) miss(`halves of '${x.name}' are turned, and '${same.name}' is not`);
          return { ...g.narrowed(op, [x, cos, sin]), halves: false };
        }),
      );
    }),
  );

/** (a cos - b sin, b cos + a sin) of turns for each half */
const byHalves = (op: Op, g: Look): Turn => {
  const [left, right, ...more] = op.inputs as readonly [Value, Value, ...Value[]];
  if (right === undefined || more.length > 0 || op.attrs.axis !== shapeOf(left).length - 1)
    return miss("no two halves are joined");
  const difference = g.made(left, "sub", "the first half");
  const sum = g.made(right, "add", "the second half");
  const [ac, bs] = difference.inputs as readonly [Value, Value];
  /** the other factor of a product with a half */
  const turnOf = (product: Value, half: Value): Value =>
    g.both(g.made(product, "mul", "a term"), (x, turn) => (g.same(x, half) ? turn : miss(`'${half.name}' is no factor`)));
  return g.both(g.made(ac, "mul", "a term"), (a, cos) =>
    g.both(g.made(bs, "mul", "a term"), (b, sin) => {
      const x = halfOf(g, a, "first");
      return near(() => {
        if (!g.same(halfOf(g, b, "second"), x)) miss("the halves are of different values");
        g.both(sum, (bc, as) => {
          const same = g.same(turnOf(bc, b), cos) && g.same(turnOf(as, a), sin);
          if (!same) miss("the halves are turned differently");
        });
        return { ...g.narrowed(op, [x, cos, sin]), halves: true };
      });
    }),
  );
};

const fitting = (g: Look, op: Op, turn: Turn): Turn => {
  const [x, ...tables] = turn.operands as readonly [Value, Value, Value];
  g.sized(op, x);
  const columns = shapeOf(op.outputs[0] as Value).at(-1) as number;
  for (const table of tables)
    if (shapeOf(table).length > shapeOf(x).length || shapeOf(table).at(-1) !== (turn.halves ? columns / 2 : columns))
      miss(`'${table.name}' does not turn each element of a row`);
  return turn;
};

export const rope: Pattern = pattern<Turn>({
  name: "rope",
  roots: ["add", "concat"],
  match: (op, g) => {
    const turn = op.kind === "add" ? whole(op, g) : byHalves(op, g);
    return near(() => fitting(g, op, turn));
  },
  build(b, { dtype, operands, halves }, op) {
    const [x, ...tables] = operands.map((v) => cast(b, v, dtype)) as [Value, Value, Value];
    const turns = halves ? tables.map((t) => b.op("concat", [t, t], { axis: shapeOf(t).length - 1 })) : tables;
    return cast(b, b.op("rope", [x, ...turns]), typeOf(op.outputs[0] as Value).dtype);
  },
});
