"""All private names of Lightning that we use, which any release may change.

`tests/data/test_lightning_internals.py` checks them against the installed version, and the package against this list.
"""

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities import throughput

CUDA_FLOPS = throughput._CUDA_FLOPS
"""The table of `get_available_flops`, which only looks up the present device."""

INHERITED = {
    "lightning.pytorch.callbacks.ModelCheckpoint": (
        "_every_n_epochs",
        "_every_n_train_steps",
        "_format_checkpoint_name",
        "_last_checkpoint_saved",
        "_last_global_step_saved",
        "_last_time_checked",
        "_link_checkpoint",
        "_monitor_candidates",
        "_remove_checkpoint",
        "_save_checkpoint",
        "_save_last_checkpoint",
        "_save_topk_checkpoint",
        "_should_remove_checkpoint",
        "_should_save_on_train_epoch_end",
        "_should_skip_saving_checkpoint",
        "_train_time_interval",
    ),
    "lightning.pytorch.callbacks.RichProgressBar": (
        "_get_train_description",
        "_init_progress",
        "_initialize_train_progress_bar_id",
        "_progress_stopped",
        "_stop_progress",
        "_update",
        "_update_metrics",
    ),
    "lightning.pytorch.plugins.io.AsyncCheckpointIO": ("_ensure_setup", "_error", "_executor"),
    "lightning.pytorch.cli.LightningCLI": ("_get", "_parse_ckpt_path"),
    "lightning.pytorch.strategies.ModelParallelStrategy": ("_device_mesh", "_setup_distributed"),
    "lightning.pytorch.loggers.TensorBoardLogger": ("_experiment", "_kwargs"),
}
"""Private names of Lightning's classes that our subclasses override or read."""


def accumulates(trainer: pl.Trainer) -> bool:
    """Returns whether the current micro-batch does not end an optimizer step."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def completed_rows(trainer: pl.Trainer) -> int:
    """Returns the number of rows of this process in completed optimizer steps.

    Lightning fetches one row ahead, and gradients of an incomplete step are not saved: a resumed run has to read that
    step's rows again.
    """
    loop = trainer.fit_loop.epoch_loop
    done = loop.batch_progress
    if loop._num_ready_batches_reached():  # the last step of an epoch may have fewer micro-batches
        return done.total.processed  # type: ignore[attr-defined]
    return done.total.processed - done.current.processed % trainer.accumulate_grad_batches  # type: ignore[attr-defined]


def trained_rows(trainer: pl.Trainer) -> int:
    """Returns the number of rows of this process that were trained, those of an incomplete step included."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]


def validate_again(loops: dict[str, Any]) -> None:
    """Changes a checkpoint's state of Lightning's loops so that a validation that is due at its step is done.

    Lightning does it only if it was saved in the midst of it, with a row begun.
    """
    progress = loops["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    progress["total"] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    progress["current"] |= {"ready": 0, "started": 0, "processed": 0, "completed": 0}


def validates_now(trainer: pl.Trainer) -> bool:
    """Returns whether a validation that is counted in steps follows the current micro-batch."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    by_steps = trainer._val_check_time_interval is None  # type: ignore[attr-defined]
    return by_steps and loop._should_check_val_fx(fetcher) and not loop.val_loop.skip


def count_steps(trainer: pl.Trainer) -> None:
    """Makes loggers count optimizer steps.

    Lightning counts one too many if a run resumes from a checkpoint that was saved after its last batch.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def steps_between_logs(trainer: pl.Trainer) -> int:
    """Returns the trainer's `log_every_n_steps`, which Lightning doesn't declare; for 0, more than the run has
    steps."""
    return trainer.log_every_n_steps or trainer.max_steps + 1  # type: ignore[attr-defined]


def leave_signals_to_us(trainer: pl.Trainer) -> None:
    """Keeps Lightning from installing its signal handlers, and from checking them across ranks before each row."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
