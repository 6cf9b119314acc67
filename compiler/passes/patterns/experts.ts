/**
 * Routed experts as their module loops over them: the sum over all experts of what each makes of all tokens, times its share of each token.
 * Only the chosen ones are computed then, so a value that is not finite no longer passes through a share of 0.
 */
import type { Attrs } from "../../../ir/attr.ts";
import type { Builder } from "../../../ir/build.ts";
import { type Dim, product } from "../../../ir/dim.ts";
import { isStored, type Op, type Value, type Weight, type WeightSource } from "../../../ir/graph.ts";
import { type DType, type TensorType, tensor } from "../../../ir/type.ts";
import { cast, either, isWorking, type Look, miss, near, type Pattern, pattern, reshaped, shapeOf, typeOf } from "./look.ts";

/** Something found, and the ops between it and where the look began. */
interface Through<Found> {
  readonly found: Found;
  readonly ops: readonly Op[];
}

const isCast = (op: Op, among: (v: Value) => boolean): boolean =>
  op.kind === "cast" && among(op.inputs[0] as Value) && among(op.outputs[0] as Value);
const isFloatCast = (op: Op): boolean => isCast(op, isWorking);
const isIndexCast = (op: Op): boolean => isCast(op, (v) => ["i32", "i64"].includes(typeOf(v).dtype));

/** The same rows before conversions and reshapes. */
const before = (g: Look, v: Value, converts: (op: Op) => boolean = isFloatCast): Through<Value> => {
  const ops: Op[] = [];
  let now = v;
  for (let op = g.maker(now); op !== undefined && (op.kind === "reshape" || converts(op)); op = g.maker(now)) {
    ops.push(op);
    now = op.inputs[0] as Value;
  }
  if (shapeOf(now).at(-1) !== shapeOf(v).at(-1)) miss(`'${v.name}' is reshaped, and has other rows before`);
  return { found: now, ops };
};

/** The op that makes these rows. */
const made = (g: Look, v: Value, kinds: readonly string[], what: string): Through<Op> => {
  const { found, ops } = before(g, v);
  const op = g.maker(found);
  if (op === undefined || !kinds.includes(op.kind))
    return miss(`${what} is ${op === undefined ? `'${found.name}'` : `made by ${op.kind}`}, not ${kinds.join(" or ")}`);
  return { found: op, ops: [...ops, op] };
};

const rowsOf = (v: Value): Dim => product(shapeOf(v).slice(0, -1));
const isSameShape = (a: Value, b: Value): boolean => String(shapeOf(a)) === String(shapeOf(b));

/** Where the chosen experts are this one. */
interface Chosen {
  readonly ids: Value;
  readonly expert: number;
}
const equality = (g: Look, op: Op | undefined): Through<Chosen> => {
  if (op?.kind !== "equal") return miss("a mask is made by no equal");
  return g.both(op, (x, y) => {
    const expert = g.number(y) ?? miss(`'${y.name}' is no number of an expert`);
    if (!isSameShape(x, op.outputs[0] as Value)) miss(`'${x.name}' is repeated along axes`);
    return { found: { ids: before(g, x, isIndexCast).found, expert }, ops: [op] };
  });
};
/** 1 where an expert is chosen, else 0 */
const mask = (g: Look, v: Value): Through<Chosen> => {
  const { found: op, ops } = made(g, v, ["cast", "where"], "a mask");
  const [x, y, z] = op.inputs as readonly [Value, Value, Value];
  if (op.kind === "where") {
    g.constant(y, 1, "a mask of chosen experts");
    g.constant(z, 0, "a mask of other experts");
  }
  const { found, ops: more } = equality(g, g.maker(x));
  return { found, ops: [...ops, ...more] };
};

/** What an expert is to each token: the share of the places where it is among the chosen ones. */
interface Share extends Chosen {
  readonly shares: Value;
}
const share = (g: Look, v: Value): Through<Share> => {
  const { found: sum, ops } = made(g, v, ["reduce"], "a share");
  if (sum.attrs.fn !== "sum" || sum.attrs.group !== undefined) miss("a share is no sum over the chosen experts");
  const { found: op, ops: more } = made(g, sum.inputs[0] as Value, ["mul", "where"], "what a share is the sum of");
  const [x, y, z] = op.inputs as readonly [Value, Value, Value];
  const of = (shares: Value, { found, ops: others }: Through<Chosen>): Through<Share> => {
    if (!isSameShape(shares, op.outputs[0] as Value)) miss(`'${shares.name}' is repeated along axes`);
    return { found: { ...found, shares }, ops: [...ops, ...more, ...others] };
  };
  if (op.kind === "mul") return g.both(op, (a, b) => of(a, mask(g, b)));
  g.constant(z, 0, "the share of other experts");
  return of(y, equality(g, g.maker(x)));
};

