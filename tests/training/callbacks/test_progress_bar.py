"""What a person sees while training runs is of the last step, and is not what the training waits for."""

import io
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from rich import reconfigure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.training.callbacks.bad_steps import BadSteps
from fuyu_e2e.training.callbacks.checkpoints import Checkpoints
from fuyu_e2e.training.callbacks.last_checkpoint import LastCheckpoint
from fuyu_e2e.training.callbacks.progress_bar import Progress, progress
from fuyu_e2e.training.callbacks.step_lines import StepLines, duration
from fuyu_e2e.training.callbacks.throughput import Throughput
from fuyu_e2e.training.module import FuyuModule


class Look(Callback):
    """Reads the bar after each step, and what the step was."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.shown: list[dict[str, Any]] = []
        self.norms: list[float] = []
        self.tokens: list[int] = []
        self.monitored: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self.norms.append(float(module._gradient_norm))
            self.tokens.append(module.tokens_seen)
            self.monitored.append(float(trainer.callback_metrics["train/loss"]))

    def on_before_zero_grad(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        self.shown.append(self.bar.get_metrics(trainer, module))


@pytest.mark.parametrize("rows", [1, 2])
def test_the_bar_shows_each_step_and_curves_those_that_are_logged(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path, rows: int
) -> None:
    bar = Progress()
    look = Look(bar)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=7,
        accumulate_grad_batches=rows,
        logger=TensorBoardLogger(tmp_path, name="", version=""),
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=3,
        callbacks=[BadSteps(), bar, look],
    )
    trainer.fit(FuyuModule(config), question_data(budget=64))
    events = EventAccumulator(str(tmp_path)).Reload()
    for name, told in (("train/gradient_norm", look.norms), ("tokens", look.tokens), ("train/loss", look.monitored)):
        logged = events.Scalars(name)
        assert [event.step for event in logged] == [2, 5]
        assert [event.value for event in logged] == pytest.approx([told[event.step] for event in logged])
    assert [event.value for event in events.Scalars("bad_steps/skipped")] == [0, 0]
    assert len(set(look.monitored)) == 7  # a new one for each step, for those who monitor it
    for shown, loss, tokens in zip(look.shown[1:], look.monitored, look.tokens, strict=False):
        assert shown["train/loss"] == f"{loss:.3f}"
        assert shown["tokens"] == str(tokens)
    assert bar.progress is not None
    assert bar.progress.live.refresh_per_second <= 10  # each time stops the training while it is drawn


@pytest.mark.parametrize("rows", [1, 2])
def test_the_bar_of_a_resumed_run_ends_where_the_run_does(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path, rows: int
) -> None:
    for steps, checkpoint in ((2, None), (5, tmp_path / "two.ckpt")):
        bar = Progress()
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            accumulate_grad_batches=rows,
            logger=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[bar],
        )
        trainer.fit(FuyuModule(config), question_data(budget=64), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "two.ckpt")
        assert bar.progress is not None
        (task,) = bar.progress.tasks
        assert (task.completed, task.total) == (steps, steps)
        assert "Epoch" not in task.description


@pytest.mark.parametrize("steps", [3, 40])
def test_without_a_terminal_lines_say_how_far_a_run_is(
    config: FuyuConfig,
    question_data: Callable[..., FuyuDataModule],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
) -> None:
    """With a clock of 4 seconds a step: no line for each logged step, one within each 30 seconds, and what happens."""
    clock = {"now": 1_000.0}

    class Tick(Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            clock["now"] += 4.0

    monkeypatch.setattr("fuyu_e2e.training.callbacks.step_lines.time", SimpleNamespace(monotonic=lambda: clock["now"]))
    monkeypatch.setattr("fuyu_e2e.training.callbacks.step_lines.SILENT_SECONDS", 30.0 if steps > 3 else 1e9)
    lines = progress()
    assert isinstance(lines, StepLines), "pytest's output is no terminal"
    pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=2,
        val_check_interval=2 * (steps - 1),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_model_summary=False,
        log_every_n_steps=1 if steps < 40 else 16,
        default_root_dir=tmp_path,
        callbacks=[Tick(), Throughput(), lines, LastCheckpoint(), Checkpoints(tmp_path / "kept", save_last="link")],
    ).fit(FuyuModule(config), question_data(val=str(tmp_path / "val.tar")))
    printed = capsys.readouterr().out.splitlines()
    told = [line for line in printed if re.match(rf"step \d+/{steps}  loss [\d.]+", line)]
    assert [int(re.findall(r"\d+", line)[0]) for line in told] == ([1, 3] if steps == 3 else [1, 9, 16, 24, 32, 40])
    if steps == 40:
        assert re.fullmatch(r"step 16/40  loss [\d.]+  [\d.]+[kM]? tokens/s  2 min left", told[2])
    of_validation = [line for line in printed if re.match(rf"step {steps - 1}/{steps}  val/loss [\d.]+", line)]
    assert len(of_validation) == 1
    saved = [line.split("saving ")[1] for line in printed if "saving" in line]
    assert len(saved) == 2
    assert Path(saved[-1]).name == f"step={steps}.ckpt"
    assert [line for line in printed if not line.startswith("step ") and "available" not in line] == []


def test_a_terminal_gets_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    assert isinstance(progress(), Progress)


def test_a_line_stands_in_the_file_as_soon_as_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(file))
    StepLines().say("step 1/3")
    assert file.getvalue() == b"step 1/3\n"


def test_a_long_validation_says_now_and_then_that_it_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fuyu_e2e.training.callbacks.step_lines.time", SimpleNamespace(monotonic=lambda: 1_000.0))
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    lines = StepLines()
    for number in (40, 41):
        lines.on_validation_batch_end(trainer, None, None, None, number)
    assert "validation: 41 batches\n" in capsys.readouterr().out
    lines.on_validation_batch_end(trainer, None, None, None, 42)
    assert "validation" not in capsys.readouterr().out


def test_only_the_first_process_prints_lines(capsys: pytest.CaptureFixture[str]) -> None:
    lines = StepLines()
    lines.disable()
    lines.say("no")
    lines.enable()
    lines.say("yes")
    assert capsys.readouterr().out == "yes\n"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (89.0, "89 s"), (90.0, "2 min"), (3_540.0, "59 min"), (3_600.0, "1 h 0 min"),
     (12_000.0, "3 h 20 min"), (187_300.0, "2 d 4 h")],
)  # fmt: skip
def test_times_are_said_as_people_do(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_log_messages_stand_above_the_bar(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path
) -> None:
    """As what Ctrl-C prints. Lightning's handler keeps the stream of the import, which rich doesn't know of."""
    terminal, handler = io.StringIO(), logging.StreamHandler(io.StringIO())
    logger, before = logging.getLogger("lightning.pytorch"), handler.stream
    logger.addHandler(handler)

    class Say(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            logger.warning("said while the bar is there")

    bar = Progress()
    bar._console_kwargs = {"file": terminal, "force_terminal": True, "width": 120}
    try:
        pl.Trainer(
            accelerator="cpu", max_steps=2, logger=False, enable_model_summary=False, enable_checkpointing=False,
            callbacks=[bar, Say()],
        ).fit(FuyuModule(config), question_data(budget=64))  # fmt: skip
    finally:
        logger.removeHandler(handler)
        reconfigure()
    assert "said while the bar is there" in terminal.getvalue()
    assert handler.stream is before
    assert "said" not in before.getvalue()


def test_no_step_reads_the_device_for_the_bar(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path
) -> None:
    """The bar asks Lightning for none of its tensors."""
    bar = Progress()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[bar],
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl.Trainer, "progress_bar_metrics", property(lambda trainer: pytest.fail("read")))
        trainer.fit(FuyuModule(config), question_data(budget=64))
