"""A benchmark that is cut off leaves a file that can be read, with all that it had measured."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fuyu_e2e.bench.generate as bench_generate
import fuyu_e2e.bench.limit as bench_limit
import fuyu_e2e.bench.mod as bench_mod
import fuyu_e2e.bench.scale as bench_scale
import fuyu_e2e.bench.train as bench_train
from fuyu_e2e.bench.measure import Figures, alternate, write_json


class CutOff(BaseException):
    """As a signal ends a benchmark."""


def then_cut_off(*results: Any) -> Callable[..., Any]:
    """Gives one result after the other, and then no more."""
    left = iter(results)

    def measure(*_: Any, **__: Any) -> Any:
        for result in left:
            return result
        raise CutOff

    return measure


def left_by(benchmark: Callable[[Sequence[str]], None], out: Path, *args: str) -> dict[str, Any]:
    with pytest.raises(CutOff):
        benchmark([*args, "--out", str(out)])
    written = json.loads(out.read_text())
    assert written["complete"] is False
    assert {"device", "torch", "date"} <= set(written)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return written


def test_figures_say_whether_they_are_all(tmp_path: Path) -> None:
    figures = Figures(tmp_path / "new" / "figures.json", {"device": "a", "speed": 0})
    figures.keep(speed=1)
    assert json.loads((tmp_path / "new" / "figures.json").read_text()) == {
        "complete": False,
        "device": "a",
        "speed": 1,
    }
    figures.end(memory=2)
    assert json.loads((tmp_path / "new" / "figures.json").read_text()) == {
        "complete": True,
        "device": "a",
        "speed": 1,
        "memory": 2,
    }


def test_a_write_that_fails_leaves_the_figures_before(tmp_path: Path) -> None:
    write_json(tmp_path / "figures.json", {"speed": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "figures.json", {"speed": 2, "of": {CutOff}})
    assert json.loads((tmp_path / "figures.json").read_text()) == {"speed": 1}


def test_mod_leaves_the_cases_that_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_mod, "_measure", then_cut_off([{"width": 64}], [{"width": 128}]))
    found = left_by(bench_mod.mod, tmp_path / "mod.json", "--widths", "64", "128", "256", "--lengths", "128",
                    "--modes", "eager")  # fmt: skip
    assert found["results"] == [{"width": 64}, {"width": 128}]


def test_generate_leaves_the_cases_that_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="needs the extra `transformers`")
    monkeypatch.setattr(bench_generate, "_measure", then_cut_off([{"contender": "ours"}]))
    monkeypatch.setattr(bench_generate, "copy_bandwidth", lambda *_: 1e9)
    monkeypatch.setattr(bench_generate, "random_decoder", lambda *_: None)
    monkeypatch.setattr(bench_generate, "stock_model", lambda *_: SimpleNamespace(eval=lambda: None))
    args = ("--sizes", "quickstart", "--batches", "1", "8")
    found = left_by(bench_generate.generate, tmp_path / "generate.json", *args)
    assert found["results"] == [{"size": "quickstart", "prompts": 1, "contender": "ours"}]


def test_scale_leaves_the_points_that_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_scale, "peak_memory", then_cut_off(3_000_000, 1_000_000, 9_000_000))
    found = left_by(bench_scale.scale, tmp_path / "scale.json", "--rows", "600", "1200", "2400")
    tokens = [len(bench_scale.Point(bench_scale.TINY, row, 15).batch().tokens) for row in (600, 1200)]
    assert found["rows"] == [
        {"value": 600, "bytes_per_token": round(2_000_000 / tokens[0])},
        {"value": 1200, "bytes_per_token": round(8_000_000 / tokens[1])},
    ]


def test_limit_leaves_the_shares_that_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_limit, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr(bench_limit, "copy_bandwidth", lambda *_: 1e9)
    step = {"what": "training step", "seconds": 2.0, "flops": 1e9, "least_bytes": 1e9}
    monkeypatch.setattr(bench_limit, "_training", then_cut_off(step))
    found = left_by(bench_limit.limit, tmp_path / "limit.json", "--sizes", "small", "10m")
    assert found["shares"] == [step | {"of_matmul_rate": 0.5, "of_bandwidth": 0.5}]


def test_train_leaves_memory_and_the_rounds_that_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="needs the extra `transformers`")
    case = replace(bench_train.CASES["small"], budget=256, rows=2, sides=(2, 6))
    monkeypatch.setattr(bench_train, "CASES", {"small": case})
    monkeypatch.setattr(bench_train, "peak_rate", lambda *_: (1e9, "measured"))
    monkeypatch.setattr(bench_train, "peak_memory", then_cut_off(7))
    args = ("--sizes", "small", "--contenders", "transformers, sdpa", "ours")
    found = left_by(bench_train.train, tmp_path / "train.json", *args)
    assert found["cases"][0]["results"] == [
        {"contender": "transformers, sdpa", "peak_memory_bytes": 7},
        {"contender": "ours", "peak_memory_bytes": None},
    ]

    def one_round(running: dict[str, Any], *_: Any, keep: Callable[[dict[str, float]], None], **__: Any) -> None:
        keep(dict(zip(running, (4.0, 2.0), strict=True)))
        raise CutOff

    monkeypatch.setattr(bench_train, "peak_memory", lambda *_: 7)
    monkeypatch.setattr(bench_train, "alternate", one_round)
    theirs, ours = left_by(bench_train.train, tmp_path / "train.json", *args)["cases"][0]["results"]
    assert (theirs["times_as_fast"], ours["times_as_fast"]) == (1, 2)


def test_medians_are_known_after_each_timed_round() -> None:
    known: list[dict[str, float]] = []
    medians = alternate({"a": lambda: None, "b": lambda: None}, rounds=3, warm_up=1, keep=known.append)
    assert len(known) == 3
    assert known[-1] == medians
