"""A command that takes seconds to load says so on a terminal, and writes nothing into a file's beginning."""

import sys
import threading

import pytest

from fuyu_e2e.cli.starting import starting
from fuyu_e2e.data import progress_bar as progress


@pytest.mark.parametrize("terminal", [True, False])
def test_a_slow_start_shows_on_a_terminal_only(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "QUIET", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    said = threading.Event()
    line = progress.ProgressBar.line

    def told(self: progress.ProgressBar) -> str:
        said.set()
        return line(self)

    monkeypatch.setattr(progress.ProgressBar, "line", told)
    with starting():
        assert said.wait(60 if terminal else 0) == terminal
    assert ("Starting: 0:00:0" in capsys.readouterr().err) == terminal
