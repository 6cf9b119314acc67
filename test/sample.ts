/** The trained sample, its reference, and bundles of it made once per run of a test file. */
import { mkdirSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type CompileOptions, compile, defaultOptions } from "../compiler/compile.ts";
import { readSafetensors } from "../compiler/frontends/safetensors.ts";
import { type Completion, generate, type Prompt, type RunnerOptions, score } from "../compiler/generate.ts";
import { packageRoot } from "../compiler/package_root.ts";
import { silent } from "../compiler/progress.ts";
import { readPromptFile } from "../compiler/prompts.ts";
import { type Logits, readLogits } from "./logits.ts";

export const sample: string = join(packageRoot(), "samples/step3-tiny");
export const vocabulary = 3072;

/** Native builds are shared between test files, and objects between builds: they are keyed by content. */
export const shareBuilds = (): void => {
  process.env.STEP3C_BUILD_DIR ??= join(packageRoot(), ".cache/builds");
  process.env.STEP3C_OBJECTS ??= join(packageRoot(), ".cache/objects");
  process.env.CMAKE_CXX_COMPILER_LAUNCHER ??= join(packageRoot(), "test/native/reuse_objects.sh");
  mkdirSync(process.env.STEP3C_BUILD_DIR, { recursive: true });
};

export interface Reference {
  readonly perplexity: { readonly float64: number; readonly bfloat16: number };
  readonly greedy: readonly { readonly prompt_ids: number[]; readonly ids: number[]; readonly margin: number[] }[];
}
export const reference = (): Reference => JSON.parse(readFileSync(join(sample, "reference/reference.json"), "utf8")) as Reference;

/** Float64 logits of the first held-out window, rounded to f32. */
export const referenceLogits = (): Logits => {
  const path = join(sample, "reference/logits.safetensors");
  const tensor = readSafetensors(path).tensors.find((t) => t.name === "logits");
  if (!tensor) throw new Error(`${path} has no logits`);
  const bytes = new Uint8Array(readFileSync(path)).slice(tensor.offset, tensor.offset + tensor.bytes);
  return { rows: tensor.shape[0] ?? 0, vocabulary, data: new Float32Array(bytes.buffer) };
};

export const heldout = (): number[][] => readPromptFile(join(sample, "heldout.ids.jsonl")).map((p) => [...(p.prompt_ids ?? [])]);

/** A folder for one test file. */
export const workspace = (name: string): { readonly path: string; remove(): void } => {
  const path = mkdtempSync(join(tmpdir(), `step3c-${name}-`));
  return { path, remove: () => rmSync(path, { recursive: true, force: true }) };
};

export const compileSample = async (out: string, options: Partial<CompileOptions> = {}): Promise<string> => {
  shareBuilds();
  await compile(sample, { ...defaultOptions, ...options, out }, silent);
  return out;
};

export const complete = async (
  bundle: string,
  prompts: readonly Prompt[],
  options: Partial<RunnerOptions> = {},
): Promise<Completion[]> => {
  const done: Completion[] = [];
  await generate(bundle, prompts, { transport: "local", ...options }, { done: (c) => done.push(c) }, silent);
  return done.sort((a, b) => a.prompt - b.prompt);
};

/** Teacher-forced logits of every position of one sequence. */
export const logitsOf = async (bundle: string, ids: readonly number[], options: Partial<RunnerOptions> = {}): Promise<Logits> => {
  const file = join(mkdtempSync(join(tmpdir(), "step3c-logits-")), "logits.bin");
  try {
    await score(bundle, [ids], { transport: "local", ...options, logits: file }, silent);
    return readLogits(file, vocabulary);
  } finally {
    rmSync(join(file, ".."), { recursive: true, force: true });
  }
};
