"""What a user can mend ends with one sentence and exit code 2, whichever command it is, and nothing is written.

What `fit` refuses of a recipe's settings is in `tests/training/test_starts.py`, and typos in `test_typos.py`.
"""

import builtins
import errno
import importlib
import io
import json
import os
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from fsspec.registry import _registry

from fuyu_e2e.bench.__main__ import main as bench
from fuyu_e2e.cli import main
from fuyu_e2e.data.tokenizer import Tokenizer

RECIPE: dict[str, Any] = {
    "trainer": {
        "max_steps": 2, "accelerator": "cpu", "val_check_interval": 2, "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0, "log_every_n_steps": 1,
    },
    "model": {
        "decoder": {"vocab_size": 320, "patch_size": 4, "layers": 2, "width": 32, "heads": 2, "kv_heads": 1,
                    "head_size": 16, "feed_forward": 48},
        "max_new_tokens": 2,
    },
    "data": {"tokenizer": "tokenizer.model", "train": "train.tar", "val": "val.tar", "budget": 128, "lanes": 2,
             "shuffle": 4},
}  # fmt: skip
FIT = "fit --config recipe.yaml --trainer.default_root_dir never"
GENERATE = "generate --checkpoint run --prompt a"
EVALUATE = "evaluate --checkpoint run --task shard-captions --data shards=val.tar"
WRITE = "shards write pictures --out never"
TRAIN = "tokenizer train --shards train.tar --vocab-size 300 --out"
ESTIMATE = "estimate --config recipe.yaml --device a100"

