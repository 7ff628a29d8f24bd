"""What docs/architecture.md says is so, and its examples run, each taken from the page and plugged in as it says."""

import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest

from fuyu_e2e.checkpoint.loading import TrainedModel, load_model
from fuyu_e2e.cli.main import main
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.reading import read_documents
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UserError
from fuyu_e2e.training.callbacks.data_report import DataReport
from fuyu_e2e.training.settings.recipe import FuyuCLI

QUICK = (
    "--trainer.max_steps=3", "--trainer.val_check_interval=3", "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false", "--checkpoint.every_n_train_steps=3", "--data.budget=256", "--data.lanes=2",
    "--model.decoder.vocab_size=320", "--model.decoder.layers=2", "--model.decoder.width=48",
    "--model.decoder.head_size=16", "--model.decoder.feed_forward=64", "--model.optimizer.muon_lr=0.1",
    "--model.max_new_tokens=2",
)  # fmt: skip
"""Settings that save a test time."""
PARTS = ("connector", "block", "mask", "data format", "task", "metric", "callback")
"""What the page says how to add."""
FENCE = re.compile(
    r"^```(?P<language>\w*)\n(?:# (?P<file>\S+\.\w+)(?:, in (?P<table>\w+))?\n)?(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Section:
    """How to add one part."""

    text: str
    fences: tuple[re.Match[str], ...]

    @property
    def own_files(self) -> dict[str, str]:
        """What a user writes: the text of each file."""
        return {one["file"]: one["text"] for one in self.fences if one["file"] and "/" not in one["file"]}

    @property
    def changes(self) -> list[re.Match[str]]:
        """What a user adds to files of the package."""
        return [one for one in self.fences if one["file"] and "/" in one["file"]]

    @property
    def commands(self) -> list[list[str]]:
        """The words of its commands, without `fuyu-e2e`."""
        texts = [one["text"].replace("\\\n", "") for one in self.fences if one["language"] == "sh"]
        lines = [line for text in texts for line in text.splitlines()]
        for line in lines:
            assert line.startswith("PYTHONPATH=.") == ("--allow-imports" in line), line
            assert line.startswith(("fuyu-e2e ", "PYTHONPATH=. fuyu-e2e ", "python ", "mkdir ", "tar ")), line
        found = [shlex.split(line.removeprefix("PYTHONPATH=. ")) for line in lines]
        return [words[1:] if words[0] == "fuyu-e2e" else words for words in found]


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "docs/architecture.md").read_text()


@pytest.fixture(scope="module")
def sections(page: str) -> dict[str, Section]:
    found = re.findall(r"^### How to add an? (.+?)\n(.*?)(?=^### |\Z)", page, re.M | re.S)
    return {name: Section(text, tuple(FENCE.finditer(text))) for name, text in found}


