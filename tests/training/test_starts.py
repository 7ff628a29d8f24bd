"""What a start leaves behind: nothing where it is refused; where it is accepted, a run that says what it did."""

import errno
import io
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fuyu_e2e.checkpoint.lightning_io import read_checkpoint
from fuyu_e2e.checkpoint.run_checkpoints import best_checkpoint, find_checkpoint
from fuyu_e2e.cli import main
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import TIME_OVER, UserError
from fuyu_e2e.model.config import named_size
from fuyu_e2e.training.callbacks.save_recipe import SaveRecipe
from fuyu_e2e.training.callbacks.signals import Stopped
from fuyu_e2e.training.estimate import estimated
from fuyu_e2e.training.module import FuyuModule

RECIPE: dict[str, Any] = {
    "trainer": {
        "max_steps": 4, "accelerator": "cpu", "accumulate_grad_batches": 2, "val_check_interval": 4,
        "check_val_every_n_epoch": None, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
    },
    "checkpoint": {"every_n_train_steps": 2},
    "model": {
        "decoder": {"vocab_size": 320, "patch_size": 4, "layers": 2, "width": 32, "heads": 2, "kv_heads": 1,
                    "head_size": 16, "feed_forward": 48},
        "max_new_tokens": 2,
    },
    "data": {"tokenizer": "tokenizer.model", "train": "train.tar", "val": "val.tar", "budget": 128, "lanes": 2,
             "shuffle": 4},
}  # fmt: skip


