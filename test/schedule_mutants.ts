/** Schedules that are wrong in one place, at every place where they can be wrong in that way. */
import type { Buffer, Key, RankProgram, Schedule, Step } from "../ir/schedule.ts";

export interface Mutant {
  readonly kind: MutantKind;
  /** where: rank, slot, exchange, buffer */
  readonly site: string;
  readonly schedule: Schedule;
}

export const mutantKinds = [
  "dropped reply",
  "other order on one side",
  "posted again before the wait",
  "changed source of a key",
  "lengths that differ by one row",
  "overlapping live ranges",
  "one slot too few",
  "FFN rank skips a layer",
  "cycle between micro-batches",
  "receive that nothing fills",
  "accept from only some",
] as const;
export type MutantKind = (typeof mutantKinds)[number];

type Made = Generator<readonly [site: string, schedule: Schedule]>;

/** All mutants of one kind; none when the schedule has no such place. */
export function* mutants(schedule: Schedule, kind: MutantKind): Generator<Mutant> {
  for (const [site, mutant] of makers[kind](schedule)) yield { kind, site, schedule: mutant };
}

const withProgram = (s: Schedule, r: number, change: Partial<RankProgram>): Schedule => {
  const programs = s.programs.slice();
  programs[r] = { ...(programs[r] as RankProgram), ...change };
  return { ...s, programs };
};

/**
 * Steps in another order, or fewer, or with new ones (negative: index into `added`). `after` follows the step it named; when that is gone,
 * it is the launch of the slot before.
 */
const reorder = (steps: readonly Step[], order: readonly number[], added: readonly Step[] = []): Step[] => {
  const place = new Int32Array(steps.length).fill(-1);
  order.forEach((from, to) => {
    if (from >= 0) place[from] = to;
  });
  const made: Step[] = [];
  for (const from of order) {
    const step = (from < 0 ? added[-1 - from] : steps[from]) as Step;
    if (step.op !== "post" && step.op !== "reply") {
      made.push(step);
      continue;
    }
    let after = place[step.after] as number;
    if (after < 0) after = made.findLastIndex((s) => s.op === "launch" && s.slot === step.slot);
    made.push(after < 0 || after === step.after ? step : { ...step, after });
  }
  return made;
};

const all = (steps: readonly Step[]): number[] => [...steps.keys()];
const without = (steps: readonly Step[], drop: (step: Step, at: number) => boolean): Step[] =>
  reorder(
    steps,
    all(steps).filter((i) => !drop(steps[i] as Step, i)),
  );

/** Moves steps [from, to) to before step `before`. */
const move = (steps: readonly Step[], from: number, to: number, before: number): Step[] => {
  const order = all(steps);
  const moved = order.slice(from, to);
  const rest = (a: number, b: number): number[] => order.slice(a, b);
  return reorder(
    steps,
    before <= from
      ? [...rest(0, before), ...moved, ...rest(before, from), ...rest(to, steps.length)]
      : [...rest(0, from), ...rest(to, before), ...moved, ...rest(before, steps.length)],
  );
};

const ranksOf = (s: Schedule, role: "attention" | "ffn"): [number, RankProgram][] =>
  [...s.programs.entries()].filter(([, p]) => p.rank.role === role);

const stepName = (p: RankProgram, at: number): string => `${p.rank.name} step ${at}`;

/** Runs of consecutive steps of one slot: on an FFN rank one exchange, on an attention rank one stage. */
const groupsOf = (steps: readonly Step[]): { readonly slot: number; readonly from: number; readonly to: number }[] => {
  const groups: { slot: number; from: number; to: number }[] = [];
  let ended = true;
  steps.forEach((step, at) => {
    const last = groups.at(-1);
    const begins = step.op === "wait" || (step.op === "accept" && ended);
    if (!last || last.slot !== step.slot || begins) groups.push({ slot: step.slot, from: at, to: at + 1 });
    else last.to = at + 1;
    ended = step.op === "reply" || (step.op === "launch" && ended && steps[at + 1]?.op !== "launch");
  });
  return groups;
};

const find = (steps: readonly Step[], op: Step["op"], slot: number, exchange: number, peer?: number): number =>
  steps.findIndex(
    (s) =>
      s.op === op &&
      s.op !== "launch" &&
      s.slot === slot &&
      s.exchange === exchange &&
      (peer === undefined || (s.op === "accept" ? s.from : s.op === "reply" ? s.to : peer) === peer),
  );

