/** The loop that takes a Graph through the passes, and everything for finding the pass at fault: dumps, resuming, bisecting, timing. */
import { mkdirSync, renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { UserError } from "../ir/error.ts";
import type { Graph } from "../ir/graph.ts";
import { printGraph } from "../ir/print.ts";
import { verify } from "../ir/verify.ts";

/** A step of the translation, Graph to Graph. It makes a new graph and leaves the one it gets alone. */
export interface Pass {
  readonly name: string;
  /** passes that must stand before this one wherever they are in a list at all */
  readonly after?: readonly string[];
  run(g: Graph, context: PassContext): Graph;
  /** `--explain NAME`: what the pass will do with this graph, and why; undefined when the name is nothing to it */
  explain?(g: Graph, name: string): string | undefined;
}

export interface PassContext {
  /**
   * Asks leave for one application of a rule; false once `--pass-limit` is used up, and then the rule must leave the graph as it is.
   * The graph stays valid whatever the limit is, so that bisecting over it finds the application at fault.
   */
  apply(): boolean;
}

/** Where a dumped graph stands in the list of passes. */
export interface ResumePoint {
  /** the last pass it has been through; `source` for none */
  readonly after: string;
  /** rule applications that were spent up to there */
  readonly applications: number;
}

export interface PassOptions {
  /** print the graph after this pass, or after `all` */
  readonly printAfter?: string | undefined;
  /** write the graph after every pass to DIR/NN-name.step3 */
  readonly dumpTo?: string | undefined;
  readonly stopAfter?: string | undefined;
  readonly skip?: readonly string[] | undefined;
  /** rule applications allowed, over all passes */
  readonly limit?: number | undefined;
  readonly time?: boolean | undefined;
  /** continue after the pass that dumped the graph, see `resumePoint` */
  readonly from?: ResumePoint | undefined;
  /** print what passes will do about this name, and why */
  readonly explain?: string | undefined;
  /** takes everything printed for people; each text ends with a newline */
  readonly print?: ((text: string) => void) | undefined;
}

const header = /^; after (\S+), (\d+) rule applications?$/m;

/** The line at the head of a dump by which `--from` finds its place. */
const headerLine = (point: ResumePoint): string =>
  `; after ${point.after}, ${point.applications} rule application${point.applications === 1 ? "" : "s"}`;

/** Where the graph in a dumped file stands; a file that no dump wrote is the user's error. */
export const resumePoint = (text: string, file: string): ResumePoint => {
  const [, after, applications] = header.exec(text) ?? [];
  if (after === undefined)
    throw new UserError(
      `${file}: does not say after which pass it was dumped; give a file that --dump-to wrote, or compile the graph without --from`,
    );
  return { after, applications: Number(applications) };
};

/** Runs the passes in order, verifying the graph after each; gives the last graph. Errors name the pass, and the op where there is one. */
export const runPasses = (graph: Graph, passes: readonly Pass[], options: PassOptions = {}): Graph => {
  checkOrder(passes);
  checkNames(passes, options);
  const print = options.print ?? ((): void => {});
  let applications = options.from?.applications ?? 0;
  const context: PassContext = {
    apply: () => {
      if (applications >= (options.limit ?? Number.POSITIVE_INFINITY)) return false;
      applications++;
      return true;
    },
  };
  const dump = (g: Graph, index: number, name: string): void => {
    if (options.dumpTo === undefined) return;
    const text = `${headerLine({ after: name, applications })}\n${printGraph(g)}`;
    writeWhole(options.dumpTo, `${String(index).padStart(2, "0")}-${name}.step3`, text);
  };

  verify(graph);
  const first = options.from === undefined ? 0 : 1 + passes.findIndex((p) => p.name === options.from?.after);
  if (options.from === undefined) dump(graph, 0, "source");
  const times: [string, number, number][] = [];
  let g = graph;
  for (const [index, pass] of passes.entries()) {
    if (index < first) continue;
    const skipped = options.skip?.includes(pass.name) ?? false;
    if (!skipped) {
      const explained = options.explain === undefined ? undefined : pass.explain?.(g, options.explain);
      if (explained !== undefined) print(explained);
      const before = applications;
      const started = performance.now();
      const result = pass.run(g, context);
      times.push([pass.name, performance.now() - started, applications - before]);
      if (result !== g) verifyAfter(pass, result);
      g = result;
    }
    dump(g, index + 1, pass.name);
    if (options.printAfter === pass.name || options.printAfter === "all")
      print(`; after ${pass.name}${skipped ? " (skipped)" : ""}\n${printGraph(g)}`);
    if (options.stopAfter === pass.name) break;
  }
  if (options.time) print(timeTable(times));
  return g;
};

/** Two passes of one name, or a pass before one that it must follow, is a fault of whoever made the list. */
const checkOrder = (passes: readonly Pass[]): void => {
  for (const [i, pass] of passes.entries()) {
    if (passes.findIndex((p) => p.name === pass.name) !== i) throw new Error(`pass '${pass.name}' is in the list twice`);
    for (const earlier of pass.after ?? [])
      if (passes.findIndex((p) => p.name === earlier) > i) throw new Error(`pass '${pass.name}' must come after '${earlier}'`);
  }
};

const checkNames = (passes: readonly Pass[], options: PassOptions): void => {
  const names = passes.map((p) => p.name);
  const known = (flag: string, name: string | undefined, also: readonly string[] = []): void => {
    if (name !== undefined && !names.includes(name) && !also.includes(name))
      throw new UserError(`${flag} ${name}: no such pass; the passes are ${[...names, ...also].join(", ")}`, 2);
  };
  known("--print-ir-after", options.printAfter, ["all"]);
  known("--stop-after", options.stopAfter);
  known("--from: a graph after", options.from?.after, ["source"]);
  for (const name of options.skip ?? []) known("--skip-pass", name);
};

/** A graph that a pass broke is the pass's fault, whatever the verifier says of it: the message names pass, op and origin. */
const verifyAfter = (pass: Pass, g: Graph): void => {
  try {
    verify(g);
  } catch (error) {
    throw new Error(`pass '${pass.name}' broke the graph: ${error instanceof Error ? error.message : String(error)}`, {
      cause: error,
    });
  }
};

const timeTable = (times: readonly (readonly [string, number, number])[]): string => {
  const total = times.reduce((sum, [, ms]) => sum + ms, 0);
  const rows = [...times, ["total", total, times.reduce((n, [, , a]) => n + a, 0)] as const];
  return rows
    .map(([name, ms, n]) => `${name.padEnd(12)} ${ms.toFixed(1).padStart(9)} ms ${String(n).padStart(8)} applications\n`)
    .join("");
};

/** A file appears under its name only when it is complete. */
const writeWhole = (folder: string, name: string, text: string): void => {
  const path = join(folder, name);
  try {
    mkdirSync(folder, { recursive: true });
    writeFileSync(`${path}.tmp`, text);
    renameSync(`${path}.tmp`, path);
  } catch (error) {
    throw new UserError(`${path}: cannot be written (${(error as Error).message}); choose another folder`);
  }
};
