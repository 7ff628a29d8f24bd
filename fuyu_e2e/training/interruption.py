"""Ctrl-C at a step boundary: the run saves what it has and ends in order."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info


class StopOnInterrupt(Callback):
    """Ends training behind the running step on the first SIGINT, with a checkpoint; a second one kills at once.

    Python's own KeyboardInterrupt may strike between the update of two weights, and a checkpoint saved then is of no
    step at all. The handler only raises a flag.

    Attributes:
        saved: The checkpoint that an interrupted run left, None for a run that was not interrupted.
    """

    def __init__(self) -> None:
        self.saved: Path | None = None
        self._interrupted = False
        self._previous: Any = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes over SIGINT while training runs."""
        self._interrupted, self.saved = False, None
        self._previous = signal.signal(signal.SIGINT, self._on_signal)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Saves and stops where the signal came in, once the step's last micro-batch is done."""
        accumulating = trainer.fit_loop.epoch_loop._should_accumulate()
        if not self._interrupted or accumulating or trainer.should_stop:
            return
        checkpoint = trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.dirpath is not None:
            self.saved = Path(checkpoint.dirpath) / f"{checkpoint.CHECKPOINT_NAME_LAST}{checkpoint.FILE_EXTENSION}"
            trainer.save_checkpoint(self.saved)
            rank_zero_info(f"\nInterrupted at step {trainer.global_step}; saved {self.saved}.")
        trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hands SIGINT back."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Hands SIGINT back."""
        self._restore()

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
