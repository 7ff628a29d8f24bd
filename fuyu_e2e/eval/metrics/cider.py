"""CIDEr-D: how similar a caption is to what people write about this image but not about others."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from fuyu_e2e.eval.metrics.captions import LONGEST, ngrams, words
from fuyu_e2e.eval.metrics.mean import paired, ratio

SIGMA = 6.0
"""Standard deviation, in words, of the Gaussian penalty for a difference in length."""
SCALE = 10.0

Ngram = tuple[str, ...]


class CiderD:
    """CIDEr-D, from 0 to 10 (Vedantam et al. 2015, "CIDEr: Consensus-based Image Description Evaluation", section 8).

    For n = 1 to 4, n-grams are weighted by tf-idf; a caption's vector, clipped at a reference's, is compared with it
    by the cosine. The score is the mean over references and n, less a penalty for a difference in length. The idf is
    that of the references of all questions scored together, each question being one document: score a whole corpus in
    one call. For a single question all idf are 0, and so is the score. As in the COCO evaluation, words are not
    stemmed (the paper stems them). Words are those of `fuyu_e2e.eval.metrics.captions`.
    """

    higher_is_better = True

    def statistics(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> Float64[np.ndarray, "N 2"]:
        """Returns the score of each answer, and a one.

        Raises:
            ValueError: A question has no reference, or there aren't as many answers as questions.
        """
        pairs = [
            (ngrams(words(answer)), [ngrams(words(text)) for text in right])
            for answer, right in paired(answers, references)
        ]
        documents = Counter(ngram for _, right in pairs for ngram in set().union(*right))
        idf = {ngram: float(np.log(len(pairs) / count)) for ngram, count in documents.items()}
        unseen = float(np.log(max(len(pairs), 1)))
        scores = [
            _score(_Vector.of(own, idf, unseen), [_Vector.of(text, idf, unseen) for text in right])
            for own, right in pairs
        ]
        return np.array([scores, np.ones(len(scores))]).T

    def value(self, total: Float64[np.ndarray, "*samples 2"]) -> Float64[np.ndarray, "*samples"]:
        """Returns points over questions; nan without questions."""
        return ratio(total)


@dataclass(frozen=True)
class _Vector:
    """A caption's n-grams, weighted by tf-idf."""

    weights: Mapping[Ngram, float]
    norms: Float64[np.ndarray, " LONGEST"]
    """The norm of the n-grams of each length."""
    length: int
    """Words of the caption."""

    @classmethod
    def of(cls, counts: Counter[Ngram], idf: Mapping[Ngram, float], unseen: float) -> "_Vector":
        weights = {ngram: count * idf.get(ngram, unseen) for ngram, count in counts.items()}
        squares = np.zeros(LONGEST)
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        return cls(weights, np.sqrt(squares), sum(count for ngram, count in counts.items() if len(ngram) == 1))


def _score(caption: _Vector, references: Sequence[_Vector]) -> float:
    return SCALE * sum(_similarity(caption, reference) for reference in references) / len(references)


def _similarity(caption: _Vector, reference: _Vector) -> float:
    products = np.zeros(LONGEST)
    for ngram, weight in caption.weights.items():
        other = reference.weights.get(ngram, 0.0)
        products[len(ngram) - 1] += min(weight, other) * other
    norms = caption.norms * reference.norms
    cosines = np.divide(products, norms, out=np.zeros(LONGEST), where=norms > 0)
    penalty = np.exp(-((caption.length - reference.length) ** 2) / (2 * SIGMA**2))
    return float(cosines.mean() * penalty)
