/**
 * Kernel templates. The only file that knows Handlebars.
 *
 * A template places what its context holds and computes nothing. Its context is sealed: a name that is missing, undefined, null or NaN
 * is an error that names template, line and name, wherever the name stands: in a mustache, in `#if`, `#unless`, `#each`, `#with`
 * and in the arguments of a partial. Nothing is escaped.
 *
 * What a template may use: `{{name}}`, `{{a.b}}`, `{{../name}}`, `{{@index}}`, `{{@first}}`, `{{@last}}`, `{{@key}}`, block parameters,
 * `#if`, `#unless`, `#each`, `#with`, `else`, comments, `~`, and partials `{{> name argument}}`.
 */

import { existsSync, readFileSync } from "node:fs";
import { dirname, join, relative, sep } from "node:path";
import { fileURLToPath } from "node:url";
import Handlebars from "handlebars";
import type { KernelContext } from "./backend.ts";

export type Template = (context: KernelContext) => string;

const blocks: readonly string[] = ["if", "unless", "each", "with"];

/** Calls to this helper are written into the parsed template around every name; templates cannot spell them. */
const sealHelper = "sealed value";

type Place = { readonly template: string; readonly line: number };

const fail = (at: Place, what: string): never => {
  throw new Error(`template ${at.template}, line ${at.line}: ${what}`);
};

const describe = (value: unknown): string => (value === undefined ? "missing" : Number.isNaN(value) ? "NaN" : String(value));

/** Rewrites every name to a checked one; refuses what the docstring does not list. */
class Seal extends Handlebars.Visitor {
  private readonly template: string;
  readonly partials: Set<string> = new Set();

  constructor(template: string) {
    super();
    this.template = template;
  }

  private at(node: hbs.AST.Node): Place {
    return { template: this.template, line: node.loc.start.line };
  }

  private sealed(path: hbs.AST.Expression, printed: boolean): hbs.AST.SubExpression {
    const loc = path.loc;
    const literal = (value: string): hbs.AST.StringLiteral =>
      ({ type: "StringLiteral", value, original: value, loc }) as hbs.AST.StringLiteral;
    const number = (value: number): hbs.AST.NumberLiteral =>
      ({ type: "NumberLiteral", value, original: value, loc }) as hbs.AST.NumberLiteral;
    return {
      type: "SubExpression",
      path: this.helper(loc),
      params: [
        path,
        literal((path as hbs.AST.PathExpression).original),
        literal(this.template),
        number(loc.start.line),
        number(printed ? 1 : 0),
      ],
      hash: undefined as unknown as hbs.AST.Hash,
      loc,
    } as hbs.AST.SubExpression;
  }

  private helper(loc: hbs.AST.SourceLocation): hbs.AST.PathExpression {
    return {
      type: "PathExpression",
      data: false,
      depth: 0,
      parts: [sealHelper],
      original: sealHelper,
      loc,
    } as hbs.AST.PathExpression;
  }

  private seal(expression: hbs.AST.Expression): hbs.AST.Expression {
    if (expression.type === "PathExpression") return this.sealed(expression, false);
    if (expression.type === "SubExpression")
      return fail(this.at(expression), "a template computes nothing: no calls in parentheses");
    return expression;
  }

  private arguments(node: { params: hbs.AST.Expression[]; hash?: hbs.AST.Hash }): void {
    node.params = node.params.map((p) => this.seal(p));
    for (const pair of node.hash?.pairs ?? []) pair.value = this.seal(pair.value);
  }

  override MustacheStatement(mustache: hbs.AST.MustacheStatement): void {
    if (mustache.path.type !== "PathExpression") fail(this.at(mustache), "only names can be printed");
    const path = mustache.path as hbs.AST.PathExpression;
    if (mustache.params.length > 0 || mustache.hash)
      fail(this.at(mustache), `a template computes nothing: '${path.original}' is called`);
    const sealed = this.sealed(path, true);
    mustache.path = sealed.path as hbs.AST.PathExpression;
    mustache.params = sealed.params;
  }

