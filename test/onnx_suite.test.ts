/** The node tests of the ONNX project, on the interpreter and in C++. `npm run onnx:suite` lists those that do not pass. */
import { expect, test } from "vitest";
import { failure, onReference, onTargets, suiteCases } from "./onnx_suite.ts";

const cases = suiteCases();
/** What the cases that do not pass ask for: types that the graph does not have, and training. */
const known = /elements of type (e2m1|e8m0|e4m3fnuz|e5m2fnuz) are not supported|training_mode is set/;

test("every case that ONNX Runtime passes is passed by the interpreter, the others but for types that the graph lacks", () => {
  const wrong = cases.flatMap((c) => {
    const why = failure(() => onReference(c));
    return why === undefined || (!c.ort && known.test(why)) ? [] : [`${c.name}: ${why}`];
  });
  expect(wrong).toEqual([]);
}, 60_000);

test("the same by kernels in C++", async () => {
  const results = await onTargets(cases, "cpp");
  const wrong = cases.flatMap((c) => {
    const why = results.get(c);
    return why === undefined || (!c.ort && known.test(why)) ? [] : [`${c.name}: ${why}`];
  });
  expect(wrong).toEqual([]);
}, 400_000);
