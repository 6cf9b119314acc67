#!/usr/bin/env bash
# Builds what `npm run test:gpu` packed and checks it on this machine's GPU. Needs nvcc, CMake and a C++20 compiler. The last line counts.
#
#   bash run.sh [PART ...]     kernels, bundles, layers, sanitize; without sanitize unless told otherwise
#
# layers: needs PyTorch, and for all of them together 18 GB of disk and 40 GB of GPU memory; LAYERS names the folder.
# sanitize: kernels and bundles under compute-sanitizer; SANITIZERS names its tools, SANITIZE_SECONDS is how long each process may take. Bundles
# are left to memcheck unless tools are named: in the rings of contract_hopper and attention_hopper racecheck now and then sees hazards between
# accesses with a barrier between them (bar.sync of 256 threads; mbarriers at which one lane arrives after __syncwarp).
set -uo pipefail
cd "$(dirname "$0")"
parts=" ${*:-kernels bundles layers} "
takes() { [[ $parts == *" $1 "* ]]; }
build=${BUILD:-$PWD/build}
jobs=$(nproc)
passed=0 failed=0
verdict() { if [ "$1" = 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi; echo "$([ "$1" = 0 ] && echo right || echo WRONG) $2"; }
count() { passed=$((passed + $(grep -c ^right "$1"))) failed=$((failed + $(grep -c ^WRONG "$1"))); } # verdicts in a file

make_program() { # folder, name; silent unless it fails
  cmake -S "$1" -B "$build/$2" -DCMAKE_BUILD_TYPE=Release >"$build/$2.log" 2>&1 && cmake --build "$build/$2" --parallel "$jobs" >>"$build/$2.log" 2>&1 ||
    { grep -m3 -E "error|Error" "$build/$2.log"; rm -f "$build/$2/libprogram.so"; return 1; }
}
program() { echo "$build/$1/libprogram.so"; }
built() { [ -f "$(program "$1")" ] || { verdict 1 "$1 does not build"; return 1; }; }
at_once() { while [ "$(jobs -rp | wc -l)" -ge "$1" ]; do wait -n; done; } # waits until fewer processes than this run in the background

build_all() {
  local folder role
  SECONDS=0
  make_program runtime runtime || exit 1
  for folder in kernels/*/ bundles/*/ layers/*.s3/; do
    [ -d "$folder" ] || continue
    takes "${folder%%/*}" || { takes sanitize && [[ $folder != layers/* ]]; } || continue
    folder=${folder%/}
    if [[ $folder == kernels/* ]]; then make_program "$folder/program" "kernels-$(basename "$folder")" & continue; fi
    for role in attention ffn; do
      at_once $((jobs / 2 > 1 ? jobs / 2 : 1))
      make_program "$folder/programs/$role" "$(basename "$folder")-$role" &
    done
  done
  wait
  echo "built in $SECONDS s"
}

check_kernels() {
  local arch name line
  for arch in kernels/*/; do
    name=kernels-$(basename "$arch")
    built "$name" || continue
    line=$("$build/runtime/step3-selftest" "$arch/cases" "$(program "$name")" | tee "$build/$name.out" | tail -1)
    grep WRONG "$build/$name.out" | head -5
    passed=$((passed + $(echo "$line" | cut -d' ' -f1))) failed=$((failed + $(echo "$line" | cut -d' ' -f3)))
    echo "$name: $line"
  done
}

check_bundles() {
  local bundle name role code transport prompt line
  for bundle in bundles/*/; do
    [ -d "$bundle" ] || continue
    bundle=${bundle%/}
    name=$(basename "$bundle")
    built "$name-attention" && built "$name-ffn" || continue
    for role in attention ffn; do
      "$build/runtime/step3-selftest" "$bundle/selftest/$role.cases" "$(program "$name-$role")" >"$build/$name-$role.out" 2>&1
      code=$?
      verdict $code "$name: self-test of $role: $(tail -1 "$build/$name-$role.out")"
      [ $code = 0 ] || grep WRONG "$build/$name-$role.out" | head -3
    done
    for transport in ${TRANSPORTS:-local shm}; do
      "$build/runtime/step3-run" --bundle "$bundle" --program-attention "$(program "$name-attention")" --program-ffn "$(program "$name-ffn")" --transport "$transport" \
        --score --logits "$build/$name.f32" <"$bundle.jsonl" >"$build/$name.scores" 2>"$build/$name.err" ||
        { verdict 1 "$name over $transport: $(tail -1 "$build/$name.err")"; continue; }
      for prompt in 0 1 2; do
        line=$("$build/runtime/step3-selftest" --logits "$bundle.expected.$prompt" "$build/$name.f32.$prompt" "$(cat "$bundle.bound.$prompt")")
        verdict $? "$name over $transport, prompt $prompt: $line"
      done
    done
  done
}

# One layer in full size against float64, with weights that are drawn here.
check_layer() { # name
  local layer=$1 bundle=$layers/$1.s3 role line code
  for role in attention ffn; do
    line=$("$build/runtime/step3-selftest" "layers/$layer.s3/selftest/$role.cases" "$(program "$layer.s3-$role")" 2>&1) && echo -n right || echo -n WRONG
    echo " $layer: self-test of $role: $(echo "$line" | tail -1)"
  done
  cp -r "layers/$layer.s3" "$layers/" && python3 layer.py draw "$bundle" || { echo "WRONG $layer: its weights cannot be drawn"; return; }
  python3 layer.py check "$bundle" --config "layers/$layer.config/config.json" --runner "$build/runtime/step3-run" \
    --attention "$(program "$layer.s3-attention")" --ffn "$(program "$layer.s3-ffn")"
  code=$?
  [ $code = 0 ] || [ $code = 3 ] || echo "WRONG $layer: nothing was compared"
  rm -rf "$bundle"
}
check_layers() {
  python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>"$build/torch.err" || { echo "layers are left out: python3 has no PyTorch that finds the GPU"; return; }
  layers=${LAYERS:-$build/layers}
  mkdir -p "$layers"
  local layer
  for layer in layers/*.s3; do
    [ -d "$layer" ] || continue
    layer=$(basename "$layer" .s3)
    : >"$build/$layer.out"
    built "$layer.s3-attention" && built "$layer.s3-ffn" || continue
    check_layer "$layer" >"$build/$layer.out" 2>&1 &
  done
  wait
  for layer in layers/*.s3; do
    [ -d "$layer" ] || continue
    cat "$build/$(basename "$layer" .s3).out"
    count "$build/$(basename "$layer" .s3).out"
  done
}

# Every process of its own, as many at once as half of the processors.
sanitize() { # name, tool, command
  local out="$build/sanitize-$1-$2"
  timeout "${SANITIZE_SECONDS:-3600}" compute-sanitizer --tool "$2" --error-exitcode 86 --print-limit 10 "${@:3}" >"$out.out" 2>&1
  local code=$?
  { # one write, as many processes share the output
    verdict "$code" "sanitize $1-$2: $([ "$code" = 124 ] && echo not done in time || grep -hE "SUMMARY|[0-9]+ passed" "$out.out" | tr -d = | tr -s ' \n' ' ')"
    [ "$code" = 0 ] || grep -E "^=========|WRONG" "$out.out" | head -"${SANITIZE_LINES:-12}"
  } >"$out.verdict"
  cat "$out.verdict"
}
check_sanitized() {
  command -v compute-sanitizer >/dev/null || { verdict 1 "sanitize: compute-sanitizer is not on PATH"; return; }
  local bundle arch name role tool part all=()
  start() {
    at_once $((jobs / 2 > 1 ? jobs / 2 : 1))
    all+=("$1-$2")
    sanitize "$@" &
  }
  for bundle in bundles/mfa-*/ bundles/drawn-cuda-cuda-{bf16,fp8,int8}-1A1F/; do
    [ -d "$bundle" ] || continue
    bundle=${bundle%/}
    name=$(basename "$bundle")
    built "$name-attention" && built "$name-ffn" || continue
    head -1 "$bundle.jsonl" >"$build/$name.first"
    for tool in ${SANITIZERS:-memcheck}; do
      for role in attention ffn; do start "$name-$role" "$tool" "$build/runtime/step3-selftest" "$bundle/selftest/$role.cases" "$(program "$name-$role")"; done
      start "$name" "$tool" "$build/runtime/step3-run" --bundle "$bundle" --program-attention "$(program "$name-attention")" --program-ffn "$(program "$name-ffn")" \
        --max-tokens 2 --prompts "$build/$name.first"
    done
  done
  for arch in kernels/*/; do
    name=kernels-$(basename "$arch")
    built "$name" || continue
    for tool in ${SANITIZERS:-memcheck racecheck}; do
      for part in 0 1 2 3; do start "$name-$part" "$tool" "$build/runtime/step3-selftest" "$arch/cases" "$(program "$name")" --part "$part/4"; done
    done
  done
  wait
  for name in "${all[@]}"; do count "$build/sanitize-$name.verdict"; done
}

mkdir -p "$build"
echo "$(date -u +%F) commit $(cat commit) on $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1), $(nvcc --version 2>/dev/null | grep -o 'V[0-9][0-9.]*' || echo nvcc)"
build_all
takes kernels && check_kernels
takes bundles && check_bundles
takes layers && check_layers
takes sanitize && check_sanitized
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
