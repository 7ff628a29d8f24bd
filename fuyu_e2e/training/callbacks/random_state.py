"""Random numbers of a run that goes on are those of the run that was never stopped, on every rank."""

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
    """Keeps the state of the global random generators in checkpoints: of Python, numpy, torch, and the rank's GPU.

    Each rank gets its own back before the first step of a run that goes on. On more processes than before, those that
    have none of their own keep the recipe's fresh seed. A checkpoint from within a step has the state from before it,
    as it has everything else. Validation begins with the state that training left and leaves it as it was: a run that
    goes on does not repeat it.

    Stands before all callbacks, so that what they draw for a step is drawn from the state that was put back.
    """

    def __init__(self) -> None:
        self._before_step: dict[str, Any] | None = None
        """From before the running step; None between steps."""
        self._aside: dict[str, Any] | None = None
        """What the next micro-batch is to go on with: from a checkpoint, or from before a validation."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of all ranks, in tensors and primitives; every rank calls it."""
        own = _in_primitives(self._before_step or self._aside or read())
        return {"ranks": all_ranks(own)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes this rank's own, if it has one, for its next step."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        self._aside = dict(enumerate(state_dict["ranks"])).get(rank)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Is within no step."""
        self._before_step = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Puts back what was put aside; between the start of a run and here, others draw."""
        if self._aside is not None:
            put_back(self._aside)
            self._aside = None
        self._before_step = self._before_step or read()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Ends the step behind its last micro-batch."""
        if not accumulates(trainer):
            self._before_step = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts training's state aside, unless Lightning does so itself, as around its check before training."""
        if not trainer.sanity_checking:
            self._aside = self._aside or read()


def read() -> dict[str, Any]:
    """Returns the state of this process's global generators, and of its GPU's once it is in use."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def _in_primitives(state: dict[str, Any]) -> dict[str, Any]:
    """Returns a state as a checkpoint can hold it: numpy's words as numbers, which is too slow for each step."""
    words = np.asarray(state["numpy"]["state"]["key"]).tolist()
    return state | {"numpy": state["numpy"] | {"state": state["numpy"]["state"] | {"key": words}}}


def put_back(state: dict[str, Any]) -> None:
    """Sets the generators as `read` found them; a GPU's only where it was in use then as now."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
