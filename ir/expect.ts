/**
 * What ops expect of their inputs and attributes. Everything here throws a UserError in words when the expectation fails;
 * the caller (`inferTypes`) puts the op's name in front.
 */
import type { Attrs } from "./attr.ts";
import { type Dim, dimText, parseDim } from "./dim.ts";
import { UserError } from "./error.ts";
import { type DType, dtypes, type KvType, type TensorType, type Type, typeText } from "./type.ts";

export const fail = (message: string): never => {
  throw new UserError(message);
};

/** Fails for two sizes that had to be one. */
export const unequal = (message: string, a: Dim, b: Dim): never => {
  throw new UserError(message, 1, [a, b]);
};

/** `what` is the input's name in the op's signature. */
export const count = (inputs: readonly Type[], names: readonly string[]): void => {
  if (inputs.length !== names.length)
    fail(`takes ${names.length} input${names.length === 1 ? "" : "s"} (${names.join(", ")}), got ${inputs.length}`);
};

export const tensorAt = (inputs: readonly Type[], index: number, what: string): TensorType => {
  const t = inputs[index];
  if (t === undefined) return fail(`input ${index} (${what}) is missing`);
  return t.kind === "tensor" ? t : fail(`${what} must be a tensor, got ${typeText(t)}`);
};

export const kvAt = (inputs: readonly Type[], index: number, what: string): KvType => {
  const t = inputs[index];
  if (t === undefined) return fail(`input ${index} (${what}) is missing`);
  return t.kind === "kv" ? t : fail(`${what} must be a state (kv<...>), got ${typeText(t)}`);
};

export const rank = (t: TensorType, n: number, what: string): void => {
  if (t.shape.length !== n) fail(`${what} must have ${n} ax${n === 1 ? "is" : "es"}, got ${typeText(t)}`);
};

export const dtype = (t: TensorType, allowed: readonly DType[], what: string): void => {
  if (!allowed.includes(t.dtype)) fail(`${what} must be ${allowed.join(" or ")}, got ${typeText(t)}`);
};

export const sameDim = (a: Dim, b: Dim, what: string): void => {
  if (a !== b) unequal(`${what}: ${dimText(a)} is not ${dimText(b)}`, a, b);
};

/** The dim of an axis that must be a number, such as the columns of a weight. */
export const constantDim = (t: TensorType, axis: number, what: string): number => {
  const d = t.shape.at(axis);
  if (d === undefined) return fail(`${what} must have at least ${axis < 0 ? -axis : axis + 1} axes, got ${typeText(t)}`);
  return typeof d === "number" ? d : fail(`axis ${axis} of ${what} must be a constant, got ${typeText(t)}`);
};

export const dimAt = (t: TensorType, axis: number): Dim => {
  const d = t.shape.at(axis);
  return d === undefined ? fail(`axis ${axis} of ${typeText(t)} does not exist`) : d;
};

const missing = (name: string): never => fail(`attribute '${name}' is missing`);

export const real = (attrs: Attrs, name: string, otherwise?: number): number => {
  const v = attrs[name] ?? otherwise ?? missing(name);
  return typeof v === "number" ? v : fail(`attribute '${name}' must be a number, got ${JSON.stringify(v)}`);
};

/** An integer of at least `min`. */
export const int = (attrs: Attrs, name: string, min: number, otherwise?: number): number => {
  const v = real(attrs, name, otherwise);
  return Number.isSafeInteger(v) && v >= min ? v : fail(`attribute '${name}' must be an integer of at least ${min}, got ${v}`);
};

/** An integer of any sign. */
export const integer = (attrs: Attrs, name: string, otherwise?: number): number => {
  const v = real(attrs, name, otherwise);
  return Number.isSafeInteger(v) ? v : fail(`attribute '${name}' must be an integer, got ${v}`);
};

export const ints = (attrs: Attrs, name: string): readonly number[] => {
  const v = attrs[name] ?? missing(name);
  return Array.isArray(v) && v.every(Number.isSafeInteger)
    ? (v as readonly number[])
    : fail(`attribute '${name}' must be integers, got ${JSON.stringify(v)}`);
};

/** Dims: numbers of at least 0, or texts of expressions over symbols. */
export const dims = (attrs: Attrs, name: string): readonly Dim[] => {
  const v = attrs[name] ?? missing(name);
  if (!Array.isArray(v)) return fail(`attribute '${name}' must be a list of dims, got ${JSON.stringify(v)}`);
  return v.map((d: number | string) => {
    const dim = typeof d === "string" ? parseDim(d) : d;
    return typeof dim === "number" && !(Number.isSafeInteger(dim) && dim >= 0)
      ? fail(`attribute '${name}' must be dims of at least 0, got ${dim}`)
      : dim;
  });
};

/** An axis that the tensor has, from 0. */
export const axis = (attrs: Attrs, name: string, t: { readonly shape: readonly Dim[] }): number => {
  const v = int(attrs, name, 0);
  return v < t.shape.length ? v : fail(`attribute '${name}' is ${v}, and the tensor has ${t.shape.length} axes`);
};

export const flag = (attrs: Attrs, name: string, otherwise: boolean): boolean => {
  const v = attrs[name] ?? otherwise;
  return typeof v === "boolean" ? v : fail(`attribute '${name}' must be true or false, got ${JSON.stringify(v)}`);
};

export const word = <W extends string>(attrs: Attrs, name: string, words: readonly W[], otherwise?: W): W => {
  const v = attrs[name] ?? otherwise ?? missing(name);
  const found = words.find((w) => w === v);
  return found ?? fail(`attribute '${name}' must be one of ${words.join(", ")}, got ${JSON.stringify(v)}`);
};

export const dtypeAttr = (attrs: Attrs, name: string, otherwise?: DType): DType => word(attrs, name, dtypes, otherwise);

/** Two positive integers, such as the block of a scaled weight. */
export const pair = (attrs: Attrs, name: string): readonly [number, number] => {
  const v = attrs[name] ?? missing(name);
  const [a, b] = Array.isArray(v) ? v : [];
  const ok = Array.isArray(v) && v.length === 2 && [a, b].every((n) => Number.isSafeInteger(n) && (n as number) > 0);
  return ok ? [a as number, b as number] : fail(`attribute '${name}' must be two positive integers, got ${JSON.stringify(v)}`);
};

/** numpy broadcasting: axes are aligned at the last; two dims agree when they are equal or one of them is 1. */
export const broadcast = (types: readonly TensorType[]): readonly Dim[] => {
  const axes = Math.max(0, ...types.map((t) => t.shape.length));
  return Array.from({ length: axes }, (_, i) => {
    let dim: Dim = 1;
    for (const t of types) {
      const d = t.shape[i - (axes - t.shape.length)] ?? 1;
      if (d === 1 || d === dim) continue;
      if (dim !== 1)
        unequal(`shapes ${types.map(typeText).join(" and ")} do not broadcast: ${dimText(dim)} against ${dimText(d)}`, dim, d);
      dim = d;
    }
    return dim;
  });
};
