"""How the processes of a run relate: which of them read which data, and what they exchange."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class DataRank:
    """A process's rank among those that read different data; the processes of a tensor-parallel group share one."""

    rank: int
    size: int
    """The number of such ranks."""
    replicas: int
    """Processes that read the same rows as this one, itself included."""
    first: bool
    """Whether this process is the first of its replicas, which counts for all of them."""

    @classmethod
    def of(cls, trainer: pl.Trainer | None) -> "DataRank":
        """Returns the data rank of this process; rank 0 of 1 without a trainer or on one device."""
        if trainer is None or not isinstance(strategy := trainer.strategy, ParallelStrategy):
            return cls(rank=0, size=1, replicas=1, first=True)
        rank, size = (int(strategy.distributed_sampler_kwargs[name]) for name in ("rank", "num_replicas"))
        replicas = trainer.world_size // size
        return cls(rank=rank, size=size, replicas=replicas, first=trainer.global_rank % replicas == 0)


def is_sharded(trainer: pl.Trainer) -> bool:
    """Returns whether each process holds only a part of every weight, so that none can compute a batch alone."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sums a tensor over all processes in place, and returns it. Lightning's own sum waits at a barrier first."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_ranks(own: T) -> list[T]:
    """Returns the value that each process passes, in the order of ranks, pickled; a collective."""
    told: list[Any] = [own]
    if dist.is_initialized():
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, own)
    return told


def from_first(work: Callable[[], T], errors: type[Exception], group: dist.ProcessGroup | None = None) -> T:
    """Returns on all processes what `work` returns on the first, which alone calls it; both pickled, a collective.

    Args:
        work: What to do.
        errors: Errors of `work` that are raised on all processes, so that none waits for another.
        group: All processes; None for the default group.
    """
    told: list[Any] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            told = [work()]
        except errors as error:
            told = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(told, src=0, group=group)
    if isinstance(told[0], errors):
        raise told[0]
    return told[0]


def any_rank(trainer: pl.Trainer, here: bool) -> bool:
    """Returns whether `here` is true on any process; a collective."""
    return bool(sum_over_ranks(torch.tensor(float(here), device=trainer.strategy.root_device)) > 0)
