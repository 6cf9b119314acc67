import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { afterEach, describe, expect, test } from "vitest";
import type { KernelContext } from "../backends/backend.ts";
import { compileTemplate, loadTemplate, loadText } from "../backends/template.ts";

const render = (text: string, context: object, partials: Record<string, string> = {}): string =>
  compileTemplate(text, "x.hbs", (name) => partials[name])(context as KernelContext);

describe("what templates do", () => {
  const cases: readonly [what: string, text: string, context: object, result: string, partials?: Record<string, string>][] = [
    ["names and members", "{{a}} {{b.c}} {{xs.length}}", { a: 1, b: { c: "two" }, xs: [1, 2, 3] }, "1 two 3"],
    ["no escaping", "{{a}} {{{a}}} {{#if yes}}{{a}}{{/if}}", { a: "<&\"'>", yes: true }, "<&\"'> <&\"'> <&\"'>"],
    ["numbers side by side are not added", "{{#each xs}}{{@index}}{{this}}{{/each}}", { xs: [5, 6] }, "0516"],
    ["zero, false and the empty text are values", "{{zero}}{{no}}[{{empty}}]", { zero: 0, no: false, empty: "" }, "0false[]"],
    ["if, else if, else", "{{#if a}}a{{else if b}}b{{else}}c{{/if}}", { a: false, b: 0 }, "c"],
    ["unless", "{{#unless a}}no a{{/unless}}", { a: false }, "no a"],
    [
      "each with the outer context",
      "{{#each xs}}{{this}}{{../y}}{{#unless @last}}, {{/unless}}{{/each}}",
      { xs: [1, 2], y: "!" },
      "1!, 2!",
    ],
    ["each over nothing", "{{#each xs}}x{{else}}none{{/each}}", { xs: [] }, "none"],
    ["each over an object", "{{#each o}}{{@key}}={{this}};{{/each}}", { o: { a: 1, b: 2 } }, "a=1;b=2;"],
    ["block parameters", "{{#each xs as |v i|}}{{i}}:{{v.n}} {{/each}}", { xs: [{ n: 7 }, { n: 8 }] }, "0:7 1:8 "],
    ["with", "{{#with a}}{{b}}{{../c}}{{/with}}", { a: { b: 1 }, c: 2 }, "12"],
    ["root", "{{#each xs}}{{@root.y}}{{/each}}", { xs: [0], y: "r" }, "r"],
    ["blocks on lines of their own leave no lines", "a\n  {{#if t}}\n  b\n  {{/if}}\nc\n", { t: true }, "a\n  b\nc\n"],
    ["a partial with its own context", "{{> p x}}", { x: { n: 3 } }, "<3>", { p: "<{{n}}>" }],
    ["a partial with arguments", "{{> p n=x}}", { x: 4 }, "<4>", { p: "<{{n}}>" }],
    ["partials of partials", "{{> p this}}", { n: 5 }, "(<5>)", { p: "({{> q this}})", q: "<{{n}}>" }],
  ];
  for (const [what, text, context, result, partials] of cases)
    test(what, () => expect(render(text, context, partials)).toBe(result));
});

