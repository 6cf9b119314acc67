/** The files of a program: kernels, their table, what chooses among instruction sets, and how CMake builds it all. */

import type { ProgramSource } from "../backend.ts";
import { scalarHeader } from "../scalar.ts";
import { loadTemplate, loadText, type Template } from "../template.ts";

/**
 * Instruction sets, the best first, and what the compiler is told. On other processors than x86-64 there is only `baseline`.
 * `emulated`: flags for building without the matrix unit.
 */
const isas: readonly { readonly name: string; readonly flags: string; readonly emulated: string }[] = [
  {
    name: "amx",
    flags: "-march=x86-64-v4 -mamx-tile -mamx-bf16",
    emulated: "-march=x86-64-v4",
  },
  { name: "avx512", flags: "-march=x86-64-v4", emulated: "" },
  { name: "avx2", flags: "-march=x86-64-v3", emulated: "" },
  { name: "baseline", flags: "-march=x86-64", emulated: "" },
];

/** Kernels that every program has besides its own (ceilings.h): what the processor can do at best. */
const ceilings = ["ceiling_launch", "ceiling_read", "ceiling_f32", "ceiling_bf16"].map((name) => ({ name, scratch: 0 }));

const headers: readonly string[] = [
  "formats.h",
  "rows.h",
  "tensors.h",
  "choose.h",
  "simd.h",
  "panels.h",
  "contract.h",
  "matmul.h",
  "attention.h",
  "sdpa.h",
];

const part = (name: string): Template => loadTemplate(new URL(`./program/${name}.hbs`, import.meta.url));
const cmake = part("CMakeLists.txt");
const unit = part("unit.cpp");
const table = part("table.cpp");
const dispatch = part("program.cpp");

/**
 * Files of kernels are compiled side by side. Kernels of plain loops (their text begins with the headers they need) are quick to compile;
 * the others take the intrinsics of a processor, and several seconds each. More files than these would only read the headers again.
 */
const kinds = [
  { name: "rows", inFile: 12, mostFiles: 8 },
  { name: "kernels", inFile: 4, mostFiles: 8 },
] as const;

/** The header lines that a text begins with, and the rest. */
const splitHeaders = (text: string): { readonly own: readonly string[]; readonly rest: string } => {
  const lines = /^(?:#include "[^"]+"\n)*/.exec(text)?.[0] ?? "";
  return { own: [...lines.matchAll(/"([^"]+)"/g)].map((m) => m[1] as string), rest: text.slice(lines.length) };
};

export const assemble = (program: ProgramSource): ReadonlyMap<string, string> => {
  const kernels = [...program.kernels.map(({ name, scratch }) => ({ name, scratch })), ...ceilings];
  const texts = program.kernels.map((k) => splitHeaders(k.text));
  const own = kinds.flatMap(({ name, inFile, mostFiles }) => {
    const alike = texts.filter((t) => t.own.length > 0 === (name === "rows"));
    const count = Math.min(mostFiles, Math.ceil(alike.length / inFile));
    // dealt out in turn, so that kernels of one kind, which take the compiler equally long, spread over the files
    return Array.from({ length: count }, (_, i): [string, string] => {
      const dealt = alike.filter((_, n) => n % count === i);
      const needed = headers.filter((h) => name === "kernels" || dealt.some((t) => t.own.includes(h)));
      return [`${name}_${i}.cpp`, unit({ headers: needed, kernels: dealt.map((t) => t.rest) })];
    });
  });
  const files = [...own, ["ceilings.cpp", unit({ headers: ["ceilings.h"], kernels: [] })] as const];
  return new Map([
    ["CMakeLists.txt", cmake({ role: program.role, files: files.map(([name]) => name), isas })],
    ["program.cpp", dispatch({ isas, count: kernels.length })],
    ["table.cpp", table({ kernels })],
    ...files,
    ["step3.h", loadText(new URL("../../runtime/step3.h", import.meta.url))],
    ["scalar.h", scalarHeader()],
    ...[...headers, "ceilings.h"].map((name): [string, string] => [name, loadText(new URL(`./${name}`, import.meta.url))]),
  ]);
};
