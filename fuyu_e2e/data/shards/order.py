"""The order in which lanes take documents, a function of the seed, so that a position is the only state.

Each epoch shuffles the shards and lays their documents end to end; lane `l` of `L` takes the l-th of L equal parts, so
that every document comes once in an epoch, in one lane. Within its part a lane shuffles windows of documents, which
bounds the number of shards that it needs at once.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

WINDOWS_KEPT = 4
"""Windows whose order a lane remembers: the current one, and those of waiting documents."""


class Order:
    """The order of one lane's documents over all epochs.

    Args:
        documents: Number of documents in each shard.
        lane: Number of the lane.
        lanes: Number of lanes.
        window: Documents that are shuffled together.
        seed: Seeds the order; None keeps the stored order.
    """

    def __init__(self, documents: Sequence[int], *, lane: int, lanes: int, window: int, seed: int | None) -> None:
        self._documents = np.array(documents, np.int64)
        self._lane = lane
        self._window = window
        self._seed = seed
        total = int(self._documents.sum())
        self._start, self._stop = total * lane // lanes, total * (lane + 1) // lanes
        self._known_places = lru_cache(WINDOWS_KEPT)(self._places)
        self._known_shard_order = lru_cache(WINDOWS_KEPT)(self._shard_order)

    @property
    def per_epoch(self) -> int:
        """Documents that the lane takes in an epoch."""
        return self._stop - self._start

    def place(self, position: int) -> tuple[int, int]:
        """Returns (shard, document in it) at a position of the lane, counted over all epochs."""
        epoch, offset = divmod(position, self.per_epoch)
        window, index = divmod(offset, self._window)
        shards, documents = self._known_places(epoch, window)
        return int(shards[index]), int(documents[index])

    def needed_next(self, position: int) -> list[int]:
        """Returns the shards of the next window if one begins at `position`; an empty list within a window."""
        epoch, offset = divmod(position, self.per_epoch)
        if offset % self._window:
            return []
        following = offset // self._window + 1
        if following * self._window >= self.per_epoch:
            epoch, following = epoch + 1, 0
        return np.unique(self._known_places(epoch, following)[0]).tolist()

    def _places(self, epoch: int, window: int) -> tuple[Int64[np.ndarray, " w"], Int64[np.ndarray, " w"]]:
        order, ends = self._known_shard_order(epoch)
        first = self._start + window * self._window
        offsets = np.arange(first, min(first + self._window, self._stop), dtype=np.int64)
        if self._seed is not None:
            offsets = np.random.default_rng([self._seed, epoch, self._lane, window]).permutation(offsets)
        slot = np.searchsorted(ends, offsets, side="right")
        shards = order[slot]
        return shards, offsets - ends[slot] + self._documents[shards]

    def _shard_order(self, epoch: int) -> tuple[Int64[np.ndarray, " shards"], Int64[np.ndarray, " shards"]]:
        order = np.arange(len(self._documents), dtype=np.int64)
        if self._seed is not None:
            # The same for all lanes, so that their parts together are one epoch.
            order = np.random.default_rng([self._seed, epoch]).permutation(order)
        return order, np.cumsum(self._documents[order])
