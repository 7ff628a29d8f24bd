"""Restores random generators on every rank, so that a resumed run draws as an uninterrupted one would."""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from fuyu_e2e.data.lightning_internals import accumulates
from fuyu_e2e.distributed import all_ranks


class RandomState(Callback):
    """Stores the states of the global random generators in checkpoints: Python, numpy, torch, and the rank's GPU.

    Each rank restores its state before the first step of a resumed run. If there are more processes than before, the
    additional ones keep the fresh state of the recipe's seed. A checkpoint from within a step has the state before
    that step, like everything else in it. Validation begins with the state that training left and restores it at the
    end, as a resumed run doesn't repeat it.

    Comes before all other callbacks, so that they draw from the restored state. Lightning restores generators around
    its check before training (`isolate_rng`), and stores none in checkpoints.
    """

    def __init__(self) -> None:
        self._before_step: dict[str, Any] | None = None
        """The state before the running step; None between steps."""
        self._to_restore: dict[str, Any] | None = None
        """The state for the next micro-batch, from a checkpoint or from before a validation."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of all ranks, as tensors and primitives; a collective."""
        own = _in_primitives(self._before_step or self._to_restore or read_random_state())
        return {"ranks": all_ranks(own)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes this rank's state, if the checkpoint has one, for its next step."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        self._to_restore = dict(enumerate(state_dict["ranks"])).get(rank)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Marks that no step is running."""
        self._before_step = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Restores the stored state only now, since others draw between the start of a run and here."""
        if self._to_restore is not None:
            restore_random_state(self._to_restore)
            self._to_restore = None
        self._before_step = self._before_step or read_random_state()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Ends the step after its last micro-batch."""
        if not accumulates(trainer):
            self._before_step = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stores training's state, unless Lightning does so itself, as around its check before training."""
        if not trainer.sanity_checking:
            self._to_restore = self._to_restore or read_random_state()


def read_random_state() -> dict[str, Any]:
    """Returns the state of this process's global generators, and of its GPU's if that is in use."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def _in_primitives(state: dict[str, Any]) -> dict[str, Any]:
    """Returns a state in the form of a checkpoint: numpy's words as numbers, too slow to do in each step."""
    words = np.asarray(state["numpy"]["state"]["key"]).tolist()
    return state | {"numpy": state["numpy"] | {"state": state["numpy"]["state"] | {"key": words}}}


def restore_random_state(state: dict[str, Any]) -> None:
    """Sets the generators to a state from `read_random_state`; a GPU's only if it was in use then and is now."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
