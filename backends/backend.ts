/**
 * The complete interface between step3c and a target. The in-tree targets use nothing more; a vendor's package exports a Backend as its
 * default export and is named on the command line (`--ffn ./my-chip` or `--ffn my-chip-package`). backends/null is the one to copy.
 */

import type { Dim, DimSymbol } from "../ir/dim.ts";
import type { Graph, Op, Value } from "../ir/graph.ts";
import type { DType, KvType, TensorType } from "../ir/type.ts";

export interface Backend {
  readonly name: string;
  readonly api: 1;
  /** runtime device driver: runtime/devices/NAME; a plugin ships its own under `device()` */
  readonly device: string;
  /** architectures, the default first (`--attention cuda:sm_90a`) */
  readonly arches: readonly string[];
  /** dtypes its kernels can read and write; a policy that needs another is refused at compile */
  readonly dtypes: readonly DType[];
  /** tried in order; the first match is used */
  readonly kernels: readonly KernelTemplate[];
  /** page geometry of a KV cache, when this target runs attention */
  kv?(type: KvType): KvLayout;
  /**
   * The files of the program of one side, paths relative to programs/ROLE: sources and a CMakeLists.txt that builds the target `program`.
   * For `step3c bench` a program may have kernels (in, out) that do what the chip can at best: ceiling_launch nothing, ceiling_read (or
   * _read_2, _read_3: the best counts) `rows` MiB of in, ceiling_f32, _bf16, _fp8, _int8 products, more with more rows; f64 out[0] is the
   * work done, in bytes or operations. in has 1 MiB and more, of the dtype; out has room for 4096 f64. Scratch is 0.
   */
  assemble(program: ProgramSource): ReadonlyMap<string, string>;
}

export interface KernelTemplate {
  readonly name: string;
  /** everything computed: sizes, layouts, names; undefined when this template does not do the op (then `why` may say so) */
  match(op: Op, target: Target): KernelPlan | undefined;
  /** text from a plan's context; places, computes nothing. Equal text is the same kernel. `name` is the symbol to define. */
  render(context: KernelContext, name: string): string;
}

export interface Target {
  readonly arch: string;
  /** maxima of the graph's symbols */
  readonly symbols: readonly DimSymbol[];
  readonly kv?: KvLayout;
  /** whether an input of the op is a weight, which a layout can pack; absent: the operands that a template gives a layout are */
  isWeight?(input: Value): boolean;
  /** why the last template declined, for `--explain` and the error that lists what a target lacks */
  decline(why: string): undefined;
}

/** Values for a template; templates see nothing else. Plain data, no functions. */
export type KernelContext = { readonly [key: string]: ContextValue };
export type ContextValue = string | number | boolean | readonly ContextValue[] | KernelContext;

export interface KernelPlan {
  readonly context: KernelContext;
  /** bytes of scratch for the largest launch, shared by nothing else while the kernel runs */
  readonly scratch: number;
  /** how to store each input that is a weight, by input index; absent: row-major, 64-byte aligned */
  readonly layouts?: Readonly<Record<number, Layout>>;
  /** one line for reports: `linear bf16 [T,256]x[256,1024]` */
  readonly about: string;
  /** when the target's units keep sums or operands in fewer bits than the Graph says: by what part of the largest result one may be off, and why */
  readonly inexact?: Inexact;
}

export interface Inexact {
  readonly ofLargest: number;
  readonly why: string;
}

/**
 * How a weight lies in memory. A weight of shape [..., rows, columns] is packed matrix by matrix; `pack` gets whole rows,
 * `rowBlock` of them or a multiple (fewer at the end of a matrix), and gives bytes that follow those of the rows before.
 */
export interface Layout {
  readonly name: string;
  readonly rowBlock: number;
  /** packed bytes of one matrix */
  bytes(rows: number, columns: number, dtype: DType): number;
  /** `into`, where given, is memory to use for the result again, `bytes(...)` of the tile's long: its old contents mean nothing */
  pack(tile: Tile, into?: Uint8Array): Uint8Array;
}

export interface Tile {
  /** row-major little-endian elements */
  readonly bytes: Uint8Array;
  readonly dtype: DType;
  readonly rows: number;
  readonly columns: number;
}

/** A page holds `pageTokens` tokens of one layer: K, V and their scales, packed as this target's kernels want. */
export interface KvLayout {
  readonly pageTokens: number;
  readonly pageBytes: number;
}

export interface ProgramSource {
  readonly role: "attention" | "ffn";
  readonly arch: string;
  readonly kernels: readonly RenderedKernel[];
}

export interface RenderedKernel {
  /** symbol, such as `k3_linear` */
  readonly name: string;
  readonly about: string;
  readonly text: string;
  /** bytes of scratch for the largest launch, from its plan */
  readonly scratch: number;
}

export {
  type Dialect,
  elementStatements,
  fill,
  isWide,
  loadElement,
  planRows,
  type RowPlan,
  renderScalar,
  rowBody,
  rowsOf,
  type Statements,
  storeElement,
  tileColumns,
  tokenSymbol,
  variableType,
} from "./c_family.ts";
// What in-tree backends are made with, for others too. Types of the IR and what is known of ops come from `step3c/ir`.
export { appendContext, hasTokenRows, pagesOf, stateOf, tensorOf } from "./cache.ts";
export {
  aboutContraction,
  type Contraction,
  contractionOf,
  contractionsOf,
  dtypeOf,
  fitsResult,
  type Operands,
  operandsOf,
  placeOf,
  quantisedColumns,
  stagesOf,
} from "./contraction.ts";
export { perTokenOf, rowsText } from "./nest.ts";
export { type Producers, producersOf, recognise } from "./recognise.ts";
export { dialect, scalarHeader, storage } from "./scalar.ts";
export { type SdpaPlan, sdpaPlan } from "./sdpa.ts";
export { Sizes } from "./sizes.ts";
export { compileTemplate, loadTemplate, loadText, sourceFile, type Template } from "./template.ts";
export { tensorKernels } from "./tensors.ts";
export { tokenKernels } from "./tokens.ts";
export type { Dim, DimSymbol, DType, Graph, KvType, Op, TensorType, Value };
