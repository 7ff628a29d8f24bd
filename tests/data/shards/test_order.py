"""The order of a lane is a function of a few numbers: complete, shuffled, and the same wherever it is asked."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.data.shards.order import Order


def places(order: Order, epoch: int = 0) -> list[tuple[int, int]]:
    return [order.place(epoch * order.per_epoch + offset) for offset in range(order.per_epoch)]


@given(
    documents=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any),
    lanes=st.integers(1, 6),
    window=st.integers(1, 50),
    seed=st.one_of(st.none(), st.integers(0, 100)),
    epoch=st.integers(0, 3),
)
def test_in_every_epoch_each_document_stands_in_one_lane_once(
    documents: list[int], lanes: int, window: int, seed: int | None, epoch: int
) -> None:
    orders = [Order(documents, lane=lane, lanes=lanes, window=window, seed=seed) for lane in range(lanes)]
    found = [place for order in orders if order.per_epoch for place in places(order, epoch)]
    assert sorted(found) == [(shard, number) for shard, count in enumerate(documents) for number in range(count)]
    sizes = [order.per_epoch for order in orders]
    assert max(sizes) - min(sizes) <= 1
    if seed is None:
        assert found == sorted(found)


@given(position=st.integers(0, 500), documents=st.lists(st.integers(1, 40), min_size=2, max_size=8))
def test_a_position_means_the_same_to_one_who_begins_there(position: int, documents: list[int]) -> None:
    settings = {"lane": 1, "lanes": 2, "window": 7, "seed": 3}
    walked = Order(documents, **settings)
    for earlier in range(position):
        walked.place(earlier)
    assert Order(documents, **settings).place(position) == walked.place(position)


def test_what_is_needed_next_is_said_a_window_ahead() -> None:
    order = Order([10, 10, 10, 10], lane=0, lanes=1, window=10, seed=0)
    assert all(order.needed_next(position) == [] for position in range(40) if position % 10)
    for position in range(0, 80, 10):
        following = {order.place(position + 10 + offset)[0] for offset in range(10)}
        assert set(order.needed_next(position)) == following


@pytest.mark.parametrize("shards", [1, 3, 20, 200])
def test_the_streamed_order_says_nothing_of_the_stored_one(shards: int) -> None:
    """Rank correlation below 0.05 with the default lanes and window, however many shards the documents fill."""
    data = FuyuDataModule("tokenizer.model", 8)
    documents = [60_000 // shards] * shards
    lanes = [
        Order(documents, lane=lane, lanes=data.lanes, window=data.shuffle, seed=data.seed)
        for lane in range(data.lanes)
    ]
    streamed = [order.place(step) for step in range(lanes[0].per_epoch) for order in lanes]
    stored = np.array([shard * documents[0] + number for shard, number in streamed])
    # Both are permutations, so the correlation of places is Spearman's.
    assert abs(np.corrcoef(stored, np.arange(len(stored)))[0, 1]) < 0.05
    neighbours = np.abs(np.diff(stored)) == 1
    assert neighbours.mean() < 0.001
