"""How the parts of a decoder count floating-point operations; only matrix products count."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fuyu_e2e.model.attention.mask import CAUSAL, AttentionMask

Counts = Sequence[int | float]
"""Tokens of each document; fractional if they are an expected share."""


class Flops(NamedTuple):
    """Multiply-adds of matrix products, each of which is two floating-point operations."""

    with_input_gradient: int | float = 0
    """Multiply-adds whose input needs a gradient, as the weights do."""
    without_input_gradient: int | float = 0
    """Multiply-adds whose input needs no gradient: it isn't learnt, or is detached."""

    @property
    def forward(self) -> int | float:
        """Operations of the forward pass."""
        return 2 * (self.with_input_gradient + self.without_input_gradient)

    @property
    def training(self) -> int | float:
        """Operations of the forward and backward pass, without recomputation."""
        return 6 * self.with_input_gradient + 4 * self.without_input_gradient

    def plus(self, other: "Flops", times: int | float = 1) -> "Flops":
        """Returns the sum of this and `times` the other."""
        return Flops(
            self.with_input_gradient + times * other.with_input_gradient,
            self.without_input_gradient + times * other.without_input_gradient,
        )


@dataclass(frozen=True, kw_only=True)
class CountedRow:
    """A row of documents whose operations are counted."""

    lengths: Counts
    """Tokens of each document."""
    patches: int = 0
    """How many of these tokens are patches."""
    cached: Counts | None = None
    """Earlier tokens of each document whose keys are in a cache."""
    passing: Mapping[int, Counts] = field(default_factory=dict)
    """For each block that selects tokens, by number: passing tokens of each document. A missing block passes its
    configured share."""
    done: float | None = 1.0
    """The completed fraction of a training, since blocks may compute more at first; None for the mean over all of
    it."""


Operations = Callable[[CountedRow], Flops]
"""Counts the operations of a block on a row. Blocks with equal values are counted once and multiplied."""


@dataclass(frozen=True, kw_only=True)
class DenseOperations:
    """Multiply-adds of a block's products, by what they belong to."""

    query: int
    """For each token that attends."""
    key: int
    """For each token that is attended to."""
    pair: int
    """For each pair of a query and a key that it sees."""
    mask: AttentionMask
    """Which keys a query sees."""

    def __call__(self, row: CountedRow) -> Flops:
        """Returns the operations for all tokens of a row."""
        return self.between(row.lengths, row.lengths, row)

    def between(self, queries: Counts, keys: Counts, row: CountedRow) -> Flops:
        """Returns the operations for some tokens that attend to others.

        Attention counts by document as a full square, as in PaLM (Chowdhery et al. 2022, appendix B) and torch's FLOP
        counter: the half that a causal kernel saves is not subtracted. Under a window, each query counts with the keys
        that fit the window, scaled by the share of tokens whose keys are computed.

        Args:
            queries: Tokens of each document that attend.
            keys: Tokens of each document whose keys are computed and attended to.
            row: The row that they belong to.
        """
        cached = [0] * len(row.lengths) if row.cached is None else row.cached
        pairs: int | float = 0
        for own, new, old, length in zip(queries, keys, cached, row.lengths, strict=True):
            kept = 1 if self.mask == CAUSAL else self.mask.keys_per_query(length + old) / (length + old)
            pairs += own * (new + old) * kept
        return Flops(self.query * sum(queries) + self.key * sum(keys) + self.pair * pairs)
