/** The files of a program: kernels, their table, the device driver, and how CMake builds it all into one library. */

import type { ProgramSource } from "../backend.ts";
import { scalarHeader } from "../scalar.ts";
import { loadTemplate, loadText, type Template } from "../template.ts";

/** What nvcc is told of an architecture. sm_80 is kept as PTX too: later processors run it. */
const targets: Readonly<Record<string, { readonly codes: readonly string[]; readonly major: number; readonly exact: boolean }>> =
  {
    sm_90a: { codes: ["arch=compute_90a,code=sm_90a"], major: 9, exact: true },
    sm_80: { codes: ["arch=compute_80,code=[sm_80,compute_80]"], major: 8, exact: false },
  };
export const arches: readonly string[] = Object.keys(targets);

/** Kernels that every program has besides its own: what the GPU can do at best, and the header that has them. */
const ceilings: Readonly<Record<string, { readonly header: string; readonly names: readonly string[] }>> = {
  sm_90a: { header: "ceilings_hopper.cuh", names: ["launch", "read", "read_2", "read_3", "f32", "bf16", "fp8", "int8"] },
  sm_80: { header: "ceilings_ampere.cuh", names: ["launch", "read", "read_2", "f32", "bf16", "int8"] },
};

const part = (name: string): Template => loadTemplate(new URL(`./program/${name}.hbs`, import.meta.url));
const cmake = part("CMakeLists.txt");
const unit = part("unit.cu");
const table = part("table.cu");

/** the driver, by name in the program and in the runtime */
const driver: Readonly<Record<string, string>> = {
  "cuda.cpp": "devices/cuda.cpp",
  "host_memory.h": "devices/host_memory.h",
  "json.cpp": "json.cpp",
  "json.h": "json.h",
  "error.h": "error.h",
};

const includes = /^#include "([^"]+)"/gm;
/** Headers of this folder that lie elsewhere. */
const headersElsewhere: Readonly<Record<string, () => string>> = {
  "step3.h": () => loadText(new URL("../../runtime/step3.h", import.meta.url)),
  "scalar.h": scalarHeader,
};

/** The texts of headers, and of what they include, by name. */
const withIncluded = (names: readonly string[]): ReadonlyMap<string, string> => {
  const found = new Map<string, string>();
  const add = (name: string): void => {
    if (found.has(name)) return;
    const text = headersElsewhere[name]?.() ?? loadText(new URL(`./${name}`, import.meta.url));
    found.set(name, text);
    for (const [, included] of text.matchAll(includes)) add(included as string);
  };
  for (const name of names) add(name);
  return new Map([...found].sort(([a], [b]) => (a < b ? -1 : 1)));
};

/** The header lines that a kernel's text begins with, and the rest. */
const splitHeaders = (text: string): { readonly own: readonly string[]; readonly rest: string } => {
  const lines = /^(?:#include "[^"]+"\n)*/.exec(text)?.[0] ?? "";
  return { own: [...lines.matchAll(/"([^"]+)"/g)].map((m) => m[1] as string), rest: text.slice(lines.length) };
};

/** Kernels of rows are quick to compile and share files; each of the others takes the compiler longer than reading its headers again. */
const rowsInFile = 8;
const rowHeaders = ["rows.cuh", "choose.cuh", "tensors.cuh"];
const isRows = (own: readonly string[]): boolean => own.length > 0 && own.every((h) => rowHeaders.includes(h));

export const assemble = (program: ProgramSource): ReadonlyMap<string, string> => {
  const [target, ceiling] = [targets[program.arch], ceilings[program.arch]];
  if (target === undefined || ceiling === undefined) throw new Error(`no architecture ${program.arch}`);
  const texts = program.kernels.map((k) => splitHeaders(k.text));
  const file = (name: string, of: readonly { readonly own: readonly string[]; readonly rest: string }[]): [string, string] => [
    name,
    unit({ headers: [...new Set(of.flatMap((t) => t.own))], kernels: of.map((t) => t.rest) }),
  ];
  const small = texts.filter((t) => isRows(t.own));
  const rows = Array.from({ length: Math.ceil(small.length / rowsInFile) }, (_, i) =>
    file(`rows_${i}.cu`, small.slice(i * rowsInFile, (i + 1) * rowsInFile)),
  );
  const kernels = texts.filter((t) => !isRows(t.own)).map((t, i) => file(`kernel_${i}.cu`, [t]));
  const files = [...rows, ...kernels, file("ceilings.cu", [{ own: [ceiling.header], rest: "" }])];
  const entries = [
    ...program.kernels.map(({ name, scratch }) => ({ name, scratch })),
    ...ceiling.names.map((name) => ({ name: `ceiling_${name}`, scratch: 0 })),
  ];
  const runtime = (path: string): string => loadText(new URL(`../../runtime/${path}`, import.meta.url));
  return new Map([
    [
      "CMakeLists.txt",
      cmake({
        role: program.role,
        arch: program.arch,
        codes: target.codes,
        files: files.map(([name]) => name),
        rows: rows.map(([name]) => name),
      }),
    ],
    [
      "table.cu",
      table({
        kernels: entries,
        count: entries.length,
        major: target.major,
        exact: target.exact,
      }),
    ],
    ...files,
    ...withIncluded(["launch.h", ceiling.header, ...texts.flatMap((t) => t.own)]),
    ...Object.entries(driver).map(([name, from]): [string, string] => [`driver/${name}`, runtime(from)]),
  ]);
};
