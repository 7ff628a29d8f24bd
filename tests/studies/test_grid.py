"""A grid runs what isn't recorded yet, and says how soon models read with intervals that hold over seeds."""

import json
import math
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.errors import UserError
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.cost import batch_cost
from fuyu_e2e.model.routing.config import RoutingConfig
from fuyu_e2e.studies.grid import Grid, grid, write_data
from fuyu_e2e.studies.grid_report import compare, first_reading, median_interval

GRID = {
    "data": "data/digits.py --pictures 300 --test-pictures 2",
    "recipe": "recipes/quickstart.yaml",
    "settings": {
        "data.tokenizer": "{data}/tokenizer.model",
        "data.train": "{data}/train-[0-9]*.tar",
        "data.val": "{data}/val-[0-9]*.tar",
        "data.budget": 256,
        "data.shuffle": 8,
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 2,
    },
    "contenders": {"default": {}, "rows and columns": {"model.decoder.grid_embeddings": 32}},
}


def test_a_grid_trains_each_run_once(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    file, out = tmp_path / "small.yaml", tmp_path / "out" / "small.json"
    file.write_text(yaml.safe_dump(GRID))
    args = [str(file), "--runs", str(tmp_path / "runs"), "--out", str(out), "--seeds", "3"]
    grid([*args, "--contenders", "default"])
    assert capfd.readouterr().out.count(": done") == 1
    grid(args)
    assert "rows and columns, seed 3: done" in (printed := capfd.readouterr().out)
    assert "default, seed 3: done" not in printed
    compared = json.loads(out.read_text())["compared"]
    assert list(compared) == ["default", "rows and columns"]
    for found in compared.values():
        assert found["operations to half"]["values"] == [None]
        assert found["loss"]["median"] < math.log(320)
    runs = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [[point["step"] for point in run["curve"]] for run in runs] == [[2, 4], [2, 4]]
    one, two = (point["operations"] for point in runs[0]["curve"])
    assert two == pytest.approx(2 * one, rel=0.2)
    assert 0 < runs[0]["curve"][0]["seconds"] < runs[0]["curve"][1]["seconds"]
    file.write_text(yaml.safe_dump(GRID | {"settings": GRID["settings"] | {"trainer.max_steps": 2}}))  # type: ignore[operator]
    with pytest.raises(UserError, match="default-3 holds a run with other settings"):
        grid(args)


def test_all_contenders_cost_as_much_as_the_first(tmp_path: Path) -> None:
    """A routed one trains longer; so does one of shorter rows, which is validated after as many operations."""
    routed = {"model.decoder.layers": 3, "model.decoder.routing": {"share": 0.25, "anneal": 0.2}}
    own = {
        "default": {"model.decoder.layers": 3},
        "routed": routed,
        "short rows": {"data.budget": 128, "model.decoder.layers": 3},
        "as it says": {"data.budget": 128, "trainer.max_steps": 50},
    }
    settings = {**GRID["settings"], "trainer.max_steps": 40, "trainer.val_check_interval": 8}  # type: ignore[dict-item]
    file = tmp_path / "equal.yaml"
    file.write_text(yaml.safe_dump({**GRID, "settings": settings, "contenders": own}, sort_keys=False))
    plan = Grid.read(file)
    data = write_data(plan.data, tmp_path / "data")
    found = {name: plan.settings_of(name, data) for name in own}
    steps = {name: settings["trainer.max_steps"] for name, settings in found.items()}
    assert found["routed"].items() >= routed.items()

    def operations(routing: RoutingConfig | None, budget: int, steps: int) -> float:
        config = FuyuConfig(
            vocab_size=320, patch_size=8, layers=3, width=96, heads=3, kv_heads=3, head_size=32, feed_forward=256,
            routing=routing,
        )  # fmt: skip
        stream = FuyuDataModule(
            str(data / "tokenizer.model"), 8, train=str(data / "train-*.tar"), budget=budget, shuffle=8, lanes=4
        ).stream("train")
        rows = islice(stream.rows(), steps)
        return sum(batch_cost(config, row.batch, done=step / steps).training_flops for step, row in enumerate(rows))

    whole = operations(None, 256, 40)
    assert operations(RoutingConfig(share=0.25, anneal=0.2), 256, steps["routed"]) == pytest.approx(whole, rel=0.05)
    assert operations(None, 128, steps["short rows"]) == pytest.approx(whole, rel=0.1)
    assert steps["default"] == 40
    assert steps["routed"] > 44
    assert steps["short rows"] > 70
    assert found["short rows"]["trainer.val_check_interval"] == pytest.approx(steps["short rows"] / 5, abs=1)
    assert steps["as it says"] == 50


def test_a_wrong_grid_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    for content, message in (
        ({**GRID, "seeds": [1]}, "must hold exactly data, recipe, settings, contenders"),
        ({**GRID, "contenders": ["default"]}, "contenders must be names"),
    ):
        file.write_text(yaml.safe_dump(content))
        with pytest.raises(UserError, match=message):
            Grid.read(file)
    file.write_text(yaml.safe_dump(GRID))
    with pytest.raises(UserError, match="no contender 'fast', but default, rows and columns"):
        grid([str(file), "--contenders", "fast"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plateau", "mod"])
def test_the_shipped_grids_can_run(name: str, tmp_path: Path) -> None:
    """Every contender's settings are accepted, and lead to runs of as many operations."""
    plan = Grid.read(shipped(f"recipes/studies/{name}.yaml"))
    data = write_data("data/digits.py --pictures 400 --test-pictures 2", tmp_path / "data")
    for contender in plan.contenders:
        steps = plan.settings_of(contender, data)["trainer.max_steps"]
        assert 0.9 * plan.settings["trainer.max_steps"] < steps, contender


@pytest.mark.parametrize("count", range(1, 11))
def test_a_medians_interval_has_the_coverage_that_it_says(count: int) -> None:
    """Of all equally likely patterns of values below (0) and above (1) the median, that share is caught."""
    low, high, coverage = median_interval(list(range(count)))
    caught = sum(not sorted(sides)[int(low)] and sorted(sides)[int(high)] for sides in product((0, 1), repeat=count))
    assert coverage == pytest.approx(caught / 2**count)
    assert coverage >= 0.9 or (low, high) == (0, count - 1)


@given(st.lists(st.floats(0, 100) | st.just(math.inf), min_size=1, max_size=12), st.randoms())
def test_a_medians_interval_is_of_its_values_in_any_order(values: list[float], random: Any) -> None:
    found = median_interval(values)
    random.shuffle(values)
    assert median_interval(values) == found
    assert {found[0], found[1]} <= set(values)


def run(contender: str, seed: int, reads_at: float | None, end: int = 10) -> dict[str, Any]:
    """A run that reads everything from a point on, of one operation and two seconds a step."""
    read = [float(reads_at is not None and step >= reads_at) for step in range(1, end + 1)]
    points = [
        {"step": step, "operations": step, "seconds": 2.0 * step, "exact_match": exact, "loss": 1 - exact}
        for step, exact in enumerate(read, 1)
    ]
    return {"contender": contender, "seed": seed, "settings": {}, "curve": points}


def test_runs_that_never_read_count_as_later_than_all() -> None:
    times = {"default": (4, 8, None, 6, 8), "new": (2, 4, 5, None, None)}
    runs = [run(name, seed, at) for name, own in times.items() for seed, at in enumerate(own)]
    found = compare(runs)
    assert found["default"]["operations to half"]["median"] == 8
    assert found["default"]["operations to half"]["interval"] == [4, None]
    assert found["default"]["operations to half"]["coverage"] == 0.9375
    assert found["default"]["seconds to nine tenths"]["values"] == [8, 16, None, 12, 16]
    ratios = found["new"]["ratio of operations to half"]
    # Of seed 2, the default's time is at least its length: an upper bound.
    assert ratios["values"] == [0.5, 0.5, 0.5, None, None]
    assert found["default"]["ratio of operations to half"]["values"] == [1, 1, 1, 1]
    assert found["new"]["exact_match"]["median"] == 1


def test_the_first_reading_is_the_first_at_or_above_the_level() -> None:
    curve = [{"exact_match": read, "operations": 10.0 * n} for n, read in enumerate((0.1, 0.5, 0.4, 0.9))]
    assert first_reading(curve, 0.5, "operations") == 10
    assert first_reading(curve, 0.9, "operations") == 30
    assert math.isinf(first_reading(curve, 0.95, "operations"))
