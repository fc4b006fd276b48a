#!/usr/bin/env bash
# gotest.sh ARGS... - `go test -v ARGS...`, or GOTEST in its place: one line for each test while it runs, the
# whole output if something failed, and at the end 'N passed, N failed, N skipped'.
set -euo pipefail

log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
${GOTEST:-go test -v} "$@" 2>&1 | tee "$log" | { grep --line-buffered -E '^ *--- |^(ok|FAIL|panic:|#) ' || true; } || status=$?

count() { grep -cE "^ *--- $1: " "$log" || true; }
passed=$(count PASS) failed=$(count FAIL) skipped=$(count SKIP)
# a program that does not build, or dies, has failed without saying how often
if [ "$status" != 0 ] && [ "$failed" = 0 ]; then failed=1; fi
if [ "$passed" = 0 ] && [ "$failed" = 0 ]; then
  echo "gotest.sh: go test $* ran no test" >&2
  failed=1
fi
if [ "$failed" != 0 ]; then
  echo "=== the whole output:"
  cat "$log"
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ] && [ "$status" = 0 ]
