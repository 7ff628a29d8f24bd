"""Which tokens pass a routed block: the rules of Mixture-of-Depths (Raposo et al. 2024, arXiv 2404.02258).

threshold    a token passes if its score is above the block's threshold, a quantile of past batches' scores. One rule
             in training, prefill and decoding (after Expert Threshold routing, Sun et al. 2026, arXiv 2603.11535).
topk         the paper's: the k best of a row in training, which looks ahead, and a causal predictor of that choice
             (section 3.5) in evaluation and generation
image_topk   the best patches of each image, which is always there as a whole; text and newlines never skip
fixed        evenly spaced tokens, others in each block, whatever they are
random       tokens drawn anew in each training step, the same by position afterwards

The last two are the controls that a learned rule must beat. All share the capacity, the annealing and the block
around them, and none but `topk` looks at a later token (`image_topk`: outside the same image) or another document.
"""

import math
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import IntEnum

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from fuyu_e2e.batch import PackedBatch
from fuyu_e2e.errors import UserError
from fuyu_e2e.model.attention import Passing
from fuyu_e2e.model.config import FuyuConfig, RoutingConfig, annealed
from fuyu_e2e.model.device_copy import to_device

LIMIT = 8.0
"""Bound of a score, so that one histogram holds them all."""
BINS = 4_096
"""Bins of the histogram of scores."""
MEMORY = 0.8
"""What is left of the histogram of past steps after each step."""
CAPACITIES = 32
"""A routed block's capacity is a multiple of this fraction of the row, so that few shapes occur."""


class Kind(IntEnum):
    """What a token is to routing and its figures."""

    TEXT = 0
    """Words that are read, and the marks around them."""
    ANSWER = 1
    """A position whose next token carries loss, or is being generated."""
    PATCH = 2
    NEWLINE = 3


@dataclass(frozen=True)
class Progress:
    """How far a training has come. A decoder that is not being trained is at its end."""

    step: int = 0
    """Optimizer steps done; seeds the step's random choices."""
    done: float = 1.0
    """The same as a part of all steps."""

    def dense(self, routing: RoutingConfig) -> float:
        """1 while all tokens pass, falling to 0 over the first part of the training, where shares are as asked."""
        if self.done == 0:
            return 1.0  # no threshold is known in the first step
        return max(0.0, 1 - self.done / routing.anneal) if routing.anneal else 0.0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What routing knows of each token beside its state."""

    kind: Int64[Tensor, " T"]
    """A `Kind`."""
    positions: Int64[Tensor, " T"]
    real: Bool[Tensor, " T"]
    """False for the padding behind the last document."""
    seed: Int64[Tensor, " T"]
    """A number of the token's document and the training step; 0 outside training."""
    patch_positions: Int64[Tensor, " P"]
    patch_image: Int64[Tensor, " P"]
    """The number of the image that each patch belongs to."""
    image_sizes: Int64[Tensor, " images"]
    """Patches of each image."""
    image_patches: tuple[int, ...]
    """The same on the host."""
    explore: Float[Tensor, ""]
    """Part of the choices that are random, between 0 and the recipe's."""
    dense: Float[Tensor, ""]
    """1 while all tokens pass, falling to 0 as the share is annealed."""
    dense_part: float
    """The same on the host."""
    block: Int64[Tensor, ""]
    """The number of the block that is asked, 0 until one is; on the device, or each would be compiled for its own."""

    @classmethod
    def of(cls, batch: PackedBatch, config: FuyuConfig, progress: Progress, training: bool) -> "Layout":
        """The layout of a packed row."""
        assert config.routing is not None
        device, length = batch.tokens.device, batch.tokens.shape[0]
        kind = torch.full((length,), int(Kind.TEXT), device=device)
        for positions, which in (
            (batch.target_positions, Kind.ANSWER),
            (batch.patch_positions, Kind.PATCH),
            (batch.newline_positions, Kind.NEWLINE),
        ):
            kind.index_fill_(0, positions, int(which))
        seed = torch.zeros(length, dtype=torch.int64, device=device)
        if training and len(batch.keys) == len(batch.document_lengths):
            seeds = [*(_document_seed(key, progress.step) for key in batch.keys), 0]
            counts = [*batch.document_lengths, batch.padding]
            documents = to_device(torch.tensor([seeds, counts], dtype=torch.int64), device)
            seed = documents[0].repeat_interleave(documents[1], output_size=length)
        sizes = to_device(torch.tensor(batch.image_patches, dtype=torch.int64), device)
        images = torch.arange(len(sizes), device=device)
        dense = progress.dense(config.routing) if training else 0.0
        explore = config.routing.explore * (1 - progress.done) if training else 0.0
        return cls(
            kind=kind,
            positions=batch.positions,
            real=torch.arange(length, device=device) < length - batch.padding,
            seed=seed,
            patch_positions=batch.patch_positions,
            patch_image=images.repeat_interleave(sizes, output_size=sum(batch.image_patches)),
            image_sizes=sizes,
            image_patches=batch.image_patches,
            explore=torch.full((), explore, device=device),
            dense=torch.full((), dense, device=device),
            dense_part=dense,
            block=torch.zeros((), dtype=torch.int64, device=device),
        )

    @classmethod
    def of_new_tokens(cls, positions: Int64[Tensor, " B"]) -> "Layout":
        """The layout of the next token of each of several sequences."""
        nothing = positions[:0]
        return cls(
            kind=torch.full_like(positions, int(Kind.ANSWER)),
            positions=positions,
            real=torch.ones_like(positions, dtype=torch.bool),
            seed=torch.zeros_like(positions),
            patch_positions=nothing,
            patch_image=nothing,
            image_sizes=nothing,
            image_patches=(),
            explore=torch.zeros((), device=positions.device),
            dense=torch.zeros((), device=positions.device),
            dense_part=0.0,
            block=torch.zeros((), dtype=torch.int64, device=positions.device),
        )


