"""Default intervals of validation and checkpoints, in steps: Lightning's epochs never end here."""

from jsonargparse import Namespace

from fuyu_e2e.errors import UserError

PARTS = 10
"""Validations, or checkpoints, of a short run."""
STEPS = 1_000
"""Steps between validations, or checkpoints, of a long run."""


def set_intervals(settings: Namespace) -> str:
    """Sets the intervals that a recipe leaves to the end of an epoch, if epochs don't end.

    The interval is a tenth of the run, at most 1,000 steps. It applies to validations, each with its checkpoint, or
    without validation to checkpoints. If `limit_train_batches` or `overfit_batches` end epochs, Lightning's defaults
    apply.

    Returns:
        A sentence about what was set; empty if the recipe sets everything.

    Raises:
        UserError: Checkpoints or validations are asked for by epochs that never end.
    """
    trainer, checkpoint = settings["trainer"], settings["checkpoint"]
    if any(isinstance(trainer[name], int) and trainer[name] for name in ("limit_train_batches", "overfit_batches")):
        return ""
    every = max(1, min(STEPS, trainer["max_steps"] // PARTS))
    validates = settings["data"]["val"] is not None and trainer["limit_val_batches"] != 0
    if validates and (trainer["check_val_every_n_epoch"] or 1) > 1:
        raise UserError(
            f"trainer.check_val_every_n_epoch is {trainer['check_val_every_n_epoch']}, but training data are a stream "
            "without epochs: set trainer.val_check_interval instead, or end epochs with trainer.limit_train_batches."
        )
    steps, epochs, time = (
        checkpoint[name] for name in ("every_n_train_steps", "every_n_epochs", "train_time_interval")
    )
    unset = steps is None and epochs is None and time is None
    if validates and trainer["val_check_interval"] in (None, 1.0):
        # Lightning counts micro-batches; what `rows_per_step` means for them is known when the processes are.
        interval = every * trainer["accumulate_grad_batches"] if settings["rows_per_step"] is None else every
        trainer["val_check_interval"], trainer["check_val_every_n_epoch"] = interval, None
        what = "validates and saves" if unset else "validates"
        return f"trainer.val_check_interval is not set: {what} every {interval:,} micro-batches of a process."
    if not validates and unset:
        checkpoint["every_n_train_steps"] = every
        return f"checkpoint.every_n_train_steps is not set: saves every {every:,} steps."
    if not validates and epochs:
        raise UserError(
            "checkpoint.every_n_epochs would save nothing, since the stream of training data never ends: set "
            "checkpoint.every_n_train_steps instead."
        )
    return ""
