#!/usr/bin/env bash
# Builds what `npm run bench:gpu` packed, times it on this machine's GPU beside its peers (peers.py), and prints one table.
#
#   bash run.sh [bf16] [fp8]     both unless told otherwise; needs 40 GB of GPU memory, nvcc, CMake, a C++20 compiler and PyTorch with Triton
set -euo pipefail
cd "$(dirname "$0")"
build=${BUILD:-$PWD/build}
results=${RESULTS:-$PWD/results}
precisions=${*:-bf16 fp8}
mkdir -p "$build" "$results"
echo "$(date -u +%F) commit $(cat commit) on $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)"

make_program() { # folder, name
  rm -f "$build/$2.done"
  cmake -S "$1" -B "$build/$2" -DCMAKE_BUILD_TYPE=Release >"$build/$2.log" 2>&1 && cmake --build "$build/$2" --parallel "$(nproc)" >>"$build/$2.log" 2>&1 && touch "$build/$2.done" ||
    { echo "$1 does not build: $build/$2.log"; exit 1; }
}
# what needs no GPU to itself, all at once
SECONDS=0
for i in 0 1 2 3 4 5; do python3 peers.py --compile "$i/6" >"$build/compile-$i.log" 2>&1 & done
make_program runtime runtime &
for precision in $precisions; do make_program "bundles/$precision/programs/attention" "$precision" & done
wait
for name in runtime $precisions; do [ -e "$build/$name.done" ]; done
echo "built in $SECONDS s"

for precision in $precisions; do
  SECONDS=0
  cp "bundles/$precision/costs.json" "$results/$precision.costs.json"
  for shape in 16x4096 64x4096 128x4096 256x4096 64x8192 64x32768 128x32768; do
    "$build/runtime/step3-bench" --bundle "bundles/$precision" --program "$build/$precision/libprogram.so" --role attention \
      --rows "${shape%x*}" --context "${shape#*x}" >"$results/$precision-$shape.json" 2>"$build/bench.err" || echo "step3-bench, $precision $shape: $(tail -1 "$build/bench.err")"
  done
  ours=$SECONDS
  rm -f "$results/$precision-peers.json"
  python3 peers.py --ours "$results" --report "$results/$precision-peers.json" --precision "$precision" 2>"$results/$precision-peers.log" || { tail -3 "$results/$precision-peers.log"; exit 1; }
  echo "measured in $ours s and $((SECONDS - ours)) s"
done
