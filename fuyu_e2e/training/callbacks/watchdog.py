"""Ends a run that makes no progress, and logs where each rank was.

Python's `faulthandler.dump_traceback_later` exits with code 1, names no rank, and counts time in which the process is
stopped.
"""

import faulthandler
import os
import sys
import threading
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from fuyu_e2e.errors import STUCK, UserError

TICKS = 20
"""Checks of the training within the limit."""
FAREWELL = 5.0
"""Most seconds between a rank's stack trace and its exit, in which the other ranks write theirs."""


class Watchdog(Callback):
    """Ends the process when a step takes longer than a limit, even if the main thread hangs in a collective.

    A thread writes the stacks of all threads to stderr and exits with code 4. A step is the time between the ends of
    two training or validation batches, which includes waiting for data, checkpoints and sample generations. Time in
    which the whole process is stopped (Ctrl-Z, a suspended laptop) doesn't count. The thread can't detect a main
    thread that hangs while it holds Python's lock; torch's collectives release it.

    Args:
        limit: Seconds that a step may take; None turns the watchdog off.

    Raises:
        UserError: The limit is out of its range.
    """

    def __init__(self, limit: float | None = 3600.0) -> None:
        if limit is not None and not limit > 0:
            raise UserError(f"watchdog.limit is {limit} seconds, but must be above 0.")
        self.limit = limit
        self._beats = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._expired = False
        self._rank = self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the thread."""
        self._done = threading.Event()
        self._rank, self._step = trainer.global_rank, trainer.global_step
        if self.limit is not None:
            arguments = (self.limit, self._done)
            self._thread = threading.Thread(target=self._watch, args=arguments, name="watchdog", daemon=True)
            self._thread.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Records that training makes progress."""
        self._step = trainer.global_step
        self._beats += 1

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Records that a validation makes progress."""
        self._beats += 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the thread."""
        self._done.set()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stops the thread; if the limit is over, waits for its report, since the exception is due to other ranks'
        exits."""
        self._done.set()
        if self._expired and self._thread is not None:
            self._thread.join()

    def _watch(self, limit: float, done: threading.Event) -> None:
        seen, idle = self._beats, 0
        while idle < TICKS:
            if done.wait(limit / TICKS):
                return
            idle = idle + 1 if seen == self._beats else 0
            seen = self._beats
        self._expired = True
        print(
            f"\nfuyu-e2e: rank {self._rank} made no step in {limit:g} s (watchdog.limit) after step {self._step}; its "
            "threads are here, the main one last:",
            file=sys.__stderr__,  # pytest and notebooks replace sys.stderr by an object without a file descriptor
            flush=True,
        )
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback(sys.__stderr__)
        time.sleep(min(FAREWELL, limit))
        os._exit(STUCK)
