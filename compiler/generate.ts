import { spawn } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { UserError } from "../ir/error.ts";
import { readManifest } from "./bundle.ts";
import { buildBundle } from "./native.ts";
import type { Progress } from "./progress.ts";
import { qualify } from "./qualification.ts";
import { type Message, readTokenizer, type TextCodec, textStream } from "./tokenizer.ts";

/** One prompt as JSONL and the command line give it. */
export interface Prompt {
  readonly prompt?: string;
  readonly prompt_ids?: readonly number[];
  readonly messages?: readonly Message[];
  readonly max_tokens?: number;
  readonly temperature?: number;
  readonly top_p?: number;
  readonly seed?: number;
  /** the line could not be read: this prompt fails, the others go on */
  readonly error?: string;
}

export interface RunnerOptions {
  readonly transport: string;
  readonly threads?: number;
  readonly isa?: string;
  readonly strict?: boolean;
  readonly role?: string;
  readonly rank?: number;
  readonly peers?: string;
  readonly logits?: string;
  readonly trace?: string;
}

export interface Completion {
  readonly prompt: number;
  readonly prompt_ids: readonly number[];
  readonly tokens: readonly number[];
  readonly text?: string;
  readonly stop: "eos" | "length" | "error";
  readonly error?: string;
}

/** Times in milliseconds, as step3-run measures them. */
export interface RunStatistics {
  readonly [name: string]: unknown;
}

/** What happens while prompts run. */
export interface Listener {
  text?(prompt: number, piece: string): void;
  done(completion: Completion): void;
}

/** Runs prompts on a bundle. A prompt at fault completes with `stop: "error"`; a failed check or peer is a UserError with exit code 3. */
export const generate = async (
  bundle: string,
  prompts: readonly Prompt[],
  options: RunnerOptions,
  listener: Listener,
  progress: Progress,
): Promise<RunStatistics> => {
  const codec = readTokenizer(bundle);
  const requests = prompts.map((prompt) => request(prompt, codec));
  const answers = requests.map(() => [] as number[]);
  const streams = requests.map(() => (codec ? textStream(codec) : undefined));
  const lines = requests.map((r) => JSON.stringify(r.line));
  return await runNative(bundle, [], lines, options, progress, (event) => {
    const at = event.prompt;
    const line = requests[at]?.line;
    if (line === undefined) return;
    if (event.token !== undefined) {
      answers[at]?.push(event.token);
      const piece = streams[at]?.push(event.token) ?? "";
      if (piece !== "") listener.text?.(at, piece);
      return;
    }
    const rest = streams[at]?.end() ?? "";
    if (rest !== "") listener.text?.(at, rest);
    const tokens = event.tokens ?? answers[at] ?? [];
    const error = requests[at]?.error ?? event.error;
    listener.done({
      prompt: at,
      prompt_ids: line.prompt_ids,
      tokens,
      ...(codec ? { text: codec.decode(tokens) } : {}),
      stop: error === undefined ? (event.stop ?? "error") : "error",
      ...(error === undefined ? {} : { error }),
    });
  });
};

export interface Score {
  /** tokens that were predicted */
  readonly count: number;
  /** sum of negative log likelihoods, nats */
  readonly nll: number;
  readonly perplexity: number;
}

/** Teacher-forced scores of id sequences. Sequences that cannot be scored are UserErrors. */
export const score = async (
  bundle: string,
  sequences: readonly (readonly number[])[],
  options: RunnerOptions,
  progress: Progress,
): Promise<{ total: Score; each: readonly Score[] }> => {
  const each: Score[] = [];
  const lines = sequences.map((ids) => JSON.stringify({ prompt_ids: ids }));
  await runNative(bundle, ["--score"], lines, options, progress, (event) => {
    if (event.error !== undefined) throw new UserError(`sequence ${event.prompt}: ${event.error}`);
    const { nll = 0, count = 0 } = event;
    each[event.prompt] = { count, nll, perplexity: Math.exp(nll / Math.max(count, 1)) };
  });
  const nll = each.reduce((sum, s) => sum + s.nll, 0);
  const count = each.reduce((sum, s) => sum + s.count, 0);
  return { total: { count, nll, perplexity: Math.exp(nll / Math.max(count, 1)) }, each };
};

/** Ids of a text cut into windows of at most `context` tokens, each begun by `bos` when the model has one. */
export const windows = (codec: TextCodec, text: string, context: number, bos: number | undefined): number[][] => {
  const ids = codec.encode(text).filter((id, i) => !(i === 0 && id === bos));
  const room = bos === undefined ? context : context - 1;
  const cut: number[][] = [];
  for (let at = 0; at < ids.length; at += room) cut.push([...(bos === undefined ? [] : [bos]), ...ids.slice(at, at + room)]);
  return cut;
};

