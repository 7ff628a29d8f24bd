"""`trainer.max_time`: how long one start of a run trains, for queues that give a job limited time."""

import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fuyu_e2e.data.lightning_internals import accumulates
from fuyu_e2e.errors import TIME_OVER, UserError
from fuyu_e2e.training.callbacks.signals import stop
from fuyu_e2e.training.module import FuyuModule

VOTE = "time"
"""The vote of a rank whose time is over."""


class TimeLimit(Callback):
    """Ends a start after the step in which its time is over, with a checkpoint and a distinct exit code.

    Replaces Lightning's Timer, which counts the time of all starts together, so that a resumed run ends at once, and
    ends it as if it were finished. Trains at least one step. After the last step of the run, it is finished, not
    stopped. Comes after all callbacks that count steps or rows, so that the checkpoint has their counts.

    Args:
        max_time: The limit as in `trainer.max_time`: text such as 00:11:50:00; None for no limit.

    Attributes:
        seconds: The limit in seconds from the first step of a start, validation included; None for no limit.

    Raises:
        UserError: The value is not a time.
    """

    def __init__(self, max_time: str | timedelta | dict[str, int] | None = None) -> None:
        self._ends_at = 0.0
        try:
            self.seconds: float | None = Timer(max_time).time_remaining()
        except (MisconfigurationException, TypeError) as error:
            raise UserError(
                f"trainer.max_time is {max_time!r}, but must be DD:HH:MM:SS, as 00:11:50:00 for ten minutes less than "
                "half a day."
            ) from error

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._ends_at = time.monotonic() + (self.seconds or 0.0)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Votes to stop if this rank's time is over."""
        assert isinstance(pl_module, FuyuModule)
        if self.seconds is not None:
            pl_module.votes[VOTE] = time.monotonic() >= self._ends_at

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Stops after the step in which a rank's time was over.

        Raises:
            Stopped: On all ranks, if steps are left.
        """
        assert isinstance(pl_module, FuyuModule)
        if pl_module.figures is None or accumulates(trainer):
            return
        if VOTE in pl_module.figures.votes and trainer.global_step < trainer.max_steps:
            stop(trainer, f"The time of this start (trainer.max_time, {self.seconds:,.0f} s) is over", TIME_OVER)
