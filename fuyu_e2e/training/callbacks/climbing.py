"""Climbs the ladder of a mixture's weights when a figure of a validation is good enough."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from fuyu_e2e.data.lightning_internals import trained_rows
from fuyu_e2e.data.row_loader import RowLoader
from fuyu_e2e.errors import UserError


class Climbing(Callback):
    """Climbs a rung at each validation that reaches what `data.climb` asks for; idle without `data.climb`.

    The rows of the step that follows are drawn by then: the new weights hold from the one after it on. A checkpoint of
    that validation has the climb, since Lightning calls callbacks that save after all others.

    Attributes:
        monitor: The figure that decides, or None.
    """

    monitor: str | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes the figure from the data, so that it is checked like other callbacks' figures."""
        climb = getattr(trainer.datamodule, "climb", None)  # type: ignore[attr-defined]
        self.monitor = climb.monitor if climb is not None else None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Climbs if the figure is reached on all ranks.

        Raises:
            UserError: The validation didn't log the figure.
        """
        if self.monitor is None or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if (figure := trainer.callback_metrics.get(self.monitor)) is None:
            raise UserError(f"data.climb.monitor is {self.monitor}, which this validation didn't log: name another.")
        loader: Any = trainer.train_dataloader
        assert isinstance(loader, RowLoader)
        stream, value = loader.rows.stream, float(figure)
        assert stream.climb is not None
        rung = len(stream.climbed)
        if not trainer.strategy.reduce_boolean_decision(stream.climb.reached(rung, value)):
            return
        loader.climb(trained_rows(trainer))
        step = loader.rows.stream.holds_from(loader.rows.stream.climbed[-1])
        rank_zero_info(
            f"\nThe mixture climbs from rung {rung} to {rung + 1}, since {self.monitor} is {value:.4g} after step "
            f"{trainer.global_step:,} (data.climb.at is {stream.climb.at[rung]:g}): its weights hold from step "
            f"{step + 1:,} on."
        )
