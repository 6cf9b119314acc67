/** The input is at fault (1), the command line is (2), or a check or a peer failed (3): one line that says what, where and the mend. */
export class UserError extends Error {
  readonly exitCode: 1 | 2 | 3;
  constructor(message: string, exitCode: 1 | 2 | 3 = 1) {
    super(message);
    this.name = "UserError";
    this.exitCode = exitCode;
  }
}
