"""Which document a lane takes when: a function of the seed, so that a position is all the state there is.

In each epoch the shards are put in a new order and their documents laid end to end; lane `l` of `L` takes the l-th of
L equal parts, so that every document comes once an epoch, in one lane. Within its part a lane shuffles windows of
documents, which bounds the shards that it needs at once.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

WINDOWS_KEPT = 4
"""Windows whose order a lane remembers: the one it is in, and those that waiting documents came from."""


class Order:
    """The order of one lane's documents, epoch after epoch.

    Args:
        documents: How many documents each shard holds.
        lane: Number of the lane.
        lanes: Number of lanes.
        window: Documents that are shuffled together.
        seed: Seeds the order; None keeps the stored one.
    """

    def __init__(self, documents: Sequence[int], *, lane: int, lanes: int, window: int, seed: int | None) -> None:
        self._documents = np.array(documents, np.int64)
        self._lane = lane
        self._window = window
        self._seed = seed
        total = int(self._documents.sum())
        self._start, self._stop = total * lane // lanes, total * (lane + 1) // lanes
        self._shards: dict[int, tuple[Int64[np.ndarray, " shards"], Int64[np.ndarray, " shards"]]] = {}
        self._windows: dict[tuple[int, int], tuple[Int64[np.ndarray, " w"], Int64[np.ndarray, " w"]]] = {}

    @property
    def per_epoch(self) -> int:
        """Documents that the lane takes in an epoch."""
        return self._stop - self._start

    def place(self, position: int) -> tuple[int, int]:
        """Returns the shard, and the document in it, that the lane takes at a position counted over all epochs."""
        epoch, offset = divmod(position, self.per_epoch)
        window, index = divmod(offset, self._window)
        shards, documents = self._places(epoch, window)
        return int(shards[index]), int(documents[index])

    def needed_next(self, position: int) -> list[int]:
        """Returns the shards of the window behind the one that begins at `position`; none within a window."""
        epoch, offset = divmod(position, self.per_epoch)
        if offset % self._window:
            return []
        following = offset // self._window + 1
        if following * self._window >= self.per_epoch:
            epoch, following = epoch + 1, 0
        return np.unique(self._places(epoch, following)[0]).tolist()

    def _places(self, epoch: int, window: int) -> tuple[Int64[np.ndarray, " w"], Int64[np.ndarray, " w"]]:
        if (epoch, window) not in self._windows:
            order, ends = self._shard_order(epoch)
            first = self._start + window * self._window
            offsets = np.arange(first, min(first + self._window, self._stop), dtype=np.int64)
            if self._seed is not None:
                offsets = np.random.default_rng([self._seed, epoch, self._lane, window]).permutation(offsets)
            slot = np.searchsorted(ends, offsets, side="right")
            shards = order[slot]
            _remember(self._windows, (epoch, window), (shards, offsets - ends[slot] + self._documents[shards]))
        return self._windows[epoch, window]

    def _shard_order(self, epoch: int) -> tuple[Int64[np.ndarray, " shards"], Int64[np.ndarray, " shards"]]:
        if epoch not in self._shards:
            order = np.arange(len(self._documents), dtype=np.int64)
            if self._seed is not None:
                # The same for all lanes, so that their parts make one epoch together.
                order = np.random.default_rng([self._seed, epoch]).permutation(order)
            _remember(self._shards, epoch, (order, np.cumsum(self._documents[order])))
        return self._shards[epoch]


def _remember(kept: dict, key: object, value: object) -> None:
    kept[key] = value
    if len(kept) > WINDOWS_KEPT:
        del kept[next(iter(kept))]
