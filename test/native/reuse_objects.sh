#!/usr/bin/env bash
# Compiler launcher of the tests (CMAKE_CXX_COMPILER_LAUNCHER): bundles of one model share most of their kernels. A unit of a program is
# copied from STEP3C_OBJECTS instead of compiled when its text, the headers beside it, the flags and the compiler are those of an earlier one.
set -euo pipefail

arguments=("$@")
source="" object="" dependencies="" flags=()
while [ $# -gt 0 ]; do
  case "$1" in
    -c) source="$2" && shift ;;
    -o) object="$2" && shift ;;
    -MF) dependencies="$2" && shift ;;
    -MT | -MQ) shift ;;
    -I*) ;;
    *) flags+=("$1") ;;
  esac
  shift
done

# only units of programs: all their headers but the system's lie beside them
case "$(basename "$source")" in
  kernels_*.cpp | rows_*.cpp) ;;
  *) exec "${arguments[@]}" ;;
esac
key=$({
  "${arguments[0]}" --version
  printf '%s\n' "${flags[@]}"
  cat "$source" "$(dirname "$source")"/*.h
} | sha256sum | cut -c1-40)
known="$STEP3C_OBJECTS/$key.o"
if [ -f "$known" ]; then
  [ -z "$dependencies" ] || : >"$dependencies"
  exec cp "$known" "$object"
fi
"${arguments[@]}"
mkdir -p "$STEP3C_OBJECTS"
cp "$object" "$known.$$"
mv "$known.$$" "$known"
