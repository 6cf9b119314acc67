/**
 * Nests: loops over the axes of a result, each operand walked by strides. Axes that every operand walks as one are one. Of what is left, the
 * last is the inner loop; when that is short, enough of the one before it for a tile worth a thread's while is the loop around it; all
 * others count rows, which threads share.
 *
 * Sizes may be expressions over the graph's symbols. Where tokens are the first axis of all that has them, rows are those of each segment;
 * elsewhere there are as many as all segments have together, one after another.
 */
import { addDim, type Dim, divDim, mulDim, multipleOf, product, tokenSymbol } from "../ir/dim.ts";
import type { Sizes } from "./sizes.ts";

/** How an operand is walked: elements from one index of each axis to the next, and the place of the first. */
export interface Walk {
  readonly strides: readonly Dim[];
  readonly start: Dim;
}

export interface Nest {
  readonly shape: readonly Dim[];
  readonly walks: readonly Walk[];
  /** rows of the first axis for each token; 0 when it does not count tokens by segments */
  readonly perToken: number;
}

/** Elements from one index of an axis to the next, row-major. */
export const stridesOf = (shape: readonly Dim[]): Dim[] => shape.map((_, i) => product(shape.slice(i + 1)));

/** The walk of an operand that is repeated along axes where it has 1, and along those in front of its own. */
export const walkOf = (own: readonly Dim[], shape: readonly Dim[]): Walk => {
  const lead = shape.length - own.length;
  const strides = stridesOf(own);
  return { strides: shape.map((_, i) => (i < lead || own[i - lead] === 1 ? 0 : (strides[i - lead] as Dim))), start: 0 };
};

const hasTokens = (d: Dim): boolean => typeof d === "string" && new RegExp(`\\b${tokenSymbol}\\b`).test(d);

/** Rows of a first axis for each token, when that is the first axis of all shapes with tokens and they have them nowhere else; else 0. */
export const perTokenOf = (first: Dim | undefined, shapes: readonly (readonly Dim[])[]): number => {
  const count = typeof first === "string" ? (multipleOf(first, tokenSymbol) ?? 0) : 0;
  return shapes.every((shape) => shape.every((d, i) => !hasTokens(d) || (i === 0 && d === first))) ? count : 0;
};

/** A nest with axes of one index dropped, and those joined that every operand walks as one. The axis of tokens stays as it is. */
export const nestOf = (shape: readonly Dim[], walks: readonly Walk[], perToken: number): Nest => {
  const apart = perToken === 0 ? 0 : 1;
  const sizes: Dim[] = [];
  const strides = walks.map((): Dim[] => []);
  shape.forEach((size, axis) => {
    if (size === 1 && axis >= apart) return;
    const last = sizes.length - 1;
    const steps = walks.map((w) => w.strides[axis] as Dim);
    const join = last >= apart && strides.every((s, w) => s[last] === mulDim(steps[w] as Dim, size));
    if (join) sizes[last] = mulDim(sizes[last] as Dim, size);
    else sizes.push(size);
    strides.forEach((s, w) => {
      s[sizes.length - 1] = steps[w] as Dim;
    });
  });
  if (sizes.length === apart) {
    sizes.push(1);
    for (const s of strides) s.push(0);
  }
  return { shape: sizes, walks: walks.map((w, i) => ({ strides: strides[i] as Dim[], start: w.start })), perToken };
};

export const isMultiple = (d: Dim, of: number): boolean => mulDim(divDim(d, of), of) === d;

/**
 * How much wider the elements of a copy can be, up to 16 bytes: the largest factor that divides the neighbours of the inner axis and all
 * places of the first `count` walks.
 */
export const widening = ({ shape, walks, perToken }: Nest, count: number, bytes: number): number => {
  const inner = shape.length - 1;
  const own = walks.slice(0, count);
  if (own.some((w) => w.strides[inner] !== 1) || (perToken !== 0 && inner === 0)) return 1;
  const places = [shape[inner] as Dim, ...own.flatMap((w) => [w.start, ...w.strides.slice(0, inner)])];
  return [16, 8, 4, 2].find((f) => f * bytes <= 16 && places.every((d) => isMultiple(d, f))) ?? 1;
};

