"""What a person sees while training runs is of the last step, and is not what the training waits for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fuyu_e2e.datamodule import FuyuDataModule
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.training.bad_steps import BadSteps
from fuyu_e2e.training.module import FuyuModule
from fuyu_e2e.training.progress import Progress

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Look(Callback):
    """Reads the bar behind each step, and what the step was."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.shown: list[dict[str, Any]] = []
        self.norms: list[float] = []
        self.tokens: list[int] = []
        self.monitored: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self.norms.append(float(module._gradient_norm))
            self.tokens.append(module.tokens_seen)
            self.monitored.append(float(trainer.callback_metrics["train/loss"]))

    def on_before_zero_grad(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        self.shown.append(self.bar.get_metrics(trainer, module))


@pytest.mark.parametrize("rows", [1, 2])
def test_the_bar_shows_each_step_and_curves_those_that_are_logged(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path, rows: int
) -> None:
    bar = Progress()
    look = Look(bar)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=7,
        accumulate_grad_batches=rows,
        logger=TensorBoardLogger(tmp_path, name="", version=""),
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=3,
        callbacks=[BadSteps(), bar, look],
    )
    trainer.fit(FuyuModule(config), question_data(budget=64))
    events = EventAccumulator(str(tmp_path)).Reload()
    for name, told in (("train/gradient_norm", look.norms), ("tokens", look.tokens), ("train/loss", look.monitored)):
        logged = events.Scalars(name)
        assert [event.step for event in logged] == [2, 5]
        assert [event.value for event in logged] == pytest.approx([told[event.step] for event in logged])
    assert [event.value for event in events.Scalars("bad_steps/skipped")] == [0, 0]
    assert len(set(look.monitored)) == 7  # of each step anew, for those who monitor it
    for shown, loss, tokens in zip(look.shown[1:], look.monitored, look.tokens, strict=False):
        assert shown["train/loss"] == f"{loss:.3f}"
        assert shown["tokens"] == str(tokens)
    assert bar.progress is not None
    assert bar.progress.live.refresh_per_second <= 10  # each time stops the training while it is drawn


@pytest.mark.parametrize("rows", [1, 2])
def test_the_bar_of_a_resumed_run_ends_where_the_run_does(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path, rows: int
) -> None:
    for steps, checkpoint in ((2, None), (5, tmp_path / "two.ckpt")):
        bar = Progress()
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            accumulate_grad_batches=rows,
            logger=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[bar],
        )
        trainer.fit(FuyuModule(config), question_data(budget=64), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "two.ckpt")
        assert bar.progress is not None
        (task,) = bar.progress.tasks
        assert (task.completed, task.total) == (steps * rows, steps * rows)
