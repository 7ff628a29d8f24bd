"""Metrics that are a ratio of two sums, such as the mean of a score: points over questions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64


@dataclass(frozen=True)
class Mean:
    """The mean over questions of a score that one answer and its references determine."""

    score: Callable[[str, Sequence[str]], float]
    higher_is_better: bool = True

    def statistics(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> Float64[np.ndarray, "N 2"]:
        """Returns the score of each answer, and a one.

        Raises:
            ValueError: A question has no reference, or there aren't as many answers as questions.
        """
        scores = [self.score(answer, right) for answer, right in paired(answers, references)]
        return np.array([scores, np.ones(len(scores))]).T

    def value(self, total: Float64[np.ndarray, "*samples 2"]) -> Float64[np.ndarray, "*samples"]:
        """Returns points over questions; nan without questions."""
        return ratio(total)


def paired(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Iterator[tuple[str, Sequence[str]]]:
    """Yields each answer with its references.

    Raises:
        ValueError: A question has no reference, or there aren't as many answers as questions.
    """
    for number, (answer, right) in enumerate(zip(answers, references, strict=True)):
        if not right:
            raise ValueError(f"question {number} has no reference to score an answer by")
        yield answer, right


def ratio(total: Float64[np.ndarray, "*samples 2"]) -> Float64[np.ndarray, "*samples"]:
    """Returns the first sum over the second; nan for 0 / 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(total[..., 0] / total[..., 1])
