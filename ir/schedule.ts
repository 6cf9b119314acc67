import type { Dim, DimSymbol } from "./dim.ts";
import type { DType } from "./type.ts";

/** A rank's name: `a0`, `a1` ... on the attention side, `f0`, `f1` ... on the FFN side. */
export type RankName = `a${number}` | `f${number}`;

export interface Rank {
  readonly name: RankName;
  readonly role: "attention" | "ffn";
  readonly index: number;
  /** the backend that compiled its program */
  readonly target: string;
}

/** One named tensor of an exchange, per attention rank and slot. `shape[0]` is a multiple of the row symbol, except for the header. */
export interface Field {
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly Dim[];
  /** bytes of one message: the shape at its maximum; never changes within a schedule */
  readonly bytes: number;
  /** of integer fields whose values select weights: their count, so that the runtime can count rows per expert */
  readonly below?: number;
}

/** What one kind of exchange carries: `push` to every FFN rank (the header `head` last), `pull` one set back from each. */
export interface ExchangeType {
  readonly name: string;
  readonly push: readonly Field[];
  readonly pull: readonly Field[];
}

/**
 * A permanent pairing of memory on both sides (contract K1): field `field` of slot `slot` between attention rank `a` and FFN rank `f`.
 * `source` and `target` are buffer names on the sending and on the receiving rank. Keys are in posting order, header last.
 */
export interface Key {
  readonly key: number;
  readonly direction: "a2f" | "f2a";
  readonly a: number;
  readonly f: number;
  readonly slot: number;
  readonly field: string;
  readonly source: string;
  readonly target: string;
  /** which part of the FFN rank's buffer; absent: part `a`. Only a schedule whose ranks stand for others has it (bench/emulate.ts). */
  readonly segment?: number;
}

/**
 * Memory of a rank. Offsets are within the region. Regions:
 * `weights` packed weights and constants; `state` KV pools; `exchange` memory that peers write or read; `scratch` reused by live range;
 * `input` written by the host before a round; `output` read by it after.
 * On an FFN rank, row tensors are [A, max rows, ...]: `segments` = A; elsewhere 1. `bytes` counts all segments.
 */
export interface Buffer {
  readonly name: string;
  readonly region: "weights" | "state" | "exchange" | "scratch" | "input" | "output";
  readonly dtype: DType;
  readonly shape: readonly Dim[];
  readonly segments: number;
  readonly offset: number;
  readonly bytes: number;
  /** the slot it belongs to, where it belongs to one */
  readonly slot?: number;
  /** input and output: the Graph's name; weights: the weight's name; state: the state's name */
  readonly binds?: string;
}

export type Step =
  /** a kernel of this rank's program; `rows`: the buffer of headers that holds the row count of each segment */
  | {
      readonly op: "launch";
      readonly kernel: string;
      readonly in: readonly string[];
      readonly out: readonly string[];
      readonly inout?: readonly string[];
      readonly rows: string;
      readonly slot: number;
    }
  | { readonly op: "post"; readonly slot: number; readonly exchange: number; readonly type: string; readonly after: number }
  | { readonly op: "wait"; readonly slot: number; readonly exchange: number }
  | { readonly op: "accept"; readonly slot: number; readonly exchange: number; readonly from: number }
  | { readonly op: "reply"; readonly slot: number; readonly exchange: number; readonly to: number; readonly after: number };

export interface RankProgram {
  readonly rank: Rank;
  readonly buffers: readonly Buffer[];
  readonly steps: readonly Step[];
  /** bytes of each region */
  readonly memory: Readonly<Record<Buffer["region"], number>>;
}

/**
 * One round, executed once by every rank. `exchange` numbers in steps count the exchanges of one slot from 0 in program order;
 * `sequence` of exchange e of round r is r * exchanges + e + 1, the same on both sides.
 */
export interface Schedule {
  readonly abi: 1;
  readonly name: string;
  /** SHA-256 of the wire contract, hex */
  readonly wire: string;
  readonly slots: number;
  readonly symbols: readonly DimSymbol[];
  /** the type of each exchange of a slot, in order */
  readonly exchanges: readonly string[];
  readonly types: readonly ExchangeType[];
  readonly keys: readonly Key[];
  readonly programs: readonly RankProgram[];
}

/** Bytes of the header, always pushed last. u32 magic, abi, round, schedule, exchange, slot, rows, flags; u64 sequence; rest zero. */
export const headerBytes = 64;
export const headerMagic = 0x43335333;
