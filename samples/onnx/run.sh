#!/usr/bin/env bash
# Makes the sample models, compiles each once for all its sizes, checks the proof of its schedule, and runs it.
set -euo pipefail
source "$(dirname "$0")/../../setup.sh"
out=${OUT_DIR:-.cache/samples/onnx}
mkdir -p "$out"
step3c() { node dist/compiler/cli.js "$@"; }
node dist/samples/onnx/make.js "$out"
for model in gpt2 qwen3_moe deepseek_mla; do
  step3c compile "$out/$model.onnx" --dim batch=4 --dim sequence=64 --dim past=0..256 --explain partition | sed -n '1,5p'
  step3c compile "$out/$model.onnx" --dim batch=4 --dim sequence=64 --dim past=0..256 --out "$out/$model.s3"
  step3c check "$out/$model.s3"
  inputs=()
  for file in "$out/$model"/*.npy; do inputs+=(--input "$(basename "$file" .npy)=$file"); done
  step3c eval "$out/$model.s3" "${inputs[@]}" --out "$out/$model.out"
done
