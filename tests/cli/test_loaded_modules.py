"""A command imports only what it runs, and neither do the processes that it starts."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from pkgutil import resolve_name

import pytest

from fuyu_e2e.cli.main import COMMANDS

HEAVY = ("torch", "lightning", "webdataset", "torchmetrics", "transformers", "matplotlib", "tensorboard")
RUN = f"""
import json, sys
from fuyu_e2e.cli import main

if __name__ == "__main__":
    try:
        code = main()
    except SystemExit as leaving:  # argparse's --help
        code = leaving.code
    print(json.dumps([code, [name for name in {HEAVY} if name in sys.modules]]), file=sys.stderr)
"""
WORKING = ["fuyu_e2e.data.shards.writing", "fuyu_e2e.data.shards.manifest", "fuyu_e2e.tasks.digits"]
"""Modules whose functions run in processes of pools."""


def loaded(folder: Path, *arguments: str) -> list[str]:
    """Which heavy packages a command has imported when it is done, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    code, names = json.loads(result.stderr.splitlines()[-1])
    assert not code, result.stdout + result.stderr
    return names


def imported_by(modules: Sequence[str]) -> list[str]:
    """Which heavy packages some modules import, in a process of its own."""
    code = f"import json, sys\nfor name in {modules}: __import__(name)\n"
    code += f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        ["generate", "--help"],
        ["inspect", "--help"],
        ["estimate", "--help"],
        ["tokenizer", "train", "--help"],
        ["checkpoint", "--help"],
        ["quickstart", "--help"],
        ["evaluate", "--help"],
        ["export", "--help"],
        ["import", "--help"],
        ["routing", "--help"],
    ],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    assert loaded(tmp_path, *arguments) == []


def test_shards_and_tokenizers_need_no_torch(tmp_path: Path, make_png: Callable[..., bytes]) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(40):
        (pictures / f"{number}.png").write_bytes(make_png(8, 12, seed=number))
        (pictures / f"{number}.txt").write_text(f"a picture of {number}")
    small = ("--shard-megabytes", "0.02", "--val-share", "0")
    assert loaded(tmp_path, "shards", "write", "pictures", "--out", "shards", "--processes", "1", *small) == []
    assert len(list((tmp_path / "shards").glob("*.tar"))) > 1
    assert loaded(tmp_path, "shards", "verify", "shards", "--processes", "1") == []
    assert loaded(tmp_path, "shards", "index", "shards", "--processes", "1") == []
    assert set(loaded(tmp_path, "shards", "stats", "shards", "--processes", "1")) <= {"matplotlib"}, "it draws"
    trained = ("--shards", "shards/*.tar", "--vocab-size", "300", "--out", "tokenizer.model")
    assert loaded(tmp_path, "tokenizer", "train", *trained) == []


def test_a_process_that_reads_or_writes_shards_imports_no_torch() -> None:
    """What `spawn` imports to run a function of these modules."""
    code = f"import sys\nfor name in {WORKING}: __import__(name)\nprint([n for n in {HEAVY} if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_checksums_are_compared_without_torch(tmp_path: Path) -> None:
    from fuyu_e2e.checkpoint.atomic import commit, staging_directory

    with staging_directory(tmp_path / "step=1.ckpt") as place:
        (place / "checkpoint.pt").write_bytes(b"weights")
        commit(place, tmp_path / "step=1.ckpt", step=1, tokens_seen=0)
    assert loaded(tmp_path, "checkpoint", "verify", "step=1.ckpt") == []


def test_a_model_is_used_without_lightning() -> None:
    used = ("inference.api", "eval.checkpoint_scores", "export.folders", "inference.generation")
    assert imported_by([f"fuyu_e2e.{name}" for name in used]) == ["torch"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_imported(name: str) -> None:
    assert callable(resolve_name(COMMANDS[name]))


def test_the_package_offers_what_it_names() -> None:
    import fuyu_e2e

    for name in fuyu_e2e.__all__:
        assert getattr(fuyu_e2e, name) is not None
        assert name in dir(fuyu_e2e)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = fuyu_e2e.laod  # type: ignore[attr-defined]


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fuyu_e2e", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("fuyu-e2e 0.")
    assert result.stderr == ""
