"""A sign on the terminal while a command loads what it needs, torch and Lightning above all: that takes seconds."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def starting() -> Iterator[None]:
    """Shows how long a command has been starting, on a terminal and from the second second on."""
    if not sys.stderr.isatty():
        yield
        return
    from fuyu_e2e.data.progress_bar import ProgressBar

    with ProgressBar("Starting"):
        yield