def write_shard(path: Path, samples: Iterable[dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for extension, data in sample.items():
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def folder(
    tmp_path: Path,
    repository: Path,
    tokenizer: Tokenizer,
    make_png: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Path]:
    """Where the page begins: shards of captioned pictures, a tokenizer, the recipes and a picture."""
    (tmp_path / "recipes").symlink_to(repository / "recipes")
    (tmp_path / "shards").mkdir()
    (tmp_path / "a.png").write_bytes(make_png(20, 30))
    tokenizer.save(tmp_path / "tokenizer.model")
    for split, count in (("train", 12), ("val", 4)):
        pictures = (make_png(5 + 7 * (number % 5), 60 + 11 * (number % 3), seed=number) for number in range(count))
        captions = (
            {"png": picture, "txt": f"a {split} square {number}".encode()} for number, picture in enumerate(pictures)
        )
        write_shard(tmp_path / f"shards/{split}-00000.tar", captions)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if (tmp_path / f"{name}.py").exists():
            del sys.modules[name]


def write(section: Section, folder: Path) -> None:
    for name, text in section.own_files.items():
        (folder / name).write_text(text)


def change(section: Section, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes the package in this process as the section says: names of its modules, and lines of their tables."""
    names: dict[str, Any] = {}
    for one in section.changes:
        module = importlib.import_module(one["file"].removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        if one["table"] is None:
            known = dict(vars(module))
            exec(compile(one["text"], one["file"], "exec"), known)
            names |= {name: value for name, value in known.items() if name not in vars(module)}
            continue
        table, known = getattr(module, one["table"]), dict(vars(module)) | names
        exec(compile(f"lines = {{{one['text']}}}", one["file"], "exec"), known)
        for key, value in known["lines"].items():
            assert key not in table
            monkeypatch.setitem(table, key, value)


def fit(command: list[str], *more: str) -> FuyuCLI:
    assert command[0] == "fit"
    return FuyuCLI([*command, *QUICK, *more])


def run(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fuyu-e2e", *command])
    assert main() == 0


def test_rooms_are_those_of_the_test_of_rooms(page: str, repository: Path) -> None:
    spec = importlib.util.spec_from_file_location("rooms", repository / "tests/test_rooms.py")
    assert spec is not None
    assert spec.loader is not None
    rooms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rooms)
    table = page[page.index("| room |") :].partition("\n\n")[0].splitlines()[2:]
    assert [set(re.findall(r"`(\w+)`", line.split("|")[1])) for line in table] == rooms.FLOORS


def test_the_life_of_a_sample_names_files_and_what_is_in_them(page: str) -> None:
    table = page[page.index("| what happens |") :].partition("\n\n")[0].splitlines()[2:]
    assert len(table) > 15
    for line in table:
        path, *names = re.findall(r"`([\w./]+)`", line.partition("|")[2].partition("|")[2])
        module = importlib.import_module(f"fuyu_e2e.{path.removesuffix('.py').replace('/', '.')}")
        assert names
        for name in names:
            first, _, rest = name.partition(".")
            value = getattr(module, first)
            assert not rest or hasattr(value, rest), f"{path} has no {name}"
            assert getattr(value, "__module__", module.__name__) == module.__name__, f"{name} is not of {path}"


def test_each_part_names_three_files_to_read_at_most(
    page: str, sections: dict[str, Section], repository: Path
) -> None:
    assert tuple(sections) == PARTS
    for link in re.findall(r"\]\(([^)#]+)\)", page):
        assert (repository / "docs" / link).exists(), link
    for name, section in sections.items():
        first = re.split(r"^```|^More: ", section.text, flags=re.M)[0]
        links = set(re.findall(r"\]\(\.\./(fuyu_e2e/[^)#]+)\)", first))
        assert 1 <= len(links) <= 3, name
        for one in section.changes:
            assert (repository / one["file"]).exists()


@pytest.mark.parametrize(("part", "kind"), [("connector", "MeanImage"), ("block", "NormedBlock"), ("mask", "Strided")])
def test_a_part_of_the_decoder_trains_generates_and_is_counted(
    part: str,
    kind: str,
    sections: dict[str, Section],
    folder: Path,
    check_cached_generation: Callable[[TrainedModel], None],
    check_operations: Callable[[TrainedModel], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cache gives the uncached forward, also of prompts in pieces; torch counts the same operations."""
    section = sections[part]
    write(section, folder)
    training, writing = section.commands
    fit(training)
    model = load_model(folder / "runs/own-pictures")
    for module in (model.decoder.patch_projection, *model.decoder.blocks):
        for name in module.sharding():
            module.get_submodule(name)
    values = [*model.decoder.modules(), *(block.mask for block in model.decoder.each_block())]
    assert kind in {type(value).__name__ for value in values}
    check_cached_generation(model)
    check_operations(model)
    run([*writing, "--max-new-tokens=2"], monkeypatch)


def test_a_recipe_with_a_named_size_takes_no_parts(sections: dict[str, Section], folder: Path) -> None:
    write(sections["mask"], folder)
    command = [word.replace("own-pictures", "captions") for word in sections["mask"].commands[0]]
    with pytest.raises(
        UserError,
        match=r"model\.decoder in strided\.yaml lacks vocab_size, .*: a named size takes no further settings",
    ):
        FuyuCLI(command)


def test_a_data_format_is_read_in_training(
    sections: dict[str, Section],
    folder: Path,
    make_png: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = [json.dumps({"question": "What is it?", "answer": answer}).encode() for answer in ("a boat", "a cat", "")]
    tables = [b"What is it?\ta bird\nReally?\tYes", b"What is it?"]
    members = [*({"json": said} for said in asked), *({"tsv": said} for said in tables)]
    samples = [{"png": make_png(20, 30, seed=number), **member} for number, member in enumerate(members)]
    alone = [members[0], members[3]]
    rmtree(folder / "shards")
    for toy, written in (("toy-train", [samples[0], *alone, *samples[1:]]), ("toy-val", samples[:1])):
        (folder / toy).mkdir()
        for number, sample in enumerate(written):
            for extension, data in sample.items():
                (folder / toy / f"{number}.{extension}").write_bytes(data)
    change(sections["data format"], monkeypatch)
    *packing, train_tokenizer, looking, training = sections["data format"].commands
    for command in packing:
        subprocess.run(command, check=True)
    few = [word.replace("320", "280") for word in train_tokenizer]  # as so few texts hold no more
    run(few, monkeypatch)
    capsys.readouterr()
    run(looking, monkeypatch)
    shown = capsys.readouterr().out
    assert re.match(r"\./3: \d+ tokens, \d+ patches in 1 images, \d+ tokens with loss", shown)
    assert "skipped first: image-missing: " in shown
    cli = fit(training, "--model.decoder.vocab_size=280")
    [report] = [callback for callback in cli.trainer.callbacks if isinstance(callback, DataReport)]
    stats = report.training()
    assert stats.used > 2
    assert set(stats.skipped) == {"answer-empty", "image-missing"}
    texts = {tuple(document.texts) for document in cli.datamodule.documents("train", stats)}
    assert texts == {
        ("What is it?", "a boat"),
        ("What is it?", "a cat"),
        ("What is it?", "a bird", "Really?", "Yes"),
    }
    write_shard(apart := folder / "apart.tar", [{"tsv": tables[0]}])
    with tarfile.open(apart, "a") as tar:
        info = tarfile.TarInfo("images/0.png")
        info.size = len(samples[0]["png"])
        tar.addfile(info, io.BytesIO(samples[0]["png"]))
    stats = SampleStats()
    assert not list(read_documents(apart, stats))
    assert stats.skipped == {"members-apart": 2}


def test_a_task_is_drawn_and_trained_and_scored_also_by_a_new_metric(
    sections: dict[str, Section], folder: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(sections["task"], folder)
    drawing, task = sections["task"].own_files
    small = re.sub(r'(?<="): [\d_]+', ": 6", (folder / drawing).read_text())
    (folder / drawing).write_text(small.replace("shard_size=1_000", "shard_size=3"))
    draw, train_tokenizer, training, evaluate = sections["task"].commands
    assert draw == ["python", drawing]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    subprocess.run([sys.executable, drawing], env=environment, check=True)
    assert len(list(folder.glob("red-squares/*.tar"))) == 6
    run(train_tokenizer, monkeypatch)
    cli = fit(training)
    [report] = [callback for callback in cli.trainer.callbacks if isinstance(callback, DataReport)]
    assert (report.training().used > 2, report.training().skipped) == (True, {})
    run(evaluate, monkeypatch)
    results = folder / f"runs/red-squares/evaluate/{Path(task).stem}/results.json"
    [(metric, scores)] = json.loads(results.read_text())["metrics"].items()
    assert (metric, set(scores["groups"])) == ("accuracy", {"squares"})
    change(sections["metric"], monkeypatch)
    [named] = re.findall(r"`(metrics: \[.+?\])`", sections["metric"].text)
    (folder / task).write_text(re.sub(r"^metrics: .*$", named, (folder / task).read_text(), flags=re.M))
    run(evaluate, monkeypatch)
    assert set(json.loads(results.read_text())["metrics"]) == {"accuracy", "first_word"}


def test_a_callback_is_called_in_a_fit(sections: dict[str, Section], folder: Path) -> None:
    write(sections["callback"], folder)
    [command] = sections["callback"].commands
    trainer = fit(command).trainer
    assert 0 < trainer.callback_metrics["data/images"] < 1
    assert "EarlyStopping" in {type(callback).__name__ for callback in trainer.callbacks}
