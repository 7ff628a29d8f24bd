"""Ctrl-C at any time leaves a checkpoint that the run goes on from, bit for bit."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from fuyu_e2e.checkpoint.training_files import read_checkpoint
from fuyu_e2e.datamodule import FuyuDataModule
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.training.checkpoint_io import BackgroundCheckpointIO
from fuyu_e2e.training.checkpoints import Checkpoints
from fuyu_e2e.training.last_checkpoint import LastCheckpoint
from fuyu_e2e.training.module import FuyuModule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Interrupt(Callback):
    """Presses Ctrl-C in the middle of a micro-batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        if index == self.batch:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("batch", "step"), [(0, 1), (3, 2), (4, 3)])
def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path, batch: int, step: int
) -> None:
    def fit(path: Path, ckpt_path: Path | None = None, *extra: Callback) -> tuple[FuyuModule, LastCheckpoint]:
        torch.manual_seed(3)
        module, last = FuyuModule(config), LastCheckpoint()
        pl.Trainer(
            accelerator="cpu",
            max_steps=6,
            accumulate_grad_batches=2,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            plugins=[BackgroundCheckpointIO()],
            callbacks=[last, Checkpoints(path, filename="{step}", save_last="link"), *extra],
        ).fit(module, question_data(), ckpt_path=ckpt_path)
        return module, last

    handler = signal.getsignal(signal.SIGINT)
    whole, undisturbed = fit(tmp_path / "whole")
    stopped, last = fit(tmp_path / "stopped", None, Interrupt(batch))
    assert last.interrupted
    assert not undisturbed.interrupted
    assert signal.getsignal(signal.SIGINT) is handler
    saved = read_checkpoint(tmp_path / "stopped" / "last.ckpt")
    assert saved["global_step"] == step
    resumed, _ = fit(tmp_path / "resumed", tmp_path / "stopped" / "last.ckpt")
    assert read_checkpoint(tmp_path / "resumed" / "last.ckpt")["global_step"] == 6
    for name, weight in whole.decoder.state_dict().items():
        assert torch.equal(weight, resumed.decoder.state_dict()[name]), name
    assert not torch.equal(stopped.decoder.lm_head.weight, resumed.decoder.lm_head.weight)