@dataclass(frozen=True)
class Choice:
    """What a rule says of each token of a row."""

    passes: Bool[Tensor, " T"]
    gates: Float[Tensor, " T"]
    """The factor of the block's update, around 1."""
    scores: Float[Tensor, " T"] | None = None
    """What was compared; None where nothing is learnt."""
    auxiliary: Float[Tensor, ""] | None = None
    """A loss of the rule's own, the mean over the tokens."""


@dataclass(frozen=True)
class Routed:
    """What happened at one routed block."""

    block: int
    chosen: Bool[Tensor, " T"]
    """The tokens that the rule let pass."""
    passed: Bool[Tensor, " T"]
    """Those of them for which there was room."""
    scores: Float[Tensor, " T"] | None
    auxiliary: Float[Tensor, ""] | None


@dataclass
class RoutingTrace:
    """What happened at all routed blocks of a row; filled by the decoder, in order of depth."""

    layout: Layout | None = None
    blocks: list[Routed] = field(default_factory=list)

    @property
    def auxiliary(self) -> Tensor | float:
        """The sum of the rules' own losses."""
        return sum((routed.auxiliary for routed in self.blocks if routed.auxiliary is not None), 0.0)

    @property
    def depth(self) -> Int64[Tensor, " T"]:
        """How many routed blocks each token passed."""
        return torch.stack([routed.passed for routed in self.blocks]).sum(dim=0)


def gather_passing(passes: Bool[Tensor, " T"], capacity: int | None) -> Passing:
    """The places of the tokens that pass, in order.

    With a capacity, exactly so many: where more pass, the last are dropped, so that none depends on a later one; where
    fewer do, tokens that skip fill up. Without one, as many as there are, for which a GPU's host has to wait.
    """
    if capacity is None:
        index = passes.nonzero()[:, 0]
        return Passing(index, torch.ones_like(index, dtype=torch.bool))
    count = passes.sum()
    place = torch.where(passes, passes.cumsum(0), count + (~passes).cumsum(0)) - 1
    order = torch.empty_like(place).scatter_(0, place, torch.arange(len(place), device=place.device))
    return Passing(order[:capacity], torch.arange(capacity, device=place.device) < count)


