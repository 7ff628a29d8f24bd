"""Timing contenders side by side, and what a result says about where it was measured."""

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


def alternate(contenders: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 2) -> dict[str, float]:
    """The median seconds of each contender, all run in turn so that a machine's moods hit them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(warm_up + rounds):
        for name, run in contenders.items():
            started_at = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ >= warm_up:
                seconds[name].append(time.perf_counter() - started_at)
    return {name: statistics.median(times) for name, times in seconds.items()}


def environment(device: str) -> dict[str, Any]:
    """What stands beside every figure."""
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
    """Writes figures, for people and programs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
