#!/usr/bin/env node
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { Command, CommanderError, InvalidArgumentError, Option } from "commander";
import { UserError } from "../ir/error.ts";
import type { BenchOptions } from "./bench.ts";
import type { CompileOptions } from "./compile.ts";
import type { EvalOptions } from "./eval.ts";
import type { Prompt, RunnerOptions } from "./generate.ts";
import { progressOn } from "./progress.ts";
import type { PromptFlags } from "./prompts.ts";
import { version } from "./version.ts";

// Each command loads what it needs when it runs: the parsers alone are hundreds of files, and --help wants none of them.

const positive = (text: string): number => {
  const value = Number(text);
  if (!Number.isInteger(value) || value < 1) throw new InvalidArgumentError("a whole number of at least 1 is needed.");
  return value;
};
const whole = (text: string): number => {
  const value = Number(text);
  if (!Number.isInteger(value) || value < 0) throw new InvalidArgumentError("a whole number of at least 0 is needed.");
  return value;
};
const real = (text: string): number => {
  const value = Number(text);
  if (!Number.isFinite(value) || value < 0 || text.trim() === "")
    throw new InvalidArgumentError("a number of at least 0 is needed.");
  return value;
};
const ids = (text: string): number[] =>
  text.trim() === "" ? [] : text.split(",").map((part) => whole(part.trim() === "" ? "x" : part));
const ranks = (text: string): { attention: number; ffn: number } => {
  const [, a, f] = /^(\d+)A(\d+)F$/i.exec(text) ?? [];
  if (a === undefined || f === undefined || Number(a) < 1)
    throw new InvalidArgumentError("write it as 2A1F: attention ranks, then FFN ranks.");
  return { attention: Number(a), ffn: Number(f) };
};
const collect = (text: string, all: string[]): string[] => [...all, text];
const progress = progressOn(process.stderr);
const limits = (
  text: string,
  all: ReadonlyMap<string, readonly [number, number]> = new Map(),
): ReadonlyMap<string, readonly [number, number]> => {
  const [, name = "", from, to] = /^(\w+)=(?:(\d+)\.\.)?(\d+)$/.exec(text) ?? [];
  const [min, max] = [Number(from ?? 1), Number(to)];
  if (name === "" || min > max) throw new InvalidArgumentError("write it as batch=8 or batch=1..8.");
  return new Map(all).set(name, [min, max]);
};
const program = new Command("step3c")
  .description("Compiles a language model into attention and FFN programs for different chips, and runs them.")
  .version(version())
  .exitOverride()
  .configureHelp({ showGlobalOptions: false });

program
  .command("compile")
  .description("compile a checkpoint directory, an ONNX model or a graph (file.step3) into a bundle")
  .argument("<model>", "Hugging Face directory, config.json (with --no-weights), model.onnx or file.step3")
  .option("--out <dir>", "the bundle (default: the model's name with .s3, in this folder)")
  .option("--attention <target>", "target of the attention side: a built-in name[:arch], a folder or a package", "cpp")
  .option("--ffn <target>", "target of the FFN side", "cpp")
  .addOption(
    new Option("--precision <policy>", "weights and activations of the text linears")
      .choices(["bf16", "fp8", "int8"])
      .default("bf16"),
  )
  .addOption(new Option("--kv <policy>", "KV cache").choices(["bf16", "fp8", "int8"]).default("bf16"))
  .addOption(new Option("--ranks <xAyF>", "attention and FFN ranks").argParser(ranks).default({ attention: 1, ffn: 1 }, "1A1F"))
  .option("--ffn-split <split>", "ep, tp, or epXtpY with X*Y FFN ranks", "ep")
  .option("--micro-batches <n>", "micro-batches in flight", positive, 3)
  .option("--max-batch <n>", "sequences in flight on one attention rank", positive, 16)
  .option("--max-context <n>", "tokens of one sequence (default: the model's, at most 4096)", positive)
  .addOption(
    new Option("--dim <name=max>", "limit of a size that an ONNX model leaves open, or min..max (may be repeated)").argParser(
      limits,
    ),
  )
  .option("--no-weights", "leave the weights out; the runtime draws them from a seed")
  .addOption(new Option("--emit <what>", "print this instead of writing a bundle").choices(["ir", "schedule", "kernels"]))
  .option("--print-ir-after <pass>", "print the graph after a pass, or after all")
  .option("--dump-to <dir>", "write the graph after every pass, one readable file each")
  .option("--from <file>", "start again from a dumped graph, after the pass it was dumped by")
  .option("--stop-after <pass>", "stop after a pass and print the graph")
  .addOption(new Option("--skip-pass <pass>", "leave out a pass (may be repeated)").argParser(collect).default([], "none"))
  .option("--pass-limit <n>", "apply at most n rewrites, to find the one at fault by bisection", whole)
  .option("--time-passes", "print the time of every pass")
  .option(
    "--explain <what>",
    "partition, or the name of a kernel, an op or a value: say what was decided and why, and why patterns are not there",
  )
  .action(async (model: string, options: Omit<CompileOptions, "attentionRanks"> & { out?: string }) => {
    const { compile } = await import("./compile.ts");
    const printed = await compile(model, options, progress);
    process.stdout.write(printed);
  });

