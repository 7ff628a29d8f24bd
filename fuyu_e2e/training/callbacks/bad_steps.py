"""Skips steps whose loss or gradient is not finite, or is far out of line.

A single such update can fill all weights with NaN or set a run back by days, and training would continue regardless.
"""

import sys
from dataclasses import asdict, dataclass
from math import isfinite, sqrt
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from fuyu_e2e.data.lightning_internals import accumulates, steps_between_logs
from fuyu_e2e.distributed import all_ranks
from fuyu_e2e.errors import BAD_STEPS, UserError
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.training.module import FuyuModule
from fuyu_e2e.training.step import StepFigures
from fuyu_e2e.training.tensorboard import tensorboard_of

MEMORY = 100
"""Steps that the running statistics cover; so many good steps come before any counts as out of line."""
KEYS_SHOWN = 20
"""Most samples named in the log line; TensorBoard gets all of them."""


class TooManyBadStepsError(UserError):
    """Too many steps in a row were skipped for the run to be learning."""

    exit_code = BAD_STEPS


@dataclass
class Running:
    """Mean and variance over about the last `MEMORY` values."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, value: float) -> None:
        """Adds a value; all values weigh the same until there are more than `MEMORY`."""
        self.count = min(self.count + 1, MEMORY)
        part, away = 1 / self.count, value - self.mean
        self.mean += part * away
        self.variance = (1 - part) * (self.variance + part * away * away)

    def limit(self, deviations: float) -> float:
        """Returns the value `deviations` standard deviations above the mean; the greatest float until that is
        known."""
        return self.mean + deviations * sqrt(self.variance) if self.count == MEMORY else sys.float_info.max


class BadSteps(Callback):
    """Skips a step, on all ranks, whose loss or gradient norm isn't finite or is far above its recent values.

    A skipped step leaves weights, optimizer state and routing thresholds as they were, bit for bit. Its data are used
    up, and it counts in `global_step` and the learning rate, so that rows and steps stay aligned over a resume. The
    log names the samples whose loss wasn't finite, or else all samples of the step.

    Args:
        in_a_row: Ends the run after so many skipped steps in a row.
        deviations: Also skips a step whose loss or gradient norm is more than so many standard deviations above its
            mean over the last 100 good steps; 6 is far beyond chance. None skips only steps that aren't finite.

    Raises:
        UserError: A setting is out of its range.
    """

    def __init__(self, in_a_row: int = 10, deviations: float | None = None) -> None:
        if in_a_row < 1:
            raise UserError(f"bad_steps.in_a_row is {in_a_row}, but must be at least 1.")
        if deviations is not None and not deviations > 0:
            raise UserError(f"bad_steps.deviations is {deviations}, but must be above 0.")
        self.in_a_row = in_a_row
        self.deviations = deviations
        self.skipped = 0
        """Steps skipped so far, including those before a resume."""
        self._streak = 0
        self._running = {"loss": Running(), "gradient norm": Running()}
        self._rows: dict[int, list[tuple[tuple[str, ...], Tensor]]] = {}
        """The rows of each step that isn't judged yet."""
        self._keys: tuple[str, ...] = ()
        self._module: FuyuModule | None = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts and running statistics, as primitives."""
        if self._module is not None:
            self._module.read_step()
        running = {name: asdict(figures) for name, figures in self._running.items()}
        return {"skipped": self.skipped, "streak": self._streak, "running": running}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the counts and statistics."""
        self.skipped, self._streak = state_dict["skipped"], state_dict["streak"]
        self._running = {name: Running(**figures) for name, figures in state_dict["running"].items()}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stores the module whose steps it judges."""
        assert isinstance(pl_module, FuyuModule)
        self._module = pl_module

    def limits(self) -> tuple[float, float]:
        """Returns the greatest loss and gradient norm of a good step."""
        loss, norm = (
            sys.float_info.max if self.deviations is None else running.limit(self.deviations)
            for running in self._running.values()
        )
        return loss, norm

    def judge(self, figures: StepFigures) -> None:
        """Counts a step, and reports it if it was skipped.

        Raises:
            TooManyBadStepsError: It was one too many in a row.
        """
        rows = self._rows.pop(figures.step, [])
        found = {"loss": figures.loss, "gradient norm": figures.gradient_norm}
        if not figures.skipped:
            self._streak = 0
            for name, running in self._running.items():
                running.add(found[name])
            return
        self._streak += 1
        self.skipped += 1
        reason = self._why(found)
        self._report(figures.step, reason, rows)
        if self._streak >= self.in_a_row:
            raise TooManyBadStepsError(
                f"{self._streak} steps in a row were skipped, the last because {reason}: weights are those of "
                f"step {figures.step - self._streak}, and checkpoints are from there or before. Lower the "
                "learning rate or look at the samples named, and go on with --ckpt_path last."
            )

    def _why(self, found: dict[str, float]) -> str:
        for (name, running), limit in zip(self._running.items(), self.limits(), strict=True):
            if not isfinite(value := found[name]):
                return f"its {name} is {value}"
            if value > limit:
                return f"its {name} is {value:.4g}, {running.mean:.4g} ± {sqrt(running.variance):.2g} until now"
        raise AssertionError("no figure of a skipped step is out of line")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Registers as the module's guard."""
        assert isinstance(pl_module, FuyuModule)
        pl_module.guard = self
        self._rows.clear()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: PackedBatch, batch_idx: int
    ) -> None:
        """Stores the samples' keys."""
        self._keys = trainer.datamodule.row.keys  # type: ignore[attr-defined]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Stores the row's loss with its keys, without reading it, so that the host doesn't wait."""
        self._rows.setdefault(trainer.global_step + 1, []).append((self._keys, loss.detach()))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Logs the number of skipped steps."""
        if not accumulates(trainer) and (trainer.global_step % steps_between_logs(trainer) == 0):
            pl_module.log("bad_steps/skipped", float(self.skipped))

    def _report(self, step: int, reason: str, own_rows: list[tuple[tuple[str, ...], Tensor]]) -> None:
        own = [(keys, bool(loss.isfinite())) for keys, loss in own_rows]
        every = [row for of_rank in all_ranks(own) for row in of_rank]
        odd = [row for row in every if not row[1]]
        keys = [key for row_keys, _ in odd or every for key in row_keys]
        more = f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
        shown = ", ".join(keys[:KEYS_SHOWN])
        rank_zero_info(f"\nStep {step} is skipped: {reason}. Samples: {shown}{more}.")
        assert self._module is not None
        trainer = self._module.trainer
        if trainer.is_global_zero and (logger := tensorboard_of(trainer)) is not None:
            text = f"{reason}\n\n    " + "\n    ".join(keys)
            logger.experiment.add_text("bad_steps/samples", text, step - 1)  # curves count steps from 0
