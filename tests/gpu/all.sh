#!/usr/bin/env bash
# Every GPU test and benchmark on one GPU, in under 25 minutes, into one JSON; without a GPU a reduced run, which the
# JSON says.
#
#   bash tests/gpu/all.sh [--reduced] [--out gpu.json]
#
# Takes the environment's own torch (2.11 or newer). What else is missing comes from a folder of wheels, without a
# network: WHEELS=folder, which tests/gpu/wheels.sh fills beforehand. PYTHON names the Python, 3.11 or newer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-wheels}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if ! "$PYTHON" -c 'import lightning, webdataset, transformers, pytest, beartype' 2>/dev/null; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    # All that is needed lies in the folder, so that nothing asks for another torch.
    "$PYTHON" -m pip install -q --no-index --no-deps --target "$packages" "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$packages"
fi
"$PYTHON" tests/gpu/run_all.py "$@"