const makers: Readonly<Record<MutantKind, (s: Schedule) => Made>> = {
  *"dropped reply"(s) {
    for (const [r, p] of ranksOf(s, "ffn"))
      for (const [at, step] of p.steps.entries())
        if (step.op === "reply") yield [stepName(p, at), withProgram(s, r, { steps: without(p.steps, (_, i) => i === at) })];
  },

  /** two slots of one exchange change places, or two exchanges of one slot, or only the replies or accepts of two slots */
  *"other order on one side"(s) {
    for (const [r, p] of s.programs.entries()) {
      const groups = groupsOf(p.steps);
      for (const [i, g] of groups.entries()) {
        const h = groups[i + 1];
        if (!h || h.slot === g.slot || !p.steps.slice(h.from, h.to).some((x) => x.op !== "launch")) continue;
        if (s.exchanges.length === 0) continue;
        yield [
          `${p.rank.name} steps ${h.from}.. before ${g.from}..`,
          withProgram(s, r, { steps: move(p.steps, h.from, h.to, g.from) }),
        ];
        const replies = (x: { from: number; to: number }): number[] =>
          all(p.steps)
            .slice(x.from, x.to)
            .filter((k) => p.steps[k]?.op === "reply");
        const accepts = (x: { from: number; to: number }): number[] =>
          all(p.steps)
            .slice(x.from, x.to)
            .filter((k) => p.steps[k]?.op === "accept");
        const [mine, theirs] = [replies(g), accepts(h)];
        if (mine.length > 0)
          yield [
            `${p.rank.name} replies ${mine[0]}.. after ${h.to}`,
            withProgram(s, r, { steps: move(p.steps, mine[0] as number, g.to, h.to) }),
          ];
        if (theirs.length > 0)
          yield [
            `${p.rank.name} accepts ${theirs[0]}.. before ${g.from}`,
            withProgram(s, r, { steps: move(p.steps, h.from, h.from + theirs.length, g.from) }),
          ];
      }
      for (let slot = 0; slot < s.slots; slot++)
        for (let e = 0; e + 1 < s.exchanges.length; e++) {
          const swap = (x: Step): Step =>
            x.op === "launch" || x.slot !== slot
              ? x
              : x.exchange === e
                ? { ...x, exchange: e + 1 }
                : x.exchange === e + 1
                  ? { ...x, exchange: e }
                  : x;
          yield [`${p.rank.name} s${slot} #${e} and #${e + 1}`, withProgram(s, r, { steps: p.steps.map(swap) })];
        }
    }
  },

  *"posted again before the wait"(s) {
    for (const [r, p] of ranksOf(s, "attention"))
      for (const [at, step] of p.steps.entries()) {
        if (step.op !== "wait") continue;
        const post = find(p.steps, "post", step.slot, step.exchange + 1);
        if (post >= 0) yield [stepName(p, at), withProgram(s, r, { steps: move(p.steps, at, at + 1, post + 1) })];
      }
  },

  /** every key from every other buffer that peers may read; and every launch that writes elsewhere than where the key sends from */
  *"changed source of a key"(s) {
    for (const [k, key] of s.keys.entries()) {
      const r = s.programs.findIndex((p) => p.rank.name === (key.direction === "a2f" ? `a${key.a}` : `f${key.f}`));
      for (const b of (s.programs[r] as RankProgram).buffers)
        if (b.region === "exchange" && b.name !== key.source)
          yield [
            `key ${key.key} of f${key.f}: ${b.name}`,
            { ...s, keys: s.keys.map((x, i): Key => (i === k ? { ...x, source: b.name } : x)) },
          ];
    }
    for (const [r, plain] of s.programs.entries()) {
      const sources = new Set(
        s.keys.filter((k) => (k.direction === "a2f" ? `a${k.a}` : `f${k.f}`) === plain.rank.name).map((k) => k.source),
      );
      let top = plain.memory.scratch;
      const twins = plain.buffers
        .filter((b) => sources.has(b.name))
        .map((b): Buffer => {
          const offset = top;
          top += Math.ceil(b.bytes / 64) * 64;
          return { ...b, name: `${b.name}_twin`, region: "scratch", offset };
        });
      const p: RankProgram = { ...plain, buffers: [...plain.buffers, ...twins], memory: { ...plain.memory, scratch: top } };
      const roomy = withProgram(s, r, p);
      for (const [at, step] of p.steps.entries()) {
        if (step.op !== "launch") continue;
        for (const name of step.out) {
          if (!sources.has(name)) continue;
          const steps = p.steps.slice();
          steps[at] = { ...step, out: step.out.map((x) => (x === name ? `${name}_twin` : x)) };
          yield [`${stepName(p, at)} ${name}`, withProgram(roomy, r, { steps })];
        }
      }
    }
  },

  /** one row more or less, in bytes alone or in the shape too, of each end of each key and of each field */
  *"lengths that differ by one row"(s) {
    const rows = s.symbols.find((x) => x.name === "T")?.max ?? 1;
    for (const [r, p] of s.programs.entries())
      for (const [i, b] of p.buffers.entries()) {
        if (b.region !== "exchange") continue;
        const isRows = b.shape[0] === "T";
        const row = b.bytes / b.segments / (isRows ? rows : Number(b.shape[0]));
        for (const sign of [1, -1])
          for (const shaped of [false, true]) {
            const first = isRows ? `T${sign > 0 ? "+" : "-"}1` : Number(b.shape[0]) + sign;
            const changed: Buffer = {
              ...b,
              bytes: b.bytes + sign * row * b.segments,
              ...(shaped ? { shape: [first, ...b.shape.slice(1)] } : {}),
            };
            const buffers = p.buffers.slice();
            buffers[i] = changed;
            yield [`${p.rank.name} ${b.name} ${sign}${shaped ? " shape" : ""}`, withProgram(s, r, { buffers })];
          }
      }
    for (const [t, type] of s.types.entries())
      for (const way of ["push", "pull"] as const)
        for (const [i, f] of type[way].entries())
          for (const sign of [1, -1]) {
            const isRows = f.shape[0] === "T";
            const row = f.bytes / (isRows ? rows : Number(f.shape[0]));
            const shape = [isRows ? `T${sign > 0 ? "+" : "-"}1` : Number(f.shape[0]) + sign, ...f.shape.slice(1)];
            const field = { ...f, shape, bytes: f.bytes + sign * row };
            const list = type[way].map((x, k) => (k === i ? field : x));
            yield [
              `exchange ${type.name} ${f.name} ${sign}`,
              { ...s, types: s.types.map((x, k) => (k === t ? { ...type, [way]: list } : x)) },
            ];
          }
  },

  /** every scratch buffer where another one lives, and every permanent one where its neighbour is */
  *"overlapping live ranges"(s) {
    for (const [r, p] of s.programs.entries()) {
      const moved = (i: number, offset: number): Schedule => {
        const buffers = p.buffers.slice();
        const b = buffers[i] as Buffer;
        buffers[i] = { ...b, offset };
        const memory = { ...p.memory, [b.region]: Math.max(p.memory[b.region], Math.ceil((offset + b.bytes) / 64) * 64) };
        return withProgram(s, r, { buffers, memory });
      };
      const live = new Map<string, { id: number; from: number; to: number; offset: number }>();
      p.buffers.forEach((b, id) => {
        if (b.region === "scratch") live.set(b.name, { id, from: -1, to: -1, offset: b.offset });
      });
      for (const [id, b] of p.buffers.entries()) {
        const before = p.buffers[id - 1];
        if (b.region !== "scratch" && before?.region === b.region)
          yield [`${p.rank.name} ${b.name} on ${before.name}`, moved(id, before.offset)];
      }
      for (const [at, step] of p.steps.entries())
        if (step.op === "launch")
          for (const name of [...step.in, ...step.out]) {
            const range = live.get(name);
            if (!range) continue;
            if (range.from < 0) range.from = at;
            range.to = at;
          }
      const ranges = [...live.values()].sort((a, b) => a.from - b.from);
      for (const [i, late] of ranges.entries())
        for (const early of ranges.slice(Math.max(0, i - 200), i))
          if (early.to >= late.from)
            yield [`${p.rank.name} ${p.buffers[late.id]?.name} on ${p.buffers[early.id]?.name}`, moved(late.id, early.offset)];
    }
  },

  /** without the slot: in the count, in count and keys, in one step, in all steps and buffers of one rank */
  *"one slot too few"(s) {
    const gone = s.slots - 1;
    if (gone === 0) return;
    yield ["count", { ...s, slots: gone }];
    yield ["count and keys", { ...s, slots: gone, keys: s.keys.filter((k) => k.slot !== gone) }];
    for (const [r, p] of s.programs.entries()) {
      for (const [at, step] of p.steps.entries()) {
        if (step.slot !== gone || step.op === "launch") continue;
        const steps = p.steps.slice();
        steps[at] = { ...step, slot: gone - 1 };
        yield [stepName(p, at), withProgram(s, r, { steps })];
      }
      const steps = p.steps.map((x): Step => (x.slot === gone ? { ...x, slot: gone - 1 } : x));
      const buffers = p.buffers.map((b): Buffer => (b.slot === gone ? { ...b, slot: gone - 1 } : b));
      yield [`${p.rank.name} all steps`, withProgram(s, r, { steps })];
      yield [`${p.rank.name} all steps and buffers`, withProgram(s, r, { steps, buffers })];
      yield [`${p.rank.name} all steps, slot left out`, withProgram(s, r, { steps: without(p.steps, (x) => x.slot === gone) })];
    }
  },

  /** all slots of an exchange, one slot, or only its launches */
  *"FFN rank skips a layer"(s) {
    for (const [r, p] of ranksOf(s, "ffn")) {
      const owner: number[] = [];
      const current = new Map<number, number>();
      for (const step of p.steps) {
        if (step.op !== "launch") current.set(step.slot, step.exchange);
        owner.push(current.get(step.slot) ?? 0);
      }
      for (let e = 0; e < s.exchanges.length; e++) {
        yield [`${p.rank.name} #${e}`, withProgram(s, r, { steps: without(p.steps, (_, i) => owner[i] === e) })];
        const later = without(p.steps, (_, i) => owner[i] === e).map(
          (x): Step => (x.op !== "launch" && x.exchange > e ? { ...x, exchange: x.exchange - 1 } : x),
        );
        yield [`${p.rank.name} #${e}, others renumbered`, withProgram(s, r, { steps: later })];
        for (let slot = 0; slot < s.slots; slot++) {
          const mine = (x: Step, i: number): boolean => owner[i] === e && x.slot === slot;
          yield [`${p.rank.name} s${slot} #${e}`, withProgram(s, r, { steps: without(p.steps, mine) })];
          yield [
            `${p.rank.name} s${slot} #${e} launches`,
            withProgram(s, r, { steps: without(p.steps, (x, i) => mine(x, i) && x.op === "launch") }),
          ];
        }
      }
    }
  },

  /** a waits for one slot before it posts the next; f takes the next before it replies to the first */
  *"cycle between micro-batches"(s) {
    for (let e = 0; e < s.exchanges.length; e++)
      for (let first = 0; first < s.slots; first++)
        for (let second = first + 1; second < s.slots; second++)
          for (const [a, attention] of ranksOf(s, "attention")) {
            const wait = find(attention.steps, "wait", first, e);
            const post = find(attention.steps, "post", second, e);
            if (wait < post) continue;
            const early = withProgram(s, a, { steps: move(attention.steps, wait, wait + 1, post) });
            for (const [f, ffn] of ranksOf(s, "ffn")) {
              const reply = find(ffn.steps, "reply", first, e, a);
              const accept = find(ffn.steps, "accept", second, e, a);
              yield [
                `a${a} f${f - ranksOf(s, "attention").length} s${first} s${second} #${e}`,
                withProgram(early, f, { steps: move(ffn.steps, reply, reply + 1, accept + 1) }),
              ];
            }
          }
  },

  /** posts that are missing, accepts and waits that come twice, exchanges that nobody posts, keys that are missing */
  *"receive that nothing fills"(s) {
    for (const k of s.keys.keys())
      yield [`key ${s.keys[k]?.key} of f${s.keys[k]?.f}`, { ...s, keys: s.keys.filter((_, i) => i !== k) }];
    for (const [r, p] of s.programs.entries())
      for (const [at, step] of p.steps.entries()) {
        if (step.op === "post")
          yield [`${stepName(p, at)} missing`, withProgram(s, r, { steps: without(p.steps, (_, i) => i === at) })];
        if (step.op !== "accept" && step.op !== "wait") continue;
        const order = all(p.steps);
        order.splice(at + 1, 0, -1);
        yield [`${stepName(p, at)} twice`, withProgram(s, r, { steps: reorder(p.steps, order, [step]) })];
        if (step.exchange + 1 === s.exchanges.length)
          yield [
            `${stepName(p, at)} once more at the end`,
            withProgram(s, r, { steps: [...p.steps, { ...step, exchange: s.exchanges.length }] }),
          ];
      }
  },

  /** without one of the attention ranks, or one of them twice instead */
  *"accept from only some"(s) {
    const ranks = ranksOf(s, "attention").length;
    if (ranks < 2) return;
    for (const [r, p] of ranksOf(s, "ffn"))
      for (const [at, step] of p.steps.entries()) {
        if (step.op !== "accept") continue;
        yield [`${stepName(p, at)} missing`, withProgram(s, r, { steps: without(p.steps, (_, i) => i === at) })];
        const steps = p.steps.slice();
        steps[at] = { ...step, from: (step.from + 1) % ranks };
        yield [`${stepName(p, at)} from another`, withProgram(s, r, { steps })];
      }
  },
};

