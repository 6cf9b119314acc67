/** Finding backends: the in-tree ones by name, others by path or package. Each is loaded when it is asked for. */

import { existsSync, readFileSync, statSync } from "node:fs";
import { createRequire } from "node:module";
import { isAbsolute, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { UserError } from "../ir/error.ts";
import { dtypes } from "../ir/type.ts";
import type { Backend } from "./backend.ts";

export type { Backend } from "./backend.ts";

/** The in-tree backends. */
const inTree: Readonly<Record<string, () => Promise<{ readonly default: Backend }>>> = {
  cpp: () => import("./cpp/index.ts"),
  cuda: () => import("./cuda/index.ts"),
  null: () => import("./null/index.ts"),
};
export const backendNames: readonly string[] = Object.keys(inTree);

/** A backend and the architecture asked for. */
export interface LoadedBackend {
  readonly backend: Backend;
  readonly arch: string;
}

/**
 * Loads `NAME`, `NAME:ARCH`, `./FOLDER`, `./FILE.js` or `PACKAGE`, the last three with `:ARCH` behind them when wanted. A folder is entered by
 * its package.json (`exports` as a text, or `main`) or its index.js; a package is looked for from the current folder, then from here.
 * Throws a UserError that says what is wrong when there is none, when it does not load, or when it is no backend.
 */
export const loadBackend = async (spec: string): Promise<LoadedBackend> => {
  const { name, arch } = splitSpec(spec);
  const backend = Object.hasOwn(inTree, name)
    ? (await (inTree[name] as () => Promise<{ default: Backend }>)()).default
    : await loadPlugin(name);
  const chosen = arch ?? (backend.arches[0] as string);
  if (!backend.arches.includes(chosen))
    throw new UserError(`backend ${backend.name} has no architecture '${chosen}'; it has ${backend.arches.join(", ")}`);
  return { backend, arch: chosen };
};

/** `cuda:sm_90a`; a colon at the second place of a path is a drive's (`C:\chip`). */
const splitSpec = (spec: string): { readonly name: string; readonly arch: string | undefined } => {
  const colon = spec.lastIndexOf(":");
  if (colon <= 1 || /[\\/]/.test(spec.slice(colon))) return { name: spec, arch: undefined };
  return { name: spec.slice(0, colon), arch: spec.slice(colon + 1) };
};

const isPath = (name: string): boolean => /^\.{0,2}[\\/]/.test(name) || name === "." || name === ".." || isAbsolute(name);

const loadPlugin = async (name: string): Promise<Backend> => {
  const entry = isPath(name) ? entryOf(resolve(name), name) : resolvePackage(name);
  let module: { readonly default?: unknown };
  try {
    module = (await import(pathToFileURL(entry).href)) as { readonly default?: unknown };
  } catch (error) {
    throw new UserError(`backend ${name} does not load: ${loadFailure(error as Error, entry)}`);
  }
  return checkShape(name, module.default);
};

const loadFailure = (error: Error & { readonly code?: string }, entry: string): string => {
  const first = error.message.split("\n")[0] as string;
  if (error.code === "ERR_MODULE_NOT_FOUND" && /'step3c'|step3c\/backend/.test(error.message))
    return `${entry} imports step3c, which is not installed beside it; run npm install (or npm link) step3c there`;
  if (error.code === "ERR_UNKNOWN_FILE_EXTENSION") return `${entry} is not JavaScript; compile it and name what comes out`;
  return `${first} (in ${entry})`;
};

/** The file that a folder or file stands for. */
const entryOf = (path: string, name: string): string => {
  if (!existsSync(path)) throw new UserError(`backend ${name}: there is no ${path}`);
  if (!statSync(path).isDirectory()) return path;
  const manifest = join(path, "package.json");
  const tried: string[] = [];
  if (existsSync(manifest)) {
    let entry: { readonly exports?: unknown; readonly main?: unknown };
    try {
      entry = JSON.parse(readFileSync(manifest, "utf8")) as typeof entry;
    } catch (error) {
      throw new UserError(`backend ${name}: ${manifest} is not JSON: ${(error as Error).message}`);
    }
    for (const field of [entry.exports, entry.main]) if (typeof field === "string") tried.push(join(path, field));
  }
  tried.push(join(path, "index.js"), join(path, "index.mjs"));
  const found = tried.find((file) => existsSync(file));
  if (found) return found;
  throw new UserError(
    `backend ${name}: ${path} has no module to load (looked for ${tried.join(", ")}); compile it if it is TypeScript`,
  );
};

const resolvePackage = (name: string): string => {
  for (const from of [join(process.cwd(), "package.json"), import.meta.url])
    try {
      return createRequire(from).resolve(name);
    } catch {
      // the next place
    }
  throw new UserError(
    `no backend '${name}': in the tree are ${backendNames.join(", ")}; a folder is named ./${name}, a package must be installed (npm install ${name})`,
  );
};

/** What a Backend must have, and how each part is recognised. */
const shape: Readonly<Record<string, readonly [what: string, is: (x: unknown) => boolean]>> = {
  name: ["a text", (x) => typeof x === "string" && x !== ""],
  api: ["1", (x) => x === 1],
  device: ["a text: the runtime's device driver", (x) => typeof x === "string" && x !== ""],
  arches: ["a list of at least one text", (x) => Array.isArray(x) && x.length > 0 && x.every((a) => typeof a === "string")],
  dtypes: [
    `a list of dtypes (${dtypes.join(", ")})`,
    (x) => Array.isArray(x) && x.every((d) => (dtypes as readonly unknown[]).includes(d)),
  ],
  kernels: [
    "a list of templates { name, match(), render() }",
    (x) =>
      Array.isArray(x) &&
      x.every((k) => typeof k?.name === "string" && typeof k.match === "function" && typeof k.render === "function"),
  ],
  assemble: ["a function", (x) => typeof x === "function"],
  kv: ["a function, or absent", (x) => x === undefined || typeof x === "function"],
};

const checkShape = (name: string, found: unknown): Backend => {
  if (typeof found !== "object" || found === null)
    throw new UserError(
      `backend ${name}: its default export is ${found === undefined ? "missing" : `a ${typeof found}`}; export a Backend as default`,
    );
  const wrong = Object.entries(shape)
    .filter(([part, [, is]]) => !is((found as Record<string, unknown>)[part]))
    .map(([part, [what]]) => `'${part}' must be ${what}`);
  if (wrong.length > 0) throw new UserError(`backend ${name} is not one: ${wrong.join("; ")}`);
  return found as Backend;
};