USES = {
    # fit: the recipe, and groups of settings on the command line
    "fit": "model.decoder and data.tokenizer are not set: name a recipe",
    "fit recipe.yaml": "There is no argument recipe.yaml: did you mean --config recipe.yaml?",
    "fit --config": "--config needs a value",
    "fit --config pictures": "The recipe pictures can't be read: Is a directory",
    "fit --config a.png": "The recipe a.png is no text in UTF-8",
    f"{FIT} --data a.png": "a.png is no text in UTF-8",
    f"{FIT} --data '{{\"seed\": 4}}'": "data.seed in --data can't be set, since it follows from seed_everything",
    f"{FIT} --data group.yaml": "data.seed in --data can't be set, since it follows from seed_everything",
    f"{FIT} --checkpoint '{{dirpath: x}}'": "checkpoint.dirpath in --checkpoint can't be set, since it follows from",
    f"{FIT} --data '{{allow_pipe: true}}'": "say --data.allow_pipe true on the command line",
    f"{FIT} --trainer '{{max_stepps: 3}}'": "--trainer sets trainer.max_stepps, which is no setting: did you mean",
    f"{FIT} --trainer '{{max_steps: many}}'": "trainer.max_steps in --trainer is 'many', but must be a whole number",
    f"{FIT} --trainer nothing": "--trainer is 'nothing', but must be a YAML file of such settings",
    f"{FIT} --trainer.max_steps": "--trainer.max_steps needs a value",
    f"{FIT} --allow-imports": "--allow-imports needs a value",
    f"{FIT} --config seedless.yaml": "seed_everything in seedless.yaml is 'None', but must be a whole number",
    f"{FIT} --model.optimizer.betas 3": "--model.optimizer.betas is '3', but must be a list, as [a, b]",
    f"{FIT} --data.mixture '{{a: {{shards: train.tar, wieght: 1}}}}'": "wieght, which is no setting: did you mean",
    # fit: settings of ours
    f"{FIT} --data.tokenizer pictures": "The tokenizer pictures can't be read: Is a directory",
    f"{FIT} --data.workers -1": "data.workers is -1, but must be 0 (none) or above",
    f"{FIT} --data.cache_gigabytes .nan": "data.cache_gigabytes is nan",
    f"{FIT} --data.budget 3": "longer-than-row",
    f"{FIT} --data.train pipe:cat": "pipe:cat would run a command of your shell",
    f"{FIT} --data.train ftp://host/a.tar": "ftp://host/a.tar has a scheme that shards are not read from",
    f"{FIT} --model.attention flash": "model.attention flash needs a CUDA device",
    f"{FIT} --model.max_new_tokens 0": "model.max_new_tokens is 0, but must be at least 1",
    f"{FIT} --evaluate.tasks [vqav2] --evaluate.data '{{vqa: {{images: a}}}}'": "evaluate.data is for the task "
    "vqa, which is not evaluated: did you mean vqav2?",
    f"{FIT} --rows_per_step 0": "rows_per_step is 0",
    f"{FIT} --checkpoint.filename a/b": "checkpoint.filename is 'a/b', which names a folder",
    f"{FIT} --checkpoint.filename '{{step'": "checkpoint.filename is '{step', whose braces can't be read",
    f"{FIT} --checkpoint.filename '{{step:q}}'": "checkpoint.filename is '{step:q}', whose braces can't be read",
    f"{FIT} --checkpoint.filename '{{val_loss}}'": "checkpoint.filename names val_loss, which is not logged: did you "
    "mean val/loss?",
    f"{FIT} --trainer.num_sanity_val_steps -5": "trainer.num_sanity_val_steps is -5, but must be at least -1",
    f"{FIT} --trainer.default_root_dir /proc/x": "trainer.default_root_dir /proc/x can't be written",
    # validate, test, predict
    "validate --config recipe.yaml --checkpoint run": "name the checkpoint to read with --ckpt_path",
    "predict --config recipe.yaml --checkpoint=run": "name the checkpoint to read with --ckpt_path",
    "validate --config run/config.yaml": "No checkpoint is named to validate: say --ckpt_path last",
    "validate --config run/config.yaml --ckpt_path pictures": "--ckpt_path pictures is no checkpoint",
    "validate --config run/config.yaml --ckpt_path last --trainer.limit_val_batches 0": "nothing is left to validate",
    "test --config run/config.yaml --ckpt_path last": "data.test is not set",
    "predict --config run/config.yaml --ckpt_path run/checkpoints/last.ckpt --data.predict val.tar "
    "--trainer.default_root_dir recipe.yaml/x": "recipe.yaml/x can't be read or written (Not a directory)",
    # generate, routing
    f"{GENERATE} --temperature nan": "temperature is nan",
    f"{GENERATE} --temperature -1": "temperature is -1.0",
    f"{GENERATE} --temperature hot": "--temperature is 'hot', but must be a number",
    f"{GENERATE} --top-k 0": "top_k is 0",
    f"{GENERATE} --top-p nan": "top_p is nan",
    f"{GENERATE} --max-new-tokens 0": "--max-new-tokens is 0, but must be at least 1",
    f"{GENERATE} --max-new-tokens {10**25}": f"--max-new-tokens is {10**25}, but must be at most",
    f"{GENERATE} --max-new-tokens {2 * 10**9}": "There is no memory for the keys and values",
    f"{GENERATE} --seed {10**25}": f"--seed is {10**25}, but must be at most",
    f"{GENERATE} --device warp": "--device warp can't be used on this machine",
    f"{GENERATE} --image pictures": "Part 1 of the prompt, pictures, can't be read: Is a directory",
    "generate --checkpoint pictures": "pictures is no checkpoint",
    "generate --checkpoint": "--checkpoint needs a value",
    "routing --checkpoint run --prompt a --max-new-tokens -1": "--max-new-tokens is -1",
    # evaluate
    f"{EVALUATE} --seed -1": "--seed is -1, but must be at least 0",
    f"{EVALUATE} --batch-tokens 1": "longer-than-batch",
    f"{EVALUATE} --data shads=val.tar": "data names 'shads', but shards takes shards",
    f"{EVALUATE} --data shards=gone.tar": "'gone.tar' matches no shard",
    f"{EVALUATE} --out recipe.yaml/x": "recipe.yaml/x/pictures can't be read or written (Not a directory)",
    "evaluate --checkpoint run --task recipe.yaml": "The task recipe.yaml: it has no format",
    # export, import
    "export --checkpoint run --out recipe.yaml/x": "recipe.yaml/x can't be made",
    "export --checkpoint run --out recipe.yaml": "recipe.yaml already holds something",
    "export --checkpoint run --out never --to transformers": "pass --accept-other-scaling",
    "export --checkpoint run --out own": "own already holds something",
    "evaluate --checkpoint gone --task shard-captions --data shards=val.tar": "gone is no checkpoint",
    "quickstart --out run": "run already holds a run",
    "import --from pictures --out never": "pictures/config.json can't be read",
    "import --from stock --out own": "own already holds something",
    "import --from stock --out never --tokenizer a.png": "The tokenizer a.png can't be read",
    # inspect, estimate
    "inspect --config recipe.yaml --index -1": "--index is -1, but must be at least 0",
    "inspect --config recipe.yaml --out pictures": "pictures can't be written (Is a directory)",
    "inspect --config recipe.yaml --data.train null": "data.train is not set",
    "inspect --config recipe.yaml --data '{seed: 4}'": "data.seed in --data can't be set",
    "estimate": "model.decoder and data.tokenizer are not set",
    f"{ESTIMATE} --device 'rtx 9999'": "--device rtx 9999 is unknown",
    f"{ESTIMATE} --trainer.devices many": "trainer.devices is 'many'",
    f"{ESTIMATE} --trainer.num_nodes 0": "trainer.num_nodes is 0",
    f"{ESTIMATE} --trainer.accumulate_grad_batches 0": "trainer.accumulate_grad_batches is 0",
    f"{ESTIMATE} --rows_per_step -3": "rows_per_step is -3",
    # shards
    "shards write gone --out never": "gone is neither a file nor a folder",
    "shards write pictures": "the following arguments are required: --out",
    f"{WRITE}/x --out recipe.yaml/x": "The folder recipe.yaml/x can't be written: Not a directory",
    f"{WRITE} --val-share nan": "--val-share is nan",
    f"{WRITE} --shard-megabytes 0": "--shard-megabytes is 0.0",
    f"{WRITE} --shard-megabytes much": "--shard-megabytes is 'much', but must be a number",
    "shards index a.png": "a.png is not a tar file",
    "shards index pipe:cat": "pipe:cat would run a command of your shell",
    "shards verify pictures": "'pictures' matches no shard",
    "shards stats train.tar --tokenizer a.png": "The tokenizer a.png can't be read",
    "shards stats train.tar --patch-size 0": "patch_size is 0",
    "shards stats train.tar --out recipe.yaml/x.png": "recipe.yaml/x.png can't be written",
    # tokenizer
    "tokenizer": "the following arguments are required: action",
    f"{TRAIN} never --vocab-size -5": "--vocab-size is -5, but must be at least 1",
    f"{TRAIN} never --vocab-size {10**11}": f"--vocab-size is {10**11}, but must be at most",
    f"{TRAIN} never --vocab-size few": "--vocab-size is 'few', but must be a whole number",
    f"{TRAIN} pictures": "--out pictures is a folder",
    # checkpoint
    "checkpoint info a.png": "a.png can't be read as a checkpoint",
    "checkpoint consolidate run --out own": "own is already there",
    "checkpoint consolidate run --out recipe.yaml/x": "recipe.yaml/.unfinished-x can't be read or written",
    # quickstart
    "quickstart --out never --test-pictures -1": "--test-pictures is -1, but must be at least 1",
    "quickstart --out never --max-steps 0": "--max-steps is 0, but must be at least 1",
    "quickstart --out never --seed -1": "--seed is -1, but must be at least 0",
    "quickstart --out never --recipe gone.yaml": "--recipe gone.yaml is no file, and none of the shipped ones",
    "quickstart --out never --recipe a.png": "The recipe a.png is no text in UTF-8",
    "quickstart --out recipe.yaml/x": "recipe.yaml/x/data can't be read or written (Not a directory)",
}  # fmt: skip
"""Command lines, and a part of the sentence that refuses each."""

