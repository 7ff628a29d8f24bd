"""What a recipe, a checkpoint and a command line may do, each tried by somebody who means harm."""

import io
import re
import sys
import tarfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from fuyu_e2e.checkpoint.atomic import FILE, commit, staging_directory
from fuyu_e2e.checkpoint.lightning_io import read_checkpoint
from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UserError
from fuyu_e2e.training.settings.recipe import FuyuCLI

RECIPE = f"--config={shipped('recipes/quickstart.yaml')}"
MODULE = """
from pathlib import Path
from lightning.pytorch.callbacks import Callback
Path(__file__).with_suffix(".ran").touch()
class Mine(Callback):
    def on_train_end(self, trainer, pl_module):
        Path(__file__).with_suffix(".trained").touch()
def function(*args): ...
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What a module of somebody else leaves when it runs; the module lies where Python finds it."""
    (tmp_path / "outside.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "outside.ran"
    sys.modules.pop("outside", None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Arguments that train a small model on the CPU."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer.save(folder / "tokenizer.model")
    with tarfile.open(folder / "train.tar", "w") as tar:
        for number in range(8):
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = len(text := f"a red square {number}".encode())
            tar.addfile(info, io.BytesIO(text))
    return (
        RECIPE, f"--data.tokenizer={folder}/tokenizer.model", f"--data.train={folder}/train.tar", "--data.lanes=2",
        "--data.budget=64", "--trainer.enable_progress_bar=false", "--checkpoint.every_n_train_steps=1",
        "--trainer.accelerator=cpu", "--model.decoder.layers=1",
    )  # fmt: skip


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...]) -> dict[str, Any]:
    """The checkpoint of a run of one step."""
    run = tmp_path_factory.mktemp("started")
    FuyuCLI(["fit", *data, "--trainer.max_steps=1", f"--trainer.default_root_dir={run}"])
    return read_checkpoint(run / "checkpoints" / "last.ckpt")


@pytest.fixture
def go_on(tmp_path: Path, data: tuple[str, ...]) -> Callable[..., FuyuCLI]:
    """Goes on from a checkpoint to step 2 in a directory of its own."""

    def go_on(checkpoint: Path | str, *args: str) -> FuyuCLI:
        return FuyuCLI(
            [
                "fit", *data, "--trainer.max_steps=2", f"--trainer.default_root_dir={tmp_path}/run",
                f"--ckpt_path={checkpoint}", *args,
            ]
        )  # fmt: skip

    return go_on


# Recipes


