"""Draws pictures of results, if matplotlib is installed."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def draw_picture(path: Path, panels: int, draw: Callable[[list[Any]], None]) -> None:
    """Saves what `draw` draws on `panels` axes side by side; prints a note without matplotlib."""
    if find_spec("matplotlib") is None:
        print(f"{path} is not drawn: pip install 'fuyu-e2e[plots]'.")
        return
    import matplotlib.pyplot as plt  # an extra: nothing but pictures needs it

    figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 4.2), layout="constrained", squeeze=False)
    draw(list(axes[0]))
    figure.savefig(path, dpi=110)
    plt.close(figure)
