"""What a start leaves behind: nothing where it is refused; where it is accepted, a run that says what it did."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fuyu_e2e.checkpoint.training_files import best_checkpoint, find_checkpoint, read_checkpoint
from fuyu_e2e.cli import main
from fuyu_e2e.datamodule import FuyuDataModule
from fuyu_e2e.estimate import estimated
from fuyu_e2e.model.config import named_size
from fuyu_e2e.training.module import FuyuModule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
RECIPE = {
    "trainer": {
        "max_steps": 4, "accelerator": "cpu", "accumulate_grad_batches": 2, "val_check_interval": 2,
        "check_val_every_n_epoch": None, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
    },
    "checkpoint": {"every_n_train_steps": 2},
    "model": {
        "decoder": {"vocab_size": 320, "patch_size": 4, "layers": 2, "width": 32, "heads": 2, "kv_heads": 1,
                    "head_size": 16, "feed_forward": 48},
        "max_new_tokens": 2,
    },
    "data": {"budget": 128, "lanes": 2, "shuffle": 4},
}  # fmt: skip


@pytest.fixture
def command(
    question_data: Callable[..., FuyuDataModule],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Callable[..., tuple[int, str]]:
    """Runs the command line in a folder with a recipe, a shard and a tokenizer; gives exit code and output."""
    data = {"tokenizer": "tokenizer.model", "train": "train.tar", "val": "train.tar"}
    recipe: dict[str, Any] = RECIPE | {"data": RECIPE["data"] | data}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")

    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fuyu-e2e", *arguments])
        capfd.readouterr()
        caplog.clear()
        code = main()
        printed = capfd.readouterr()
        return code, caplog.text + printed.out + printed.err

    return command


FIT = ("fit", "--config", "recipe.yaml", "--trainer.default_root_dir", "run")


def everything(folder: Path) -> dict[str, bytes | None]:
    """All files with what they hold, and all directories."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")
    }  # fmt: skip


def test_a_run_says_where_it_is_what_it_did_and_what_is_next_and_a_refused_start_changes_nothing_of_it(
    command: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    code, printed = command(*FIT)
    assert code == 0, printed
    folder = tmp_path / "run"
    best = best_checkpoint(folder)
    assert best is not None
    assert f"best     val/loss {best.value:.4g} at step {best.step}: run/checkpoints/{best.path.name}" in printed
    assert f"last     step 4: run/checkpoints/{find_checkpoint(folder).name}" in printed
    assert "used, 0 skipped" in printed
    assert "wait in shuffle and packing buffers" in printed
    assert "Done: 4 steps" in printed
    for said in ("evaluate --checkpoint run", "generate --checkpoint run", "export --checkpoint run",
                 "tensorboard --logdir run", "fit --config run/config.yaml --ckpt_path last"):  # fmt: skip
        assert said in printed
    assert "FLOPs" not in printed
    assert "2 blocks of width 32" in printed
    # Intervals count optimizer steps, of two micro-batches each here.
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [1, 3]

    before = everything(folder)
    last = ("--ckpt_path", "last", "--trainer.max_steps", "8")
    for wrong in (
        (*FIT, *last, "--data.lanes", "8"),
        (*FIT, *last, "--trainer.accumulate_grad_batches", "3"),
        (*FIT, *last, "--model.decoder.layers", "3"),
        (*FIT, *last, "--data.val", "nothing/*.tar"),
        (*FIT, *last, "--evaluate.tasks", "[none.yaml]"),
        FIT,
        ("predict", "--config", "run/config.yaml", "--data.predict", "nothing/*.tar", *last[:2]),
    ):
        code, printed = command(*wrong)
        assert code == 2, printed
        assert everything(folder) == before, wrong
    code, printed = command("validate", "--config", "run/config.yaml", *last[:2])
    assert code == 0, printed
    assert everything(folder) == before

    code, printed = command("fit", "--config", "run/config.yaml", *last)
    assert code == 0, printed
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_steps"] == 8
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == 8


def test_a_first_start_that_is_refused_leaves_no_directory(
    command: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    before = everything(tmp_path)
    for wrong in (("--model.decoder.vocab_size", "300"), ("--trainer.max_steps", "-1")):
        code, printed = command(*FIT, *wrong)
        assert code == 2, printed
        assert everything(tmp_path).keys() - before.keys() <= {"fuyu-manifest.json"}, wrong  # the shards' index


def test_predictions_replace_the_earlier_ones_when_they_are_complete(
    command: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(*FIT)[0] == 0
    predict = ("predict", "--config", "run/config.yaml", "--data.predict", "train.tar", "--ckpt_path", "last")
    code, printed = command(*predict)
    assert code == 0, printed
    assert f"8 continuations: {Path('run') / 'predictions.jsonl'}" in printed.replace(f"{tmp_path}{os.sep}", "")
    written = (tmp_path / "run" / "predictions.jsonl").read_text()
    assert written.count("\n") == 8
    shutil.copy(tmp_path / "train.tar", tmp_path / "more.tar")

    def fail_at_the_second(self: FuyuModule, batch: Any, batch_idx: int) -> Any:
        if batch_idx:
            raise ZeroDivisionError
        return [{"key": "other"}]

    monkeypatch.setattr(FuyuModule, "predict_step", fail_at_the_second)
    many = [f"copy{number}.tar" for number in range(5)]
    for name in many:
        shutil.copy(tmp_path / "train.tar", tmp_path / name)
    with pytest.raises(ZeroDivisionError):
        command(*predict[:3], "--data.predict", "copy*.tar", *predict[5:])
    assert (tmp_path / "run" / "predictions.jsonl").read_text() == written
    assert not list((tmp_path / "run").glob(".unfinished*"))


@pytest.mark.parametrize("rows", [1, 3])
def test_intervals_count_optimizer_steps_whatever_a_step_is_made_of(
    command: Callable[..., tuple[int, str]], tmp_path: Path, rows: int
) -> None:
    code, printed = command(*FIT, "--rows_per_step", str(rows), "--trainer.val_check_interval", "3")
    assert code == 0, printed
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [2]


def test_the_vocabulary_of_a_named_size_is_the_tokenizers(
    command: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """What is trained, stored, estimated and resumed alike."""
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe["model"]["decoder"] = "1m"
    recipe["trainer"]["max_steps"] = 2
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, printed = command(*FIT)
    assert code == 0, printed
    stored = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert stored["fuyu_e2e"]["decoder"]["vocab_size"] == 320
    assert stored["state_dict"]["decoder.embed_tokens.weight"].shape == (320, named_size("1m").width)
    code, printed = command("fit", "--config", "run/config.yaml", "--ckpt_path", "last", "--trainer.max_steps", "3")
    assert code == 0, printed
    parameters = sum(tensor.numel() for name, tensor in stored["state_dict"].items() if name.startswith("decoder."))
    assert estimated(["--config", "recipe.yaml"]).cost.parameters == parameters
