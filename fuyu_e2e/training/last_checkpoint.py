"""A checkpoint of the very last step."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint


class LastCheckpoint(Callback):
    """Leaves `last.ckpt` of a run that is done, where its ModelCheckpoint keeps its files."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves."""
        save_last(trainer)


def save_last(trainer: pl.Trainer) -> Path | None:
    """Saves what was trained so far as `last.ckpt`, on all ranks at once; None where the run keeps no checkpoints."""
    checkpoint = trainer.checkpoint_callback
    if not isinstance(checkpoint, ModelCheckpoint) or checkpoint.dirpath is None:
        return None
    path = Path(checkpoint.dirpath) / f"{checkpoint.CHECKPOINT_NAME_LAST}{checkpoint.FILE_EXTENSION}"
    trainer.save_checkpoint(path)
    return path
