"""Python's garbage collector, kept out of the steps."""

import gc
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from fuyu_e2e.training.module import steps_between_logs


class GarbageCollection(Callback):
    """Collects at every `log_every_n_steps`-th step, on all processes at once, and at no other time in training.

    By itself it comes when enough objects were made, on each process in another step, and all wait for the one.
    """

    def __init__(self) -> None:
        self._was_on = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes over; what is there now is looked at once."""
        self._was_on = gc.isenabled()
        gc.disable()
        gc.collect()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Collects what is young behind a step that is logged."""
        if trainer.global_step % steps_between_logs(trainer) == 0:
            gc.collect(1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hands it back."""
        self._give_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Hands it back."""
        self._give_back()

    def _give_back(self) -> None:
        if self._was_on:
            gc.enable()
