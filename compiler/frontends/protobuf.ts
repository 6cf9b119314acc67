/**
 * Protocol buffers by a table of messages. Unlike generated decoders it checks that every field has the kind that its number has, says where in
 * the message a fault is, limits nesting, and tells which fields it does not know instead of dropping them silently.
 */
import { UserError } from "../../ir/error.ts";

/** Kinds of fields; any other word is the name of a message. */
const scalars = ["int64", "uint64", "int32", "string", "bytes", "float", "double"] as const;
type Scalar = (typeof scalars)[number];
const isScalar = (kind: string): kind is Scalar => (scalars as readonly string[]).includes(kind);

/** By number, name and kind of each field: `kind[]` when it is repeated, `kind*` when it is repeated numbers, of which there may be many. */
export type Messages = Readonly<Record<string, Readonly<Record<number, readonly [name: string, kind: string]>>>>;

export type Numbers = Float64Array | BigInt64Array | BigUint64Array;
export type Field = bigint | number | string | Uint8Array | Message | Numbers | readonly Field[];
/** What a message holds, by names of fields; absent fields are not there. Integers of 64 bits are bigints. */
export type Message = ReadonlyMap<string, Field>;

export interface Decoded {
  readonly message: Message;
  /** places of fields that the table does not have, without indices, each once: `graph.node.field 10` */
  readonly unknown: readonly string[];
}

/** Messages of messages; models of real exporters stay far below. */
const deepest = 100;

const wireOf: Readonly<Record<Scalar, number>> = { int64: 0, uint64: 0, int32: 0, string: 2, bytes: 2, float: 5, double: 1 };

/** Numbers, as many as come. */
class Growing {
  private array: Numbers;
  private count = 0;

  constructor(kind: Scalar) {
    this.array = kind === "int64" ? new BigInt64Array(16) : kind === "uint64" ? new BigUint64Array(16) : new Float64Array(16);
  }
  /** Makes room for `n` more. */
  reserve(n: number): void {
    if (this.count + n <= this.array.length) return;
    const more = new (this.array.constructor as new (n: number) => Numbers)(
      Math.max(this.count + n, n === 1 ? 2 * this.count : 0),
    );
    (more as Float64Array).set(this.array as Float64Array);
    this.array = more;
  }
  push(value: Field): void {
    this.reserve(1);
    this.array[this.count++] = value as never;
  }
  all(): Numbers {
    return this.array.subarray(0, this.count);
  }
}

interface Open {
  readonly kind: string;
  /** where it is, with indices */
  readonly place: string;
  readonly end: number;
  readonly fields: Map<string, Field>;
}

/**
 * Reads the bytes of a message of kind `root`; views of bytes share their memory. Throws a UserError that names file and field; `mend` says what
 * to do about a damaged file.
 */
