"""A checkpoint is whole or not there, whatever happens while it is written; damage is found, the one before used."""

import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from fuyu_e2e.checkpoint.atomic import (
    DIGEST_FILE,
    FILE,
    MANIFEST,
    CheckpointManifest,
    commit,
    faults,
    staging_directory,
)
from fuyu_e2e.checkpoint.lightning_io import read_checkpoint
from fuyu_e2e.checkpoint.run_checkpoints import best_checkpoint, find_checkpoint, newest, run_checkpoints
from fuyu_e2e.errors import UserError
from fuyu_e2e.training.checkpoint_io import BackgroundCheckpointIO, WholeCheckpointIO


def checkpoint(step: int, size: int = 1_000) -> dict:
    return {"global_step": step, "state_dict": {"weight": torch.full((size,), float(step))}}


def save(folder: Path, step: int, size: int = 1_000) -> Path:
    WholeCheckpointIO().save_checkpoint(checkpoint(step, size), folder / f"step={step}.ckpt")
    return folder / f"step={step}.ckpt"


def test_what_is_saved_is_read_and_told(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed_everything: 3\n")
    path = save(tmp_path / "checkpoints", 7)
    assert torch.equal(read_checkpoint(path)["state_dict"]["weight"], torch.full((1_000,), 7.0))
    manifest = CheckpointManifest.read(path)
    assert (manifest.step, manifest.recipe, set(manifest.files)) == (7, "seed_everything: 3\n", {FILE})
    assert faults(path) == []
    assert find_checkpoint(tmp_path) == path
    save(tmp_path / "checkpoints", 30)
    assert find_checkpoint(tmp_path).name == "step=30.ckpt"


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 5)])
def test_the_best_checkpoint_is_told_by_what_each_records_of_itself(tmp_path: Path, mode: str, best: int) -> None:
    """By the figure that counts now, whatever an earlier part of the run went by; equal ones by the earlier step."""

    def save_with(step: int, monitored: dict | None) -> None:
        section = {"tokens_seen": 0, "monitored": monitored}
        WholeCheckpointIO().save_checkpoint(
            checkpoint(step) | {"fuyu_e2e": section}, tmp_path / "checkpoints" / f"step={step}.ckpt"
        )

    assert best_checkpoint(tmp_path) is None
    save_with(0, None)
    assert best_checkpoint(tmp_path) is None
    save_with(1, {"name": "train/loss", "mode": "min", "value": -9.0})
    for step, value in ((4, 0.5), (2, 0.5), (3, 0.75), (5, 1.0), (6, float("nan")), (7, 1.0)):
        save_with(step, {"name": "val/loss", "mode": mode, "value": value})
    save_with(8, None)
    found = best_checkpoint(tmp_path)
    assert found is not None
    assert (found.path, found.step) == (tmp_path / "checkpoints" / f"step={best}.ckpt", best)
    assert (found.name, found.value) == ("val/loss", {2: 0.5, 5: 1.0}[best])
    (found.path / MANIFEST).write_text("{}")
    after_damage = best_checkpoint(tmp_path)
    assert after_damage is not None
    assert after_damage.step == {2: 4, 5: 7}[best]


def test_every_flipped_byte_and_truncation_is_found_and_the_one_before_is_used(tmp_path: Path) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    rng = random.Random(0)
    for number in range(250):
        file = bad / rng.choice([FILE, FILE, MANIFEST, DIGEST_FILE])
        whole, times = file.read_bytes(), file.stat()
        place = rng.randrange(len(whole))
        flipped = whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :]
        file.write_bytes(flipped if number < 200 else whole[:place])
        found, passed_over = newest(tmp_path)
        assert found == good, f"{file.name}, byte {place}"
        assert MANIFEST in passed_over[bad] or FILE in passed_over[bad]
        with pytest.raises(UserError, match="is damaged"):
            read_checkpoint(bad)
        file.write_bytes(whole)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert newest(tmp_path) == (bad, {})


