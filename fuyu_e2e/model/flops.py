"""How parts of a decoder count their floating-point operations; only matrix products count."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fuyu_e2e.model.attention.mask import CAUSAL, AttentionMask

Counts = Sequence[int | float]
"""Tokens of each document; a fraction where a share of them is meant."""


class Flops(NamedTuple):
    """Multiply-adds of matrix products, each of which is two floating-point operations."""

    products: int | float = 0
    """Those whose input needs a gradient, as do the weights."""
    first: int | float = 0
    """Those whose input needs none: the first to read what isn't learnt, or what no gradient is sent to."""

    @property
    def forward(self) -> int | float:
        """Operations of the forward pass."""
        return 2 * (self.products + self.first)

    @property
    def training(self) -> int | float:
        """Operations of forward and backward pass, nothing computed twice."""
        return 6 * self.products + 4 * self.first

    def plus(self, other: "Flops", times: int | float = 1) -> "Flops":
        """Returns the sum with so many times the other ones."""
        return Flops(self.products + times * other.products, self.first + times * other.first)


@dataclass(frozen=True, kw_only=True)
class CountedRow:
    """What is known of a row of documents whose operations are counted."""

    lengths: Counts
    """Tokens of each document."""
    patches: int = 0
    """Those of them that are patches."""
    cached: Counts | None = None
    """Earlier tokens of each document, whose keys are in a cache."""
    passing: Mapping[int, Counts] = field(default_factory=dict)
    """How many tokens of each document pass, by the number of a block that selects some; where missing, the share that
    it was asked for."""
    done: float | None = 1.0
    """The part of a training that is done, as blocks may compute more at first; None for the mean over all of it."""


Operations = Callable[[CountedRow], Flops]
"""What a block computes for a row. Of blocks whose operations are equal, one is counted for all."""


@dataclass(frozen=True, kw_only=True)
class DenseOperations:
    """Multiply-adds of a block's products, by what each is for."""

    query: int
    """Of each token that attends."""
    key: int
    """Of each token that is attended to."""
    pair: int
    """Of each query with each key that it sees."""
    mask: AttentionMask
    """Which keys that is."""

    def __call__(self, row: CountedRow) -> Flops:
        """Returns those of all tokens of a row."""
        return self.between(row.lengths, row.lengths, row)

    def between(self, queries: Counts, keys: Counts, row: CountedRow) -> Flops:
        """Returns those of the tokens that attend to others.

        Attention counts by document and as a full square, as in PaLM (Chowdhery et al. 2022, appendix B) and torch's
        flop counter: the half that a causal kernel saves is not subtracted. Of a mask's window, each query counts with
        as many keys as fit it, of which the tokens that pass a block have their share.

        Args:
            queries: Tokens of each document that attend.
            keys: Tokens of each document whose keys are computed, and attended to.
            row: That they belong to.
        """
        cached = [0] * len(row.lengths) if row.cached is None else row.cached
        pairs: int | float = 0
        for own, new, old, length in zip(queries, keys, cached, row.lengths, strict=True):
            pairs += own * (
                new + old if self.mask == CAUSAL else (new + old) * self.mask.keys(length + old) / (length + old)
            )
        return Flops(self.query * sum(queries) + self.key * sum(keys) + self.pair * pairs)
