"""The script that runs every GPU test and benchmark ends in time, goes on where it stopped, and loses nothing."""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fuyu_e2e.bench.__main__ import BENCHMARKS


def load(repository: Path, name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, repository / "tests" / "gpu" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # where its dataclass looks for itself
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_all(repository: Path) -> ModuleType:
    return load(repository, "run_all")


@pytest.fixture
def fake(run_all: ModuleType) -> Callable[..., Any]:
    """Makes steps that only write a result, count how often they ran, and wait."""

    def step(name: str, seconds: int = 10, *, result: Any = 1, waits: float = 0, code: int = 0) -> Any:
        script = (
            f"import json, sys, time; json.dump({{'complete': {not waits}, 'found': {result!r}}}, "
            f"open(sys.argv[1], 'w')); time.sleep({waits}); sys.exit({code})"
        )
        return run_all.Step(name, ("-c", script, "{out}"), seconds)

    return step


@pytest.fixture
def call(
    run_all: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs the steps as one command does, and gives the JSON."""
    before = signal.getsignal(signal.SIGTERM)

    def run(steps: list[Any], *arguments: str, code: int = 0) -> dict[str, Any]:
        out = tmp_path / "gpu.json"
        monkeypatch.setattr(run_all, "REDUCED", tuple(steps))
        started = ["--started-at", str(time.time())]
        monkeypatch.setattr(sys, "argv", ["run_all.py", "--reduced", *arguments, "--out", str(out), *started])
        assert run_all.main() == code
        return json.loads(out.read_text())

    yield run
    signal.signal(signal.SIGTERM, before)


def test_a_step_leaves_its_figures(run_all: ModuleType, fake: Callable[..., Any], tmp_path: Path) -> None:
    found = run_all.run(fake("good", result=3), tmp_path, dict(os.environ), 60)
    assert (found["exit_code"], found["result"]) == (0, {"complete": True, "found": 3})
    assert not {"output", "cut_off"} & set(found)


def test_a_step_that_fails_or_hangs_says_so(run_all: ModuleType, tmp_path: Path) -> None:
    broken = run_all.run(run_all.Step("bad", ("-c", "raise ValueError('why')"), 60), tmp_path, dict(os.environ), 60)
    assert broken["exit_code"] == 1
    assert "ValueError: why" in broken["output"]
    slow = "import subprocess as s, time; print('so far', s.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    hung = run_all.run(run_all.Step("slow", ("-c", slow), 3), tmp_path, dict(os.environ), 60)
    assert hung["exit_code"] == "ended after 6 s"
    child = hung["output"].removeprefix("so far ").strip()
    assert child.isdecimal()
    for _ in range(50):  # a process that is killed takes a moment, and may have nobody who asks what came of it
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the step started outlives it")
    assert "cut_off" not in hung, "it would hang again"


def test_steps_teach_the_most_in_two_calls_and_everything_in_four(run_all: ModuleType, repository: Path) -> None:
    names = [step.name for step in run_all.FULL]
    assert len(set(names)) == len(names)
    assert [step for step in run_all.FULL if step.seconds > 180] == []
    order = ["tests", "steps", "waits", "graphs", "train-125m", "train-1b", "generate-125m", "generate-1b", "mod"]
    assert names[: len(order)] == order
    assert sum(step.seconds for step in run_all.FULL[: len(order)]) <= 2 * 500
    assert sum(step.seconds for step in run_all.FULL) <= 4 * 500
    kinds = list(dict.fromkeys(name.split("-")[0] for name in names))
    assert sorted(kinds) == sorted(step.name for step in run_all.REDUCED)
    for step in (*run_all.FULL, *run_all.REDUCED):
        assert not any(" " in name for name in step.name), "or --only would need quotes"
        if step.arguments[1] == "fuyu_e2e.bench":
            assert step.arguments[2] in BENCHMARKS
        elif step.arguments[0].endswith(".py"):
            assert (repository / step.arguments[0]).exists()


def test_one_file_has_everything_and_names_what_failed(
    run_all: ModuleType, fake: Callable[..., Any], call: Callable[..., Any], capsys: pytest.CaptureFixture
) -> None:
    wrong = {"checks": [{"what": "waits", "measured": 3, "expected": "at most 1", "holds": False}]}
    unmet = run_all.Step("unmet", ("-c", f"import json, sys; json.dump({wrong}, open(sys.argv[1], 'w'))", "{out}"), 60)
    written = call([fake("good"), fake("bad", code=3), unmet], code=1)
    assert written["reduced"] is True
    assert written["why_reduced"] == "asked for"
    assert {"torch", "python", "lightning"} <= set(written["versions"])
    assert {name: step["exit_code"] for name, step in written["steps"].items()} == {"good": 0, "bad": 3, "unmet": 0}
    told = capsys.readouterr().out
    assert "waits is 3, not at most 1" in told
    assert "3 of 3 steps; failed, or not as expected: bad, unmet" in told


def test_a_call_ends_in_time_and_the_next_goes_on(
    fake: Callable[..., Any], call: Callable[..., Any], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """The second step is too long for what is left, the third isn't; the next call runs the second alone."""
    steps = [fake("first", result="a"), fake("long", 500, result="b"), fake("short", result="c")]
    written = call(steps, "--seconds", "100")
    assert list(written["steps"]) == ["first", "short"]
    assert written["left"] == ["long"]
    told = capsys.readouterr().out
    command = shlex.join(["bash", "tests/gpu/all.sh", "--reduced", "--seconds", "100.0", "--out",
                          str(tmp_path / "gpu.json")])  # fmt: skip
    assert f"left: long. Go on with:\n  {command}\n" in told
    later = call([fake("first", result="again"), fake("long", 500, result="b"), fake("short", result="again")],
                 "--seconds", "100")  # fmt: skip
    assert list(later["steps"]) == ["first", "long", "short"]
    assert [step["result"]["found"] for step in later["steps"].values()] == ["a", "b", "c"]
    assert later["left"] == []
    assert "left:" not in capsys.readouterr().out


def test_what_is_cut_off_is_run_again_and_its_figures_are_kept(
    run_all: ModuleType, fake: Callable[..., Any], call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_all, "RESERVE", 0)
    started_at = time.monotonic()
    written = call([fake("slow", 30, result="half", waits=300), fake("next")], "--seconds", "6")
    assert time.monotonic() - started_at < 9
    assert list(written["steps"]) == ["slow"]
    assert written["left"] == ["slow", "next"]
    assert written["steps"]["slow"]["result"] == {"complete": False, "found": "half"}
    again = call([fake("slow", 30, result="less", waits=300), fake("next")], "--seconds", "6")
    assert again["steps"]["slow"]["earlier"] == [{"complete": False, "found": "half"}]
    assert again["steps"]["slow"]["result"]["found"] == "less"
    whole = call([fake("slow", 30, result="all"), fake("next")])
    assert (whole["steps"]["slow"]["result"]["found"], whole["left"]) == ("all", [])
    assert not {"earlier", "cut_off"} & set(whole["steps"]["slow"])


def test_only_runs_what_it_names_also_again(
    fake: Callable[..., Any], call: Callable[..., Any], capsys: pytest.CaptureFixture
) -> None:
    call([fake("a", result=1), fake("b", result=1), fake("c", result=1)], "--only", "a", "b")
    written = call([fake(name, result=2) for name in "abc"], "--only", "b")
    assert {name: step["result"]["found"] for name, step in written["steps"].items()} == {"a": 1, "b": 2}
    assert written["left"] == ["c"]
    capsys.readouterr()
    call([fake("a", result=3), fake("b", 500, result=3)], "--only", "a", "b", "--seconds", "60")
    assert "--only b --seconds 60.0" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        call([fake("a")], "--only", "z")
    assert "There is no step z: choose from a." in capsys.readouterr().err


def test_a_file_of_another_machine_is_kept_and_a_new_one_begun(
    run_all: ModuleType, fake: Callable[..., Any], call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture, tmp_path: Path,
) -> None:  # fmt: skip
    call([fake("a", result=1)])
    monkeypatch.setattr(run_all, "versions", lambda: {"torch": "3.0"})
    written = call([fake("a", result=2)])
    assert written["steps"]["a"]["result"]["found"] == 2
    assert "gpu.json differs from now in: versions. It is kept as" in capsys.readouterr().out
    (tmp_path / "gpu.json").write_text("half of a fi")
    call([fake("a", result=3)])
    kept = [json.loads((tmp_path / "gpu-1.json").read_text()), (tmp_path / "gpu-2.json").read_text()]
    assert kept[0]["steps"]["a"]["result"]["found"] == 1
    assert kept[1] == "half of a fi"


def test_a_signal_leaves_what_was_found_and_no_process(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    process = subprocess.Popen(
        [sys.executable, "tests/gpu/run_all.py", "--reduced", "--only", "tests", "--out", str(out)],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository)},
        stdout=subprocess.PIPE,
        text=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (started := children.read_text().split()):
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    told, _ = process.communicate(timeout=60)
    written = json.loads(out.read_text())
    assert written["steps"]["tests"]["exit_code"] == "interrupted"
    assert written["left"][0] == "tests"
    assert "Go on with" in told
    assert not any(Path(f"/proc/{child}").exists() for child in started)


def test_what_came_of_each_test_is_kept(repository: Path, tmp_path: Path) -> None:
    """By the plugin of tests/gpu/conftest.py."""
    (tmp_path / "conftest.py").write_text((repository / "tests" / "gpu" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n\n\ndef test_a(): pass\n\n\ndef test_b(): assert 1 == 2, 'so'\n\n\n"
        "def test_c(): pytest.skip('no GPU')\n\n\ndef test_d(): os._exit(9)\n"
    )
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path)]
    subprocess.run([*command, str(tmp_path), "--outcomes", str(out)], env=os.environ | {"PYTHONPATH": str(repository)})
    found = json.loads(out.read_text())
    assert (found["complete"], found["passed"]) == (False, 1)
    assert found["skipped"] == {"test_it.py::test_c": "Skipped: no GPU"}
    [(name, reason)] = found["failed"].items()
    assert name == "test_it.py::test_b"
    assert "AssertionError: so" in reason


def test_a_place_that_cannot_be_written_costs_no_steps_minutes(
    fake: Callable[..., Any], call: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "gpu.json").mkdir()
    with pytest.raises(SystemExit, match="2"):
        call([fake("a", waits=100)])
    assert "can't be written" in capsys.readouterr().err
