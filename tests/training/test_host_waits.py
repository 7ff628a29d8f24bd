"""The host never waits for a device but to read what the last step came to: once a step, when the next one is queued.

There is no GPU here. The real trainer runs with its weights and rows on torch's `meta` device, which computes nothing,
so that whatever the host wants to know of it is a copy that can be counted; it is told 0.
"""

import os
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils._python_dispatch import TorchDispatchMode

from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.routing.config import RoutingConfig
from fuyu_e2e.training.callbacks.bad_steps import BadSteps
from fuyu_e2e.training.callbacks.data_report import DataReport
from fuyu_e2e.training.callbacks.progress_bar import Progress
from fuyu_e2e.training.callbacks.random_state import RandomState
from fuyu_e2e.training.callbacks.routing_report import RoutingReport
from fuyu_e2e.training.callbacks.signals import StopSignals
from fuyu_e2e.training.callbacks.step_lines import StepLines
from fuyu_e2e.training.callbacks.throughput import Throughput
from fuyu_e2e.training.callbacks.time_limit import TimeLimit
from fuyu_e2e.training.module import FuyuModule
from fuyu_e2e.training.optimizers import OptimizerConfig
from fuyu_e2e.training.tensorboard import Curves

DEVICE = torch.device("meta")
aten = torch.ops.aten


class NoAccelerator(CPUAccelerator):
    """Lets Lightning take another device than the CPU."""

    def setup_device(self, device: torch.device) -> None:
        pass


@dataclass
class Waits(TorchDispatchMode):
    """Counts, by optimizer step and line, where the host waits for the device."""

    reads: Counter[tuple[int, str]] = field(default_factory=Counter)
    """Of tensors of the device."""
    copies: Counter[tuple[int, str]] = field(default_factory=Counter)
    """To the device which the host waits for."""
    step: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        on_device = isinstance(first, torch.Tensor) and first.device == DEVICE
        if operation is aten._local_scalar_dense.default and on_device:
            self.reads[self._here()] += 1
            return torch.zeros((), dtype=first.dtype).item()
        if operation is aten._to_copy.default and "device" in kwargs:
            if on_device and kwargs["device"].type == "cpu":
                self.reads[self._here()] += 1
                return torch.zeros(first.shape, dtype=kwargs.get("dtype") or first.dtype)
            if not on_device and kwargs["device"] == DEVICE and not kwargs.get("non_blocking"):
                self.copies[self._here()] += 1
        if operation is aten.copy_.default and on_device != (args[1].device == DEVICE):
            (self.copies if on_device else self.reads)[self._here()] += 1
            return first
        if operation is aten.lift_fresh.default and on_device:  # torch.tensor(..., device=...) and new_tensor
            self.copies[self._here()] += 1
        return operation(*args, **kwargs)

    def _here(self) -> tuple[int, str]:
        places = [
            f"{Path(frame.filename).name}:{frame.lineno}"
            for frame in reversed(traceback.extract_stack())
            if "/fuyu_e2e/" in frame.filename or "/lightning/" in frame.filename
        ]
        return self.step, " < ".join(places[:3])


class CountSteps(Callback):
    """Tells which step an operation belongs to."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.waits.step = trainer.global_step + 1

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.waits.step = 0


@pytest.fixture
def waits_of(
    config: FuyuConfig,
    question_data: Callable[..., FuyuDataModule],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Waits]:
    """Trains for ten steps of two rows, of which the fifth and the tenth are logged, and counts."""
    enabled, autocast = torch.is_autocast_enabled, torch.autocast  # which know no such device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != DEVICE.type and enabled(kind))
    monkeypatch.setattr(torch, "autocast", lambda kind, **options: autocast("cpu", **options))

    def waits_of(routing: RoutingConfig | None = None, **optimizer: Any) -> Waits:
        waits = Waits()
        module = FuyuModule(config, optimizer=OptimizerConfig(**optimizer), routing=routing)
        shown: list[Callback] = [RoutingReport(), Progress()] if routing else [StepLines()]
        trainer = pl.Trainer(
            accelerator=NoAccelerator(),
            strategy=SingleDeviceStrategy(device=DEVICE),
            devices=1,
            max_steps=10,
            accumulate_grad_batches=2,
            enable_model_summary=False,
            enable_checkpointing=False,
            log_every_n_steps=5,
            gradient_clip_val=1.0,
            logger=Curves(tmp_path, name="", version=""),
            callbacks=[CountSteps(waits), RandomState(), DataReport(), Throughput(), BadSteps(deviations=6.0),
                       TimeLimit("00:01:00:00"), *shown, StopSignals()],
        )  # fmt: skip
        with waits:
            trainer.fit(module, question_data())
        assert trainer.global_step == 10
        return waits

    return waits_of


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("routing", [None, RoutingConfig(share=0.5)], ids=["dense", "routed"])
def test_a_step_is_read_once_and_nothing_is_copied_that_is_waited_for(
    name: str, routing: RoutingConfig | None, waits_of: Callable[..., Waits]
) -> None:
    waits = waits_of(routing, name=name)
    in_steps = {place: count for place, count in waits.reads.items() if place[0]}
    assert sum(in_steps.values()) == 10, in_steps
    assert not any(step for step, _ in waits.copies), waits.copies


def test_ranks_wait_for_each_other_once_a_step(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the gradients, which DDP sums itself: one sum, and no barrier before it."""
    called = Counter[tuple[int, str]]()
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=1,
        max_steps=4,
        accumulate_grad_batches=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        callbacks=[RandomState(), DataReport(), Throughput(), BadSteps(), StopSignals()],
    )
    for name in ("all_reduce", "barrier", "all_gather_object", "broadcast_object_list"):

        def count(*args: Any, name: str = name, original: Any = getattr(dist, name), **options: Any) -> Any:
            called[trainer.global_step, name] += 1
            return original(*args, **options)

        monkeypatch.setattr(dist, name, count)
    with patch.dict(os.environ):  # Lightning leaves there where ranks meet
        try:
            trainer.fit(FuyuModule(config), question_data())
        finally:
            dist.destroy_process_group()
    assert {place: times for place, times in called.items() if 0 < place[0] < 4} == {
        (step, "all_reduce"): 1 for step in (1, 2, 3)
    }
