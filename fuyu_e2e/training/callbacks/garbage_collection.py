"""Keeps Python's garbage collector out of the steps."""

import gc
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from fuyu_e2e.data.lightning_internals import accumulates, steps_between_logs


class GarbageCollection(Callback):
    """Collects at every `log_every_n_steps`-th step, on all processes at once, and at no other time in training.

    On its own, the collector runs once enough objects exist, in a different step on each process, and all processes
    wait for that one.
    """

    def __init__(self) -> None:
        self._was_on = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collects once, then turns the automatic collector off."""
        self._was_on = gc.isenabled()
        gc.disable()
        gc.collect()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Collects the young generations after a logged step."""
        if not accumulates(trainer) and trainer.global_step % steps_between_logs(trainer) == 0:
            gc.collect(1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Turns the automatic collector on again."""
        if self._was_on:
            gc.enable()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Turns the automatic collector on again."""
        self.on_train_end(trainer, pl_module)
