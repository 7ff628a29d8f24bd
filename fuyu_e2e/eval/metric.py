"""What a metric is: sums over questions, so that its value for any sample of them costs nothing more."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64


@runtime_checkable
class Score(Protocol):
    """The value for some questions follows from the sum of their statistics."""

    @property
    def higher_is_better(self) -> bool:
        """Whether more is better; an error rate is better low."""
        ...

    def value(self, total: Float64[np.ndarray, "*samples K"]) -> Float64[np.ndarray, "*samples"]:
        """Returns the score of questions whose statistics add up to `total`; nan where there is none."""
        ...


@runtime_checkable
class Metric(Score, Protocol):
    """Scores answers.

    An accuracy has a point and a one for each question, a character error rate edits and letters, BLEU its counts of
    n-grams: a bootstrap then resamples rows and never scores an answer twice.
    """

    def statistics(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> Float64[np.ndarray, "N K"]:
        """Of each answer, given all that count as right for it."""
        ...