IN_PROCESSES = {
    "xyz": "There is no command 'xyz'",
    f"{FIT} --data.train 'gone/*.tar'": "data.train: 'gone/*.tar' matches no shard",
    "shards stats train.tar --max-patches 0": "max_patches is 0, but must be at least 1",
    f"{GENERATE} --image gone.png": "gone.png, can't be read: No such file or directory",
    f"{EVALUATE} --limit 0": "--limit is 0, but must be at least 1",
    "export --checkpoint run --out never --to onnx": "--to can't be 'onnx'",
    f"{WRITE} --processes 0": "--processes is 0, but must be at least 1",
    f"{TRAIN} recipe.yaml/x": "recipe.yaml/x can't be written",
    "checkpoint verify gone": "gone is no checkpoint with a manifest",
    "quickstart --out run --pictures 0": "--pictures is 0, but must be at least 1",
}
"""The same, each in a process of its own, as from a shell."""

MISSING = {
    "s3fs": [
        (f"{FIT} --data.train s3://bucket/a.tar", "pip install 'fuyu-e2e[s3]'"),
        ("shards index 's3://bucket/*.tar'", "pip install 'fuyu-e2e[s3]'"),
        ("shards verify s3://bucket/a.tar", "pip install 'fuyu-e2e[s3]'"),
        ("tokenizer train --shards s3://bucket/a.tar --vocab-size 300 --out never", "pip install 'fuyu-e2e[s3]'"),
        (f"{EVALUATE} --data shards=s3://bucket/a.tar", "pip install 'fuyu-e2e[s3]'"),
    ],
    "pyarrow": [("shards write table.parquet --out never", "pip install 'fuyu-e2e[parquet]'")],
    "transformers": [("import --from stock --out never", "pip install 'transformers>=5.16'")],
    "torchao": [(f"{FIT} --model.fp8 true", "pip install 'fuyu-e2e[fp8]'")],
    "wandb": [(f"{FIT} --trainer.logger WandbLogger", "pip install 'wandb")],
    "sentencepiece": [(f"{TRAIN} never", "A package is missing: No module named 'sentencepiece'")],
}
"""By package, commands that can't do without it, and the remedy that they name."""

