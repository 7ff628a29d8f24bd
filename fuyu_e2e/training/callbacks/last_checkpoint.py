"""Saves a checkpoint of the very last step."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from fuyu_e2e.training.callbacks.checkpoints import checkpoints_of


class LastCheckpoint(Callback):
    """Saves a checkpoint at the end of a run, in the folder of its `Checkpoints`.

    Comes before callbacks that change weights at the end: WeightAveraging replaces the trained weights, which a
    resumed run needs, by their average.
    """

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the last step."""
        save_last(trainer)


def save_last(trainer: pl.Trainer) -> Path | None:
    """Saves the current step on all ranks; returns the path, or None if the run keeps no checkpoints."""
    checkpoints = checkpoints_of(trainer)
    trial = trainer.fast_dev_run  # type: ignore[attr-defined]
    return checkpoints.save_now(trainer) if checkpoints is not None and not trial else None
