/** The operators of ONNX and of its exporters that step3c has, by domain. */
import type { Lowering } from "../call.ts";
import { elementwise } from "./elementwise.ts";

export const lowerings: ReadonlyMap<string, ReadonlyMap<string, Lowering>> = new Map([
  ["", new Map(Object.entries({ ...elementwise }))],
]);
