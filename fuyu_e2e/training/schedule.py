"""The learning rate over a run, as a factor of its peak."""

import math
from dataclasses import dataclass
from typing import Literal

from fuyu_e2e.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up from zero, then a plateau or none, then down; shares are of all steps of the run.

    Raises:
        UserError: A share is out of its range.
    """

    shape: Literal["cosine", "wsd"] = "cosine"
    """`cosine` falls along a half cosine from the warm-up on; `wsd` (warm-up, stable, decay; Hu et al. 2024,
    arXiv 2404.06395) stays at the peak and falls along a line over the last part."""
    warmup: float = 0.02
    """Share of the steps in which the rate rises."""
    decay: float = 0.2
    """Share of the steps in which `wsd` falls."""
    final: float = 0.0
    """Factor at the last step."""

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
        """The factor for the update number `step` (from 0) of `steps`."""
        done = step / max(1, steps)
        if done < self.warmup:
            return (step + 1) / math.ceil(self.warmup * steps)
        if self.shape == "cosine":
            fallen = 0.5 - 0.5 * math.cos(math.pi * (done - self.warmup) / max(1e-12, 1 - self.warmup))
        else:
            fallen = max(0.0, 1 - (1 - done) / self.decay) if self.decay else 0.0
        return 1 - (1 - self.final) * min(1.0, fallen)
