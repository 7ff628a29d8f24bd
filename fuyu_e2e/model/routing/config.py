"""Settings of Mixture-of-Depths: how tokens are chosen, which blocks only some of them pass, and how many do."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fuyu_e2e.errors import UserError

RuleName = Literal["threshold", "topk", "image_topk", "fixed", "random"]
Share = float | tuple[float, ...]


@dataclass(frozen=True)
class RoutedShares:
    """The shares of one routed block."""

    patches: float
    """Share of the patches that passes."""
    others: float
    """Share of all other tokens: words and newlines."""


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """Mixture-of-Depths (Raposo et al. 2024, arXiv 2404.02258): blocks that only some tokens pass.

    Raises:
        UserError: A value is out of its range, or two contradict each other.
    """

    rule: RuleName = "threshold"
    """How tokens are chosen; see `fuyu_e2e.model.routing`."""
    share: Share = 0.125
    """Share of the tokens that passes a routed block: one for all, or one for each routed block in order of depth.
    Under `image_topk` the share of each image's patches."""
    text_share: Share | None = None
    """Where set, `share` is that of patches, and this that of all other tokens: words and newlines."""
    blocks: tuple[int, ...] | None = None
    """Which blocks are routed, counted from 0. Unset: every second one from the last but one down, none in the first
    quarter."""
    skipped: Literal["nothing", "keys"] = "nothing"
    """What a token leaves behind in a block that it skips: `nothing` (the paper's), or its key and value, so that
    later tokens still see it there."""
    keep_starts: bool = False
    """Whether the first token of each document passes whatever its score."""
    keep_newlines: bool = False
    """Whether newline tokens pass whatever their score."""
    anneal: float = 0.1
    """Part of the training over which the share falls from 1 to what it is to be."""
    explore: float = 0.05
    """Part of the choices in training that are drawn at random with the right share; falls to 0 over the run."""
    slack: float = 0.25
    """Room for tokens beyond the share, as a part of it, in the fixed capacity of a routed block in training."""

    def __post_init__(self) -> None:
        for name in ("share", "text_share", "blocks"):
            if isinstance(listed := getattr(self, name), list):  # as JSON gives it; a config must be hashable
                object.__setattr__(self, name, tuple(listed))
        if self.rule not in get_args(RuleName):
            raise UserError(
                f"routing.rule is {self.rule!r}, which is unknown; the rules are {', '.join(get_args(RuleName))}."
            )
        for name in ("share", "text_share"):
            shares = getattr(self, name)
            for share in shares if isinstance(shares, tuple) else (shares,):
                if share is not None and not 0 < share <= 1:
                    raise UserError(
                        f"routing.{name} holds {share}, but is a share of the tokens: set it above 0 and at most 1. "
                        "A block that nothing passes is one to leave out."
                    )
        if self.text_share is not None and self.rule in ("topk", "image_topk"):
            raise UserError(
                f"routing.text_share is set, but the rule {self.rule!r} can't keep it: leave it unset, or take "
                "'threshold', 'fixed' or 'random'."
            )
        if self.skipped not in ("nothing", "keys"):
            raise UserError(f"routing.skipped is {self.skipped!r}, but must be 'nothing' or 'keys'.")
        for name in ("anneal", "explore"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise UserError(f"routing.{name} is {value}, but is a part of a whole and must lie in [0, 1].")
        if not self.slack >= 0:
            raise UserError(f"routing.slack is {self.slack}, but must be 0 or above; 0.25 is usual.")

    def dense(self, done: float | None) -> float:
        """1 while all tokens pass, falling to 0 over the first part of a training, where shares are as asked.

        Args:
            done: The part of the training that is done; None for the mean over all of it.
        """
        if done is None:
            return self.anneal / 2
        if done == 0:
            return 1.0  # no threshold is known in the first step
        return max(0.0, 1 - done / self.anneal) if self.anneal else 0.0

    def check_layers(self, layers: int) -> None:
        """Checks the blocks, and their shares, of a decoder with so many.

        Raises:
            UserError: They don't fit.
        """
        if outside := [block for block in self.blocks or () if not 0 <= block < layers]:
            raise UserError(f"routing.blocks holds {outside[0]}, but the blocks are 0 to {layers - 1}.")
        routed = self.blocks_of(layers)
        if len(routed) == layers:
            raise UserError(
                f"routing.blocks names all {layers} blocks: a token that skips each one is never processed, so "
                "leave at least one dense; every second one is usual."
            )
        if not routed:
            raise UserError(
                f"A decoder of {layers} blocks has none to route, as the first quarter and the last stay dense: "
                "set decoder.layers to at least 3, or name routing.blocks."
            )
        for name in ("share", "text_share"):
            if isinstance(listed := getattr(self, name), tuple) and len(listed) != len(routed):
                raise UserError(
                    f"routing.{name} lists {len(listed)} shares for the {len(routed)} routed blocks "
                    f"{', '.join(map(str, routed))}: give one for each, or a single one for all."
                )

    def blocks_of(self, layers: int) -> tuple[int, ...]:
        """The routed blocks of a decoder with so many blocks, in order of depth."""
        if self.blocks is not None:
            return tuple(sorted(set(self.blocks)))
        return tuple(range(layers - 2, math.ceil(layers / 4) - 1, -2)[::-1])

    def shares_of(self, block: int, layers: int) -> RoutedShares:
        """The shares that routed block number `block` is asked to keep, in a decoder with so many blocks."""

        def at_depth(share: Share) -> float:
            return share[self.blocks_of(layers).index(block)] if isinstance(share, tuple) else share

        patches = at_depth(self.share)
        if self.rule == "image_topk":
            return RoutedShares(patches, 1.0)
        return RoutedShares(patches, patches if self.text_share is None else at_depth(self.text_share))


def annealed(share: Any, dense: Any) -> Any:
    """A share, a float or a tensor of them, while training is still partly dense: 1 where `dense` is 1."""
    return share + (1 - share) * dense
