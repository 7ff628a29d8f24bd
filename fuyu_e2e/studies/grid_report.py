"""Compares the runs of a grid: when they begin to read, and where they end, with intervals over seeds."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

LEVELS = {"half": 0.5, "nine tenths": 0.9}
"""Fractions of the held-out documents whose first reading is timed."""
COVERAGE = 0.9
"""The least coverage of an interval, if there are enough seeds."""
ENDS = ("exact_match", "loss")
"""Metrics of the last validation that are compared."""

Number = int | float
Result = Mapping[str, Any]


def median_interval(values: Sequence[Number]) -> tuple[Number, Number, float]:
    """Returns the interval of a median between two order statistics, and its coverage.

    It assumes nothing of the distribution, and values may be infinite: for n values, the true median lies between the
    k-th and the (n + 1 - k)-th with the probability that a binomial of n fair coins lies within [k, n - k] (David &
    Nagaraja 2003, Order Statistics, section 7.1). The narrowest interval with a coverage of at least 0.9, or all
    values: 0.9375 for five.
    """
    ordered, count = sorted(values), len(values)
    below = list(accumulate(math.comb(count, heads) / 2**count for heads in range(count)))
    k = max((k for k in range(1, (count + 1) // 2 + 1) if 1 - 2 * below[k - 1] >= COVERAGE), default=1)
    return ordered[k - 1], ordered[count - k], 1 - 2 * below[k - 1]


def first_reading(curve: Sequence[Mapping[str, Number]], level: float, of: str) -> Number:
    """Returns the operations or seconds (`of`) at the first validation that reads a fraction; infinite without one."""
    return next((point[of] for point in curve if point["exact_match"] >= level), math.inf)


def compare(results: Sequence[Result]) -> dict[str, Any]:
    """Returns for each contender medians over seeds with their intervals, and ratios to the first by seed.

    A run that ends without having read is censored: its time is infinite. All runs of a contender are of one length,
    so that the median with infinite values is that of the Kaplan-Meier estimate. A ratio of a run that reads to one
    that doesn't takes the latter's length for its time: an upper bound. Where both don't, there is no ratio.
    """
    names = list(dict.fromkeys(result["contender"] for result in results))
    first = {result["seed"]: result for result in results if result["contender"] == names[0]}
    return {name: _of_contender([one for one in results if one["contender"] == name], first) for name in names}


def _of_contender(runs: Sequence[Result], first: Mapping[int, Result]) -> dict[str, Any]:
    found: dict[str, Any] = {"seeds": [run["seed"] for run in runs]}
    found["operations"] = median(run["curve"][-1]["operations"] for run in runs)
    found["seconds"] = median(run["curve"][-1]["seconds"] for run in runs)
    for name, level in LEVELS.items():
        for of in ("operations", "seconds"):
            times = [first_reading(run["curve"], level, of) for run in runs]
            found[f"{of} to {name}"] = _summary(times)
            found[f"ratio of {of} to {name}"] = _summary(
                [
                    ratio
                    for run, time in zip(runs, times, strict=True)
                    if (other := first.get(run["seed"])) and (ratio := _ratio(time, other["curve"], level, of))
                ]
            )
    for metric in ENDS:
        found[metric] = _summary([run["curve"][-1][metric] for run in runs])
    return found


def _ratio(time: Number, other: Sequence[Mapping[str, Number]], level: float, of: str) -> float | None:
    reference = first_reading(other, level, of)
    if math.isinf(time) and math.isinf(reference):
        return None
    return time / min(reference, other[-1][of])


def _summary(values: Sequence[Number]) -> dict[str, Any] | None:
    """Returns a median with its interval, as primitives; infinite values as None."""
    if not values:
        return None
    low, high, coverage = median_interval(values)
    finite = [value if math.isfinite(value) else None for value in (median(values), low, high)]
    return {
        "median": finite[0],
        "interval": finite[1:],
        "coverage": coverage,
        "values": [value if math.isfinite(value) else None for value in values],
    }


def print_table(compared: Mapping[str, Any]) -> None:
    """Prints the comparison; operations in units of 10^12."""
    table = Table("contender", "seeds")
    for name in LEVELS:
        table.add_column(f"TFLOP to {name}")
        table.add_column("ratio")
    for name in ("seconds to nine tenths", "read at the end", "loss at the end"):
        table.add_column(name)
    for contender, found in compared.items():
        cells = [contender, str(len(found["seeds"]))]
        for name in LEVELS:
            cells += [_cell(found[f"operations to {name}"], 1e12), _cell(found[f"ratio of operations to {name}"])]
        cells.append(_cell(found["seconds to nine tenths"], digits=0))
        table.add_row(*cells, *(_cell(found[metric], digits=3) for metric in ENDS))
    Console(highlight=False, width=160).print(table)
    coverages = ", ".join(f"{one:.1%}" for one in sorted({found["loss"]["coverage"] for found in compared.values()}))
    print(f"Medians over seeds, with their intervals (coverage {coverages}); > is not reached.")


def _cell(summary: Mapping[str, Any] | None, unit: Number = 1.0, digits: int = 2) -> str:
    if summary is None:
        return ""
    shown = [
        ">" if value is None else f"{value / unit:.{digits}f}" for value in (summary["median"], *summary["interval"])
    ]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def draw(results: Sequence[Result], axes: list[Any]) -> None:
    """Draws the runs' exact match, and the fraction of runs that don't yet read nine tenths, over operations."""
    curves, waiting = axes
    names = list(dict.fromkeys(result["contender"] for result in results))
    for number, name in enumerate(names):
        runs = [result["curve"] for result in results if result["contender"] == name]
        for curve in runs:
            operations = [point["operations"] / 1e12 for point in curve]
            label = name if curve is runs[0] else None
            curves.plot(operations, [point["exact_match"] for point in curve], f"C{number}", lw=0.8, label=label)
        times = sorted(first_reading(curve, LEVELS["nine tenths"], "operations") / 1e12 for curve in runs)
        end = max(curve[-1]["operations"] for curve in runs) / 1e12
        read = [time for time in times if math.isfinite(time)]
        left = [1 - place / len(times) for place in range(len(read) + 1)]
        waiting.step([0, *read, end], [*left, left[-1]], f"C{number}", where="post", label=name)
    curves.set(xlabel="training operations, TFLOP", ylabel="held-out documents read", ylim=(0, 1))
    waiting.set(xlabel="training operations, TFLOP", ylabel="runs that don't yet read nine tenths", ylim=(0, 1.02))
    curves.legend(fontsize=7)
