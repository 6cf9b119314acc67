/** The wire contract: what two sides must agree on to talk. Kernels, buffers and offsets are not in it, so one side can be rebuilt alone. */
import { createHash } from "node:crypto";
import type { Manifest } from "../ir/bundle.ts";
import { tokenSymbol } from "../ir/dim.ts";
import { canonicalJson, type Json } from "../ir/json.ts";
import type { Field, Schedule } from "../ir/schedule.ts";

/** What the contract takes from the manifest. */
export type WireFacts = Pick<Manifest, "source" | "precision" | "attention" | "ffn" | "split">;

/**
 * Canonical JSON of the contract: keys sorted, no blanks. It holds the source, precision, ranks, split and, for each schedule, the slots,
 * the row maximum, the tensors of each exchange, the keys, and the order in which slots and exchanges are posted, which is the same for
 * every pair of ranks.
 */
export const wireContract = (facts: WireFacts, schedules: readonly Schedule[]): string => {
  const { source, precision, attention, ffn, split } = facts;
  return canonicalJson({ abi: 1, source, precision, attention, ffn, split, schedules: schedules.map(exchangesOf) });
};

/** SHA-256 of the contract, hex. */
export const wireHash = (facts: WireFacts, schedules: readonly Schedule[]): string =>
  createHash("sha256").update(wireContract(facts, schedules)).digest("hex");

/** The schedules of a bundle, sealed with the hash of their common contract. */
export const withWire = (facts: WireFacts, schedules: readonly Schedule[]): readonly Schedule[] => {
  const wire = wireHash(facts, schedules);
  return schedules.map((s) => ({ ...s, wire }));
};

const exchangesOf = (s: Schedule): Json => {
  const field = ({ name, dtype, shape, bytes }: Field): Json => ({ name, dtype, shape, bytes });
  return {
    name: s.name,
    slots: s.slots,
    rows: s.symbols.find((x) => x.name === tokenSymbol)?.max ?? 0,
    exchanges: s.exchanges,
    types: s.types.map((t) => ({ name: t.name, push: t.push.map(field), pull: t.pull.map(field) })),
    keys: s.keys.map(({ key, direction, a, f, slot, field: name }) => ({ key, direction, a, f, slot, field: name })),
    order: (s.programs[0]?.steps ?? []).flatMap((step) => (step.op === "post" ? [[step.slot, step.exchange]] : [])),
  };
};
