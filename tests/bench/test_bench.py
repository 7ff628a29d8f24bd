"""The benchmarks run, at a size that measures nothing, and leave the figures that the docs quote."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import fuyu_e2e.bench.generate as bench_generate
from fuyu_e2e.bench.__main__ import main
from fuyu_e2e.bench.measure import alternate
from fuyu_e2e.bench.mod import mod
from fuyu_e2e.studies.isoflop import CONTENDERS, isoflop


def test_contenders_alternate_and_give_their_medians() -> None:
    order: list[str] = []
    seconds = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warm_up=1)
    assert order == ["a", "b"] * 4
    assert set(seconds) == {"a", "b"}
    assert all(value >= 0 for value in seconds.values())


def test_mod_times_training_prefill_and_decoding(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "mod.json"
    mod(["--widths", "64", "--lengths", "128", "--document", "64", "--rounds", "1", "--modes", "eager",
         "--out", str(out)])  # fmt: skip
    written = json.loads(out.read_text())
    assert {"device", "torch", "date"} <= set(written)
    assert {(result["phase"], result["skipped"]) for result in written["results"]} == {
        (phase, skipped) for phase in ("train", "prefill", "decode") for skipped in ("nothing", "keys")
    }
    for result in written["results"]:
        assert 0.4 < result["flop_ratio"] < 1
        if result["phase"] == "prefill" and result["skipped"] == "nothing":
            assert 0.45 < result["cache_ratio"] < 0.75
    assert "width 64, 128 tokens, eager: done" in capsys.readouterr().out


def test_isoflop_trains_each_contender_to_the_same_operations(tmp_path: Path) -> None:
    out = tmp_path / "isoflop.json"
    arguments = ["--budgets", "4", "--seeds", "0", "--pictures", "300", "--test-pictures", "4", "--out", str(out)]
    isoflop([*arguments, "--contenders", "dense", "threshold 0.125"])
    first = json.loads(out.read_text())["results"]
    isoflop([*arguments, "--contenders", "dense", "topk 0.125"])
    results = json.loads(out.read_text())["results"]
    assert results[:2] == first, "what was done is not done again"
    assert [result["contender"] for result in results] == ["dense", "threshold 0.125", "topk 0.125"]
    assert results[0]["steps"] == 4 < results[1]["steps"]
    for result in results:
        assert result["training_flops"] == pytest.approx(results[0]["training_flops"], rel=0.3)
        assert result["loss"] > 0
    assert "loss_looking_ahead" in results[2]
    assert (tmp_path / "isoflop.png").stat().st_size > 10_000


def test_every_rule_is_a_contender() -> None:
    rules = {config.routing.rule for config in CONTENDERS.values() if config.routing is not None}
    assert rules == {"threshold", "topk", "image_topk", "fixed", "random"}


def test_generate_compares_contenders_that_write_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled here, which `tests/inference` does."""
    pytest.importorskip("transformers", reason="needs the extra `export`")
    ours = bench_generate.generate_ours
    asked: list[bool] = []

    def eager(*args: Any, compiled: bool, **settings: Any) -> list[list[int]]:
        asked.append(compiled)
        return ours(*args, **settings)

    monkeypatch.setattr(bench_generate, "generate_ours", eager)
    out = tmp_path / "generate.json"
    bench_generate.generate(["--sizes", "quickstart", "--batches", "1", "3", "--new-tokens", "5", "--rounds", "1",
                             "--device", "cpu", "--out", str(out)])  # fmt: skip
    written = json.loads(out.read_text())
    assert {"device", "torch", "transformers", "date", "copy_gigabytes_per_second"} <= set(written)
    names = ["transformers", "transformers, static cache", "ours", "ours, compiled"]
    assert [(result["prompts"], result["contender"]) for result in written["results"]] == [
        (prompts, name) for prompts in (1, 3) for name in names
    ]
    assert asked.count(True) == asked.count(False) > 0
    for result in written["results"]:
        assert result["same_tokens"] == 1, "other tokens than transformers writes"
        assert min(result["seconds"], result["prefill_seconds"]) > 0
        rounding = 0.5e-5 / result["seconds"] + 0.05 / result["tokens_per_second"]
        assert result["tokens_per_second"] == pytest.approx(
            result["prompts"] * 5 / result["seconds"], rel=2 * rounding
        )


def test_an_unknown_benchmark_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "speed"])
    assert main() == 2
    assert "mod, data" in capsys.readouterr().err
