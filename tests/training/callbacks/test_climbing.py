"""A mixture climbs at the validation that is good enough, from the step after next on, wherever the run stops."""

import io
import tarfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.data.shards.mixture import Climb, Source
from fuyu_e2e.errors import UserError
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.training.callbacks.climbing import Climbing
from fuyu_e2e.training.callbacks.data_report import DataReport
from fuyu_e2e.training.module import FuyuModule

ROWS_PER_STEP, STEPS = 2, 7
EVER, NEVER = 1e9, -1.0
"""Losses that each validation reaches, and none."""
WEIGHTS = ({0: 1.0, 1: 0.0, 2: 1.0}, {0: 0.0, 1: 1.0, 2: 1.0})
STOPS = ("row-4", "validated-4", "row-5", "row-6", "row-8", "validated-8", "row-9")
"""Checkpoints, after so many rows, of a run that validates after four: before and after it, and within steps."""
STOPS_WITHIN_STEPS = ("row-4", "row-5", "validated-5", "row-6", "row-10", "validated-10")
"""The same of one that validates after five rows, in the midst of a step."""


class Watch(Callback):
    """Writes down the rows and what is logged, and saves after rows, before and after their validation."""

    def __init__(self, folder: Path, save: tuple[str, ...]) -> None:
        self.folder = folder
        self.wanted = save
        self.keys: list[tuple[str, ...]] = []
        self.read: list[set[str]] = []
        """The sources of which documents were read for each row."""
        self.logged: list[tuple[float, float]] = []
        """The rung and the share of `b`, after each step."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        row = trainer.datamodule.row
        self.keys.append(row.keys)
        self.read.append(set(row.stats.read_of))
        if len(self.keys) % ROWS_PER_STEP == 0:
            rung, share = (float(trainer.callback_metrics[f"data/{name}"]) for name in ("rung", "share_asked/b"))
            self.logged.append((rung, share))
        self.save(trainer, "row")

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.save(trainer, "validated")

    def save(self, trainer: pl.Trainer, when: str) -> None:
        if (name := f"{when}-{len(self.keys)}") in self.wanted:
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")


Data = Callable[..., FuyuDataModule]
Fit = Callable[..., Watch]


@pytest.fixture
def data(question_data: Callable[..., FuyuDataModule], tmp_path: Path) -> Data:
    """Makes a data module over sources `a` and `b`, with a ladder."""
    for name in "ab":
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for number in range(40):
                content = f"a red square {number}".encode()
                info = tarfile.TarInfo(f"{name}{number}.txt")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    def make(climb: Climb | None, weights: Any = WEIGHTS, **changed: Any) -> FuyuDataModule:
        mixture = {name: Source(f"{tmp_path}/{name}.tar", kept) for name, kept in zip("ab", weights, strict=True)}
        settings = {"train": None, "mixture": mixture, "val": f"{tmp_path}/val.tar", "budget": 64, "lanes": 4}
        return question_data(**settings | {"climb": climb} | changed)

    return make


@pytest.fixture
def fit(config: FuyuConfig, data: Data, tmp_path: Path) -> Fit:
    """Trains, from a checkpoint on if it is told one, and saves others."""

    def fit(
        climb: Climb | None,
        *,
        save: tuple[str, ...] = (),
        resume: str | None = None,
        validate_after: int = 4,
        callbacks: Any = (Climbing(),),
        trainer: dict[str, Any] | None = None,
        **changed: Any,
    ) -> Watch:
        torch.manual_seed(0)
        watch = Watch(tmp_path, save)
        settings: dict[str, Any] = {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "accumulate_grad_batches": ROWS_PER_STEP,
            "val_check_interval": validate_after,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [DataReport(), *callbacks, watch],
        }
        run = pl.Trainer(**settings | (trainer or {}))
        run.fit(FuyuModule(config), data(climb, **changed), ckpt_path=tmp_path / f"{resume}.ckpt" if resume else None)
        return watch

    return fit


@pytest.mark.parametrize(
    ("at", "validate_after", "rungs"),
    [
        ([EVER, EVER], 4, [(0, {"a"}), (6, {"b"}), (10, {"a", "b"})]),
        ([EVER, NEVER], 5, [(0, {"a"}), (6, {"b"})]),  # within a step
        ([NEVER, EVER], 4, [(0, {"a"})]),
        ([EVER, EVER], 1, [(0, {"a"}), (2, {"b"}), (4, {"a", "b"})]),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_rung_holds_from_the_step_after_next_on(
    fit: Fit, caplog: pytest.LogCaptureFixture, at: list[float], validate_after: int, rungs: Any, workers: int
) -> None:
    caplog.set_level("INFO")
    watch = fit(Climb("val/loss", at), validate_after=validate_after, workers=workers, mix_by="documents")
    firsts = [first for first, _ in rungs] + [STEPS * ROWS_PER_STEP]
    found = [set().union(*watch.read[first:end]) for first, end in pairwise(firsts)]
    assert found == [sources for _, sources in rungs]
    climbs = [record.message for record in caplog.records if "The mixture climbs" in record.message]
    assert len(climbs) == len(rungs) - 1
    for number, ((first, _), said) in enumerate(zip(rungs[1:], climbs, strict=True)):
        assert f"from rung {number} to {number + 1}, since val/loss is " in said
        assert f"hold from step {first // ROWS_PER_STEP + 1} on" in said
    # After a step, the shares and the rung are those of the next.
    rung_of = [sum(first <= step * ROWS_PER_STEP for first, _ in rungs) - 1 for step in range(1, STEPS)]
    assert watch.logged[:-1] == [(rung, [0, 1, 0.5][rung]) for rung in rung_of]


@pytest.mark.parametrize(("validate_after", "stops"), [(4, STOPS), (5, STOPS_WITHIN_STEPS)])
def test_a_run_that_stops_anywhere_around_its_climbs_goes_on_with_the_same_rows(
    fit: Fit, validate_after: int, stops: tuple[str, ...]
) -> None:
    climb = Climb("val/loss", [EVER, EVER])
    whole = fit(climb, save=stops, validate_after=validate_after)
    for number, stop in enumerate(stops):
        done = int(stop.split("-")[1]) // ROWS_PER_STEP
        resumed = fit(climb, resume=stop, validate_after=validate_after, workers=2 * (number % 2))
        assert resumed.keys == whole.keys[done * ROWS_PER_STEP :], stop
        assert resumed.read == whole.read[done * ROWS_PER_STEP :], stop
        assert resumed.logged == whole.logged[done:], stop


def test_when_to_climb_may_change_in_a_run_that_goes_on_but_not_whether(fit: Fit) -> None:
    """A checkpoint from before there were ladders says nothing of them."""
    fit(Climb("val/loss", [NEVER, NEVER]), save=("row-4",), trainer={"max_steps": 2})
    assert fit(Climb("val/loss", [EVER, NEVER]), resume="row-4").logged[-1] == (1, 1)
    with pytest.raises(UserError, match=r"data\.climb is not what it was \(set there, not set here\)"):
        fit(None, resume="row-4")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no mixture": ({"mixture": None, "train": "x.tar"}, r"no data\.mixture whose weights could climb"),
    "a key that is no rung": ({"weights": ({0: 1.0, 3: 1.0}, 1.0)}, r"of a .* has the key 3, .* rungs are 0 to 2"),
    "a key below all": ({"weights": (1.0, {-1: 1.0})}, r"weight of b .* has the key -1"),
    "a rung of nothing": ({"weights": ({0: 1.0, 1: 0.0}, {1: 0.0, 2: 1.0})}, r"At rung 1 the weights .* are 0"),
    "no validation": ({"val": None}, r"no data\.val whose figures tell when to climb"),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "sentence"), REFUSED.values(), ids=REFUSED)
def test_data_without_a_ladder_are_refused(data: Data, changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        data(Climb("val/loss", [1.0, 1.0]), **changed)


@pytest.mark.parametrize(
    ("monitor", "at", "sentence"),
    [
        ("val/loss", [], r"data\.climb\.at is \[\]"),
        ("val/loss", [1.0, float("nan")], r"data\.climb\.at is \[1\.0, nan\]"),
        ("train/loss", [1.0], r"data\.climb\.monitor is train/loss, .* a validation: name a figure"),
    ],
)
def test_a_ladder_without_figures_is_refused(monitor: str, at: list[float], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Climb(monitor, at)


@pytest.mark.parametrize(("mode", "reached"), [("max", [False, True, True]), ("min", [True, True, False])])
def test_a_figure_is_reached_from_below_or_from_above_and_the_last_rung_is_never_left(
    mode: Any, reached: list[bool]
) -> None:
    climb = Climb("val/exact_match", [0.9, 0.2], mode)
    assert [climb.reached(1, value) for value in (0.1, 0.2, 0.3)] == reached
    assert not climb.reached(0, float("nan"))
    assert not climb.reached(2, 0.2)


def test_a_run_that_could_not_climb_is_refused_at_its_start(fit: Fit) -> None:
    reaches = Climb("val/loss", [EVER, EVER])
    with pytest.raises(UserError, match=r"no callback climbs: add .*climbing\.Climbing\(\)"):
        fit(reaches, callbacks=())
    with pytest.raises(UserError, match=r"trainer\.overfit_batches repeats the first rows"):
        fit(reaches, trainer={"overfit_batches": 2, "num_sanity_val_steps": 0})
    with pytest.raises(UserError, match=r"trainer\.limit_val_batches is 0, so that no validation tells"):
        fit(reaches, trainer={"limit_val_batches": 0})
    with pytest.raises(UserError, match=r"data\.climb\.monitor is val/accuracy, which this validation didn't log"):
        fit(Climb("val/accuracy", [EVER, EVER]))
