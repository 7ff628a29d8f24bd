"""Overlap of boxes is what counting their pixels gives; what is no box scores nothing."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuyu_e2e.eval.metrics import METRICS
from fuyu_e2e.eval.metrics.boxes import Box, overlap, read_box

SIDE = 16
spans = st.lists(st.integers(0, SIDE), min_size=2, max_size=2, unique=True).map(sorted)
boxes = st.tuples(spans, spans).map(lambda box: (box[0][0], box[1][0], box[0][1], box[1][1]))


def spelled(box: Box) -> str:
    return f"<box>{box[0]}, {box[1]}, {box[2]}, {box[3]}</box>"


def pixels(box: Box) -> np.ndarray:
    grid = np.zeros((SIDE, SIDE), bool)
    grid[box[0] : box[2], box[1] : box[3]] = True
    return grid


@given(boxes, boxes)
def test_overlap_is_the_shared_pixels_over_all(one: Box, other: Box) -> None:
    counted = (pixels(one) & pixels(other)).sum() / (pixels(one) | pixels(other)).sum()
    assert overlap(one, other) == overlap(other, one) == pytest.approx(counted)
    assert (overlap(one, other) == 1) == (one == other)


@given(boxes, st.sampled_from(["{}", " {} ", "{}\n"]))
def test_a_box_is_read_back(box: Box, form: str) -> None:
    assert read_box(form.format(spelled(box))) == box
    assert read_box(spelled(box).replace(", ", ",")) == box


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lion",
        "12, 3, 40, 9",
        "<box>12, 3, 40</box>",
        "<box>12, 3, 40, 9",
        "<box>12, 3, 40, 9, 9</box>",
        "<box>12, 3, 40, 9</box> lion",
        "<box>-1, 3, 40, 9</box>",
        "<box>1.5, 3, 40, 9</box>",
        "<box>12, 3, 12, 9</box>",
        "<box>12, 9, 40, 3</box>",
        f"<box>1, 1, {'9' * 5_000}, 9</box>",
        "<box>١, 3, 40, 9</box>",
    ],
)
def test_what_is_no_box_scores_nothing(text: str) -> None:
    assert read_box(text) is None
    for name in ("box_iou", "box_iou_50"):
        assert METRICS[name].statistics([text], [["<box>12, 3, 40, 9</box>"]]).tolist() == [[0, 1]]


def test_the_best_reference_counts_and_questions_without_a_box_do_not() -> None:
    answers = ["<box>0, 0, 4, 4</box>", "<box>0, 0, 4, 4</box>", "lion", "<box>0, 0, 4, 4</box>"]
    references = [
        ["<box>0, 0, 4, 8</box>", "<box>0, 0, 4, 16</box>"],
        ["<box>0, 1, 4, 9</box>"],
        ["<box>0, 0, 4, 4</box>"],
        ["lion"],
    ]
    mean, share = (METRICS[name].statistics(answers, references) for name in ("box_iou", "box_iou_50"))
    assert mean.tolist() == [[0.5, 1], [pytest.approx(1 / 3), 1], [0, 1], [0, 0]]
    assert share.tolist() == [[1, 1], [0, 1], [0, 1], [0, 0]]
    assert METRICS["box_iou"].value(mean.sum(axis=0)) == pytest.approx((1 / 2 + 1 / 3) / 3)
    assert METRICS["box_iou_50"].value(share.sum(axis=0)) == pytest.approx(1 / 3)
    assert math.isnan(METRICS["box_iou"].value(mean[3]))