CLOSED = {
    "recipe.yaml": FIT,
    "tokenizer.model": FIT,
    "a.png": f"{GENERATE} --image a.png",
    "checkpoint.pt": GENERATE,
    "questions.json": "evaluate --checkpoint run --task vqav2 --data questions=questions.json --data "
    "annotations=questions.json --data images=pictures",
    "table.csv": "shards write table.csv --out never",
    "config.json": "import --from stock --out never",
}  # fmt: skip
"""Files that only others may read, and commands that read them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, make_png: Callable[..., bytes]) -> Path:
    """A working folder with shards, pictures, a recipe, and a run of two steps, exported both ways."""
    folder = tmp_path_factory.mktemp("uses")
    tokenizer.save(folder / "tokenizer.model")
    (folder / "pictures").mkdir()
    for name, numbers in (("train.tar", range(8)), ("val.tar", range(8, 16))):
        with tarfile.open(folder / name, "w") as tar:
            for number in numbers:
                for extension, content in {"png": make_png(8 + number, 20), "txt": f"{number * 37}".encode()}.items():
                    member = tarfile.TarInfo(f"{number}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                    if name == "val.tar":
                        (folder / "pictures" / member.name).write_bytes(content)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "group.yaml").write_text("seed: 4")
    (folder / "seedless.yaml").write_text("seed_everything: null")
    (folder / "a.png").write_bytes(make_png(9, 14))
    (folder / "table.parquet").write_bytes(b"PAR1")
    (folder / "table.csv").write_text("image,caption\npictures/8.png,eight\n")
    (folder / "questions.json").write_text(json.dumps({"questions": [], "annotations": []}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in (
            "fit --config recipe.yaml --trainer.default_root_dir run --trainer.enable_progress_bar false",
            "export --checkpoint run --out own",
            "export --checkpoint run --out stock --to transformers --accept-other-scaling",
            "shards index train.tar val.tar",  # whoever reads them first writes it
        ):
            patch.setattr(sys, "argv", ["fuyu-e2e", *line.split()])
            assert main() == 0
    return folder


Refused = Callable[[str], str]


@pytest.fixture
def refused(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command line that has to be refused, in that folder; gives the sentence."""
    monkeypatch.chdir(folder)

    def refused(line: str) -> str:
        before = everything(folder)
        monkeypatch.setattr(sys, "argv", ["fuyu-e2e", *shlex.split(line)])
        capfd.readouterr()
        code = main()
        printed = capfd.readouterr()
        return sentence_of(code, printed.out, printed.err, folder, before)

    return refused


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    """All files and directories, with what tells whether one was written."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def sentence_of(code: int, out: str, err: str, folder: Path, before: dict[str, tuple[int, int]]) -> str:
    """The one sentence of a command that was refused, and left everything as it was."""
    assert code == 2, out + err
    assert "Traceback" not in out + err
    [sentence] = [line for line in err.splitlines() if line.startswith("fuyu-e2e: ")]
    assert err.rstrip().endswith(sentence), "nothing after it"
    assert everything(folder) == before
    return sentence.removeprefix("fuyu-e2e: ")


@pytest.mark.parametrize("line", USES)
def test_what_can_be_mended_is_said(line: str, refused: Refused) -> None:
    assert USES[line] in refused(line)


@pytest.fixture(scope="module")
def started(folder: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """Those command lines as processes, two at a time, and what became of each."""

    def start(line: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fuyu_e2e", *shlex.split(line)]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(IN_PROCESSES, pool.map(start, IN_PROCESSES), strict=True))


@pytest.fixture(scope="module")
def before(folder: Path) -> dict[str, tuple[int, int]]:
    """What was there before any of them started."""
    return everything(folder)


@pytest.mark.parametrize("line", IN_PROCESSES)
def test_a_process_says_it_as_well(
    line: str,
    folder: Path,
    before: dict[str, tuple[int, int]],
    started: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    result = started[line]
    assert IN_PROCESSES[line] in sentence_of(result.returncode, result.stdout, result.stderr, folder, before)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Takes a package away, as where it was never installed."""

    def without(package: str) -> None:
        find = PathFinder.find_spec

        def found(name: str, *places: Any) -> Any:
            return None if name.partition(".")[0] == package else find(name, *places)

        monkeypatch.setattr(PathFinder, "find_spec", found)
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        for name in fsspec.available_protocols():  # fsspec keeps the classes that it has loaded
            if name in _registry and _registry[name].__module__.partition(".")[0] == package:
                monkeypatch.delitem(_registry, name)
        importlib.invalidate_caches()

    return without


