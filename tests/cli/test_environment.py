"""What libraries read from the environment is set before they are loaded, unless the user has set it."""

import importlib
import os
import sys
from collections.abc import Callable

import pytest

from fuyu_e2e.cli import main
from fuyu_e2e.training.settings.environment import SPIN_COUNT


@pytest.mark.parametrize(
    ("mine", "then"),
    [
        ({}, {"GOMP_SPINCOUNT": SPIN_COUNT}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, {"OMP_WAIT_POLICY": "PASSIVE"}),
    ],
)
def test_a_command_sets_how_threads_wait_and_leaves_what_the_user_set(
    mine: dict[str, str], then: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["fuyu-e2e", "--version"])
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    assert main() == 0
    assert {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ} == then
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("started", "finder", "name"),
    [
        ("fuyu_e2e.cli.main", "fuyu_e2e.cli.main", "fit"),
        ("fuyu_e2e.bench.__main__", "fuyu_e2e.bench.command", "train"),
        ("fuyu_e2e.studies.__main__", "fuyu_e2e.bench.command", "isoflop"),
    ],
)
def test_it_is_set_before_what_loads_torch_is_imported(
    started: str, finder: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, found = importlib.import_module(started), []

    def resolve(path: str) -> Callable[..., int]:
        found.append(os.environ.get("GOMP_SPINCOUNT"))
        return lambda args: 0

    monkeypatch.setattr(importlib.import_module(finder), "resolve_name", resolve)
    monkeypatch.setattr(sys, "argv", ["program", name])
    for variable in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(variable, "")  # so that what is set here goes away again
        monkeypatch.delenv(variable)
    assert program.main() == 0
    assert found == [SPIN_COUNT]
