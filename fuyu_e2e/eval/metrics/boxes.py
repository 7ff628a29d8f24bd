"""Metrics of boxes: how well the place that an answer states is the right one."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from fuyu_e2e.eval.metrics.mean import paired, ratio

BOX = re.compile(r"\s*<box>\s*{0}\s*,\s*{0}\s*,\s*{0}\s*,\s*{0}\s*</box>\s*".format(r"([0-9]{1,9})"))
"""A box as the released Fuyu's prompts spell it, in pixels: top, left, bottom and right."""

Box = tuple[int, int, int, int]


def read_box(text: str) -> Box | None:
    """Returns top, left, bottom and right, in pixels, of a text that is a box and nothing else; None for another.

    A box whose bottom is above its top, or whose right is left of its left, is none.
    """
    found = BOX.fullmatch(text)
    if not found:
        return None
    top, left, bottom, right = map(int, found.groups())
    return (top, left, bottom, right) if top < bottom and left < right else None


def overlap(one: Box, other: Box) -> float:
    """Returns the intersection over union of two boxes' areas, from 0 to 1 (Everingham et al. 2010, "The PASCAL Visual
    Object Classes Challenge", equation 3), of which bottom and right are the first row and column outside."""
    rows = min(one[2], other[2]) - max(one[0], other[0])
    columns = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0, rows) * max(0, columns)
    areas = [(bottom - top) * (right - left) for top, left, bottom, right in (one, other)]
    return shared / (sum(areas) - shared)


@dataclass(frozen=True)
class BoxOverlap:
    """The mean intersection over union of answered boxes with the right ones, or the fraction that reaches a bound.

    Of several references, the one that overlaps most counts. An answer that is no box scores 0. Questions without a
    box among their references don't count, so that a task may ask for other things too.
    """

    bound: float | None = None
    """With a bound, an answer scores 1 if it reaches it, else 0; 0.5 is that of PASCAL VOC."""
    higher_is_better: bool = True

    def statistics(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> Float64[np.ndarray, "N 2"]:
        """Returns the score of each answer and a one, and zeros where no reference is a box.

        Raises:
            ValueError: A question has no reference, or there aren't as many answers as questions.
        """
        rows = [self._scored(answer, right) for answer, right in paired(answers, references)]
        return np.array(rows, np.float64).reshape(-1, 2)

    def value(self, total: Float64[np.ndarray, "*samples 2"]) -> Float64[np.ndarray, "*samples"]:
        """Returns points over questions about boxes; nan without any."""
        return ratio(total)

    def _scored(self, answer: str, references: Sequence[str]) -> tuple[float, float]:
        boxes = [box for reference in references if (box := read_box(reference))]
        if not boxes:
            return 0.0, 0.0
        answered = read_box(answer)
        best = max(overlap(answered, box) for box in boxes) if answered else 0.0
        return (best if self.bound is None else float(best >= self.bound)), 1.0