class Scorer(nn.Module):
    """One number for each token: a learnt direction of its normalised state, bounded by `LIMIT`, in float32.

    The direction has a length of about the square root of the width, divided off again: so a step of the optimizer
    turns it by little, and thresholds can follow.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def initialize(self) -> None:
        """Draws the direction so that a new model's scores have a variance of 1."""
        nn.init.normal_(self.weight)

    def forward(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, " T"]:
        with torch.autocast(x_TD.device.type, enabled=False):
            # Rounded as in a row of any length: a matrix product would group its sums by the row's shape.
            raw = (F.rms_norm(x_TD.float(), x_TD.shape[-1:]) * self.weight.float()).sum(dim=-1)
            raw = raw * self.weight.shape[0] ** -0.5
            return LIMIT * torch.tanh(raw / LIMIT)


def gate(scores: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """The factor of an update: 1 at a score of 0, within (0.04, 1.96), so that the score has a gradient."""
    return 2 * torch.sigmoid(scores / 2)


class Rule(nn.Module, ABC):
    """Chooses the tokens that pass one routed block."""

    def __init__(self, config: FuyuConfig, block: int) -> None:
        super().__init__()
        assert config.routing is not None
        self.block = block
        self.slack = config.routing.slack
        self.keep_starts, self.keep_newlines = config.routing.keep_starts, config.routing.keep_newlines
        self.shares = config.shares(block)

    @abstractmethod
    def choose(self, x_TD: Float[Tensor, "T D"], layout: Layout, capacity: int | None) -> Choice:
        """Chooses among the tokens of a row; padding never passes.

        Args:
            x_TD: Their states before the block.
            layout: What else is known of them.
            capacity: Tokens that the block has room for; None in evaluation, where it takes all that pass.
        """

    def capacity(self, layout: Layout) -> int:
        """How many tokens of a row the block has room for in training: the share and some slack, rounded up.

        Raises:
            UserError: The share of so short a row is less than one token.
        """
        length = len(layout.positions)
        share = self._share_of_row(layout)
        if share * length < 1:
            raise UserError(
                f"routing.share lets {share:g} of the tokens pass, which is none of a row of {length}: raise it, or "
                f"data.budget to at least {math.ceil(1 / share)}."
            )
        return _round_up(annealed(share, layout.dense_part) * (1 + self.slack), length)

    def _share_of_row(self, layout: Layout) -> float:
        patches = sum(layout.image_patches) / len(layout.positions)
        return patches * self.shares.patches + (1 - patches) * self.shares.others

    def _annealed_shares(self, layout: Layout) -> Float[Tensor, " T"]:
        """The share that each token belongs to, as it is at this step."""
        share = torch.where(layout.kind == Kind.PATCH.value, self.shares.patches, self.shares.others)
        return annealed(share, layout.dense)

    def _exempt(self, layout: Layout) -> Bool[Tensor, " T"]:
        exempt = torch.zeros_like(layout.real)
        if self.keep_starts:
            exempt = exempt | (layout.positions == 0)
        if self.keep_newlines:
            exempt = exempt | (layout.kind == Kind.NEWLINE.value)
        return exempt


class Threshold(Rule):
    """A token passes if its score is above a threshold, the quantile of past steps' scores.

    Each step's scores are counted in a histogram, over micro-batches and ranks; older steps fade from it. Thresholds
    read off it after a step hold from the next one on, and stand still in evaluation. There is one for patches and one
    for all other tokens where their shares differ, else one for all.
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

    def choose(self, x_TD: Float[Tensor, "T D"], layout: Layout, capacity: int | None) -> Choice:
        """Chooses each token by itself."""
        scores = self.scorer(x_TD)
        passes = scores.detach() > self.threshold.index_select(0, self._group(layout))
        share = self._annealed_shares(layout)
        explored = _uniform(layout, 0) < layout.explore
        passes = torch.where(explored, _uniform(layout, 1) < share, passes)
        return Choice((passes | self._exempt(layout)) & layout.real, gate(scores), scores)

    def _group(self, layout: Layout) -> Int64[Tensor, " T"]:
        return (layout.kind != Kind.PATCH.value).long() if self.split else torch.zeros_like(layout.kind)

    def observe(self, routed: Routed, layout: Layout) -> None:
        """Counts the scores of a row; exempt tokens count as the highest, for they use up the share."""
        assert routed.scores is not None
        scores = routed.scores.detach().masked_fill(self._exempt(layout), LIMIT)
        bins = ((scores + LIMIT) * (BINS / (2 * LIMIT))).long().clamp(0, BINS - 1)
        counted = layout.real.long()
        self.counts.view(-1).scatter_add_(0, self._group(layout) * BINS + bins, counted)

    def update(self, counts: Int64[Tensor, "groups bins"], dense: float, skip: Bool[Tensor, ""] | None = None) -> None:
        """Sets the thresholds for the next step.

        Args:
            counts: The step's scores by bin, over all ranks.
            dense: 1 while all tokens are to pass, falling to 0 as the share is annealed.
            skip: Whether to leave all as it is instead.
        """
        history = self.history * MEMORY + counts
        self.counts.zero_()
        asked = [self.shares.patches, self.shares.others] if self.split else [self.shares.patches]
        total = history.sum(dim=1, dtype=torch.float64)
        passing = torch.stack([group * annealed(share, dense) for group, share in zip(total, asked, strict=True)])
        above = history.double().flip(1).cumsum(1).flip(1)
        # The last bin with enough scores from its lower edge on holds the threshold, on a line between its edges.
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


class TopK(Rule):
    """The paper's rule: the k highest scores of a row pass in training, and a predictor guesses them afterwards.

    The predictor learns from the choices as labels and from states that it sends no gradient to.
    """

    def __init__(self, config: FuyuConfig, block: int) -> None:
        super().__init__(config, block)
        self.scorer = Scorer(config.width)
        self.predictor = nn.Sequential(
            nn.Linear(config.width, config.width // 2), nn.SiLU(), nn.Linear(config.width // 2, 1)
        )

    def capacity(self, layout: Layout) -> int:
        """The k of a row."""
        super().capacity(layout)
        return max(1, math.floor(annealed(self.shares.patches, layout.dense_part) * len(layout.positions)))

    def choose(self, x_TD: Float[Tensor, "T D"], layout: Layout, capacity: int | None) -> Choice:
        """Chooses among all tokens of the row; with no capacity, each by itself as the predictor says."""
        scores = self.scorer(x_TD)
        guesses = self.predictor(F.rms_norm(x_TD.detach(), x_TD.shape[-1:]))[:, 0].float()
        if capacity is None:
            return Choice((guesses > 0) & layout.real, gate(scores), scores)
        ranked = scores.detach().masked_fill(self._exempt(layout), LIMIT).masked_fill(~layout.real, -math.inf)
        passes = torch.zeros_like(layout.real).scatter(0, ranked.topk(capacity).indices, True) & layout.real
        losses = F.binary_cross_entropy_with_logits(guesses, passes.float(), reduction="none")
        return Choice(passes, gate(scores), scores, (losses * layout.real).sum() / layout.real.sum().clamp(min=1))


class ImageTopK(Rule):
    """The highest scores of each image's patches pass; words and newlines never skip.

    An image is always given as a whole, so the rule is exact in generation too.
    """

    def __init__(self, config: FuyuConfig, block: int) -> None:
        super().__init__(config, block)
        self.scorer = Scorer(config.width)

    def capacity(self, layout: Layout) -> int:
        """What passes is known before any score is: all but patches, and of each image its share, at least one."""
        super().capacity(layout)
        length = len(layout.positions)
        share = annealed(self.shares.patches, layout.dense_part)
        kept = sum(max(1, math.floor(share * size + 0.5)) for size in layout.image_patches)
        return _round_up((length - sum(layout.image_patches) + kept) / length, length)

    def choose(self, x_TD: Float[Tensor, "T D"], layout: Layout, capacity: int | None) -> Choice:
        """Chooses among the patches of each image."""
        scores = self.scorer(x_TD)
        ranked = scores.detach().masked_fill(self._exempt(layout), LIMIT).index_select(0, layout.patch_positions)
        by_score = ranked.argsort(descending=True, stable=True)
        # Sorted by image, and by score within each: a patch's place behind the first of its image is its rank.
        order = by_score[layout.patch_image[by_score].argsort(stable=True)]
        rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        rank = rank - (layout.image_sizes.cumsum(0) - layout.image_sizes)[layout.patch_image]
        share = annealed(self.shares.patches, layout.dense.double())
        kept = (share * layout.image_sizes + 0.5).floor().clamp(min=1)
        passes = layout.real.index_copy(0, layout.patch_positions, rank < kept[layout.patch_image])
        return Choice(passes, gate(scores), scores)


class Fixed(Rule):
    """Evenly spaced tokens pass, by position alone, one further in each block."""

    def choose(self, x_TD: Float[Tensor, "T D"], layout: Layout, capacity: int | None) -> Choice:
        """Lets a token pass where the share, added up over the positions, reaches the next whole number."""
        share = self._annealed_shares(layout).double()
        place = layout.positions + self.block
        passes = ((place + 1) * share + 1e-9).floor() > (place * share + 1e-9).floor()
        return Choice((passes | self._exempt(layout)) & layout.real, torch.ones_like(x_TD[:, 0], dtype=torch.float32))


class Random(Rule):
    """Each token passes with the share as its probability: anew in each step, and by position in evaluation."""

    def choose(self, x_TD: Float[Tensor, "T D"], layout: Layout, capacity: int | None) -> Choice:
        """Draws for each token by itself."""
        passes = _uniform(layout, 1) < self._annealed_shares(layout)
        return Choice((passes | self._exempt(layout)) & layout.real, torch.ones_like(x_TD[:, 0], dtype=torch.float32))


RULES: dict[str, type[Rule]] = {
    "threshold": Threshold,
    "topk": TopK,
    "image_topk": ImageTopK,
    "fixed": Fixed,
    "random": Random,
}


def build_rule(config: FuyuConfig, block: int) -> Rule:
    """The rule of the routed block number `block`."""
    assert config.routing is not None
    return RULES[config.routing.rule](config, block)


def _round_up(share: float, length: int) -> int:
    fractions = math.ceil(min(1.0, share) * CAPACITIES - 1e-9)
    return math.ceil(length * fractions / CAPACITIES)


_MIX = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
"""The constants of splitmix64 (Steele et al. 2014), as signed numbers."""


def _document_seed(key: str, step: int) -> int:
    return (zlib.crc32(key.encode()) << 31) + step


def _uniform(layout: Layout, draw: int) -> Float[Tensor, " T"]:
    """A number in [0, 1) for each token that depends on its document, its position, the step and the block alone."""
    salt = (2 * layout.block + draw + 1) * _MIX[2]
    x = layout.seed * _MIX[0] + layout.positions * _MIX[1] + salt
    for shift, factor in ((30, _MIX[1]), (27, _MIX[2])):
        x = (x ^ (x >> shift)) * factor
    x = x ^ (x >> 31)
    return (x & 0xFFFFFF).float() / 2**24
