"""ROUGE-L: the longest common subsequence of words."""

from collections.abc import Sequence

from fuyu_e2e.eval.metrics.captions import words

BETA = 1.2
"""How much more recall counts than precision, as in the COCO evaluation."""


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Returns the F-measure of the longest common subsequence of words (Lin 2004, section 3, with `BETA`).

    With several references, the best precision and the best recall count independently, as in the COCO evaluation
    (Chen et al. 2015, "Microsoft COCO Captions"). Words are those of `fuyu_e2e.eval.metrics.captions`.
    """
    own, others = words(answer), [words(reference) for reference in references]
    common = [_longest_common(own, other) for other in others]
    precision = max(count / max(len(own), 1) for count in common)
    recall = max(count / max(len(other), 1) for count, other in zip(common, others, strict=True))
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision else 0.0


def _longest_common(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        above = row
        row = [0]
        for column, other in enumerate(b):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[-1]))
    return row[-1]
