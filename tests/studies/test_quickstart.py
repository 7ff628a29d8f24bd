"""The quickstart from end to end, too short to learn anything."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image as Pillow

from fuyu_e2e.checkpoint.lightning_io import read_checkpoint
from fuyu_e2e.checkpoint.loading import load_model
from fuyu_e2e.cli import main
from fuyu_e2e.cli.quickstart import quickstart
from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.studies.quickstart import write_data
from fuyu_e2e.tasks.digits import VOCAB_SIZE, write_shards
from fuyu_e2e.training.callbacks.signals import STOP_SIGNALS, Stopped
from fuyu_e2e.training.module import FuyuModule

SMALL = ["--pictures", "400", "--test-pictures", "24"]


@pytest.fixture
def short(tmp_path: Path) -> Callable[[str], str]:
    """A shipped recipe whose steps are of two short rows, from a shuffle buffer that is filled at once."""

    def make(name: str) -> str:
        recipe = yaml.safe_load(shipped(f"recipes/{name}").read_text())
        recipe["data"] |= {"budget": 256, "lanes": 2, "shuffle": 8}
        path = tmp_path / name
        path.write_text(yaml.safe_dump(recipe))
        return str(path)

    return make


def test_the_quickstart_leaves_its_figures_and_pictures(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    assert quickstart(["--out", str(out), "--max-steps", "6", *SMALL]) == 0
    results = json.loads((out / "results.json").read_text())
    assert {
        "exact_match",
        "exact_match_new_sizes",
        "exact_match_images_exchanged",
        "seconds",
        "tokens_per_second",
    } <= set(results)
    assert results["steps"] == 6
    exported = {path.name for path in (out / "fuyu-digits").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "README.md"} <= exported
    assert 'text="Read the digits."' in (out / "fuyu-digits" / "README.md").read_text()
    assert Pillow.open(out / "contact_sheet.png").width > 1000
    assert f"fuyu-e2e generate --checkpoint {out}" in capfd.readouterr().out.replace("\n", " ").replace("  ", " ")


def test_pictures_to_train_on_are_made_on_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, int] = {}

    def write(folder: Path, *, split: str, count: int, seed: int, processes: int = 1) -> list[Path]:
        made[split] = processes
        return write_shards(folder, split=split, count=count, seed=seed)  # type: ignore[arg-type]

    monkeypatch.setattr("fuyu_e2e.studies.quickstart.write_shards", write)
    monkeypatch.setattr(os, "cpu_count", lambda: 24)
    write_data(tmp_path, seed=0, pictures=2, test_pictures=2)
    assert made["train"] == 24
    assert Tokenizer.from_file(tmp_path / "tokenizer.model").vocab_size == VOCAB_SIZE


def test_the_quickstart_with_routed_blocks_shows_its_depth(
    tmp_path: Path, short: Callable[[str], str], capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    recipe = short("quickstart-mod.yaml")
    assert quickstart(["--out", str(out), "--recipe", recipe, "--max-steps", "12", *SMALL]) == 0
    results = json.loads((out / "results.json").read_text())
    kinds = {"patches", "patches_with_ink", "patches_without_ink", "newlines", "text"}
    assert kinds <= set(results["share_of_depth"])
    assert Pillow.open(out / "depth_map.png").width > 500
    assert "patches with ink" in capfd.readouterr().out
    assert load_model(out / "fuyu-digits").decoder.config.routing is not None


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts back the handlers of signals: a run that was stopped leaves its own, for the process is to end."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_ctrl_c_leaves_a_checkpoint_that_the_printed_command_continues(
    tmp_path: Path, short: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    caplog.set_level("INFO")
    train = FuyuModule.training_step

    def interrupted(module: FuyuModule, batch: Any, batch_idx: int) -> Any:
        if module.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return train(module, batch, batch_idx)

    monkeypatch.setattr(FuyuModule, "training_step", interrupted)
    with pytest.raises(Stopped) as stopped:
        quickstart(["--out", str(out), "--recipe", short("quickstart.yaml"), "--max-steps", "4000", *SMALL])
    monkeypatch.setattr(FuyuModule, "training_step", train)
    assert stopped.value.code == 128 + signal.SIGINT
    assert f"Go on with: fuyu-e2e fit --config {out}/config.yaml --ckpt_path last" in caplog.text
    assert read_checkpoint(out / "checkpoints" / "last.ckpt")["global_step"] == 3
    more = ["fit", "--config", f"{out}/config.yaml", "--ckpt_path", "last", "--trainer.max_steps", "5"]
    monkeypatch.setattr(sys, "argv", ["fuyu-e2e", *more])
    assert main() == 0
    assert read_checkpoint(out / "checkpoints" / "last.ckpt")["global_step"] == 5