export const decodeMessage = (bytes: Uint8Array, messages: Messages, root: string, file: string, mend: string): Decoded => {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const utf8 = new TextDecoder("utf-8", { fatal: true });
  const unknown = new Set<string>();
  // by message, since one that is there twice goes on where it ended
  const grown = new Map<Map<string, Field>, Map<string, Growing>>();
  let at = 0;
  let place = "";

  const fail = (what: string): never => {
    throw new UserError(`${file}: ${place === "" ? "" : `${place}: `}${what} (byte ${at}); ${mend}`);
  };
  const need = (n: number, end: number): void => {
    if (n > end - at) fail(`${n} bytes are announced where ${end - at} are left`);
  };
  const varint = (end: number): bigint => {
    let low = 0;
    let value = 0n;
    for (let shift = 0; shift < 70; shift += 7) {
      if (at >= end) fail("cut short within a number");
      const byte = bytes[at++] as number;
      if (shift < 28) low |= (byte & 0x7f) << shift;
      else value |= BigInt(byte & 0x7f) << BigInt(shift);
      if (byte < 0x80) return BigInt.asUintN(64, value | BigInt(low >>> 0));
    }
    return fail("a number of more than 64 bits");
  };
  const length = (end: number): number => {
    const n = varint(end);
    if (n > BigInt(end - at)) fail(`${n} bytes are announced where ${end - at} are left`);
    return Number(n);
  };
  const scalar = (kind: Scalar, end: number): Field => {
    switch (kind) {
      case "int64":
        return BigInt.asIntN(64, varint(end));
      case "uint64":
        return varint(end);
      case "int32":
        return Number(BigInt.asIntN(32, varint(end)));
      case "float":
      case "double": {
        const size = kind === "float" ? 4 : 8;
        need(size, end);
        at += size;
        return kind === "float" ? view.getFloat32(at - 4, true) : view.getFloat64(at - 8, true);
      }
      default: {
        const n = length(end);
        const part = bytes.subarray(at, at + n);
        at += n;
        if (kind === "bytes") return part;
        try {
          return utf8.decode(part);
        } catch {
          return fail("text that is not UTF-8");
        }
      }
    }
  };
  /** Numbers in the bytes up to `end`. */
  const elements = (kind: Scalar, end: number): number => {
    if (wireOf[kind] !== 0) return Math.floor((end - at) / (kind === "float" ? 4 : 8));
    let n = 0;
    for (let i = at; i < end; i++) if ((bytes[i] as number) < 0x80) n++;
    return n;
  };
  const skip = (wire: number, end: number): void => {
    if (wire === 0) varint(end);
    else if (wire === 1 || wire === 5) {
      need(wire === 1 ? 8 : 4, end);
      at += wire === 1 ? 8 : 4;
    } else if (wire === 2) {
      const n = length(end);
      at += n;
    } else fail(`a field of wire type ${wire}`);
  };

  const open: Open[] = [{ kind: root, place: "", end: bytes.length, fields: new Map() }];
  for (;;) {
    const here = open[open.length - 1] as Open;
    place = here.place;
    if (at === here.end) {
      for (const [name, numbers] of grown.get(here.fields) ?? []) here.fields.set(name, numbers.all());
      if (open.length === 1) return { message: here.fields, unknown: [...unknown] };
      open.pop();
      continue;
    }
    const tag = varint(here.end);
    const [number, wire] = [Number(tag >> 3n), Number(tag & 7n)];
    if (number === 0) fail("a field without a number");
    const field = messages[here.kind]?.[number];
    if (field === undefined) {
      unknown.add(`${here.place.replaceAll(/\[\d+\]/g, "")}${here.place === "" ? "" : "."}field ${number}`);
      skip(wire, here.end);
      continue;
    }
    const [name, declared] = field;
    const kind = declared.replace(/\[\]$|\*$/, "");
    const repeated = kind !== declared;
    let list: Field[] | undefined;
    if (declared.endsWith("[]")) {
      list = (here.fields.get(name) as Field[] | undefined) ?? [];
      here.fields.set(name, list);
    }
    place = `${here.place === "" ? "" : `${here.place}.`}${name}${list === undefined ? "" : `[${list.length}]`}`;
    const add = (value: Field): void => {
      if (list !== undefined) list.push(value);
      else if (repeated) growing().push(value);
      else here.fields.set(name, value);
    };
    const growing = (): Growing => {
      const all = grown.get(here.fields) ?? new Map<string, Growing>();
      grown.set(here.fields, all);
      const numbers = all.get(name) ?? new Growing(kind as Scalar);
      all.set(name, numbers);
      return numbers;
    };
    if (!isScalar(kind)) {
      if (wire !== 2) fail(`${kind} has wire type ${wire} instead of 2`);
      if (open.length >= deepest) fail(`messages within messages, ${deepest} deep`);
      const end = length(here.end) + at;
      // a message that is there twice is merged, as the format has it
      const before = list === undefined ? here.fields.get(name) : undefined;
      const fields = (before as Map<string, Field> | undefined) ?? new Map<string, Field>();
      add(fields);
      open.push({ kind, place, end, fields });
    } else if (wire === wireOf[kind]) add(scalar(kind, here.end));
    else if (wire === 2 && repeated && wireOf[kind] !== 2) {
      const end = length(here.end) + at;
      if (list === undefined) growing().reserve(elements(kind, end));
      while (at < end) add(scalar(kind, end));
    } else fail(`${kind} has wire type ${wire} instead of ${wireOf[kind]}`);
  }
};
