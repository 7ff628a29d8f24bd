"""What the processes of a run have to do with each other: which of them see which data, and which move in step."""

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
    """A process's place among those that see different data; parts of one tensor parallel group share a place."""

    rank: int
    size: int
    """How many such places there are."""
    replicas: int
    """Processes that see the same rows as this one, itself among them."""
    first: bool
    """Whether this one counts for them."""

    @classmethod
    def of(cls, trainer: pl.Trainer | None) -> "DataRank":
        """Returns the place of this process."""
        if trainer is None or not isinstance(strategy := trainer.strategy, ParallelStrategy):
            return cls(rank=0, size=1, replicas=1, first=True)
        rank, size = (int(strategy.distributed_sampler_kwargs[name]) for name in ("rank", "num_replicas"))
        replicas = trainer.world_size // size
        return cls(rank=rank, size=size, replicas=replicas, first=trainer.global_rank % replicas == 0)


def is_sharded(trainer: pl.Trainer) -> bool:
    """Returns whether no process computes a batch by itself, since each holds a part of every weight."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Returns the sum of a tensor over all processes, in its place; Lightning's own has them all wait for each other
    first."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_ranks(own: T) -> list[T]:
    """Returns what every process has to say, in the order of their ranks, by pickle; all of them ask at once."""
    told: list[Any] = [own]
    if dist.is_initialized():
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, own)
    return told


def any_rank(trainer: pl.Trainer, here: bool) -> bool:
    """Returns whether something is so on any process; all of them ask at once."""
    return bool(sum_over_ranks(torch.tensor(float(here), device=trainer.strategy.root_device)) > 0)
