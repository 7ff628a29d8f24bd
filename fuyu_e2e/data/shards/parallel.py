"""Processes many shards in parallel."""

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from typing import TypeVar

from fuyu_e2e.data.progress_bar import Advance, ProgressBar, add
from fuyu_e2e.errors import UserError

Found = TypeVar("Found")
Read = Callable[[str, Advance], Found]
"""Reads something from a shard, and adds 1 in total to the progress."""

_count: "Synchronized[float]"
"""The counter of a pool's process."""


def map_shards(read: Read[Found], shards: Sequence[str], processes: int, title: str) -> Iterator[Found]:
    """Yields the result of `read` for each shard, in order, with progress on stderr.

    More than one process needs a program whose main module can be imported, as multiprocessing's `spawn` does.

    Raises:
        UserError: `processes` is less than 1, or a process was killed.
    """
    if processes < 1:
        raise UserError(f"--processes is {processes}, but must be at least 1.")
    with ProgressBar(title, len(shards), "shards") as progress:
        if processes == 1 or len(shards) <= 1:
            yield from (read(shard, progress.advance) for shard in shards)
            return
        # Not forked: a copy of a process that runs torch's threads can hang. Code that reads shards doesn't import
        # torch, so that a new process starts in a fraction of a second.
        with ProcessPoolExecutor(
            min(processes, len(shards)),
            mp_context=get_context("spawn"),
            initializer=_begin,
            initargs=(progress.count,),
        ) as pool:
            try:
                with deaf_to_interrupts():
                    found = pool.map(partial(_read, read), shards)
                yield from found
            except BrokenProcessPool as error:
                raise UserError(
                    "A process that read shards was killed, perhaps for want of memory: run the same command again, "
                    "with fewer --processes."
                ) from error


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes that start in this context never receive Ctrl-C, even while they import; the waiting process does."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(count: "Synchronized[float]") -> None:
    global _count
    _count = count


def _read(read: Read[Found], shard: str) -> Found:
    return read(shard, partial(add, _count))
