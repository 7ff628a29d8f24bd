"""The interface of metrics: sums over questions, so that the value for any resample costs almost nothing."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64


@runtime_checkable
class Score(Protocol):
    """Computes the value for some questions from the sum of their statistics."""

    @property
    def higher_is_better(self) -> bool:
        """Whether higher values are better; an error rate is better low."""
        ...

    def value(self, total: Float64[np.ndarray, "*samples K"]) -> Float64[np.ndarray, "*samples"]:
        """Returns the score of questions whose statistics add up to `total`; nan without any."""
        ...


@runtime_checkable
class Metric(Score, Protocol):
    """Scores answers.

    An accuracy has points and a one for each question, a character error rate edits and letters, BLEU its counts of
    n-grams: a bootstrap resamples these rows and never scores an answer twice.
    """

    def statistics(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> Float64[np.ndarray, "N K"]:
        """Returns a row for each answer, given all its right references."""
        ...
