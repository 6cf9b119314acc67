/** What the times of `step3c bench` come to: each kernel, segment and round against the roofline of the machine, as data and as text. */
import { UserError } from "../ir/error.ts";
import type { Costs, KernelCost, Work } from "./costs.ts";
import type { Role } from "./emit.ts";

/** What step3-bench prints of one rank; times are nanoseconds, ceilings bytes or operations a second. */
export interface Measured {
  readonly rank: string;
  readonly role: Role;
  readonly target: string;
  /** 0: not for this device to choose */
  readonly threads: number;
  readonly schedule: string;
  readonly slots: number;
  /** of each slot and sender */
  readonly rows: number;
  /** attention ranks whose rows one launch has */
  readonly senders: number;
  /** tokens that each row attends to; 0: no attention here */
  readonly context: number;
  /** `launch`: nanoseconds of a launch that does nothing; `cached`: of reading 8, 16 or 32 MiB again and again, the best of them. What a program cannot measure is absent. */
  readonly ceilings: { readonly [name in "launch" | "read" | "cached" | KernelCost["unit"]]?: number };
  readonly groups: readonly { readonly kernels: readonly string[]; readonly count: number; readonly time: Time }[];
  readonly round: Time;
  readonly kernels: readonly MeasuredKernel[];
}
interface Time {
  readonly median: number;
  readonly least: number;
  readonly most: number;
}
interface MeasuredKernel {
  readonly name: string;
  /** in a round */
  readonly launches: number;
  /** launches with weights of their own, one after another: what they read keeps caches from helping when it is large */
  readonly distinct: number;
  readonly full: Load;
  readonly half?: Load;
}
interface Load {
  readonly rows: number;
  readonly rowContext: number;
  readonly sequenceContext: number;
  readonly experts: number;
  readonly pairs: number;
  readonly time: Time;
}

/** Times are microseconds, of one launch, segment or round; `floor` and `percent` are null where the program measures no ceilings. */
export interface BenchReport {
  readonly bundle: string;
  readonly model: string;
  readonly sides: readonly Side[];
}
export interface Side extends Omit<Measured, "groups" | "kernels" | "round"> {
  readonly kernels: readonly KernelReport[];
  readonly segments: readonly SegmentReport[];
  readonly round: Against & { readonly kernels: number };
}
interface Against {
  readonly time: number;
  readonly floor: number | null;
  readonly percent: number | null;
}
export interface KernelReport extends Against {
  readonly name: string;
  readonly about: string;
  readonly unit: KernelCost["unit"];
  readonly launches: number;
  readonly least: number;
  readonly most: number;
  readonly bytes: number;
  readonly flops: number;
  /** bytes that launches read before they meet the same again */
  readonly cycle: number;
  /** chosen experts of this rank and choices of them, of kernels whose rows choose */
  readonly experts?: number;
  readonly pairs?: number;
  readonly reason: Reason | null;
}
export interface SegmentReport extends Against {
  readonly kernels: readonly string[];
  /** in a round */
  readonly count: number;
}
/** Why a kernel is below 70 % of its roof, or above it. */
export type Reason = keyof typeof reasons;

export const reasons = {
  "launch-bound": "too little work for a roof: the floor is less than three launches that do nothing",
  latency: "as little work, but it takes longer than five launches that do nothing: steps in it wait for each other",
  "few rows": "half the rows take as long: they do not fill the processor",
  "below memory": "memory could bring its bytes sooner, and nothing above explains it",
  "below products": "its products could be done sooner, and nothing above explains it",
  "from caches": "sooner than memory could: part of what it reads is in a cache",
} as const;

// --- what the times mean ------------------------------------------------------------------------------------------------------

const micro = 1e-3; // of nanoseconds

/** The products that a unit falls back on where the program measures none of its own. */
const peakOf = (ceilings: Measured["ceilings"], unit: KernelCost["unit"]): number | undefined =>
  ceilings[unit] ?? (unit === "fp8" || unit === "int8" ? ceilings.bf16 : undefined) ?? ceilings.f32;

const amount = (work: Work, load: Load, context: number): number =>
  work.base + work.row * load.rows + work.rowContext * context + work.expert * load.experts + work.pair * load.pairs;