const runner = (command: Command): Command =>
  command
    .addOption(new Option("--transport <name>", "how ranks reach each other").choices(["local", "shm", "cuda"]).default("shm"))
    .option("--threads <n>", "threads of each rank (default: the cores shared out)", positive)
    .addOption(new Option("--isa <name>", "instruction set to force").choices(["baseline", "avx2", "avx512", "amx"]))
    .option("--strict", "treat every broken exchange contract as an error that names slot and step")
    .addOption(new Option("--role <role>", "run one rank only").choices(["attention", "ffn"]))
    .option("--rank <n>", "the rank, with --role", whole)
    .option("--peers <file>", "the session file all ranks share, with --role")
    .option(
      "--logits <file>",
      "write logits: little-endian f32 [steps, vocabulary]; one file per prompt (.0, .1 ...) when several",
    )
    .option("--trace <file>", "write Chrome trace events")
    .option("--json", "one JSON line per prompt on standard output");

runner(program.command("run").description("generate text with a bundle").argument("<bundle>"))
  .option("--prompt <text>", "a prompt")
  .option("--prompt-ids <ids>", "a prompt as token ids: 1,2,3", ids)
  .option("--prompts <file>", 'prompts as JSON lines: {"prompt": text}, {"prompt_ids": [..]} or {"messages": [..]}')
  .option("--chat", "put --prompt through the model's chat template as a user message")
  .option("--max-tokens <n>", "tokens to generate for each prompt", positive, 128)
  .option("--temperature <t>", "0 takes the likeliest token", real, 0)
  .option("--top-p <p>", "sample from the likeliest tokens with this total probability", real, 1)
  .option("--seed <n>", "seed of the first prompt; the others follow", whole, 0)
  .action(async (bundle: string, options: RunOptions) => {
    const [{ generate }, { promptsOf, statisticsText }] = await Promise.all([import("./generate.ts"), import("./prompts.ts")]);
    const prompts = promptsOf(options);
    const single = prompts.length === 1;
    let failed = 0;
    let written = "";
    const statistics = await generate(
      bundle,
      prompts,
      options,
      {
        text: (_, piece) => {
          if (!single || options.json) return;
          process.stdout.write(piece);
          written = piece;
        },
        done: (completion) => {
          if (completion.error !== undefined) failed++;
          if (options.json) process.stdout.write(`${JSON.stringify(completion)}\n`);
          else if (completion.error !== undefined) process.stderr.write(`prompt ${completion.prompt}: ${completion.error}\n`);
          else if (!single) process.stdout.write(`[${completion.prompt}] ${completion.text ?? completion.tokens.join(",")}\n`);
          else if (completion.text === undefined) process.stdout.write(`${completion.tokens.join(",")}\n`);
          else if (!written.endsWith("\n")) process.stdout.write("\n");
        },
      },
      progress,
    );
    if (!options.json) process.stderr.write(statisticsText(statistics));
    if (failed > 0) process.exitCode = 1;
  });

runner(program.command("score").description("teacher-forced logits and perplexity of a text").argument("<bundle>"))
  .option("--text <file>", "a text file")
  .option("--ids <file>", "JSON lines with prompt_ids")
  .action(async (bundle: string, options: RunnerOptions & { text?: string; ids?: string; json?: boolean }) => {
    if ((options.text === undefined) === (options.ids === undefined))
      throw new UserError("give one of --text FILE and --ids FILE", 2);
    const { score } = await import("./generate.ts");
    const sequences =
      options.ids !== undefined ? await readSequences(options.ids) : await textWindows(bundle, options.text ?? "");
    const { total, each } = await score(bundle, sequences, options, progress);
    if (options.json) for (const [sequence, s] of each.entries()) process.stdout.write(`${JSON.stringify({ sequence, ...s })}\n`);
    const summary = { tokens: total.count, nll: total.nll, perplexity: total.perplexity };
    process.stdout.write(
      options.json ? `${JSON.stringify(summary)}\n` : `perplexity ${total.perplexity.toFixed(4)} over ${total.count} tokens\n`,
    );
  });

program
  .command("eval")
  .description("run a graph once on given inputs; of a bundle, which is built once, at any sizes that it was compiled for")
  .argument("<graph>", "model.onnx, file.step3, or a bundle of one")
  .addOption(
    new Option("--input <name=file>", "an input, a .npy file (once for each input)").argParser(collect).default([], "none"),
  )
  .requiredOption("--out <dir>", "where to write <output name>.npy")
  .option("--target <target>", "reference (the interpreter) or a target, of a graph (default: cpp)")
  .addOption(new Option("--isa <name>", "instruction set to force").choices(["baseline", "avx2", "avx512", "amx"]))
  .action(async (graph: string, options: EvalOptions) => {
    const { evalGraph } = await import("./eval.ts");
    process.stdout.write(await evalGraph(graph, options, progress));
  });

