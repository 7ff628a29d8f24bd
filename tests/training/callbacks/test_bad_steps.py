"""A step that is no number, or out of line, changes nothing on any rank, is reported by its samples, and ends no run.

Unless it is one of many.
"""

import json
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fuyu_e2e.checkpoint.lightning_io import read_checkpoint
from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.errors import UserError
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.routing.config import RoutingConfig
from fuyu_e2e.training.callbacks.bad_steps import BadSteps, TooManyBadStepsError
from fuyu_e2e.training.module import FuyuModule
from fuyu_e2e.training.optimizers import OptimizerConfig
from fuyu_e2e.training.step import PendingStep, StepFigures, judge_step


class Plant(Callback):
    """Spoils the gradient of chosen steps, and keeps the rows of each and all that it left behind."""

    def __init__(self, *steps: int, value: float = math.nan) -> None:
        self.steps, self.value = steps, value
        self.left: list[dict[str, torch.Tensor]] = []
        self.keys: list[tuple[str, ...]] = []
        self.lr: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
        self.keys.append(trainer.datamodule.row.keys)
        assert batch.document_ids == tuple(zlib.crc32(key.encode()) for key in self.keys[-1])

    def on_after_backward(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.global_step in self.steps:
            module.decoder.patch_projection.bias.grad[0] = self.value

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self.left.append({name: value.clone() for name, value in everything(trainer, module).items()})
            self.lr.append(trainer.optimizers[0].param_groups[0]["lr"])


def everything(trainer: pl.Trainer, module: FuyuModule) -> dict[str, torch.Tensor]:
    """Weights, thresholds and histograms, and what the optimizer keeps."""
    states = trainer.optimizers[0].state.values()
    kept = {f"{n}.{name}": value for n, state in enumerate(states) for name, value in state.items()}
    return module.decoder.state_dict() | kept


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def fit(config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path) -> Callable[..., pl.Trainer]:
    """Trains a routed model for six steps of two rows."""

    def fit(plant: Plant, guard: BadSteps, more: Sequence[Callback] = (), **settings: Any) -> pl.Trainer:
        torch.manual_seed(3)
        module = FuyuModule(config, optimizer=OptimizerConfig(name="muon"), routing=RoutingConfig(share=0.5))
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=6,
            accumulate_grad_batches=2,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[guard, plant, *more],
            **{"logger": False, "gradient_clip_val": 1.0, "log_every_n_steps": 1, "enable_checkpointing": False}
            | settings,
        )
        trainer.fit(module, question_data())
        return trainer

    return fit


