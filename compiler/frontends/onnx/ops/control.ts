/** Branches and loops. What decides them must be known when the graph is made: the graph has one order of ops, and no jumps. */
import type { Dim } from "../../../../ir/dim.ts";
import type { Call, Lowering } from "../call.ts";
import type { Item } from "../emitter.ts";

/** Rounds of a loop that are written out. */
const mostRounds = 10_000;

const truth = (c: Call, x: Item): boolean => {
  const known = c.e.tensorOf(x);
  if (known === undefined) return c.fail("whether it goes on depends on what the graph computes, which a graph cannot follow");
  return known.data[0] !== 0;
};

const branch: Lowering = (c) => {
  const condition = c.constant(0).data[0] !== 0;
  return c.run(c.graph(condition ? "then_branch" : "else_branch"), []);
};

/** Results of each round, one after another along a new axis. */
const stacked = (c: Call, rounds: readonly Item[], axis: number): Item =>
  rounds.length === 0
    ? c.fail("results of a loop that is never run have no shape")
    : c.e.concat(
        rounds.map((x) => c.e.reshape(x, [...x.type.shape.slice(0, axis), 1, ...x.type.shape.slice(axis)])),
        axis,
      );

const loop: Lowering = (c) => {
  const body = c.graph("body");
  const most = c.has(0) ? (c.constant(0).data[0] as number) : Infinity;
  let going = c.has(1) ? c.constant(1).data[0] !== 0 : true;
  let carried: readonly Item[] = c.inputs.slice(2).map((_, i) => c.x(i + 2));
  if (body.inputs.length !== 2 + carried.length || body.outputs.length < 1 + carried.length)
    c.fail(
      `its body has ${body.inputs.length} inputs and ${body.outputs.length} outputs, and the node carries ${carried.length} values`,
    );
  const scans: Item[][] = Array.from({ length: Math.max(0, body.outputs.length - 1 - carried.length) }, () => []);
  let condition = c.e.number(Number(going), "bool");
  for (let i = 0; going && i < most; i++) {
    if (i >= mostRounds) c.fail(`more than ${mostRounds} rounds`);
    const [next, ...results] = c.run(body, [c.e.number(i, "i64"), condition, ...carried]);
    condition = next as Item;
    carried = results.slice(0, carried.length);
    for (const [k, s] of scans.entries()) s.push(results[carried.length + k] as Item);
    going = i + 1 < most ? truth(c, condition) : going;
  }
  return [...carried, ...scans.map((s) => stacked(c, s, 0))];
};

const scan: Lowering = (c) => {
  const body = c.graph("body");
  const old = c.opset < 9;
  // opset 8 has an optional length of sequences first, and a batch axis
  const given = c.inputs.slice(old ? 1 : 0).map((_, i) => c.x(i + (old ? 1 : 0)));
  const count = c.int("num_scan_inputs");
  if (!(count >= 1 && count <= given.length)) c.fail(`num_scan_inputs is ${count}, and there are ${given.length}`);
  if (body.inputs.length !== given.length || body.outputs.length < given.length - count)
    c.fail(
      `its body has ${body.inputs.length} inputs and ${body.outputs.length} outputs, and the node has ${given.length} inputs`,
    );
  const states = given.slice(0, given.length - count);
  const scanned = given.slice(given.length - count);
  const outputs = body.outputs.length - states.length;
  const directions = (name: string, n: number): readonly number[] => c.ints(name) ?? Array.from({ length: n }, () => 0);
  const inDirections = directions(old ? "directions" : "scan_input_directions", count);
  const outDirections = directions("scan_output_directions", outputs);
  const run = (
    own: readonly Item[],
    xs: readonly Item[],
    axes: readonly number[],
    outAxes: readonly number[],
  ): readonly Item[] => {
    const length = xs[0]?.type.shape[axes[0] as number] as Dim;
    if (typeof length !== "number") return c.fail(`it goes over an axis of size '${length}'; give that size a number`);
    if (length > mostRounds) c.fail(`more than ${mostRounds} rounds`);
    let carried = own;
    const results: Item[][] = Array.from({ length: outputs }, () => []);
    for (let i = 0; i < length; i++) {
      const elements = xs.map((x, k) => {
        const at = inDirections[k] === 1 ? length - 1 - i : i;
        const axis = axes[k] as number;
        return c.e.reshape(
          c.e.slice(x, axis, at, 1),
          x.type.shape.filter((_, j) => j !== axis),
        );
      });
      const made = c.run(body, [...carried, ...elements]);
      carried = made.slice(0, carried.length);
      for (const [k, r] of results.entries()) r.push(made[carried.length + k] as Item);
    }
    const inOrder = results.map((r, k) => (outDirections[k] === 1 ? r.reverse() : r));
    return [...carried, ...inOrder.map((r, k) => stacked(c, r, c.axis(outAxes[k] ?? 0, (r[0]?.type.shape.length ?? 0) + 1)))];
  };
  if (!old) {
    const given = c.ints("scan_input_axes") ?? scanned.map(() => 0);
    if (given.length !== count) c.fail(`${given.length} scan_input_axes for ${count} inputs`);
    const axes = given.map((a, k) => c.axis(a, (scanned[k] as Item).type.shape.length));
    return run(states, scanned, axes, c.ints("scan_output_axes") ?? []);
  }
  if (c.has(0)) c.fail("sequences of several lengths (opset 8) are not supported");
  const batch = scanned[0]?.type.shape[0];
  if (typeof batch !== "number") return c.fail("the batch of a Scan of opset 8 must be a number");
  const one = (x: Item, b: number): Item => c.e.reshape(c.e.slice(x, 0, b, 1), x.type.shape.slice(1));
  const each = Array.from({ length: batch }, (_, b) =>
    run(
      states.map((s) => one(s, b)),
      scanned.map((s) => one(s, b)),
      scanned.map(() => 0),
      [],
    ),
  );
  return (each[0] ?? []).map((_, k) =>
    stacked(
      c,
      each.map((r) => r[k] as Item),
      0,
    ),
  );
};

export const control: Readonly<Record<string, Lowering>> = { If: branch, Loop: loop, Scan: scan };
