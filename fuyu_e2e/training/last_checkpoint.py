"""A checkpoint of the very last step, of a run that is done as of one that Ctrl-C ends."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from fuyu_e2e.training.checkpoints import Checkpoints


class LastCheckpoint(Callback):
    """Leaves a checkpoint at the end of training, also where SIGINT ends it.

    The first SIGINT lets the running step end, saves and stops; a second one kills at once. Python's own
    KeyboardInterrupt may strike between the update of two weights, and a checkpoint saved then is of no step at all,
    so the handler only raises a flag.

    Attributes:
        interrupted: Whether a signal ended the run.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes over SIGINT while training runs."""
        self.interrupted = False
        self._previous = signal.signal(signal.SIGINT, self._on_signal)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Stops where the signal came in, once the step's last micro-batch is done."""
        if not self.interrupted or trainer.should_stop or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        saved = self._save(trainer)  # before the validation that Lightning runs as it stops
        rank_zero_info(f"\nInterrupted at step {trainer.global_step}; saved {saved}.")
        trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves, and hands SIGINT back."""
        if not self.interrupted:
            self._save(trainer)
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Hands SIGINT back."""
        self._restore()

    def _save(self, trainer: pl.Trainer) -> Path | None:
        checkpoints = trainer.checkpoint_callback
        return checkpoints.save_now(trainer) if isinstance(checkpoints, Checkpoints) else None

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
