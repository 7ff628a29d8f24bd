"""`python -m fuyu_e2e.bench NAME [options]`: every benchmark prints a table and writes its figures as JSON."""

import sys
from collections.abc import Callable, Sequence
from pkgutil import resolve_name

from fuyu_e2e.arguments import did_you_mean
from fuyu_e2e.environment import set_defaults
from fuyu_e2e.errors import UserError
from fuyu_e2e.exit_codes import WRONG_USE

BENCHMARKS = {
    "mod": "fuyu_e2e.bench.mod:mod",
    "isoflop": "fuyu_e2e.bench.isoflop:isoflop",
    "data": "fuyu_e2e.bench.data:data",
    "generate": "fuyu_e2e.bench.generate:generate",
    "train": "fuyu_e2e.bench.train:train",
    "scale": "fuyu_e2e.bench.scale:scale",
    "limit": "fuyu_e2e.bench.limit:limit",
    "optimizers": "fuyu_e2e.bench.optimizers:optimizers",
    "ocr": "fuyu_e2e.bench.ocr:ocr",
    "resolution": "fuyu_e2e.bench.resolution:resolution",
    "sort-of-clevr": "fuyu_e2e.bench.sort_of_clevr:sort_of_clevr",
}
"""By name, the function that takes the options; imported once the environment is set."""


def main() -> int:
    """Runs the benchmark that is named."""
    set_defaults()
    name, *args = sys.argv[1:] or [""]
    if name not in BENCHMARKS:
        hint = did_you_mean(name, BENCHMARKS) or f"choose from {', '.join(BENCHMARKS)}."
        print(f"fuyu_e2e.bench: There is no benchmark {name!r}: {hint}", file=sys.stderr)
        return WRONG_USE
    benchmark: Callable[[Sequence[str]], None] = resolve_name(BENCHMARKS[name])
    try:
        benchmark(args)
    except UserError as error:
        print(f"fuyu_e2e.bench: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
