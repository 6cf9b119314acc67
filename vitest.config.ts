import { defineConfig } from "vitest/config";

export default defineConfig({
  test: {
    include: ["test/**/*.test.ts"],
    // Native builds and bundles dominate: two files at a time fill two cores.
    maxWorkers: 2,
    // Modules keep no state: a worker loads them once, not once a file.
    isolate: false,
    testTimeout: 300_000,
    hookTimeout: 300_000,
  },
});