const bytesOf = (cost: KernelCost, load: Load): number => amount(cost.bytes, load, load.sequenceContext);
const flopsOf = (cost: KernelCost, load: Load): number => amount(cost.flops, load, load.rowContext);

/** Microseconds that memory and products need at least. */
const floorOf = (
  cost: KernelCost,
  load: Load,
  ceilings: Measured["ceilings"],
): { memory: number; compute: number } | undefined => {
  const peak = peakOf(ceilings, cost.unit);
  if (ceilings.read === undefined || peak === undefined) return undefined;
  return { memory: (bytesOf(cost, load) / ceilings.read) * 1e6, compute: (flopsOf(cost, load) / peak) * 1e6 };
};

const against = (time: number, floor: number | null): Against => ({
  time,
  floor,
  percent: floor === null || time <= 0 ? null : (100 * floor) / time,
});

/** What a rank's times come to. Throws a UserError when costs.json lacks one of its kernels. */
export const sideOf = (measured: Measured, costs: Costs): Side => {
  const { groups, round, kernels: timed, ...rest } = measured;
  const kernels = timed.map((k) => {
    const cost = costs[measured.role]?.[k.name];
    if (cost === undefined)
      throw new UserError(`costs.json: kernel ${k.name} of the ${measured.role} side is missing; compile again`);
    return kernelReport(k, cost, measured.ceilings);
  });
  const floors = new Map(kernels.map((k) => [k.name, k.floor]));
  const floorOfAll = (names: readonly string[]): number | null =>
    names.reduce<number | null>((sum, name) => {
      const floor = floors.get(name) ?? null;
      return sum === null || floor === null ? null : sum + floor;
    }, 0);
  const segments = groups.map((g) => ({
    kernels: g.kernels,
    count: g.count,
    ...against(g.time.median * micro, floorOfAll(g.kernels)),
  }));
  const floor = segments.reduce<number | null>(
    (sum, s) => (sum === null || s.floor === null ? null : sum + s.count * s.floor),
    0,
  );
  return {
    ...rest,
    kernels,
    segments,
    round: { ...against(round.median * micro, floor), kernels: kernels.reduce((sum, k) => sum + k.launches * k.time, 0) },
  };
};

const kernelReport = (k: MeasuredKernel, cost: KernelCost, ceilings: Measured["ceilings"]): KernelReport => {
  const { full } = k;
  const floor = floorOf(cost, full, ceilings);
  const compared = against(full.time.median * micro, floor === undefined ? null : Math.max(floor.memory, floor.compute));
  return {
    name: k.name,
    about: cost.about.split("\n")[0] ?? "",
    unit: cost.unit,
    launches: k.launches,
    ...compared,
    least: full.time.least * micro,
    most: full.time.most * micro,
    bytes: bytesOf(cost, full),
    flops: flopsOf(cost, full),
    cycle: k.distinct * bytesOf(cost, full),
    ...(cost.experts ? { experts: full.experts, pairs: full.pairs } : {}),
    reason: reasonOf(k, cost, ceilings, compared),
  };
};

const reasonOf = (k: MeasuredKernel, cost: KernelCost, ceilings: Measured["ceilings"], { percent }: Against): Reason | null => {
  const floor = floorOf(cost, k.full, ceilings);
  if (percent === null || floor === undefined) return null;
  if (percent >= 70) return percent > 100 && floor.memory > floor.compute ? "from caches" : null;
  const least = Math.max(floor.memory, floor.compute);
  const launch = (ceilings.launch ?? 0) * micro;
  if (least < 3 * launch) return k.full.time.median * micro > 5 * launch ? "latency" : "launch-bound";
  const half = k.half && floorOf(cost, k.half, ceilings);
  if (k.half && half && k.half.time.median > 0.85 * k.full.time.median && Math.max(half.memory, half.compute) < 0.7 * least)
    return "few rows";
  return floor.memory > floor.compute ? "below memory" : "below products";
};

// --- text ---------------------------------------------------------------------------------------------------------------------

const giga = (n: number): string => (n >= 1e11 ? (n / 1e9).toFixed(0) : (n / 1e9).toFixed(1));
export const tera = (n: number): string => (n >= 1e15 ? (n / 1e12).toFixed(0) : (n / 1e12).toPrecision(3));
export const microseconds = (n: number | null): string =>
  n === null ? "-" : n >= 1000 ? n.toFixed(0) : n >= 10 ? n.toFixed(1) : n.toFixed(2);
