"""Settings of Mixture-of-Depths: how tokens are chosen, and which share of them passes which blocks."""

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
    """Fraction of the patches that passes."""
    others: float
    """Fraction of all other tokens, text and newlines, that passes."""


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """Settings of Mixture-of-Depths (Raposo et al. 2024, arXiv 2404.02258).

    Raises:
        UserError: A value is out of its range, or two contradict each other.
    """

    rule: RuleName = "threshold"
    """How tokens are chosen; see `fuyu_e2e.model.routing`."""
    share: Share = 0.125
    """Fraction of the tokens that passes a routed block: one number for all, or one for each routed block in order of
    depth. Under `image_topk`, the fraction of each image's patches."""
    text_share: Share | None = None
    """If set, the share of text and newlines; `share` is then that of patches alone."""
    blocks: tuple[int, ...] | None = None
    """The routed blocks, counted from 0. Unset: every second one down from the last but one, none in the first
    quarter."""
    skipped: Literal["nothing", "keys"] = "nothing"
    """What later tokens see of a token in a block that it skips: `nothing` (as in the paper), or its key and value,
    `keys`."""
    keep_starts: bool = False
    """Whether the first token of each document always passes."""
    keep_newlines: bool = False
    """Whether newline tokens always pass."""
    anneal: float = 0.1
    """Fraction of the training over which the share falls from 1 to its final value."""
    explore: float = 0.05
    """Fraction of the choices in training that are drawn at random with the right share; falls to 0 over the run."""
    slack: float = 0.25
    """Extra room in the fixed training capacity of a routed block, as a fraction of the share."""

    def __post_init__(self) -> None:
        for name in ("share", "text_share", "blocks"):
            if isinstance(listed := getattr(self, name), list):  # from JSON; a config must be hashable
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
        """Returns how dense training still is: 1 while all tokens pass, falling to 0 as the share is annealed.

        Args:
            done: The completed fraction of the training; None for the mean over all of it.
        """
        if done is None:
            return self.anneal / 2
        if done == 0:
            return 1.0  # no threshold is known in the first step
        return max(0.0, 1 - done / self.anneal) if self.anneal else 0.0

    def check_layers(self, layers: int) -> None:
        """Checks the routed blocks and their shares against the number of blocks.

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
        """Returns the numbers of the routed blocks of a decoder of `layers` blocks, in order of depth."""
        if self.blocks is not None:
            return tuple(sorted(set(self.blocks)))
        return tuple(range(layers - 2, math.ceil(layers / 4) - 1, -2)[::-1])

    def shares_of(self, block: int, layers: int) -> RoutedShares:
        """Returns the shares of routed block number `block` in a decoder of `layers` blocks."""

        def at_depth(share: Share) -> float:
            return share[self.blocks_of(layers).index(block)] if isinstance(share, tuple) else share

        patches = at_depth(self.share)
        if self.rule == "image_topk":
            return RoutedShares(patches, 1.0)
        return RoutedShares(patches, patches if self.text_share is None else at_depth(self.text_share))


def annealed(share: Any, dense: Any) -> Any:
    """Returns a share, a float or a tensor, during annealing: 1 where `dense` is 1, `share` where it is 0."""
    return share + (1 - share) * dense
