import type { Dim } from "./dim.ts";

/** The input is at fault (1), the command line is (2), or a check or a peer failed (3): one line that says what, where and the mend. */
export class UserError extends Error {
  readonly exitCode: 1 | 2 | 3;
  /** the sizes that had to be one, where that is what is wrong */
  readonly unequal: readonly [Dim, Dim] | undefined;
  constructor(message: string, exitCode: 1 | 2 | 3 = 1, unequal?: readonly [Dim, Dim]) {
    super(message);
    this.name = "UserError";
    this.exitCode = exitCode;
    this.unequal = unequal;
  }

  /** The same with a place in front. */
  at(place: string): UserError {
    return new UserError(`${place}: ${this.message}`, this.exitCode, this.unequal);
  }
}
