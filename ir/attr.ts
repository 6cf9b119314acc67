/** What an op's attributes may hold: everything prints, parses and goes through JSON unchanged. Absent means default. */
export type Attr = number | string | boolean | readonly number[] | readonly string[];
export type Attrs = Readonly<Record<string, Attr>>;
