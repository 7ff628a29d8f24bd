"""The table and the picture of `bench train`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fuyu_e2e.bench.plots import draw_picture

COLUMNS = {
    "tokens/s": ("tokens_per_second", 1),
    "images/s": ("images_per_second", 1),
    "MFU": ("mfu", 1),
    "times": ("times_as_fast", 1),
    "padding": ("padding", 1),
    "GiB": ("peak_memory_bytes", 2**30),
    "loss": ("first_loss", 1),
}
"""For each heading, the key of its figure and the unit to divide by."""


def report(cases: Sequence[dict[str, Any]], picture: Path) -> None:
    """Prints each size with its contenders, and draws tokens a second and memory."""
    console = Console(highlight=False)
    for case in cases:
        console.print(
            f"{case['size']}: {case['parameters']:,} parameters, rows of {case['row_tokens']:,} tokens, "
            f"{case['training_flops_per_token']:.3g} operations a token, documents by tokens: "
            + ", ".join(f"{count} {label}" for label, count in case["document_lengths"].items())
        )
        table = Table("contender", *COLUMNS)
        for result in case["results"]:
            table.add_row(result["contender"], *(_cell(result, *column) for column in COLUMNS.values()))
        console.print(table)
    draw_picture(picture, 2 * len(cases), partial(_draw, cases))


def _cell(result: dict[str, Any], key: str, unit: int) -> str:
    value = result.get(key, result.get("failed"))
    return f"{value / unit:.4g}" if isinstance(value, int | float) else str(value)


def _draw(cases: Sequence[dict[str, Any]], axes: list[Any]) -> None:
    for case, (speed, memory) in zip(cases, zip(axes[::2], axes[1::2], strict=True), strict=True):
        results = [result for result in case["results"] if "failed" not in result][::-1]
        names = [result["contender"] for result in results]
        colours = ["tab:orange" if name.startswith("ours") else "tab:gray" for name in names]
        speed.barh(names, [result["tokens_per_second"] for result in results], color=colours)
        speed.set(xlabel="tokens a second", title=f"{case['size']}, {case['parameters'] / 1e6:.0f}M parameters")
        peaks = [result["peak_memory_bytes"] for result in results]
        memory.barh(names, [peak / 2**30 if isinstance(peak, int) else 0 for peak in peaks], color=colours)
        memory.set(xlabel="most memory, GiB", yticklabels=[])
