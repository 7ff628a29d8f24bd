"""How a resumed run goes on: after the last optimizer step that is in the weights, with the settings it is given.

The settings are the recipe's, not the checkpoint's. Lightning counts micro-batches of a process, and goes on in the
middle of a step whose gradients are lost. Data goes on after the last whole step, on any number of processes (see
`fuyu_e2e.data.row_loader.RowLoader`), so Lightning's counts, and what the step had gathered, are put back to there.
"""

from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info

from fuyu_e2e.distributed import DataRank
from fuyu_e2e.errors import UserError
from fuyu_e2e.training.optimizers import OptimizerConfig
from fuyu_e2e.training.schedule import Schedule

ROWS = "rows of a step (processes x trainer.accumulate_grad_batches)"
"""The name of what no single setting says."""


def training_settings(optimizer: OptimizerConfig, schedule: Schedule, trainer: pl.Trainer) -> dict[str, Any]:
    """Returns the settings that decide how a step changes weights, by their names in a recipe, in primitives."""
    settings = {f"model.optimizer.{name}": value for name, value in asdict(optimizer).items()}
    settings |= {f"model.schedule.{name}": value for name, value in asdict(schedule).items()}
    rows = DataRank.of(trainer).size * trainer.accumulate_grad_batches
    return settings | {
        "model.optimizer.betas": list(optimizer.betas),
        "trainer.max_steps": trainer.max_steps,
        ROWS: rows,
    }


def compare_settings(mine: dict[str, Any], theirs: dict[str, Any], source: str) -> None:
    """Says which settings of the run, `mine`, hold from here on instead of those of the checkpoint `source`.

    Raises:
        UserError: It is of another optimizer, whose state means nothing to this one.
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


def take_settings_of_callbacks(checkpoint: dict[str, Any], trainer: pl.Trainer) -> None:
    """Changes a loaded checkpoint so that callbacks keep settings of their own that they would take from it.

    Of Lightning's callbacks EarlyStopping alone keeps a setting among what it counts.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and (state := checkpoint["callbacks"].get(callback.state_key)):
            if state["patience"] != callback.patience:
                rank_zero_info(
                    f"Going on with EarlyStopping's patience {callback.patience} ({state['patience']} before)."
                )
            state["patience"] = callback.patience


def take_trained_weights(checkpoint: dict[str, Any], trainer: pl.Trainer) -> None:
    """Changes a loaded checkpoint of a run that averaged weights, for a run that no longer does.

    Lightning's WeightAveraging stores the average in the place of the weights that the optimizer's state belongs to.
    """
    averages = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if "current_model_state" in checkpoint and not averages:
        checkpoint["state_dict"] = checkpoint.pop("current_model_state")
        rank_zero_info(
            "Going on without the averaged weights of the checkpoint, since trainer.callbacks names no callback that "
            "averages."
        )


def go_back_to_last_step(checkpoint: dict[str, Any], trainer: pl.Trainer) -> None:
    """Changes a loaded checkpoint, before Lightning takes its counts from it, so that they agree with its data.

    Raises:
        UserError: The rows trained on don't make whole steps of this run's processes and micro-batches.
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
    behind = progress["total"]["processed"] * loaders[0]["world_size"] - rows
    if not behind and loaders[0]["world_size"] == processes:
        return
    for name in ("total", "current"):
        counts = progress[name]
        done = (counts["processed"] * loaders[0]["world_size"] - behind) // processes
        # Lightning tells by the count of completed ones whether it was saving at the end of a micro-batch.
        completed = done if behind else done - counts["processed"] + counts["completed"]
        progress[name] = {"ready": done, "started": done, "processed": done, "completed": completed}
    if behind:
        for name, tensor in checkpoint["state_dict"].items():
            if name.endswith(".rule.counts"):
                tensor.zero_()
