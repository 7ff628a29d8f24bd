"""How many pictures a model reads letter for letter: greedy answers and their exact match, by a shipped task."""

from collections.abc import Collection

from fuyu_e2e.checkpoint.loading import TrainedModel
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.eval.evaluation import Outcome, Run, evaluate
from fuyu_e2e.eval.question import Question
from fuyu_e2e.eval.scores import MetricScores, score
from fuyu_e2e.eval.task import load_task

WITH_IMAGE: tuple[Run, ...] = ("image",)


def read_pictures(
    model: TrainedModel, shards: str, task_name: str = "digits", runs: Collection[Run] = WITH_IMAGE
) -> tuple[list[Question], list[Outcome], MetricScores]:
    """Asks a model about all pictures of some shards.

    Args:
        model: A decoder in evaluation mode, with its processing.
        shards: A path, glob or brace pattern.
        task_name: The shipped task of these pictures.
        runs: Whether to ask without images, or with another's, too.

    Returns:
        The questions, what came of each, and the exact match.
    """
    task = load_task(task_name, {"shards": shards})
    questions = list(task.questions(SampleStats()))
    evaluation = evaluate(model, task, questions, runs=runs)
    return questions, evaluation.outcomes, score(evaluation, intervals=False)["exact_match"]


def share_read(model: TrainedModel, shards: str, task_name: str = "digits") -> float:
    """Returns the fraction of pictures that a model reads right, letter for letter."""
    *_, found = read_pictures(model, shards, task_name)
    assert found.all.value is not None
    return found.all.value
