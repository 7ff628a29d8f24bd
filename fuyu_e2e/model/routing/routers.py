"""Rules that choose the tokens of a routed block (Mixture-of-Depths, Raposo et al. 2024, arXiv 2404.02258).

threshold    a token passes if its score is above the block's threshold, a quantile of past batches' scores. One rule
             in training, prefill and decoding (after Expert Threshold routing, Sun et al. 2026, arXiv 2603.11535).
topk         the paper's: the k best of a row in training, which looks ahead, and a causal predictor of that choice
             (section 3.5) in evaluation and generation
image_topk   the best patches of each image, which is always complete; text and newlines never skip
fixed        evenly spaced tokens by position, different ones in each block
random       tokens drawn in each training step; in evaluation, by position

The last two are the controls that a learnt rule must beat. All rules share the capacity, the annealing and the block.
None but `topk` looks at a later token (`image_topk`: outside the same image) or another document.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from fuyu_e2e.errors import UserError
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.flops import Flops
from fuyu_e2e.model.routing.config import annealed
from fuyu_e2e.model.row import Row, TokenType

LIMIT = 8.0
"""Bound of the scores, so that one histogram covers them."""
BINS = 4_096
"""Bins of the histogram of scores."""
MEMORY = 0.8
"""Weight of the past steps' histogram when a new step is added."""
CAPACITIES = 32
"""A routed block's capacity is a multiple of 1/32 of the row, so that few shapes occur."""


@dataclass(frozen=True)
class RoutingDecision:
    """A rule's decision about each token of a row."""

    passes: Bool[Tensor, " T"]
    gates: Float[Tensor, " T"]
    """Factor of the block's update, around 1."""
    scores: Float[Tensor, " T"] | None = None
    """The scores that were compared; None if the rule learns nothing."""
    auxiliary: Float[Tensor, ""] | None = None
    """The rule's auxiliary loss, a mean over tokens."""


class Scorer(nn.Module):
    """Scores each token: a learnt direction of its normalised state, bounded by `LIMIT`, float32.

    The direction starts with a length of about the square root of the width, which the score divides off. An
    optimizer step then turns it only a little, so that thresholds can follow.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        """Draws the direction so that a new model's scores have a variance of 1."""
        nn.init.normal_(self.weight)

    def forward(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, " T"]:
        with torch.autocast(x_TD.device.type, enabled=False):
            # Not a matrix product, which groups its sums by the row's shape: scores must not depend on the row's
            # length.
            raw = (F.rms_norm(x_TD.float(), x_TD.shape[-1:]) * self.weight.float()).sum(dim=-1)
            raw = raw * self.weight.shape[0] ** -0.5
            return LIMIT * torch.tanh(raw / LIMIT)


