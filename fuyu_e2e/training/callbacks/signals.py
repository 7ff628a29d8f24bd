"""SIGTERM, SIGINT and SIGUSR1 end a run after a complete step with a checkpoint, whichever ranks receive them.

A handler only sets a flag. Python's KeyboardInterrupt may strike between the updates of two weights, and a checkpoint
saved then belongs to no step. A collective in a handler, as in Lightning's handler for SIGTERM, meets whatever the
other ranks are doing and hangs. The flags are summed over ranks with each step's other sums (`FuyuModule.votes`), so
that all ranks learn in the same step that one of them has to stop.
"""

import shlex
import signal
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_info

from fuyu_e2e.checkpoint.run_directory import RECIPE, shown
from fuyu_e2e.data.lightning_internals import accumulates, leave_signals_to_us
from fuyu_e2e.distributed import any_rank, is_sharded, sum_over_ranks
from fuyu_e2e.errors import STOP_SIGNALS, of_signal
from fuyu_e2e.training.callbacks.last_checkpoint import save_last
from fuyu_e2e.training.module import FuyuModule

STORE_KEY = "fuyu_e2e/stop"
"""The key that a rank sets in the process group's store when it receives a signal during validation."""


class Stopped(SystemExit):
    """The run ended after a complete step and saved a checkpoint to resume from; `code` says what ended it."""


def stop(trainer: pl.Trainer, why: str, code: int) -> NoReturn:
    """Ends training after a whole step, with a checkpoint; all ranks call it after the same step.

    Raises:
        Stopped: Always.
    """
    saved = save_last(trainer)
    rank_zero_info(f"\n{why} at step {trainer.global_step}; {f'saved {saved}' if saved else 'not saved'}.")
    config = Path(trainer.default_root_dir) / RECIPE
    if saved and config.is_file():
        rank_zero_info(f"Go on with: fuyu-e2e fit --config {shlex.quote(shown(config))} --ckpt_path last")
    raise Stopped(0 if _child_of_lightning(trainer) else code)


class StopSignals(Callback):
    """Ends training on a signal: all ranks finish the running step, save `last.ckpt` and raise `Stopped`.

    A second Ctrl-C ends the process at once. A second SIGTERM changes nothing: if a whole job is signalled, the signal
    arrives both directly and through torchrun. Before the first step there is nothing to save, and signals have their
    default effect. Comes after all callbacks that count steps or rows, so that the checkpoint has their counts.
    """

    def __init__(self) -> None:
        self._heard: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._heard = self._heard or signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Keeps out Lightning's handlers, which would replace ours or hang `validate`, and its check in each row.

        All ranks and devices would wait for that check.
        """
        leave_signals_to_us(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Installs the signal handlers for training."""
        self._heard = None
        self._previous = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Votes for the signal that this rank received."""
        assert isinstance(pl_module, FuyuModule)
        pl_module.votes |= {number.name: self._heard == number for number in STOP_SIGNALS}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Stops after the step in which a rank received a signal; on GPUs usually one step later.

        Raises:
            Stopped: On all ranks.
        """
        assert isinstance(pl_module, FuyuModule)
        if pl_module.figures is None or accumulates(trainer):
            return
        for number in STOP_SIGNALS:
            if number.name in pl_module.figures.votes:
                stop(trainer, number.name, of_signal(number))

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Cuts a validation during training short.

        Ranks may have different numbers of validation rows, so they can't use a collective between them unless weights
        are sharded; instead, a rank sets a key in the process group's store. Lightning's loop takes StopIteration for
        the end of the data.
        """
        if not self._previous:
            return
        stops = self._heard is not None
        if is_sharded(trainer):
            stops = any_rank(trainer, stops)
        elif dist.is_initialized():
            store = dist.distributed_c10d._get_default_store()
            if stops:
                store.set(STORE_KEY, "1")
            stops = stops or store.check([STORE_KEY])
        if stops:
            raise StopIteration

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops if a rank received a signal during validation, whose figures are dropped.

        Raises:
            Stopped: On all ranks.
        """
        if not self._previous:
            return
        heard = torch.tensor([self._heard == number for number in STOP_SIGNALS], device=pl_module.device).double()
        for number, count in zip(STOP_SIGNALS, sum_over_ranks(heard).tolist(), strict=True):
            if count:
                stop(trainer, number.name, of_signal(number))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restores the previous signal handlers."""
        self._restore(*self._previous)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restores the previous signal handlers.

        On the way out after a signal, restores only SIGINT's: torchrun sends SIGTERM to processes that are still
        leaving when it sees the first one gone, which must not change their exit code.
        """
        self._restore(*([signal.SIGINT] if isinstance(exception, Stopped) else self._previous))

    def _restore(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            if number in self._previous:
                signal.signal(number, self._previous[number])
        self._previous = {}


def _child_of_lightning(trainer: pl.Trainer) -> bool:
    """Returns whether another process started this one through Lightning, in which case only that one's exit code
    counts.

    Lightning kills the parent when a child exits with anything but 0 before the parent has.
    """
    strategy = trainer.strategy
    return (
        isinstance(strategy, ParallelStrategy)
        and isinstance(strategy.cluster_environment, LightningEnvironment)
        and trainer.local_rank > 0
    )
