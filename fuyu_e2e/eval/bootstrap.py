"""Confidence intervals: how much a score would vary had other images been drawn."""

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
    (the cluster bootstrap, Davison and Hinkley 1997, section 3.8). What the statistics were made with stays as it is:
    CIDEr's idf is that of the whole corpus in every resample. All-right answers give an interval without width, as any
    percentile bootstrap does; with fewer than some 30 images it is too narrow.

    Args:
        metric: Gives the value of a resample.
        statistics: A row for each question, such as `Metric.statistics` gives.
        images: The image of each question.
        confidence: Share of such intervals that hold the true value.
        resamples: How often images are drawn.
        seed: Seeds the draws.

    Returns:
        The lower and the upper end; nan for fewer than two images, which say nothing of others.
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
    """Returns how often each image is drawn when as many are drawn as there are."""
    return np.bincount(rng.integers(images, size=images), minlength=images).astype(np.float64)
