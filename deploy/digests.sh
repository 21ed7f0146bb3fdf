#!/usr/bin/env bash
# The wheels of a folder as requirements with their SHA-256, for `pip install --require-hashes`.
set -euo pipefail
cd "${1:?deploy/digests.sh FOLDER}"
for wheel in *.whl; do
  IFS=- read -r name version _ <<< "$wheel"
  printf '%s==%s --hash=sha256:%s\n' "${name//_/-}" "$version" "$(sha256sum "$wheel" | cut -d' ' -f1)"
done
