"""The learning rate over a run, as a fraction of its peak."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fuyu_e2e.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up from zero, an optional plateau, then decay; fractions are of all steps of the run.

    Raises:
        UserError: A share is out of its range.
    """

    shape: Literal["cosine", "wsd"] = "cosine"
    """`cosine` falls along a half cosine after the warm-up; `wsd` (warm-up, stable, decay; Hu et al. 2024,
    arXiv 2404.06395) stays at the peak and falls linearly at the end."""
    warmup: float = 0.02
    """Fraction of the steps in which the rate rises."""
    decay: float = 0.2
    """Fraction of the steps in which `wsd` falls."""
    final: float = 0.0
    """The factor at the last step."""

    def __post_init__(self) -> None:
        for name in ("warmup", "decay", "final"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise UserError(f"schedule.{name} is {value}, but is a share and must lie in [0, 1].")
        if self.warmup + self.decay > 1:
            raise UserError(
                f"schedule.warmup ({self.warmup}) and schedule.decay ({self.decay}) add up to more than the run: "
                "lower one of them."
            )

    def factor(self, step: int, steps: int) -> float:
        """Returns the factor of the learning rate at step `step` (from 0) of `steps`."""
        done = step / max(1, steps)
        if done < self.warmup:
            return (step + 1) / math.ceil(self.warmup * steps)
        if self.shape == "cosine":
            fallen = 0.5 - 0.5 * math.cos(math.pi * (done - self.warmup) / max(1e-12, 1 - self.warmup))
        else:
            fallen = max(0.0, 1 - (1 - done) / self.decay) if self.decay else 0.0
        return 1 - (1 - self.final) * min(1.0, fallen)


class ScheduledRate(LambdaLR):
    """Sets the learning rate of every group to `Schedule.factor` times the group's initial rate.

    Its state is the number of steps alone: a resumed run takes peaks and schedule from its own settings, where torch
    would restore the checkpoint's.

    Args:
        optimizer: The optimizer; its groups' `lr` are the peaks.
        schedule: The rate over the run.
        steps: Optimizer steps of the whole run.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule, steps: int) -> None:
        super().__init__(optimizer, lambda step: schedule.factor(step, steps))

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of completed steps, under torch's names."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the number of steps, and sets the learning rate of the next step."""
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        factors = [factor(self.last_epoch) for factor in self.lr_lambdas]
        self._last_lr = [peak * factor for peak, factor in zip(self.base_lrs, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate
