"""Limits what a checkpoint may do to the run that resumes from it."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from fuyu_e2e.errors import UserError
from fuyu_e2e.training.callbacks.checkpoints import Checkpoints

PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")
"""Entries of a checkpoint with paths that ModelCheckpoint deletes once it has better ones."""


class CheckpointGuard(Callback):
    """Makes Lightning read only local files, without unpickling, and not delete files that a checkpoint names.

    For `last`, and on a cluster that requeues, Lightning picks the checkpoint itself among the folders of all
    callbacks. By default it unpickles what comes from a web server, and torch unpickles the optimizer part of a
    sharded checkpoint.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Puts the check before the one method through which Lightning reads checkpoints.

        An argument of `fit` is not enough: Lightning ignores `weights_only` if a strategy restores after its setup.
        """
        read = trainer.strategy.load_checkpoint

        def read_safely(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
            _check_local(checkpoint_path)
            return read(checkpoint_path, weights_only=True)

        trainer.strategy.load_checkpoint = read_safely  # type: ignore[method-assign]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Drops checkpoint paths of an earlier run, unless they lie where this run keeps its own.

        ModelCheckpoint would delete them at its next save, even folders and remote stores. `Checkpoints` stores only
        names, and needs no guard.
        """
        folders = [
            Path(callback.dirpath).resolve()
            for callback in trainer.checkpoint_callbacks
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None
        ]
        for key, state in checkpoint["callbacks"].items():
            if key == Checkpoints.__name__ or not isinstance(state, dict):
                continue
            kept = [state[name] for name in PATHS if state.get(name)] + list(state.get("best_k_models", ()))
            if not all(_lies_in(folders, path) for path in kept):
                state.update(dict.fromkeys(PATHS, ""), best_k_models={})


def _lies_in(folders: list[Path], path: str) -> bool:
    # Resolved, since `..` and links lead out of a folder. A URL is no absolute path.
    return Path(path).is_absolute() and any(folder in Path(path).resolve().parents for folder in folders)


def _check_local(path: Any) -> None:
    if "://" in str(path) or str(path).startswith("http"):  # as Lightning tells URLs from paths
        raise UserError(f"The run would go on from {path}, which is not on this machine: fetch it, and name it.")
