import { readdirSync, readFileSync } from "node:fs";
import { dirname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";
import { describe, expect, test } from "vitest";

const root = join(dirname(fileURLToPath(import.meta.url)), "..");
const sources = (folder: string): string[] =>
  readdirSync(join(root, folder), { recursive: true, encoding: "utf8" })
    .filter((file) => file.endsWith(".ts"))
    .map((file) => join(folder, file));

const importsOf = (file: string): { specifier: string; target: string }[] =>
  [...readFileSync(join(root, file), "utf8").matchAll(/(?:from|import)\s*\(?\s*"([^"]+)"/g)].map(([, specifier = ""]) => ({
    specifier,
    target: specifier.startsWith(".") ? normalize(join(dirname(file), specifier)) : "",
  }));

/** What a folder may import of ours; the first path component, or a whole path. */
const allowed: Readonly<Record<string, (target: string, from: string) => boolean>> = {
  ir: (target) => target.startsWith("ir/"),
  backends: (target, from) => {
    const own = from.split("/")[1] ?? "";
    return (
      target.startsWith("ir/") ||
      /^backends\/[^/]+\.ts$/.test(target) ||
      target.startsWith(`backends/${own}/`) ||
      from === "backends/index.ts"
    );
  },
  compiler: (target) => /^(ir|compiler)\//.test(target) || /^backends\/[^/]+\.ts$/.test(target),
};

describe("import rule", () => {
  for (const [folder, rule] of Object.entries(allowed))
    test(`${folder} imports only what it may`, () => {
      const files = sources(folder);
      expect(files.length).toBeGreaterThan(0);
      const broken = files.flatMap((file) =>
        importsOf(file)
          .filter(({ target }) => target !== "" && !rule(target, file))
          .map(({ specifier }) => `${file} imports ${specifier}`),
      );
      expect(broken).toEqual([]);
    });

  test("no folder has a name that says nothing", () => {
    const names = ["ir", "compiler", "backends", "runtime", "samples", "test"].flatMap((folder) =>
      readdirSync(join(root, folder), { recursive: true, encoding: "utf8" }),
    );
    expect(names.filter((name) => /(^|\/)(utils?|helpers?|common|misc|core)(\/|$)/.test(name))).toEqual([]);
  });
});
