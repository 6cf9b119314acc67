#!/usr/bin/env bash
# Installs the npm packages and builds step3c where that is not done yet. The other scripts source this; it needs node, npm, cmake and a C++ compiler.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
need() { command -v "$1" >/dev/null 2>&1 || { echo "step3c needs $1 and did not find it on PATH. $2" >&2; exit 1; }; }
need node "Install Node.js 20.19 or newer."
need npm "It comes with Node.js."
need cmake "Debian and Ubuntu: apt-get install cmake"
command -v "${CXX:-c++}" >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 ||
  { echo "step3c needs a C++20 compiler and found none (c++, g++, clang++). Debian and Ubuntu: apt-get install g++" >&2; exit 1; }
node -e 'const [a, b] = process.versions.node.split(".").map(Number); if (a < 20 || (a === 20 && b < 19)) { console.error(`step3c needs Node.js 20.19 or newer; this is ${process.version}.`); process.exit(1); }'
if [ ! -f node_modules/.package-lock.json ] || [ package-lock.json -nt node_modules/.package-lock.json ]; then
  # not `npm ci`: it refuses a lock file made where a registry lacks the binaries of some other platform
  npm install --no-save --no-audit --no-fund
fi
if [ ! -f dist/compiler/cli.js ] || [ -n "$(find ir compiler backends runtime bench samples test/gpu package.json tsconfig.json tsconfig.build.json -newer dist/compiler/cli.js \( -name '*.ts' -o -name '*.json' \) -print -quit)" ]; then
  rm -rf dist
  npm run --silent build
fi
