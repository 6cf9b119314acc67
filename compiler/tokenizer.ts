import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";
import { UserError } from "../ir/error.ts";

/** Files of a checkpoint that a bundle carries so that text can go in and out. */
export const tokenizerFiles: readonly string[] = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];

export interface Message {
  readonly role: string;
  readonly content: string;
}

/** Text to token ids and back, and the model's chat template. */
export interface TextCodec {
  encode(text: string): number[];
  decode(ids: readonly number[]): string;
  chat(messages: readonly Message[]): number[];
}

/** The codec of a directory with tokenizer.json; undefined when it has none. Bad files: UserError. */
export const readTokenizer = (directory: string): TextCodec | undefined => {
  const path = join(directory, "tokenizer.json");
  if (!existsSync(path)) return undefined;
  const configPath = join(directory, "tokenizer_config.json");
  const config = existsSync(configPath) ? readObject(configPath) : {};
  let tokenizer: Tokenizer;
  try {
    tokenizer = new Tokenizer(readObject(path), config);
  } catch (error) {
    throw new UserError(`${path}: not a tokenizer that can be read (${(error as Error).message}); use --prompt-ids instead`);
  }
  const templatePath = join(directory, "chat_template.jinja");
  const templateText = existsSync(templatePath) ? readFileSync(templatePath, "utf8") : config.chat_template;
  const special = (name: string): string | undefined => {
    const token = config[name];
    return typeof token === "string" ? token : (token as { content?: string } | undefined)?.content;
  };
  return {
    encode: (text) => tokenizer.encode(text).ids,
    decode: (ids) =>
      ids.length === 0 ? "" : tokenizer.decode([...ids], { skip_special_tokens: true, clean_up_tokenization_spaces: false }),
    chat: (messages) => {
      if (typeof templateText !== "string")
        throw new UserError(
          `${configPath}: has no chat_template; give plain text (--prompt) or token ids (--prompt-ids) instead`,
        );
      try {
        const text = new Template(templateText).render({
          messages,
          add_generation_prompt: true,
          bos_token: special("bos_token") ?? "",
          eos_token: special("eos_token") ?? "",
        });
        return tokenizer.encode(text, { add_special_tokens: false }).ids;
      } catch (error) {
        throw new UserError(`${configPath}: its chat_template fails on these messages: ${(error as Error).message}`);
      }
    },
  };
};

const readObject = (path: string): Record<string, unknown> => {
  let value: unknown;
  try {
    value = JSON.parse(readFileSync(path, "utf8"));
  } catch (error) {
    throw new UserError(`${path}: ${(error as Error).message}; fix the file, or remove it and use --prompt-ids`);
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw new UserError(`${path}: not a JSON object`);
  return value as Record<string, unknown>;
};

/** Text of a growing id sequence, given out only when no later id can change it (a character may span tokens). */
export const textStream = (codec: TextCodec): { push(id: number): string; end(): string } => {
  const ids: number[] = [];
  let from = 0;
  let given = "";
  return {
    push: (id) => {
      ids.push(id);
      const text = codec.decode(ids.slice(from));
      if (text.endsWith("\ufffd")) return "";
      const fresh = text.slice(given.length);
      given = text;
      // Decoding restarts at a word, so that a long answer does not cost its square.
      if (ids.length - from > 64 && /\s$/.test(given)) {
        from = ids.length - 1;
        given = codec.decode(ids.slice(from));
      }
      return fresh;
    },
    end: () => codec.decode(ids.slice(from)).slice(given.length),
  };
};
