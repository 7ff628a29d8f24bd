"""Times contenders alternately, and records where results were measured."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fuyu_e2e.version import __version__


def alternate(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 2,
    keep: Callable[[dict[str, float]], None] = lambda medians: None,
) -> dict[str, float]:
    """Returns the median seconds of each contender, run alternately so that the machine's state affects all alike.

    `keep` receives the medians so far after each timed round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(warm_up + rounds):
        for name, run in contenders.items():
            started_at = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ >= warm_up:
                seconds[name].append(time.perf_counter() - started_at)
        if round_ >= warm_up:
            keep({name: statistics.median(times) for name, times in seconds.items()})
    return {name: statistics.median(times) for name, times in seconds.items()}


def environment(device: str) -> dict[str, Any]:
    """Returns the device and the versions to be stored with all figures."""
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    return {
        "device": hardware,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fuyu_e2e": __version__,
        "date": date.today().isoformat(),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes figures as JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


class Figures:
    """A benchmark's figures, written as they come, so that an interrupted benchmark keeps those that it had.

    `complete` in the file says whether the benchmark finished.

    Args:
        path: The file, replaced by the first figures.
        about: Entries that are written with all of them.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self._path = path
        self._content = dict(about)

    def keep(self, **found: Any) -> None:
        """Writes figures by name, in addition to earlier ones."""
        self._content |= found
        write_json(self._path, {"complete": False, **self._content})

    def end(self, **found: Any) -> None:
        """Writes the last figures, and marks the file as complete."""
        self._content |= found
        write_json(self._path, {"complete": True, **self._content})
