"""Python's garbage collector works between steps that are logged and others, not within them, and afterwards again."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback

from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.training.callbacks.garbage_collection import GarbageCollection
from fuyu_e2e.training.module import FuyuModule


class Ring:
    """An object that only the collector can free."""

    def __init__(self) -> None:
        self.itself = self


class Litter(Callback):
    """Leaves a ring in each step, and looks how many are there in the next."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails
        self.rings: list[weakref.ref[Ring]] = []
        self.alive: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.alive.append(sum(ring() is not None for ring in self.rings))
        self.rings.append(weakref.ref(Ring()))
        assert not gc.isenabled()
        if self.fails and len(self.rings) == 2:
            raise RuntimeError("as planned")


def quiet_trainer(litter: Litter, **settings: int) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[GarbageCollection(), litter],
        **settings,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("fails", [False, True])
def test_rings_are_freed_behind_steps_that_are_logged(
    fails: bool, config: FuyuConfig, question_data: Callable[..., FuyuDataModule]
) -> None:
    litter = Litter(fails)
    trainer = quiet_trainer(litter, max_steps=7, log_every_n_steps=3)
    if fails:
        with pytest.raises(RuntimeError, match="as planned"):
            trainer.fit(FuyuModule(config), question_data())
    else:
        trainer.fit(FuyuModule(config), question_data())
        assert litter.alive == [0, 1, 2, 0, 1, 2, 0]
    assert gc.isenabled()


def test_micro_batches_of_a_step_collect_nothing(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule]
) -> None:
    litter = Litter(fails=False)
    trainer = quiet_trainer(litter, max_steps=4, accumulate_grad_batches=2, log_every_n_steps=2)
    trainer.fit(FuyuModule(config), question_data())
    assert litter.alive == [0, 1, 2, 3, 0, 1, 2, 3]
