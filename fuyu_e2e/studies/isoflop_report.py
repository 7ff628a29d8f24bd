"""The table and the plot of equal-operation runs."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def report(results: Sequence[dict[str, Any]], picture: Path) -> None:
    """Prints means over seeds with their spread, and plots loss and exact match over operations and over time."""
    budgets = sorted({result["budget"] for result in results})
    names = list(dict.fromkeys(result["contender"] for result in results))
    table = Table(
        "trained", *(f"loss at {budget}" for budget in budgets), *(f"read at {budget}" for budget in budgets)
    )
    for name in names:
        cells = [_cell(results, name, budget, key) for key in ("loss", "exact_match") for budget in budgets]
        table.add_row(name, *cells)
    Console(highlight=False).print(table)
    _plot(results, names, picture)


def _values(results: Sequence[dict[str, Any]], name: str, budget: int, key: str) -> list[int | float]:
    return [result[key] for result in results if (result["contender"], result["budget"]) == (name, budget)]


def _cell(results: Sequence[dict[str, Any]], name: str, budget: int, key: str) -> str:
    values = _values(results, name, budget, key)
    if not values:
        return ""
    return f"{statistics.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def _plot(results: Sequence[dict[str, Any]], names: Sequence[str], picture: Path) -> None:
    import matplotlib.pyplot as plt  # an extra: nothing but this picture needs it

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for row, (key, label) in enumerate((("loss", "held-out causal loss"), ("exact_match", "read letter for letter"))):
        for column, (x_key, x_label) in enumerate(
            (("training_flops", "training operations"), ("seconds", "seconds of training"))
        ):
            axis = axes[row][column]
            for name in names:
                budgets = sorted({result["budget"] for result in results if result["contender"] == name})
                x = [statistics.mean(_values(results, name, budget, x_key)) for budget in budgets]
                y = [_values(results, name, budget, key) for budget in budgets]
                means = [statistics.mean(values) for values in y]
                spread = [[m - min(v) for m, v in zip(means, y, strict=True)],
                          [max(v) - m for m, v in zip(means, y, strict=True)]]  # fmt: skip
                style = {"color": "black", "linewidth": 2.5} if name == "dense" else {"linewidth": 1.2}
                axis.errorbar(x, means, yerr=spread, label=name, marker="o", markersize=3, capsize=2, **style)
            axis.set(xscale="log", xlabel=x_label, ylabel=label)
            if key == "loss":
                axis.set(yscale="log")
    axes[0][0].legend(fontsize=7)
    figure.savefig(picture, dpi=110)
