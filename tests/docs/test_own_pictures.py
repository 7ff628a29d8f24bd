"""The commands of docs/own-pictures.md, as they are printed there, make a captioner of a folder of pictures."""

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fuyu_e2e.checkpoint.loading import read_model
from fuyu_e2e.cli import main
from fuyu_e2e.export.transformers import scales_alike

QUICK = {
    "shards": ["--processes=1"],
    "fit": [
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        "--trainer.accelerator=cpu",
        "--model.max_new_tokens=2",
        "--data.budget=256",
    ],
    "generate": ["--max-new-tokens=2"],
    "evaluate": ["--limit=1"],
}
"""Options that save a test time."""
COLOURS, THINGS = ("red", "green", "blue", "yellow"), ("apple", "boat", "cat", "drum", "elephant", "flag")


def fences(page: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return [content for name, content in found if name == language]


def commands(page: str) -> list[list[str]]:
    """The arguments of each command of the page, in order."""
    lines = [line for fence in fences(page, "") for line in fence.splitlines() if line.startswith("fuyu-e2e ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def write_stamps(folder: Path, make_png: Callable[..., bytes]) -> None:
    """Pictures as `tuxpaint-stamps-default` has them: captions in many languages, English first, and some without."""
    folder.mkdir(parents=True)
    for number, (colour, thing) in enumerate((colour, thing) for colour in COLOURS for thing in THINGS):
        (folder / f"{colour}_{thing}.png").write_bytes(make_png(20 + number, 120, seed=number))
        captions = f"A {colour} {thing}.\nde.utf8=Etwas: {thing}\n"
        (folder / f"{colour}_{thing}.txt").write_text(captions, encoding="utf-8")
    (folder / "mirror.png").write_bytes(make_png(8, 8))


def test_the_commands_of_the_page_run_from_a_folder_to_an_exported_captioner(
    tmp_path: Path, repository: Path, make_png: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (repository / "docs/own-pictures.md").read_text()
    (tmp_path / "recipes").symlink_to(repository / "recipes")
    write_stamps(tmp_path / "usr/share/tuxpaint/stamps/things", make_png)
    monkeypatch.chdir(tmp_path)

    [bring_stamps] = fences(page, "python")
    exec(compile(bring_stamps, "docs/own-pictures.md", "exec"), {})
    assert len(list(Path("my-pictures").glob("*.png"))) == len(COLOURS) * len(THINGS)
    assert Path("my-pictures/things-red_boat.txt").read_text() == "A red boat."

    names = []
    for name, *options in commands(page):
        if "--image" in options:
            options[options.index("--image") + 1] = "my-pictures/things-red_boat.png"
        monkeypatch.setattr(sys, "argv", ["fuyu-e2e", name, *options, *QUICK.get(name, [])])
        assert main() == 0, (name, options)
        names.append(name)
    assert {"shards", "tokenizer", "inspect", "fit", "generate", "evaluate", "export"} <= set(names)
    run = read_model("runs/own-pictures")
    assert run.provenance.validation["val/loss"] > 0
    assert scales_alike(run.metadata.images)
    assert Path("my-captioner/model.safetensors").is_file()
