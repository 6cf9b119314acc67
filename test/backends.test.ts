import { execFileSync } from "node:child_process";
import { copyFileSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import type { Backend } from "../backends/backend.ts";
import * as entry from "../backends/backend.ts";
import { checkBackend, reportText } from "../backends/conformance.ts";
import { loadBackend } from "../backends/index.ts";
import { emit } from "../compiler/emit.ts";
import { allKnowledge, Builder, tensor, UserError } from "../ir/index.ts";

const root = join(dirname(fileURLToPath(import.meta.url)), "..");
let outside: string;
beforeAll(() => {
  outside = mkdtempSync(join(tmpdir(), "step3c-backends-"));
});
afterAll(() => rmSync(outside, { recursive: true }));

const file = (name: string, text: string): string => {
  const path = join(outside, name);
  mkdirSync(dirname(path), { recursive: true });
  writeFileSync(path, text);
  return path;
};

describe("a copy of backends/null outside the tree", () => {
  let folder: string;
  let loaded: Backend;
  beforeAll(async () => {
    folder = join(outside, "my-chip");
    mkdirSync(folder);
    copyFileSync(join(root, "backends", "null", "index.ts"), join(folder, "index.ts"));
    // what its head tells a vendor to run; types of step3c are erased, and it is not installed here
    const tsc = join(root, "node_modules", ".bin", "tsc");
    execFileSync(tsc, ["--module", "nodenext", "--target", "es2022", "--noCheck", "--ignoreConfig", "index.ts"], { cwd: folder });
    writeFileSync(join(folder, "package.json"), JSON.stringify({ name: "my-chip", type: "module", exports: "./index.js" }));
    loaded = (await loadBackend(folder)).backend;
  });

  test("loads by folder, by file, and by package", async () => {
    expect(loaded).toMatchObject({ name: "null", api: 1, arches: ["any"] });
    expect((await loadBackend(join(folder, "index.js"))).backend).toBe(loaded);
    expect(await loadBackend(`${folder}:any`)).toEqual({ backend: loaded, arch: "any" });
    const user = join(outside, "user");
    mkdirSync(join(user, "node_modules"), { recursive: true });
    execFileSync("ln", ["-s", folder, join(user, "node_modules", "my-chip")]);
    const before = process.cwd();
    process.chdir(user);
    try {
      expect((await loadBackend("my-chip")).backend.name).toBe("null");
    } finally {
      process.chdir(before);
    }
  });

  test("is refused at compile, with everything that it lacks", async () => {
    const b = new Builder("ffn", [{ name: "T", min: 0, max: 8, multiple: 1, source: "host" }]);
    const x = b.input("x", tensor("bf16", ["T", 64]));
    b.place = "ffn0";
    b.at("layers.0.mlp.up_proj");
    const w = b.weight("w", tensor("bf16", [32, 64]), { kind: "tensor", tensor: "w" });
    const up = b.op("linear", [x, w], { to: "f32" });
    b.at("layers.0.mlp");
    b.output(b.op("silu", [up]), "y");
    const graph = b.build();
    const { backend: cpp } = await loadBackend("cpp");
    const sides = { attention: { backend: cpp, arch: "any" }, ffn: { backend: loaded, arch: "any" } };
    expect(() => emit(graph, sides, undefined)).toThrow(UserError);
    let message = "";
    try {
      emit(graph, sides, undefined);
    } catch (error) {
      message = (error as Error).message;
    }
    expect(message).toContain("linear(bf16[T,64], bf16[32,64])");
    expect(message).toContain("any cannot multiply yet");
    expect(message).toContain("layers.0.mlp.up_proj");
    expect(message).toContain("silu(f32[T,32])");
  });

  test("the conformance kit lists the core ops as its to-do list", () => {
    const report = checkBackend(loaded);
    expect(report.ok).toBe(true);
    expect(report.results.every((r) => r.status === "declined")).toBe(true);
    const core = allKnowledge.filter((k) => !k.scalar && !k.expand && !["fused", "dispatch", "collect"].includes(k.name));
    expect(report.lacking).toEqual(core.map((k) => k.name));
    const text = reportText(report);
    expect(text).toMatch(/^backend null, architecture any: 0 of \d+ samples matched, nothing broken\n/);
    expect(text).toContain("to do: attention:");
    expect(JSON.parse(JSON.stringify(report))).toEqual(report);
  });
});

describe("the in-tree backends", () => {
  test("cpp takes every sample of every op", async () => {
    const report = checkBackend((await loadBackend("cpp")).backend);
    expect(report.results.filter((r) => r.status !== "matched")).toEqual([]);
    expect(report.lacking).toEqual([]);
  });

  test("use of the compiler only what the public entry gives", () => {
    const exported = new Set(Object.keys(entry));
    for (const backend of ["cpp", "cuda"])
      for (const name of readdirSync(join(root, "backends", backend)).filter((file) => file.endsWith(".ts")))
        for (const [, names = "", from = ""] of readFileSync(join(root, "backends", backend, name), "utf8").matchAll(
          /import \{([^}]*)\} from "(\.\.\/[^."/]+\.ts)"/g,
        ))
          for (const imported of names.split(",").map((n) => n.trim()))
            if (imported !== "" && !imported.startsWith("type "))
              expect(exported, `${backend}/${name} imports ${imported} from ${from}`).toContain(imported);
  });
});

