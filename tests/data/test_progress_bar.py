"""Long work says how far it is: in lines where there is no terminal, in a bar where there is one."""

import io
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from fuyu_e2e.data import progress_bar as progress
from fuyu_e2e.data.progress_bar import ProgressBar
from fuyu_e2e.data.shards.cache import ShardCache
from fuyu_e2e.data.shards.manifest import index
from fuyu_e2e.data.shards.parallel import deaf_to_interrupts
from fuyu_e2e.data.shards.write_plan import Settings
from fuyu_e2e.data.shards.writing import write_shards

LINE = re.compile(r"Counting: 3 of 12 shards \(25 %\), \d:\d\d:\d\d so far, \d:\d\d:\d\d left")


def until(found: Callable[[], bool]) -> None:
    end = time.monotonic() + 120  # a test that fails, not one that hangs
    while not found():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.001)


def test_lines_say_how_much_of_all_is_done(at_once: None, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []

    def read() -> bool:
        said.append(capsys.readouterr().err)
        return bool(LINE.search("".join(said)))

    with ProgressBar("Counting", 12, "shards") as counted:
        for amount in (0.5, 1.5, 1.0):
            counted.advance(amount)
        until(read)
    assert [line for line in "".join(said).splitlines() if not line.startswith("Counting: ")] == []


def test_work_of_unknown_size_or_without_a_count_says_what_is_known() -> None:
    with ProgressBar("Planning", unit="rows") as counted:
        counted.advance(1_234.0)
        assert re.fullmatch(r"Planning: 1,234 rows, \d:\d\d:\d\d so far", counted.line())
    with ProgressBar("Training the tokenizer") as counted:
        assert re.fullmatch(r"Training the tokenizer: \d:\d\d:\d\d so far", counted.line())


def test_a_terminal_gets_a_bar_that_goes_away(at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(progress, "REFRESH", 0.001)
    monkeypatch.setattr(
        progress, "Console", lambda stderr: Console(file=file, force_terminal=True, width=120, color_system=None)
    )
    with ProgressBar("Counting", 12, "shards") as counted:
        counted.advance(3.0)
        until(lambda: LINE.search(file.getvalue()) is not None)
    assert file.getvalue().endswith("\x1b[2K"), "the line of the bar is cleared"


def test_short_work_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "QUIET", 600.0)
    with ProgressBar("Counting", 12, "shards") as counted:
        counted.advance(12.0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("processes", [1, 2])
def test_all_work_on_shards_is_counted_in_whichever_process(
    tmp_path: Path, counts: dict[str, tuple[float | None, float]], processes: int
) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "x"}\n' * 90 + '{"text": ""}\n' * 10)
    settings = Settings(val_share=0.3, shard_megabytes=0.05)
    report = write_shards(tmp_path / "t.jsonl", tmp_path / "out", settings=settings, processes=processes)
    shards = sorted(str(path) for path in tmp_path.glob("out/*.tar"))
    assert sum(report.shards.values()) == len(shards) > 1
    index(shards, ShardCache(tmp_path / "cache", 10**9), processes)
    assert counts["Planning"] == (None, 100)
    assert counts["Writing shards"] == (100, 100)
    assert counts["Indexing shards"] == (len(shards), pytest.approx(len(shards)))


def test_processes_that_start_deaf_never_get_ctrl_c() -> None:
    asked = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with deaf_to_interrupts():
        inside = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert inside.stdout == "True\n"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
