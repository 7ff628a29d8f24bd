"""Rows of a run on a GPU come in page-locked memory, from which copies don't hold the host up."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from fuyu_e2e.data.datamodule import FuyuDataModule


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_rows_are_pinned_for_a_gpu(
    device: str, question_data: Callable[..., FuyuDataModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no GPU here: what torch would lock is noted down."""
    locked: set[int] = set()

    def lock(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        copy = tensor.clone()
        locked.add(id(copy))
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", lock)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda *_: None)
    data = question_data()
    strategy = SingleDeviceStrategy(device)
    data.trainer = pl.Trainer(accelerator="cpu", strategy=strategy, logger=False, enable_checkpointing=False)
    data.setup("fit")
    batch = next(iter(data.train_dataloader())).batch
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7
    assert all((id(tensor) in locked) == (device == "cuda") for tensor in tensors)