export const percentText = (n: number | null): string => (n === null ? "-" : n.toFixed(n < 10 ? 1 : 0));

/** `reads 30.4 GB/s (from caches 103); products f32 0.193 TFLOP/s; a launch that does nothing 0.75 us` */
export const machineText = ({ ceilings: c }: Pick<Measured, "ceilings">): string => {
  const units = (["f32", "bf16", "fp8", "int8"] as const).filter((u) => c[u] !== undefined);
  return [
    c.read === undefined
      ? "its program measures no ceilings"
      : `reads ${giga(c.read)} GB/s${c.cached === undefined ? "" : ` (from caches ${giga(c.cached)})`}`,
    ...(units.length > 0 ? [`products ${units.map((u) => `${u} ${tera(c[u] ?? 0)}`).join(", ")} TFLOP/s`] : []),
    ...(c.launch === undefined ? [] : [`a launch that does nothing ${(c.launch * micro).toPrecision(2)} us`]),
  ].join("; ");
};

/** `attention a0 on cuda: decode, 3 slots of 6 rows, context 512` */
export const sideTitle = (s: Side): string =>
  [
    `${s.role} ${s.rank} on ${s.target}${s.threads > 0 ? ` with ${s.threads} thread${s.threads > 1 ? "s" : ""}` : ""}: ${s.schedule}`,
    `${s.slots} slot${s.slots > 1 ? "s" : ""} of ${s.senders > 1 ? `${s.senders} x ` : ""}${s.rows} row${s.rows > 1 ? "s" : ""}`,
    ...(s.context > 0 ? [`context ${s.context}`] : []),
  ].join(", ");

/** Columns of a table, the first and the last to the left, numbers to the right. */
const table = (rows: readonly (readonly string[])[]): string[] => {
  const widths = (rows[0] ?? []).map((_, i) => Math.max(...rows.map((r) => r[i]?.length ?? 0)));
  const cell = (text: string, i: number): string =>
    i === 0 ? text.padEnd(widths[i] ?? 0) : i === widths.length - 1 ? text : text.padStart(widths[i] ?? 0);
  return rows.map((r) => r.map(cell).join("  ").trimEnd());
};

/** Why, in a word or two, and how many experts were read. */
export const remark = (k: KernelReport): string =>
  [...(k.reason === null ? [] : [k.reason]), ...(k.experts === undefined ? [] : [`${k.experts} experts, ${k.pairs} pairs`])].join(
    "; ",
  );

export const benchText = (report: BenchReport): string => {
  const lines = report.sides.flatMap((side) => [
    sideTitle(side),
    machineText(side),
    "",
    ...table([
      ["kernel", "launches", "us", "GB/s", "TFLOP/s", "floor us", "% of roof", ""],
      ...side.kernels.map((k) => [
        k.name,
        String(k.launches),
        microseconds(k.time),
        giga((k.bytes / k.time) * 1e6),
        k.flops === 0 ? "-" : tera((k.flops / k.time) * 1e6),
        microseconds(k.floor),
        percentText(k.percent),
        remark(k),
      ]),
    ]),
    ...reasonLines(side),
    "",
    ...table([
      ["segment", "a round", "us", "floor us", "% of roof", ""],
      ...side.segments.map((s) => [
        `${s.kernels[0]}${s.kernels.length > 1 ? ` .. ${s.kernels.at(-1)}` : ""}`,
        String(s.count),
        microseconds(s.time),
        microseconds(s.floor),
        percentText(s.percent),
        `${s.kernels.length} kernel${s.kernels.length > 1 ? "s" : ""}`,
      ]),
      [
        "the whole round",
        "1",
        microseconds(side.round.time),
        microseconds(side.round.floor),
        percentText(side.round.percent),
        `its kernels one by one: ${microseconds(side.round.kernels)} us`,
      ],
    ]),
    "",
  ]);
  return `${lines.join("\n")}\n`;
};

/** What the reasons that were given mean. */
export const reasonLines = (side: Side): string[] =>
  (Object.keys(reasons) as Reason[])
    .filter((reason) => side.kernels.some((k) => k.reason === reason))
    .map((reason) => `${reason}: ${reasons[reason]}`);
