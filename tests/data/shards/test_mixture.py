"""Shares of sources hold at every moment, change by schedule, and survive a stop."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuyu_e2e.data.shards.mixture import Chooser, Source, shares
from fuyu_e2e.errors import UserError


@given(
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    amounts=st.lists(st.integers(1, 50), min_size=50, max_size=50),
    seed=st.integers(0, 9),
)
def test_no_source_is_ever_further_behind_than_a_document(weights: list[float], amounts: list[int], seed: int) -> None:
    wanted = shares([Source("x", weight) for weight in weights], 0)
    chooser = Chooser.begin(len(weights), 10.0, [seed])
    drawn = [0] * len(weights)
    for amount in amounts:
        chosen = chooser.choose(wanted)
        chooser.draw(chosen, amount, wanted)
        drawn[chosen] += amount
        for number, share in enumerate(wanted):
            assert abs(drawn[number] - share * sum(drawn)) <= 20 + 50 * len(weights)
    assert sum(chooser.deficits) == pytest.approx(0, abs=1e-6)


def test_a_source_without_a_share_is_never_drawn() -> None:
    wanted = shares([Source("a", 0.0), Source("b", 2.0)], 0)
    chooser = Chooser.begin(2, 1.0, [0])
    for _ in range(20):
        assert chooser.choose(wanted) == 1
        chooser.draw(1, 3, wanted)


def test_weights_change_by_schedule_on_straight_lines() -> None:
    rising = Source("a", {0: 0.0, 100: 1.0})
    assert [rising.weight_at(step) for step in (0, 50, 100, 1_000)] == [0.0, 0.5, 1.0, 1.0]
    assert shares([rising, Source("b", 1.0)], 100) == (0.5, 0.5)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), {}, {0: 1.0, 5: -1.0}])
def test_weights_that_are_none_are_refused(weight: Any) -> None:
    with pytest.raises(UserError, match="weight of a source"):
        Source("a", weight)


def test_all_weights_zero_are_refused_and_the_step_is_named() -> None:
    with pytest.raises(UserError, match=r"At step 7 the weights.*are 0"):
        shares([Source("a", {0: 1.0, 7: 0.0})], 7)
