#!/usr/bin/env bash
# The main job on the sample: compile the checkpoint, run attention and FFN in two processes, print the text.
set -euo pipefail
source "$(dirname "$0")/../setup.sh"
out=${OUT_DIR:-.cache/samples}
mkdir -p "$out"
node dist/compiler/cli.js compile samples/step3-tiny --out "$out/step3-tiny.s3"
node dist/compiler/cli.js run "$out/step3-tiny.s3" --transport shm --prompt "${1:-And God said unto Moses,}" --max-tokens "${2:-80}"
