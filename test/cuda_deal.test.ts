/**
 * How contractions on Hopper are dealt out to blocks, without a GPU: cuda_deal.cpp runs the code of the device on threads of the host. Launches of one
 * problem and of two, rows in segments and rows of experts, few and many couples.
 */
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterAll, beforeAll, expect, test } from "vitest";

const folder = mkdtempSync(join(tmpdir(), "step3c-deal-"));
afterAll(() => rmSync(folder, { recursive: true }));

const header = (name: string): string =>
  readFileSync(fileURLToPath(new URL(`../backends/cuda/${name}`, import.meta.url)), "utf8");
/** A piece of a header, from one line to another. */
const piece = (name: string, from: string, to?: string): string => {
  const text = header(name);
  const [start, end] = [text.indexOf(from), to === undefined ? text.length : text.indexOf(to)];
  if (start < 0 || end < start) throw new Error(`${name} has no '${from}' before '${to}'`);
  return text.slice(start, end);
};
/** What dealing needs of the headers: the rest of them is for a GPU's compiler. */
const device = [
  "namespace s3 {",
  piece("pack_rows.cuh", "/// Rows that meet one matrix: where", "/// What is packed: rows"),
  piece("pack_rows.cuh", "/// The sum over the lanes", "/// The place of the l-th row"),
  "}",
  "namespace s3::hopper {",
  "inline uint32_t block_of_cluster() { return own_rank; }",
  "inline uint32_t cluster_of_block() { return own_cluster; }",
  "inline uint32_t clusters() { return all_clusters; }",
  piece("hopper.cuh", "/// A value of another lane.", "enum class Swizzle"),
  "}",
  piece("problem_hopper.cuh", "namespace s3::hopper {"),
  piece("deal_hopper.cuh", "namespace s3::hopper {"),
].join("\n");
const program = join(folder, "deal");

beforeAll(() => {
  writeFileSync(join(folder, "device.h"), device);
  const source = fileURLToPath(new URL("./cuda_deal.cpp", import.meta.url));
  const flags = ["-std=c++20", "-O2", "-pthread", `-I${folder}`];
  const { status, stderr } = spawnSync(process.env.CXX ?? "c++", [...flags, source, "-o", program], { encoding: "utf8" });
  expect(stderr).toBe("");
  expect(status).toBe(0);
}, 120_000);

test.each([1, 2])("every step of every tile is done once, seed %i", { timeout: 300_000 }, (seed) => {
  const { stdout, status } = spawnSync(program, ["8", String(seed)], { encoding: "utf8" });
  expect(stdout).toBe("8 trials, 0 faults\n");
  expect(status).toBe(0);
});
