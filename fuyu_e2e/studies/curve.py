"""Records what a run has read after how many operations and seconds."""

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.cost import batch_cost
from fuyu_e2e.training.module import FuyuModule

CURVE = "curve.json"
"""The file of a completed run's curve, in its directory."""


class Curve(Callback):
    """Records each validation of a run, and leaves them in `curve.json` of its directory when the run is complete.

    A point of the curve has the `step`, the training `operations` (as `fuyu_e2e.model.cost` counts them), the
    `seconds` of processor time in training, validation left out, and the metrics of validation without their `val/`.
    For runs of one process. A resumed run continues the curve of its checkpoint.
    """

    def __init__(self) -> None:
        self._operations = 0
        self._seconds = 0.0
        self._points: list[dict[str, int | float]] = []
        self._since = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Returns the curve so far, for a checkpoint."""
        return {"operations": self._operations, "seconds": self._seconds, "points": self._points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues a checkpoint's curve."""
        self._operations, self._seconds = state_dict["operations"], state_dict["seconds"]
        self._points = list(state_dict["points"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._since = time.process_time()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        """Counts the operations of a batch, and its time."""
        assert isinstance(pl_module, FuyuModule)
        self._operations += batch_cost(pl_module.config, batch, done=pl_module.decoder.progress.done).training_flops
        now = time.process_time()
        self._seconds += now - self._since
        self._since = now

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds a point."""
        figures = trainer.callback_metrics.items()
        self._points.append(
            {
                "step": trainer.global_step,
                "operations": self._operations,
                "seconds": round(self._seconds, 2),
                **{name[4:]: float(value) for name, value in figures if name.startswith("val/")},
            }
        )
        self._since = time.process_time()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the curve if the run is complete."""
        if trainer.global_step == trainer.max_steps:
            path = Path(trainer.default_root_dir) / CURVE
            path.write_text(json.dumps(self._points) + "\n")
