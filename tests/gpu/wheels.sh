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
names=$(mktemp)
# Versions of an environment in which the tests pass, but for torch and what only torch needs: the other machine has its
# own.
"$PYTHON" - "${wanted[@]}" >"$names" <<'PYTHON'
import re, sys
from importlib.metadata import distribution

seen = set()


def need(requirement):
    name = re.split(r"[^\w.-]", requirement.strip())[0].lower().replace("_", "-")
    if name in seen or name == "torch" or "extra ==" in requirement:
        return
    seen.add(name)
    try:
        found = distribution(name)
    except ImportError:
        return  # for another platform or Python
    print(f"{name}=={found.version}")
    extras = re.search(r"\[([\w,-]+)\]", requirement)
    for further in found.requires or []:
        wanted = re.search(r"extra == ['\"]([\w-]+)['\"]", further)
        if wanted is None or (extras and wanted[1] in extras[1].split(",")):
            need(re.sub(r";.*", "", further))


for requirement in sys.argv[1:]:
    need(requirement)
PYTHON
"$PYTHON" -m pip download -q --no-deps --only-binary=:all: --dest "$out" --python-version "$version" \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    -r "$names"
du -sh "$out"