def test_missing_and_strange_files_are_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "strange").write_text("")
    assert faults(path) == ["strange is not in its manifest"]
    (path / "strange").unlink()
    (path / FILE).unlink()
    assert faults(path) == [f"{FILE} is gone"]
    with pytest.raises(UserError, match=f"holds no checkpoint to go on from; step=1.ckpt: {FILE} is gone"):
        newest(tmp_path)


def test_saving_again_under_the_same_name_replaces(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step=1.ckpt"
    WholeCheckpointIO().save_checkpoint(checkpoint(2), path)
    assert read_checkpoint(path)["global_step"] == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["step=1.ckpt"]


def test_a_removal_never_takes_the_last_one(tmp_path: Path) -> None:
    first, writer = save(tmp_path, 1), WholeCheckpointIO()
    writer.remove_checkpoint(first)
    assert first.exists()
    second = save(tmp_path, 2)
    writer.remove_checkpoint(first)
    assert run_checkpoints(tmp_path) == [second]
    writer.remove_checkpoint(tmp_path / "never written.ckpt")


def test_what_is_written_in_the_background_is_the_state_of_the_moment(tmp_path: Path) -> None:
    weight, writer = torch.zeros(1_000_000), BackgroundCheckpointIO()
    for step in range(1, 4):
        weight.fill_(step)
        writer.save_checkpoint({"global_step": step, "weight": weight}, tmp_path / f"step={step}.ckpt")
        writer.link_checkpoint(tmp_path / f"step={step}.ckpt", tmp_path / "last.ckpt")
        if step > 1:
            writer.remove_checkpoint(tmp_path / f"step={step - 1}.ckpt")
    weight.fill_(9)
    read = writer.load_checkpoint(tmp_path / "last.ckpt")
    assert (read["weight"] == 3).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step=3.ckpt"]


def test_what_waits_to_be_written_is_in_the_memory_of_the_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    happened: list[str] = []
    stream, event = MagicMock(), MagicMock(spec=torch.cuda.Event)
    stream.record_event.side_effect = lambda: happened.append("queued") or event
    event.synchronize.side_effect = lambda: happened.append("copied")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)

    class Writer(WholeCheckpointIO):
        def save_checkpoint(self, checkpoint: dict, path: object, storage_options: object = None) -> None:
            happened.append("written")
            held.extend(tree_leaves(checkpoint))

    held: list[torch.Tensor] = []
    writer = BackgroundCheckpointIO(Writer())
    with FakeTensorMode():
        weight = torch.nn.Parameter(torch.empty(3, device="cuda"))
        state = {0: {"step": torch.zeros((), device="cuda"), "exp_avg": torch.empty(3, device="cuda")}}
        writer.save_checkpoint({"state_dict": {"weight": weight}, "optimizer_states": [{"state": state}]}, tmp_path)
        writer.teardown()
    assert happened == ["queued", "copied", "written"]
    assert [(tensor.device.type, tensor.requires_grad) for tensor in held] == 3 * [("cpu", False)]


def test_a_full_disk_costs_one_checkpoint_and_a_warning(tmp_path: Path) -> None:
    good = save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.warns(UserWarning, match="could not be written .*training goes on"):
            save(tmp_path, 2, size=1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert newest(tmp_path) == (good, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step=1.ckpt"]
    WholeCheckpointIO().remove_checkpoint(good)
    assert newest(tmp_path) == (good, {}), "what was to give way to the one that failed stays"


def test_what_fails_while_it_is_made_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with staging_directory(tmp_path / "a.ckpt") as place:
            (place / FILE).write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())
    with staging_directory(tmp_path / "a.ckpt") as place:
        (place / FILE).write_bytes(b"all")
        commit(place, tmp_path / "a.ckpt", step=1, tokens_seen=0)
    assert faults(tmp_path / "a.ckpt") == []


def test_killed_at_any_moment_the_newest_is_whole_and_of_one_step(tmp_path: Path, repository: Path) -> None:
    script = repository / "tests" / "training" / "kill_while_saving.py"
    result = subprocess.run(
        [sys.executable, str(script), "--kills", "5"], cwd=tmp_path, capture_output=True, text=True, timeout=1200
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ours: {'whole': 5}" in result.stdout
