"""Works on many shards in parallel processes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from typing import TypeVar

from fuyu_e2e.data.progress_bar import Advance, ProgressBar, add
from fuyu_e2e.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

_count: "Synchronized[float]"
"""The counter of a pool's process."""


def map_shards(
    read: Callable[[str, Advance], Result], shards: Sequence[str], processes: int, title: str
) -> Iterator[Result]:
    """Yields the result of `read` for each shard, in order, with progress on stderr.

    Args:
        read: Reads something from a shard, and adds 1 in total to the progress.
        shards: Paths or URLs.
        processes: Shards read at once; see `run_jobs`.
        title: The kind of work.

    Raises:
        UserError: `processes` is less than 1, or a process was killed.
    """
    if processes < 1:
        raise UserError(f"--processes is {processes}, but must be at least 1.")
    with ProgressBar(title, len(shards), "shards") as progress:
        yield from run_jobs(read, shards, processes, progress)


def run_jobs(
    run: Callable[[Job, Advance], Result], jobs: Sequence[Job], processes: int, progress: ProgressBar
) -> Iterator[Result]:
    """Yields the result of `run` for each job, in order; the first error in this order ends jobs that wait.

    More than one process needs a program whose main module can be imported, as multiprocessing's `spawn` does.

    Raises:
        UserError: A process was killed.
    """
    if processes == 1 or len(jobs) <= 1:
        yield from (run(job, progress.advance) for job in jobs)
        return
    # Not forked: a copy of a process that runs torch's threads can hang. Code that reads and writes shards doesn't
    # import torch, so that a new process starts in a fraction of a second.
    with ProcessPoolExecutor(
        min(processes, len(jobs)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(progress.count,),
    ) as pool:
        try:
            with deaf_to_interrupts():
                results = pool.map(partial(_run, run), jobs)
            yield from results
        except BrokenProcessPool as error:
            raise UserError(
                "A process was killed, perhaps for want of memory: run the same command again, with fewer --processes."
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
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    # Otherwise the processes of a killed parent would stay.
    threading.Thread(target=follow, daemon=True).start()


def _run(run: Callable[[Job, Advance], Result], job: Job) -> Result:
    return run(job, partial(add, _count))
