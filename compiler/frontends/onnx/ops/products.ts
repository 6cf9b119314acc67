/** Products of matrices. A product with a constant matrix is a `linear`, which targets pack and quantise; any other is a `matmul`. */
import { type Dim, product } from "../../../../ir/dim.ts";
import { isFloat } from "../../../../ir/type.ts";
import type { Call, Lowering } from "../call.ts";
import type { Item } from "../emitter.ts";
import { binary, inWide, wide, wrap } from "./elementwise.ts";

/** a times b, of at least two axes each, in f32 for narrower floats and in i64 or f64 for integers; the result in a's dtype. */
const multiplied = (c: Call, a: Item, b: Item): Item => {
  const { dtype } = a.type;
  if (!isFloat(dtype)) return wrap(c.e, c.e.op("matmul", [c.e.cast(a, "f64"), c.e.cast(b, "f64")]), dtype);
  const [rows, columns] = [b.type.shape.at(-2), b.type.shape.at(-1)];
  const weight = b.type.shape.length === 2 && !b.runs && typeof rows === "number" && typeof columns === "number";
  if (!weight || rows === 0 || columns === 0) return c.e.op("matmul", [a, b], { to: dtype });
  const lead = a.type.shape.slice(0, -1);
  const flat = c.e.reshape(a, [product(lead), a.type.shape.at(-1) as Dim]);
  return c.e.reshape(c.e.op("linear", [flat, c.e.transpose(b, [1, 0])], { to: dtype }), [...lead, columns]);
};

/** The product as numpy has it: vectors are rows on the left and columns on the right, and their axis goes. */
export const matmul = (c: Call, a: Item, b: Item): Item => {
  if (a.type.shape.length === 0 || b.type.shape.length === 0) c.fail("scalars have no product of matrices");
  const left = a.type.shape.length === 1 ? c.e.reshape(a, [1, a.type.shape[0] as Dim]) : a;
  const right = b.type.shape.length === 1 ? c.e.reshape(b, [b.type.shape[0] as Dim, 1]) : b;
  const result = multiplied(c, left, right);
  const { shape } = result.type;
  return c.e.reshape(
    result,
    shape.filter(
      (_, i) => !(a.type.shape.length === 1 && i === shape.length - 2) && !(b.type.shape.length === 1 && i === shape.length - 1),
    ),
  );
};

/** alpha A B + beta C, A and B transposed where asked */
const gemm: Lowering = (c) => {
  const turned = (x: Item, name: string): Item => (c.int(name, 0) === 0 ? x : c.e.transpose(x, [1, 0]));
  const [alpha, beta] = [c.float("alpha", 1), c.float("beta", 1)];
  if (c.rank(0) !== 2 || c.rank(1) !== 2) c.fail(`A and B must be matrices, got ${c.rank(0)} and ${c.rank(1)} axes`);
  const scaled = (x: Item, by: number): Item => (by === 1 ? x : binary(c.e, "mul", x, c.e.number(by, x.type.dtype)));
  const { dtype } = c.x0.type;
  const from = isFloat(dtype) ? wide(c.e, c.x0) : c.e.cast(c.x0, "f64");
  const as = (x: Item): Item => c.e.cast(x, from.type.dtype);
  const ab = scaled(multiplied(c, turned(from, "transA"), turned(as(c.x(1)), "transB")), alpha);
  const all = c.has(2) && beta !== 0 ? binary(c.e, "add", ab, scaled(as(c.x(2)), beta)) : ab;
  return isFloat(dtype) ? c.e.cast(all, dtype) : wrap(c.e, c.e.op("trunc", [all]), dtype);
};

/** The letters of each operand and of the result; an ellipsis becomes letters of its own. */
const einsumTerms = (c: Call): { readonly inputs: readonly string[]; readonly output: string } => {
  const equation = c.text("equation").replace(/\s/g, "");
  const [left = "", right] = equation.split("->");
  const terms = left.split(",");
  if (terms.length !== c.inputs.length)
    c.fail(`equation '${equation}' has ${terms.length} operands, the node ${c.inputs.length}`);
  // capital Greek letters stand for the axes of ellipses, aligned at the last
  const most = Math.max(0, ...terms.map((t, i) => (t.includes("...") ? c.rank(i) - (t.length - 3) : 0)));
  const dots = (n: number): string => Array.from({ length: n }, (_, i) => String.fromCharCode(0x391 + most - n + i)).join("");
  const inputs = terms.map((t, i) => {
    const letters = t.replace("...", dots(c.rank(i) - (t.length - 3)));
    if (letters.length !== c.rank(i)) c.fail(`'${t}' of equation '${equation}' does not fit ${c.rank(i)} axes`);
    return letters;
  });
  const all = inputs.join("");
  const once = [...new Set(all)]
    .filter((l) => all.split(l).length === 2 && l < "\u0391")
    .sort()
    .join("");
  const output = right === undefined ? dots(most) + once : right.replace("...", dots(most));
  const stray = [...output].find((l) => !all.includes(l));
  if (stray !== undefined || new Set(output).size !== output.length)
    c.fail(`equation '${equation}' has a result that its operands do not have`);
  return { inputs, output };
};

