/** The self-test that travels with a program: what it accepts, what it catches, and what it says of files that are none. */
import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { checkBackend } from "../backends/conformance.ts";
import cpp from "../backends/cpp/index.ts";
import { randomNumbers } from "../ir/index.ts";
import { buildProgram } from "./native.ts";
import { buildSelftest } from "./runtime/build.ts";

const ops = ["rms_norm", "softmax", "scaled_linear", "topk", "kv_append", "attention"];
let selftest: string;
let library: string;
let program: ReadonlyMap<string, string>;
let cases: Uint8Array;
let folder: string;

const run = (bytes: Uint8Array, ...flags: string[]): ReturnType<typeof runOn> => runOn(library, bytes, ...flags);

const runOn = (program: string, bytes: Uint8Array, ...flags: string[]): { status: number | null; out: string; err: string } => {
  const file = join(folder, "cases");
  writeFileSync(file, bytes);
  const { status, stdout, stderr } = spawnSync(selftest, [file, program, ...flags], { encoding: "utf8" });
  return { status, out: stdout, err: stderr };
};

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "step3c-selftest-"));
  selftest = buildSelftest();
  const report = checkBackend(cpp, {
    only: ops,
    pack: (files, file) => {
      program = files;
      library = buildProgram(program, ["-DS3_ISAS=avx2"]);
      cases = file;
    },
  });
  expect(report.results.every((r) => r.status === "matched")).toBe(true);
});
afterAll(() => rmSync(folder, { recursive: true }));

test("kernels that are right pass", () => {
  const { status, out } = run(cases, "--verbose");
  expect(out).toMatch(/^right rms_norm '/m);
  expect(out).toMatch(/^right attention 'fp8 cache'/m);
  expect(out).toMatch(/\n\d\d+ passed, 0 failed\n$/);
  expect(status).toBe(0);
});

test("parts take all cases between them", () => {
  const passed = (...flags: string[]): number => Number(/(\d+) passed, 0 failed\n$/.exec(run(cases, ...flags).out)?.[1]);
  expect(passed("--part", "0/3") + passed("--part", "1/3") + passed("--part", "2/3")).toBe(passed());
  for (const part of ["3/3", "1", "1/", "/2", "x/2"]) {
    const { status, err } = run(cases, "--part", part);
    expect(status).toBe(2);
    expect(err).toContain("--part takes I/N");
  }
});

test("one wrong expectation fails, and is named", () => {
  // the last number that is expected: the file ends with as many allowances
  const changed = cases.slice();
  const view = new DataView(changed.buffer);
  const count = 5 * 4 * 32;
  view.setFloat32(changed.length - 4, 0, true); // nothing is allowed
  view.setFloat32(changed.length - 4 - 4 * count, 12345, true);
  const { status, out } = run(changed);
  expect(out).toMatch(/^WRONG attention 'int8 cache' .*instead of 12345/m);
  expect(out).toMatch(/passed, 1 failed\n$/);
  expect(status).toBe(3);
});

test("kernels that see only the rows of the first segment fail where there are several", () => {
  const header = program.get("contract.h") as string;
  const blind = header.replace("return per_token ? c->segments : 1;", "return 1;");
  expect(blind).not.toBe(header);
  const { status, out } = runOn(buildProgram(new Map([...program, ["contract.h", blind]]), ["-DS3_ISAS=avx2"]), cases);
  expect(out).toMatch(/^WRONG scaled_linear '[^\n]*: in several segments, value /m);
  expect(out).not.toMatch(/^WRONG rms_norm/m);
  expect(status).toBe(3);
});

describe("files that are none", () => {
  test("are refused in one line", () => {
    for (const bytes of [new Uint8Array(), new Uint8Array(100), cases.slice(0, 1000), cases.slice(0, cases.length - 1)]) {
      const { status, err } = run(bytes);
      expect(status).toBe(1);
      expect(err).toMatch(/^step3-selftest: [^\n]+\n$/);
    }
  });

  test("flipped bytes never crash it", () => {
    const random = randomNumbers(7);
    for (let round = 0; round < 40; round++) {
      const bytes = cases.slice();
      // headers and names are at the front of each case; small files make them likelier
      for (let n = 0; n < 8; n++) bytes[8 + Math.floor(random() * 400)] = Math.floor(random() * 256);
      const { status } = run(bytes);
      expect([0, 1, 3]).toContain(status);
    }
  });
});
