"""`python -m fuyu_e2e.bench NAME [options]`: every benchmark prints a table and writes its figures as JSON."""

import sys
from collections.abc import Callable, Sequence

from fuyu_e2e.bench.data import data
from fuyu_e2e.bench.generate import generate
from fuyu_e2e.bench.isoflop import isoflop
from fuyu_e2e.bench.limit import limit
from fuyu_e2e.bench.mod import mod
from fuyu_e2e.bench.ocr import ocr
from fuyu_e2e.bench.optimizers import optimizers
from fuyu_e2e.bench.resolution import resolution
from fuyu_e2e.bench.scale import scale
from fuyu_e2e.bench.sort_of_clevr import sort_of_clevr
from fuyu_e2e.bench.train import train
from fuyu_e2e.errors import UserError

BENCHMARKS: dict[str, Callable[[Sequence[str]], None]] = {
    "mod": mod,
    "isoflop": isoflop,
    "data": data,
    "generate": generate,
    "train": train,
    "scale": scale,
    "limit": limit,
    "optimizers": optimizers,
    "ocr": ocr,
    "resolution": resolution,
    "sort-of-clevr": sort_of_clevr,
}


def main() -> int:
    """Runs the benchmark that is named."""
    name, *args = sys.argv[1:] or [""]
    if name not in BENCHMARKS:
        print(f"usage: python -m fuyu_e2e.bench {{{','.join(BENCHMARKS)}}} [--help]", file=sys.stderr)
        return 2
    try:
        BENCHMARKS[name](args)
    except UserError as error:
        print(f"fuyu_e2e.bench: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