/** The same nest over elements `factor` times as wide for the first `count` walks. */
export const widened = ({ shape, walks, perToken }: Nest, count: number, factor: number): Nest => {
  if (factor === 1) return { shape, walks, perToken };
  const inner = shape.length - 1;
  return nestOf(
    shape.with(inner, divDim(shape[inner] as Dim, factor)),
    walks.map((w, n) =>
      n >= count
        ? w
        : { strides: w.strides.map((s, i) => (i === inner ? s : divDim(s, factor))), start: divDim(w.start, factor) },
    ),
    perToken,
  );
};

// --- texts ----------------------------------------------------------------------------------------------------------------------

/** Elements of a tile: what a thread does between looking for more. */
const tileElements = 2048;
/** Sides of the squares in which a transposed copy goes on; both axes are worth it from `leastSide` on. */
const squareSide = 32;
const leastSide = 8;

/** The loops of a nest. Lines of setup see `r.row` and `r.tile`; `outer` and `inner` are loops of at most one each. */
export interface Loops {
  readonly rows: string;
  /** rows and tiles at most, as the host of a launch can tell */
  readonly most: string;
  readonly setup: readonly string[];
  readonly outer: readonly { readonly from: string; readonly to: string }[];
  readonly inner: { readonly from: string; readonly to: string };
  /** neighbours of the inner loop that are worth a thread each, a power of two */
  readonly lanes: number;
  /** by walk: how far the inner loop's first element is from the argument's */
  readonly offsets: readonly string[];
  /** by walk: stride of the inner loop */
  readonly steps: readonly Dim[];
}

/** `i0 * 12 + j + 5`, without what is nothing. */
export const offsetText = (sizes: Sizes, indices: readonly string[], { strides, start }: Walk): string => {
  const terms = indices.flatMap((index, axis) => {
    const stride = strides[axis] as Dim;
    return stride === 0 ? [] : [stride === 1 ? index : `${index} * ${sizes.text(stride)}`];
  });
  if (start !== 0) terms.push(sizes.text(start));
  return terms.length === 0 ? "0" : terms.join(" + ");
};

/** The names of indices of the axes of rows, i0, i1 ..., and the statements that take `r.row` apart into those that texts have. */
export const rowIndices = (
  sizes: Sizes,
  shape: readonly Dim[],
): { readonly names: string[]; lines(texts: readonly string[]): string[] } => {
  const names = shape.map((_, axis) => `i${axis}`);
  const line = (axis: number): string => {
    const below = product(shape.slice(axis + 1));
    const index = below === 1 ? "r.row" : `r.row / ${sizes.text(below)}`;
    return `const int64_t ${names[axis]} = ${axis === 0 ? index : `${index} % ${sizes.text(shape[axis] as Dim)}`};`;
  };
  return {
    names,
    lines: (texts) => names.flatMap((name, axis) => (texts.some((t) => new RegExp(`\\b${name}\\b`).test(t)) ? [line(axis)] : [])),
  };
};

/**
 * The function that gives a thread its rows, those of some axes, each in so many tiles (a text, and how many that is at most); and how many
 * of both there are at most, as the host of a launch can tell.
 */
export const rowsText = (
  sizes: Sizes,
  shape: readonly Dim[],
  perToken: number,
  tiles: string,
  mostTiles: Dim,
): { readonly rows: string; readonly most: string } => {
  const byTokens = perToken !== 0;
  const count = byTokens ? mulDim(perToken, product(shape.slice(1))) : product(shape);
  const most = String(sizes.largest(mulDim(count, mostTiles)));
  return {
    rows: `${byTokens ? "of_tokens" : "fixed"}(c, ${sizes.argument(count)}, ${tiles})`,
    most: byTokens ? `c.segments * c.stride * ${most}` : most,
  };
};

const tilesOf = (size: Dim, tile: number): Dim => divDim(addDim(size, tile - 1), tile);

const powerOfTwoAtLeast = (n: number): number => 2 ** Math.ceil(Math.log2(Math.max(1, n)));