/** An operand with letters in the order of `to`, which has each of its letters once; repeated letters take the diagonal first. */
const arranged = (c: Call, x: Item, letters: string, to: string): Item => {
  let [item, own] = [x, letters];
  for (const letter of new Set(letters)) {
    while (own.split(letter).length > 2) {
      const [first, second] = [own.indexOf(letter), own.lastIndexOf(letter)] as const;
      // the diagonal: all but equal indices set to 0, and one of the two axes summed
      const size = item.type.shape[first] as Dim;
      const index = (axis: number): Item =>
        c.e.iota(
          item.type.shape.map((_, i): Dim => (i === axis ? size : 1)),
          axis,
        );
      const kept = c.e.op("where", [c.e.op("equal", [index(first), index(second)]), item, c.e.number(0, item.type.dtype)]);
      const { x: last } = c.e.toLast(kept, second);
      const sum = c.e.op("reduce", [last], { fn: "sum" });
      item = c.e.reshape(sum, sum.type.shape.slice(0, -1));
      own = own.slice(0, second) + own.slice(second + 1);
    }
  }
  return c.e.transpose(
    item,
    [...to].map((l) => own.indexOf(l)),
  );
};

const einsum: Lowering = (c) => {
  const { inputs, output } = einsumTerms(c);
  const dtype = c.dtype(0);
  const sizes = new Map<string, Dim>();
  inputs.forEach((letters, i) => {
    [...letters].forEach((l, axis) => {
      const size = c.shape(i)[axis] as Dim;
      if ((sizes.get(l) ?? 1) === 1) sizes.set(l, size);
    });
  });
  const sizeOf = (letters: string): Dim => product([...letters].map((l) => sizes.get(l) as Dim));
  const shape = (letters: string): readonly Dim[] => [...letters].map((l) => sizes.get(l) as Dim);
  const keptLater = (i: number, l: string): boolean => output.includes(l) || inputs.slice(i).some((t) => t.includes(l));

  const started = (i: number): { item: Item; letters: string } => {
    const letters = [...new Set(inputs[i])].join("");
    const from = isFloat(dtype) ? wide(c.e, c.x(i)) : c.e.cast(c.x(i), "f64");
    // axes of 1 that another operand has longer are repeated
    return { item: c.e.broadcast(arranged(c, from, inputs[i] as string, letters), shape(letters)), letters };
  };
  let { item, letters } = started(0);
  const summed = (next: number): void => {
    const gone = [...letters].filter((l) => !keptLater(next, l));
    if (gone.length === 0) return;
    const kept = [...letters].filter((l) => !gone.includes(l)).join("");
    const moved = c.e.transpose(
      item,
      [...kept, ...gone].map((l) => letters.indexOf(l)),
    );
    const one = c.e.reshape(moved, [...shape(kept), sizeOf(gone.join(""))]);
    item = c.e.reshape(c.e.op("reduce", [one], { fn: "sum" }), shape(kept));
    letters = kept;
  };
  if (inputs.length === 1) summed(1);
  for (let i = 1; i < inputs.length; i++) {
    const right = started(i);
    const both = [...letters].filter((l) => right.letters.includes(l));
    const batch = both.filter((l) => keptLater(i + 1, l)).join("");
    const inner = both.filter((l) => !keptLater(i + 1, l)).join("");
    const rows = [...letters].filter((l) => !both.includes(l)).join("");
    const columns = [...right.letters].filter((l) => !both.includes(l)).join("");
    const a = c.e.transpose(
      item,
      [...(batch + rows + inner)].map((l) => letters.indexOf(l)),
    );
    const b = c.e.transpose(
      right.item,
      [...(batch + inner + columns)].map((l) => right.letters.indexOf(l)),
    );
    const product_ = multiplied(
      c,
      c.e.reshape(a, [...shape(batch), sizeOf(rows), sizeOf(inner)]),
      c.e.reshape(b, [...shape(batch), sizeOf(inner), sizeOf(columns)]),
    );
    letters = batch + rows + columns;
    item = c.e.reshape(product_, shape(letters));
    summed(i + 1);
  }
  const result = c.e.transpose(
    item,
    [...output].map((l) => letters.indexOf(l)),
  );
  return isFloat(dtype) ? c.e.cast(result, dtype) : wrap(c.e, result, dtype);
};

export const products: Readonly<Record<string, Lowering>> = {
  MatMul: (c) => (isFloat(c.dtype(0)) ? inWide(c.e, [c.x(0), c.x(1)], (a, b) => matmul(c, a, b)) : matmul(c, c.x(0), c.x(1))),
  Gemm: gemm,
  Einsum: einsum,
};
