"""Progress of long work on shards: a bar in a terminal, otherwise an occasional line.

Without a terminal, rich's bar shows nothing before the end, and tqdm's a single line that grows in a log file.
"""

import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

QUIET = 2.0
"""Seconds of work before anything is shown."""
EVERY = 10.0
"""Seconds between two lines if stderr is not a terminal."""
REFRESH = 0.2
"""Seconds between two updates of the bar in a terminal."""

Advance = Callable[[float], None]
"""Counts an amount of work as done."""


def untold(amount: float) -> None:
    """An `Advance` that ignores the amount."""


class ProgressBar:
    """Shows on stderr how far the work of a `with` block is, once it takes longer than `QUIET`.

    A thread shows it, so that the time advances even while the work doesn't. Other processes `add` to `count`, which
    they must inherit when they start.

    Args:
        title: The kind of work.
        total: The amount of work; None if unknown.
        unit: The unit of the amount; empty for work that isn't counted.
    """

    def __init__(self, title: str, total: int | float | None = None, unit: str = "") -> None:
        self.title, self.total, self.unit = title, total, unit
        self._own = 0.0
        self._others: Synchronized[float] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, name=title, daemon=True)

    def __enter__(self) -> "ProgressBar":
        self.started_at = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def count(self) -> "Synchronized[float]":
        """The amount that other processes have done; shared memory, allocated on first use."""
        if self._others is None:
            self._others = get_context("spawn").Value("d", 0.0)
        return self._others

    @property
    def done(self) -> float:
        """The amount that all processes have done."""
        return self._own + (0.0 if self._others is None else self._others.value)

    def advance(self, amount: float = 1.0) -> None:
        """Counts an amount as done by this process."""
        self._own += amount

    def line(self) -> str:
        """Returns a line such as `Indexing shards: 3 of 12 shards (28 %), 0:00:41 so far, 0:01:45 left`."""
        done, passed = self.done, time.monotonic() - self.started_at
        said = []
        if self.unit:
            of_all = "" if self.total is None else f" of {self.total:,.0f}"
            share = f" ({done / self.total:.0%})".replace("%", " %") if self.total else ""
            said.append(f"{int(done + 1e-6):,}{of_all} {self.unit}{share}")
        said.append(f"{_clock(passed)} so far")
        if self.total and done:
            said.append(f"{_clock(passed * max(0.0, self.total - done) / done)} left")
        return f"{self.title}: {', '.join(said)}"

    def _show(self) -> None:
        console = Console(stderr=True)
        if self._ended.wait(QUIET):
            return
        if not console.is_terminal:
            print(self.line(), file=sys.stderr, flush=True)
            while not self._ended.wait(EVERY):
                print(self.line(), file=sys.stderr, flush=True)
            return
        with Bar(BarColumn(), TextColumn("{task.description}"), console=console, transient=True) as bar:
            task = bar.add_task(self.line(), total=self.total)
            while not self._ended.wait(REFRESH):
                bar.update(task, completed=self.done, description=self.line())


def add(count: "Synchronized[float]", amount: float) -> None:
    """Counts an amount as done, from any process."""
    with count.get_lock():
        count.value += amount


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
