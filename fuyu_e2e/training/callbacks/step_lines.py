"""Prints a run's progress as plain lines if the output isn't a terminal: SLURM, `nohup`, CI, notebooks."""

import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from fuyu_e2e.checkpoint.run_directory import shown
from fuyu_e2e.data.lightning_internals import accumulates, steps_between_logs
from fuyu_e2e.training.callbacks.checkpoints import checkpoints_of
from fuyu_e2e.training.callbacks.throughput import throughput_of
from fuyu_e2e.training.module import FuyuModule

SECONDS_BETWEEN_LINES = 10.0
"""Logged steps that follow a line sooner than this don't print one."""
SILENT_SECONDS = 30.0
"""After so long a silence the next step or row prints a line, logged or not."""


class StepLines(ProgressBar):
    """Prints `step 40/2600  loss 1.83  6.5k tokens/s  4 min left`, on the first process.

    Prints a line at the first step, at the last, at each `log_every_n_steps`-th unless lines would come faster than
    every 10 seconds, and after 30 seconds without one. Each validation prints its figures, each checkpoint its path.
    Replaces Lightning's progress bar: `trainer.enable_progress_bar` false turns it off.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._said_at = 0.0
        self._first_step: int | None = None
        """The first step of this start, whose time doesn't count: it compiles and fills buffers."""
        self._first_at = 0.0

    def enable(self) -> None:
        """Turns printing on."""
        self._enabled = True

    def disable(self) -> None:
        """Turns printing off, as on all processes but the first."""
        self._enabled = False

    def say(self, line: str) -> None:
        """Prints a line at once, on the process that prints."""
        self._said_at = time.monotonic()
        if self._enabled:
            print(line, flush=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resets the count of this start's steps."""
        self._first_step = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Prints a line for a step that is due."""
        if accumulates(trainer):
            return
        now, step = time.monotonic(), trainer.global_step
        first = self._first_step is None
        if self._first_step is None:
            self._first_step, self._first_at = step, now
        logged = step % steps_between_logs(trainer) == 0
        waited = now - self._said_at
        if first or step == trainer.max_steps or waited >= (SECONDS_BETWEEN_LINES if logged else SILENT_SECONDS):
            assert isinstance(pl_module, FuyuModule)
            self.say("  ".join(self._step(trainer, pl_module, now)))

    def _step(self, trainer: pl.Trainer, pl_module: FuyuModule, now: float) -> list[str]:
        step = trainer.global_step
        assert pl_module.figures is not None
        parts = [_position(trainer), f"loss {pl_module.figures.loss:.3g}"]
        throughput = throughput_of(trainer)
        if throughput is not None and throughput.rate:
            parts.append(f"{short_count(throughput.rate)} tokens/s")
        assert self._first_step is not None
        if self._first_step < step < trainer.max_steps:
            seconds = (now - self._first_at) / (step - self._first_step) * (trainer.max_steps - step)
            parts.append(f"{duration(seconds)} left")
        return parts

    def on_validation_batch_end(self, trainer: pl.Trainer, *arguments: Any, **_: Any) -> None:
        """Prints the progress of a long validation."""
        self._count_rows("validation", arguments)

    def on_test_batch_end(self, trainer: pl.Trainer, *arguments: Any, **_: Any) -> None:
        """Prints the progress of a long test."""
        self._count_rows("test", arguments)

    def on_predict_batch_end(self, trainer: pl.Trainer, *arguments: Any, **_: Any) -> None:
        """Prints the progress of a long prediction."""
        self._count_rows("predict", arguments)

    def _count_rows(self, stage: str, arguments: tuple[Any, ...]) -> None:
        _, _, _, batch_idx, *_ = arguments
        if time.monotonic() - self._said_at >= SILENT_SECONDS:
            self.say(f"{stage}: {batch_idx + 1:,} batches")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints a validation's figures; for a command that only validates, Lightning prints its own table."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            assert isinstance(pl_module, FuyuModule)
            self.say("  ".join([_position(trainer), *figures(pl_module.validated)]))

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Prints the path of a checkpoint."""
        checkpoints = checkpoints_of(trainer)
        if checkpoints is not None and checkpoints.saving:
            self.say(f"{_position(trainer)}  saving {shown(checkpoints.saving)}")


def _position(trainer: pl.Trainer) -> str:
    return f"step {trainer.global_step}/{trainer.max_steps}"


def figures(validated: Mapping[str, float]) -> list[str]:
    """Returns the loss and perplexity among a validation's figures, each as `val/loss 1.234`."""
    return [f"{name} {validated[name]:.4g}" for name in ("val/loss", "val/perplexity") if name in validated]


def short_count(count: float) -> str:
    """Returns a count in at most five characters: 950, 12.3k, 4.56M, 7.89B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return f"{count:.0f}"


def duration(seconds: float) -> str:
    """Returns a duration in readable units: `40 s`, `4 min`, `3 h 20 min`, `2 d 4 h`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
