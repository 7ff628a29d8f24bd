"""Resuming a run: after the last optimizer step that its weights include, with the settings of the new start.

The settings are the recipe's, not the checkpoint's. Lightning counts micro-batches of a process, and would resume in
the middle of a step whose gradients are lost. Data resumes after the last complete step, on any number of processes
(see `fuyu_e2e.data.row_loader.RowLoader`), so Lightning's counts are put back to that step.
"""

from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info

from fuyu_e2e.checkpoint.metadata import SECTION
from fuyu_e2e.data.lightning_internals import validate_again
from fuyu_e2e.distributed import DataRank
from fuyu_e2e.errors import UserError
from fuyu_e2e.training.optimizers import OptimizerConfig
from fuyu_e2e.training.schedule import Schedule

ROWS = "rows of a step (processes x trainer.accumulate_grad_batches)"
"""The name of a quantity that no single setting holds."""


def training_settings(optimizer: OptimizerConfig, schedule: Schedule, trainer: pl.Trainer) -> dict[str, Any]:
    """Returns the settings that decide how a step changes weights, as primitives by their names in a recipe."""
    settings = {f"model.optimizer.{name}": value for name, value in asdict(optimizer).items()}
    settings |= {f"model.schedule.{name}": value for name, value in asdict(schedule).items()}
    rows = DataRank.of(trainer).size * trainer.accumulate_grad_batches
    return settings | {
        "model.optimizer.betas": list(optimizer.betas),
        "trainer.max_steps": trainer.max_steps,
        ROWS: rows,
    }


def restore(
    checkpoint: dict[str, Any], optimizer: OptimizerConfig, schedule: Schedule, trainer: pl.Trainer, source: str
) -> None:
    """Changes a loaded checkpoint, before Lightning takes anything from it, for the run that goes on from it.

    Args:
        checkpoint: As Lightning loaded it.
        optimizer: The run's settings.
        schedule: The run's settings.
        trainer: Of the run.
        source: What errors call the checkpoint.

    Raises:
        UserError: It holds weights alone, the state of another optimizer, or rows that don't make whole steps here.
    """
    if "lr_schedulers" not in checkpoint:  # optimizers of a checkpoint in parts lie in the parts
        raise UserError(
            f"{source} holds weights alone (checkpoint.save_weights_only), and no run can go on from it: begin a new "
            "one with them (model.weights)."
        )
    mine = training_settings(optimizer, schedule, trainer)
    _compare_settings(mine, checkpoint[SECTION].get("training", mine), source)
    if checkpoint["global_step"] >= trainer.max_steps:
        rank_zero_info(
            f"Nothing is left to train: the checkpoint has {checkpoint['global_step']:,} steps, and "
            f"trainer.max_steps is {trainer.max_steps:,}."
        )
    if getattr(trainer.datamodule, "climb", None) is not None and not checkpoint[SECTION].get("validation"):  # type: ignore[attr-defined]
        validate_again(checkpoint["loops"])  # which may climb
    _take_trained_weights(checkpoint, trainer)
    _take_settings_of_callbacks(checkpoint, trainer)
    _go_back_to_last_step(checkpoint, trainer)


def _compare_settings(mine: dict[str, Any], theirs: dict[str, Any], source: str) -> None:
    """Logs which settings of the run, `mine`, replace those of the checkpoint `source`.

    Raises:
        UserError: The checkpoint has the state of another optimizer.
    """
    name = "model.optimizer.name"
    if mine[name] != theirs[name]:
        raise UserError(
            f"{source} holds the state of {theirs[name]}, and {name} is {mine[name]}: go on with {theirs[name]}, or "
            f"begin a new run with its weights (model.weights)."
        )
    changed = [f"{name} {value} ({theirs[name]} until now)" for name, value in mine.items() if value != theirs[name]]
    if changed:
        rank_zero_info(f"Going on with {', '.join(changed)}.")


def _take_settings_of_callbacks(checkpoint: dict[str, Any], trainer: pl.Trainer) -> None:
    """Changes a loaded checkpoint so that callbacks keep their own settings instead of the checkpoint's.

    Among Lightning's callbacks, only EarlyStopping stores a setting with its counts.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and (state := checkpoint["callbacks"].get(callback.state_key)):
            if state["patience"] != callback.patience:
                rank_zero_info(
                    f"Going on with EarlyStopping's patience {callback.patience} ({state['patience']} before)."
                )
            state["patience"] = callback.patience


def _take_trained_weights(checkpoint: dict[str, Any], trainer: pl.Trainer) -> None:
    """Changes a loaded checkpoint of a run that averaged weights, for a run that doesn't.

    Lightning's WeightAveraging stores the average in place of the weights that the optimizer state belongs to.
    """
    averages = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if "current_model_state" in checkpoint and not averages:
        checkpoint["state_dict"] = checkpoint.pop("current_model_state")
        rank_zero_info(
            "Going on without the averaged weights of the checkpoint, since trainer.callbacks names no callback that "
            "averages."
        )


def _go_back_to_last_step(checkpoint: dict[str, Any], trainer: pl.Trainer) -> None:
    """Changes a loaded checkpoint so that Lightning's counts, which it is about to load, agree with the data.

    Raises:
        UserError: The trained rows don't divide into steps of this run's processes and micro-batches.
    """
    fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
    loaders = [state for state in fit_loop.get("state_dict", {}).get("combined_loader", []) if "rows" in state]
    if not loaders:
        return
    rows = loaders[0]["rows"]
    processes = DataRank.of(trainer).size
    batch = processes * trainer.accumulate_grad_batches
    if rows % batch:
        raise UserError(
            f"The checkpoint was saved after {rows:,} rows, which steps of {batch} rows (processes x "
            "accumulate_grad_batches) don't divide: give the run as many rows a step as before."
        )
    progress = fit_loop["epoch_loop.batch_progress"]
    extra = progress["total"]["processed"] * loaders[0]["world_size"] - rows
    if not extra and loaders[0]["world_size"] == processes:
        return
    for name in ("total", "current"):
        counts = progress[name]
        done = (counts["processed"] * loaders[0]["world_size"] - extra) // processes
        # From the number of completed batches, Lightning tells whether it was saving at the end of a micro-batch.
        completed = done if extra else done - counts["processed"] + counts["completed"]
        progress[name] = {"ready": done, "started": done, "processed": done, "completed": completed}
    if extra:
        for name, tensor in checkpoint["state_dict"].items():
            if name.endswith(".rule.counts"):
                tensor.zero_()
