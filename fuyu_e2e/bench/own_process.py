"""Measures peak memory in a separate process, since a process's peak never decreases."""

import os
import resource
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

STATUS = Path("/proc/self/status")
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Makes glibc's malloc return freed tensors at once. By default it keeps and splits them, and a training process comes
to hold more than twice what its tensors ever took."""


def peak_memory(run: Callable[..., Any], *args: Any) -> int:
    """Returns the bytes by which a call raises the peak memory of a new process.

    On a GPU that is the device's memory allocated by PyTorch; else the process's, above what it held after PyTorch was
    loaded and had computed something.

    Args:
        run: A function at the top level of a module.
        args: Its arguments, which must be picklable.
    """
    with _environment(GIVES_BACK), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measured, run, args, torch.get_num_threads()).result()


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _measured(run: Callable[..., Any], args: tuple[Any, ...], threads: int) -> int:
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        run(*args)
        return torch.cuda.max_memory_allocated()
    _load_kernels()
    before = _resident("VmRSS")
    run(*args)
    return _resident("VmHWM") - before


def _load_kernels() -> None:
    """Computes a little of what a model does, so that libraries have set up their workspaces."""
    x = torch.randn(64, 64, requires_grad=True)
    attended = F.scaled_dot_product_attention(x[None], x[None], x[None])[0]
    F.cross_entropy(attended @ x, torch.zeros(64, dtype=torch.int64)).backward()


def _resident(field: str) -> int:
    """Returns bytes of memory of this process, from /proc if possible: in getrusage, a child inherits its parent's
    peak."""
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
