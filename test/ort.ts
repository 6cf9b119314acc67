/** ONNX Runtime as an oracle: processes that live long, are sent models over a pipe, and are started again when a model takes one down. */
import { type ChildProcess, fork } from "node:child_process";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { packageRoot } from "../compiler/package_root.ts";
import { type DType, decode, encode, type Tensor } from "../ir/index.ts";
import { encodeModel, type MadeModel } from "./onnx_maker.ts";
import type { Answer, Question, Wire } from "./ort_worker.ts";

const types: readonly (readonly [DType, string])[] = [
  ["f32", "float32"],
  ["f64", "float64"],
  ["f16", "float16"],
  ["i8", "int8"],
  ["u8", "uint8"],
  ["i16", "int16"],
  ["u16", "uint16"],
  ["i32", "int32"],
  ["u32", "uint32"],
  ["i64", "int64"],
  ["u64", "uint64"],
  ["bool", "bool"],
];
const toWire = ({ dtype, shape, data }: Tensor): Wire => ({
  type: (types.find(([d]) => d === dtype)?.[1] ?? dtype) as Wire["type"],
  dims: shape,
  bytes: encode(dtype, data),
});
const fromWire = ({ type, dims, bytes }: Wire): Tensor => {
  const dtype = types.find(([, t]) => t === type)?.[0] ?? ("f32" as DType);
  return { kind: "tensor", dtype, shape: [...dims], data: decode(dtype, bytes) };
};

/** Outputs by name, or why there are none. */
export type OrtResult =
  | { readonly outputs: ReadonlyMap<string, Tensor> }
  | { readonly error: string }
  /** the process died of it */
  | { readonly crash: string };

/** How long a model may take before its process is ended, in ms. */
const patience = 20_000;

interface Waiting {
  readonly question: Question;
  readonly done: (result: OrtResult) => void;
}

/** One process; models are answered one after another. */
export class Ort {
  private child: ChildProcess | undefined;
  private readonly waiting: Waiting[] = [];
  private current: Waiting | undefined;
  private timer: NodeJS.Timeout | undefined;
  private next = 0;

  run(m: MadeModel): Promise<OrtResult> {
    return this.runBytes(encodeModel(m), new Map(m.inputs.map((v) => [v.name, v.tensor])));
  }

  runBytes(model: Uint8Array, inputs: ReadonlyMap<string, Tensor>): Promise<OrtResult> {
    return new Promise((done) => {
      const wires = [...inputs].map(([name, t]) => [name, toWire(t)] as const);
      this.waiting.push({ question: { id: this.next++, model, inputs: wires }, done });
      this.pump();
    });
  }

  private pump(): void {
    if (this.current !== undefined) return;
    this.current = this.waiting.shift();
    if (this.current === undefined) return;
    this.child ??= this.start();
    this.timer = setTimeout(() => this.child?.kill("SIGKILL"), patience);
    this.child.send(this.current.question);
  }

  private finish(result: OrtResult): void {
    const { current } = this;
    this.current = undefined;
    clearTimeout(this.timer);
    current?.done(result);
    this.pump();
  }

  private start(): ChildProcess {
    const script = join(packageRoot(), "dist/test/ort_worker.js");
    if (!existsSync(script)) throw new Error(`${script} is not built; run npm run build`);
    const child = fork(script, [], { serialization: "advanced", stdio: ["ignore", "ignore", "ignore", "ipc"] });
    child.on("message", (answer: Answer) => {
      if (answer.id !== this.current?.question.id) return;
      if (answer.outputs === undefined) this.finish({ error: answer.error ?? "" });
      else this.finish({ outputs: new Map(answer.outputs.map(([name, t]) => [name, fromWire(t)])) });
    });
    child.on("exit", (code, signal) => {
      if (child !== this.child) return;
      this.child = undefined;
      if (this.current !== undefined) this.finish({ crash: String(signal ?? code) });
    });
    return child;
  }

  close(): void {
    const { child } = this;
    this.child = undefined;
    child?.kill();
  }
}
