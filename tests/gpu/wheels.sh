#!/usr/bin/env bash
# Fills a folder with the wheels that tests/gpu/all.sh needs beside torch, for a machine with a network to carry to one
# without.
#
#   bash tests/gpu/wheels.sh wheels [3.12]
set -euo pipefail
out=$(realpath -m "${1:?name a folder}")
version=${2:-3.12}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}
mapfile -t wanted < <("$PYTHON" tests/gpu/requirements.py)
# Resolved with torch's small CPU build, which is not kept: the other machine has a torch of its own.
resolved=$(mktemp)
"$PYTHON" -m pip install -q --dry-run --ignore-installed --report "$resolved" --only-binary=:all: \
    --target "$(mktemp -d)" --python-version "$version" --platform manylinux_2_28_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --extra-index-url https://download.pytorch.org/whl/cpu "torch==2.11.0+cpu" "${wanted[@]}"
"$PYTHON" - "$resolved" >"$resolved.txt" <<'PYTHON'
import json, sys
inside_torch = {"torch", "triton", "sympy", "mpmath", "networkx", "jinja2", "markupsafe"}
for found in json.load(open(sys.argv[1]))["install"]:
    name = found["metadata"]["name"].lower()
    if name not in inside_torch and not name.startswith(("nvidia", "cuda")):
        print(f"{name}=={found['metadata']['version']}")
PYTHON
"$PYTHON" -m pip download -q --no-deps --only-binary=:all: --dest "$out" --python-version "$version" \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    -r "$resolved.txt"
du -sh "$out"
