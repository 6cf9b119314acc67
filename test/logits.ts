/** Comparing logits: the relative error, and the margin rule by which tokens of two computations must agree. */
import { readFileSync } from "node:fs";

export interface Logits {
  readonly rows: number;
  readonly vocabulary: number;
  readonly data: Float32Array;
}

/** A file of raw little-endian f32 [rows, vocabulary]. */
export const readLogits = (path: string, vocabulary: number): Logits => {
  const bytes = new Uint8Array(readFileSync(path));
  if (bytes.length % (4 * vocabulary) !== 0) throw new Error(`${path}: ${bytes.length} bytes are not rows of ${vocabulary} f32`);
  return { rows: bytes.length / (4 * vocabulary), vocabulary, data: new Float32Array(bytes.buffer) };
};

/** Frobenius norm of the difference over that of the reference, over the rows that `use` admits. */
export const relativeError = (found: Logits, reference: Logits, use: (row: number) => boolean = () => true): number => {
  let difference = 0;
  let norm = 0;
  for (let row = 0; row < reference.rows; row++) {
    if (!use(row)) continue;
    for (let i = row * reference.vocabulary; i < (row + 1) * reference.vocabulary; i++) {
      const [f, r] = [found.data[i] as number, reference.data[i] as number];
      difference += (f - r) ** 2;
      norm += r ** 2;
    }
  }
  return Math.sqrt(difference / norm);
};

export interface Agreement {
  readonly rows: number;
  /** rows whose likeliest token differs */
  readonly differ: number;
  /** of those, rows where the reference's top-two margin exceeds twice the row's largest logit error: the rule is broken */
  readonly broken: readonly number[];
  readonly largestError: number;
}

/** DESIGN "Numbers": tokens agree wherever the reference's top-two margin exceeds twice the largest logit error of that row. */
export const agreement = (found: Logits, reference: Logits): Agreement => {
  const broken: number[] = [];
  let differ = 0;
  let largestError = 0;
  for (let row = 0; row < reference.rows; row++) {
    const at = row * reference.vocabulary;
    let [best, second, mine, error] = [at, -1, at, 0];
    for (let i = at; i < at + reference.vocabulary; i++) {
      const [f, r] = [found.data[i] as number, reference.data[i] as number];
      if (r > (reference.data[best] as number)) [second, best] = [best, i];
      else if (i !== best && (second < 0 || r > (reference.data[second] as number))) second = i;
      if (f > (found.data[mine] as number)) mine = i;
      error = Math.max(error, Math.abs(f - r));
    }
    largestError = Math.max(largestError, error);
    if (mine === best) continue;
    differ++;
    const margin = (reference.data[best] as number) - (reference.data[second] as number);
    if (!(margin <= 2 * error)) broken.push(row);
  }
  return { rows: reference.rows, differ, broken, largestError };
};