interface Request {
  readonly line: Omit<Prompt, "prompt" | "messages" | "error" | "prompt_ids"> & { readonly prompt_ids: readonly number[] };
  readonly error?: string;
}

const request = (prompt: Prompt, codec: TextCodec | undefined): Request => {
  const { prompt: text, prompt_ids, messages, error, ...sampling } = prompt;
  const failed = (why: string): Request => ({ line: { ...sampling, prompt_ids: [] }, error: why });
  if (error !== undefined) return failed(error);
  const given = [text, prompt_ids, messages].filter((x) => x !== undefined).length;
  if (given !== 1) return failed('give exactly one of "prompt", "prompt_ids" and "messages"');
  if (prompt_ids !== undefined) return { line: { ...sampling, prompt_ids } };
  if (codec === undefined)
    return failed("the bundle has no tokenizer.json; give token ids (prompt_ids, --prompt-ids) instead of text");
  try {
    return { line: { ...sampling, prompt_ids: text !== undefined ? codec.encode(text) : codec.chat(messages ?? []) } };
  } catch (failure) {
    if (failure instanceof UserError) return failed(failure.message);
    throw failure;
  }
};

interface RunnerEvent {
  readonly prompt: number;
  readonly token?: number;
  readonly tokens?: readonly number[];
  readonly stop?: "eos" | "length" | "error";
  readonly error?: string;
  readonly nll?: number;
  readonly count?: number;
}

/** Starts step3-run, feeds it lines and hands its events on; its standard error passes through when it fails. */
const runNative = async (
  bundle: string,
  mode: readonly string[],
  lines: readonly string[],
  options: RunnerOptions,
  progress: Progress,
  onEvent: (event: RunnerEvent) => void,
): Promise<RunStatistics> => {
  const manifest = readManifest(bundle);
  const native = await buildBundle(bundle, manifest, progress, options.isa);
  const scratch = mkdtempSync(join(tmpdir(), "step3c-"));
  const statistics = join(scratch, "stats.json");
  const flag = (name: string, value: string | number | undefined): string[] => (value === undefined ? [] : [name, String(value)]);
  const args = [
    ...mode,
    ...flag("--bundle", bundle),
    ...flag("--program-attention", native.attention),
    ...flag("--program-ffn", native.ffn),
    ...flag("--transport", options.transport),
    ...flag("--stats", statistics),
    ...flag("--threads", options.threads),
    ...flag("--isa", options.isa),
    ...flag("--role", options.role),
    ...flag("--rank", options.rank),
    ...flag("--peers", options.peers),
    ...flag("--logits", options.logits),
    ...flag("--trace", options.trace),
    ...(options.strict ? ["--strict"] : []),
  ];
  try {
    const child = spawn(native.runner, args, { stdio: ["pipe", "pipe", "pipe"] });
    const exit = new Promise<{ code: number | null; signal: NodeJS.Signals | null }>((done, fail) => {
      child.on("error", fail);
      child.on("close", (code, signal) => done({ code, signal }));
    });
    const interrupt = (): void => void child.kill("SIGINT");
    process.once("SIGINT", interrupt);
    const complaints: string[] = [];
    child.stderr.on("data", (data: Buffer) => complaints.push(data.toString()));
    child.stdin.on("error", () => {}); // the runner ended early: its exit code says why
    child.stdin.end(lines.map((line) => `${line}\n`).join(""));
    let failure: unknown;
    for await (const line of createInterface({ input: child.stdout })) {
      try {
        if (failure === undefined) onEvent(JSON.parse(line) as RunnerEvent);
      } catch (error) {
        failure = error;
        child.kill("SIGTERM");
      }
    }
    const { code, signal } = await exit;
    process.removeListener("SIGINT", interrupt);
    if (failure !== undefined) throw failure;
    const said = complaints.join("").trim();
    if (code === 2 || code === 3) throw new UserError(said === "" ? `step3-run ended with code ${code}` : said, code);
    if (code === 1 && said !== "") progress.note(said);
    if (signal === "SIGINT") {
      process.exitCode = 130; // the prompts that were not finished have said so
      return {};
    }
    if (code !== 0 && code !== 1) throw new Error(`step3-run ended with ${signal ?? `code ${code}`}: ${said}`);
    const role = manifest.programs.find((p) => p.role === options.role)?.role;
    if (code === 0) qualify(bundle, manifest, "ran", { ...native.shown, ...(role === undefined ? {} : { role }) }, progress);
    return existsSync(statistics) ? (JSON.parse(readFileSync(statistics, "utf8")) as RunStatistics) : {};
  } finally {
    rmSync(scratch, { recursive: true, force: true });
  }
};
