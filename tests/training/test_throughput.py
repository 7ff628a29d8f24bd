"""What TensorBoard is told of each rank, and of the one that the others wait for."""

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from fuyu_e2e.datamodule import FuyuDataModule
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.training.module import FuyuModule
from fuyu_e2e.training.throughput import Throughput

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Slow(Callback):
    """Takes its time with what a rank does by itself, and with what comes behind."""

    def on_train_batch_start(self, *_: Any) -> None:
        time.sleep(0.02)

    def on_after_backward(self, *_: Any) -> None:
        time.sleep(0.04)


class Beside(FuyuModule):
    """Has a second rank beside it that takes a second more before its backward passes."""

    def all_gather(self, data: Any, *_: Any, **__: Any) -> torch.Tensor:
        return torch.stack((data, data + torch.tensor([0.0, 1.0, 0.0, 0.0])))


def test_ranks_are_told_apart(config: FuyuConfig, question_data: Callable[..., FuyuDataModule]) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=4,
        accumulate_grad_batches=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=2,
        callbacks=[Throughput(), Slow()],
    )
    trainer.fit(Beside(config), question_data())
    told = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("ranks/")}
    assert told["ranks/slowest"] == 1
    before, whole, waited = (
        told[f"ranks/{name}/0"] for name in ("seconds_before_backward", "step_seconds", "data_wait_seconds")
    )
    assert told["ranks/seconds_before_backward/1"] == pytest.approx(before + 1)
    assert 0.06 < before < whole - 0.12
    assert 0 < waited < before - 0.06
    assert 0.1 < told["ranks/memory_gib/0"] < 20
