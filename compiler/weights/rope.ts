/**
 * The table of rotary embeddings, the same bits on every machine: only + - * / and rounding, since Math.pow, Math.exp and Math.cos may
 * differ between versions of a JavaScript engine. Series are summed in double, whose error is far below half a unit of f32.
 */

/** f32 [positions, dim] of a `rope` source: rows [from, to). cos in columns 0..dim/2-1, sin in the others. */
export const ropeRows = (theta: number, dim: number, from: number, to: number): Float32Array => {
  const half = dim / 2;
  const frequencies = inverseFrequencies(theta, dim);
  const table = new Float32Array((to - from) * dim);
  const turn = { cos: 0, sin: 0 };
  for (let p = from; p < to; p++)
    for (let j = 0; j < half; j++) {
      cosSin(Math.fround(p * (frequencies[j] as number)), turn);
      table[(p - from) * dim + j] = turn.cos;
      table[(p - from) * dim + half + j] = turn.sin;
    }
  return table;
};

/** f32 of 1 / f32(theta ^ f32(2j / dim)), j < dim/2: the steps that models take in f32. */
export const inverseFrequencies = (theta: number, dim: number): Float32Array => {
  const logarithm = ln(theta);
  return Float32Array.from({ length: dim / 2 }, (_, j) => 1 / Math.fround(exp(Math.fround((2 * j) / dim) * logarithm)));
};

const ln2High = 0.6931471803691238;
const ln2Low = 1.9082149292705877e-10;

/** ln of x > 0: x = m 2^e, ln m = 2 atanh((m - 1) / (m + 1)). */
const ln = (x: number): number => {
  let m = x;
  let e = 0;
  for (; m > 1.5; e++) m /= 2;
  for (; m < 0.75; e--) m *= 2;
  const z = (m - 1) / (m + 1);
  const square = z * z;
  let sum = 0;
  for (let n = 41; n >= 1; n -= 2) sum = sum * square + 1 / n;
  return e * ln2High + (e * ln2Low + 2 * z * sum);
};

/** e^y: y = n ln 2 + r, the series of e^r. */
const exp = (y: number): number => {
  const n = Math.round(y / (ln2High + ln2Low));
  const r = y - n * ln2High - n * ln2Low;
  let sum = 1;
  for (let i = 18; i >= 1; i--) sum = 1 + (r / i) * sum;
  for (let i = 0; i < n; i++) sum *= 2;
  for (let i = 0; i > n; i--) sum /= 2;
  return sum;
};

/** pi/2 in pieces of 28 bits, so that products with counts below 2^25 are exact. */
const quarter = [1.570796325802803, 9.920935739593517e-10, 5.721188709663575e-18, 1.6446256936324258e-26] as const;
const perQuarter = 0.6366197723675814;

/** Taylor coefficients 1/n!, with signs, of sin x / x and cos x in powers of x^2, highest first. */
const sinSeries = [
  1 / 355687428096000,
  -1 / 1307674368000,
  1 / 6227020800,
  -1 / 39916800,
  1 / 362880,
  -1 / 5040,
  1 / 120,
  -1 / 6,
  1,
] as const;
const cosSeries = [
  1 / 20922789888000,
  -1 / 87178291200,
  1 / 479001600,
  -1 / 3628800,
  1 / 40320,
  -1 / 720,
  1 / 24,
  -1 / 2,
  1,
] as const;

const series = (coefficients: readonly number[], square: number): number => {
  let sum = 0;
  for (let i = 0; i < coefficients.length; i++) sum = sum * square + (coefficients[i] as number);
  return sum;
};

/** cos and sin of an angle from 0 to 2^24, in double. */
const cosSin = (angle: number, into: { cos: number; sin: number }): void => {
  const n = Math.floor(angle * perQuarter + 0.5);
  const r = angle - n * quarter[0] - n * quarter[1] - n * quarter[2] - n * quarter[3];
  const square = r * r;
  const s = r * series(sinSeries, square);
  const c = series(cosSeries, square);
  const turns = n % 4;
  into.cos = turns === 0 ? c : turns === 1 ? -s : turns === 2 ? -c : s;
  into.sin = turns === 0 ? s : turns === 1 ? c : turns === 2 ? -s : -c;
};
