/**
 * Perplexity of the sample on its held-out text for every weight and KV policy, beside PyTorch's in float64 and bf16.
 *   npm run bench:perplexity
 * Prints the table of the README.
 */
import { mkdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { compile, defaultOptions } from "../compiler/compile.ts";
import { score } from "../compiler/generate.ts";
import { packageRoot } from "../compiler/package_root.ts";
import { progressOn } from "../compiler/progress.ts";
import { readPromptFile } from "../compiler/prompts.ts";

const progress = progressOn(process.stderr);
const sample = join(packageRoot(), "samples/step3-tiny");
const work = join(packageRoot(), ".cache/perplexity");
mkdirSync(work, { recursive: true });
process.env.STEP3C_BUILD_DIR ??= join(packageRoot(), ".cache/builds");

const sequences = readPromptFile(join(sample, "heldout.ids.jsonl")).map((p) => p.prompt_ids ?? []);
const reference = JSON.parse(readFileSync(join(sample, "reference/reference.json"), "utf8")) as {
  perplexity: { float64: number; bfloat16: number };
};
const exact = reference.perplexity.float64;
const row = (name: string, kv: string, perplexity: number): string =>
  `| ${name} | ${kv} | ${perplexity.toFixed(4)} | ${((perplexity / exact - 1) * 100).toFixed(3)} % |`;

process.stdout.write("| weights | KV | perplexity | against float64 |\n|---|---|---|---|\n");
process.stdout.write(`${row("PyTorch float64", "-", exact)}\n${row("PyTorch bf16", "bf16", reference.perplexity.bfloat16)}\n`);
for (const precision of ["bf16", "fp8", "int8"] as const)
  for (const kv of ["bf16", "fp8", "int8"] as const) {
    const out = join(work, `${precision}-${kv}.s3`);
    await compile(sample, { ...defaultOptions, out, precision, kv }, progress);
    const { total } = await score(out, sequences, { transport: "local" }, progress);
    process.stdout.write(`${row(precision, kv, total.perplexity)}\n`);
  }
