/**
 * Contractions of activations with weights: linear, scaled_linear and their grouped forms, alone or as the first op of a `fused` whose
 * other ops are elementwise. The arithmetic is in panels.h and contract.h; here sizes, layouts and the epilogue are worked out.
 */
import { type Dim, tokenSymbol } from "../../ir/dim.ts";
import type { Op, Value } from "../../ir/graph.ts";
import { typeText } from "../../ir/type.ts";
import type { ContextValue, KernelPlan, KernelTemplate, Layout, Target } from "../backend.ts";
import { elementStatements, loadElement, rowsOf, storeElement } from "../c_family.ts";
import { aboutContraction, type Contraction, contractionOf, dtypeOf, fitsResult, operandsOf, placeOf } from "../contraction.ts";
import { dialect, storage } from "../scalar.ts";
import { Sizes } from "../sizes.ts";
import { loadTemplate } from "../template.ts";
import { cellOf, cellsOf, panelColumns, panels } from "./layout.ts";

/** Rows that contract.h stores at a time, the counters before them, and what matrix units may read past them. */
const mostStoredRows = 144;
const slackBytes = 16 * 64 + 2048;

interface Epilogue {
  readonly lines: readonly string[];
  /** inputs it reads, by index */
  readonly reads: ReadonlySet<number>;
}

const epilogueOf = (work: Contraction, rows: Dim, columns: number, target: Target): Epilogue | undefined => {
  const sum = work.contraction.outputs[0] as Value;
  const reads = new Set<number>();
  if (!fitsResult(work, rows, columns, target)) return undefined;
  const { lines, spell } = elementStatements(dialect, work.rest, (v) => {
    if (v.name === sum.name) return "sum";
    const index = work.inputs.findIndex((input) => input.name === v.name);
    if (index < 0) throw new Error(`${v.name} is neither an input nor a result of the body`);
    reads.add(index);
    return loadElement(dialect, dtypeOf(v), `in${index}`, placeOf(v, rows, columns) as string);
  });
  const rounded = dtypeOf(sum) === "f32" ? "sums[i]" : `round_${dtypeOf(sum)}(sums[i])`;
  return {
    lines: [
      `const float sum = ${rounded};`,
      ...lines,
      ...work.outputs.map((v, i) => storeElement(dialect, dtypeOf(v), `out${i}`, "at", spell(v))),
    ],
    reads,
  };
};

const match =
  (grouped: boolean) =>
  (op: Op, target: Target): KernelPlan | undefined => {
    const work = contractionOf(op);
    if (work === undefined || work.contraction.kind.includes("grouped") !== grouped) return undefined;
    const { contraction, combines, quantised } = work;
    if (combines.length > 0 || quantised !== undefined) return target.decline("contractions with combine or quantise in them");
    const { names, indexOf, x, w, result, scaled, rows, columns, inner, matrices, choices, rowPerToken } = operandsOf(work);

    const cell = cellOf(dtypeOf(w));
    if (!cell || !cellOf(dtypeOf(x))) return target.decline(`${dtypeOf(x)} x ${dtypeOf(w)} contraction: sums are f32`);
    if (dtypeOf(result) === "f64") return target.decline("contraction to f64: sums are f32");
    const sizes = new Sizes(target);
    const counted = rowsOf(rows);
    if (counted === undefined && grouped) return target.decline(`${rows} rows are not a multiple of the tokens`);
    if (inner === 0 || columns === 0) return target.decline("a contraction without elements");
    const epilogue = epilogueOf(work, rows, columns, target);
    if (epilogue === undefined) return undefined;

    const [block, group] = scaled ? (contraction.attrs.block as readonly [number, number]) : [panelColumns, inner];
    const layout: Layout = panels(dtypeOf(w), group < inner ? group : Number.POSITIVE_INFINITY);

    // on the FFN side nobody knows here how many segments a launch will have
    const most = target.symbols.find((s) => s.name === tokenSymbol)?.max ?? 1;
    const bound = !counted?.perToken
      ? sizes.largest(rows)
      : op.place?.startsWith("ffn")
        ? Number.POSITIVE_INFINITY
        : most * counted.count;
    const storedRows = Math.min(mostStoredRows, Math.ceil(1.5 * bound));
    const widened = storedRows * cellsOf(inner, Math.min(group, inner), 16) * 64 + slackBytes;
    const isWeight = target.isWeight?.(op.inputs[indexOf("w")] as Value) ?? true;

    const sources: ContextValue[] = work.inputs.flatMap((v, index) => {
      const name = names.find((n) => indexOf(n) === index);
      const read = epilogue.reads.has(index);
      const type = storage[dtypeOf(v)];
      const note = typeText(v.type);
      const packed = name === "w" && isWeight;
      return [
        ...(name === undefined
          ? []
          : [
              {
                name,
                index,
                type: packed ? "const uint8_t" : `const ${type}`,
                note: packed ? `${note} in ${layout.name}` : note,
              },
            ]),
        ...(read ? [{ name: `in${index}`, index, type: `const ${type}`, note }] : []),
      ];
    });
    const results: ContextValue[] = work.outputs.map((v, i) => ({
      name: `out${i}`,
      index: work.inputs.length + i,
      type: storage[dtypeOf(v)],
      note: typeText(v.type),
    }));
    const about = aboutContraction(work, x, w);
    return {
      context: {
        about,
        grouped,
        columns,
        inner,
        group: Math.min(group, inner),
        block,
        arguments: [...sources, ...results],
        epilogue: epilogue.lines,
        panel: cell.panel,
        scaled,
        xs: scaled ? "xs" : "nullptr",
        ws: scaled ? "ws" : "nullptr",
        matrix: isWeight ? "w" : "packed",
        packedAt: isWeight ? 0 : widened,
        matrices,
        rows: { perToken: counted?.perToken ?? false, count: sizes.text(counted?.count ?? rows) },
        sizes: sizes.variables,
        choices,
        first: (contraction.attrs.first as number | undefined) ?? 0,
        rowPerToken,
        zeros: contraction.attrs.owned !== true,
      },
      scratch: widened + (isWeight ? 0 : matrices * layout.bytes(columns, inner, dtypeOf(w))),
      layouts: isWeight ? { [indexOf("w")]: layout } : {},
      about,
    };
  };

const template = (name: string, grouped: boolean): KernelTemplate => {
  const text = loadTemplate(new URL(`./kernels/${name}.hbs`, import.meta.url));
  return { name, match: match(grouped), render: (context, symbol) => text({ ...context, name: symbol }) };
};

export const linearKernels: readonly KernelTemplate[] = [template("linear", false), template("grouped_linear", true)];
