"""What a trained model says, it says in stock transformers too: run as its card says, on pictures that must be scaled.

The model has learnt a caption of each of a few pictures, and the answer to a question about it, by heart.
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
import webdataset
import yaml
from PIL import Image as Pillow

import fuyu_e2e
from fuyu_e2e.checkpoint.loading import read_model
from fuyu_e2e.cli import main
from fuyu_e2e.data.tokenizer import train_tokenizer
from fuyu_e2e.training.settings.recipe import FuyuCLI

pytest.importorskip("transformers", reason="needs the extra `transformers`")
QUESTION = "What is it?"
"""What a card asks; here it is answered with the color on the right."""
LARGEST = [32, 48]
COLORS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (30, 60, 200), "white": (240, 240, 240)}
PICTURES = {
    "red beside blue": ("png", 75, 100),
    "blue beside red": ("jpg", 150, 90),
    "green beside white": ("webp", 45, 35),
    "white beside green": ("png", 20, 25),
    "red beside green": ("jpg", 35, 250),
}
"""The caption of each, and its format, height and width; all but one exceed `LARGEST`."""
TRANSPARENT = (20, 25)
"""Height and width of the picture whose left half is transparent, and would be red if transparency were dropped."""
ANSWERS = {caption: caption.split(" beside ")[1] for caption in PICTURES}


@dataclass(frozen=True)
class Said:
    """What a model says of each picture, by the caption that it was trained on."""

    captions: dict[str, str]
    answers: dict[str, str]


LEARNT = Said({caption: caption for caption in PICTURES}, ANSWERS)


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
        picture = Pillow.fromarray(pixels.clip(0, 255).astype(np.uint8))
        if (height, width) == TRANSPARENT:
            seen = np.full((height, width), 255, np.uint8)
            seen[:, : width // 2] = 0
            picture.paste(COLORS["red"], (0, 0, width // 2, height))
            picture.putalpha(Pillow.fromarray(seen))
        picture.save(files[said])
    return files


@pytest.fixture(scope="module")
def trained(pictures: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt a caption of each picture, and to answer a question about it."""
    folder = tmp_path_factory.mktemp("trained")
    with webdataset.TarWriter(str(folder / "train.tar")) as writer:
        for key, (caption, file) in enumerate(pictures.items()):
            image = {file.suffix[1:]: file.read_bytes()}
            turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWERS[caption]}]
            writer.write({"__key__": f"{key}-caption", **image, "txt": caption})
            writer.write({"__key__": f"{key}-chat", **image, "json": json.dumps({"conversations": turns}).encode()})
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
            "budget": 320,
            "max_patches": 24,
            "max_size": LARGEST,
            "lanes": 1,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    FuyuCLI(["fit", f"--config={folder / 'recipe.yaml'}"])
    return folder / "run"


def said_by(model: Path, pictures: dict[str, Path]) -> Said:
    """What a model of ours says."""
    decoder, processor = fuyu_e2e.load(model)
    prompts = [processor(file) for file in pictures.values()]
    prompts += [processor(file, QUESTION) for file in pictures.values()]
    written = fuyu_e2e.generate(decoder, prompts, max_new_tokens=32, eos_id=processor.eos_id)
    return by_picture(list(map(processor.decode, written)))


def by_picture(texts: list[str]) -> Said:
    """All captions, then all answers, in the order of the pictures."""
    captions, answers = texts[: len(PICTURES)], texts[len(PICTURES) :]
    return Said(dict(zip(PICTURES, captions, strict=True)), dict(zip(PICTURES, answers, strict=True)))


def codes_of(card: Path) -> list[str]:
    """The code in a card: that which captions, and that which asks."""
    codes = re.findall(r"^```python\n(.*?)^```$", card.read_text(), re.MULTILINE | re.DOTALL)
    assert len(codes) == 2
    assert [QUESTION in code for code in codes] == [False, True]
    return codes


def test_the_code_in_the_card_says_in_stock_transformers_what_we_say(
    trained: Path, pictures: dict[str, Path], run_stock: Callable[..., str], tmp_path: Path
) -> None:
    assert command("export", "--checkpoint", trained, "--out", tmp_path / "stock", "--to", "transformers") == 0
    driver = [f"import os, shutil\nos.chdir({str(tmp_path)!r})\n"]
    for code in codes_of(tmp_path / "stock" / "README.md"):
        for file in pictures.values():
            driver.append(f"shutil.copy({str(file)!r}, 'a.png')\nprint('>', end='')\nexec({code!r}, {{}})\n")
    (tmp_path / "driver.py").write_text("".join(driver))
    printed = run_stock([tmp_path / "driver.py"]).splitlines()
    ours = said_by(trained, pictures)
    assert ours == LEARNT, "the model has not learnt its pictures"
    assert by_picture([line[1:] for line in printed if line.startswith(">")]) == ours


def test_imported_back_it_says_the_same(trained: Path, pictures: dict[str, Path], tmp_path: Path) -> None:
    assert command("export", "--checkpoint", trained, "--out", tmp_path / "stock", "--to", "transformers") == 0
    assert command("import", "--from", tmp_path / "stock", "--out", tmp_path / "back") == 0
    assert said_by(tmp_path / "back", pictures) == LEARNT


def test_the_code_in_our_own_card_says_it_too(
    trained: Path, pictures: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command("export", "--checkpoint", trained, "--out", tmp_path / "own") == 0
    assert said_by(tmp_path / "own", pictures) == LEARNT
    said = []
    for code in codes_of(tmp_path / "own" / "README.md"):
        for file in pictures.values():
            shutil.copy(file, tmp_path / "a.png")
            capsys.readouterr()
            with working_in(tmp_path):
                exec(code, {})
            said.append(capsys.readouterr().out.strip())
    assert by_picture(said) == LEARNT


def test_a_checkpoint_says_which_kinds_of_documents_it_was_trained_on(trained: Path) -> None:
    assert read_model(trained).provenance.documents == {"caption": len(PICTURES), "chat": len(PICTURES)}
