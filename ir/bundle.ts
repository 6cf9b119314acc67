import type { DimSymbol } from "./dim.ts";
import type { DType } from "./type.ts";

/** `manifest.json`: what a bundle is, for people and for the runtime. */
export interface Manifest {
  readonly format: 1;
  readonly step3c: string;
  readonly model: ModelFacts;
  /** SHA-256 of the source: configuration, weight names, shapes and bytes (or the seed that stands for them) */
  readonly source: string;
  /** SHA-256 of the canonical JSON of the wire contract */
  readonly wire: string;
  readonly precision: { readonly weights: "bf16" | "fp8" | "int8" | "none"; readonly kv: "bf16" | "fp8" | "int8" | "none" };
  readonly attention: number;
  readonly ffn: number;
  readonly split: string;
  readonly microBatches: number;
  /** sequences in flight on one attention rank */
  readonly maxBatch: number;
  readonly maxContext: number;
  readonly symbols: readonly DimSymbol[];
  readonly programs: readonly ProgramFacts[];
  /** names of the schedules; each has schedule-NAME.json and certificate-NAME.json */
  readonly schedules: readonly string[];
  readonly kv?: KvFacts;
  readonly weights: readonly WeightsFile[];
  readonly memory: readonly MemoryReport[];
}

/** What the text side of the runtime needs to know of a model; absent fields do not apply (an ONNX graph has no vocabulary). */
export interface ModelFacts {
  readonly name: string;
  readonly vocabulary?: number;
  readonly bos?: number;
  readonly eos?: readonly number[];
  /** token ids the text model cannot take, and why (`image token: this bundle has no vision tower`) */
  readonly refused?: readonly { readonly id: number; readonly why: string }[];
  readonly layers?: number;
  /** of an ONNX model: its names for inputs and outputs, by the graph's, where they differ */
  readonly names?: Readonly<Record<string, string>>;
}

export interface ProgramFacts {
  readonly role: "attention" | "ffn";
  readonly target: string;
  /** runtime device driver that runs it: runtime/devices/NAME */
  readonly device: string;
  readonly kernels: readonly KernelFacts[];
}

/** One kernel of a program. Layers whose kernels have equal text share one. */
export interface KernelFacts {
  readonly name: string;
  /** what it does, for reports: the op and the shape */
  readonly about: string;
  readonly scratch: number;
}

/** Page geometry of the KV cache, from the attention backend. Page 0 is zero and never allocated. */
export interface KvFacts {
  readonly pageTokens: number;
  readonly pages: number;
  readonly pageBytes: number;
}

export interface WeightsFile {
  readonly rank: string;
  /** path in the bundle; absent for a bundle without weights, whose weights are drawn from `seed` */
  readonly file?: string;
  readonly seed?: number;
  readonly bytes: number;
}

/** Bytes a rank needs, by use. */
export interface MemoryReport {
  readonly rank: string;
  readonly weights: number;
  readonly kv: number;
  readonly exchange: number;
  readonly scratch: number;
  readonly io: number;
  readonly total: number;
}

/** A tensor in weights/RANK.safetensors is stored packed: dtype U8, shape [bytes]; its metadata entry names what it was. */
export interface PackedWeight {
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly layout: string;
}
