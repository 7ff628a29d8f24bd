"""Metrics that count edits: letters to insert, delete or substitute (Levenshtein 1966)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from fuyu_e2e.eval.metrics.mean import paired, ratio


def edit_distance(a: str, b: str) -> int:
    """Returns the fewest insertions, deletions and substitutions of letters (code points) between two texts.

    torchmetrics' `edit_distance` searches only near the diagonal, so it overestimates for long texts that are shifted
    against each other.
    """
    rows, cols = sorted((np.array([*map(ord, text)], np.int64) for text in (a, b)), key=len)
    # Each row holds distances minus the column number, so that an insertion, which costs one a column, adds nothing.
    lowered = np.zeros(len(cols) + 1, np.int64)
    for number, letter in enumerate(rows, 1):
        diagonal = lowered[:-1] - (cols == letter)
        lowered = np.minimum.accumulate(np.concatenate([[number], np.minimum(lowered[1:] + 1, diagonal)]))
    return int(lowered[-1]) + len(cols)


def anls(answer: str, references: Sequence[str]) -> float:
    """Returns ANLS: 1 - edits / letters of the longer text, for the most similar reference; 0 if that is below 0.5.

    Biten et al. 2019, "Scene Text Visual Question Answering", equation 1, as DocVQA is evaluated: in lower case, with
    white space collapsed. An answer that is exactly half right counts 0.5, as in the script of the DocVQA challenge
    (the equation would give 0). That script divides by the letters before white space is collapsed, so that an answer
    padded with spaces scores more; here it doesn't.
    """
    answer = _plain(answer)
    return max(_similarity(answer, _plain(reference)) for reference in references)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(answer: str, reference: str) -> float:
    longer = max(len(answer), len(reference))
    edits = edit_distance(answer, reference)
    return 0.0 if 2 * edits > longer else 1 - edits / max(longer, 1)


class CharacterErrorRate:
    """The sum of edits over the sum of the references' letters, spaces among them (the word error rate
    of Morris et al. 2004, "From WER and RIL to MER and WIL", on letters).

    Among several references, the one with the lowest rate counts. Infinite if all references are empty but an answer
    isn't.
    """

    higher_is_better = False

    def statistics(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> Float64[np.ndarray, "N 2"]:
        """Returns for each answer the edits to its nearest reference, and the letters of that reference.

        Raises:
            ValueError: A question has no reference, or there aren't as many answers as questions.
        """
        rows = [_nearest(answer, right) for answer, right in paired(answers, references)]
        return np.array(rows, np.float64).reshape(-1, 2)

    def value(self, total: Float64[np.ndarray, "*samples 2"]) -> Float64[np.ndarray, "*samples"]:
        """Returns edits over letters; nan without either."""
        return ratio(total)


def _nearest(answer: str, references: Sequence[str]) -> tuple[int, int]:
    rows = [(edit_distance(answer, reference), len(reference)) for reference in references]
    return min(rows, key=lambda row: row[0] / row[1] if row[1] else np.inf if row[0] else 0.0)