def test_a_skipped_step_changes_nothing_but_is_a_step(
    fit: Callable[..., pl.Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights, thresholds, optimizer state and counters are those of the step before; rates and data go on."""
    plant, guard = Plant(0, 3), BadSteps()
    with caplog.at_level("INFO"):
        trainer = fit(plant, guard, logger=TensorBoardLogger(tmp_path, name="", version=""))
    assert guard.skipped == 2
    assert trainer.global_step == 6
    changed = [not same(*pair) for pair in zip(plant.left[:-1], plant.left[1:], strict=True)]
    assert changed == [True, True, False, True, True]
    assert all(torch.isfinite(value).all() for value in plant.left[-1].values() if value.is_floating_point())
    assert len(set(plant.lr)) == 6
    assert "Step 4 is skipped: its gradient norm is nan." in caplog.text
    assert "Step 4 is skipped: its gradient norm is nan. Samples: " + ", ".join([*plant.keys[6], *plant.keys[7]]) in (
        caplog.text
    )
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("bad_steps/skipped")] == [1, 1, 1, 2, 2, 2]
    told = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("bad_steps/samples/text_summary")]
    assert [key for key in plant.keys[6] if key not in told[1]] == []


def test_a_skipped_first_step_leaves_the_optimizers_state_as_new(fit: Callable[..., pl.Trainer]) -> None:
    plant = Plant(0)
    fit(plant, BadSteps())
    kept = [value for name, value in plant.left[0].items() if name.endswith((".step", ".momentum", ".exp_avg"))]
    assert kept
    assert not any(value.any() for value in kept)
    [counter, *_] = [value for name, value in plant.left[-1].items() if name.endswith(".step")]
    assert counter == 5


def test_too_many_in_a_row_end_the_run_with_a_sentence(fit: Callable[..., pl.Trainer]) -> None:
    plant, guard = Plant(1, 3, 4), BadSteps(in_a_row=2)
    with pytest.raises(TooManyBadStepsError, match=r"2 steps in a row were skipped, .* weights are those of step 3,"):
        fit(plant, guard)
    assert guard.skipped == 3
    assert same(plant.left[2], plant.left[-1])


def test_steps_that_are_read_late_are_judged_alike(
    fit: Callable[..., pl.Trainer], caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    """Bad ones change nothing, though the host doesn't know of them yet."""
    runs = []
    for late in (False, True):
        if late:
            request.getfixturevalue("read_late")
        plant, guard = Plant(1, 3, 4), BadSteps()
        with caplog.at_level("INFO"):
            trainer = fit(plant, guard, log_every_n_steps=50)
        told = [line for line in caplog.messages if " is skipped: its gradient norm is nan. Samples: " in line]
        caplog.clear()
        runs.append((plant.left, plant.lr, guard.state_dict(), told, trainer.lightning_module.tokens_seen))
    for once, late in zip(runs[0][0], runs[1][0], strict=True):
        assert same(once, late)
    assert runs[0][1:] == runs[1][1:]
    assert len(runs[1][3]) == 3


@pytest.mark.usefixtures("read_late")
def test_too_many_that_are_read_late_end_the_run_before_another_step_is_done(fit: Callable[..., pl.Trainer]) -> None:
    plant = Plant(1, 2)
    with pytest.raises(TooManyBadStepsError, match=r"2 steps in a row were skipped, .* weights are those of step 1,"):
        fit(plant, BadSteps(in_a_row=2), log_every_n_steps=50)
    assert len(plant.left) == 3
    assert same(plant.left[0], plant.left[-1])


@pytest.mark.usefixtures("read_late")
def test_a_monitored_loss_is_that_of_its_own_step(fit: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, monitor="train/loss", save_top_k=-1, every_n_train_steps=1, filename="{step}")
    losses: dict[int, float] = {}

    class Guard(BadSteps):
        def judge(self, figures: StepFigures) -> None:
            losses[figures.step] = figures.loss

    fit(Plant(), Guard(), log_every_n_steps=50, enable_checkpointing=True, more=[saving])
    kept = {int(path.rpartition("=")[2].split(".")[0]): float(loss) for path, loss in saving.best_k_models.items()}
    assert sorted(kept) == [1, 2, 3, 4, 5, 6]
    assert kept == pytest.approx(losses)


def test_a_guard_is_gone_with_its_run(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, judged = FuyuModule(config), []
    monkeypatch.setattr(BadSteps, "judge", lambda self, figures: judged.append(figures))
    for callbacks in ([BadSteps()], []):
        pl.Trainer(
            accelerator="cpu", max_steps=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, callbacks=callbacks,
        ).fit(module, question_data())  # fmt: skip
    assert len(judged) == 2


def judged(guard: BadSteps, loss: float = 2.0, norm: float = 1.0) -> bool:
    """Whether a guard calls a step bad, of which it hears then."""
    greatest_loss, greatest_norm = guard.limits()
    bad = not (loss <= greatest_loss and norm <= greatest_norm)
    guard.judge(
        StepFigures(step=1, loss=loss, gradient_norm=norm, tokens=9, skipped=bad, votes=frozenset(), beside={})
    )
    return bad


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards that belong to no run, and report nothing."""
    monkeypatch.setattr(BadSteps, "_report", lambda *_: None)


@pytest.mark.usefixtures("silent")
def test_what_is_far_out_of_line_is_skipped_where_asked() -> None:
    guard, lenient = BadSteps(deviations=6.0), BadSteps()
    steps = [(2.0 + 0.1 * math.sin(step), 1.0 + 0.2 * math.cos(3 * step)) for step in range(100)]
    assert not any(judged(guard, *step) or judged(lenient, *step) for step in [(9.0, 9.0), *steps * 8])
    # Their deviations are 0.071 and 0.141; the first step, which no one would call bad, is forgotten by now.
    assert judged(guard, loss=3.5)
    assert judged(guard, norm=4.0)
    assert not judged(guard, loss=2.3, norm=1.5)
    assert not judged(guard, loss=-9.0, norm=0.0), "below is never bad"
    assert not judged(lenient, loss=1e9)
    assert all(judged(each, loss=loss) for each in (guard, lenient) for loss in (math.nan, math.inf))
    early = BadSteps(deviations=6.0)
    assert not any(judged(early, loss=loss) for loss in (2.0, 2.0, 50.0)), "too early to tell"


def test_a_guard_hears_the_very_numbers_that_were_compared_with_its_limits() -> None:
    """The host's own division would differ in the last bit, and call a step good that was skipped."""
    loss, squares, supervised = 300.0, 2.0, 49.0
    sums = torch.tensor([loss, squares, supervised, 60.0], dtype=torch.float64)
    on_device = judge_step(sums, 1, (1e9, 1.0))
    assert on_device.norm != math.sqrt(squares) / supervised
    figures = PendingStep(1, sums, on_device, votes=(), beside={}, replicas=1).read()
    assert (figures.loss, figures.gradient_norm) == (float(on_device.loss), float(on_device.norm))
    assert (figures.tokens, figures.skipped) == (60, False)


@pytest.mark.usefixtures("silent")
def test_a_resumed_guard_goes_on_where_it_was() -> None:
    guard, resumed = BadSteps(deviations=6.0), BadSteps(deviations=6.0)
    for step in range(150):
        judged(guard, 2 + math.sin(step), 1.0)
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert resumed.state_dict() == guard.state_dict()
    assert judged(resumed, 30.0, 1.0)


@pytest.mark.parametrize(("setting", "value"), [("in_a_row", 0), ("deviations", 0.0)])
def test_bad_settings(setting: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"bad_steps\.{setting} is {value}"):
        BadSteps(**{setting: value})


@pytest.fixture(scope="module")
def runs(guarded_runs: Callable[..., tuple[Path, dict[str, Any]]]) -> tuple[Path, dict[str, Any]]:
    """Runs on two processes in which one of them meets NaN."""
    return guarded_runs(
        {"name": "loss", "nan": "loss", "ranks": [1], "steps": [2]},
        {"name": "gradient", "nan": "gradient", "ranks": [0], "steps": [2, 5]},
        {"name": "for-ever", "nan": "loss", "ranks": [1], "steps": [*range(4, 99)], "save_every": 2},
    )


def seen(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((folder / name / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(("name", "steps"), [("loss", [2]), ("gradient", [2, 5])])
def test_nan_on_one_rank_is_skipped_on_all_and_the_run_goes_on(
    runs: tuple[Path, dict[str, Any]], name: str, steps: list[int]
) -> None:
    folder, results = runs
    log = (folder / name / "0.log").read_text()
    assert results[name]["codes"] == [0, 0], log
    ranks = seen(folder, name)
    assert ranks[0]["after_step"] == ranks[1]["after_step"]
    after = ranks[0]["after_step"]
    assert len(after) == 9
    assert [step for step in range(8) if after[step] == after[step + 1]] == steps
    assert [step for step in steps if f"Step {step + 1} is skipped" not in log] == []


def test_the_samples_of_the_rows_that_are_no_number_are_named(runs: tuple[Path, dict[str, Any]]) -> None:
    """The log of rank 0 names what rank 1 had in the second of its three rows, and nothing of the other five."""
    folder, _ = runs
    [named] = [line for line in (folder / "loss" / "0.log").read_text().splitlines() if "Samples: " in line]
    every = [line for line in (folder / "gradient" / "0.log").read_text().splitlines() if "Step 3 is skipped" in line]
    few, all_of_step = (line.split("Samples: ")[1].split(", ") for line in (named, every[0]))
    assert 0 < len(few) < len(all_of_step) / 3
    assert set(few) < {key.rstrip(".") for key in all_of_step} | {few[-1]}


def test_nan_for_ever_ends_the_run_with_a_sentence_and_good_checkpoints(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, results = runs
    logs = [(folder / "for-ever" / f"{rank}.log").read_text() for rank in range(2)]
    assert [log for log in logs if "TooManyBadStepsError: 3 steps in a row were skipped" not in log] == []
    assert results["for-ever"]["codes"] == [1, 1], "what an exception gives; the command line gives its exit code"
    newest = max((folder / "for-ever").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    state = read_checkpoint(newest)["state_dict"]
    assert all(weight.isfinite().all() for weight in state.values())
    ranks = seen(folder, "for-ever")
    last_good = ranks[1]["after_step"][4]
    assert ranks[0]["after_step"][4:] == [last_good] * 3 != ranks[0]["after_step"][3:6]