program
  .command("check")
  .description("verify a bundle: hashes, certificate, and that programs and weights fit the manifest")
  .argument("<bundle>")
  .option("--numbers", "build it too, and compare its kernels on this machine with what the interpreter makes of the same inputs")
  .action(async (bundle: string, options: { numbers?: boolean }) => {
    const { checkBundle } = await import("./check_bundle.ts");
    process.stdout.write(checkBundle(bundle, progress));
    if (!options.numbers) return;
    const { checkNumbers } = await import("./check_numbers.ts");
    process.stdout.write(await checkNumbers(bundle, progress));
  });

program
  .command("inspect")
  .description("say what a bundle, a graph (file.step3) or an ONNX model holds")
  .argument("<bundle | graph | model.onnx>")
  .action(async (path: string) => {
    const { inspect } = await import("./inspect.ts");
    process.stdout.write(inspect(path));
  });

program
  .command("bench")
  .description("time every kernel and segment of a bundle against what this machine can do at best")
  .argument("<bundle>")
  .option("--schedule <name>", "prefill or decode (default: decode)")
  .option("--rows <n>", "rows of each slot (default: as many as it holds)", positive)
  .option("--context <n>", "tokens that each row attends to (default: the bundle's most)", positive)
  .option("--threads <n>", "threads of the rank (default: the cores shared out)", positive)
  .addOption(new Option("--role <role>", "measure one side only").choices(["attention", "ffn"]))
  .option("--json", "the whole report as JSON")
  .option("--html <file>", "write a page with a roofline plot")
  .action(async (bundle: string, options: BenchOptions) => {
    const { bench } = await import("./bench.ts");
    process.stdout.write(await bench(bundle, options, progress));
  });

program
  .command("backend")
  .description("work on a backend")
  .command("check")
  .description("put every sample of every op to a backend: what it does, what it declines and why, what is left to do")
  .argument("<backend>", "a built-in name[:arch], a folder or a package")
  .option("--json", "the whole report as JSON")
  .action(async (spec: string, options: { json?: boolean }) => {
    const [{ loadBackend }, { checkBackend, reportText }] = await Promise.all([
      import("../backends/index.ts"),
      import("../backends/conformance.ts"),
    ]);
    const { backend, arch } = await loadBackend(spec);
    const report = checkBackend(backend, { arch });
    process.stdout.write(options.json ? `${JSON.stringify(report)}\n` : reportText(report));
    if (!report.ok) process.exitCode = 3;
  });

type RunOptions = RunnerOptions & PromptFlags & { readonly json?: boolean };

const readSequences = async (path: string): Promise<number[][]> => {
  const { readPromptFile } = await import("./prompts.ts");
  return readPromptFile(path).map((prompt: Prompt, line: number) => {
    if (prompt.error !== undefined) throw new UserError(prompt.error);
    if (prompt.prompt_ids === undefined) throw new UserError(`${path}:${line + 1}: no prompt_ids`);
    return [...prompt.prompt_ids];
  });
};

const textWindows = async (bundle: string, path: string): Promise<number[][]> => {
  const [{ readManifest }, { readTokenizer }, { windows }] = await Promise.all([
    import("./bundle.ts"),
    import("./tokenizer.ts"),
    import("./generate.ts"),
  ]);
  const manifest = readManifest(bundle);
  const codec = readTokenizer(bundle);
  if (codec === undefined) throw new UserError(`${bundle}: has no tokenizer.json; use --ids FILE`);
  return windows(codec, readText(path), manifest.maxContext, manifest.model.bos);
};

const readText = (path: string): string => {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    throw new UserError(`${path}: ${(error as Error).message}`);
  }
};

/** What happened, for people, and the exit code; our own faults leave a dump with the command to replay. */
const fail = (error: unknown): number => {
  progress.end();
  if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : 2;
  if (error instanceof UserError) {
    process.stderr.write(`step3c: ${error.message}\n`);
    return error.exitCode;
  }
  const dump = join(process.cwd(), `step3c-crash-${process.pid}.txt`);
  const replay = ["step3c", ...process.argv.slice(2)].map((word) => (/^[\w./:=,-]+$/.test(word) ? word : `'${word}'`)).join(" ");
  const story = error instanceof Error ? (error.stack ?? error.message) : String(error);
  try {
    mkdirSync(resolve(dump, ".."), { recursive: true });
    writeFileSync(dump, `step3c ${version()} on node ${process.version}\nreplay: ${replay}\n\n${story}\n`);
    process.stderr.write(
      `step3c: a fault of step3c itself: ${error instanceof Error ? error.message : String(error)}\n  details: ${dump}\n  replay:  ${replay}\n`,
    );
  } catch {
    process.stderr.write(`step3c: a fault of step3c itself; replay: ${replay}\n${story}\n`);
  }
  return 70;
};

process.stdout.on("error", () => process.exit(0)); // the reader of a pipe left
try {
  await program.parseAsync();
} catch (error) {
  process.exitCode = fail(error);
}
