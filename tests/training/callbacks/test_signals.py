"""A signal at any time, on any rank, leaves a checkpoint that the run goes on from bit for bit, and its exit code."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from fuyu_e2e.checkpoint.lightning_io import read_checkpoint
from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.training.callbacks.checkpoints import Checkpoints
from fuyu_e2e.training.callbacks.last_checkpoint import LastCheckpoint
from fuyu_e2e.training.callbacks.signals import Stopped, StopSignals
from fuyu_e2e.training.checkpoint_io import BackgroundCheckpointIO
from fuyu_e2e.training.module import FuyuModule

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[Any]]:
    """The handlers from before a test, and after it: a run that was stopped leaves some, for the process is to end."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield before
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


class Send(Callback):
    """Sends this process a signal in the middle of a training row, or of a validation row."""

    def __init__(self, number: signal.Signals, row: int, during: str = "train") -> None:
        self.number, self.row, self.during = number, row, during
        self.validated = 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        if self.during == "train" and index == self.row:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
        self.validated += 1
        if self.during == "validation" and index == self.row:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def fit(config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path) -> Callable[..., FuyuModule]:
    """Trains for six steps of two rows, with a validation of two rows after the third."""

    def fit(name: str, *extra: Callback, resume: str | None = None, **settings: Any) -> FuyuModule:
        torch.manual_seed(3)
        module, data = FuyuModule(config), question_data(val=str(tmp_path / "val.tar"))
        pl.Trainer(
            accelerator="cpu",
            max_steps=6,
            accumulate_grad_batches=2,
            val_check_interval=6,
            check_val_every_n_epoch=None,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*extra, LastCheckpoint(), StopSignals(), Checkpoints(tmp_path / name, save_last="link")],
            plugins=[BackgroundCheckpointIO()],
            **settings,
        ).fit(module, data, ckpt_path=tmp_path / resume / "last.ckpt" if resume else None)
        return module

    return fit


def step(path: Path) -> int:
    return read_checkpoint(path / "last.ckpt")["global_step"]


@pytest.mark.parametrize(
    ("number", "row", "during", "stopped_at", "validated"),
    [
        (signal.SIGINT, 0, "train", 1, 0),
        (signal.SIGTERM, 5, "train", 3, 0),
        (signal.SIGUSR1, 6, "train", 4, 2),
        (signal.SIGTERM, 0, "validation", 3, 1),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    fit: Callable[..., FuyuModule],
    tmp_path: Path,
    handlers: list[Any],
    number: signal.Signals,
    row: int,
    during: str,
    stopped_at: int,
    validated: int,
) -> None:
    """It stops after the running step without validating, within a validation without its other rows."""
    whole = fit("whole")
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    send = Send(number, row, during)
    with pytest.raises(Stopped) as stopped:
        fit("stopped", send, num_sanity_val_steps=0, min_steps=6)
    assert signal.getsignal(signal.SIGINT) == handlers[0]
    assert stopped.value.code == 128 + number
    assert step(tmp_path / "stopped") == stopped_at
    assert send.validated == validated
    resumed = fit("resumed", resume="stopped")
    assert step(tmp_path / "resumed") == 6
    for name, weight in whole.decoder.state_dict().items():
        assert torch.equal(weight, resumed.decoder.state_dict()[name]), name


@pytest.mark.usefixtures("read_late")
def test_a_signal_that_is_heard_late_stops_the_run_behind_the_next_whole_step(
    fit: Callable[..., FuyuModule], tmp_path: Path
) -> None:
    whole = fit("whole", log_every_n_steps=50)
    with pytest.raises(Stopped):
        fit("stopped", Send(signal.SIGTERM, 2), num_sanity_val_steps=0, log_every_n_steps=50)
    assert step(tmp_path / "stopped") == 3
    resumed = fit("resumed", resume="stopped", log_every_n_steps=50)
    for name, weight in whole.decoder.state_dict().items():
        assert torch.equal(weight, resumed.decoder.state_dict()[name]), name
    assert whole.tokens_seen == resumed.tokens_seen


def test_a_second_ctrl_c_is_not_held_back(fit: Callable[..., FuyuModule]) -> None:
    class Twice(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
            if index == 0:
                os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL

    with pytest.raises(Stopped):
        fit("twice", Twice())


def test_lightnings_own_handlers_stay_out(fit: Callable[..., FuyuModule], handlers: list[Any]) -> None:
    """Its one for SIGTERM broadcasts in the handler, in evaluation too."""
    found: list[Any] = []

    class Look(Callback):
        def on_sanity_check_start(self, *_: Any) -> None:
            found.append(signal.getsignal(signal.SIGTERM))

    fit("looked", Look())
    assert found == [handlers[1]]


RANKS: dict[str, list[int]] = {"first": [0], "second": [1], "both": [0, 1]}
VALIDATING = {"validate": 9, "signal": "SIGTERM", "ranks": [1], "when": "validating"}


@pytest.fixture(scope="module")
def runs(guarded_runs: Callable[..., tuple[Path, dict[str, Any]]]) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run on two processes, stopped ones, and those resumed."""
    stops = [
        {"name": name, "signal": "SIGTERM", "ranks": ranks, "row": 4 + 5 * number}
        for number, (name, ranks) in enumerate(RANKS.items())
    ]
    stops.append({"name": "validating", **VALIDATING})
    resumed = [{"name": f"{stop['name']}-resumed", "resume": stop["name"]} for stop in stops]
    job = {"ranks": [0, 1], "row": 4, "group": True, "workers": 2}
    jobs = [{"name": number, "signal": number, **job} for number in ("SIGINT", "SIGTERM")]
    return guarded_runs({"name": "whole"}, *stops, *resumed, *jobs)


@pytest.mark.parametrize("name", [*RANKS, "validating"])
def test_whichever_rank_hears_sigterm_all_leave_and_the_run_goes_on_bitwise(
    runs: tuple[Path, dict[str, Any]], name: str
) -> None:
    folder, results = runs
    log = (folder / name / "0.log").read_text()
    assert results[name]["codes"] == [143, 143], log
    assert "SIGTERM at step" in log
    assert results[f"{name}-resumed"]["codes"] == [0, 0], (folder / f"{name}-resumed" / "0.log").read_text()
    stopped_at = step(folder / name)
    assert 0 < stopped_at < 8
    for rank in range(2):
        whole, resumed = (
            json.loads((folder / run / f"{rank}.json").read_text()) for run in ("whole", f"{name}-resumed")
        )
        # Weights, thresholds and the optimizer's state after each step, in the resumed run from where it began.
        assert resumed["after_step"] == whole["after_step"][stopped_at:]
        assert resumed["losses"] == whole["losses"][stopped_at:]
        assert resumed["rows"] == whole["rows"][stopped_at * 3 :]
    assert len(set(whole["after_step"])) == 9


def test_a_rank_that_validates_hears_of_another_ones_signal(runs: tuple[Path, dict[str, Any]]) -> None:
    """It has twelve rows to validate, and the other one hears the signal in its first or second."""
    assert int((runs[0] / "validating" / "0.validating").read_text()) < 12


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_to_every_process_of_a_job_spares_the_loaders_workers(
    runs: tuple[Path, dict[str, Any]], name: str, code: int
) -> None:
    """As Ctrl-C in a terminal and SLURM send it."""
    folder, results = runs
    assert results[name]["codes"] == [code, code], (folder / name / "0.log").read_text()
    assert 0 < step(folder / name) < 8
