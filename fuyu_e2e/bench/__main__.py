"""`python -m fuyu_e2e.bench NAME [options]`: every benchmark prints a table and writes its figures as JSON."""

import sys

from fuyu_e2e.bench.command import run

BENCHMARKS = {
    "mod": "fuyu_e2e.bench.mod:mod",
    "data": "fuyu_e2e.bench.data:data",
    "generate": "fuyu_e2e.bench.generate:generate",
    "train": "fuyu_e2e.bench.train:train",
    "scale": "fuyu_e2e.bench.scale:scale",
    "limit": "fuyu_e2e.bench.limit:limit",
}
STUDIES = ("isoflop", "optimizers", "ocr", "resolution", "sort-of-clevr")


def main() -> int:
    """Runs the named benchmark."""
    return run("fuyu_e2e.bench", "benchmark", BENCHMARKS, STUDIES)


if __name__ == "__main__":
    sys.exit(main())
