"""The script that runs every GPU test and benchmark keeps what succeeded, and says what failed and why."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def run_all(repository: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location("run_all", repository / "tests" / "gpu" / "run_all.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["run_all"] = module  # where its dataclass looks for itself
    specification.loader.exec_module(module)
    return module


def test_a_step_leaves_its_figures(run_all: ModuleType, tmp_path: Path) -> None:
    write = "import json, sys; json.dump(dict(speed=3), open(sys.argv[1], 'w'))"
    found = run_all.run(run_all.Step("good", ("-c", write, "{out}"), 60), tmp_path, dict(os.environ))
    assert (found["exit_code"], found["result"]) == (0, {"speed": 3})
    assert "output" not in found


def test_a_step_that_fails_or_hangs_says_so(run_all: ModuleType, tmp_path: Path) -> None:
    broken = run_all.run(run_all.Step("bad", ("-c", "raise ValueError('why')"), 60), tmp_path, dict(os.environ))
    assert broken["exit_code"] == 1
    assert "ValueError: why" in broken["output"]
    slow = "print('so far', flush=True); import time; time.sleep(600)"
    hung = run_all.run(run_all.Step("slow", ("-c", slow), 2), tmp_path, dict(os.environ))
    assert hung["exit_code"] == "ended after 2 s"
    assert "so far" in hung["output"]


def test_the_whole_stays_under_25_minutes(run_all: ModuleType) -> None:
    assert sum(step.seconds for step in run_all.FULL) <= 24.5 * 60
    assert [step.name.split()[0] for step in run_all.REDUCED] == list(
        dict.fromkeys(step.name.split()[0] for step in run_all.FULL)
    )


def test_one_file_has_everything_and_names_what_failed(
    run_all: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    steps = (run_all.Step("good", ("-c", "pass"), 60), run_all.Step("bad", ("-c", "raise SystemExit(3)"), 60))
    monkeypatch.setattr(run_all, "REDUCED", steps)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--reduced", "--out", str(tmp_path / "gpu.json")])
    assert run_all.main() == 1
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["reduced"] is True
    assert written["why_reduced"] == "asked for"
    assert {"torch", "python", "lightning"} <= set(written["versions"])
    assert {name: step["exit_code"] for name, step in written["steps"].items()} == {"good": 0, "bad": 3}
    assert "failed: bad" in capsys.readouterr().out


def test_a_report_of_tests_is_counted(run_all: ModuleType, tmp_path: Path) -> None:
    cases = "<testcase name='a'/><testcase name='b'><failure/></testcase><testcase name='c'><skipped/></testcase>"
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert run_all.tests_of(tmp_path / "tests.xml") == {"passed": 1, "skipped": 1, "failed": ["b"]}
