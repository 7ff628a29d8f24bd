"""What a run's checkpoints are doesn't depend on how its directory came to where it is."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fuyu_e2e.checkpoint.atomic import FILE, MANIFEST, faults, link
from fuyu_e2e.checkpoint.run_checkpoints import best_checkpoint, find_checkpoint, newest, run_checkpoints
from fuyu_e2e.errors import UserError
from fuyu_e2e.training.checkpoint_io import WholeCheckpointIO


def save(folder: Path, step: int, value: float | None = None) -> Path:
    path = folder / f"step={step}.ckpt"
    monitored = None if value is None else {"name": "val/loss", "mode": "min", "value": value}
    WholeCheckpointIO().save_checkpoint(
        {"global_step": step, "state_dict": {"weight": torch.full((8,), float(step))},
         "fuyu_e2e": {"tokens_seen": 0, "monitored": monitored}}, path)  # fmt: skip
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of steps 9, 10 and 11, by name in another order, and a link to the last."""
    run = tmp_path / "run"
    paths = [save(run / "checkpoints", step, value) for step, value in ((9, 0.5), (10, 0.25), (11, None))]
    link(paths[-1], run / "checkpoints" / "last.ckpt")
    (run / "config.yaml").touch()
    return run


def followed(run: Path, copy: Path) -> None:
    shutil.copytree(run, copy)


def linked(run: Path, copy: Path) -> None:
    shutil.copytree(run, copy, symlinks=True)


def timeless(run: Path, copy: Path) -> None:
    """Files are all of the same time, as `rsync -r` may leave them, or in the order of their names."""
    shutil.copytree(run, copy, copy_function=shutil.copyfile)
    for number, path in enumerate(sorted(copy.rglob("*"), reverse=True)):
        os.utime(path, (1e9 + number, 1e9 + number))


def elsewhere(run: Path, copy: Path) -> None:
    """The folder of checkpoints is a link to another disk."""
    linked(run, copy)
    (copy / "checkpoints").rename(copy.parent / "disk")
    (copy / "checkpoints").symlink_to(copy.parent / "disk")


@pytest.mark.parametrize("way", [followed, linked, timeless, elsewhere])
def test_the_newest_and_the_best_of_a_copied_run_are_those_of_the_run(
    way: Callable[[Path, Path], None], run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    way(run, copy)
    for named in (copy, copy / "checkpoints"):
        assert find_checkpoint(named).name == "step=11.ckpt"
        steps = [path.name for path in run_checkpoints(named) if path.name != "last.ckpt"]
        assert steps == ["step=11.ckpt", "step=10.ckpt", "step=9.ckpt"]
        best = best_checkpoint(named)
        assert best is not None
        assert best.path.name == "step=10.ckpt"


@pytest.mark.parametrize("way", [followed, linked])
def test_the_name_of_the_last_leads_to_the_next_in_a_copy_too(
    way: Callable[[Path, Path], None], run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy" / "checkpoints"
    way(run, folder.parent)
    link(save(folder, 12), folder / "last.ckpt")
    assert (folder / "last.ckpt").resolve().name == "step=12.ckpt"
    assert [path.name for path in run_checkpoints(folder)][:2] == ["step=12.ckpt", "step=11.ckpt"]
    names = ("last", "step=9", "step=10", "step=11", "step=12")
    assert {path.stem for path in folder.iterdir()} == set(names)


def test_a_run_that_went_back_goes_on_from_what_it_wrote_last(run: Path) -> None:
    save(run / "checkpoints", 10)
    assert find_checkpoint(run).name == "step=10.ckpt"


def test_a_checkpoint_whose_manifest_is_damaged_is_named_wherever_it_stood(run: Path) -> None:
    bad = run / "checkpoints" / "step=9.ckpt"
    (bad / MANIFEST).write_text("{}")
    found, passed_over = newest(run)
    assert found.name == "step=11.ckpt"
    assert "another checksum" in passed_over[bad]


def test_who_looks_for_a_checkpoint_hears_which_were_passed_over(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = run / "checkpoints" / "step=11.ckpt"
    (bad / FILE).write_bytes(b"x")
    assert find_checkpoint(run).name == "step=10.ckpt"
    assert f"Passed over the checkpoint {bad}, which is damaged: {FILE} has 1 bytes instead of" in caplog.text


def test_those_that_a_recipe_keeps_elsewhere_in_the_run_are_the_runs_but_those_of_another_run_are_not(
    run: Path, tmp_path: Path
) -> None:
    save(run / "hourly" / "of tuesday", 12)
    (run / "finetuned").mkdir()
    (run / "finetuned" / "config.yaml").touch()
    save(run / "finetuned" / "checkpoints", 500)
    assert find_checkpoint(run).name == "step=12.ckpt"
    assert find_checkpoint(run / "finetuned").name == "step=500.ckpt"
    assert find_checkpoint(tmp_path).name == "step=500.ckpt", "of several runs, the one that was written last"


def test_a_link_to_a_checkpoint_elsewhere_is_one_of_the_folder(run: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "borrowed.ckpt").symlink_to(run / "checkpoints" / "step=10.ckpt")
    assert faults(find_checkpoint(tmp_path / "other")) == []


def test_which_of_several_that_only_lightning_wrote_is_newest_is_not_guessed(tmp_path: Path) -> None:
    for number in (0, 1):
        (tmp_path / f"version_{number}").mkdir()
        (tmp_path / f"version_{number}" / f"step={number}.ckpt").touch()
        assert number or find_checkpoint(tmp_path).name == "step=0.ckpt"
    with pytest.raises(UserError, match=r"holds 2 checkpoints without a manifest, step=0\.ckpt among them: name the"):
        find_checkpoint(tmp_path)
