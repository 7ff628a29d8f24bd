"""Routed blocks, which process only the tokens that a rule chooses."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributed.tensor.parallel import ParallelStyle

from fuyu_e2e.model.attention.interface import Passing
from fuyu_e2e.model.blocks.block import Block
from fuyu_e2e.model.blocks.dense import DenseBlock
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.flops import CountedRow, DenseOperations, Flops, Operations
from fuyu_e2e.model.recomputation import recomputing
from fuyu_e2e.model.routing.config import annealed
from fuyu_e2e.model.routing.routers import ROUTERS, Router, Threshold
from fuyu_e2e.model.row import Report, Row, TrainingProgress


@dataclass(frozen=True, kw_only=True)
class Routed(Report):
    """What happened at a routed block."""

    chosen: Bool[Tensor, " T"]
    """Tokens that the rule let pass."""
    passed: Bool[Tensor, " T"]
    """The chosen tokens that fit the capacity."""
    scores: Float[Tensor, " T"] | None
    """The scores that the rule compared; None if the rule learns nothing."""


def routed_blocks(row: Row) -> list[Routed]:
    """Returns what happened at the routed blocks of a row, in order of depth."""
    return [report for report in row.reports if isinstance(report, Routed)]


def gather_passing(passes: Bool[Tensor, " T"], capacity: int | None) -> Passing:
    """Returns the tokens that pass, in order.

    With a capacity, returns exactly `capacity` tokens: drops the last on overflow, so that none depends on a later
    one, and fills up with skipped tokens otherwise. Without one, returns as many as pass; a GPU's host has to wait for
    that.
    """
    if capacity is None:
        index = passes.nonzero()[:, 0]
        return Passing(index, torch.ones_like(index, dtype=torch.bool))
    count = passes.sum()
    place = torch.where(passes, passes.cumsum(0), count + (~passes).cumsum(0)) - 1
    order = torch.empty_like(place).scatter_(0, place, torch.arange(len(place), device=place.device))
    return Passing(order[:capacity], torch.arange(capacity, device=place.device) < count)


class RoutedBlock(Block):
    """A block for the tokens that its rule lets pass: x + gate * update(x), and x for the rest.

    The residual itself is never scaled. Passing tokens attend to each other, or to all tokens if skipped ones leave
    their keys. In training, shapes depend only on the capacity and nothing waits for the device. In evaluation there
    is no capacity: every passing token is processed, and the host has to read their number.

    Args:
        inner: The block that they pass; its parts keep their names here.
        config: The decoder's configuration.
        number: The block's number.
    """

    kind = "routed"
    method = "Mixture-of-Depths"
    reads_info = True
    selects_tokens = True

    def __init__(self, inner: DenseBlock, config: FuyuConfig, number: int) -> None:
        super().__init__(config, number)
        assert config.routing is not None
        for name, part in inner.named_children():
            self.add_module(name, part)
        self._inner = (inner,)  # hidden in a tuple: as a submodule, its parts would have two names
        self.leaves_keys = config.routing.skipped == "keys"
        self.rule: Router = ROUTERS[config.routing.rule](config, number)
        self._compiled: Callable[..., Any] | None = None

    @property
    def inner(self) -> DenseBlock:
        """The block that passing tokens go through."""
        return self._inner[0]

    def initialize(self) -> None:
        """Initializes the inner block."""
        self.inner.initialize()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles all but the capacity, which the host counts for each row."""
        self._compiled = torch.compile(self._forward, *args, **kwargs)

    @property
    def compiled(self) -> bool:
        """Whether torch.compile is on for the block."""
        return self._compiled is not None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_compiled": None}  # torch drops it from copies of compiled modules, too

    def forward(self, x_TD: Float[Tensor, "T D"], row: Row) -> Float[Tensor, "T D"]:
        """Returns the states of the row's tokens after the block, and adds a `Routed` to the row's reports."""
        capacity = self.rule.capacity(row) if self.training else None
        x_TD, routed = (self._compiled or self._forward)(x_TD, row, capacity)
        row.reports.add(routed)
        return x_TD

    def _forward(
        self, x_TD: Float[Tensor, "T D"], row: Row, capacity: int | None
    ) -> tuple[Float[Tensor, "T D"], Routed]:
        return recomputing(self.recompute, self._route, x_TD, row, capacity)

    def _route(
        self, x_TD: Float[Tensor, "T D"], row: Row, capacity: int | None
    ) -> tuple[Float[Tensor, "T D"], Routed]:
        decision = self.rule.route(x_TD, row, capacity)
        passing = gather_passing(decision.passes, capacity)
        x_UD = x_TD.index_select(0, passing.index)
        if self.leaves_keys:
            update_UD = self.inner.update(x_UD, x_TD, row.cross(passing))
        else:
            update_UD = self.inner.update(x_UD, x_UD, row.select(passing))
        gates_U = torch.where(passing.valid, decision.gates.index_select(0, passing.index), 0.0)
        x_TD = x_TD.index_add(0, passing.index, (gates_U[:, None] * update_UD).to(x_TD.dtype))
        scores = None if decision.scores is None else decision.scores.detach()
        passed = torch.zeros_like(decision.passes).index_copy(0, passing.index, passing.valid)
        return x_TD, Routed(
            block=self.rule.block, chosen=decision.passes, passed=passed, scores=scores, auxiliary=decision.auxiliary
        )

    def operations(self) -> Operations:
        """Returns the operations of the inner block for passing tokens and of the rule for all."""
        return partial(self._flops, self.rule, self.inner.operations(), self.rule.flops_of_token())

    def _flops(self, rule: Router, inner: DenseOperations, deciding: Flops, row: CountedRow) -> Flops:
        passing, tokens, shares = row.passing.get(rule.block), sum(row.lengths), rule.shares
        if passing is None:
            asked = shares.patches * row.patches + shares.others * (tokens - row.patches)
            share = annealed(asked / max(1, tokens), rule.routing.dense(row.done))
            passing = [length * share for length in row.lengths]
        return inner.between(passing, row.lengths if self.leaves_keys else passing, row).plus(deciding, tokens)

    def saved_bytes(self, tokens: int, work: int, size: int) -> float:
        """Returns the bytes that the inner block keeps for the tokens of the capacity at the start of training."""
        dense = 1.0 if self.rule.routing.anneal else 0.0
        share = annealed(max(self.rule.shares.patches, self.rule.shares.others), dense) * (1 + self.rule.routing.slack)
        return min(1.0, share) * self.inner.saved_bytes(tokens, work, size)

    def sharding(self) -> dict[str, ParallelStyle]:
        """Splits the parts of the inner block."""
        plan = self.inner.sharding()
        if self.leaves_keys:  # attention selects the queries from the states itself
            del plan["attention"]
        return plan

    def observe(self, report: Report, row: Row) -> None:
        """Counts the reported scores."""
        if isinstance(self.rule, Threshold):
            assert isinstance(report, Routed)
            assert report.scores is not None
            self.rule.observe(report.scores, row)

    @property
    def counts(self) -> Tensor | None:
        """Histogram of the step's scores, if the rule keeps thresholds."""
        return self.rule.counts if isinstance(self.rule, Threshold) else None

    def end_step(self, counts: Tensor, progress: TrainingProgress, skip: Bool[Tensor, ""] | None) -> None:
        """Sets the thresholds for the next step."""
        assert isinstance(self.rule, Threshold)
        self.rule.update(counts, self.rule.routing.dense(progress.done), skip)
