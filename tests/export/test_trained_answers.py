"""What a trained model says, it says in stock transformers too: run as its card says, on pictures that must be scaled.

A captioner and a model that answers questions overfit the same few pictures, each in a run of `fuyu-e2e fit`.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
import yaml
from PIL import Image as Pillow

import fuyu_e2e
from fuyu_e2e.cli import main
from fuyu_e2e.recipe import FuyuCLI
from fuyu_e2e.tokenizer import train_tokenizer

pytest.importorskip("transformers", reason="needs the extra `transformers`")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

QUESTION = "What is it?"
"""What the card asks."""
LARGEST = [64, 96]
COLORS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (30, 60, 200), "white": (240, 240, 240)}
PICTURES = {
    "red beside blue": ("png", 150, 200),
    "blue beside red": ("jpg", 300, 180),
    "green beside white": ("webp", 90, 70),
    "white beside green": ("png", 40, 50),
    "red beside green": ("jpg", 70, 500),
}
"""What each says, and its format, height and width; all but one exceed `LARGEST`."""


@dataclass(frozen=True)
class Trained:
    """A run that has learnt its pictures by heart."""

    run: Path
    pictures: dict[str, Path]
    """The file of each, by what is to be said of it."""
    question: str | None
    """What it was trained to be asked; None where it writes captions."""


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def command(*arguments: object) -> int:
    """The exit code of a command."""
    before, sys.argv = sys.argv, ["fuyu-e2e", *map(str, arguments)]
    try:
        return main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    files = {}
    for number, (said, (extension, height, width)) in enumerate(PICTURES.items()):
        rng = np.random.default_rng(number)
        pixels = np.empty((height, width, 3))
        left, right = said.split(" beside ")
        pixels[:, : width // 2], pixels[:, width // 2 :] = COLORS[left], COLORS[right]
        pixels += rng.normal(0, 12, pixels.shape)  # something for the scaling to average
        files[said] = folder / f"{number}.{extension}"
        Pillow.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(files[said])
    return files


def train(folder: Path, pictures: dict[str, Path], question: str | None) -> Trained:
    with webdataset.TarWriter(str(folder / "train.tar")) as writer:
        for key, (said, file) in enumerate(pictures.items()):
            sample = {"__key__": f"{key}", file.suffix[1:]: file.read_bytes()}
            if question is None:
                sample["txt"] = said
            else:
                turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": said}]
                sample["json"] = json.dumps({"conversations": turns}).encode()
            writer.write(sample)
    train_tokenizer([*pictures, QUESTION] * 5, 300).save(folder / "tokenizer.model")
    shape = {"layers": 2, "width": 64, "heads": 2, "kv_heads": 2, "head_size": 32, "feed_forward": 128}
    recipe = {
        "seed_everything": 0,
        "trainer": {
            "max_steps": 80,
            "default_root_dir": str(folder / "run"),
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "gradient_clip_val": 1.0,
        },
        "model": {
            "decoder": {"vocab_size": 300, "patch_size": 8, **shape},
            "optimizer": {"name": "adamw", "lr": 5e-3, "weight_decay": 0.0},
        },
        "data": {
            "train": str(folder / "train.tar"),
            "tokenizer": str(folder / "tokenizer.model"),
            "budget": 512,
            "max_patches": 96,
            "max_size": LARGEST,
            "lanes": 1,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    FuyuCLI(["fit", f"--config={folder / 'recipe.yaml'}"])
    return Trained(folder / "run", pictures, question)


@pytest.fixture(scope="module")
def runs(pictures: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """A captioner, and a model that answers questions."""
    return {
        name: train(tmp_path_factory.mktemp(name), pictures, question)
        for name, question in (("captioner", None), ("answerer", QUESTION))
    }


@pytest.fixture(params=["captioner", "answerer"])
def trained(request: pytest.FixtureRequest, runs: dict[str, Trained]) -> Trained:
    return runs[request.param]


def said_by(model: Path, trained: Trained) -> dict[str, str]:
    """What a model of ours says of each picture, asked as it was trained to be."""
    decoder, processor = fuyu_e2e.load(model)
    asked = () if trained.question is None else (trained.question,)
    prompts = [processor(file, *asked) for file in trained.pictures.values()]
    written = fuyu_e2e.generate(decoder, prompts, max_new_tokens=32, eos_id=processor.eos_id)
    return dict(zip(trained.pictures, map(processor.decode, written), strict=True))


def code_of(card: Path) -> str:
    """The only code in a card."""
    [code] = re.findall(r"^```python\n(.*?)^```$", card.read_text(), re.MULTILINE | re.DOTALL)
    return code


@pytest.fixture(scope="module")
def said_in_stock(
    runs: dict[str, Trained], run_stock: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> dict[Path, dict[str, str]]:
    """What the code in each run's exported card prints of each picture, in a process with stock transformers."""
    folder = tmp_path_factory.mktemp("stock")
    driver = [f"import os, shutil\nos.chdir({str(folder)!r})\n"]
    for name, trained in runs.items():
        assert command("export", "--checkpoint", trained.run, "--out", folder / name, "--to", "transformers") == 0
        code = code_of(folder / name / "README.md")
        for file in trained.pictures.values():
            driver.append(f"shutil.copy({str(file)!r}, 'a.png')\nprint('>', end='')\nexec({code!r}, {{}})\n")
    (folder / "driver.py").write_text("".join(driver))
    printed = [line[1:] for line in run_stock([folder / "driver.py"]).splitlines() if line.startswith(">")]
    asked = [(trained.run, said) for trained in runs.values() for said in trained.pictures]
    answers: dict[Path, dict[str, str]] = {}
    for (run, said), answer in zip(asked, printed, strict=True):
        answers.setdefault(run, {})[said] = answer
    return answers


def test_the_card_s_code_says_in_stock_transformers_what_we_say(
    trained: Trained, said_in_stock: dict[Path, dict[str, str]]
) -> None:
    ours = said_by(trained.run, trained)
    assert ours == {said: said for said in trained.pictures}, "the model has not learnt its pictures"
    assert said_in_stock[trained.run] == ours


def test_imported_back_it_says_the_same(trained: Trained, tmp_path: Path) -> None:
    assert command("export", "--checkpoint", trained.run, "--out", tmp_path / "stock", "--to", "transformers") == 0
    assert command("import", "--from", tmp_path / "stock", "--out", tmp_path / "back") == 0
    assert said_by(tmp_path / "back", trained) == {said: said for said in trained.pictures}


def test_the_code_in_our_own_card_says_it_too(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command("export", "--checkpoint", trained.run, "--out", tmp_path / "own") == 0
    for said, file in trained.pictures.items():
        shutil.copy(file, tmp_path / "a.png")
        capsys.readouterr()
        with working_in(tmp_path), torch.inference_mode():
            exec(code_of(tmp_path / "own" / "README.md"), {})
        assert capsys.readouterr().out.strip() == said