/** An expert's result times its share. */
interface Addend extends Share {
  readonly y: Value;
}
const addend = (g: Look, v: Value): Through<Addend> => {
  const { found: op, ops } = made(g, v, ["mul"], "an addend");
  return g.both(op, (y, weight) => {
    if (shapeOf(weight).at(-1) !== 1 || !isSameShape(y, op.outputs[0] as Value)) miss(`'${weight.name}' is no share of tokens`);
    if (String(shapeOf(weight).slice(0, -1)) !== String(shapeOf(y).slice(0, -1))) miss("a share is repeated along axes");
    const { found, ops: more } = share(g, weight);
    return { found: { ...found, y }, ops: [...ops, ...more] };
  });
};

/** down(act(gate x) * up x), or without up */
interface Body {
  readonly x: Value;
  readonly act: string;
  readonly attrs: Attrs;
  readonly gate: Op;
  readonly up?: Op;
  readonly down: Op;
}
const activations: Readonly<Record<string, string>> = { silu: "silu", gelu: "gelu", maximum: "relu" };

const body = (g: Look, y: Value, expert: number): Through<Body> => {
  const { found: down, ops } = made(g, y, ["linear"], `the result of expert ${expert}`);
  const { found: op, ops: more } = made(
    g,
    down.inputs[0] as Value,
    ["mul", ...Object.keys(activations)],
    `expert ${expert} within`,
  );
  const active = (v: Value): Through<Pick<Body, "x" | "act" | "attrs" | "gate">> => {
    const { found: act, ops: first } = made(g, v, Object.keys(activations), `a factor of expert ${expert}`);
    const of = (x: Value): Through<Op> => made(g, x, ["linear"], `what expert ${expert} activates`);
    const { found: gate, ops: second } =
      act.kind !== "maximum"
        ? of(act.inputs[0] as Value)
        : g.both(act, (x, zero) => {
            g.constant(zero, 0, "the least of an activation");
            return of(x);
          });
    return { found: { x: gate.inputs[0] as Value, act: act.kind, attrs: act.attrs, gate }, ops: [...first, ...second] };
  };
  if (op.kind !== "mul") {
    const { found, ops: others } = active(down.inputs[0] as Value);
    return { found: { ...found, down }, ops: [...ops, ...others] };
  }
  return g.both(op, (a, b) => {
    const { found, ops: left } = active(a);
    const { found: up, ops: right } = made(g, b, ["linear"], `a factor of expert ${expert}`);
    if (!isSameShape(a, b)) miss(`factors of expert ${expert} have different shapes`);
    if (up.inputs[0]?.name !== found.x.name) miss(`gate and up of expert ${expert} are of different values`);
    return { found: { ...found, up, down }, ops: [...ops, ...more, ...left, ...right] };
  });
};

/** The addends of a value; what is added inside is of no use to others. */
const addends = (g: Look, whole: Value): Through<readonly Value[]> => {
  const [found, ops]: [Value[], Op[]] = [[], []];
  for (const open = [whole]; open.length > 0; ) {
    const v = open.pop() as Value;
    const passed: Op[] = [];
    const onlyHere = (x: Value): boolean => g.users(x).length === 1 && !g.isOutput(x);
    let now = v;
    for (let op = g.maker(now); op !== undefined && isFloatCast(op) && onlyHere(now); op = g.maker(now)) {
      passed.push(op);
      now = op.inputs[0] as Value;
    }
    const op = g.maker(now);
    if (op?.kind !== "add" || !onlyHere(now) || !isSameShape(now, whole)) found.push(v);
    else {
      ops.push(...passed, op);
      open.push(...op.inputs);
    }
  }
  return { found, ops };
};

