"""Where a resumed run goes on: behind the last optimizer step that is in the weights, on any number of processes.

Lightning counts micro-batches of a process, and goes on in the middle of a step whose gradients are lost. Data goes
on behind the last whole step (see `fuyu_e2e.datamodule.RowLoader`), so Lightning's counts, and what the step had
gathered, are put back to there.
"""

from typing import Any

import lightning.pytorch as pl

from fuyu_e2e.errors import UserError
from fuyu_e2e.ranks import DataRank


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
