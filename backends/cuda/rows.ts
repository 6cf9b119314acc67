/**
 * Kernels that go row by row, a block for each row. Loops over all columns of a row are cut into chunks of neighbouring columns, the same for
 * every loop, so that what one leaves for a later one stays in the registers of its thread and memory moves in wide pieces; narrower values
 * (a scale for each group of columns) lie in shared memory.
 */
import type { Op } from "../../ir/graph.ts";
import type { ContextValue, KernelContext, KernelTemplate, Target } from "../backend.ts";
import { planRows, rowBody, tileColumns } from "../c_family.ts";
import { dialect } from "../scalar.ts";
import { Sizes } from "../sizes.ts";
import { loadTemplate } from "../template.ts";

const mostThreads = 1024;
/** of a launch */
const mostBlocks = 2 ** 31;
/** Values that a thread may keep in registers, and bytes of a block in shared memory. */
const mostHeld = 96;
const mostShared = 40 << 10;

/** What planRows gives, of which this file reads these parts. */
interface Plan {
  readonly arguments: readonly { readonly type: string; readonly name: string; readonly index: number; readonly note: string }[];
  readonly pointers: readonly { readonly type: string; readonly name: string; readonly from: string }[];
  readonly setup: readonly string[];
  readonly buffers: readonly { readonly type: string; readonly name: string; readonly size: number }[];
  readonly stages: readonly {
    readonly scalars: readonly string[];
    readonly loops: readonly Loop[];
    readonly reductions: readonly string[];
  }[];
}
interface Loop {
  readonly columns: number;
  readonly lines: readonly string[];
  readonly before: readonly string[];
  readonly group: number;
  readonly tile: number;
}

/** The indices with which a text reads or writes an array. */
const indicesOf = (name: string, lines: readonly string[]): string[] =>
  lines.flatMap((line) => [...line.matchAll(new RegExp(`\\b${name}\\[([^\\]]*)\\]`, "g"))].map((m) => m[1] as string));

const divides = (n: number, ...all: readonly number[]): boolean => all.every((x) => x % n === 0);
const isPowerOfTwo = (n: number): boolean => n > 0 && (n & (n - 1)) === 0;

/** Columns of the widest loop, the threads that share them, and how many neighbours a thread takes at a time. */
const shapeOf = (
  plan: Plan,
): { readonly columns: number; readonly tile: number; readonly threads: number; readonly width: number } => {
  const loops = plan.stages.flatMap((s) => s.loops);
  const columns = Math.max(1, ...loops.map((l) => l.columns));
  const tile = loops.find((l) => l.tile !== 0) ? tileColumns : 0;
  const groups = loops.map((l) => (l.columns === columns && l.group !== 0 ? l.group : columns));
  const span = tile === 0 ? columns : tile;
  // a chunk never straddles two groups
  const width = [8, 4, 2].find((w) => divides(w, columns, ...groups) && span / w >= 32) ?? 1;
  const threads = Math.min(mostThreads, Math.max(32, Math.ceil(span / width / 32) * 32));
  return { columns, tile, threads, width };
};