export const loopsOf = (sizes: Sizes, { shape, walks, perToken }: Nest): Loops => {
  const last = shape.length - 1;
  const width = shape[last] as Dim;
  const hasOuter = typeof width === "number" && width < tileElements && last > (perToken === 0 ? 0 : 1);
  const rowAxes = shape.slice(0, hasOuter ? last - 1 : last);
  const cut = hasOuter ? (shape[last - 1] as Dim) : width;
  const tile = hasOuter ? Math.max(1, Math.floor(tileElements / Math.max(1, width as number))) : tileElements;
  const whole = typeof cut === "number" && cut <= tile;
  const all = sizes.text(cut);
  const bounds = whole ? { from: "0", to: all } : { from: "first", to: "last" };
  const { names, lines } = rowIndices(sizes, rowAxes);
  const part = `const int64_t first = r.tile * ${tile}, last = first + ${tile} < ${all} ? first + ${tile} : ${all};`;
  const offsets = walks.map((w) => offsetText(sizes, hasOuter ? [...names, "j"] : names, w));
  const tiles = whole ? Math.min(1, cut as number) : tilesOf(cut, tile);
  return {
    ...rowsText(sizes, rowAxes, perToken, sizes.argument(tiles), tiles),
    setup: [...lines(offsets), ...(whole ? [] : [part])],
    outer: hasOuter ? [bounds] : [],
    inner: hasOuter ? { from: "0", to: sizes.text(width) } : bounds,
    lanes: hasOuter ? Math.min(256, powerOfTwoAtLeast(width as number)) : 256,
    offsets,
    steps: walks.map((w) => w.strides[last] as Dim),
  };
};

/** A copy [from, to] whose inner loop would leap through one of both: squares, in which each is walked along its neighbours. */
export interface Squares extends Pick<Loops, "rows" | "most" | "setup" | "offsets"> {
  /** elements between neighbours of the other */
  readonly fromStep: string;
  readonly toStep: string;
  /** sides of the square: along the neighbours of `from`, and of `to` */
  readonly fromSide: string;
  readonly toSide: string;
}

export const squaresOf = (sizes: Sizes, { shape, walks, perToken }: Nest): Squares | undefined => {
  const [from, to] = walks as readonly [Walk, Walk];
  const down = shape.length - 1;
  const first = perToken === 0 ? 0 : 1;
  const across = from.strides.findIndex((s, axis) => axis >= first && axis < down && s === 1);
  const step = from.strides[down] as Dim;
  const isShort = (size: Dim): boolean => typeof size === "number" && size < leastSide;
  if (across < 0 || down < first || to.strides[down] !== 1 || step === 0) return undefined;
  const [fromSize, toSize] = [shape[across] as Dim, shape[down] as Dim];
  if (isShort(fromSize) || isShort(toSize)) return undefined;
  const rows = shape.filter((_, axis) => axis !== across && axis !== down);
  const { names, lines } = rowIndices(sizes, rows);
  const [downTiles, acrossTiles] = [tilesOf(toSize, squareSide), tilesOf(fromSize, squareSide)];
  const tiles = mulDim(acrossTiles, downTiles);
  // axes of rows in their old places, so that walks find them
  const indices = shape.map((_, axis) =>
    axis === across ? "j" : axis === down ? "i" : (names[axis - (axis > across ? 1 : 0)] as string),
  );
  const offsets = walks.map((w) => offsetText(sizes, indices, w));
  const side = (size: Dim, index: string): string => {
    const [all, square] = [sizes.text(size), String(squareSide)];
    if (typeof size === "number" && size % squareSide === 0) return square;
    return typeof size === "number" && size < squareSide ? all : `least(${all} - ${index}, ${square})`;
  };
  return {
    ...rowsText(sizes, rows, perToken, sizes.argument(tiles), tiles),
    setup: [
      ...lines(offsets),
      `const int64_t j = r.tile / ${sizes.text(downTiles)} * ${squareSide}, i = r.tile % ${sizes.text(downTiles)} * ${squareSide};`,
    ],
    offsets,
    fromStep: sizes.text(step),
    toStep: sizes.text(to.strides[across] as Dim),
    fromSide: side(fromSize, "j"),
    toSide: side(toSize, "i"),
  };
};
