"""The figures of an optimizer step over all processes: summed in one collective, read by the host one step late.

A host that reads a number from a GPU waits until the GPU has finished all its work, and the GPU then waits for new
work from the host. So the device decides whether a step is bad, and the host reads the step's figures when the work of
the next step is already queued.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from fuyu_e2e.distributed import sum_over_ranks
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.device_copy import to_device


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """The figures of a step, equal on all ranks."""

    step: int
    """Completed optimizer steps, including this one."""
    loss: float
    """The mean over the step's supervised tokens, in nats."""
    gradient_norm: float
    """Norm of the gradient of that mean before clipping."""
    tokens: int
    """Tokens of documents in its rows, over all ranks; padding doesn't count."""
    skipped: bool
    """Whether the step was bad and changed nothing."""
    votes: frozenset[str]
    """Names that callbacks of any rank voted for in this step."""
    beside: Mapping[str, float]
    """Further scalars that callbacks of this rank asked for, by name."""


class Guard(Protocol):
    """Decides which steps are bad."""

    def limits(self) -> tuple[float, float]:
        """Returns the greatest loss and gradient norm of a good step, both finite: the device compares with these."""

    def judge(self, figures: StepFigures) -> None:
        """Receives the figures of each step, on all ranks at the same point, before `limits` of the next is called.

        Raises:
            UserError: The run has to end.
        """


class StepSums:
    """Adds up the micro-batches of one step on this process; counts stay on the host, where they are known."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Starts a new step."""
        self._loss: Tensor | None = None
        self._supervised = self._tokens = 0

    def add(self, loss: Float[Tensor, ""], batch: PackedBatch) -> None:
        """Adds a micro-batch and its summed loss."""
        self._loss = loss.detach().double() if self._loss is None else self._loss + loss.detach()
        self._supervised += batch.targets.numel()
        self._tokens += sum(batch.document_lengths)

    def over_ranks(self, squared_norm: Float64[Tensor, ""], votes: Mapping[str, bool]) -> Float64[Tensor, " sums"]:
        """Returns the sums over all ranks, by one collective.

        Args:
            squared_norm: This process's part of the squared norm of the gradient of the summed loss.
            votes: This rank's votes, with the same names in the same order on all ranks.

        Returns:
            Loss, squared norm, supervised tokens, tokens, and the number of ranks for each vote; float64 on the
            device.
        """
        assert self._loss is not None
        counts = torch.tensor([self._supervised, self._tokens, *votes.values()], dtype=torch.float64)
        own = torch.stack((self._loss, squared_norm))
        return sum_over_ranks(torch.cat((own, to_device(counts, own.device))))


class JudgedStep(NamedTuple):
    """What a step comes to, on the device; the same on all ranks."""

    loss: Float64[Tensor, ""]
    """The mean over the step's supervised tokens, in nats."""
    norm: Float64[Tensor, ""]
    """Of the gradient of that mean, before it is clipped."""
    factor: Float64[Tensor, ""]
    """What makes a gradient that was averaged over the ranks that of the mean."""
    bad: Bool[Tensor, ""]
    """Whether the step is to change nothing."""


def judge_step(sums: Float64[Tensor, " sums"], ranks: int, limits: tuple[float, float] | None) -> JudgedStep:
    """Judges a step by its sums over all ranks, without a read of the device.

    Args:
        sums: What `StepSums.over_ranks` returned. Tensor-parallel peers read the same rows, so that losses and tokens
            are inflated alike.
        ranks: Processes whose gradients were averaged; their sum is wanted.
        limits: The greatest loss and gradient norm of a good step; None where every step is good.
    """
    loss, squares, supervised, *_ = sums.unbind()
    supervised = supervised.clamp(min=1)
    mean, factor = loss / supervised, ranks / supervised
    norm = squares.sqrt() * factor
    bad = torch.zeros_like(mean, dtype=torch.bool)
    if limits is not None:
        bad = ~((mean <= limits[0]) & (norm <= limits[1]))  # a NaN is below no limit
    return JudgedStep(mean, norm, factor, bad)


def queues(device: torch.device) -> bool:
    """Returns whether a device runs asynchronously, so that reading from it waits for all queued work."""
    return device.type != "cpu"


class PendingStep:
    """A step whose figures are being copied to the host.

    Args:
        step: Completed optimizer steps, including this one.
        sums: The result of `StepSums.over_ranks`.
        judged: The result of `judge_step`. The host's own computation could differ in the last bit and call a skipped
            step good.
        votes: The names that were voted on.
        beside: Scalars on the device to be read with the step, by name.
        replicas: Ranks that read the same rows, which inflate the counts by as much.
    """

    def __init__(
        self,
        step: int,
        sums: Float64[Tensor, " sums"],
        judged: JudgedStep,
        *,
        votes: Iterable[str],
        beside: Mapping[str, Tensor],
        replicas: int,
    ) -> None:
        self._step, self._votes, self._beside = step, tuple(votes), tuple(beside)
        self._replicas = replicas
        self._numbers = torch.cat(
            (
                torch.stack((judged.bad.double(), judged.loss, judged.norm)),
                sums,
                *(number.double()[None] for number in beside.values()),
            )
        )
        self._copied: torch.cuda.Event | None = None
        if sums.is_cuda:
            on_host = torch.empty_like(self._numbers, device="cpu", pin_memory=True)
            self._numbers = on_host.copy_(self._numbers, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> StepFigures:
        """Returns the figures; the host waits until the device has reached the copy."""
        if self._copied is not None:
            self._copied.synchronize()
        bad, loss, norm, _, _, _, tokens, *more = self._numbers.tolist()
        votes, beside = more[: len(self._votes)], more[len(self._votes) :]
        return StepFigures(
            step=self._step,
            loss=loss,
            gradient_norm=norm,
            tokens=int(tokens) // self._replicas,
            skipped=bool(bad),
            votes=frozenset(name for name, count in zip(self._votes, votes, strict=True) if count),
            beside=dict(zip(self._beside, beside, strict=True)),
        )
