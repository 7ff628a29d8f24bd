"""What a metric is: sums over questions, so that its value for any sample of them costs nothing more."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float64


class Metric(Protocol):
    """Scores answers; the value for some questions follows from the sum of their statistics.

    An accuracy has a point and a one for each question, a character error rate edits and letters, BLEU its counts of
    n-grams: a bootstrap then resamples rows and never scores an answer twice.
    """

    higher_is_better: bool

    def statistics(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> Float64[np.ndarray, "N K"]:
        """Of each answer, given all that count as right for it."""
        ...

    def value(self, total: Float64[np.ndarray, "*samples K"]) -> Float64[np.ndarray, "*samples"]:
        """The metric of questions whose statistics add up to `total`; nan where there is none."""
        ...