/** Weights of all experts, one matrix after another. */
interface Stack {
  readonly name: string;
  readonly type: TensorType;
  readonly source: WeightSource;
}
const stack = (g: Look, linears: readonly Op[], what: string): Stack => {
  const weights = linears.map(({ inputs, attrs }, i) => {
    if (attrs.keep === true) miss(`the ${what} of expert ${i} is to stay a linear`);
    return g.weight(inputs[1] as Value) ?? miss(`the ${what} of expert ${i}, '${inputs[1]?.name}', is no weight`);
  });
  const [first] = weights as [Weight, ...Weight[]];
  const { dtype, shape } = first.value.type;
  const odd = weights.findIndex(({ value }) => value.type.dtype !== dtype || !isSameShape(value, first.value));
  if (odd >= 0) miss(`the ${what} of expert ${odd} has another type than that of expert 0`);
  const sources = weights.map((w) => w.source);
  const literal = sources.flatMap((s) => (s.kind === "literal" ? [s.values] : []));
  const stored = sources.filter(isStored);
  if (Math.max(literal.length, stored.length) < sources.length) miss(`the ${what}s of experts are of different kinds`);
  return {
    name: `${first.value.name}_experts`,
    type: tensor(dtype, [sources.length, ...shape]),
    source: literal.length > 0 ? { kind: "literal", values: literal.flat() } : { kind: "stacked", of: stored },
  };
};

interface Experts {
  readonly body: Body;
  readonly ids: Value;
  readonly shares: Value;
  readonly gate: Stack;
  readonly up?: Stack;
  readonly down: Stack;
  /** what is added to their sum */
  readonly others: readonly Value[];
}

/** Numbers of experts as text. */
const listed = (numbers: readonly number[]): string => `expert${numbers.length === 1 ? "" : "s"} ${numbers.join(", ")}`;

/** How many experts there are, where ids are the places of what comes first in each token's row of scores. */
const expertsOf = (g: Look, ids: Value): number | undefined => {
  const choice = g.maker(ids);
  const isChoice = (choice?.kind === "topk" || choice?.kind === "sort") && choice.outputs[1]?.name === ids.name;
  const size = isChoice ? shapeOf(choice.inputs[0] as Value).at(-1) : undefined;
  return typeof size === "number" && typeof shapeOf(ids).at(-1) === "number" ? size : undefined;
};

/** The weighted experts, in their order, and what else is added. */
interface Sum {
  readonly experts: readonly Through<Addend>[];
  readonly others: readonly Value[];
  /** the additions before the last one */
  readonly ops: readonly Op[];
}
/** The experts of an addition that has all of them, and has them not in one of its operands already. */
const sumOf = (g: Look, op: Op): Sum => {
  const sides = op.inputs.map((v) => addends(g, v));
  const parts = sides.flatMap(({ found }, side) => found.map((v) => ({ v, side })));
  const weighted = (v: Value): Through<Addend> | undefined =>
    either(
      () => addend(g, v),
      () => undefined,
    );
  const [user, ...more] = g.users(op.outputs[0] as Value);
  const goesOn = user !== undefined && more.length === 0 && ["add", "cast"].includes(user.kind);
  const incomplete = (why: string): never => (goesOn ? miss("the sum goes on") : near(() => miss(why)));
  let ids: Value | undefined;
  for (const { v } of parts.toReversed()) {
    ids = weighted(v)?.found.ids ?? ids;
    if (ids !== undefined && expertsOf(g, ids) !== undefined) break;
  }
  if (ids === undefined) return miss("no addend is something times the share of an expert");
  const size = expertsOf(g, ids) ?? incomplete(`experts are those of '${ids.name}', which no topk or sort chose`);
  // long sums are looked at once
  if (goesOn && parts.length < size) return miss("the sum goes on");

  const [mine, others]: [{ readonly side: number; readonly addend: Through<Addend> }[], Value[]] = [[], []];
  for (const { v, side } of parts) {
    const found = weighted(v);
    if (found?.found.ids.name === ids.name) mine.push({ side, addend: found });
    else if (g.number(v) !== 0) others.push(v);
  }
  const byNumber = new Map(mine.map((p) => [p.addend.found.expert, p.addend]));
  const numbers = Array.from({ length: size }, (_, e) => e);
  const absent = numbers.filter((e) => !byNumber.has(e));
  if (absent.length > 0)
    return incomplete(`of ${size} experts that may be chosen, ${listed(absent)} ${absent.length === 1 ? "is" : "are"} not added`);
  if (new Set(mine.map((p) => p.side)).size === 1) return miss("an operand is the sum already");
  if (mine.length > size) near(() => miss(`${mine.length} results of ${size} experts are added`));
  return { experts: numbers.map((e) => byNumber.get(e) as Through<Addend>), others, ops: sides.flatMap((s) => s.ops) };
};

