"""`trainer.max_time`: how long one start of a run trains, for queues that leave a job so much time."""

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
"""The vote of a rank whose time is over in this step."""


class TimeLimit(Callback):
    """Ends a start after the step in which its time is over, with a checkpoint and an exit code of its own.

    Replaces Lightning's Timer, which counts the time of all starts together, so that a run that goes on ends at
    once, and ends it as if it were done. At least one step is trained. The last step of the run is done, not stopped.
    Comes after all callbacks that count steps or rows, so that the checkpoint has their counts.

    Args:
        max_time: How long, as `trainer.max_time`: text such as 00:11:50:00; None without end.

    Attributes:
        seconds: How long, from the first step of a start on, validation included; None without end.
    """

    def __init__(self, max_time: str | timedelta | dict[str, int] | None = None) -> None:
        self.set(max_time)
        self._ends_at = 0.0

    def set(self, max_time: str | timedelta | dict[str, int] | None) -> None:
        """Takes the limit as `trainer.max_time` gives it.

        Raises:
            UserError: It is no time.
        """
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
        """Tells the other ranks whether this one's time is over."""
        assert isinstance(pl_module, FuyuModule)
        if self.seconds is not None:
            pl_module.votes[VOTE] = time.monotonic() >= self._ends_at

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Stops after the step in which a rank's time was over.

        Raises:
            Stopped: On all ranks, where steps are left.
        """
        assert isinstance(pl_module, FuyuModule)
        if pl_module.figures is None or accumulates(trainer):
            return
        if VOTE in pl_module.figures.votes and trainer.global_step < trainer.max_steps:
            stop(trainer, f"The time of this start (trainer.max_time, {self.seconds:,.0f} s) is over", TIME_OVER)
