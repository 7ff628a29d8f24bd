"""The GPU scripts tell right from wrong: losses beside a CPU's, waits of the host, graphs that are compiled."""

import importlib.util
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fuyu_e2e.bench.limit import quickstart_run


@pytest.fixture(scope="module")
def script(repository: Path) -> Callable[[str], ModuleType]:
    def load(name: str) -> ModuleType:
        path = repository / "tests" / "gpu" / f"{name}.py"
        specification = importlib.util.spec_from_file_location(f"gpu_{name}", path)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return module

    return load


def logged(*losses: float) -> dict[str, list[float]]:
    return {"train/loss": list(losses), "train/gradient_norm": [1.0] * len(losses)}


def test_steps_hold_where_all_losses_are_within_rounding(script: Callable[[str], ModuleType]) -> None:
    steps = script("steps")
    expected = logged(4.0, 3.0)

    def holds(case: str, *losses: float) -> list[bool]:
        return [check["holds"] for check in steps.compare(case, logged(*losses), expected)]

    assert holds("adamw, 32-true", 4.0, 3.001) == [True, True]
    assert holds("adamw, 32-true", 4.0, 3.02) == [False, True]
    assert holds("adamw, bf16-mixed", 4.0, 3.02) == [True, True]
    assert holds("adamw, bf16-mixed", 4.0, float("nan")) == [False, True]
    assert holds("compiled, fp8", 4.0, 3.1) == [True, True]
    with pytest.raises(ValueError, match="zip"):
        holds("adamw, 32-true", 4.0)
    [lost, _] = steps.compare("adamw, 32-true", logged(4.0, float("nan")), expected)
    assert lost["measured"] == "nan"
    [_, norm] = steps.compare("ddp, 32-true", expected | {"train/gradient_norm": [1.0, 1.1]}, expected)
    assert norm == {
        "what": "ddp, 32-true: train/gradient_norm's distance from the CPU's in float32",
        "measured": 0.1,
        "expected": "at most 0.006",
        "holds": False,
    }


def test_every_setting_of_a_step_is_one_of_the_command_line(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    """Those that only a GPU runs too: a name that is wrong would be found there alone."""
    values: dict[str, dict[str, None]] = {}
    for settings in script("steps").CASES.values():
        for name, value in settings.items():
            values.setdefault(name, {})[value] = None
    rounds = zip_longest(*([f"--{name}={value}" for value in every] for name, every in values.items()))
    for further in rounds:
        quickstart_run(tmp_path, "cpu", 1, [option for option in further if option is not None])


def test_waits_are_counted_while_they_are_to_be(script: Callable[[str], ModuleType]) -> None:
    waits = script("waits")
    assert waits.control("cpu") == 1
    counting = waits.Waits("cpu")
    with counting.warned(), counting:
        float(torch.ones(()))
        assert counting.waits.total() == 0
        counting.begin()
        torch.ones(()).item()
        bool(torch.ones(()) > 0)
        torch.ones(3) + torch.ones(3)
        counting.end()
        float(torch.ones(()))
    assert counting.waits.total() == 2


def phase(name: str, made: int, called: int) -> dict[str, Any]:
    return {"phase": name, "made": made, "called": called}


GOOD = [
    phase("training", 2, 6),
    phase("training", 2, 6),
    phase("validation", 2, 6),
    phase("generation", 4, 0),
    phase("training", 0, 6),
    phase("validation", 0, 6),
    phase("generation", 0, 0),
]


def test_graphs_hold_where_blocks_stay_compiled(script: Callable[[str], ModuleType]) -> None:
    judge = script("graphs").judge
    assert [check["holds"] for check in judge(GOOD, 6)] == [True] * 4
    again = [*GOOD[:4], phase("training", 6, 6), *GOOD[5:]]
    assert [check["holds"] for check in judge(again, 6)] == [True, False, True, True]
    eager = [*GOOD[:5], phase("validation", 0, 0), GOOD[6]]
    assert [check["holds"] for check in judge(eager, 6)] == [True, True, True, False]
    training_eager = [phase("training", 0, 0), *GOOD]
    assert [check["holds"] for check in judge(training_eager, 6)] == [True, True, False, True]
    in_pieces = [*GOOD[:5], phase("validation", 0, 9), GOOD[6]]
    assert [check["holds"] for check in judge(in_pieces, 6)] == [True, True, True, False]
    many = [phase("training", 20, 6), *GOOD]
    assert [check["holds"] for check in judge(many, 6)] == [False, True, True, True]


def test_graphs_are_counted_as_they_are_made_and_called(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = script("graphs").Graphs(compiles=False)
    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", graphs)
    torch.compiler.reset()
    double = torch.compile(lambda x: 2 * x, dynamic=False)
    for length in (3, 3, 4):
        assert double(torch.ones(length)).tolist() == [2.0] * length
    assert (graphs.made, graphs.called) == (2, 3)
