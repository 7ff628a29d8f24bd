"""What TensorBoard is told of each rank, and of the one that the others wait for."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback

from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.training.callbacks import throughput
from fuyu_e2e.training.callbacks.throughput import Throughput
from fuyu_e2e.training.module import FuyuModule


class Clock(Callback):
    """Time passes as it is told: while a row is waited for, in what a rank does by itself, and after that."""

    now = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.now += 0.02

    def on_after_backward(self, *_: Any) -> None:
        self.now += 0.04

    def on_train_batch_end(self, *_: Any) -> None:
        self.now += 0.01


def test_ranks_are_told_apart(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("fuyu_e2e.training.callbacks.throughput.time", SimpleNamespace(perf_counter=lambda: clock.now))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=4,
        accumulate_grad_batches=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=2,
        callbacks=[Throughput(), clock],
    )
    # A second rank takes a second more before its backward passes.
    monkeypatch.setattr(
        throughput, "all_ranks", lambda own: [own, [part + more for part, more in zip(own, (0, 1, 0, 0), strict=True)]]
    )
    trainer.fit(FuyuModule(config), question_data())
    told = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("ranks/")}
    assert told["ranks/slowest"] == 1
    assert told["ranks/data_wait_seconds/0"] == pytest.approx(3 * 0.01)  # of three rows a step
    assert told["ranks/seconds_before_backward/0"] == pytest.approx(3 * 0.03)
    assert told["ranks/step_seconds/0"] == pytest.approx(3 * 0.07)
    assert told["ranks/seconds_before_backward/1"] == pytest.approx(3 * 0.03 + 1)
    assert 0.1 < told["ranks/memory_gib/0"] < 20
