#!/usr/bin/env bash
# Fills a folder with the wheels that tests/gpu/all.sh needs, on a machine with a network, to carry to one without: those
# that an image for CUDA with torch, Lightning and transformers lacks, 6 MB; with --all everything beside torch, 100 MB.
#
#   bash tests/gpu/wheels.sh wheels [--all] [3.12]
#
# The last is the other machine's Python.
set -euo pipefail
out=$(realpath -m "${1:?name a folder}")
shift
all=()
if [ "${1:-}" = --all ]; then
    all=(--all)
    shift
fi
version=${1:-3.12}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}
names=$(mktemp)
trap 'rm -f "$names"' EXIT
# Versions of an environment in which the tests pass.
"$PYTHON" tests/gpu/requirements.py pinned "${all[@]}" >"$names"
"$PYTHON" -m pip download -q --no-deps --only-binary=:all: --dest "$out" --python-version "$version" \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    -r "$names"
du -sh "$out"
