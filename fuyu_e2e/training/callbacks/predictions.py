"""Writes the results of `predict` to a file."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info


class WritePredictions(BasePredictionWriter):
    """Writes what `predict` generated to `predictions.jsonl` in the run's directory, one line for each document.

    The file appears when it is complete; a prediction that fails leaves an earlier file as it was.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._written = 0

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resets the count."""
        self._written = 0

    def write_on_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, prediction: Any, *_: Any) -> None:
        """Adds a batch to the unfinished file."""
        path = self._path(trainer, ".unfinished-")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if self._written else "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in prediction)
        self._written += len(prediction)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Moves the complete file to its final name, and logs the path."""
        if not self._written:
            rank_zero_info("No document of data.predict could be continued: nothing was written.")
            return
        path = self._path(trainer)
        self._path(trainer, ".unfinished-").replace(path)
        rank_zero_info(f"{self._written:,} continuations: {path}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Removes the incomplete file."""
        if self._written:
            self._path(trainer, ".unfinished-").unlink(missing_ok=True)

    @staticmethod
    def _path(trainer: pl.Trainer, prefix: str = "") -> Path:
        return Path(trainer.default_root_dir) / f"{prefix}predictions.jsonl"