FIT = ("fit", "--config", "recipe.yaml", "--trainer.default_root_dir", "run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, make_png: Callable[..., bytes]) -> Path:
    """A working folder with shards, a tokenizer, and recipes of a decoder that is spelled out and of a named one."""
    folder = tmp_path_factory.mktemp("starts")
    tokenizer.save(folder / "tokenizer.model")
    for name, numbers in (("train.tar", range(8)), ("val.tar", range(8, 16))):
        with tarfile.open(folder / name, "w") as tar:
            for number in numbers:
                for extension, content in {"png": make_png(8 + number, 20), "txt": f"{number * 37}".encode()}.items():
                    member = tarfile.TarInfo(f"{number}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    named = RECIPE | {"model": {"decoder": "1m", "max_new_tokens": 2}}
    (folder / "named.yaml").write_text(yaml.safe_dump(named))
    return folder


@pytest.fixture
def command(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Callable[..., tuple[int, str]]:
    """Runs the command line in that folder; gives exit code and output."""
    monkeypatch.chdir(folder)
    caplog.set_level("INFO")

    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fuyu-e2e", *arguments])
        capfd.readouterr()
        caplog.clear()
        try:
            code = main()
        except Stopped as stopped:
            code = int(stopped.code or 0)
        printed = capfd.readouterr()
        return code, caplog.text + printed.out + printed.err

    return command


@pytest.fixture
def trained(command: Callable[..., tuple[int, str]], folder: Path) -> str:
    """A finished run in `run`, made once; what it said."""
    said = folder / "said.txt"
    if not said.exists():
        code, printed = command(*FIT)
        assert code == 0, printed
        said.write_text(printed)
    return said.read_text()


def everything(folder: Path) -> dict[str, bytes | None]:
    """All files with what they hold, and all directories."""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("--model.decoder.vocab_size=300", "set model.decoder.vocab_size to 320"),
        ("--data.val=[train.tar]", "both hold train.tar"),
    ],
)
def test_a_first_start_that_is_refused_leaves_no_directory(
    command: Callable[..., tuple[int, str]], folder: Path, setting: str, sentence: str
) -> None:
    before = everything(folder)
    code, printed = command(*FIT[:3], "--trainer.default_root_dir", "never", setting)
    assert code == 2, printed
    assert sentence in printed
    assert everything(folder).keys() - before.keys() <= {"fuyu-manifest.json"}  # the shards' index


def test_a_run_says_where_it_is_what_it_did_and_what_is_next(trained: str, folder: Path) -> None:
    run = folder / "run"
    best = best_checkpoint(run)
    assert best is not None
    assert f"best     val/loss {best.value:.4g} at step {best.step}: run/checkpoints/{best.path.name}" in trained
    assert f"last     step 4: run/checkpoints/{find_checkpoint(run).name}" in trained
    assert re.search(r"\d+ read, \d+ used, 0 skipped, \d+ wait to be packed", trained)
    assert "Done: 4 steps" in trained
    assert "\n  run      run\n" in trained
    assert re.search(r"^step 4/4  loss", trained, re.MULTILINE), "plain lines, as the output is no terminal"
    for said in ("evaluate --checkpoint run", "generate --checkpoint run", "export --checkpoint run",
                 "tensorboard --logdir run", "fit --config run/config.yaml --ckpt_path last"):  # fmt: skip
        assert said in trained
    assert "FLOPs" not in trained
    assert "2 blocks of width 32" in trained
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [1, 3], "every second step of two micro-batches"
    for of_a_validation in (events.Tensors("samples/0/text_summary"), events.Images("samples/0/image0")):
        assert [event.step for event in of_a_validation] == [1, 3], "where the figures of that validation are"


LAST = ("--ckpt_path", "last")


def test_what_is_next_is_what_the_run_can_do(command: Callable[..., tuple[int, str]], trained: str) -> None:
    """A captioner continues no question; early stopping would stop the same run again."""
    assert "generate --checkpoint run --image PICTURE.png\n" in trained
    code, printed = command(
        *FIT[:3], "--trainer.default_root_dir", "early", "--trainer.max_steps", "9", "--trainer.callbacks",
        "EarlyStopping", "--trainer.callbacks.monitor", "val/loss", "--trainer.callbacks.patience", "1",
        "--trainer.callbacks.min_delta", "100",
    )  # fmt: skip
    assert code == 0, printed
    assert re.search(r"stopped  early: .*val/loss did not improve", printed)
    assert "--ckpt_path last --trainer.callbacks null" in printed


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((*FIT, *LAST, "--trainer.max_steps", "8", "--data.lanes", "8"), 2, "data.lanes is not what it was"),
        (
            (*FIT, *LAST, "--trainer.max_steps", "8", "--trainer.accumulate_grad_batches", "3"),
            2,
            "give the run as many rows a step as before.",
        ),
        (FIT, 2, "continue it with --ckpt_path last, or name another directory"),
        (("predict", "--config", "run/config.yaml", "--data.predict", "nothing/*.tar", *LAST), 2, "nothing/*.tar"),
        (("validate", "--config", "run/config.yaml", *LAST), 0, "val/perplexity"),
    ],
    ids=["lanes", "rows", "again", "predict", "validate"],
)
def test_what_is_refused_or_only_evaluates_changes_nothing_of_a_run(
    command: Callable[..., tuple[int, str]],
    folder: Path,
    trained: str,
    arguments: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    before = everything(folder / "run")
    found, printed = command(*arguments)
    assert found == code, printed
    assert said in (printed.splitlines()[-1] if code else printed)
    assert everything(folder / "run") == before


def test_predictions_replace_the_earlier_ones_when_they_are_complete(
    command: Callable[..., tuple[int, str]], folder: Path, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = ("predict", "--config", "run/config.yaml", *LAST, "--data.predict")
    code, printed = command(*predict, "train.tar")
    assert code == 0, printed
    assert "8 continuations: run/predictions.jsonl" in printed.replace(f"{folder}/", "")
    written = (folder / "run" / "predictions.jsonl").read_text()
    assert written.count("\n") == 8

    def fail(self: FuyuModule) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(FuyuModule, "on_predict_epoch_end", fail)
    with pytest.raises(ZeroDivisionError):
        command(*predict, "train.tar", "--model.max_new_tokens", "1")
    assert (folder / "run" / "predictions.jsonl").read_text() == written
    assert not list((folder / "run").glob(".unfinished*"))


REFUSED = {
    "--trainer.gradient_clip_val -1": "trainer.gradient_clip_val is -1, but must be 0 (no clipping) or above",
    "--trainer.overfit_batches 0.1": "trainer.overfit_batches is 0.1, a share of rows that nobody counts beforehand",
    "--trainer.val_check_interval 0.25": "trainer.val_check_interval is 0.25, a share of rows",
    "--trainer.limit_val_batches 0.5": "trainer.limit_val_batches is 0.5, a share of rows",
    "--trainer.model_registry mine": "trainer.model_registry doesn't work here",
    "--trainer.reload_dataloaders_every_n_epochs 1": "would restart the stream of training data",
    "--checkpoint.enable_version_counter true": "checkpoint.enable_version_counter doesn't work here",
    "--checkpoint.dirpath elsewhere": "--checkpoint.dirpath can't be set, since it follows from trainer.def",
    "--config linked.yaml": "checkpoint.dirpath in linked.yaml can't be set, since it follows from trainer.def",
    "--config seeded.yaml": "data.seed in seeded.yaml can't be set, since it follows from seed_everything",
    "--data.patch_size 8": "--data.patch_size can't be set, since it follows from model.decoder",
    "--trainer.max_time soon": "trainer.max_time is 'soon', but must be DD:HH:MM:SS",
    "--trainer.accelerator tpu": "trainer.accelerator is tpu, which this machine doesn't have: say auto, or cpu",
    "--trainer.accelerator xpu": "trainer.accelerator is xpu, which is unknown: say auto, gpu,",
    "--trainer.devices 0": "trainer.devices is '0', but must be at least 1, or auto",
    "--trainer.devices -1": "devices selected with CPUAccelerator should be an int > 0",
    "--trainer.num_nodes 0": "num_nodes must be a positive integer, but got 0",
    "--trainer.strategy dpp": "trainer.strategy is dpp, which is unknown: did you mean ddp?",
    "--trainer.strategy ddp_spawn": "trainer.strategy ddp_spawn doesn't work here: say ddp",
    "--trainer.strategy ddp_fork": "trainer.strategy ddp_fork doesn't work here: say ddp",
    "--trainer.strategy ddp_notebook": "trainer.strategy ddp_notebook doesn't work here: say ddp",
    "--trainer.strategy DDPStrategy --trainer.strategy.start_method fork": "start_method fork doesn't work here: say",
    "--trainer.precision bf16-true": "trainer.precision bf16-true doesn't work here, since weights are",
    "--trainer.precision 16-true": "trainer.precision 16-true doesn't work here",
    "--trainer.precision transformer-engine": "a package is missing, which pip install 'transformer_engine",
    "--trainer.accumulate_grad_batches 0": "trainer.accumulate_grad_batches is 0, but must be at least 1",
    "--trainer.val_check_interval 0": "trainer.val_check_interval is 0, but must be at least 1",
    "--trainer.limit_train_batches 2 --trainer.check_val_every_n_epoch 1": "interval is 4, but an epoch has 2 rows",
    "--trainer.gradient_clip_algorithm best": "gradient_clip_algorithm best is invalid. Allowed algorithms:",
    "--trainer.profiler fast": "profiler parameter of Trainer, it can only be one of",
    "--trainer.barebones true": "trainer.barebones doesn't work here",
    "--trainer.logger CSVLogger": "--trainer.logger: CSVLogger: the following arguments are required: save_dir",
    "--trainer.logger WandbLogger": "WandbLogger: a package is missing, which pip install 'wandb",
    "--trainer.callbacks DeviceStatsMonitor": "a package is missing, which pip install 'psutil' installs",
    "--config averaged.yaml": "names StochasticWeightAveraging, which doesn't work here: it counts in epochs",
    "--trainer.callbacks LearningRateFinder": "names LearningRateFinder, which doesn't work here",
    "--trainer.callbacks Timer": "names Timer, which doesn't work here: it counts the time of all starts together",
    "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor val_loss": "monitor of EarlyStopping is val_loss, "
    "which is not logged: did you mean val/loss?",
    "--checkpoint.monitor val_los": "checkpoint.monitor is val_los, which is not logged: did you mean val/loss?",
    "--checkpoint.monitor val/loss --data.val null": "checkpoint.monitor is val/loss, but there is no data.val",
    "--checkpoint.mode best": "mode can be min, max but got best",
    "--checkpoint.every_n_epochs 1": "every_n_train_steps=2, every_n_epochs=1 and train_time_interval=None should be",
    "--data.val null --checkpoint.every_n_train_steps null --checkpoint.every_n_epochs 1": "every_n_epochs would save",
    "--model.optimizer.lr .nan": "optimizer.lr is nan, but must be above 0",
    "--model.z_loss .nan": "model.z_loss is nan, but must be 0 or above",
    "--watchdog.limit .nan": "watchdog.limit is nan seconds, but must be above 0",
    "--trainer.default_root_dir recipe.yaml/run": "recipe.yaml/run can't be written (Not a directory): name another",
    "--seed_everything true": "seed_everything is 'True', but must be a whole number",
    "--seed_everything -1": "seed_everything is -1, but must be a whole number",
}
"""What can't be had, and how the sentence begins that says so."""


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_cannot_be_had_is_refused_with_a_sentence(
    command: Callable[..., tuple[int, str]], folder: Path, arguments: str
) -> None:
    (folder / "linked.yaml").write_text("checkpoint: {dirpath: elsewhere}")
    (folder / "seeded.yaml").write_text("data: {seed: 5}")
    averaging = {"class_path": "lightning.pytorch.callbacks.StochasticWeightAveraging", "init_args": {"swa_lrs": 0.1}}
    (folder / "averaged.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [averaging]}}))
    code, printed = command(*FIT[:3], "--trainer.default_root_dir", "never", *arguments.split())
    assert code == 2, printed
    [sentence] = [line for line in printed.splitlines() if line.startswith("fuyu-e2e: ")]
    assert REFUSED[arguments] in sentence
    assert "Traceback" not in printed
    assert not (folder / "never").exists()


def test_a_trial_leaves_nothing_that_is_in_the_way_of_the_run(
    command: Callable[..., tuple[int, str]], folder: Path
) -> None:
    code, printed = command(*FIT[:3], "--trainer.default_root_dir", "trial", "--trainer.fast_dev_run", "true")
    assert code == 0, printed
    assert not (folder / "trial").exists()


def test_each_checkpoint_is_told_where_that_is_asked_for(
    command: Callable[..., tuple[int, str]], folder: Path
) -> None:
    verbose = ("--trainer.default_root_dir", "verbose", "--checkpoint.verbose", "true", "--trainer.max_steps", "2")
    code, printed = command(*FIT[:3], *verbose)
    assert code == 0, printed
    assert re.search(r"Step 2, val/loss [\d.]+: saving .*verbose/checkpoints/step=2-val_loss", printed)


def test_each_start_has_its_own_time(command: Callable[..., tuple[int, str]], folder: Path) -> None:
    """The same line as often as it takes; the start that does the last step is done, whatever the clock says."""
    fit = (*FIT[:3], "--trainer.default_root_dir", "timed", *LAST, "--trainer.max_time", "00:00:00:00")
    codes = []
    for step in (1, 2, 3):
        code, printed = command(*fit, "--trainer.max_steps", "3")
        codes.append(code)
        assert read_checkpoint(find_checkpoint(folder / "timed"))["global_step"] == step
        assert ("(trainer.max_time, 0 s) is over" in printed, "Done: 3 steps" in printed) == (step < 3, step == 3)
    assert codes == [TIME_OVER, TIME_OVER, 0]


def test_weights_alone_are_nothing_to_go_on_from(command: Callable[..., tuple[int, str]], folder: Path) -> None:
    fit = (*FIT[:3], "--trainer.default_root_dir", "light", "--checkpoint.save_weights_only", "true")
    code, printed = command(*fit, "--trainer.max_steps", "1")
    assert code == 0, printed
    assert "optimizer_states" not in read_checkpoint(find_checkpoint(folder / "light"))
    code, printed = command(*fit, *LAST)
    assert code == 2, printed
    assert "holds weights alone (checkpoint.save_weights_only)" in printed
    code, printed = command("validate", "--config", "light/config.yaml", *LAST)
    assert code == 0, printed


def test_lightnings_way_to_load_a_model_points_to_ours(trained: str) -> None:
    with pytest.raises(UserError, match=r"are fuyu_e2e\.load\('run/checkpoints/last\.ckpt'\)"):
        FuyuModule.load_from_checkpoint("run/checkpoints/last.ckpt")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_place_that_is_closed_is_named(
    command: Callable[..., tuple[int, str]], trained: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Root may write anywhere, so what the system says of others is said here."""
    opened = Path.open

    def closed(path: Path, mode: str = "r", **options: Any) -> Any:
        if path.name.endswith("predictions.jsonl"):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, mode, **options)

    monkeypatch.setattr(Path, "open", closed)
    code, printed = command("predict", "--config", "run/config.yaml", *LAST, "--data.predict", "val.tar")
    assert code == 2, printed
    assert f"predictions.jsonl can't be read or written ({os.strerror(number)}): name another place." in printed


@pytest.mark.parametrize(
    ("settings", "said", "every"),
    [
        ((), "validates and saves every 4 micro-batches of a process", 2),
        (("--data.val", "null"), "checkpoint.every_n_train_steps is not set: saves every 2 steps", 2),
        (("--trainer.limit_train_batches", "8"), "", 4),
    ],
    ids=["validation", "none", "epochs"],
)
def test_a_recipe_without_intervals_validates_and_saves(
    command: Callable[..., tuple[int, str]], folder: Path, settings: tuple[str, ...], said: str, every: int
) -> None:
    """Steps have two micro-batches."""
    unset = {"val_check_interval": None, "check_val_every_n_epoch": 1}
    bare = RECIPE | {"trainer": RECIPE["trainer"] | unset | {"max_steps": 20}, "checkpoint": {"save_top_k": -1}}
    (folder / "bare.yaml").write_text(yaml.safe_dump(bare))
    run = f"bare{every}{len(said)}"
    code, printed = command("fit", "--config", "bare.yaml", "--trainer.default_root_dir", run, *settings)
    assert code == 0, printed
    assert said in printed
    assert ("is not set: " in printed) == bool(said)
    names = [path.name for path in (folder / run / "checkpoints").glob("step=*")]
    assert {int(re.findall(r"\d+", name)[0]) for name in names} == set(range(every, 21, every))
    assert all("val_loss" in name for name in names) == ("--data.val" not in settings)


PARTS: dict[str, dict[str, Any]] = {
    "bar": {"callbacks": {"class_path": "TQDMProgressBar"}},
    "plugin": {"plugins": {"class_path": "lightning.pytorch.plugins.environments.LightningEnvironment"}},
    "loggers": {
        "logger": [
            {"class_path": "CSVLogger", "init_args": {"save_dir": "own"}},
            {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "own", "name": "board", "version": ""}},
        ]
    },
    "unlogged": {"log_every_n_steps": 0},
    "unsaved": {"enable_checkpointing": False},
}
"""What a recipe may name of its own beside, or in the place of, what each run has."""


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_recipes_own_work_beside_ours(
    command: Callable[..., tuple[int, str]], folder: Path, name: str
) -> None:
    shutil.rmtree(folder / "own", ignore_errors=True)
    (folder / "parts.yaml").write_text(yaml.safe_dump(RECIPE | {"trainer": RECIPE["trainer"] | PARTS[name]}))
    code, printed = command("fit", "--config", "parts.yaml", "--trainer.default_root_dir", "own")
    assert code == 0, printed
    assert "Done: 4 steps" in printed
    if name == "unsaved":
        assert "no checkpoint was written" in printed
        assert not list((folder / "own").glob("**/*.ckpt"))
    else:
        assert read_checkpoint(folder / "own" / "checkpoints" / "last.ckpt")["global_step"] == 4
    if name == "loggers":
        tags = EventAccumulator(str(folder / "own" / "board")).Reload().Tags()
        assert "samples/0/text_summary" in tags["tensors"]
    if name == "unlogged":
        tags = EventAccumulator(str(folder / "own" / "tensorboard")).Reload().Tags()
        assert "val/loss" in tags["scalars"]
        assert "tokens" not in tags["scalars"]


@pytest.fixture
def moved(trained: str, folder: Path) -> Iterator[Path]:
    """That run under another name."""
    (folder / "run").rename(folder / "moved")
    yield folder / "moved"
    (folder / "moved").rename(folder / "run")


def test_a_run_that_was_moved_is_found_by_its_recipe(
    command: Callable[..., tuple[int, str]], folder: Path, moved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From wherever; another directory on the command line holds all the same."""
    recipe = ("--config", "moved/config.yaml")
    shutil.copytree(moved, folder / "copied")
    code, printed = command("fit", "--config", "copied/config.yaml", *LAST, "--trainer.max_steps", "5")
    assert code == 0, printed
    assert "Reading the checkpoint copied/checkpoints/" in printed.replace(f"{folder}/", "")
    assert read_checkpoint(find_checkpoint(folder / "copied"))["global_step"] == 5
    assert yaml.safe_load((folder / "copied" / "config.yaml").read_text())["trainer"]["default_root_dir"] == "copied"
    code, printed = command("validate", *recipe, *LAST)
    assert code == 0, printed
    assert "val/loss" in printed
    code, printed = command("validate", *recipe, *LAST, "--trainer.default_root_dir", "typo")
    assert code == 2, printed
    monkeypatch.chdir(moved)
    code, printed = command("fit", "--config", "config.yaml")
    assert (code, "already holds a run" in printed) == (2, True), printed
    assert not (folder / "run").exists()


@pytest.mark.parametrize("name", ["validate", "test", "predict"])
@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ((), "No checkpoint is named to {name}: say --ckpt_path last for the newest of run, or"),
        ((*LAST, "--trainer.default_root_dir", "typo"), "There is no checkpoint in typo/checkpoints to {name}: name"),
    ],
    ids=["forgotten", "typo"],
)
def test_random_weights_are_not_evaluated(
    command: Callable[..., tuple[int, str]],
    folder: Path,
    trained: str,
    name: str,
    named: tuple[str, ...],
    sentence: str,
) -> None:
    (folder / "run" / "predictions.jsonl").write_text("earlier")
    data = ("--data.test", "val.tar", "--data.predict", "val.tar")
    code, printed = command(name, "--config", "run/config.yaml", *data, *named)
    assert code == 2, printed
    assert sentence.format(name=name) in printed
    assert (folder / "run" / "predictions.jsonl").read_text() == "earlier"
    assert not (folder / "typo").exists()


def test_a_run_without_a_checkpoint_says_that_it_begins(command: Callable[..., tuple[int, str]], folder: Path) -> None:
    """What a process left behind that was killed while it saved is no checkpoint."""
    (folder / "first" / "checkpoints" / ".unfinished-step=2.ckpt").mkdir(parents=True)
    code, printed = command(*FIT[:3], "--trainer.default_root_dir", "first", *LAST, "--trainer.max_steps", "1")
    assert code == 0, printed
    assert "No checkpoint in first/checkpoints: the run begins at step 0." in printed
    (folder / "single" / "checkpoints").mkdir(parents=True)
    (folder / "single" / "checkpoints" / "a.ckpt").touch()
    code, printed = command(*FIT[:3], "--trainer.default_root_dir", "single", *LAST)
    assert code == 2, printed
    assert "single/checkpoints/a.ckpt has no manifest" in printed


def test_a_named_size_takes_the_tokenizers_vocabulary(command: Callable[..., tuple[int, str]], folder: Path) -> None:
    """What is trained, stored, estimated and resumed alike."""
    fit = ("fit", "--config", "named.yaml", "--trainer.default_root_dir", "named", "--rows_per_step", "3")
    code, printed = command(*fit, "--trainer.val_check_interval", "9")  # micro-batches: 3 steps
    assert code == 0, printed
    stored = read_checkpoint(folder / "named" / "checkpoints" / "last.ckpt")
    assert stored["fuyu_e2e"]["decoder"]["vocab_size"] == 320
    assert stored["state_dict"]["decoder.embed_tokens.weight"].shape == (320, named_size("1m").width)
    sizes = {name: tensor.numel() for name, tensor in stored["state_dict"].items() if name.startswith("decoder.")}
    assert estimated(["--config", "named.yaml", "--device", "a100"]).cost.parameters == sum(sizes.values())
    events = EventAccumulator(str(folder / "named" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [2]
    code, printed = command("fit", "--config", "named/config.yaml", *LAST, "--trainer.max_steps", "5")
    assert code == 0, printed
    assert yaml.safe_load((folder / "named" / "config.yaml").read_text())["trainer"]["max_steps"] == 5
    assert read_checkpoint(folder / "named" / "checkpoints" / "last.ckpt")["global_step"] == 5


def test_a_checkpoint_may_be_named_by_run_folder_or_figure(
    command: Callable[..., tuple[int, str]], folder: Path, trained: str
) -> None:
    for number, named in enumerate(("run", "run/checkpoints", "run/checkpoints/last.ckpt")):
        fork = ("--trainer.default_root_dir", f"fork{number}", "--trainer.max_steps", "5")
        code, printed = command(*FIT[:3], *fork, "--ckpt_path", named)
        assert code == 0, printed
        assert read_checkpoint(find_checkpoint(folder / f"fork{number}"))["global_step"] == 5
    best = best_checkpoint(folder / "run")
    assert best is not None
    code, printed = command("validate", *FIT[1:], "--ckpt_path", "best")
    assert code == 0, printed
    assert f"The best checkpoint of run by val/loss ({best.value:.6g}): run/checkpoints/{best.path.name}" in printed
    code, printed = command("validate", *FIT[1:3], "--ckpt_path", "best", "--trainer.default_root_dir", "typo")
    assert code == 2, printed
    assert "no checkpoint of typo records a figure that tells the best" in printed


def test_a_run_goes_back_to_its_own_checkpoints_alone(
    command: Callable[..., tuple[int, str]], folder: Path, trained: str
) -> None:
    """Those of a later step stay, and the run goes on from what it wrote last."""
    back, other = folder / "back", folder / "other"
    code, printed = command(*FIT[:3], "--trainer.default_root_dir", "back", "--checkpoint.save_top_k", "-1")
    assert code == 0, printed
    shutil.copytree(folder / "run", other)
    shutil.rmtree(other / "checkpoints" / "last.ckpt", ignore_errors=True)
    named = str(find_checkpoint(other))
    before = everything(back)
    code, printed = command(*FIT[:3], "--trainer.default_root_dir", "back", "--ckpt_path", named)
    assert code == 2, printed
    assert "back already holds a run, and " in printed
    assert "is a checkpoint of another: name a new directory" in printed
    assert everything(back) == before
    [early] = (back / "checkpoints").glob("step=2*")
    code, printed = command(*FIT[:3], "--trainer.default_root_dir", "back", "--ckpt_path", str(early),
                            "--trainer.max_steps", "3")  # fmt: skip
    assert code == 0, printed
    assert "Going back to step 2: checkpoints of later steps, up to 4, stay, and count among the best" in printed
    assert {path.name.split("-")[0].removesuffix(".ckpt") for path in (back / "checkpoints").iterdir()} == {
        "last", "step=2", "step=3", "step=4"}  # fmt: skip
    assert read_checkpoint(find_checkpoint(back))["global_step"] == 3
    code, printed = command(*FIT[:3], "--trainer.default_root_dir", "back", *LAST)
    assert code == 0, printed
    assert "Reading the checkpoint" in printed
    assert "back/checkpoints/step=3" in printed
    events = EventAccumulator(str(back / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3], "a step is shown once"


def test_the_last_checkpoint_of_a_run_that_averages_has_the_trained_weights_too(
    command: Callable[..., tuple[int, str]], folder: Path
) -> None:
    """Also where it is saved at the very end, when Lightning has put the average into the model."""
    average = '{"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.5}}'
    for name, callbacks in (("plain", "null"), ("averaging", average)):
        fit = (*FIT[:3], "--trainer.default_root_dir", name, "--trainer.max_steps", "3")
        code, printed = command(*fit, "--trainer.callbacks", callbacks)
        assert code == 0, printed
    plain, averaging = (read_checkpoint(find_checkpoint(folder / name)) for name in ("plain", "averaging"))
    trained = averaging["current_model_state"]
    assert all(torch.equal(tensor, trained[name]) for name, tensor in plain["state_dict"].items())
    assert any(not torch.equal(tensor, averaging["state_dict"][name]) for name, tensor in trained.items())


def test_a_job_of_a_cluster_that_lightning_cannot_place_is_refused_with_its_words(
    command: Callable[..., tuple[int, str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"NTASKS": "4", "JOB_ID": "1", "PROCID": "0", "LOCALID": "0", "NODELIST": "a", "JOB_NAME": "train"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    code, printed = command(*FIT[:3], "--trainer.default_root_dir", "never")
    assert code == 2, printed
    assert "Traceback" not in printed
    assert "Use --ntasks-per-node=4 instead" in printed
    assert not (folder / "never").exists()


def test_each_process_ends_where_the_first_cannot_write_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the others waits for it: it says what was wrong before they meet again."""
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)

    def receive(told: list[Any], **_: Any) -> None:
        told[0] = UserError("closed")

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", receive)
    with pytest.raises(UserError, match="closed"):
        SaveRecipe.on_train_start(object.__new__(SaveRecipe), trainer, pl.LightningModule())


def test_a_run_that_goes_on_from_its_end_shows_each_step_once(
    command: Callable[..., tuple[int, str]], folder: Path
) -> None:
    """Lightning alone leaves one out after a checkpoint that was saved after the last batch."""
    one = ("--trainer.accumulate_grad_batches", "1", "--trainer.val_check_interval", "3", "--data.val", "null")
    fit = (*FIT[:3], "--trainer.default_root_dir", "ended", *one, *LAST)
    for steps in ("3", "4", "6"):
        code, printed = command(*fit, "--trainer.max_steps", steps)
        assert code == 0, printed
    events = EventAccumulator(str(folder / "ended" / "tensorboard")).Reload()
    for name in ("train/loss", "lr/adamw"):
        assert [event.step for event in events.Scalars(name)] == [0, 1, 2, 3, 4, 5]