  override BlockStatement(block: hbs.AST.BlockStatement): void {
    const name = block.path.original as string;
    if (!blocks.includes(name))
      fail(this.at(block), `unknown block '#${name}' (known: ${blocks.map((b) => `#${b}`).join(", ")})`);
    if (block.params.length !== 1) fail(this.at(block), `#${name} takes one name`);
    this.arguments(block);
    super.BlockStatement(block);
  }

  override PartialStatement(partial: hbs.AST.PartialStatement): void {
    if (partial.name.type !== "PathExpression") fail(this.at(partial), "the name of a partial is written out");
    this.partials.add((partial.name as hbs.AST.PathExpression).original);
    this.arguments(partial);
  }

  /** arguments have been sealed where they stand; names inside them are not visited again */
  override SubExpression(_: hbs.AST.SubExpression): void {}
  override PathExpression(_: hbs.AST.PathExpression): void {}
  override Hash(_: hbs.AST.Hash): void {}

  override PartialBlockStatement(block: hbs.AST.PartialBlockStatement): void {
    fail(this.at(block), "no partial blocks");
  }
  override DecoratorBlock(block: hbs.AST.DecoratorBlock): void {
    fail(this.at(block), "no inline partials");
  }
  override Decorator(decorator: hbs.AST.Decorator): void {
    fail(this.at(decorator), "no decorators");
  }
}

const helpers = {
  [sealHelper](value: unknown, name: string, template: string, line: number, printed: number): unknown {
    const at = { template, line };
    if (value === undefined || value === null || Number.isNaN(value)) fail(at, `'${name}' is ${describe(value)}`);
    if (printed === 1 && typeof value === "object")
      fail(at, `'${name}' is ${Array.isArray(value) ? "a list" : "an object"}, not a text or a number`);
    return printed === 1 ? String(value) : value; // without escaping Handlebars joins results with +, which would add numbers
  },
};

const parse = (source: string, title: string): hbs.AST.Program => {
  try {
    return Handlebars.parse(source, { srcName: title });
  } catch (error) {
    throw new Error(`template ${title}: ${(error as Error).message}`);
  }
};

/**
 * Compiles a template from its text. `name` is what errors call it; `partial` gives the text of a partial by name.
 * Throws on bad syntax, on anything that computes, and for a partial that is not there.
 */
export const compileTemplate = (
  text: string,
  name: string = "(text)",
  partial?: (name: string) => string | undefined,
): Template => {
  const partials: Record<string, Handlebars.TemplateDelegate> = {};
  const seen = new Set<string>();
  const compile = (source: string, title: string): Handlebars.TemplateDelegate => {
    const ast = parse(source, title);
    const seal = new Seal(title);
    seal.accept(ast);
    for (const p of seal.partials) {
      if (seen.has(p)) continue;
      seen.add(p);
      const found = partial?.(p);
      if (found === undefined) throw new Error(`template ${title}: no partial '${p}'`);
      partials[p] = compile(found, p);
    }
    return Handlebars.compile(ast, { noEscape: true, knownHelpersOnly: true, knownHelpers: { [sealHelper]: true } });
  };
  const main = compile(text, name);
  const options = { helpers, partials, allowProtoPropertiesByDefault: false, allowProtoMethodsByDefault: false };
  return (context) => main(context, options);
};

/**
 * The path of a file that lies beside the sources. The compiled JavaScript is in a folder of its own (`dist/`) and such files are not
 * copied there: what `new URL("./x.hbs", import.meta.url)` names is looked for there and then in the same place under the package's root.
 */
export const sourceFile = (url: URL): string => {
  const path = fileURLToPath(url);
  if (existsSync(path)) return path;
  for (let root = dirname(path); dirname(root) !== root; root = dirname(root)) {
    if (!existsSync(join(root, "package.json"))) continue;
    const [, ...rest] = relative(root, path).split(sep);
    const inSources = join(root, ...rest);
    if (existsSync(inSources)) return inSources;
    break;
  }
  throw new Error(`${path} is missing: the package is not complete`);
};

/** The text of a file that lies beside the sources. */
export const loadText = (url: URL): string => readFileSync(sourceFile(url), "utf8");

/** Compiles a template file; its partials are the files NAME.hbs of the same folder. */
export const loadTemplate = (url: URL): Template => {
  const name = (u: URL): string => decodeURIComponent(u.pathname.split("/").at(-1) as string);
  return compileTemplate(loadText(url), name(url), (partial) => {
    const beside = new URL(`./${partial}.hbs`, url);
    try {
      return loadText(beside);
    } catch {
      return undefined;
    }
  });
};
