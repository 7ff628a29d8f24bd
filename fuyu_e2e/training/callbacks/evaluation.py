"""Evaluates tasks at regular steps of a run, and logs curves and pictures."""

from collections.abc import Mapping
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from fuyu_e2e.checkpoint.loading import TrainedModel
from fuyu_e2e.data.lightning_internals import accumulates
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.errors import UserError
from fuyu_e2e.eval.contact_sheet import draw_sheet
from fuyu_e2e.eval.evaluation import Evaluation, evaluate
from fuyu_e2e.eval.question import Question
from fuyu_e2e.eval.scores import MetricScores, score
from fuyu_e2e.eval.task import BATCH_TOKENS, Task, load_task
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.training.callbacks.random_state import read_random_state, restore_random_state
from fuyu_e2e.training.callbacks.throughput import Throughput
from fuyu_e2e.training.module import FuyuModule
from fuyu_e2e.training.settings.arguments import did_you_mean
from fuyu_e2e.training.tensorboard import shown_step


class EvaluationInTraining(Callback):
    """Evaluates tasks every so many steps, on the first process while the others wait; does not affect training.

    Logs `eval/TASK/METRIC`, also by group and without the images, `eval/TASK/unusable`, the number of questions that
    count as wrong because they can't be used, and contact sheets of right and wrong answers. The model computes in the
    run's precision. The time counts for `watchdog.limit`. It ends a run of several processes if it exceeds the 30
    minutes that collectives wait; `limit` keeps it short.

    Args:
        tasks: Task files, or names of shipped ones; none evaluates nothing.
        every_n_steps: Optimizer steps from one evaluation to the next.
        limit: Number of questions of each task, from the first.
        data: Files and folders that replace a task's own, by the task's name and theirs.
        batch_tokens: Tokens that are read and written at once.

    Raises:
        UserError: A value is out of its range, or there is no such task.
    """

    def __init__(
        self,
        tasks: tuple[str, ...] = (),
        every_n_steps: int = 500,
        limit: int = 200,
        data: dict[str, dict[str, str]] | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("limit", limit), ("batch_tokens", batch_tokens)):
            if value < 1:
                raise UserError(f"evaluate.{name} is {value}, but must be at least 1.")
        if strange := next((name for name in data or {} if name not in tasks), None):
            hint = did_you_mean(strange, tasks) or f"evaluate.tasks names {', '.join(tasks) or 'none'}."
            raise UserError(f"evaluate.data is for the task {strange}, which is not evaluated: {hint}")
        self.tasks = tasks
        self.every_n_steps = every_n_steps
        self.limit = limit
        self.data = data or {}
        self.batch_tokens = batch_tokens
        self._asked: list[tuple[Task, list[Question]]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reads the questions on every process, so that an error in them ends all.

        Raises:
            UserError: A task or its data is wrong.
        """
        if stage != "fit":
            return
        self._asked = []
        for named in self.tasks:
            task, stats = load_task(named, self.data.get(named)), SampleStats()
            questions = list(islice(task.questions(stats), self.limit))
            if not questions:
                raise UserError(f"The task {named} has no question: {stats.summary()}.")
            if stats.skipped:
                rank_zero_warn(f"The task {named} is evaluated on fewer questions than it has: {stats.summary()}.")
            self._asked.append((task, questions))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Evaluates after a step that is due."""
        if not self._asked or accumulates(trainer):
            return
        if trainer.global_step % self.every_n_steps:
            return
        assert isinstance(pl_module, FuyuModule)
        decoder = pl_module.whole_decoder()
        if decoder is not None:
            self._evaluate(trainer, pl_module, decoder)
        trainer.strategy.barrier()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                callback.leave_out()

    def _evaluate(self, trainer: pl.Trainer, pl_module: FuyuModule, decoder: Decoder) -> None:
        random_state, training = read_random_state(), decoder.training
        model = TrainedModel(decoder.eval(), pl_module.datamodule.builder, trainer.global_step)
        try:
            for task, questions in self._asked:
                with trainer.precision_plugin.forward_context():
                    evaluation = evaluate(model, task, questions, batch_tokens=self.batch_tokens)
                self._log(trainer, evaluation, score(evaluation, intervals=False))
        finally:
            decoder.train(training)
            restore_random_state(random_state)

    @staticmethod
    def _log(trainer: pl.Trainer, evaluation: Evaluation, scores: Mapping[str, MetricScores]) -> None:
        name, step = evaluation.task.name, shown_step(trainer)
        logged = figures(scores) | {"unusable": float(evaluation.all_stats["image"].skipped.total())}
        for logger in trainer.loggers:
            logger.log_metrics({f"eval/{name}/{figure}": value for figure, value in logged.items()}, step)
            if isinstance(logger, TensorBoardLogger):
                for kind, cells in (("right", evaluation.right), ("wrong", evaluation.wrong)):
                    if cells:
                        sheet = np.asarray(draw_sheet(cells))
                        logger.experiment.add_image(f"eval/{name}/{kind}", sheet, step, dataformats="HWC")


def figures(scores: Mapping[str, MetricScores]) -> dict[str, float]:
    """Returns all scores by name: `METRIC`, `METRIC/GROUP/VALUE`, `METRIC/without_image`, `METRIC/other_image`."""
    found = {}
    for metric, parts in scores.items():
        found[metric] = parts.all.value
        for group, values in parts.groups.items():
            found |= {f"{metric}/{group}/{value}": scored.value for value, scored in values.items()}
        found |= {f"{metric}/{run}": scored.value for run, scored in parts.blind.items()}
    return {name: value for name, value in found.items() if value is not None}
