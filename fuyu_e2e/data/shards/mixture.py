"""Mixes several sources in one stream, in shares that may change over the steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fuyu_e2e.errors import UserError

MixBy = Literal["tokens", "documents"]


@dataclass(frozen=True)
class Source:
    """One source of a mixture in a recipe.

    Raises:
        UserError: A weight is negative or no number.
    """

    shards: str | list[str]
    """A path, URL, glob or brace pattern, a folder, or a list of them."""
    weight: float | dict[int, float] = 1.0
    """Its share is its weight over the sum of all weights; a dict of steps interpolates linearly between them."""

    def __post_init__(self) -> None:
        values = self.weight.values() if isinstance(self.weight, dict) else [self.weight]
        if not values or not all(0 <= value < float("inf") for value in values):
            raise UserError(f"The weight of a source is {self.weight}, but must be 0 or more.")

    def weight_at(self, step: int) -> float:
        """Returns the weight at a step."""
        if not isinstance(self.weight, dict):
            return self.weight
        steps = sorted(self.weight)
        return float(np.interp(step, steps, [self.weight[known] for known in steps]))


def shares(sources: Sequence[Source], step: int) -> tuple[float, ...]:
    """Returns the share of each source at a step; they add up to one.

    Raises:
        UserError: All weights are zero at that step.
    """
    weights = [source.weight_at(step) for source in sources]
    if not (total := sum(weights)):
        raise UserError(f"At step {step} the weights of all sources of data.mixture are 0: give one of them a share.")
    return tuple(weight / total for weight in weights)


class Chooser:
    """Draws from the source that lags its share the most: the shares hold at every moment, not only on average.

    Args:
        deficits: How far each source lags its share, in tokens or documents; pass an earlier `deficits` to continue.
    """

    def __init__(self, deficits: Sequence[float]) -> None:
        self.deficits = list(deficits)

    @classmethod
    def begin(cls, sources: int, scale: float, seed: Sequence[int]) -> "Chooser":
        """Returns a new chooser; the seed keeps lanes from drawing from a rare source all at once."""
        deficits = np.random.default_rng(seed).uniform(-scale, scale, sources)
        return cls((deficits - deficits.mean()).tolist())

    def choose(self, shares: Sequence[float]) -> int:
        """Returns the number of the source to draw from."""
        return max((number for number, share in enumerate(shares) if share), key=lambda number: self.deficits[number])

    def draw(self, chosen: int, amount: int, shares: Sequence[float]) -> None:
        """Records what was drawn."""
        for number, share in enumerate(shares):
            self.deficits[number] += share * amount
        self.deficits[chosen] -= amount
