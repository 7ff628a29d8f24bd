"""Steps whose loss or gradient is no number, or far out of line, update nothing.

One such update puts NaN into every weight, or throws a run back by days, and the run goes on as if all were well.
"""

from dataclasses import asdict, dataclass
from math import isfinite, sqrt
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from fuyu_e2e.batch import PackedBatch
from fuyu_e2e.errors import UserError
from fuyu_e2e.exit_codes import BAD_STEPS
from fuyu_e2e.training.curves import shown_step, tensorboard_of
from fuyu_e2e.training.module import FuyuModule, steps_between_logs

MEMORY = 100
"""Steps that running figures are over; so many good ones are seen before any is out of line."""
KEYS_SHOWN = 20
"""Samples named in the line; TensorBoard gets them all."""


class TooManyBadStepsError(UserError):
    """So many steps in a row were skipped that the run can't be learning."""

    exit_code = BAD_STEPS


@dataclass
class Running:
    """Mean and variance over about the last `MEMORY` values."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, value: float) -> None:
        """Counts one value; all weigh the same until there are more than `MEMORY`."""
        self.count = min(self.count + 1, MEMORY)
        part, away = 1 / self.count, value - self.mean
        self.mean += part * away
        self.variance = (1 - part) * (self.variance + part * away * away)

    def far(self, value: float, deviations: float) -> bool:
        """Whether a value is more than `deviations` standard deviations above the mean."""
        return self.count == MEMORY and value > self.mean + deviations * sqrt(self.variance)


class BadSteps(Callback):
    """Skips a step, on all ranks alike, whose loss or gradient norm isn't finite or is far above what it was lately.

    A skipped step leaves weights, the optimizer's state and thresholds of routed blocks as they were, bit for bit. Its
    data are gone by, and it counts in `global_step` and the learning rate, so that rows and steps stay in line over a
    resume. It is logged with the keys of the samples whose loss wasn't finite, else of all in the step.

    Args:
        in_a_row: So many skipped steps in a row end the run.
        deviations: Skip also where loss or gradient norm is more than so many standard deviations above its mean over
            the last 100 good steps; 6 is out of line beyond doubt. None leaves that out.

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
        """Steps skipped so far, those before a resume among them."""
        self._streak = 0
        self._running = {"loss": Running(), "gradient norm": Running()}
        self._reason = ""
        self._rows: list[tuple[tuple[str, ...], Tensor]] = []
        self._keys: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """The counts and running figures, in primitives."""
        running = {name: asdict(figures) for name, figures in self._running.items()}
        return {"skipped": self.skipped, "streak": self._streak, "running": running}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there."""
        self.skipped, self._streak = state_dict["skipped"], state_dict["streak"]
        self._running = {name: Running(**figures) for name, figures in state_dict["running"].items()}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Has the module ask in each step."""
        assert isinstance(pl_module, FuyuModule)
        pl_module.guard = self.is_bad

    def is_bad(self, loss: float, gradient_norm: float) -> bool:
        """Whether the step with these figures, the same on all ranks, is to be skipped."""
        self._reason = self._why(loss, gradient_norm)
        if not self._reason:
            self._running["loss"].add(loss)
            self._running["gradient norm"].add(gradient_norm)
        return bool(self._reason)

    def _why(self, loss: float, gradient_norm: float) -> str:
        for (name, running), value in zip(self._running.items(), (loss, gradient_norm), strict=True):
            if not isfinite(value):
                return f"its {name} is {value}"
            if self.deviations is not None and running.far(value, self.deviations):
                return f"its {name} is {value:.4g}, {running.mean:.4g} ± {sqrt(running.variance):.2g} until now"
        return ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins with no rows of a step."""
        self._rows.clear()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: PackedBatch, batch_idx: int
    ) -> None:
        """Keeps the samples' keys."""
        self._keys = batch.keys

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keeps the row's own loss beside them, unread, so that no host waits for it."""
        self._rows.append((self._keys, loss.detach()))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Reports a skipped step.

        Raises:
            TooManyBadStepsError: It was one too many in a row.
        """
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        self._streak = self._streak + 1 if self._reason else 0
        if self._reason:
            self.skipped += 1
            self._report(trainer)
        self._rows.clear()
        if trainer.global_step % steps_between_logs(trainer) == 0:
            pl_module.log("bad_steps/skipped", float(self.skipped))
        if self._streak >= self.in_a_row:
            raise TooManyBadStepsError(
                f"{self._streak} steps in a row were skipped, the last because {self._reason}: weights are those of "
                f"step {trainer.global_step - self._streak}, and checkpoints are from there or before. Lower the "
                "learning rate or look at the samples named, and go on with --ckpt_path last."
            )

    def _report(self, trainer: pl.Trainer) -> None:
        rows: list[Any] = [[(keys, bool(loss.isfinite())) for keys, loss in self._rows]]
        if dist.is_initialized():
            own, rows = rows[0], [None] * dist.get_world_size()
            dist.all_gather_object(rows, own)
        every = [row for of_rank in rows for row in of_rank]
        odd = [row for row in every if not row[1]]
        keys = [key for row_keys, _ in odd or every for key in row_keys]
        more = f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
        shown = ", ".join(keys[:KEYS_SHOWN])
        rank_zero_info(f"\nStep {trainer.global_step} is skipped: {self._reason}. Samples: {shown}{more}.")
        if trainer.is_global_zero and (logger := tensorboard_of(trainer)) is not None:
            text = f"{self._reason}\n\n    " + "\n    ".join(keys)
            logger.experiment.add_text("bad_steps/samples", text, shown_step(trainer))
