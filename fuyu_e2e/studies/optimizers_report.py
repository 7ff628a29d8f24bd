"""Steps saved at equal loss, as a table and a picture."""

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fuyu_e2e.bench.plots import draw_picture


def steps_to(target: float, losses: Mapping[int, float]) -> float | None:
    """Returns the length of a run that ends at the loss `target`, from losses at some lengths; None if none reaches
    it.

    Interpolates linearly between two lengths, both axes logarithmic, and takes the first crossing. Returns the
    shortest length if its loss is below the target already.
    """
    lengths = sorted(losses)
    if losses[lengths[0]] <= target:
        return float(lengths[0])
    for shorter, longer in pairwise(lengths):
        if losses[longer] <= target:
            part = math.log(losses[shorter] / target) / math.log(losses[shorter] / losses[longer])
            return shorter * (longer / shorter) ** part
    return None


def compare(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns, for each length of AdamW's runs and by seed, its ratio to the steps that Muon needs for the same loss.

    `at_least` lists the seeds whose shortest Muon run had reached that loss already.
    """
    by_seed: dict[int, dict[str, dict[int, float]]] = {}
    for run in runs:
        by_seed.setdefault(run["seed"], {}).setdefault(run["optimizer"], {})[run["steps"]] = run["loss"]
    found: list[dict[str, Any]] = []
    for steps in sorted({run["steps"] for run in runs}):
        needed = {seed: steps_to(losses["adamw"][steps], losses["muon"]) for seed, losses in by_seed.items()}
        times = {str(seed): None if muon is None else round(steps / muon, 3) for seed, muon in needed.items()}
        known = [value for value in times.values() if value is not None]
        found.append(
            {
                "adamw_steps": steps,
                "times_as_many": times,
                "at_least": [seed for seed, muon in needed.items() if muon == min(by_seed[seed]["muon"])],
                "median": statistics.median(known) if len(known) == len(times) else None,
            }
        )
    return found


def report(runs: Sequence[Mapping[str, Any]], picture: Path) -> None:
    """Prints losses over lengths, median and range over seeds, and how many times Muon's steps AdamW took."""
    table = Table("steps", "AdamW", "Muon", "steps of AdamW / of Muon at AdamW's loss")
    for row in compare(runs):
        cells = (_spread(_losses(runs, name, row["adamw_steps"])) for name in ("adamw", "muon"))
        times = ", ".join(
            "not reached" if value is None else f"{'≥ ' if int(seed) in row['at_least'] else ''}{value:.2f}"
            for seed, value in row["times_as_many"].items()
        )
        table.add_row(str(row["adamw_steps"]), *cells, times)
    Console(highlight=False).print(table)
    draw_picture(picture, 1, partial(_draw, runs))


def _losses(runs: Sequence[Mapping[str, Any]], name: str, steps: int) -> list[float]:
    return [run["loss"] for run in runs if (run["optimizer"], run["steps"]) == (name, steps)]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _draw(runs: Sequence[Mapping[str, Any]], axes: list[Any]) -> None:
    lengths = sorted({run["steps"] for run in runs})
    for name, label, colour in (("adamw", "AdamW", "tab:gray"), ("muon", "Muon", "tab:orange")):
        for seed in sorted({run["seed"] for run in runs}):
            losses = {run["steps"]: run["loss"] for run in runs if (run["optimizer"], run["seed"]) == (name, seed)}
            axes[0].plot(list(losses), list(losses.values()), ".", color=colour)
        medians = [statistics.median(_losses(runs, name, steps)) for steps in lengths]
        axes[0].plot(lengths, medians, color=colour, label=label)
    axes[0].set(xscale="log", yscale="log", xlabel="steps of a run", ylabel="held-out loss at its end")
    axes[0].set_xticks(lengths, [str(length) for length in lengths])
    axes[0].set_xticks([], minor=True)
    axes[0].legend()
