"""Work that is shared out between processes."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def in_processes(work: Callable[..., None], jobs: Sequence[tuple[Any, ...]], processes: int) -> None:
    """Calls `work` with each job's arguments, so many at once; one job, or one process, stays in this one."""
    if processes == 1 or len(jobs) == 1:
        for job in jobs:
            work(*job)
    else:
        # A forked copy of a process that runs torch's threads can hang.
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            for finished in [pool.submit(work, *job) for job in jobs]:
                finished.result()
