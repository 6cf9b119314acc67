#!/usr/bin/env bash
# All checks and tests, set-up included. The last line counts them.
set -euo pipefail
source "$(dirname "$0")/../setup.sh"
npm run --silent check
npm run --silent lint
mkdir -p .cache
status=0
npx vitest run --reporter=default --reporter=json --outputFile.json=.cache/tests.json "$@" || status=$?
node -e '
const r = JSON.parse(require("fs").readFileSync(".cache/tests.json", "utf8"));
console.log(`${r.numPassedTests} passed, ${r.numFailedTests} failed`);
if (r.numFailedTests > 0 || !r.success) process.exit(1);'
exit "$status"
