#!/usr/bin/env bash
# Every GPU test and benchmark on one GPU, in the order of what they teach, into one JSON; without a GPU a reduced run,
# which the JSON says.
#
#   bash tests/gpu/all.sh [--reduced] [--only STEP...] [--seconds N] [--out gpu.json]
#
# With --seconds it ends within so many, and the same command goes on where it stopped: what stands in the JSON isn't run
# again, unless --only names it.
#
# Takes the environment's own torch (2.11 or newer). What else is missing comes from a folder of wheels, without a
# network: WHEELS=folder, which tests/gpu/wheels.sh fills beforehand. PYTHON names the Python, 3.11 or newer.
set -euo pipefail
started_at=$(date +%s)
WHEELS=$(realpath -m "${WHEELS:-$(dirname "${BASH_SOURCE[0]}")/../../wheels}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mapfile -t wheels < <("$PYTHON" tests/gpu/requirements.py wheels "$WHEELS" | grep . || true)
if [ ${#wheels[@]} -gt 0 ]; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    # Just what is missing and lies in the folder, so that nothing asks for another torch.
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$packages" "${wheels[@]}"
    export PYTHONPATH="$PYTHONPATH:$packages"
fi
missing=$("$PYTHON" tests/gpu/requirements.py missing)
if [ -n "$missing" ]; then
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    echo "Missing here, and not in $WHEELS: $missing. Where there is a network, say bash tests/gpu/wheels.sh wheels" \
        "$version (for a bare machine: wheels --all $version), and carry the folder here." >&2
    exit 2
fi
"$PYTHON" tests/gpu/run_all.py --started-at "$started_at" "$@"
