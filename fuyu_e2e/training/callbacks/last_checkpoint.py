"""A checkpoint of the very last step."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from fuyu_e2e.training.callbacks.checkpoints import checkpoints_of


class LastCheckpoint(Callback):
    """Leaves a checkpoint of a run that is done, where its `Checkpoints` keeps its files.

    Comes before callbacks that change weights in the end: WeightAveraging puts the average in the place of those that
    a run goes on with.
    """

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves."""
        save_last(trainer)


def save_last(trainer: pl.Trainer) -> Path | None:
    """Saves what was trained so far, on all ranks at once; gives where, None where the run keeps no checkpoints."""
    checkpoints = checkpoints_of(trainer)
    trial = trainer.fast_dev_run  # type: ignore[attr-defined]
    return checkpoints.save_now(trainer) if checkpoints is not None and not trial else None
