/** kv_append joined with what makes its keys and values: rotation and quantisation. */
import type { Graph, Op, Value } from "../../ir/graph.ts";
import { type DType, type KvType, type TensorType, typeText } from "../../ir/type.ts";
import type { KernelTemplate } from "../backend.ts";
import { tokenSymbol } from "../c_family.ts";
import { type Producers, producersOf, recognise } from "../recognise.ts";
import { storage } from "../scalar.ts";
import { loadTemplate } from "../template.ts";

const floats: readonly DType[] = ["bf16", "f16", "f32"];

/** Where keys or values come from: a C++ expression of the kernel's arguments, and what it stands for. */
interface Source {
  readonly text: string;
  readonly steps: readonly string[];
}

/** A body that ends in kv_append, and the arguments that its kernel takes by the names of body values. */
class Append {
  readonly arguments: { readonly name: string; readonly type: string; readonly index: number }[] = [];
  readonly append: Op;
  private readonly body: Graph;
  private readonly makers: Producers;
  private readonly seen: Set<Op> = new Set();

  constructor(body: Graph, append: Op) {
    this.body = body;
    this.append = append;
    this.makers = producersOf(body);
    this.seen.add(append);
  }

  /** the argument that an input of the body is, under the name that it has in the kernel; undefined for other values */
  argument(v: Value, name: string): string | undefined {
    // the state, which the op changes, comes last
    const index = this.body.inputs.filter((i) => i.type.kind === "tensor").findIndex((i) => i.name === v.name);
    if (index < 0) return undefined;
    if (!this.arguments.some((a) => a.name === name))
      this.arguments.push({ name, type: storage[(v.type as TensorType).dtype] as string, index });
    return name;
  }

  /** keys or values: given as they are, or made here */
  source(name: "k" | "v", [data, scales]: readonly Value[], type: KvType): Source | undefined {
    if (data === undefined) return undefined;
    let from = data;
    const steps: string[] = [];
    if (scales !== undefined) {
      const given = this.argument(data, name);
      if (given !== undefined) {
        const scale = this.argument(scales, `${name}_scales`);
        return scale === undefined ? undefined : { text: `Stored<${storage[type.dtype]}>{${given}, ${scale}}`, steps };
      }
      const { shape } = data.type as TensorType;
      const found = floats
        .map((dtype): TensorType => ({ kind: "tensor", dtype, shape }))
        .map((t) => recognise(this.makers, [data, scales], "quantise", [t], { to: type.dtype, group: type.dim })?.[0])
        .find((v) => v !== undefined);
      if (found === undefined) return undefined;
      this.account(data, found);
      this.account(scales, found);
      from = found;
      steps.unshift("quantise");
    }
    const element = storage[(from.type as TensorType).dtype];
    const rotary = this.makers.get(from.name);
    if (rotary?.kind === "rotary") {
      const [x, table, position] = rotary.inputs as readonly [Value, Value, Value];
      const sameRows =
        position.name === this.append.inputs.at(-1)?.name && rotary.attrs.heads === type.heads && rotary.attrs.dim === type.dim;
      const [given, rows] = [this.argument(x, name), this.argument(table, "table")];
      if (!sameRows || type.dim % 64 !== 0 || given === undefined || rows === undefined) return undefined;
      this.seen.add(rotary);
      const positions = (table.type as TensorType).shape[0] as number;
      return { text: `Rotated<${element}>{${given}, ${rows}, ${positions}}`, steps: ["rotary", ...steps] };
    }
    const given = this.argument(from, name);
    return given === undefined ? undefined : { text: `Plain<${element}>{${given}}`, steps };
  }

  /** Marks the ops between a value and what it was made of. */
  private account(v: Value, end: Value): void {
    const op = this.makers.get(v.name);
    if (op === undefined || v.name === end.name) return;
    this.seen.add(op);
    for (const input of op.inputs) this.account(input, end);
  }

  /** whether the kernel does all that the body has */
  get isWhole(): boolean {
    return this.body.ops.every((op) => this.seen.has(op));
  }
}

const template = loadTemplate(new URL("./kernels/append.hbs", import.meta.url));

export const appendKernel: KernelTemplate = {
  name: "append",
  match(op, target) {
    const append = op.body?.ops.at(-1);
    const type = append?.inputs[0]?.type;
    if (op.kind !== "fused" || append?.kind !== "kv_append" || type?.kind !== "kv" || op.outputs.length > 1) return undefined;
    const plan = new Append(op.body as Graph, append);
    const [pages, position] = append.inputs.slice(-2) as [Value, Value];
    if ((position.type as TensorType).shape[0] !== tokenSymbol) return target.decline("kv_append has a row for each token");
    const scaled = append.inputs.length === 7;
    const [k, v] = [
      plan.source("k", append.inputs.slice(1, scaled ? 3 : 2), type),
      plan.source("v", append.inputs.slice(scaled ? 3 : 2, -2), type),
    ];
    const [pagesGiven, positionGiven] = [plan.argument(pages, "pages"), plan.argument(position, "position")];
    if (!k || !v || !pagesGiven || !positionGiven || !plan.isWhole)
      return target.decline("not keys and values that this kernel makes");
    const about = `kv_append to ${typeText(type)} of k ${k.steps.join(" ")}, v ${v.steps.join(" ")}`;
    return {
      context: {
        about,
        arguments: plan.arguments,
        pool: op.inputs.length - 1,
        element: storage[type.dtype],
        heads: type.heads,
        dim: type.dim,
        pages: (pages.type as TensorType).shape[1] as number,
        keys: k.text,
        values: v.text,
      },
      scratch: 0,
      about,
    };
  },
  render: (context, name) => template({ ...context, name }),
};
