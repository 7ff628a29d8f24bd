"""Mixes several sources in one stream, in shares that may change over the steps, or by a figure of validations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
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
    """Its share is its weight over the sum of all weights; a dict of steps interpolates linearly between them. With
    `data.climb` the keys are rungs instead."""

    def __post_init__(self) -> None:
        values = self.weight.values() if isinstance(self.weight, dict) else [self.weight]
        if not values or not all(0 <= value < float("inf") for value in values):
            raise UserError(f"The weight of a source is {self.weight}, but must be 0 or more.")

    def weight_at(self, key: int) -> float:
        """Returns the weight at a step, or at a rung if the mixture climbs."""
        if not isinstance(self.weight, dict):
            return self.weight
        keys = sorted(self.weight)
        return float(np.interp(key, keys, [self.weight[known] for known in keys]))


@dataclass(frozen=True)
class Climb:
    """Makes the keys of a mixture's weights rungs of a ladder (0, 1, ...) instead of steps, and says when to climb it.

    A run begins at rung 0, and climbs at most one rung at a validation.

    Raises:
        UserError: Nothing says when to climb, or it is no figure of a validation.
    """

    monitor: str
    """The figure of a validation that decides, such as `val/exact_match`."""
    at: list[float]
    """For each rung but the last, the value at which it is left: the first validation that reaches it climbs."""
    mode: Literal["min", "max"] = "min"
    """Whether a value is reached from above (`min`, for losses) or from below (`max`)."""

    def __post_init__(self) -> None:
        if not self.at or not all(isfinite(value) for value in self.at):
            raise UserError(
                f"data.climb.at is {self.at}, but must hold a number for each rung that is left: the value of "
                f"{self.monitor} that leads to the next."
            )
        # Other figures may be of an earlier step, or not there in a run that has just gone on from a checkpoint.
        if not self.monitor.startswith("val/"):
            raise UserError(
                f"data.climb.monitor is {self.monitor}, but a rung is left at a validation: name a figure that "
                "validations log, such as val/loss or val/exact_match."
            )

    def reached(self, rung: int, value: float) -> bool:
        """Returns whether a value of the figure leads from a rung to the next."""
        if rung >= len(self.at):
            return False
        return value >= self.at[rung] if self.mode == "max" else value <= self.at[rung]

    def check(self, mixture: Mapping[str, Source]) -> None:
        """Checks that the rungs of a mixture are those that can be climbed.

        Raises:
            UserError: There is no mixture, a weight's key is no rung, or all weights of a rung are zero.
        """
        if not mixture:
            raise UserError(
                "data.climb is set, but there is no data.mixture whose weights could climb: name its sources, or "
                "leave data.climb out."
            )
        for name, source in mixture.items():
            for key in source.weight if isinstance(source.weight, dict) else ():
                if not 0 <= key <= len(self.at):
                    raise UserError(
                        f"The weight of {name} in data.mixture has the key {key}, but the rungs are 0 to "
                        f"{len(self.at)}: data.climb.at has a value for each rung that is left."
                    )
        for rung in range(len(self.at) + 1):
            shares(list(mixture.values()), rung, "rung")


def shares(sources: Sequence[Source], key: int, kind: Literal["step", "rung"] = "step") -> tuple[float, ...]:
    """Returns the share of each source at a step or rung; they add up to one.

    Raises:
        UserError: All weights are zero there.
    """
    weights = [source.weight_at(key) for source in sources]
    if not (total := sum(weights)):
        raise UserError(f"At {kind} {key} the weights of all sources of data.mixture are 0: give one of them a share.")
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
