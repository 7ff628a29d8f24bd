"""A checkpoint records the figures of its own step, and the best is kept beside the newest."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from fuyu_e2e.checkpoint.lightning_io import read_checkpoint
from fuyu_e2e.checkpoint.metadata import SECTION
from fuyu_e2e.checkpoint.run_checkpoints import best_checkpoint
from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.training.callbacks.checkpoints import Checkpoints
from fuyu_e2e.training.callbacks.last_checkpoint import LastCheckpoint
from fuyu_e2e.training.callbacks.random_state import RandomState
from fuyu_e2e.training.callbacks.signals import Stopped, StopSignals
from fuyu_e2e.training.checkpoint_io import BackgroundCheckpointIO, WholeCheckpointIO
from fuyu_e2e.training.module import FuyuModule

FIGURES = {2: 3.0, 4: 1.0, 6: 2.0}


class Told(FuyuModule):
    """Validates to the figure that a test gives for the step."""

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        self.log("val/loss", FIGURES[self.trainer.global_step], on_epoch=True, batch_size=1)


class Watch(Callback):
    """Which steps were validated; may send this process a signal in a validation, or fail after a step."""

    def __init__(self, signal_at: int | None = None, fail_at: int | None = None) -> None:
        self.validated: list[int] = []
        self.signal_at, self.fail_at = signal_at, fail_at

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.fail_at:
            raise ZeroDivisionError

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.validated.append(trainer.global_step)


@pytest.fixture
def fit(config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path) -> Callable[..., FuyuModule]:
    """Trains six steps of two rows in a directory, with a validation after every second one."""

    def fit(name: str, *extra: Callback, resume: Path | None = None, val: bool = True, **kept: Any) -> FuyuModule:
        torch.manual_seed(3)
        checkpoints = Checkpoints(tmp_path / name / "checkpoints", save_last="link", **kept)
        module = Told(config)
        pl.Trainer(
            accelerator="cpu",
            max_steps=6,
            accumulate_grad_batches=2,
            val_check_interval=4,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[RandomState(), *extra, LastCheckpoint(), StopSignals(), checkpoints],
            plugins=[BackgroundCheckpointIO()],
        ).fit(module, question_data(val=str(tmp_path / "val.tar") if val else None), ckpt_path=resume)
        return module

    return fit


def kept(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir() if not path.is_symlink()}


@pytest.mark.parametrize(
    ("settings", "expected", "best"),
    [
        ({"every_n_train_steps": 2}, {"step=4-val_loss=1.0000.ckpt", "step=6-val_loss=2.0000.ckpt"}, 4),
        ({"every_n_train_steps": 5}, {"step=4-val_loss=1.0000.ckpt", "step=6-val_loss=2.0000.ckpt"}, 4),
        ({"every_n_train_steps": 2, "mode": "max", "monitor": "val/loss", "save_top_k": 2},
         {"step=2-val_loss=3.0000.ckpt", "step=6-val_loss=2.0000.ckpt"}, 2),
        ({"every_n_train_steps": 3, "save_top_k": 0}, {"step=6-val_loss=2.0000.ckpt"}, 6),
        ({"every_n_train_steps": 2, "filename": "a-{val/loss:.1f}"},
         {"a-val_loss=1.0-step=4.ckpt", "a-val_loss=2.0-step=6.ckpt"}, 4),
        ({"every_n_train_steps": 3, "val": False}, {"step=6.ckpt"}, None),
        ({}, {"step=4-val_loss=1.0000.ckpt", "step=6-val_loss=2.0000.ckpt"}, 4),
    ],
)  # fmt: skip
def test_the_best_is_kept_beside_the_newest(
    fit: Callable[..., FuyuModule], tmp_path: Path, settings: dict[str, Any], expected: set[str], best: int | None
) -> None:
    fit("run", **settings)
    assert kept(tmp_path / "run") == expected
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 6
    found = best_checkpoint(tmp_path / "run")
    assert (found and (found.step, found.value)) == (best and (best, FIGURES[best]))
    assert found is None or read_checkpoint(found.path)["global_step"] == found.step


def test_a_checkpoint_has_the_figures_of_its_own_step_or_none(fit: Callable[..., FuyuModule], tmp_path: Path) -> None:
    fit("run", every_n_train_steps=1, save_top_k=-1)
    for path in (tmp_path / "run" / "checkpoints").glob("step=*"):
        checkpoint = read_checkpoint(path)
        step, section = checkpoint["global_step"], checkpoint[SECTION]
        figures = {"val/loss": FIGURES[step]} if step in FIGURES else {}
        assert section["validation"] == figures
        assert (section["monitored"] or {}).get("value") == figures.get("val/loss")
    assert len(kept(tmp_path / "run")) == 6


def same(one: FuyuModule, other: FuyuModule) -> bool:
    weights, others = one.state_dict(), other.state_dict()
    return all(torch.equal(weights[name], others[name]) for name in weights) and weights.keys() == others.keys()


def test_a_run_goes_on_bitwise_from_a_checkpoint_of_a_validation_and_knows_its_best(
    fit: Callable[..., FuyuModule], tmp_path: Path
) -> None:
    """Nothing is validated twice; what was kept before is removed where it is superseded."""
    whole = fit("whole", every_n_train_steps=2)
    first, second = Watch(fail_at=4), Watch()
    with pytest.raises(ZeroDivisionError):
        fit("run", first, every_n_train_steps=2)
    resumed = fit("run", second, every_n_train_steps=2, resume=tmp_path / "run" / "checkpoints")
    assert (first.validated, second.validated) == ([2, 4], [6])
    assert same(whole, resumed)
    assert kept(tmp_path / "run") == kept(tmp_path / "whole")
    before = kept(tmp_path / "run")
    fit("run", every_n_train_steps=2, resume=tmp_path / "run" / "checkpoints")  # has nothing left to do
    assert kept(tmp_path / "run") == before
    again = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert again[SECTION]["validation"] == {"val/loss": FIGURES[6]}


def test_a_signal_between_a_step_and_its_checkpoint_behind_validation_loses_nothing(
    fit: Callable[..., FuyuModule], tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    whole = fit("whole", every_n_train_steps=4)
    with pytest.raises(Stopped):
        fit("run", Watch(signal_at=4), every_n_train_steps=4)
    signal.signal(signal.SIGTERM, before)
    stopped = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert (stopped["global_step"], stopped[SECTION]["validation"]) == (4, {})
    assert same(whole, fit("run", every_n_train_steps=4, resume=tmp_path / "run" / "checkpoints"))
    assert kept(tmp_path / "run") == {"step=6-val_loss=2.0000.ckpt"}


@pytest.mark.filterwarnings("ignore:The checkpoint .* could not be written")
def test_what_was_not_written_supersedes_nothing(
    fit: Callable[..., FuyuModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk: the newest that is there stays, though another one, the best, would be left without it."""
    write = WholeCheckpointIO._write

    def fail_late(self: WholeCheckpointIO, checkpoint: dict[str, Any], target: Path) -> None:
        if checkpoint["global_step"] > 5:
            raise OSError("no room")
        write(self, checkpoint, target)

    monkeypatch.setattr(WholeCheckpointIO, "_write", fail_late)
    fit("run", every_n_train_steps=5)
    assert kept(tmp_path / "run") == {"step=4-val_loss=1.0000.ckpt", "step=5.ckpt"}
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").resolve().name == "step=5.ckpt"
