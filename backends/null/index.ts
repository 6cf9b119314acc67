/**
 * The backend to copy. It declines everything, so a compile for it is refused with the list of what it lacks: that list is your work.
 *
 * How to begin:
 *   1. Copy this folder out of the repository, rename it below, and run `npm init -y && npm install --save-peer step3c` in it.
 *   2. `npx tsc --module nodenext --target es2022 index.ts` makes index.js of this file.
 *   3. `step3c backend check ./your-chip` puts every sample of every op to it and says which are matched and, with a runner, right.
 *   4. Write one KernelTemplate at a time; start with what the report lists under "to do". What you do not do yet you decline.
 *   5. `step3c compile MODEL --ffn ./your-chip --out DIR` once the FFN side's ops are there: experts (`scaled_grouped_linear`, `combine`)
 *      and row kernels (`fused`) are enough to take the FFN of a model, while `cpp` keeps the attention.
 *
 * Everything you may use comes from `step3c/backend`; the in-tree backends use nothing else of the compiler.
 */
import type { Backend, KernelTemplate } from "step3c/backend";

/**
 * A template does one kind of op, or several. `match` looks at the op and computes everything: sizes, layouts, names, and the text of
 * element arithmetic. `render` places that in a text. Equal texts are one kernel, so nothing may depend on the names of values.
 */
const matmul: KernelTemplate = {
  name: "matmul",
  match(op, target) {
    if (op.kind !== "linear") return undefined; // not ours: say nothing
    // Ours, but not like this: say why, for `--explain` and for the error that lists what is lacking.
    return target.decline(`${target.arch} cannot multiply yet`);
    // When it can:
    //   const [x, w] = op.inputs;               // x[R, K] and w[N, K]; R counts rows: T, or c*T for c rows of a token
    //   return {
    //     context: { rows: 1, k: 256, n: 1024 },  // plain data for `render`; no functions, nothing undefined
    //     scratch: 0,                             // bytes of memory for one launch
    //     layouts: { 1: blocked },                // how input 1, a weight, is packed; see Layout
    //     about: "linear bf16 [T,256] x [1024,256]",
    //   };
  },
  /** `loadTemplate(new URL("./kernels/matmul.hbs", import.meta.url))` of step3c/backend gives a function to call here. */
  render: () => "",
};

const backend: Backend = {
  name: "null",
  /** the version of this interface */
  api: 1,
  /** the device driver of the runtime that loads the program: runtime/devices/NAME */
  device: "null",
  /** the first is the default; `--ffn ./your-chip:second` takes another */
  arches: ["any"],
  /** what kernels can read and write; a precision policy that needs another is refused at compile */
  dtypes: ["f32", "bf16", "e4m3", "i8", "i32", "u32", "bool"],
  /** tried in order; the first that matches is used */
  kernels: [matmul],
  /** With attention: the page of a KV cache. Only your own kv_append and attention kernels ever look inside. */
  // kv: (type) => ({ pageTokens: 64, pageBytes: 64 * 2 * type.heads * type.dim * 2 }),
  /** The files of a program: sources and a CMakeLists.txt that builds the target `program`. */
  assemble: (program) =>
    new Map([
      ["CMakeLists.txt", `cmake_minimum_required(VERSION 3.18)\nproject(program)\nadd_custom_target(program)\n`],
      ["kernels.txt", program.kernels.map((k) => `${k.name}: ${k.about}\n${k.text}\n`).join("\n")],
    ]),
};

export default backend;
