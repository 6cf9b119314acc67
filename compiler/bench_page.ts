/** The page of `step3c bench --html`: a roofline plot and the tables, in one file that needs nothing else. */
import {
  type BenchReport,
  type KernelReport,
  machineText,
  microseconds,
  percentText,
  reasonLines,
  remark,
  type Side,
  sideTitle,
  tera,
} from "./bench_report.ts";

const escaped = (text: string): string =>
  text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c] as string);

export const benchPage = (report: BenchReport): string => `<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<title>${escaped(`step3c bench: ${report.model}`)}</title>
<style>
${style}
</style>
</head>
<body>
<h1>${escaped(report.model)}</h1>
${report.sides.map(sidePart).join("\n")}
</body>
</html>
`;

const style = `:root { color-scheme: light dark; --text: #1c1f23; --dim: #68707a; --line: #d5d9de; --back: #ffffff; --roof: #3d4650;
  --f32: #7a6a00; --bf16: #0b6bcb; --fp8: #b3400f; --int8: #6f3fb5; --good: #1a7f37; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ea; --dim: #98a1ab; --line: #3a4048; --back: #15181c; --roof: #b8c0c8;
  --f32: #d6c14a; --bf16: #63aef7; --fp8: #f0905c; --int8: #b896f0; --good: #57c878; --bad: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 1000px; margin: 24px auto; padding: 0 16px; }
h1 { font-size: 22px; } h2 { font-size: 18px; margin-top: 40px; } p { color: var(--dim); margin: 4px 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; margin: 12px 0; font-size: 13px; }
th, td { padding: 3px 8px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--dim); font-weight: 500; } .left { text-align: left; } td.about { white-space: normal; min-width: 240px; color: var(--dim); text-align: left; }
.good { color: var(--good); } .bad { color: var(--bad); }
svg { width: 100%; height: auto; } svg text { fill: var(--dim); font: 11px system-ui, sans-serif; } svg text.number { fill: var(--text); }
.grid { stroke: var(--line); stroke-width: 0.6; } .roof { stroke: var(--roof); stroke-width: 1.6; fill: none; } .cached { stroke-dasharray: 5 4; stroke-width: 1; }
.gap { stroke-width: 1; stroke-opacity: 0.45; } .point { fill-opacity: 0.55; stroke-width: 1; }`;

const sidePart = (side: Side): string => `<section>
<h2>${escaped(sideTitle(side))}</h2>
<p>${escaped(machineText(side))}</p>
${plot(side)}
<div class="wide"><table>
<tr><th>#</th><th class="left">kernel</th><th>launches</th><th>&#181;s</th><th>GB/s</th><th>TFLOP/s</th><th>floor &#181;s</th><th>% of roof</th><th class="left">why</th><th class="left">what</th></tr>
${side.kernels.map(kernelRow).join("\n")}
</table></div>
${reasonLines(side)
  .map((line) => `<p>${escaped(line)}</p>`)
  .join("\n")}
<div class="wide"><table>
<tr><th class="left">segment</th><th>in a round</th><th>&#181;s</th><th>floor &#181;s</th><th>% of roof</th></tr>
${side.segments
  .map(
    (s) =>
      `<tr><td class="about">${escaped(s.kernels.join(", "))}</td><td>${s.count}</td><td>${microseconds(s.time)}</td><td>${microseconds(s.floor)}</td>${percentCell(s.percent)}</tr>`,
  )
  .join("\n")}
<tr><td class="left">the whole round (its kernels one by one: ${microseconds(side.round.kernels)} &#181;s)</td><td>1</td><td>${microseconds(side.round.time)}</td><td>${microseconds(side.round.floor)}</td>${percentCell(side.round.percent)}</tr>
</table></div>
</section>`;

const percentCell = (percent: number | null): string =>
  `<td class="${percent === null ? "" : percent >= 70 ? "good" : "bad"}">${percentText(percent)}</td>`;

const kernelRow = (k: KernelReport, i: number): string =>
  `<tr><td>${i}</td><td class="left">${escaped(k.name)}</td><td>${k.launches}</td><td>${microseconds(k.time)}</td><td>${(k.bytes / k.time / 1e3).toFixed(1)}</td><td>${k.flops === 0 ? "-" : tera((k.flops / k.time) * 1e6)}</td><td>${microseconds(k.floor)}</td>${percentCell(k.percent)}<td class="left">${escaped(remark(k))}</td><td class="about">${escaped(k.about)}</td></tr>`;

// --- the plot: operations a second over operations a byte, both logarithmic ------------------------------------------------------

const units = ["f32", "bf16", "fp8", "int8"] as const;
const [width, height, left, right, top, bottom] = [960, 460, 88, 24, 12, 40];

/** Whole powers of ten that hold all values. */
const decades = (values: readonly number[]): readonly [number, number] => {
  const logs = values.filter((v) => v > 0).map(Math.log10);
  return [Math.floor(Math.min(...logs)), Math.ceil(Math.max(...logs))];
};

/** Neighbours whose labels would cover each other, together; the highest on the page first in each. */
const apart = <T>(all: readonly T[], y: (item: T) => number): [T, ...T[]][] => {
  const groups: [T, ...T[]][] = [];
  for (const item of all.toSorted((p, q) => y(p) - y(q))) {
    const last = groups.at(-1);
    if (last && y(item) - y(last[0]) < 14) last.push(item);
    else groups.push([item]);
  }
  return groups;
};

