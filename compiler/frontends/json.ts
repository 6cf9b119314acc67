/**
 * JSON of files that people and other programs write. Unlike JSON.parse it refuses duplicate keys, which it would silently drop, limits
 * nesting, and says where a fault is. Objects are Maps: no key, `__proto__` included, is special.
 */
import { UserError } from "../../ir/error.ts";

export type Json = null | boolean | number | string | readonly Json[] | JsonObject;
export type JsonObject = ReadonlyMap<string, Json>;

const deepest = 64;
const space = /[ \t\n\r]*/y;
const number = /-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?/y;
const words: ReadonlyMap<string, Json> = new Map<string, Json>([
  ["true", true],
  ["false", false],
  ["null", null],
]);

/** The value of a JSON text. `where` names the file in errors, `mend` says what to do about a damaged one. */
export const parseJson = (text: string, where: string, mend: string): Json => {
  let at = 0;
  const fail = (what: string): never => {
    const before = text.slice(0, at);
    const line = before.split("\n").length;
    throw new UserError(`${where}: ${what} at line ${line}, column ${at - before.lastIndexOf("\n")}; ${mend}`);
  };
  const match = (pattern: RegExp): string | undefined => {
    pattern.lastIndex = at;
    const found = pattern.exec(text)?.[0];
    if (found !== undefined) at += found.length;
    return found;
  };
  const take = (ch: string): boolean => {
    match(space);
    if (text[at] !== ch) return false;
    at++;
    return true;
  };
  const key = (): string => {
    match(space);
    if (text[at] !== '"') return fail("a string is expected");
    // by hand: a pattern with alternatives would run out of stack on a long string
    let end = at + 1;
    while (end < text.length && text[end] !== '"') end += text[end] === "\\" ? 2 : 1;
    const literal = text.slice(at, end + 1);
    try {
      const meaning = JSON.parse(literal) as string;
      at = end + 1;
      return meaning;
    } catch {
      return fail(end >= text.length ? "a string has no end" : "a string has a control character or a wrong escape");
    }
  };
  const value = (depth: number): Json => {
    if (depth > deepest) return fail(`nested more than ${deepest} deep`);
    if (take("{")) return object(depth);
    if (take("[")) return list(depth);
    if (text[at] === '"') return key();
    for (const [word, meaning] of words)
      if (text.startsWith(word, at)) {
        at += word.length;
        return meaning;
      }
    const digits = match(number);
    return digits === undefined || digits === ""
      ? fail(at >= text.length ? "unexpected end" : "unexpected character")
      : Number(digits);
  };
  const object = (depth: number): JsonObject => {
    const entries = new Map<string, Json>();
    if (take("}")) return entries;
    do {
      const name = key();
      if (entries.has(name)) fail(`duplicate key ${shown(name)}`);
      if (!take(":")) fail("':' is expected");
      entries.set(name, value(depth + 1));
    } while (take(","));
    if (!take("}")) fail("',' or '}' is expected");
    return entries;
  };
  const list = (depth: number): readonly Json[] => {
    const items: Json[] = [];
    if (take("]")) return items;
    do items.push(value(depth + 1));
    while (take(","));
    if (!take("]")) fail("',' or ']' is expected");
    return items;
  };
  const result = value(0);
  match(space);
  if (at !== text.length) fail("unexpected text after the end");
  return result;
};

export const isObject = (value: Json | undefined): value is JsonObject => value instanceof Map;

/** What a file holds as it may appear in a message: one line, no control characters, not endless. */
export const printable = (text: string, longest: number = 160): string => {
  const line = text.replace(/[^\x20-\x7e\u00a0-\ud7ff\ue000-\ufffd]/g, "?");
  return line.length > longest ? `${line.slice(0, longest - 3)}...` : line;
};

/** A name or value from a file, likewise. */
export const shown = (value: Json | undefined): string => {
  const text = isObject(value) ? "an object" : (JSON.stringify(value) ?? "nothing");
  return printable(text);
};
