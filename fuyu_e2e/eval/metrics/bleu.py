"""BLEU: how many of a caption's n-grams occur in its references."""

from collections import Counter
from collections.abc import Sequence
from functools import reduce
from operator import or_

import numpy as np
from jaxtyping import Float64

from fuyu_e2e.eval.metrics.captions import LONGEST, ngrams, words
from fuyu_e2e.eval.metrics.mean import paired


class Bleu:
    """BLEU-4 of a corpus, from 0 to 1 (Papineni et al. 2002, sections 2.1 to 2.3).

    The geometric mean of the precisions of n-grams of one to four words, each clipped at its greatest count in one
    reference, times a penalty for a corpus shorter than the references nearest in length (of two equally near, the
    shorter, as in the COCO evaluation). Nothing is smoothed: 0 if no four words match anywhere. Words are those of
    `fuyu_e2e.eval.metrics.captions`.
    """

    higher_is_better = True

    def statistics(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> Float64[np.ndarray, "N 10"]:
        """Returns matches for n = 1 to 4, n-grams for n = 1 to 4, words, and words of the reference nearest in length.

        Raises:
            ValueError: A question has no reference, or there aren't as many answers as questions.
        """
        rows = [
            _counts(words(answer), [words(text) for text in right]) for answer, right in paired(answers, references)
        ]
        return np.array(rows, np.float64).reshape(-1, 2 * LONGEST + 2)

    def value(self, total: Float64[np.ndarray, "*samples 10"]) -> Float64[np.ndarray, "*samples"]:
        """Returns the BLEU of summed counts; nan if the references have no words."""
        matches, candidates = total[..., :LONGEST], total[..., LONGEST : 2 * LONGEST]
        length, nearest = total[..., -2], total[..., -1]
        with np.errstate(divide="ignore", invalid="ignore"):
            precision = np.where(matches > 0, matches / candidates, 0.0)
            brevity = np.where(length > 0, np.minimum(0.0, 1 - nearest / length), 0.0)
            bleu = np.exp(np.log(precision).mean(axis=-1) + brevity)
        return np.where(nearest > 0, bleu, np.nan)


def _counts(answer: list[str], references: list[list[str]]) -> list[int]:
    own = ngrams(answer)
    most: Counter[tuple[str, ...]] = reduce(or_, map(ngrams, references))
    nearest = min((abs(len(text) - len(answer)), len(text)) for text in references)[1]
    return [*_by_length(own & most), *_by_length(own), len(answer), nearest]


def _by_length(counts: Counter[tuple[str, ...]]) -> list[int]:
    sums = [0] * LONGEST
    for ngram, count in counts.items():
        sums[len(ngram) - 1] += count
    return sums
