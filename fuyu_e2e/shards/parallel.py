"""Work on many shards at once."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Found = TypeVar("Found")


def map_shards(read: Callable[[str], Found], shards: Sequence[str], processes: int, title: str) -> Iterator[Found]:
    """What `read` finds in each shard, in their order, with a progress bar on stderr where that is a terminal.

    More than one process needs a program whose main module can be imported, as multiprocessing's `spawn` does.
    """
    console = Console(stderr=True)
    watch = partial(
        track, description=title, total=len(shards), console=console, transient=True, disable=not console.is_terminal
    )
    if processes == 1 or len(shards) == 1:
        yield from watch(map(read, shards))
        return
    # Not forked: a copy of a process that runs torch's threads can hang. What reads shards imports no torch, so that
    # a new process starts in a fraction of a second.
    with ProcessPoolExecutor(min(processes, len(shards)), mp_context=get_context("spawn")) as pool:
        yield from watch(pool.map(read, shards))