def gate(scores: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Returns the factor of an update: 1 at a score of 0, within (0.04, 1.96); it gives the score a gradient."""
    return 2 * torch.sigmoid(scores / 2)


class Router(nn.Module, ABC):
    """Chooses the tokens that pass one routed block."""

    def __init__(self, config: FuyuConfig, block: int) -> None:
        super().__init__()
        assert config.routing is not None
        self.block = block
        self.shares = config.routing.shares_of(block, config.layers)
        self.routing = config.routing

    @abstractmethod
    def route(self, x_TD: Float[Tensor, "T D"], row: Row, capacity: int | None) -> RoutingDecision:
        """Chooses among the tokens of a row; padding never passes.

        Args:
            x_TD: The states before the block.
            row: Further facts about the tokens.
            capacity: The most tokens that can pass; None in evaluation, where there is no limit.
        """

    def capacity(self, row: Row) -> int:
        """Returns the number of tokens that the block has room for in training: the share and some slack, rounded up.

        Raises:
            UserError: The share of so short a row is less than one token.
        """
        length = len(row.positions)
        share = self._share_of_row(row)
        if share * length < 1:
            raise UserError(
                f"routing.share lets {share:g} of the tokens pass, which is none of a row of {length}: raise it, or "
                f"data.budget to at least {math.ceil(1 / share)}."
            )
        return _round_up(annealed(share, self._dense(row)) * (1 + self.routing.slack), length)

    def flops_of_token(self) -> Flops:
        """Returns the operations of its matrix products for one token."""
        return Flops()

    def _dense(self, row: Row) -> float:
        return self.routing.dense(row.info.progress.done)

    def _dense_on_device(self, row: Row) -> Float[Tensor, ""]:
        """Returns `_dense` as a tensor: a compiled block would be specialised on a number that changes with each
        step."""
        done, anneal = row.info.done, self.routing.anneal
        falling = (1 - done / anneal).clamp(min=0) if anneal else torch.zeros_like(done)
        return torch.where(done == 0, 1.0, falling).float()

    def _share_of_row(self, row: Row) -> float:
        patches = sum(row.info.image_lengths_host) / len(row.positions)
        return patches * self.shares.patches + (1 - patches) * self.shares.others

    def _annealed_shares(self, row: Row) -> Float[Tensor, " T"]:
        """Returns the share of each token's group at this step."""
        share = torch.where(row.info.types == TokenType.PATCH.value, self.shares.patches, self.shares.others)
        return annealed(share, self._dense_on_device(row))

    def _exempt(self, row: Row) -> Bool[Tensor, " T"]:
        exempt = torch.zeros_like(row.info.valid)
        if self.routing.keep_starts:
            exempt = exempt | (row.positions == 0)
        if self.routing.keep_newlines:
            exempt = exempt | (row.info.types == TokenType.NEWLINE.value)
        return exempt


class Threshold(Router):
    """A token passes if its score is above a threshold, a quantile of past steps' scores.

    A histogram counts each step's scores over micro-batches and ranks; older steps fade from it. The thresholds are
    read from it after each step and stay fixed in evaluation. Patches and other tokens have separate thresholds if
    their shares differ.
    """

    def __init__(self, config: FuyuConfig, block: int) -> None:
        super().__init__(config, block)
        self.scorer = Scorer(config.width)
        self.split = self.shares.patches != self.shares.others
        groups = 2 if self.split else 1
        self.register_buffer("threshold", torch.full((groups,), -math.inf))
        self.register_buffer("counts", torch.zeros(groups, BINS, dtype=torch.int64))
        self.register_buffer("history", torch.zeros(groups, BINS))
        self.threshold: Tensor
        self.counts: Tensor
        self.history: Tensor

    def route(self, x_TD: Float[Tensor, "T D"], row: Row, capacity: int | None) -> RoutingDecision:
        """Decides about each token on its own."""
        scores = self.scorer(x_TD)
        passes = scores.detach() > self.threshold.index_select(0, self._group(row))
        share = self._annealed_shares(row)
        explored = _uniform(row, 0) < (self.routing.explore * (1 - row.info.done)).float()
        passes = torch.where(explored, _uniform(row, 1) < share, passes)
        return RoutingDecision((passes | self._exempt(row)) & row.info.valid, gate(scores), scores)

    def _group(self, row: Row) -> Int64[Tensor, " T"]:
        return (row.info.types != TokenType.PATCH.value).long() if self.split else torch.zeros_like(row.info.types)

    @torch.no_grad()
    def observe(self, scores: Float[Tensor, " T"], row: Row) -> None:
        """Counts the scores of a row. Exempt tokens count as the highest, since they use up the share."""
        scores = scores.masked_fill(self._exempt(row), LIMIT)
        bins = ((scores + LIMIT) * (BINS / (2 * LIMIT))).long().clamp(0, BINS - 1)
        counted = row.info.valid.long()
        self.counts.view(-1).scatter_add_(0, self._group(row) * BINS + bins, counted)

    def update(self, counts: Int64[Tensor, "groups bins"], dense: float, skip: Bool[Tensor, ""] | None = None) -> None:
        """Sets the thresholds for the next step.

        Args:
            counts: The step's scores by bin, summed over ranks.
            dense: 1 while all tokens pass, falling to 0 as the share is annealed; see `RoutingConfig.dense`.
            skip: Whether to leave everything as it is.
        """
        history = self.history * MEMORY + counts
        self.counts.zero_()
        asked = [self.shares.patches, self.shares.others] if self.split else [self.shares.patches]
        total = history.sum(dim=1, dtype=torch.float64)
        passing = torch.stack([group * annealed(share, dense) for group, share in zip(total, asked, strict=True)])
        above = history.double().flip(1).cumsum(1).flip(1)
        # The threshold lies in the last bin from whose lower edge on there are enough scores, interpolated linearly.
        bins = ((above >= passing[:, None]).sum(dim=1) - 1).clamp(0, BINS - 1)
        inside = history.double().gather(1, bins[:, None])[:, 0]
        surplus = above.gather(1, bins[:, None])[:, 0] - passing
        edge = (bins + (surplus / inside.clamp(min=1e-12)).clamp(0, 1)) * (2 * LIMIT / BINS) - LIMIT
        threshold = torch.where(passing >= total, -math.inf, edge.clamp(max=LIMIT * (1 - 2 / BINS))).float()
        threshold = torch.where(total > 0, threshold, self.threshold)
        if skip is not None:
            history, threshold = torch.where(skip, self.history, history), torch.where(skip, self.threshold, threshold)
        self.history.copy_(history)
        self.threshold.copy_(threshold)


class TopK(Router):
    """The paper's rule: the k highest scores of a row pass in training; afterwards a predictor guesses them.

    The predictor learns to predict the choices from the states, to which it sends no gradient.
    """

    def __init__(self, config: FuyuConfig, block: int) -> None:
        super().__init__(config, block)
        self.scorer = Scorer(config.width)
        self.predictor = nn.Sequential(
            nn.Linear(config.width, config.width // 2), nn.SiLU(), nn.Linear(config.width // 2, 1)
        )

    def capacity(self, row: Row) -> int:
        """Returns the k of a row."""
        super().capacity(row)
        return max(1, math.floor(annealed(self.shares.patches, self._dense(row)) * len(row.positions)))

    def route(self, x_TD: Float[Tensor, "T D"], row: Row, capacity: int | None) -> RoutingDecision:
        """Chooses among all tokens of the row; without a capacity, each on its own by the predictor."""
        scores = self.scorer(x_TD)
        guesses = self.predictor(F.rms_norm(x_TD.detach(), x_TD.shape[-1:]))[:, 0].float()
        if capacity is None:
            return RoutingDecision((guesses > 0) & row.info.valid, gate(scores), scores)
        ranked = scores.detach().masked_fill(self._exempt(row), LIMIT).masked_fill(~row.info.valid, -math.inf)
        passes = torch.zeros_like(row.info.valid).scatter(0, ranked.topk(capacity).indices, True) & row.info.valid
        losses = F.binary_cross_entropy_with_logits(guesses, passes.float(), reduction="none")
        return RoutingDecision(
            passes, gate(scores), scores, (losses * row.info.valid).sum() / row.info.valid.sum().clamp(min=1)
        )

    def flops_of_token(self) -> Flops:
        """Returns the operations of the predictor, which sends no gradient to the states that it reads."""
        first, _, last, _ = self.predictor.parameters()
        return Flops(with_input_gradient=last.numel(), without_input_gradient=first.numel())


class ImageTopK(Router):
    """The highest-scoring patches of each image pass; text and newlines never skip.

    An image is always complete, so the rule is exact in generation too.
    """

    def __init__(self, config: FuyuConfig, block: int) -> None:
        super().__init__(config, block)
        self.scorer = Scorer(config.width)

    def capacity(self, row: Row) -> int:
        """Returns the capacity, which needs no scores: all tokens but patches, and the share of each image."""
        super().capacity(row)
        length = len(row.positions)
        share = annealed(self.shares.patches, self._dense(row))
        kept = sum(max(1, math.floor(share * size + 0.5)) for size in row.info.image_lengths_host)
        return _round_up((length - sum(row.info.image_lengths_host) + kept) / length, length)

    def route(self, x_TD: Float[Tensor, "T D"], row: Row, capacity: int | None) -> RoutingDecision:
        """Chooses among the patches of each image."""
        scores = self.scorer(x_TD)
        ranked = scores.detach().masked_fill(self._exempt(row), LIMIT).index_select(0, row.info.patch_positions)
        by_score = ranked.argsort(descending=True, stable=True)
        # Sorted by image and by score within each: the distance from the image's first patch is the rank.
        order = by_score[row.info.patch_image[by_score].argsort(stable=True)]
        rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        rank = rank - (row.info.image_lengths.cumsum(0) - row.info.image_lengths)[row.info.patch_image]
        share = annealed(self.shares.patches, self._dense_on_device(row).double())
        kept = (share * row.info.image_lengths + 0.5).floor().clamp(min=1)
        passes = row.info.valid.index_copy(0, row.info.patch_positions, rank < kept[row.info.patch_image])
        return RoutingDecision(passes, gate(scores), scores)


class Fixed(Router):
    """Evenly spaced tokens pass, by position alone, shifted by one in each block."""

    def route(self, x_TD: Float[Tensor, "T D"], row: Row, capacity: int | None) -> RoutingDecision:
        """Lets a token pass where the share, summed over positions, reaches the next whole number."""
        share = self._annealed_shares(row).double()
        place = row.positions + self.block
        passes = ((place + 1) * share + 1e-9).floor() > (place * share + 1e-9).floor()
        return RoutingDecision(
            (passes | self._exempt(row)) & row.info.valid, torch.ones_like(x_TD[:, 0], dtype=torch.float32)
        )


class Random(Router):
    """Each token passes with the share as its probability: drawn in each step, by position alone in evaluation."""

    def route(self, x_TD: Float[Tensor, "T D"], row: Row, capacity: int | None) -> RoutingDecision:
        """Draws for each token on its own."""
        passes = _uniform(row, 1) < self._annealed_shares(row)
        return RoutingDecision(
            (passes | self._exempt(row)) & row.info.valid, torch.ones_like(x_TD[:, 0], dtype=torch.float32)
        )


ROUTERS: dict[str, type[Router]] = {
    "threshold": Threshold,
    "topk": TopK,
    "image_topk": ImageTopK,
    "fixed": Fixed,
    "random": Random,
}


def _round_up(share: float, length: int) -> int:
    fractions = math.ceil(min(1.0, share) * CAPACITIES - 1e-9)
    return math.ceil(length * fractions / CAPACITIES)


_MIX = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
"""The constants of splitmix64 (Steele et al. 2014), as signed numbers."""


def _uniform(row: Row, draw: int) -> Float[Tensor, " T"]:
    """Returns a number in [0, 1) for each token, a hash of its document, its position, the step and the block."""
    assert row.number is not None
    salt = (2 * row.number + draw + 1) * _MIX[2]
    x = row.info.seed * _MIX[0] + row.positions * _MIX[1] + salt
    for shift, factor in ((30, _MIX[1]), (27, _MIX[2])):
        x = (x ^ (x >> shift)) * factor
    x = x ^ (x >> 31)
    return (x & 0xFFFFFF).float() / 2**24
