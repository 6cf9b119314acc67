import { createHash } from "node:crypto";
import {
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { dirname, join, relative, sep } from "node:path";
import type { Manifest } from "../ir/bundle.ts";
import { UserError } from "../ir/error.ts";

/** A bundle under construction; it appears under its name only when complete. */
export interface BundleWriter {
  readonly directory: string;
  text(path: string, content: string): void;
  bytes(path: string, content: Uint8Array): void;
  json(path: string, value: unknown): void;
  /** a path inside the bundle whose folder exists, for a writer that streams; give its SHA-256 when the writer knows it */
  file(path: string): string;
  digest(path: string, sha256: string): void;
  finish(): void;
  abandon(): void;
}

export const createBundle = (out: string): BundleWriter => {
  if (existsSync(out) && !(statSync(out).isDirectory() && (existsSync(join(out, "COMPLETE")) || readdirSync(out).length === 0)))
    throw new UserError(`${out}: exists and is not a bundle; choose another --out or remove it`);
  const parent = dirname(out);
  if (!existsSync(parent)) throw new UserError(`${out}: its folder ${parent} does not exist; create it first`);
  const directory = `${out}.partial-${process.pid}`;
  rmSync(directory, { recursive: true, force: true });
  mkdirSync(directory);
  const digests = new Map<string, string>();
  const place = (path: string): string => {
    const full = join(directory, path);
    mkdirSync(dirname(full), { recursive: true });
    return full;
  };
  const write = (path: string, content: string | Uint8Array): void => {
    writeFileSync(place(path), content);
    digests.set(path, createHash("sha256").update(content).digest("hex"));
  };
  return {
    directory,
    text: write,
    bytes: write,
    json: (path, value) => write(path, `${JSON.stringify(value)}\n`),
    file: place,
    digest: (path, sha256) => digests.set(path, sha256),
    finish: () => {
      const files = listFiles(directory).sort();
      const lines = files.map((path) => `${digests.get(path) ?? fileDigest(join(directory, path))}  ${path}`);
      writeFileSync(join(directory, "SHA256SUMS"), `${lines.join("\n")}\n`);
      writeFileSync(join(directory, "COMPLETE"), `${createHash("sha256").update(lines.join("\n")).digest("hex")}\n`);
      rmSync(out, { recursive: true, force: true });
      renameSync(directory, out);
    },
    abandon: () => rmSync(directory, { recursive: true, force: true }),
  };
};

/** Paths of all files below a directory, with `/`. */
export const listFiles = (directory: string): string[] => {
  const files: string[] = [];
  const visit = (path: string): void => {
    for (const entry of readdirSync(path, { withFileTypes: true })) {
      const full = join(path, entry.name);
      if (entry.isDirectory()) visit(full);
      else files.push(relative(directory, full).split(sep).join("/"));
    }
  };
  visit(directory);
  return files;
};

/** SHA-256 of a file, read in pieces. */
export const fileDigest = (path: string, onBytes: (bytes: number) => void = () => {}): string => {
  const hash = createHash("sha256");
  const descriptor = openSync(path, "r");
  const buffer = Buffer.allocUnsafe(1 << 22);
  try {
    for (;;) {
      const got = readSync(descriptor, buffer, 0, buffer.length, null);
      if (got === 0) return hash.digest("hex");
      hash.update(buffer.subarray(0, got));
      onBytes(got);
    }
  } finally {
    closeSync(descriptor);
  }
};

/** The identity of a complete bundle: the hash of its SHA256SUMS. Cheap; `step3c check` is what reads the files. */
export const bundleHash = (bundle: string): string => {
  if (!existsSync(bundle)) throw new UserError(`${bundle}: no such bundle; make one with step3c compile`);
  const marker = join(bundle, "COMPLETE");
  if (!existsSync(marker)) throw new UserError(`${bundle}: not a complete bundle (no COMPLETE file); compile it again`);
  return readFileSync(marker, "utf8").trim();
};

export const readManifest = (bundle: string): Manifest => {
  bundleHash(bundle);
  const manifest = readJson(join(bundle, "manifest.json")) as Manifest;
  if (manifest?.format !== 1)
    throw new UserError(
      `${join(bundle, "manifest.json")}: bundle format ${String(manifest?.format)}, this step3c reads format 1; compile again`,
    );
  if (
    !Array.isArray(manifest.programs) ||
    !Array.isArray(manifest.schedules) ||
    !Array.isArray(manifest.weights) ||
    !manifest.model
  )
    throw new UserError(
      `${join(bundle, "manifest.json")}: not a manifest (programs, schedules, weights or model is missing); compile again`,
    );
  return manifest;
};

/** Reads JSON from a bundle; a damaged file is named with what is wrong. */
export const readJson = (path: string): unknown => {
  let text: string;
  try {
    text = readFileSync(path, "utf8");
  } catch {
    throw new UserError(`${path}: cannot be read; the bundle is damaged, compile it again`, 3);
  }
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new UserError(`${path}: ${(error as Error).message}; the bundle is damaged, compile it again`, 3);
  }
};
