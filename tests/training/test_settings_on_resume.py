"""A run that goes on trains by the settings it is given now, from its first step; what differs is said."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging

from fuyu_e2e.checkpoint.lightning_io import read_checkpoint
from fuyu_e2e.checkpoint.run_checkpoints import find_checkpoint
from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.errors import UserError
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.training.callbacks.checkpoints import Checkpoints
from fuyu_e2e.training.callbacks.last_checkpoint import LastCheckpoint
from fuyu_e2e.training.callbacks.random_state import RandomState
from fuyu_e2e.training.checkpoint_io import BackgroundCheckpointIO
from fuyu_e2e.training.module import FuyuModule
from fuyu_e2e.training.optimizers import OptimizerConfig
from fuyu_e2e.training.schedule import Schedule

BEFORE = OptimizerConfig(name="muon", lr=0.01, betas=(0.8, 0.9), muon_lr=0.03)


class Groups(Callback):
    """The settings with which each step is done, by step, and the weights before it."""

    def __init__(self) -> None:
        self.of: dict[int, list[dict[str, Any]]] = {}
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.weights[trainer.global_step] = {name: kept.clone() for name, kept in pl_module.state_dict().items()}

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        groups = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        self.of[trainer.global_step] = groups


@pytest.fixture
def fit(config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path) -> Callable[..., Groups]:
    """Trains in a directory, from its newest checkpoint on if it has one; gives what each step was done with."""

    def fit(name: str, steps: int, optimizer: OptimizerConfig = BEFORE, schedule: Schedule = Schedule(),
            callbacks: tuple[Callback, ...] = (), rows: int = 1, **kept: Any) -> Groups:  # fmt: skip
        torch.manual_seed(3)
        groups, folder = Groups(), tmp_path / name / "checkpoints"
        pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            accumulate_grad_batches=rows,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[RandomState(), LastCheckpoint(), *callbacks, groups, Checkpoints(folder, **kept)],
            plugins=[BackgroundCheckpointIO()],
        ).fit(
            FuyuModule(config, optimizer=optimizer, schedule=schedule),
            question_data(),
            ckpt_path=folder if folder.exists() else None,
        )
        return groups

    return fit


def test_rates_and_schedule_are_those_given_from_the_first_step_on(
    fit: Callable[..., Groups], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    fit("run", 4)
    assert "Going on with model" not in caplog.text
    optimizer = OptimizerConfig(
        name="muon",
        lr=1e-3,
        betas=(0.5, 0.6),
        weight_decay=0.7,
        muon_lr=2e-3,
        muon_momentum=0.4,
        muon_weight_decay=0.3,
    )
    schedule = Schedule(shape="wsd", warmup=0.0, decay=0.5, final=0.1)
    groups = fit("run", 7, optimizer, schedule).of
    assert list(groups) == [4, 5, 6]
    for step, (matrices, vectors, muon) in groups.items():
        factor = 1 - 0.9 * (1 - (1 - step / 7) / 0.5)
        for group in (matrices, vectors):
            assert group["lr"] == pytest.approx(1e-3 * factor, rel=1e-12)
            assert group["betas"] == (0.5, 0.6)
        assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.7, 0.0)
        assert muon["lr"] == pytest.approx(2e-3 * factor, rel=1e-12)
        assert (muon["momentum"], muon["weight_decay"]) == (0.4, 0.3)
    for said in (
        "model.optimizer.lr 0.001 (0.01 until now)",
        "model.optimizer.betas [0.5, 0.6] ([0.8, 0.9] until now)",
        "model.schedule.shape wsd (cosine until now)",
        "trainer.max_steps 7 (4 until now)",
    ):
        assert said in caplog.text


def test_a_run_goes_on_as_if_its_settings_had_been_changed_in_its_midst(
    fit: Callable[..., Groups], config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path
) -> None:
    """What is kept of each weight is taken over: the weights are those of one run whose groups were set again."""
    flat, after = (
        Schedule(warmup=0.0, shape="wsd", decay=0.0),
        replace(BEFORE, lr=1e-3, betas=(0.5, 0.6), muon_lr=2e-3),
    )

    class Change(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                [scheduler] = [one.scheduler for one in trainer.lr_scheduler_configs]
                for number, group in enumerate(trainer.optimizers[0].param_groups):
                    muon = group["kind"] == "muon"
                    group["lr"] = scheduler.base_lrs[number] = after.muon_lr if muon else after.lr
                    group |= {} if muon else {"betas": after.betas}

    whole = fit("whole", 6, schedule=flat, callbacks=(Change(),)).weights[5]
    fit("parts", 3, schedule=flat)
    parts = fit("parts", 6, after, flat).weights[5]
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_another_optimizer_is_refused(fit: Callable[..., Groups], name: Any) -> None:
    other = "muon" if name == "adamw" else "adamw"
    fit("run", 1, OptimizerConfig(name=name))
    with pytest.raises(UserError, match=f"holds the state of {name}, and model.optimizer.name is {other}: go on with"):
        fit("run", 2, OptimizerConfig(name=other))


@pytest.mark.parametrize("steps", [2, 1])
def test_a_run_that_has_all_its_steps_says_so(
    fit: Callable[..., Groups], steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    fit("run", 2)
    assert "Nothing is left" not in caplog.text
    assert not fit("run", steps).of
    assert f"Nothing is left to train: the checkpoint has 2 steps, and trainer.max_steps is {steps}." in caplog.text


def test_a_step_of_more_rows_is_told(fit: Callable[..., Groups], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fit("run", 2)
    fit("run", 3, rows=2)
    assert "rows of a step (processes x trainer.accumulate_grad_batches) 2 (1 until now)" in caplog.text


def test_patience_is_that_given(fit: Callable[..., Groups], caplog: pytest.LogCaptureFixture) -> None:
    """It stops the run at the first step that is no better, where the run before it would have gone on."""
    caplog.set_level("INFO")
    falling = {"monitor": "train/loss", "mode": "max", "check_on_train_epoch_end": True}
    fit("run", 2, callbacks=(EarlyStopping(**falling, patience=50),))
    stopping = EarlyStopping(**falling, patience=1)
    fit("run", 4, callbacks=(stopping,))
    assert stopping.patience == 1
    assert "Going on with EarlyStopping's patience 1 (50 before)." in caplog.text


def test_a_run_keeps_its_best_where_a_setting_of_checkpoints_changes(
    fit: Callable[..., Groups], tmp_path: Path
) -> None:
    watched = {"monitor": "train/loss", "mode": "max"}
    fit("run", 2, every_n_train_steps=1, **watched)
    fit("run", 4, every_n_train_steps=2, **watched)
    kept = {path.name.split("-")[0] for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"step=1", "step=4"}


def test_a_copied_run_keeps_its_best_there(fit: Callable[..., Groups], tmp_path: Path) -> None:
    watched = {"monitor": "train/loss", "mode": "max", "every_n_train_steps": 1}
    fit("run", 2, **watched)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    fit("copy", 3, **watched)
    kept = {path.name.split("-")[0] for path in (tmp_path / "copy" / "checkpoints").iterdir()}
    assert kept == {"step=1", "step=3"}
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2


def test_averaging_may_end_and_the_trained_weights_go_on(
    fit: Callable[..., Groups], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At the end of a run Lightning puts the average into the model, which the last checkpoint is not to have."""
    caplog.set_level("INFO")
    plain, averaged = fit("plain", 2), fit("averaged", 2, callbacks=(EMAWeightAveraging(decay=0.5),))
    stored = read_checkpoint(find_checkpoint(tmp_path / "averaged"))
    assert any(not torch.equal(tensor, stored["state_dict"][name]) for name, tensor in plain.weights[1].items())
    assert plain.weights[1].keys() == averaged.weights[1].keys()
    trained, on_average = fit("plain", 4).weights, fit("averaged", 4).weights
    for step in (2, 3):
        assert all(torch.equal(tensor, trained[step][name]) for name, tensor in on_average[step].items())
    assert "Going on without the averaged weights of the checkpoint" in caplog.text
