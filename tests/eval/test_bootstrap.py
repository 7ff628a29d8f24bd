"""Intervals hold the truth as often as they say, and resample images with all their questions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuyu_e2e.eval.bootstrap import interval
from fuyu_e2e.eval.metrics import METRICS

MEAN = METRICS["accuracy"]


def points(scores: np.ndarray) -> np.ndarray:
    return np.stack([scores, np.ones(len(scores))], axis=1).astype(np.float64)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Images of which 3 in 10 are read right, two questions each: 95 % of 200 intervals, give or take three sigmas."""
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        right = np.repeat(rng.random(100) < 0.3, 2)
        images = [str(i // 2) for i in range(200)]
        low, high = interval(MEAN, points(right), images, resamples=250, seed=trial)
        held += low <= 0.3 <= high
    assert held / 200 == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 200))


def test_questions_of_one_image_are_drawn_together() -> None:
    """Twenty answers that always agree tell no more than one: the interval is as wide as that of the images."""
    right = np.random.default_rng(0).random(60) < 0.5
    images = [str(i) for i in range(60)]
    once = interval(MEAN, points(right), images)
    many = interval(MEAN, points(np.repeat(right, 20)), [name for name in images for _ in range(20)])
    apart = interval(MEAN, points(np.repeat(right, 20)), [str(i) for i in range(1200)])
    assert many == once
    assert apart[1] - apart[0] < 0.4 * (once[1] - once[0])


@pytest.mark.parametrize("name", ["character_error_rate", "bleu"])
@given(st.lists(st.sampled_from("abcde"), min_size=4, max_size=8).filter(lambda images: len(set(images)) > 1))
def test_equals_a_slow_loop(name: str, images: list[str]) -> None:
    metric = METRICS[name]
    answers = [f"a red bus on the road {i}" for i in range(len(images))]
    statistics = metric.statistics(answers, [["the red bus on a road 1", "a red bus on the street"]] * len(images))
    names = sorted(set(images))
    rng = np.random.default_rng(5)
    values = []
    for _ in range(40):
        drawn = rng.integers(len(names), size=len(names))
        rows = [statistics[i] for number in drawn for i in range(len(images)) if images[i] == names[number]]
        values.append(float(metric.value(np.sum(rows, axis=0))))
    expected = np.quantile(values, [0.05, 0.95])
    found = interval(metric, statistics, images, confidence=0.9, resamples=40, seed=5)
    assert found == pytest.approx(tuple(expected), abs=1e-12)


def test_the_seed_decides_and_the_order_of_questions_does_not() -> None:
    right = np.random.default_rng(0).random(50)
    images = [str(i // 2) for i in range(50)]
    first = interval(MEAN, points(right), images, seed=1)
    assert interval(MEAN, points(right), images, seed=1) == first
    assert interval(MEAN, points(right), images, seed=2) != first
    assert interval(MEAN, points(right[::-1]), images[::-1], seed=1) == pytest.approx(first)


def test_one_image_says_nothing_of_others() -> None:
    assert all(math.isnan(end) for end in interval(MEAN, points(np.ones(3)), ["a"] * 3))
    assert all(math.isnan(end) for end in interval(MEAN, points(np.ones(0)), []))


def test_each_row_needs_an_image() -> None:
    with pytest.raises(ValueError, match="3 rows of statistics, but 2 images"):
        interval(MEAN, points(np.ones(3)), ["a", "b"])
