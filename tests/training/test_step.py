"""What a step comes to, judged by its sums."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuyu_e2e.training.step import judge_step

FINITE = st.floats(-1e6, 1e6)
ODD = st.sampled_from([math.nan, math.inf, -math.inf])


@given(
    loss=FINITE | ODD,
    squares=st.floats(0, 1e9) | st.just(math.nan) | st.just(math.inf),
    supervised=st.integers(0, 10_000),
    ranks=st.integers(1, 64),
    greatest=st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)) | st.none(),
)
def test_a_step_is_bad_where_a_figure_is_not_below_its_limit(
    loss: float, squares: float, supervised: int, ranks: int, greatest: tuple[float, float] | None
) -> None:
    sums = torch.tensor([loss, squares, supervised, 3.0], dtype=torch.float64)
    step = judge_step(sums, ranks, greatest)
    count = max(supervised, 1)
    mean, norm = loss / count, math.sqrt(squares) * (ranks / count)
    assert float(step.loss) == pytest.approx(mean, nan_ok=True, rel=1e-12)
    assert float(step.norm) == pytest.approx(norm, nan_ok=True, rel=1e-12)
    assert float(step.factor) == pytest.approx(ranks / count, rel=1e-12)
    found = (float(step.loss), float(step.norm))
    assert bool(step.bad) == (greatest is not None and not all(a <= b for a, b in zip(found, greatest, strict=True)))