const contextOf = (plan: Plan, op: Op, target: Target): KernelContext | undefined => {
  const { columns, tile, threads, width } = shapeOf(plan);
  const span = tile === 0 ? columns : tile;
  const loops = plan.stages.flatMap((s) => s.loops);
  const wide = loops.filter((l) => l.columns === columns).flatMap((l) => l.lines);
  const others = [
    ...loops.flatMap((l) => (l.columns === columns ? l.before : [...l.lines, ...l.before])),
    ...plan.setup,
    ...plan.pointers.map((p) => p.from),
    ...plan.stages.flatMap((s) => s.scalars),
  ];
  const reductions = plan.stages.flatMap((s) => s.reductions);
  /** read and written only at the thread's own columns, and reduced only in ways that registers allow */
  const isOwn = (name: string): boolean =>
    indicesOf(name, wide).every((i) => i === "i") &&
    indicesOf(name, wide).length > 0 &&
    indicesOf(name, [...others, ...reductions]).length === 0 &&
    reductions.every((line) => {
      if (line.endsWith(`, ${name});`)) return false; // what groups are reduced to is shared
      const found = new RegExp(`_of_groups\\(${name}, \\d+, (\\d+),`).exec(line);
      const lanes = Number(found?.[1] ?? width) / width;
      return found === null || (isPowerOfTwo(lanes) && lanes <= 32 && threads % lanes === 0);
    });

  const heldBuffers = tile === 0 ? plan.buffers.filter((b) => b.size === columns && isOwn(b.name)) : [];
  const sharedBuffers = plan.buffers.filter((b) => !heldBuffers.includes(b));
  let sharedBytes = 0;
  const shared = sharedBuffers.map((b) => {
    const at = sharedBytes;
    sharedBytes += Math.ceil((b.size * (b.type === "double" ? 8 : 4)) / 16) * 16;
    return { type: b.type, name: b.name, at };
  });
  if (sharedBytes > mostShared) return target.decline(`a row needs ${sharedBytes} bytes of shared memory`);
  const chunks = Math.ceil(span / (threads * width));
  if (heldBuffers.length * chunks * width > mostHeld)
    return target.decline(`a row needs ${heldBuffers.length * chunks * width} registers a thread`);

  // inputs that the wide loops read are loaded once, all at the same time, weights before the predecessor has ended
  const reads = plan.arguments
    .filter((a) => a.name.startsWith("in"))
    .flatMap((a) => {
      const pointer = plan.pointers.find((p) => p.name === `${a.name}_row`);
      const name = pointer?.name ?? a.name;
      if (tile !== 0 || !isOwn(name)) return [];
      const isWeight = target.isWeight?.(op.inputs[a.index] as Op["inputs"][number]) ?? false;
      const from = (pointer?.from ?? a.name).replace(new RegExp(`^${a.name}\\b`), `p${a.index}`);
      return [{ type: a.type.replace(/^const /, ""), name, from, early: isWeight && pointer === undefined }];
    });
  const isRead = (name: string): boolean => reads.some((r) => r.name === name);
  const writes = (lines: readonly string[]): ContextValue[] =>
    plan.arguments
      .filter((a) => a.name.startsWith("out"))
      .flatMap((a) => {
        const name = plan.pointers.find((p) => p.name === `${a.name}_row`)?.name ?? a.name;
        return indicesOf(name, lines).includes("i") ? [{ type: a.type, name }] : [];
      });

  return {
    parameters: plan.arguments.map((a) => ({ type: a.type, index: a.index, note: a.note })),
    named: plan.arguments.filter((a) => !isRead(a.name)).map((a) => ({ type: a.type, name: a.name, index: a.index })),
    pointers: plan.pointers.filter((p) => !isRead(p.name)),
    setup: plan.setup,
    early: reads.filter((r) => r.early),
    late: reads.filter((r) => !r.early),
    held: heldBuffers.map((b) => ({ type: b.type, name: b.name })),
    shared,
    sharedBytes,
    columns,
    threads,
    width,
    chunks,
    tile,
    stages: plan.stages.map((s) => ({
      scalars: s.scalars,
      loops: s.loops.map((l) => {
        const isWide = l.columns === columns && columns > 1;
        return {
          wide: isWide,
          columns: l.columns,
          lines: l.lines,
          before: l.before,
          group: l.group,
          writes: isWide ? writes(l.lines) : [],
        };
      }),
      sync: shared.some(
        (b) =>
          indicesOf(
            b.name,
            s.loops.flatMap((l) => l.lines),
          ).length > 0,
      ),
      reductions: s.reductions,
    })),
  };
};

const template = loadTemplate(new URL("./kernels/row.hbs", import.meta.url));

export const rowKernel: KernelTemplate = {
  name: "row",
  match(op, target) {
    const body = rowBody(op);
    const plan = body && planRows(dialect, body, target.decline, new Sizes(target));
    const context = plan && contextOf(plan.context as unknown as Plan, op, target);
    if (plan === undefined || context === undefined) return undefined;
    const [most, tiles] = [plan.context.most as number, plan.context.tiles as number];
    if (most * tiles >= mostBlocks) return target.decline(`as many as ${most} rows`);
    return {
      context: {
        ...context,
        about: plan.about,
        rows: most === 0 ? (plan.context.rows as string) : `fixed(c, ${most}, ${tiles})`,
        usesRow: plan.context.usesRow as boolean,
        sizes: plan.context.sizes as ContextValue,
        count: plan.context.count as string,
        most,
      },
      about: plan.about,
      scratch: 0,
    };
  },
  render: (context, name) => template({ ...context, name }),
};
