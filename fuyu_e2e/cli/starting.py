"""Shows that a command is loading its dependencies, mainly torch and Lightning, which takes seconds."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def starting() -> Iterator[None]:
    """Shows in a terminal, after two seconds, how long a command has been starting."""
    if not sys.stderr.isatty():
        yield
        return
    from fuyu_e2e.data.progress_bar import ProgressBar

    with ProgressBar("Starting"):
        yield