const plot = (side: Side): string => {
  const { read, cached } = side.ceilings;
  const shown = side.kernels.map((k, i) => ({ k, i })).filter(({ k }) => k.flops > 0 && k.time > 0);
  if (read === undefined || shown.length === 0) return "";
  const peaks = units.flatMap((unit) => (side.ceilings[unit] === undefined ? [] : [{ unit, peak: side.ceilings[unit] }]));
  const highest = Math.max(...peaks.map((p) => p.peak));
  const speed = (k: KernelReport): number => (k.flops / k.time) * 1e6;
  const [x0, x1] = decades([...shown.map(({ k }) => k.flops / k.bytes), highest / read]);
  const [y0, y1] = decades([...shown.map(({ k }) => speed(k)), highest]);
  const x = (v: number): number => left + ((Math.log10(v) - x0) / (x1 - x0)) * (width - left - right);
  const y = (v: number): number => height - bottom - ((Math.log10(v) - y0) / (y1 - y0)) * (height - top - bottom);
  const at = (n: number): string => n.toFixed(1);
  const line = (from: readonly [number, number], to: readonly [number, number], kind: string): string =>
    `<line class="${kind}" x1="${at(from[0])}" y1="${at(from[1])}" x2="${at(to[0])}" y2="${at(to[1])}" />`;
  const label = (px: number, py: number, text: string, anchor = "start"): string =>
    `<text x="${at(px)}" y="${at(py)}" text-anchor="${anchor}">${escaped(text)}</text>`;

  const grid = [
    ...range(x0, x1).flatMap((e) => [
      line([x(10 ** e), top], [x(10 ** e), height - bottom], "grid"),
      label(x(10 ** e), height - bottom + 16, powerText(e), "middle"),
    ]),
    ...range(y0, y1).flatMap((e) => [
      line([left, y(10 ** e)], [width - right, y(10 ** e)], "grid"),
      label(left - 6, y(10 ** e) + 4, rateText(e), "end"),
    ]),
    label((left + width - right) / 2, height - 6, "operations for each byte of memory", "middle"),
  ];
  /** bandwidth as a line, from the left or the bottom edge to the highest peak */
  const slope = (rate: number, kind: string): string => {
    const from = Math.max(10 ** x0, 10 ** y0 / rate);
    const to = Math.min(10 ** x1, highest / rate);
    return from < to ? line([x(from), y(from * rate)], [x(to), y(to * rate)], `roof ${kind}`) : "";
  };
  const roofs = [
    slope(read, ""),
    ...(cached === undefined || cached <= read ? [] : [slope(cached, "cached")]),
    ...peaks.map(({ peak }) => line([x(Math.max(10 ** x0, peak / read)), y(peak)], [width - right, y(peak)], "roof")),
    ...apart(peaks, ({ peak }) => y(peak)).map((near) =>
      label(width - right - 4, y(near[0].peak) - 4, `${near.map((p) => `${p.unit} ${tera(p.peak)}`).join(", ")} TFLOP/s`, "end"),
    ),
  ];
  const round = side.round.kernels;
  const points = shown.map(({ k, i }) => {
    const [px, py] = [x(k.flops / k.bytes), y(speed(k))];
    const radius = 3 + 16 * Math.sqrt((k.launches * k.time) / round);
    const roof = k.floor === null ? "" : line([px, y(speed(k) * (k.time / k.floor))], [px, py], "gap");
    const title = `${k.name}: ${microseconds(k.time)} us, ${percentText(k.percent)} % of its roof, ${((100 * k.launches * k.time) / round).toFixed(1)} % of a round`;
    return `<g style="stroke: var(--${k.unit}); fill: var(--${k.unit})"><title>${escaped(title)}</title>${roof}<circle class="point" cx="${at(px)}" cy="${at(py)}" r="${at(radius)}" /><text class="number" stroke="none" x="${at(px + radius + 2)}" y="${at(py + 4)}">${i}</text></g>`;
  });
  return `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="roofline of the kernels">
${[...grid, ...roofs, ...points].join("\n")}
</svg>
<p>A disc is a kernel (its number in the table, its share of a round the area); the line above it leads to its roof. Colours are what products are made with: ${units
    .filter((unit) => shown.some(({ k }) => k.unit === unit))
    .map((unit) => `<span style="color: var(--${unit})">${unit}</span>`)
    .join(", ")}. Dashed: reading from caches. Kernels that only move bytes are in the table alone.</p>`;
};

const range = (from: number, to: number): number[] => Array.from({ length: to - from + 1 }, (_, i) => from + i);
/** of operations a byte */
const powerText = (e: number): string => (e >= 0 ? String(10 ** e) : (10 ** e).toFixed(-e));
/** of operations a second */
const rateText = (e: number): string => {
  const [unit, exponent] = e >= 12 ? ["T", 12] : e >= 9 ? ["G", 9] : e >= 6 ? ["M", 6] : ["k", 3];
  return `${10 ** (e - exponent)} ${unit}FLOP/s`;
};
