/** Where long work says how far it is. Nothing here goes to standard output, which belongs to results. */
export interface Progress {
  /** a phase begins; ends the phase before */
  phase(name: string): void;
  /** how far the phase is, in its own unit */
  at(done: number, total: number): void;
  /** one line that stays */
  note(line: string): void;
  end(): void;
}

export const silent: Progress = { phase: () => {}, at: () => {}, note: () => {}, end: () => {} };

/** A line that rewrites itself on a terminal; elsewhere plain lines, at most one each two seconds. */
export const progressOn = (stream: NodeJS.WriteStream, now: () => number = Date.now): Progress => {
  const live = stream.isTTY === true && !process.env.CI;
  let phase = "";
  let shown = 0;
  const clear = (): void => {
    if (live && shown > 0) stream.write("\r\u001b[K");
    shown = 0;
  };
  return {
    phase: (name) => {
      clear();
      phase = name;
      stream.write(live ? `\r${name} ...` : `${name} ...\n`);
      shown = now();
    },
    at: (done, total) => {
      const interval = live ? 100 : 2000;
      if (phase === "" || (now() - shown < interval && done < total)) return;
      shown = now();
      const line = `${phase} ${total > 0 ? Math.floor((100 * done) / total) : 100} %  (${mib(done)} of ${mib(total)} MiB)`;
      stream.write(live ? `\r\u001b[K${line}` : `${line}\n`);
    },
    note: (line) => {
      clear();
      stream.write(`${line}\n`);
    },
    end: () => {
      clear();
      phase = "";
    },
  };
};

const mib = (bytes: number): string => (bytes / 2 ** 20).toFixed(0);
