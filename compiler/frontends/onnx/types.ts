/** Data types of ONNX as the graph holds them. */
import { UserError } from "../../../ir/error.ts";
import { type DType, dtypes } from "../../../ir/type.ts";
import type { OnnxType } from "../onnx.ts";

/** Types narrower than a byte are held in bytes. */
const held: Readonly<Record<string, DType>> = { i4: "i8", u4: "u8", i2: "i8", u2: "u8" };

/** The type itself where it is narrower than a byte. */
export const narrowOf = (dtype: string | undefined): string | undefined =>
  dtype !== undefined && dtype in held ? dtype : undefined;

export const irDType = (dtype: string | undefined): DType => {
  const found = dtypes.find((d) => d === dtype) ?? held[dtype ?? ""];
  if (found === undefined) throw new UserError(`elements of type ${dtype ?? "that is not known"} are not supported`);
  return found;
};

/** The data type of an input or output, which must be a tensor; `place` is where it is. */
export const onnxDType = (type: OnnxType, place: string): DType => {
  if (type.kind !== "tensor") throw new UserError(`${place}: a ${type.kind} is not supported, only tensors are`);
  try {
    return irDType(type.dtype);
  } catch (error) {
    throw error instanceof UserError ? new UserError(`${place}: ${error.message}`) : error;
  }
};
