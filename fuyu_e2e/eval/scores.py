"""Turns answers into scores: of all questions and of groups, with intervals and the fraction due to the image."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

from fuyu_e2e.eval.blind import share_from_image
from fuyu_e2e.eval.bootstrap import interval
from fuyu_e2e.eval.evaluation import RUNS, Evaluation, Run
from fuyu_e2e.eval.metric import Metric, Score
from fuyu_e2e.eval.metrics import METRICS

NO_ANSWER = "\N{REPLACEMENT CHARACTER}"
"""The answer that an unusable question is scored with; not empty, since an empty text may be right."""
TURN = "turn"
"""The group of scores by turn of a conversation, unless the task has a group of that name."""
PER_TOKEN = "_per_token"
"""Suffix of a metric's name for the choices with the highest likelihood per token."""


@dataclass(frozen=True)
class Scored:
    """The score of some questions."""

    value: float | None
    """None without a score."""
    interval: tuple[float, float] | None
    """The 95 % interval by bootstrap over images; None if it was not asked for, or for fewer than two images."""
    questions: int
    images: int


@dataclass(frozen=True)
class MetricScores:
    """The scores of a task by one metric."""

    higher_is_better: bool
    all: Scored
    groups: dict[str, dict[str, Scored]]
    """Scores by group and its value, and by turn if conversations have several."""
    blind: Mapping[Run, Scored]
    """Scores of the same questions without their images, and with images of others."""
    from_image: Mapping[Run, float | None]
    """The fraction of the score that is due to the image, by either run."""


class Perplexity:
    """The exponential of the mean loss of tokens, in nats, from its sum and their number."""

    higher_is_better = False

    def value(self, total: Float64[np.ndarray, "*samples 2"]) -> Float64[np.ndarray, "*samples"]:
        """Returns the perplexity for (sum of losses, number of tokens); nan without tokens."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return np.asarray(np.exp(total[..., 0] / total[..., 1]))


def score(evaluation: Evaluation, intervals: bool = True) -> dict[str, MetricScores]:
    """Returns the scores by every metric of the task; an unusable question counts as wrong.

    Args:
        evaluation: All outcomes.
        intervals: Whether to compute the intervals too, which takes far longer than the scores.
    """
    runs = {run: statistics(evaluation, run) for run in RUNS if _was_asked(evaluation, run)}
    outcomes, seed = evaluation.outcomes, evaluation.seed if intervals else None
    images = np.array([outcome.image for outcome in outcomes], dtype=object)
    scores = {}
    parts = _parts(evaluation)
    for name, (metric, rows) in runs["image"].items():
        everything = _scored(metric, rows, images, seed)
        groups = {
            group: {value: _scored(metric, rows[chosen], images[chosen], seed) for value, chosen in values.items()}
            for group, values in parts.items()
        }
        blind: dict[Run, Scored] = {
            run: _scored(*found[name], images, seed) for run, found in runs.items() if run != "image"
        }
        shares: dict[Run, float | None] = {run: _share(everything, other) for run, other in blind.items()}
        scores[name] = MetricScores(metric.higher_is_better, everything, groups, blind, shares)
    return scores


def _parts(evaluation: Evaluation) -> dict[str, dict[str, Bool[np.ndarray, " N"]]]:
    """Returns a mask of the questions for each value of each group, and for turns if there are several."""
    outcomes = evaluation.outcomes
    parts = {}
    for group in evaluation.task.groups:
        values = [outcome.groups.get(group) for outcome in outcomes]
        parts[group] = {
            value: np.array([own == value for own in values])
            for value in sorted({value for value in values if value is not None})
        }
    turns = np.array([outcome.turn for outcome in outcomes])
    if len(numbers := np.unique(turns)) > 1:
        parts.setdefault(TURN, {str(number): turns == number for number in numbers})
    return parts


def statistics(evaluation: Evaluation, run: Run) -> dict[str, tuple[Score, Float64[np.ndarray, "N K"]]]:
    """Returns for each metric its statistics of every question of a run."""
    answers = [outcome.answers[run] for outcome in evaluation.outcomes]
    if evaluation.task.answer == "perplexity":
        losses = np.array([[answer.loss, answer.tokens] for answer in answers], np.float64).reshape(-1, 2)
        return {"perplexity": (Perplexity(), losses)}
    texts = {"": [NO_ANSWER if answer.text is None else answer.text for answer in answers]}
    if evaluation.task.answer == "choose":
        texts[PER_TOKEN] = [
            NO_ANSWER if answer.text_per_token is None else answer.text_per_token for answer in answers
        ]
    references = [outcome.references for outcome in evaluation.outcomes]
    found: dict[str, tuple[Score, Float64[np.ndarray, "N K"]]] = {}
    for name in evaluation.task.metrics:
        metric: Metric = METRICS[name]
        for suffix, written in texts.items():
            found[name + suffix] = metric, metric.statistics(written, references)
    return found


def _was_asked(evaluation: Evaluation, run: Run) -> bool:
    """Returns whether any question was asked in this run."""
    return run == "image" or evaluation.all_stats[run].used > 0


def _scored(metric: Score, rows: Float64[np.ndarray, "N K"], images: np.ndarray, seed: int | None) -> Scored:
    names = images.tolist()
    ends = (np.nan, np.nan) if seed is None else interval(metric, rows, names, seed=seed)
    low, high = map(_number, ends)
    between = None if low is None or high is None else (low, high)
    return Scored(_number(metric.value(rows.sum(axis=0))), between, len(rows), len(set(names)))


def _number(value: float | np.ndarray) -> float | None:
    return float(value) if np.isfinite(value) else None


def _share(seen: Scored, blind: Scored) -> float | None:
    return None if seen.value is None or blind.value is None else share_from_image(seen.value, blind.value)
