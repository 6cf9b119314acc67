/**
 * ONNX Runtime in a process of its own, as some models make it abort: it is sent models and inputs, and sends what they give. Optimisations
 * are off, so that every node is computed as it is written.
 */
import type { InferenceSession, Tensor } from "onnxruntime-node";

// its binding to native code does not know the arrays of f16 that Node.js 24 has: without them it takes bits
Reflect.deleteProperty(globalThis, "Float16Array");
const runtime = await import("onnxruntime-node");

export interface Wire {
  readonly type: Tensor.Type;
  readonly dims: readonly number[];
  /** little endian */
  readonly bytes: Uint8Array;
}
export interface Question {
  readonly id: number;
  readonly model: Uint8Array;
  readonly inputs: readonly (readonly [name: string, tensor: Wire])[];
}
export interface Answer {
  readonly id: number;
  readonly error?: string;
  readonly outputs?: readonly (readonly [name: string, tensor: Wire])[];
}

const arrays = {
  float32: Float32Array,
  float64: Float64Array,
  float16: Uint16Array,
  int8: Int8Array,
  uint8: Uint8Array,
  int16: Int16Array,
  uint16: Uint16Array,
  int32: Int32Array,
  uint32: Uint32Array,
  int64: BigInt64Array,
  uint64: BigUint64Array,
  bool: Uint8Array,
} as const;

const tensorOf = ({ type, dims, bytes }: Wire): Tensor => {
  const array = arrays[type as keyof typeof arrays];
  const copy = bytes.slice();
  return new runtime.Tensor(type as "float32", new array(copy.buffer) as Float32Array, dims);
};

const answer = async ({ id, model, inputs }: Question): Promise<Answer> => {
  let session: InferenceSession | undefined;
  try {
    session = await runtime.InferenceSession.create(model.slice(), {
      graphOptimizationLevel: "disabled",
      intraOpNumThreads: 1,
      interOpNumThreads: 1,
      logSeverityLevel: 4,
    });
    const results = await session.run(Object.fromEntries(inputs.map(([name, t]) => [name, tensorOf(t)])));
    const outputs = Object.entries(results).map(([name, t]) => {
      const data = t.data as Float32Array;
      const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
      return [name, { type: t.type, dims: t.dims, bytes: bytes.slice() }] as const;
    });
    return { id, outputs };
  } catch (error) {
    return { id, error: (error as Error).message };
  } finally {
    await session?.release();
  }
};

let queue: Promise<void> = Promise.resolve();
process.on("message", (question: Question) => {
  queue = queue.then(async () => {
    process.send?.(await answer(question));
  });
});