describe("sealed contexts: the error names template, line and name", () => {
  const cases: readonly [what: string, text: string, context: object, message: string, partials?: Record<string, string>][] = [
    ["missing in a mustache", "a\nstruct A{{{n}}};", {}, "template x.hbs, line 2: 'n' is missing"],
    ["missing member", "{{a.b.c}}", { a: {} }, "template x.hbs, line 1: 'a.b.c' is missing"],
    ["missing in #if", "\n\n{{#if a}}{{/if}}", {}, "template x.hbs, line 3: 'a' is missing"],
    ["missing in else if", "{{#if a}}{{else if b}}{{/if}}", { a: false }, "template x.hbs, line 1: 'b' is missing"],
    ["missing in #unless", "{{#unless a}}{{/unless}}", {}, "'a' is missing"],
    ["missing in #each", "{{#each xs}}{{/each}}", {}, "template x.hbs, line 1: 'xs' is missing"],
    ["missing in #with", "{{#with a}}{{/with}}", {}, "'a' is missing"],
    ["missing inside #each", "{{#each xs}}\n{{n}}{{/each}}", { xs: [{ n: 1 }, {}] }, "template x.hbs, line 2: 'n' is missing"],
    ["an outer name is not found inside", "{{#each xs}}{{y}}{{/each}}", { xs: [{}], y: 1 }, "'y' is missing"],
    ["missing block parameter member", "{{#each xs as |v|}}{{v.a}}{{/each}}", { xs: [{}] }, "'v.a' is missing"],
    ["missing context of a partial", "{{> p a}}", {}, "template x.hbs, line 1: 'a' is missing", { p: "" }],
    ["missing argument of a partial", "{{> p n=a}}", {}, "template x.hbs, line 1: 'a' is missing", { p: "" }],
    ["missing inside a partial", "{{> p a}}", { a: {} }, "template p, line 2: 'n' is missing", { p: "\n{{n}}" }],
    ["undefined", "{{a}}", { a: undefined }, "'a' is missing"],
    ["null", "{{a}}", { a: null }, "'a' is null"],
    ["NaN", "{{a}}", { a: Number.NaN }, "'a' is NaN"],
    ["NaN in #if", "{{#if a}}{{/if}}", { a: Number.NaN }, "'a' is NaN"],
    ["a list printed", "{{a}}", { a: [1] }, "'a' is a list, not a text or a number"],
    ["an object printed", "{{a}}", { a: {} }, "'a' is an object, not a text or a number"],
    ["what every object inherits", "{{toString}}{{constructor}}", {}, "'toString' is missing"],
    ["unknown data", "{{@nothing}}", {}, "'@nothing' is missing"],
  ];
  for (const [what, text, context, message, partials] of cases)
    test(what, () => expect(() => render(text, context, partials)).toThrow(message));
});

describe("templates compute nothing", () => {
  const cases: readonly [what: string, text: string, message: string][] = [
    ["a call", "{{lookup a b}}", "a template computes nothing: 'lookup' is called"],
    ["a call as an argument", "\n{{#if (lookup a b)}}{{/if}}", "template x.hbs, line 2: a template computes nothing"],
    ["a helper of Handlebars by name is only a name", "{{log}}", "'log' is missing"],
    ["an unknown block", "{{#list xs}}{{/list}}", "unknown block '#list'"],
    ["a section", "{{#xs}}{{/xs}}", "unknown block '#xs'"],
    ["a literal", '{{"text"}}', "only names can be printed"],
    ["an inline partial", '{{#*inline "p"}}{{/inline}}', "no inline partials"],
    ["a partial block", "{{#> p}}{{/p}}", "no partial blocks"],
    ["a partial chosen by the context", "{{> (lookup a b)}}", "the name of a partial is written out"],
    ["a partial that is not there", "{{> q this}}", "template x.hbs: no partial 'q'"],
    ["bad syntax", "a\n{{b", "template x.hbs: Parse error on line 2"],
  ];
  for (const [what, text, message] of cases) test(what, () => expect(() => render(text, {})).toThrow(message));
});

describe("files", () => {
  const folders: string[] = [];
  const folder = (): string => {
    const made = mkdtempSync(join(tmpdir(), "step3c-template-"));
    folders.push(made);
    return made;
  };
  afterEach(() => {
    for (const f of folders.splice(0)) rmSync(f, { recursive: true });
  });

  test("partials are files of the same folder; errors name the file", () => {
    const f = folder();
    writeFileSync(join(f, "main.hbs"), "{{> part this}}");
    writeFileSync(join(f, "part.hbs"), "[{{n}}]");
    const template = loadTemplate(pathToFileURL(join(f, "main.hbs")));
    expect(template({ n: 1 })).toBe("[1]");
    expect(() => template({})).toThrow("template part, line 1: 'n' is missing");
  });

  test("compiled code finds files in the sources: dist/a/x.hbs is a/x.hbs of the package", () => {
    const f = folder();
    writeFileSync(join(f, "package.json"), "{}");
    mkdirSync(join(f, "a"));
    mkdirSync(join(f, "dist", "a"), { recursive: true });
    writeFileSync(join(f, "a", "x.hbs"), "{{n}}");
    const script = pathToFileURL(join(f, "dist", "a", "index.js"));
    expect(loadTemplate(new URL("./x.hbs", script))({ n: 2 })).toBe("2");
    expect(loadText(new URL("./x.hbs", script))).toBe("{{n}}");
    expect(() => loadText(new URL("./y.hbs", script))).toThrow("y.hbs is missing: the package is not complete");
  });
});
