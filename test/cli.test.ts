/** Exit codes, messages and output forms of the command line. */
import { cpSync, existsSync, mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { readManifest } from "../compiler/bundle.ts";
import { inspect } from "../compiler/inspect.ts";
import { readNpy, writeNpy } from "../compiler/npy.ts";
import { silent } from "../compiler/progress.ts";
import { qualificationsOf, qualify } from "../compiler/qualification.ts";
import { isPlain, type Outcome, step3c } from "./cli.ts";
import { compileSample, heldout, sample, vocabulary, workspace } from "./sample.ts";

const work = workspace("cli");
afterAll(work.remove);
let bundle = "";
beforeAll(async () => {
  bundle = await compileSample(join(work.path, "tiny.s3"));
});

describe("usage", () => {
  test("--help lists the commands, --version the version", () => {
    const help = step3c(["--help"]);
    expect(help.code).toBe(0);
    for (const command of ["compile", "run", "score", "eval", "check", "inspect"])
      expect(help.out).toMatch(new RegExp(`^  ${command} `, "m"));
    expect(step3c(["--version"]).out.trim()).toMatch(/^\d+\.\d+\.\d+$/);
  });

  test.each([
    [["frobnicate"], /unknown command/],
    [["compile"], /missing required argument/],
    [["compile", sample, "--ranks", "2x1"], /2A1F/],
    [["compile", sample, "--precision", "fp4"], /bf16, fp8, int8/],
    [["compile", sample, "--skip-pass", "nonsense"], /the passes are/],
    [["run", "x.s3", "--prompt", "a", "--prompt-ids", "1"], /exactly one/],
    [["run", "x.s3", "--prompt", "a", "--temperature", "warm"], /number/],
  ])("%j is a usage error", (args, message) => {
    const outcome = step3c(args);
    expect(outcome.code).toBe(2);
    expect(outcome.err).toMatch(message);
    expect(isPlain(outcome)).toBe(true);
  });
});

describe("input at fault", () => {
  test.each([
    [["compile", "/nowhere/at/all"], /\/nowhere\/at\/all.*no such/],
    [["compile", "package.json"], /a configuration has no weights/],
    [["run", "/nowhere.s3", "--prompt", "a"], /no such bundle/],
    [["check", "ir"], /not a complete bundle/],
    [["inspect", "/nowhere"], /no such file/],
    [["compile", sample, "--ffn", "nosuchchip"], /nosuchchip/],
    [["compile", sample, "--attention", "/nowhere/chip"], /\/nowhere\/chip/],
    [["compile", sample, "--ranks", "1A5F", "--ffn-split", "tp"], /block/],
  ])("%j ends with one line", (args, message) => {
    const outcome = step3c(args);
    expect(outcome.err).toMatch(message);
    expect([1, 2]).toContain(outcome.code);
    expect(isPlain(outcome), outcome.err).toBe(true);
  });

  test("image tokens are refused by name", () => {
    const vl = mkdtempSync(join(work.path, "vl-"));
    cpSync(sample, vl, { recursive: true });
    const config = JSON.parse(readFileSync(join(vl, "config.json"), "utf8")) as object;
    writeFileSync(
      join(vl, "config.json"),
      JSON.stringify({ model_type: "step3_vl", image_token_id: 77, bos_token_id: 0, eos_token_id: 1, text_config: config }),
    );
    const out = join(work.path, "vl.s3");
    expect(step3c(["compile", vl, "--out", out]).err).not.toMatch(/step3c:/);
    const outcome = step3c(["run", out, "--prompt-ids", "0,77,5", "--max-tokens", "2"]);
    expect(outcome.code).toBe(1);
    expect(outcome.err).toMatch(/77/);
    expect(outcome.err).toMatch(/image/i);
  });
});

describe("run", () => {
  test("--json: one line a prompt, faulty prompts beside good ones, exit 1", () => {
    const file = join(work.path, "prompts.jsonl");
    writeFileSync(
      file,
      '{"prompt":"And the LORD said"}\n{"prompt": 5}\nnot json\n{"prompt_ids":[0,270,260],"max_tokens":3}\n{"messages":[{"role":"user","content":"Psalm 30"}]}\n',
    );
    const outcome = step3c(["run", bundle, "--prompts", file, "--max-tokens", "6", "--json", "--transport", "local"]);
    expect(outcome.code).toBe(1);
    const lines = outcome.out
      .trim()
      .split("\n")
      .map((line) => JSON.parse(line) as Record<string, unknown>);
    lines.sort((a, b) => Number(a.prompt) - Number(b.prompt));
    expect(lines.map((l) => l.stop)).toEqual(["length", "error", "error", "length", "length"]);
    expect(lines[0]?.tokens).toHaveLength(6);
    expect(typeof lines[0]?.text).toBe("string");
    expect(lines[3]?.prompt_ids).toEqual([0, 270, 260]);
    expect(lines[3]?.tokens).toHaveLength(3);
    expect(String(lines[2]?.error)).toMatch(/prompts\.jsonl:3/);
  });

  test("streamed text is the text of the tokens", () => {
    const args = ["run", bundle, "--prompt", "In the beginning", "--max-tokens", "40", "--transport", "shm"];
    const plain = step3c(args);
    const json = JSON.parse(step3c([...args, "--json"]).out) as { text: string };
    expect(plain.out.replace(/\n$/, "")).toBe(json.text.replace(/\n$/, ""));
    expect(plain.err).toMatch(/time to first token/);
  });

  test("--logits and --trace", () => {
    const [logits, trace] = [join(work.path, "logits.bin"), join(work.path, "trace.json")];
    const ids = (heldout()[0] ?? []).slice(0, 12).join(",");
    const outcome = step3c([
      "run",
      bundle,
      "--prompt-ids",
      ids,
      "--max-tokens",
      "5",
      "--logits",
      logits,
      "--trace",
      trace,
      "--json",
    ]);
    expect(outcome.code, outcome.err).toBe(0);
    expect(readFileSync(logits)).toHaveLength(5 * vocabulary * 4);
    const events = JSON.parse(readFileSync(trace, "utf8")) as { traceEvents?: { ph: string }[] } | { ph: string }[];
    const list = Array.isArray(events) ? events : (events.traceEvents ?? []);
    expect(list.filter((e) => e.ph === "X").length).toBeGreaterThan(50);
  });

  test("a bundle without a tokenizer takes ids and refuses text", () => {
    const bare = mkdtempSync(join(work.path, "bare-"));
    for (const file of [
      "config.json",
      "model-00001-of-00002.safetensors",
      "model-00002-of-00002.safetensors",
      "model.safetensors.index.json",
    ])
      cpSync(join(sample, file), join(bare, file));
    const out = join(work.path, "bare.s3");
    expect(step3c(["compile", bare, "--out", out]).code).toBe(0);
    expect(existsSync(join(out, "tokenizer.json"))).toBe(false);
    expect(inspect(out)).toMatch(/not built here/);
    const outcome = step3c(["run", out, "--prompt-ids", "0,5,6", "--max-tokens", "3"]);
    expect(outcome.code, outcome.err).toBe(0);
    expect(outcome.out.trim().split(",")).toHaveLength(3);
    expect(step3c(["run", out, "--prompt", "text"]).err).toMatch(/no tokenizer\.json/);

    // what that has shown, and nothing else; a bundle compiled again, or of another toolchain, starts anew
    const records = qualificationsOf(out);
    expect(records.map((r) => r.programs.map((p) => [p.role, p.compiled, p.simulated, p.ran, p.numerics_checked]))).toEqual([
      [
        ["attention", true, false, true, false],
        ["ffn", true, false, true, false],
      ],
    ]);
    expect(inspect(out)).toMatch(/attention on cpp \(\w+\): compiled, ran; not simulated, numerics checked/);
    const { toolchain } = records[0] as { toolchain: string };
    const isa = records[0]?.programs[0]?.isa as string;
    qualify(out, readManifest(out), "numerics_checked", { toolchain, isa, role: "ffn" }, silent);
    qualify(out, readManifest(out), "compiled", { toolchain: "another", isa }, silent);
    expect(qualificationsOf(out).map((r) => [r.toolchain, r.programs.map((p) => [p.ran, p.numerics_checked])])).toEqual([
      [
        toolchain,
        [
          [true, false],
          [true, true],
        ],
      ],
      [
        "another",
        [
          [false, false],
          [false, false],
        ],
      ],
    ]);
    writeFileSync(join(out, "COMPLETE"), "0000\n");
    expect(qualificationsOf(out)).toEqual([]);
    expect(inspect(out)).toMatch(/not built here since it was compiled/);
  });
});

describe("eval", () => {
  test("of a bundle: sizes from the inputs, exit 1 with input, axis, size and limit beyond what it was compiled for", () => {
    const [graph, built, out] = ["sizes.step3", "sizes.s3", "sizes.out"].map((f) => join(work.path, f)) as [
      string,
      string,
      string,
    ];
    writeFileSync(graph, "graph g symbol B 1..4 host symbol S 1..6 host input x f32[B,S] y f32[B,S] = neg(x) output y\n");
    expect(step3c(["compile", graph, "--out", built]).code).toBe(0);
    const of = (target: string, rows: number, columns: number, flags: string[] = []): Outcome => {
      const file = join(work.path, "x.npy");
      const data = Float64Array.from({ length: rows * columns }, (_, i) => i);
      writeNpy(file, { kind: "tensor", dtype: "f32", shape: [rows, columns], data });
      return step3c(["eval", target, "--input", `x=${file}`, "--out", out, ...flags]);
    };
    for (const [rows, columns] of [
      [1, 6],
      [4, 1],
    ] as const) {
      const outcome = of(built, rows, columns);
      expect([outcome.code, outcome.out], outcome.err).toEqual([0, `${join(out, "y.npy")}\n`]);
      const y = readNpy(join(out, "y.npy"), "f32");
      expect([y.shape, [...y.data]]).toEqual([[rows, columns], Array.from(y.data, (_, i) => -i)]);
    }
    for (const target of [built, graph]) {
      const beyond = of(target, 5, 1);
      expect([beyond.code, isPlain(beyond)]).toEqual([1, true]);
      expect(beyond.err).toBe("step3c: input 'x' has size 5 on axis 0 (B); B is at least 1 and at most 4\n");
    }
    expect(of(built, 1, 1, ["--target", "reference"])).toMatchObject({
      code: 2,
      err: expect.stringMatching(/compiled for its target/),
    });
    const model = step3c(["eval", bundle, "--out", out]);
    expect([model.code, model.err]).toEqual([1, expect.stringMatching(/the bundle of a language model; run it with step3c run/)]);
  });
});

describe("explanations", () => {
  test("--explain partition gives every op's side, the reason and the bytes that cross", () => {
    const { code, out } = step3c(["compile", sample, "--explain", "partition", "--out", join(work.path, "explained.s3")]);
    expect(code).toBe(0);
    expect(out).toMatch(/bytes/);
    expect(out).toMatch(/attention/);
    expect(out).toMatch(/ffn/);
  });

  test("--emit schedule and --emit kernels print; --print-ir-after prints", () => {
    expect(step3c(["compile", sample, "--emit", "schedule"]).out).toMatch(/post s0/);
    expect(step3c(["compile", sample, "--emit", "kernels"]).out).toMatch(/k0_gather/);
    expect(step3c(["compile", sample, "--emit", "ir", "--print-ir-after", "partition"]).out).toMatch(/after partition/);
  });
});
