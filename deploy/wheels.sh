#!/usr/bin/env bash
# A folder from which the package is installed without a network: wheels of it and of all that it needs, of the
# versions that were tried together, and requirements.txt with the SHA-256 of each.
#
#   deploy/wheels.sh wheels                         # for this machine's Python and platform; needs a network
#   deploy/wheels.sh wheels --index-url URL         # options for pip, such as an index of PyTorch for one CUDA
#
# Over there: python3 -m venv /opt/fedimaging
#             /opt/fedimaging/bin/pip install --no-index --find-links wheels --require-hashes -r wheels/requirements.txt
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
out="${1:?deploy/wheels.sh FOLDER [options of pip]}"
shift
python="${PYTHON:-python3}"
mkdir -p "$out"
rm -f "$out"/fedimaging-*.whl "$out"/requirements.txt
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$out" "$here"
"$python" -m pip download --quiet --only-binary :all: --dest "$out" --constraint "$here/constraints.txt" "$@" \
  "$out"/fedimaging-*.whl
"$here"/deploy/digests.sh "$out" > "$out/requirements.txt"
echo "$(find "$out" -name '*.whl' | wc -l) wheels and requirements.txt are in $out"
