/** The files of a program: kernels, their table, what chooses among instruction sets, and how CMake builds it all. */

import type { ProgramSource, RenderedKernel } from "../backend.ts";
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

/** In the order in which they include one another. */
const headers: readonly string[] = ["simd.h", "scalar.h", "rows.h", "choose.h", "panels.h", "contract.h", "attention.h"];

const part = (name: string): Template => loadTemplate(new URL(`./program/${name}.hbs`, import.meta.url));
const cmake = part("CMakeLists.txt");
const kernelsHeader = part("kernels.h");
const unit = part("unit.cpp");
const table = part("table.cpp");
const dispatch = part("program.cpp");

/** Files are compiled side by side: a few of them keep several cores busy, many would read the headers again and again. */
const kernelsInUnit = 6;
const mostUnits = 8;

export const assemble = (program: ProgramSource): ReadonlyMap<string, string> => {
  const kernels = program.kernels.map(({ name, text, scratch }) => ({ name, text, scratch }));
  const units: RenderedKernel[][] = [];
  const count = Math.min(mostUnits, Math.max(1, Math.ceil(program.kernels.length / kernelsInUnit)));
  // dealt out in turn, so that kernels of one kind, which take the compiler equally long, spread over the files
  for (const [i, kernel] of program.kernels.entries()) (units[i % count] ??= []).push(kernel);
  const unitFiles = units.map((_, i) => `kernels_${i}.cpp`);
  return new Map([
    ["CMakeLists.txt", cmake({ role: program.role, units: unitFiles, isas })],
    ["program.cpp", dispatch({ isas, count: kernels.length })],
    ["table.cpp", table({ kernels })],
    ["kernels.h", kernelsHeader({ headers })],
    ...units.map((own, i): [string, string] => [
      unitFiles[i] as string,
      unit({ kernels: own.map(({ text }) => ({ text })) }),
    ]),
    ["step3.h", loadText(new URL("../../runtime/step3.h", import.meta.url))],
    ...headers.map((name): [string, string] => [name, loadText(new URL(`./${name}`, import.meta.url))]),
  ]);
};
