"""What libraries read from the environment is set before they are loaded, unless the user has set it."""

import sys

import pytest

from fuyu_e2e.cli import main
from fuyu_e2e.environment import DEFAULTS


def test_a_command_sets_the_defaults_and_leaves_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr(sys, "argv", ["fuyu-e2e", "--version"])
    for name in DEFAULTS:
        monkeypatch.setenv(name, "mine")
    assert main() == 0
    assert {os.environ[name] for name in DEFAULTS} == {"mine"}
    for name in DEFAULTS:
        monkeypatch.delenv(name)
    assert main() == 0
    assert {name: os.environ[name] for name in DEFAULTS} == DEFAULTS