describe("what is wrong with a backend is said in words", () => {
  const backend = (changes: string): string =>
    `export default { name: "x", api: 1, device: "x", arches: ["one"], dtypes: ["f32"], kernels: [], assemble() {}, ${changes} };`;
  const cases: readonly [what: string, make: () => string, message: string | RegExp][] = [
    ["no such name", () => "nothing-of-this-name", "no backend 'nothing-of-this-name': in the tree are cpp, cuda, null"],
    ["no such folder", () => join(outside, "absent"), /there is no .*absent/],
    ["a folder without a module", () => dirname(file("empty/readme.txt", "")), "has no module to load"],
    ["bad package.json", () => dirname(file("badjson/package.json", "{")), "package.json is not JSON"],
    ["bad syntax", () => file("syntax.mjs", "export default {"), "does not load"],
    ["it throws", () => file("throws.mjs", 'throw new Error("no driver")'), "does not load: no driver"],
    [
      "step3c is not beside it",
      () => file("lonely/index.mjs", 'import { loadTemplate } from "step3c/backend"; loadTemplate();'),
      "imports step3c, which is not installed beside it",
    ],
    ["no default export", () => file("nodefault.mjs", "export const x = 1;"), "its default export is missing"],
    ["no object", () => file("number.mjs", "export default 3;"), "its default export is a number"],
    ["another version", () => file("api.mjs", backend("api: 2")), "'api' must be 1"],
    [
      "no arches, bad dtype",
      () => file("shape.mjs", backend('arches: [], dtypes: ["f31"]')),
      /'arches' must be .*; 'dtypes' must be a list of dtypes/,
    ],
    [
      "a template without render",
      () => file("kernel.mjs", backend('kernels: [{ name: "k", match() {} }]')),
      "'kernels' must be a list of templates",
    ],
    ["no such architecture", () => `${file("arch.mjs", backend(""))}:two`, "backend x has no architecture 'two'; it has one"],
    ["no such architecture in the tree", () => "cpp:sm_90a", "backend cpp has no architecture 'sm_90a'"],
  ];
  for (const [what, make, message] of cases)
    test(what, async () => {
      const error = await loadBackend(make()).then(
        () => undefined,
        (e: unknown) => e,
      );
      expect(error).toBeInstanceOf(UserError);
      expect((error as Error).message).toMatch(message);
      expect((error as Error).message).not.toContain("\n");
    });
});
