"""The benchmark of optimizers: what it calls steps saved, and that it runs."""

import json
from pathlib import Path

import pytest

import fuyu_e2e.studies.optimizers as bench_optimizers
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.studies.optimizers_report import compare, steps_to


@pytest.mark.parametrize(
    ("target", "steps"), [(1.0, 200.0), (2.0, 100.0), (2**0.5, 100 * 2**0.5), (0.5, 400.0), (0.4, None), (3.0, 100.0)]
)
def test_steps_to_a_loss_lie_between_the_runs_around_it(target: float, steps: float | None) -> None:
    found = steps_to(target, {200: 1.0, 100: 2.0, 300: 1.2, 400: 0.5})
    assert found == (None if steps is None else pytest.approx(steps))


def test_steps_saved_are_of_each_seed() -> None:
    losses = {
        ("adamw", 1): {100: 3.0, 200: 2.0, 400: 1.0},
        ("muon", 1): {100: 2.0, 200: 1.0, 400: 0.5},
        ("adamw", 2): {100: 3.0, 200: 2.5, 400: 2.0},
        ("muon", 2): {100: 2.9, 200: 2.6, 400: 2.2},
    }
    runs = [
        {"optimizer": name, "seed": seed, "steps": steps, "loss": loss}
        for (name, seed), by_steps in losses.items()
        for steps, loss in by_steps.items()
    ]
    shortest, middle, longest = compare(runs)
    assert shortest["times_as_many"] == {"1": 1.0, "2": 1.0}
    assert shortest["at_least"] == [1, 2]
    assert middle["times_as_many"]["1"] == longest["times_as_many"]["1"] == 2.0
    assert middle["at_least"] == [1]
    assert 0.5 < middle["times_as_many"]["2"] < 1
    assert longest["times_as_many"]["2"] is None
    assert longest["median"] is None
    assert longest["at_least"] == []


def test_the_best_of_equally_many_tries_trains_anew_and_what_is_done_stays_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = FuyuConfig(
        vocab_size=320, patch_size=8, layers=1, width=16, heads=1, kv_heads=1, head_size=16, feed_forward=16
    )
    monkeypatch.setattr(bench_optimizers, "DECODER", tiny)
    monkeypatch.setattr(bench_optimizers, "ROW_TOKENS", 128)
    out = tmp_path / "optimizers.json"
    options = ["--tuned-at", "4", "--seeds", "1", "--pictures", "200", "--test-pictures", "8", "--out", str(out)]
    bench_optimizers.optimizers(["--lengths", "2", "4", *options])
    result = json.loads(out.read_text())
    tries = [run for run in result["runs"] if run["seed"] == 0]
    for name, best in result["best"].items():
        own = [run for run in tries if run["optimizer"] == name]
        assert len(own) == len(tries) / 2
        assert min(own, key=lambda run: run["loss"])["settings"] == json.loads(json.dumps(best))
        compared = [run for run in result["runs"] if run["seed"] == 1 and run["optimizer"] == name]
        assert sorted(run["steps"] for run in compared) == [2, 4]
    assert out.with_suffix(".png").exists()
    before = out.with_suffix(".jsonl").read_text().splitlines()
    monkeypatch.setattr(bench_optimizers, "held_out_loss", lambda *_: 1.25)
    bench_optimizers.optimizers(["--lengths", "2", "3", "4", *options])
    after = out.with_suffix(".jsonl").read_text().splitlines()
    assert after[: len(before)] == before
    assert [(json.loads(line)["steps"], json.loads(line)["loss"]) for line in after[len(before) :]] == [(3, 1.25)] * 2