@pytest.mark.parametrize(
    ("package", "line", "remedy"), [(name, *use) for name, uses in MISSING.items() for use in uses]
)
def test_a_package_that_is_missing_is_named(
    package: str,
    line: str,
    remedy: str,
    refused: Refused,
    without: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without(package)
    if package == "sentencepiece":  # what imported it has it
        for name in [name for name in sys.modules if name.startswith("fuyu_e2e.data.tokenizer")]:
            monkeypatch.delitem(sys.modules, name)
    assert remedy in refused(line)


def test_without_matplotlib_a_table_is_shown_and_no_picture(
    folder: Path, without: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    without("matplotlib")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        sys, "argv", ["fuyu-e2e", "shards", "stats", "train.tar", "--processes", "1", "--out", "never"]
    )
    assert main() == 0
    assert "No picture was drawn. " in (shown := capfd.readouterr().out)
    assert "fuyu-e2e[plots]" in shown
    assert not (folder / "never").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "There is no benchmark 'trian': did you mean train?"),
        ([], "There is no benchmark '': choose from mod, data,"),
        (["isoflop"], "isoflop is a study now: say python -m fuyu_e2e.studies isoflop."),
    ],
)
def test_a_benchmark_that_there_is_none_of_is_named(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fuyu_e2e.bench", *arguments])
    assert bench() == 2
    assert capfd.readouterr().err.startswith(f"fuyu_e2e.bench: {sentence}")


def test_benchmarks_list_themselves(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fuyu_e2e.bench", "--help"])
    assert bench() == 0
    assert "NAME is a benchmark: mod, data, generate," in capfd.readouterr().out


@pytest.mark.parametrize("name", CLOSED)
def test_a_file_that_may_not_be_read_is_named(name: str, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read anything, so what the system says to others is said here."""
    opened = io.open

    def closed(file: Any, *given: Any, **options: Any) -> Any:
        if isinstance(file, str | Path) and Path(file).name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return opened(file, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", closed)
        patch.setattr(builtins, "open", closed)
        sentence = refused(CLOSED[name])
    assert name in sentence
    assert "Permission denied" in sentence