WAYS = {
    "a list": "trainer: {callbacks: [{class_path: outside.Mine}]}",
    "a name alone": "trainer: {callbacks: outside.Mine}",
    "a type that may be text": "trainer: {strategy: outside.Mine}",
    "a logger": "trainer: {logger: {class_path: outside.Mine}}",
    "a plugin": "trainer: {plugins: [outside.Mine]}",
    "a profiler": "trainer: {profiler: {class_path: outside.Mine}}",
    "a setting of ours": "model: {optimizer: {class_path: outside.Mine}}",
    "a setting with names": "model: {decoder: outside.Mine}",
    "a function": "trainer: {callbacks: [{class_path: LambdaCallback, init_args: {on_fit_start: outside.function}}]}",
    "within another": "trainer: {strategy: {class_path: DDPStrategy, init_args: {checkpoint_io: outside.Mine}}}",
    "another file": "trainer: other.yaml",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_class_outside_the_allowed_packages_is_refused_before_it_is_imported(
    way: str, outside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(WAYS[way])
    Path("other.yaml").write_text("callbacks: outside.Mine")
    with pytest.raises(UserError, match=r"names outside\.\w+,.* --allow-imports outside"):
        FuyuCLI([RECIPE, "--config=recipe.yaml"], run=False)
    assert not outside.exists()


@pytest.mark.parametrize(
    "args",
    [
        ["--trainer.callbacks=outside.Mine"],
        ["--trainer.callbacks+=outside.Mine"],
        ["--trainer.callbacks.help", "outside.Mine"],
        ["--trainer.callbacks=outside.Mine", "--print_config"],
        ["--trainer.callbacks=outside.Mine", "--help"],
        ['--config={"trainer": {"callbacks": "outside.Mine"}}'],
        ['--trainer={"callbacks": {"class_path": "outside.Mine"}}'],
    ],
)
def test_nor_can_a_command_line_name_one(args: list[str], outside: Path) -> None:
    with pytest.raises(UserError, match=r"trainer(\.callbacks)? names outside\.Mine"):
        FuyuCLI(args, run=False)
    assert not outside.exists()


def test_the_sentence_names_file_setting_and_class(outside: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(WAYS["a list"])
    with pytest.raises(UserError) as refused:
        FuyuCLI(["fit", RECIPE, f"--config={tmp_path}/recipe.yaml"])
    assert str(refused.value) == (
        f"trainer.callbacks in {tmp_path}/recipe.yaml names outside.Mine, and a recipe may name only classes of "
        "Lightning and fuyu-e2e: if you trust that code, say --allow-imports outside."
    )


@pytest.mark.parametrize(
    "path",
    [
        "lightning.pytorch.loggers.wandb.os.system",
        "fuyu_e2e.training.settings.recipe.FuyuCLI",
        "torch.load",
        "builtins.exec",
    ],
)
@pytest.mark.parametrize("key", ["--trainer.callbacks={}", '--trainer.callbacks={{"class_path": "LambdaCallback", '
                                 '"init_args": {{"on_fit_start": "{}"}}}}'])  # fmt: skip
def test_what_runs_code_is_not_reached_through_an_allowed_package(path: str, key: str) -> None:
    with pytest.raises(UserError, match=r"trainer.callbacks names"):
        FuyuCLI([RECIPE, key.format(path)], run=False)


def test_a_user_can_allow_packages_for_one_start(outside: Path, tmp_path: Path, data: tuple[str, ...]) -> None:
    (tmp_path / "recipe.yaml").write_text(WAYS["a list"])
    args = ["fit", *data, f"--config={tmp_path}/recipe.yaml", f"--trainer.default_root_dir={tmp_path}/run"]
    args.append("--trainer.max_steps=1")
    FuyuCLI([*args, "--allow-imports", "other,outside", "--allow-imports=third"])
    assert outside.with_suffix(".trained").exists()
    with pytest.raises(UserError, match=r"names outside.Mine"):
        FuyuCLI(args)


def test_a_recipe_cannot_allow_itself_anything(outside: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"allow_imports: outside\n{WAYS['a list']}")
    with pytest.raises(UserError):
        FuyuCLI(["fit", RECIPE, f"--config={tmp_path}/recipe.yaml"])
    assert not outside.exists()


@pytest.mark.parametrize("named", ["*", "jsonargparse", "a/b", ""])
def test_only_packages_can_be_allowed(named: str) -> None:
    with pytest.raises(UserError, match="is no package that can be allowed"):
        FuyuCLI(["fit", RECIPE, "--allow-imports", named])


def test_yaml_makes_nothing_but_values(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"trainer: !!python/object/apply:os.mkdir ['{tmp_path}/made']")
    with pytest.raises(UserError, match=r"recipe\.yaml is no YAML in line 1"):
        FuyuCLI([f"--config={tmp_path}/recipe.yaml"], run=False)
    assert not (tmp_path / "made").exists()


def test_only_the_command_line_lets_shards_be_commands(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("data: {allow_pipe: true, train: 'pipe:touch made'}")
    args = [RECIPE, f"--config={tmp_path}/recipe.yaml"]
    for more in ([], ["--data.allow_pipe=false", f"--config={tmp_path}/recipe.yaml"]):
        with pytest.raises(UserError, match=r"say --data\.allow_pipe true on the command line"):
            FuyuCLI([*args, *more], run=False)
    assert FuyuCLI([*args, "--data.allow_pipe", "true"], run=False).datamodule.allow_pipe


# Checkpoints


class Evil:
    """A pickle that makes a folder when it is read."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.place,)


def save(checkpoint: dict[str, Any], place: Path) -> None:
    """Saves a checkpoint with a manifest in which everything is right."""
    with staging_directory(place) as folder:
        torch.save(checkpoint, folder / FILE)
        commit(folder, place, step=1, tokens_seen=0)


@pytest.mark.parametrize("named", ["https://127.0.0.1:9/a.ckpt", "s3://bucket/a.ckpt", "hpc", "registry:a"])
def test_a_checkpoint_that_is_not_on_this_machine_is_not_asked_for(named: str) -> None:
    with pytest.raises(UserError, match="is no checkpoint on this machine"):
        FuyuCLI(["fit", RECIPE, f"--ckpt_path={named}"])


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_no_setting_has_a_checkpoint_unpickled(command: str) -> None:
    with pytest.raises(UserError, match="sets weights_only, which is no setting"):
        FuyuCLI([command, RECIPE, '--config={"weights_only": false}'])


def test_nor_does_the_environment(tmp_path: Path, go_on: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    save({"evil": Evil(tmp_path / "made")}, tmp_path / "run/checkpoints/a.ckpt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for named in ("last", tmp_path / "run/checkpoints/a.ckpt"):
        with pytest.raises(Exception, match=r"can't be read as a checkpoint|Weights only load failed"):
            go_on(named)
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_that_lightning_finds_elsewhere_is_not_read(
    tmp_path: Path, data: tuple[str, ...], started: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where Lightning saves as the run fails: it takes that URL for a path
    file = io.BytesIO()
    torch.save(started, file)
    fsspec.filesystem("memory").pipe_file("/elsewhere/last.ckpt", file.getvalue())
    there = (
        '{"class_path": "OnExceptionCheckpoint", "init_args": {"dirpath": "memory://elsewhere", "filename": "last"}}'
    )
    with pytest.raises(UserError, match=r"elsewhere/last.ckpt, which is not on this machine"):
        FuyuCLI(
            ["fit", *data, "--trainer.max_steps=2", "--trainer.default_root_dir=run", f"--trainer.callbacks={there}"]
        )


def test_a_folder_whose_name_begins_like_a_url_is_one_of_this_machine(
    tmp_path: Path, go_on: Callable, started: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "http-run").mkdir()
    torch.save(started, tmp_path / "http-run/a.ckpt")
    monkeypatch.chdir(tmp_path)
    assert go_on("http-run/a.ckpt").trainer.global_step == 2


def test_hyperparameters_of_a_checkpoint_are_no_settings(
    outside: Path, tmp_path: Path, go_on: Callable, started: dict[str, Any]
) -> None:
    path = tmp_path / "evil.ckpt"
    evil = {"optimizer": {"class_path": "outside.Mine"}, "max_new_tokens": 7}
    torch.save(started | {"hyper_parameters": evil}, path)
    assert go_on(path).model.max_new_tokens == 16
    assert not outside.exists()


@pytest.mark.parametrize("form", ["local://{}", "{run}/checkpoints/../../victim", "{run}/checkpoints/link"])
def test_a_checkpoint_cannot_have_files_deleted(
    form: str, tmp_path: Path, go_on: Callable, started: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/file").touch()
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/link").symlink_to(tmp_path / "victim")
    target = form.format(tmp_path / "victim", run=run) + ("/file" if form.endswith("link") else "")
    [key] = [key for key in started["callbacks"] if key.startswith("Checkpoints")]
    evil = started["callbacks"][key] | {"dirpath": f"{run}/checkpoints"}
    evil |= dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path"), target)
    save(started | {"callbacks": started["callbacks"] | {key: evil}}, run / "checkpoints/a.ckpt")
    monkeypatch.chdir(run / "checkpoints")  # where a URL, taken for a path, would lie, too
    go_on("last")
    assert (tmp_path / "victim/file").exists()


def test_a_run_that_goes_on_still_replaces_its_own_checkpoints(tmp_path: Path, data: tuple[str, ...]) -> None:
    fit = ["fit", *data, f"--trainer.default_root_dir={tmp_path}"]
    FuyuCLI([*fit, "--trainer.max_steps=1"])
    FuyuCLI([*fit, "--trainer.max_steps=2", "--ckpt_path=last"])
    assert len(list(tmp_path.glob("checkpoints/*step=2.ckpt"))) == 1
    assert len(list(tmp_path.glob("checkpoints/*.ckpt"))) == 2


# The page


def test_every_line_of_the_page_names_a_test_that_exists(repository: Path) -> None:
    page = (repository / "docs/security.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    named = [re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line) for line in lines]
    assert len(lines) > 15
    assert all(named[1:]), "each line but the head"
    for path, name in chain.from_iterable(named):
        assert f"def {name}(" in (repository / path).read_text(), f"{path}::{name}"
