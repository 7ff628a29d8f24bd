"""The progress bar: tokens seen, tokens/s and loss."""

import logging
import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from fuyu_e2e.training.callbacks.step_lines import StepLines, short_count
from fuyu_e2e.training.callbacks.throughput import throughput_of
from fuyu_e2e.training.module import FuyuModule

REDRAWN = 4
"""Redraws a second. A terminal's bar takes a millisecond to draw, in which Python does nothing else; Lightning's rate
of a hundred would take a tenth of the run."""


def progress() -> ProgressBar:
    """Returns the callback that shows a run's progress: a bar in a terminal, lines elsewhere."""
    return Progress() if sys.stdout.isatty() else StepLines()


class Progress(RichProgressBar):
    """Lightning's bar, but counting optimizer steps, with readable figures and few redraws.

    Reads nothing from the device: the loss is that of the last step that the module read.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=REDRAWN)
        self._validation_loss: float | None = None
        self._led_above: list[tuple[logging.StreamHandler, Any]] = []

    @property
    def total_train_batches(self) -> int | float:
        """Optimizer steps of the whole run; Lightning's are the micro-batches still to come."""
        return super().total_train_batches if self.trainer.max_steps < 0 else self.trainer.max_steps

    def _get_train_description(self, current_epoch: int) -> str:
        """Returns the label without an epoch, since a stream of data has none."""
        return f"{'Training':{len(self.validation_description)}}"

    def _init_progress(self, trainer: pl.Trainer) -> None:
        """Sends log messages to the area above the bar, which would overwrite them; rich does so only for `print`."""
        super()._init_progress(trainer)
        if self._led_above or self._progress_stopped:
            return
        for name in ("lightning.pytorch", "lightning.fabric"):
            for handler in logging.getLogger(name).handlers:
                if type(handler) is logging.StreamHandler:
                    self._led_above.append((handler, handler.setStream(sys.stderr)))

    def _stop_progress(self) -> None:
        super()._stop_progress()
        for handler, stream in self._led_above:
            if stream is not None:
                handler.setStream(stream)
        self._led_above = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows the step of a resumed run: in the middle of an epoch, Lightning calls no `on_train_epoch_start`."""
        super().on_train_start(trainer, pl_module)
        self._count_from(trainer.global_step)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restores the count, which Lightning sets to zero."""
        super().on_train_epoch_start(trainer, pl_module)
        self._count_from(trainer.global_step)

    def _count_from(self, step: int) -> None:
        if self.progress is None:  # on all processes but the first
            return
        if self.train_progress_bar_id is None:
            self._initialize_train_progress_bar_id()
        assert self.train_progress_bar_id is not None
        self.progress.reset(self.train_progress_bar_id, completed=step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Counts completed steps."""
        self._update(self.train_progress_bar_id, trainer.global_step)
        self._update_metrics(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the finished bar in place above the final messages."""
        self._stop_progress()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the validation loss to show from now on."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            assert isinstance(pl_module, FuyuModule)
            self._validation_loss = pl_module.validated.get("val/loss")
        super().on_validation_end(trainer, pl_module)

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Returns the figures to show next to the bar, as far as they are known."""
        if trainer.state.fn != TrainerFn.FITTING or not isinstance(pl_module, FuyuModule):
            known = trainer.progress_bar_metrics
            return {name: f"{known[name]:.3f}" for name in ("val/loss", "test/loss") if name in known}
        shown: dict[str, int | str | float | dict[str, float]] = {}
        if pl_module.figures is not None:
            shown["train/loss"] = f"{pl_module.figures.loss:.3f}"
        if self._validation_loss is not None:
            shown["val/loss"] = f"{self._validation_loss:.3f}"
        shown["tokens"] = short_count(float(pl_module.tokens_seen))
        throughput = throughput_of(trainer)
        if throughput is not None and throughput.rate:
            shown["tokens/s"] = short_count(throughput.rate)
        return shown
