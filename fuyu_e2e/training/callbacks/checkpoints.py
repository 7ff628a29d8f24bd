"""Which checkpoints a run keeps, and how long saving them takes."""

import re
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from fuyu_e2e.checkpoint.run_checkpoints import LAST, written_last_first
from fuyu_e2e.data.lightning_internals import accumulates, validates_now
from fuyu_e2e.training.checkpoint_io import BackgroundCheckpointIO
from fuyu_e2e.training.tensorboard import shown_step

MONITOR = "val/loss"
"""The figure that ranks checkpoints if the recipe names none and there is validation data."""


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint, extended to keep the newest checkpoint as well as the best.

    If a step is to be both validated and saved, validation comes first; Lightning saves first, with the figures of the
    previous validation. If `monitor` is a validation figure (`val/...`), each validation among the `save_top_k` best
    is saved as well, whatever `every_n_train_steps` says. The newest checkpoint is kept in addition to those;
    `save_top_k` 0 keeps it alone, and -1 keeps all. The default `monitor` of a run with validation data is `val/loss`,
    lower is better.

    File names contain the step, which is added to a `filename` without it, and by default the monitored figure if it
    was taken at that step. `save_now` saves at once; the callback logs `checkpoint/stall_seconds`.

    Attributes:
        newest: The checkpoint that was saved last, or "".
        saving: The checkpoint that is being saved, or "".
    """

    newest = ""
    saving = ""
    _due_after_validation = False
    _validated_at = -1
    _step = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Sets the default figure that ranks checkpoints, unless the recipe names one."""
        super().setup(trainer, pl_module, stage)
        patterns = getattr(trainer.datamodule, "patterns", {})  # type: ignore[attr-defined]
        if self.monitor is None and patterns.get("val") is not None:
            self.monitor, self.mode, self.kth_value = MONITOR, "min", torch.tensor(torch.inf)
        if self.filename is not None and "{step" not in self.filename:
            self.filename += "-{step}"  # otherwise the newest would overwrite the best

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Saves a step that is due, unless it is about to be validated."""
        if accumulates(trainer) or self._should_skip_saving_checkpoint(trainer) or not self._is_due(trainer):
            return
        if validates_now(trainer):
            self._due_after_validation = True
        else:
            self._save(trainer)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        if self._every_n_train_steps >= 1:
            return trainer.global_step % self._every_n_train_steps == 0
        if self._train_time_interval is None:
            return False
        now = time.monotonic()
        due = now - (self._last_time_checked or now) >= self._train_time_interval.total_seconds()
        if due := trainer.strategy.broadcast(due):  # clocks of ranks differ
            self._last_time_checked = now
        return due

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Records that the validation figures belong to this step."""
        self._validated_at = trainer.global_step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves a step that was due before its validation, or that is among the best."""
        trial = trainer.fast_dev_run  # type: ignore[attr-defined]
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or trial:
            return
        due, self._due_after_validation = self._due_after_validation, False
        each_epoch = self._every_n_epochs >= 1 and not self._should_save_on_train_epoch_end(trainer)
        of_validation = self.monitor is not None and self.monitor.startswith("val/")
        if due or each_epoch or (of_validation and self._is_among_best(trainer, self._figure(trainer))):
            self._save(trainer)

    def save_now(self, trainer: pl.Trainer) -> Path:
        """Saves the current step unless it is saved already, and returns its path; all ranks call it."""
        if self._last_global_step_saved != trainer.global_step:
            self._save(trainer)
        return Path(self._last_checkpoint_saved)

    def monitored(self, trainer: pl.Trainer) -> dict[str, Any] | None:
        """Returns what a checkpoint of this step records about the monitored figure.

        Returns:
            `name`, `value` and `mode`; None if nothing is monitored, or the figure was not taken at this step.
        """
        figure = self._figure(trainer)
        return None if figure is None else {"name": self.monitor, "value": float(figure), "mode": self.mode}

    def _figure(self, trainer: pl.Trainer) -> Tensor | None:
        """Returns the monitored figure of this step, or None."""
        if self.monitor is None:
            return None
        if not self.monitor.startswith("val/") or self._validated_at == trainer.global_step:
            return trainer.callback_metrics.get(self.monitor)
        return None

    def _is_among_best(self, trainer: pl.Trainer, figure: Tensor | None) -> bool:
        return figure is not None and self.save_top_k != 0 and self.check_monitor_top_k(trainer, figure)

    def _save(self, trainer: pl.Trainer) -> None:
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Saves this step, then removes what it supersedes: the previous newest, and the worst of the best."""
        figure = self._figure(trainer)
        if self.monitor is not None and figure is None:
            monitor_candidates[self.monitor] = torch.tensor(torch.nan)  # the name must not have an earlier figure
        default = "{step}" if figure is None else f"{{step}}-{{{self.monitor}:.4f}}"
        path = self.format_checkpoint_name(monitor_candidates, self.filename or default)
        superseded = {self.newest, *self.best_k_models}
        if self._is_among_best(trainer, figure):
            assert figure is not None
            self._take_among_best(path, figure)
        if self.monitor is None:
            self.best_model_path = path
        self.newest, self._step = path, trainer.global_step
        if self.verbose:
            taken = "" if figure is None else f", {self.monitor} {figure:.5g}"
            rank_zero_info(f"Step {trainer.global_step}{taken}: saving {path}")
        self._save_checkpoint(trainer, path)
        if self.save_top_k == -1:
            return
        for old in sorted(superseded - {"", path, *self.best_k_models}):
            if self._should_remove_checkpoint(trainer, old, path):
                self._remove_superseded(trainer, old, path)

    def _take_among_best(self, path: str, figure: Tensor) -> None:
        """Updates the ranking, which the checkpoint stores; called before it is saved for that reason."""
        worst = torch.tensor(torch.inf if self.mode == "min" else -torch.inf, device=figure.device)
        figure = worst if figure.isnan() else figure
        sign = 1 if self.mode == "min" else -1
        self.current_score = figure
        ranking = sorted((self.best_k_models | {path: figure}).items(), key=lambda item: sign * float(item[1]))
        self.best_k_models = dict(ranking if self.save_top_k == -1 else ranking[: self.save_top_k])
        self.best_model_path, self.best_model_score = ranking[0]
        self.kth_best_model_path, self.kth_value = list(self.best_k_models.items())[-1]

    def _remove_superseded(self, trainer: pl.Trainer, old: str, successor: str) -> None:
        writer = trainer.strategy.checkpoint_io
        if not isinstance(writer, BackgroundCheckpointIO):
            self._remove_checkpoint(trainer, old)
        elif trainer.is_global_zero:
            writer.remove_superseded(old, successor)

    def _format_checkpoint_name(
        self,
        filename: str | None,
        metrics: dict[str, Tensor],
        prefix: str | None = None,
        auto_insert_metric_name: bool = True,
    ) -> str:
        """Formats as Lightning does, but writes `val_loss` for `val/loss`, which would name a folder."""
        if filename is not None:
            filename = re.sub(r"\{[^}:]*", lambda name: name[0].replace("/", "_"), filename)
        metrics = {name.replace("/", "_"): value for name, value in metrics.items()}
        return super()._format_checkpoint_name(filename, metrics, prefix, auto_insert_metric_name)

    def state_dict(self) -> dict[str, Any]:
        """Returns Lightning's state with the newest checkpoint, which is the one that stores this state, and its
        step."""
        return super().state_dict() | {
            "newest": self.newest,
            "step": self._step,
            "monitor": self.monitor,
            "mode": self.mode,
        }

    @property
    def state_key(self) -> str:
        """A constant; Lightning's contains the settings, so that a run that changes one would not find its state."""
        return type(self).__name__

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores which checkpoints were kept, by their names in the run's directory, wherever that is now.

        If another figure ranks checkpoints from now on, the ranking is dropped, and none of the best is removed.
        """
        here = {path.name: str(path) for path in written_last_first([Path(self.dirpath or ".")])}
        if (newest := here.get(Path(state_dict["newest"]).name)) is not None:
            self.newest = self._last_checkpoint_saved = newest
            self._step = self._last_global_step_saved = state_dict["step"]
            if self.monitor is None:
                self.best_model_path = newest
        self.last_model_path = here.get(LAST, "")
        if (self.monitor, self.mode) != (state_dict["monitor"], state_dict["mode"]):
            return
        kept = {Path(path).name: figure for path, figure in state_dict["best_k_models"].items()}
        for name, figure in kept.items():
            if name in here and self.save_top_k != 0:
                self._take_among_best(here[name], figure)

    def _save_last_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Links the last checkpoint even if `save_top_k` is 0, for which Lightning writes a second one."""
        if self.save_last != "link":
            super()._save_last_checkpoint(trainer, monitor_candidates)
            return
        self.last_model_path = self.format_checkpoint_name(monitor_candidates, self.CHECKPOINT_NAME_LAST)
        self._link_checkpoint(trainer, self._last_checkpoint_saved, self.last_model_path)

    @staticmethod
    def _link_checkpoint(trainer: pl.Trainer, filepath: str, linkpath: str) -> None:
        writer = trainer.strategy.checkpoint_io
        if isinstance(writer, BackgroundCheckpointIO):
            if trainer.is_global_zero:
                writer.link_checkpoint(filepath, linkpath)
        else:
            ModelCheckpoint._link_checkpoint(trainer, filepath, linkpath)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self.saving = filepath
        super()._save_checkpoint(trainer, filepath)
        self.saving = ""
        writer = trainer.strategy.checkpoint_io
        if isinstance(writer, BackgroundCheckpointIO):
            for logger in trainer.loggers:
                logger.log_metrics({"checkpoint/stall_seconds": writer.stall}, step=shown_step(trainer))


def checkpoints_of(trainer: pl.Trainer) -> Checkpoints | None:
    """Returns the callback that keeps a run's checkpoints, even among other callbacks of the recipe that save some."""
    return next((one for one in trainer.checkpoint_callbacks if isinstance(one, Checkpoints)), None)
