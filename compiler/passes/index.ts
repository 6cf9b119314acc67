/** The passes in their order, and why it is this one. */
import type { Pass } from "../pass.ts";
import { dead } from "./dead.ts";
import { fold } from "./fold.ts";
import { fuse } from "./fuse.ts";
import { join, type Runs } from "./join.ts";
import { partition } from "./partition.ts";
import { type Precision, quantise } from "./quantise.ts";
import { recognise } from "./recognise.ts";
import { shard } from "./shard.ts";
import { tokensPass } from "./tokens.ts";

export interface PassesOptions {
  readonly precision: Precision;
  readonly kv: Precision;
  /** FFN ranks; 0 leaves everything on the attention side */
  readonly ffn: number;
  /** `ep`, `tp` or `epXtpY` */
  readonly split: string;
  /** what the targets have kernels for; absent: nothing that is joined */
  readonly runs?: Runs;
}

export const passes = ({ precision, kv, ffn, split, runs }: PassesOptions): readonly Pass[] => [
  // first, so that all that follows sees each thing once
  fold,
  // then, so that all that follows sees ops rather than the pieces that exporters make of them
  recognise,
  // before all that asks for rows of tokens
  tokensPass,
  // before the partition, which weighs the bytes that cross: quantised tokens are smaller, and are quantised before they leave
  quantise({ weights: precision, kv }),
  partition({ ffnRanks: ffn }),
  // needs to know which ops are on the FFN side
  shard({ ranks: ffn, split }),
  // last of those that change what is computed where: a kernel never spans sides or ranks
  fuse,
  // constants that went into kernels
  dead,
  // kernels as large as the targets have them
  join(runs ?? (() => false)),
];