/** A schedule changed in one random place, perhaps without harm: a step moved, dropped, doubled or altered, or a buffer elsewhere. */
export const randomEdit = (s: Schedule, random: () => number): readonly [site: string, schedule: Schedule] => {
  const below = (n: number): number => Math.floor(random() * n);
  const r = below(s.programs.length);
  const p = s.programs[r] as RankProgram;
  const { steps, buffers } = p;
  const at = below(steps.length);
  const step = steps[at] as Step;
  const altered = (change: object): readonly [string, Schedule] => {
    const list = steps.slice();
    list[at] = { ...step, ...change } as Step;
    return [`${stepName(p, at)} ${JSON.stringify(change)}`, withProgram(s, r, { steps: list })];
  };
  switch (below(8)) {
    case 0: {
      const to = Math.max(0, Math.min(steps.length, at + below(9) - 4));
      return [
        `${stepName(p, at)} before ${to}`,
        withProgram(s, r, { steps: move(steps, at, at + 1, to > at ? Math.max(to, at + 1) : to) }),
      ];
    }
    case 1:
      return [`${stepName(p, at)} dropped`, withProgram(s, r, { steps: without(steps, (_, i) => i === at) })];
    case 2: {
      const order = all(steps);
      order.splice(Math.min(steps.length, at + 1 + below(3)), 0, at);
      const list = reorder(steps, order);
      return [`${stepName(p, at)} doubled`, withProgram(s, r, { steps: list })];
    }
    case 3: {
      if (step.op !== "launch") return altered({ exchange: Math.max(0, step.exchange + below(3) - 1) });
      const names = random() < 0.5 && step.in.length > 0 ? "in" : "out";
      const which = below(step[names].length);
      const other = buffers[below(buffers.length)]?.name as string;
      return altered({ [names]: step[names].map((x, i) => (i === which ? other : x)) });
    }
    case 4:
      if (step.op === "post" || step.op === "reply") return altered({ after: Math.max(0, step.after + below(5) - 2) });
      if (step.op === "accept") return altered({ from: below(ranksOf(s, "attention").length) });
      return altered({ slot: below(s.slots) });
    case 5:
      if (step.op === "reply") return altered({ to: below(ranksOf(s, "attention").length) });
      return altered({ slot: below(s.slots) });
    default: {
      const i = below(buffers.length);
      const b = buffers[i] as Buffer;
      const same = buffers.filter((x) => x.region === b.region);
      const offset = random() < 0.5 ? Math.max(0, b.offset + 64 * (below(9) - 4)) : (same[below(same.length)] as Buffer).offset;
      const list = buffers.slice();
      list[i] = { ...b, offset };
      const memory = { ...p.memory, [b.region]: Math.max(p.memory[b.region], offset + b.bytes) };
      return [`${p.rank.name} ${b.name} @ ${offset}, from ${b.offset}`, withProgram(s, r, { buffers: list, memory })];
    }
  }
};
