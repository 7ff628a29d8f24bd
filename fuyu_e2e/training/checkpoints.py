"""Which checkpoints a run keeps, and what saving them costs."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from fuyu_e2e.training.checkpoint_io import BackgroundCheckpointIO


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which can also save at once, and logs `checkpoint/stall_seconds`."""

    def save_now(self, trainer: pl.Trainer) -> Path:
        """Saves the step that is done, unless it is saved, and gives where; every rank calls it."""
        if self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            if self.monitor is None and self.save_top_k:
                self._save_none_monitor_checkpoint(trainer, candidates)
            else:
                self._save_checkpoint(trainer, self.format_checkpoint_name(candidates))
            self._save_last_checkpoint(trainer, candidates)
        return Path(self._last_checkpoint_saved)

    @staticmethod
    def _link_checkpoint(trainer: pl.Trainer, filepath: str, linkpath: str) -> None:
        writer = trainer.strategy.checkpoint_io
        if isinstance(writer, BackgroundCheckpointIO):
            if trainer.is_global_zero:
                writer.link_checkpoint(filepath, linkpath)
        else:
            ModelCheckpoint._link_checkpoint(trainer, filepath, linkpath)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        writer = trainer.strategy.checkpoint_io
        if isinstance(writer, BackgroundCheckpointIO):
            for logger in trainer.loggers:
                logger.log_metrics({"checkpoint/stall_seconds": writer.stall}, step=trainer.global_step)
