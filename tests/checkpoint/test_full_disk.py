"""A disk that training fills costs the checkpoints and curves it has no room for, and nothing else."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fuyu_e2e.training.tensorboard import Curves

SCRIPT = Path(__file__).with_name("on_full_disk.py")


def unshare() -> list[str]:
    """A command that gives another one mounts of its own, as root or as a user; skips where none does."""
    for options in ("-m", "-Urm"):
        command = ["unshare", options]
        mount = [*command, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
        if shutil.which("unshare") and not subprocess.run(mount, capture_output=True).returncode:
            return command
    pytest.skip("needs to mount a disk of its own, which this machine or container forbids")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `on_full_disk.py` left, and all that it printed."""
    folder = tmp_path_factory.mktemp("full-disk")
    done = subprocess.run(
        [*unshare(), sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "told.json").read_text()) | {"printed": done.stdout + done.stderr}


def test_a_run_that_fills_its_disk_goes_on_to_its_end_and_its_checkpoints_are_right(told: dict[str, Any]) -> None:
    """Its first three fit; the fourth fills the disk by itself, the others and the curves find it full."""
    assert told["fit"] == 0
    assert told["checkpoints"] == ["last.ckpt", *(f"step={step}.ckpt" for step in (2, 4, 6))]
    assert told["verify"] == 0
    for step in (8, 10, 12):
        assert f"step={step}.ckpt could not be written" in told["printed"]
    assert told["printed"].count("its curves wait in memory") == 1


def test_a_run_goes_on_once_there_is_room(told: dict[str, Any]) -> None:
    assert told["go on"] == told["verify all"] == 0
    assert "step=14.ckpt" in told["checkpoints in the end"]
    assert told["steps"][:8] == [*range(1, 9)]
    assert told["steps"][-8:] == [*range(7, 15)]


def test_a_run_begun_on_a_full_disk_ends_with_a_sentence(told: dict[str, Any]) -> None:
    assert told["begin"] == 2
    assert "fuyu-e2e: The disk has no room left: make room on it, and run the command again." in told["printed"]


def test_curves_wait_in_memory_until_there_is_room(tmp_path: Path) -> None:
    """A file size limit in the place of a full disk, within a record; nothing is lost or unreadable."""
    curves = Curves(tmp_path, name="", version="")

    def log(first: int) -> None:
        for step in range(first, first + 50):
            curves.log_metrics({"loss": float(step)}, step)
        curves.experiment.flush()

    log(0)
    [file] = tmp_path.glob("events*")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 100, limits[1]))
    try:
        with pytest.warns(UserWarning, match="could not be written .* its curves wait in memory") as warned:
            log(50)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert len(warned) == 1
    log(100)
    curves.finalize("success")
    read = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    read.Reload()
    assert [event.value for event in read.Scalars("loss")] == [*range(150)]