/** Throws unless all experts do the same to the same rows. */
const checkAlike = (bodies: readonly Body[]): void => {
  const [first] = bodies as readonly [Body];
  for (const [e, { x, act, attrs, up }] of bodies.entries()) {
    const of = `expert ${e} has ${activations[act]} where expert 0 has ${activations[first.act]}`;
    if (act !== first.act) miss(of);
    if (attrs.approximate !== first.attrs.approximate) miss(`${of} of another kind`);
    if ((up === undefined) !== (first.up === undefined)) miss(`expert ${e} has another number of linears than expert 0`);
    if (x.name !== first.x.name) miss(`expert ${e} takes '${x.name}', and expert 0 '${first.x.name}'`);
  }
};

const mixture = (g: Look, op: Op): Experts => {
  const { experts, others, ops } = sumOf(g, op);
  return near(() => {
    const { ids, shares } = (experts[0] as Through<Addend>).found;
    const stranger = experts.findIndex(({ found }) => found.shares.name !== shares.name);
    if (stranger >= 0) miss(`the shares of expert ${stranger} are another value than '${shares.name}'`);
    const bodies = experts.map(({ found }, e) => body(g, found.y, e));
    checkAlike(bodies.map((b) => b.found));
    const first = (bodies[0] as Through<Body>).found;
    const [tokens] = shapeOf(first.x);
    if (rowsOf(ids) !== tokens) miss("experts have other rows than their choice");
    if (rowsOf(shares) !== tokens || shapeOf(shares).at(-1) !== shapeOf(ids).at(-1))
      miss("shares have other rows than the choice");
    const inner = new Set([...ops, ...[...experts, ...bodies].flatMap((part) => part.ops)]);
    for (const v of [...inner].flatMap((within) => within.outputs))
      if (g.isOutput(v) || g.users(v).some((user) => user !== op && !inner.has(user)))
        miss(`'${v.name}', a value of experts, is used elsewhere`);
    const of = (which: "gate" | "up" | "down"): Stack =>
      stack(
        g,
        bodies.flatMap((b) => b.found[which] ?? []),
        which,
      );
    return { body: first, ids, shares, gate: of("gate"), ...(first.up ? { up: of("up") } : {}), down: of("down"), others };
  });
};

const built = (
  b: Builder,
  { body: { x, act, attrs, gate: like }, ids, shares, gate, up, down, others }: Experts,
  op: Op,
): Value => {
  const pairs = [rowsOf(ids), shapeOf(ids).at(-1) as Dim];
  const [choice, weights] = [reshaped(b, ids, pairs), cast(b, reshaped(b, shares, pairs), "f32")];
  const grouped = (rows: Value, { name, type, source }: Stack, to: DType): Value =>
    b.op("grouped_linear", [cast(b, rows, type.dtype), b.weight(b.unused(name), type, source), choice], { to });
  const { dtype } = typeOf(like.outputs[0] as Value);
  const gated = grouped(x, gate, dtype);
  const active = act === "maximum" ? b.op("maximum", [gated, b.op("const", [], { value: 0, dtype })]) : b.op(act, [gated], attrs);
  const inner = up === undefined ? active : b.op("mul", [active, grouped(x, up, dtype)]);
  const sum = b.op("combine", [grouped(inner, down, "f32"), choice, weights]);
  const [out] = op.outputs as readonly [Value];
  return others.reduce(
    (total, v) => b.op("add", [cast(b, v, typeOf(out).dtype), total]),
    reshaped(b, cast(b, sum, typeOf(out).dtype), shapeOf(out)),
  );
};

export const experts: Pattern = pattern<Experts>({
  name: "grouped_linear",
  roots: ["add"],
  match(op, g) {
    const [out] = op.outputs as readonly [Value];
    if (typeOf(out).dtype === "f64") miss("it is f64");
    return mixture(g, op);
  },
  build: built,
});
