/** The patterns in their order: what others are made of comes first. */
import { gelu, silu, softmax } from "./activations.ts";
import { sdpa } from "./attention.ts";
import type { Pattern } from "./look.ts";
import { layerNorm, rmsNorm } from "./norms.ts";
import { rope } from "./rope.ts";
import { topk } from "./routing.ts";

export const patterns: readonly Pattern[] = [softmax, layerNorm, rmsNorm, silu, gelu, rope, sdpa, topk];
