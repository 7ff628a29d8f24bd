"""Runs on two processes that something happens to."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fuyu_e2e.training.module

SCRIPT = Path(__file__).with_name("guarded_runs.py")


@pytest.fixture(scope="session")
def guarded_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Runs trainings as `guarded_runs.py` describes them; gives their folder, and exit codes and seconds by name."""

    def run(*wanted: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("guarded")
        # Tests before this one may have seeded through Lightning, which leaves its seed to processes that it starts.
        environment = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(folder), json.dumps(wanted)],
            env=environment | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=3600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return folder, json.loads((folder / "results.json").read_text())

    return run


@pytest.fixture
def read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a run read its steps as on a GPU: each when the next one is queued after it, unless it is to be shown."""
    monkeypatch.setattr(fuyu_e2e.training.module, "queues", lambda device: True)
