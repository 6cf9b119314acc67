#!/usr/bin/env bash
# Builds what `npm run test:gpu` packed and checks it on this machine's GPU. Needs nvcc, CMake and a C++20 compiler. The last line counts.
set -uo pipefail
cd "$(dirname "$0")"
build=${BUILD:-$PWD/build}
jobs=$(nproc)
passed=0 failed=0
verdict() { if [ "$1" = 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi; echo "$([ "$1" = 0 ] && echo right || echo WRONG) $2"; }
make_program() { # folder, name; silent unless it fails
  cmake -S "$1" -B "$build/$2" -DCMAKE_BUILD_TYPE=Release >"$build/$2.log" 2>&1 && cmake --build "$build/$2" --parallel "$jobs" >>"$build/$2.log" 2>&1 ||
    { grep -m3 -E "error|Error" "$build/$2.log"; return 1; }
}
mkdir -p "$build"
echo "$(date -u +%F) commit $(cat commit) on $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1), $(nvcc --version 2>/dev/null | grep -o 'V[0-9.]*' || echo nvcc)"
make_program runtime runtime || exit 1
for arch in kernels/*/; do
  name=$(basename "$arch")
  SECONDS=0
  if make_program "$arch/program" "kernels-$name"; then
    echo "kernels for $name: built in $SECONDS s"
    line=$("$build/runtime/step3-selftest" "$arch/cases" "$build/kernels-$name/libprogram.so" | tee "$build/kernels-$name.out" | tail -1)
    grep WRONG "$build/kernels-$name.out" | head -5
    passed=$((passed + $(echo "$line" | cut -d' ' -f1))) failed=$((failed + $(echo "$line" | cut -d' ' -f3)))
    echo "kernels for $name: $line"
  else verdict 1 "kernels for $name do not build"; fi
done
for bundle in bundles/*/; do
  bundle=${bundle%/}
  name=$(basename "$bundle")
  SECONDS=0
  programs=()
  for role in attention ffn; do
    make_program "$bundle/programs/$role" "$name-$role" || { verdict 1 "$name: $role does not build"; continue 2; }
    programs+=("--program-$role" "$build/$name-$role/libprogram.so")
    "$build/runtime/step3-selftest" "$bundle/selftest/$role.cases" "$build/$name-$role/libprogram.so" >"$build/$name-$role.out" 2>&1
    code=$?
    verdict $code "$name: self-test of $role: $(tail -1 "$build/$name-$role.out")"
    [ $code = 0 ] || grep WRONG "$build/$name-$role.out" | head -3
  done
  for transport in ${TRANSPORTS:-local shm}; do
    "$build/runtime/step3-run" --bundle "$bundle" "${programs[@]}" --transport "$transport" --score --logits "$build/$name.f32" <"$bundle.jsonl" >"$build/$name.scores" 2>"$build/$name.err" ||
      { verdict 1 "$name over $transport: $(tail -1 "$build/$name.err")"; continue; }
    for prompt in 0 1 2; do
      line=$("$build/runtime/step3-selftest" --logits "$bundle.expected.$prompt" "$build/$name.f32.$prompt" "$(cat "$bundle.bound.$prompt")")
      verdict $? "$name over $transport, prompt $prompt: $line"
    done
  done
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
