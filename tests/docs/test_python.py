"""The code of docs/python.md runs as it is printed, and what it says of callbacks is true."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from fuyu_e2e.checkpoint.loading import read_model
from fuyu_e2e.data.tokenizer import train_tokenizer
from fuyu_e2e.errors import UserError
from fuyu_e2e.tasks.picture_shards import write_picture_shards
from fuyu_e2e.training.callbacks.signals import Stopped
from fuyu_e2e.training.checkpoint_io import BackgroundCheckpointIO
from fuyu_e2e.training.module import FuyuModule
from fuyu_e2e.training.settings.recipe import FuyuCLI


def blocks(page: Path) -> list[str]:
    """The Python of a page, block by block."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_png: Callable[..., bytes]) -> Path:
    """What the page starts from: shards, a tokenizer and a picture."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "shards").mkdir()

    def samples(numbers: range) -> Iterator[dict[str, Any]]:
        for number in numbers:
            picture, caption = make_png(12, 8 + number, seed=number), f"picture {number}"
            yield {"__key__": str(number), "png": picture, "txt": caption.encode()}

    for split, count in (("train", 16), ("val", 4)):
        write_picture_shards(folder / "shards", split, samples, count, processes=1, shard_size=count)
    train_tokenizer([f"picture {number}" for number in range(20)], 290).save(folder / "tokenizer.model")
    (folder / "a.png").write_bytes(make_png(20, 30))
    return folder


@pytest.fixture(scope="module")
def page(folder: Path, repository: Path) -> Iterator[dict[str, Any]]:
    """What the names of the page stand for once all of its blocks have run."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("PL_GLOBAL_SEED", raising=False)
        for number, block in enumerate(blocks(repository / "docs/python.md")):
            exec(compile(block, f"docs/python.md, block {number}", "exec"), names)
        yield names


def test_the_page_trains_generates_and_resumes(page: dict[str, Any], folder: Path) -> None:
    assert page["tokens"]
    assert read_model(folder / "runs/plain").provenance.step == 10
    assert read_model(folder / "runs/mine").provenance.step == 15
    assert page["trainer"].global_step == 10
    assert page["trainer"].callback_metrics["data/longest_document"] > 0


class StopAt(Callback):
    """Signals its own process within a step, as a preempted job is."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: torch.Tensor) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_the_page_s_trainer_leaves_for_a_signal_and_resumes_bit_for_bit(page: dict[str, Any], folder: Path) -> None:
    def train(root: str, *callbacks: Callback, **options: Any) -> None:
        pl.seed_everything(1)
        page["run"](root, *callbacks, max_steps=7).fit(FuyuModule(page["decoder"]), page["data"], **options)

    train("runs/unstopped")
    with pytest.raises(Stopped) as stopped:
        train("runs/stopped", StopAt(3))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert read_model(folder / "runs/stopped").provenance.step == 4
    train("runs/stopped", ckpt_path="runs/stopped/checkpoints")
    unstopped, resumed = (read_model(folder / "runs" / name).weights for name in ("unstopped", "stopped"))
    assert all(torch.equal(unstopped[name], resumed[name]) for name in unstopped)


def test_the_page_names_all_that_the_command_line_adds(repository: Path) -> None:
    page = (repository / "docs/python.md").read_text()
    recipe = repository / "recipes/quickstart.yaml"
    trainer = FuyuCLI([f"--config={recipe}", "--trainer.accelerator=cpu"], run=False).trainer
    added = [*trainer.callbacks, *trainer.loggers, trainer.profiler, BackgroundCheckpointIO()]
    ours = {type(one).__name__ for one in added if type(one).__module__.startswith("fuyu_e2e")}
    table = page[page.index("| promise | pass |") :].partition("\n\n")[0]
    assert ours - {"SaveRecipe"} <= set(re.findall(r"`(\w+)`", table))  # it saves a command line


def test_a_module_without_our_data_says_what_to_pass(page: dict[str, Any]) -> None:
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    loader = torch.utils.data.DataLoader(torch.zeros(1))
    with pytest.raises(UserError, match=r"trainer\.fit\(module, FuyuDataModule"):
        trainer.fit(FuyuModule(page["decoder"]), train_dataloaders=loader)
