import { readFileSync } from "node:fs";
import { UserError } from "../ir/error.ts";
import type { Prompt, RunStatistics } from "./generate.ts";

/** The flags of `step3c run` that say what is asked, and how tokens are chosen. */
export interface PromptFlags {
  readonly prompt?: string;
  readonly promptIds?: readonly number[];
  readonly prompts?: string;
  readonly chat?: boolean;
  readonly maxTokens: number;
  readonly temperature: number;
  readonly topP: number;
  readonly seed: number;
}

/** The prompts of a command line; sampling settings apply where a line of the file does not set its own. */
export const promptsOf = (options: PromptFlags): Prompt[] => {
  const { prompt, promptIds, prompts: file, chat } = options;
  if ([prompt, promptIds, file].filter((given) => given !== undefined).length !== 1)
    throw new UserError("give exactly one of --prompt TEXT, --prompt-ids IDS and --prompts FILE", 2);
  const given: Prompt[] =
    file !== undefined
      ? readPromptFile(file)
      : promptIds !== undefined
        ? [{ prompt_ids: promptIds }]
        : [chat ? { messages: [{ role: "user", content: prompt ?? "" }] } : { prompt: prompt ?? "" }];
  const defaults = { max_tokens: options.maxTokens, temperature: options.temperature, top_p: options.topP };
  return given.map((p, i) => ({ ...defaults, seed: options.seed + i, ...p }));
};

/** JSON lines; a line that is not a prompt becomes a prompt with an error, so that the others go on. */
export const readPromptFile = (path: string): Prompt[] => {
  let text: string;
  try {
    text = readFileSync(path, "utf8");
  } catch (error) {
    throw new UserError(`${path}: ${(error as Error).message}`);
  }
  const lines = text.split("\n");
  return lines.flatMap((line, i) => (line.trim() === "" ? [] : [readPrompt(line, `${path}:${i + 1}`)]));
};

const readPrompt = (line: string, where: string): Prompt => {
  let value: unknown;
  try {
    value = JSON.parse(line);
  } catch (error) {
    return { error: `${where}: ${(error as Error).message}` };
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) return { error: `${where}: not a JSON object` };
  const fields = value as Record<string, unknown>;
  for (const [name, check] of Object.entries(checks)) {
    const given = fields[name];
    if (given !== undefined && !check.is(given)) return { error: `${where}: "${name}" must be ${check.words}` };
  }
  const unknown = Object.keys(fields).find((name) => !(name in checks));
  if (unknown !== undefined) return { error: `${where}: unknown field "${unknown}"; known: ${Object.keys(checks).join(", ")}` };
  return fields as Prompt;
};

const isMessage = (m: unknown): boolean =>
  typeof m === "object" &&
  m !== null &&
  typeof (m as { role?: unknown }).role === "string" &&
  typeof (m as { content?: unknown }).content === "string";
const checks: Readonly<Record<string, { is(value: unknown): boolean; words: string }>> = {
  prompt: { is: (v) => typeof v === "string", words: "a string" },
  prompt_ids: { is: (v) => Array.isArray(v) && v.every((id) => Number.isSafeInteger(id)), words: "a list of integers" },
  messages: { is: (v) => Array.isArray(v) && v.every(isMessage), words: "a list of {role, content}" },
  max_tokens: { is: (v) => Number.isSafeInteger(v) && (v as number) >= 1, words: "an integer of at least 1" },
  temperature: { is: (v) => typeof v === "number" && v >= 0, words: "a number of at least 0" },
  top_p: { is: (v) => typeof v === "number" && v > 0 && v <= 1, words: "a number above 0 and at most 1" },
  seed: {
    is: (v) => Number.isSafeInteger(v) && (v as number) >= 0 && (v as number) < 2 ** 32,
    words: "an integer from 0 to 2^32-1",
  },
};

/** The end-of-run figures for people, a line each: times in ms, lists by their members. */
export const statisticsText = (statistics: RunStatistics): string =>
  Object.entries(statistics)
    .flatMap(([name, value]) => {
      const title = name.replaceAll("_", " ");
      return Array.isArray(value)
        ? value.map((member) => `  ${title}: ${figures(member)}\n`)
        : [`  ${title}: ${figures(value)}\n`];
    })
    .join("");

const figures = (value: unknown): string => {
  if (typeof value === "number") return String(Math.round(value * 100) / 100);
  if (Array.isArray(value)) return value.map(figures).join(" ");
  if (typeof value !== "object" || value === null) return String(value);
  return Object.entries(value)
    .map(([name, member]) => `${name.replaceAll("_", " ")} ${figures(member)}`)
    .join(", ");
};
