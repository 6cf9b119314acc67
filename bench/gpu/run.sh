#!/usr/bin/env bash
# Builds what `npm run bench:gpu` packed and times it on this machine's GPU: the attention side beside its peers (peers.py), one table, and the FFN
# side against the roof (ffn.py).
#
#   bash run.sh [bf16] [fp8] [ffn]     all unless told otherwise; needs 40 GB of GPU memory, nvcc, CMake, a C++20 compiler and Python, and for bf16 and
#                                      fp8 PyTorch with Triton
set -euo pipefail
cd "$(dirname "$0")"
build=${BUILD:-$PWD/build}
results=${RESULTS:-$PWD/results}
parts=${*:-bf16 fp8 ffn}
precisions=$(for part in $parts; do [ "$part" = ffn ] || echo "$part"; done)
splits=$(for part in $parts; do [ "$part" != ffn ] || ls ffn; done)
mkdir -p "$build" "$results/ffn"
echo "$(date -u +%F) commit $(cat commit) on $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)"

make_program() { # folder, name
  rm -f "$build/$2.done"
  cmake -S "$1" -B "$build/$2" -DCMAKE_BUILD_TYPE=Release >"$build/$2.log" 2>&1 && cmake --build "$build/$2" --parallel "$(nproc)" >>"$build/$2.log" 2>&1 && touch "$build/$2.done" ||
    { echo "$1 does not build: $build/$2.log"; exit 1; }
}
# what needs no GPU to itself, all at once
SECONDS=0
if [ -n "$precisions" ]; then
  for i in 0 1 2 3 4 5; do python3 peers.py --compile "$i/6" >"$build/compile-$i.log" 2>&1 & done
fi
make_program runtime runtime &
for precision in $precisions; do make_program "attention/$precision/programs/attention" "$precision" & done
for split in $splits; do make_program "ffn/$split/programs/ffn" "$split" & done
wait
for name in runtime $precisions $splits; do [ -e "$build/$name.done" ]; done
echo "built in $SECONDS s"

time_side() { # side, name, rows, file, more flags
  local side=$1 name=$2 rows=$3 file=$4
  shift 4
  "$build/runtime/step3-bench" --bundle "$side/$name" --program "$build/$name/libprogram.so" --role "$side" --rows "$rows" "$@" \
    >"$file" 2>"$build/bench.err" || { rm -f "$file"; echo "step3-bench, $name, $rows rows: $(tail -1 "$build/bench.err")"; }
}
for precision in $precisions; do
  SECONDS=0
  cp "attention/$precision/costs.json" "$results/$precision.costs.json"
  for shape in 16x4096 64x4096 128x4096 256x4096 64x8192 64x32768 128x32768; do
    time_side attention "$precision" "${shape%x*}" "$results/$precision-$shape.json" --context "${shape#*x}"
  done
  ours=$SECONDS
  rm -f "$results/$precision-peers.json"
  python3 peers.py --ours "$results" --report "$results/$precision-peers.json" --precision "$precision" 2>"$results/$precision-peers.log" || { tail -3 "$results/$precision-peers.log"; exit 1; }
  echo "measured in $ours s and $((SECONDS - ours)) s"
done
if [ -n "$splits" ]; then
  for split in $splits; do # as many attention ranks as its name says
    cp "ffn/$split/costs.json" "$results/ffn/$split.costs.json"
    for tokens in 64 128 256 512 1024 2048 4096; do
      time_side ffn "$split" $((tokens / ${split//[^0-9]/})) "$results/ffn/$split-$tokens.json"
    done
  done
  python3 ffn.py "$results/ffn"
fi
