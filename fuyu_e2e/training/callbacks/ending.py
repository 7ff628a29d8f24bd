"""The summary at the end of `fit`: where the results are, how good they are, and what to do next."""

import shlex
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.utilities import rank_zero_info

from fuyu_e2e.checkpoint.atomic import CheckpointManifest
from fuyu_e2e.checkpoint.run_checkpoints import best_checkpoint, run_checkpoints
from fuyu_e2e.checkpoint.run_directory import shown
from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.data.sample_stats import SampleStats, skipped_first
from fuyu_e2e.training.callbacks.checkpoints import checkpoints_of
from fuyu_e2e.training.callbacks.data_report import DataReport
from fuyu_e2e.training.callbacks.step_lines import short_count
from fuyu_e2e.training.module import FuyuModule


class Ending(Callback):
    """Sums up a finished run, on the first process.

    Reads the checkpoints back from the disk after all are written, so that every one it names exists.
    """

    def __init__(self) -> None:
        self._tally: SampleStats | None = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sums the counts of all processes while these still run."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        report = next((one for one in callbacks if isinstance(one, DataReport)), None)
        self._tally = report.training() if report is not None else None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the summary."""
        assert isinstance(pl_module, FuyuModule)
        if trainer.is_global_zero:
            lines = [
                f"Done: {trainer.global_step:,} steps, {short_count(float(pl_module.tokens_seen))} tokens",
                *_stopped_early(trainer),
                *_places(trainer),
                *(_data(self._tally) if self._tally is not None else []),
                *_next_commands(trainer),
            ]
            rank_zero_info("\n" + "\n".join(lines))


def _early_stopping(trainer: pl.Trainer) -> EarlyStopping | None:
    """Returns the callback that ended the run before its last step, or None."""
    callbacks = [one for one in trainer.callbacks if isinstance(one, EarlyStopping)]  # type: ignore[attr-defined]
    stopped = (one for one in callbacks if one.stopping_reason_message)
    return next(stopped, None) if trainer.global_step < trainer.max_steps else None


def _stopped_early(trainer: pl.Trainer) -> list[str]:
    if (callback := _early_stopping(trainer)) is None:
        return []
    return [f"  stopped  early: {callback.stopping_reason_message}"]


def _places(trainer: pl.Trainer) -> list[str]:
    lines = [f"  run      {shown(Path(trainer.default_root_dir).absolute())}"]
    checkpoints = checkpoints_of(trainer)
    folder = Path(checkpoints.dirpath or ".") if checkpoints is not None else None
    if folder is None or not (found := run_checkpoints(folder)):
        return [*lines, "  no checkpoint was written"]
    if best := best_checkpoint(folder):
        lines.append(f"  best     {best.name} {best.value:.4g} at step {best.step:,}: {shown(best.path)}")
    return [*lines, f"  last     step {CheckpointManifest.read(found[0]).step:,}: {shown(found[0])}"]


def _data(stats: SampleStats) -> list[str]:
    waiting = f", {stats.waiting:,} wait to be packed" if stats.waiting else ""
    lines = [f"  data     {stats.summary()}{waiting}"]
    return lines + [f"           {line}" for line in skipped_first(stats.examples)]


def _next_commands(trainer: pl.Trainer) -> list[str]:
    """Returns the commands for what may come next, ready to run except for words in capitals."""
    root = Path(trainer.default_root_dir)
    if not (root / "config.yaml").is_file():
        return []  # no run of the command line
    run = shlex.quote(shown(root.absolute()))
    data: FuyuDataModule = trainer.datamodule  # type: ignore[attr-defined]
    # A model that never saw a question can't continue one.
    prompt = "" if data.document_kinds().keys() <= {"caption"} else ' --prompt "..."'
    more = "--trainer.max_steps MORE" if _early_stopping(trainer) is None else "--trainer.callbacks null"
    assert isinstance(trainer.lightning_module, FuyuModule)
    config = trainer.lightning_module.config
    packages = {type(part).__module__.partition(".")[0] for part in (*config.masks, *config.blocks, config.connector)}
    own = ",".join(sorted(packages - {"fuyu_e2e"}))
    read = f"{run} --allow-imports {own}" if own else run
    return [
        "Next:",
        f"  fuyu-e2e evaluate --checkpoint {read} --task TASK",
        f"  fuyu-e2e generate --checkpoint {read} --image PICTURE.png{prompt}",
        f"  fuyu-e2e export --checkpoint {read} --out FOLDER",
        f"  tensorboard --logdir {run}",
        f"  fuyu-e2e fit --config {shlex.quote(shown(root.absolute() / 'config.yaml'))} --ckpt_path last {more}"
        + (f" --allow-imports {own}" if own else ""),
    ]
