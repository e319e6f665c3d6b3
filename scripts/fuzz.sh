#!/usr/bin/env bash
# Runs every fuzz target of the module in turn: scripts/fuzz.sh [TIME], 30s unless told.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly fuzztime=${1:-30s}
targets=$(grep -rnoE --include='*_test.go' --exclude-dir='.?*' '^func Fuzz[A-Za-z0-9_]*' . | sort || true)
[[ -n "$targets" ]] || { echo "No fuzz target found." >&2; exit 1; }

while IFS=: read -r file _ decl; do
  name=${decl#func }
  echo "Fuzzing $(dirname "$file") $name for $fuzztime ..."
  go test -run '^$' -fuzz "^$name\$" -fuzztime "$fuzztime" "$(dirname "$file")" </dev/null
done <<<"$targets"
