"""Confidence intervals: how much a score would vary with other images."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from fuyu_e2e.eval.metric import Score


def interval(
    metric: Score,
    statistics: Float64[np.ndarray, "N K"],
    images: Sequence[str],
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of a metric's value (Efron and Tibshirani 1993, chapter 13).

    Questions about one image are not independent, so images are drawn with replacement, each with all its questions
    (the cluster bootstrap, Davison and Hinkley 1997, section 3.8). Quantities inside the statistics stay fixed:
    CIDEr's idf is that of the whole corpus in every resample. If all answers are right, the interval has no width, as
    in any percentile bootstrap; with fewer than about 30 images it is too narrow.

    Args:
        metric: Computes the value of a resample.
        statistics: A row for each question, such as `Metric.statistics` returns.
        images: The image of each question.
        confidence: Fraction of such intervals that contain the true value.
        resamples: Number of resamples.
        seed: Seeds the draws.

    Returns:
        The lower and the upper end; nan for fewer than two images, which say nothing about others.
    """
    if len(images) != len(statistics):
        raise ValueError(f"{len(statistics)} rows of statistics, but {len(images)} images")
    names, image_of_row = np.unique(np.array(images, dtype=object), return_inverse=True)
    if len(names) < 2:
        return float("nan"), float("nan")
    sums = np.zeros((len(names), statistics.shape[1]))
    np.add.at(sums, image_of_row, statistics)
    rng = np.random.default_rng(seed)
    totals = np.stack([_times_drawn(rng, len(names)) @ sums for _ in range(resamples)])
    low, high = np.quantile(metric.value(totals), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _times_drawn(rng: np.random.Generator, images: int) -> Float64[np.ndarray, " images"]:
    """Returns how often each image is drawn if as many are drawn as there are."""
    return np.bincount(rng.integers(images, size=images), minlength=images).astype(np.float64)
