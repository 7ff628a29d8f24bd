"""Endless or single passes over shards, as packed rows in an order that depends on the seed alone.

A stream consists of lanes (see `Lane`). The global order of rows is lane 0, 1, …, L-1, 0, 1, …; a reader takes every
R-th of them, so the rows are the same for every number of processes and workers that divides the number of lanes. Each
row comes with the state from which its lane goes on behind it.
"""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fuyu_e2e.data.packing import TOO_LONG, LongDocuments, PackedRow, Packer, pack_row
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.data.shards.cache import ShardCache
from fuyu_e2e.data.shards.manifest import ShardFacts
from fuyu_e2e.data.shards.mixture import Chooser, MixBy, Source, shares
from fuyu_e2e.data.shards.open_shards import OpenShards
from fuyu_e2e.data.shards.order import Order
from fuyu_e2e.errors import UnusableSampleError, UserError

STORED_WINDOW = 1_024
"""Documents that an unshuffled lane looks ahead by, to fetch the shards behind them."""


@dataclass(frozen=True, kw_only=True)
class StreamSource:
    """The shards of one source, and what they hold."""

    name: str
    source: Source
    shards: tuple[str, ...]
    """Paths or URLs, in the order of the pattern."""
    facts: tuple[ShardFacts, ...]
    """What the manifest says of each."""

    @property
    def digest(self) -> str:
        """The sha256 over the checksums of all shards, in hexadecimal: it names the data as it is."""
        return hashlib.sha256("".join(facts.sha256 for facts in self.facts).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class LaneState:
    """Where a lane stands behind one of its rows: from here it goes on exactly as it would have."""

    rows: int
    """Rows given so far."""
    positions: tuple[int, ...]
    """Documents taken of each source so far, over all epochs."""
    deficits: tuple[float, ...]
    """By how much each source of a mixture is behind its share."""
    waiting: tuple[tuple[int, int], ...]
    """(source, position) of each document that waits to be packed, the oldest first; read again to go on."""


@dataclass(frozen=True, kw_only=True)
class StreamRow(PackedRow):
    """A row, and where its lane goes on behind it."""

    lane: int
    state: LaneState


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What fixes every row of a stream."""

    sources: tuple[StreamSource, ...]
    """What is mixed; one, where nothing is."""
    cache: ShardCache
    """Where shards from elsewhere lie on this machine."""
    builder: SequenceBuilder
    budget: int
    """Tokens of a row."""
    long_documents: LongDocuments
    """What becomes of a document longer than a row."""
    lanes: int
    """Number of lanes."""
    shuffle: int
    """Documents that a lane shuffles together; 0 reads once, in stored order, and ends."""
    seed: int = 0
    """Seeds the order of shards and documents."""
    mix_by: MixBy = "tokens"
    """What the shares of sources are counted in."""
    rows_per_step: int = 1
    """Rows of a global batch, by which weights that change with the steps know their step."""

    @property
    def endless(self) -> bool:
        """Whether the stream begins anew at its end: training streams do, evaluation streams are read once."""
        return self.shuffle > 0

    def rows(
        self, first: int = 0, step: int = 1, states: Mapping[int, LaneState] | None = None
    ) -> Iterator[StreamRow]:
        """Yields every `step`-th row of the global order, from row `first` on.

        Each row carries the stats of what was read since the lane's row before.

        Args:
            first: Number of the first row.
            step: How many readers (processes x workers) share the rows out.
            states: Where each lane stood when row `first` was next; the lanes that are missing begin.

        Raises:
            UserError: The readers don't divide the lanes, a lane has no documents, a whole pass over a source gives
                none that can be used, or a shard can't be read.
        """
        if self.lanes % step:
            raise UserError(
                f"data.lanes is {self.lanes}, which {step} readers (processes x workers) don't divide: "
                f"set data.lanes to a multiple of {step}, or data.workers to fit."
            )
        shards, known = OpenShards(self.cache), states or {}
        numbers = [(first + turn * step) % self.lanes for turn in range(self.lanes // step)]
        running = [(number, Lane(self, number, shards, known.get(number))) for number in numbers]
        # The last row of a stream that ends waits for what the lanes skipped behind their own last.
        last: StreamRow | None = None
        skipped = SampleStats()
        while running:
            remaining = []
            for number, lane in running:
                if (row := lane.next_row()) is None:
                    skipped.add(lane.stats.take())
                    continue
                remaining.append((number, lane))
                if last is not None:
                    yield last
                last = row
                if self.endless:
                    yield last
                    last = None
            running = remaining
        if last is not None:
            last.stats.add(skipped)
            yield last
        elif skipped.read:
            said = f"A reader found no usable document in its part of the shards: {skipped.summary()}"
            warnings.warn(said, stacklevel=2)


class Lane:
    """A part of every source's documents, mixed, and packed by a packer of its own.

    Args:
        stream: What the lane belongs to.
        index: Number of the lane.
        shards: Where documents come from.
        state: Where to go on; None begins.

    Raises:
        UserError: There are fewer documents than lanes.
    """

    def __init__(self, stream: Stream, index: int, shards: OpenShards, state: LaneState | None = None) -> None:
        self.stream = stream
        self.index = index
        self.shards = shards
        self.stats = SampleStats()
        self.orders = [self._order(source) for source in stream.sources]
        self.packer = Packer(stream.budget, stream.long_documents, self.stats)
        begun = state or LaneState(rows=0, positions=(0,) * len(self.orders), deficits=(), waiting=())
        self.given = begun.rows
        self.positions = list(begun.positions)
        scale = stream.budget / 2 if stream.mix_by == "tokens" else 0.5
        self.chooser = (
            Chooser(begun.deficits) if begun.deficits else Chooser.begin(len(self.orders), scale, [stream.seed, index])
        )
        self._unusable = [0] * len(self.orders)
        self._restore(begun.waiting)

    @property
    def state(self) -> LaneState:
        """Where the lane stands."""
        return LaneState(
            rows=self.given,
            positions=tuple(self.positions),
            deficits=tuple(self.chooser.deficits),
            waiting=tuple(self.packer.waiting),
        )

    def next_row(self) -> StreamRow | None:
        """Returns the next row, with the stats of what it took to fill it; None behind the last of a stream that
        ends."""
        mixture = [source.source for source in self.stream.sources]
        wanted = shares(mixture, (self.given * self.stream.lanes + self.index) // self.stream.rows_per_step)
        while not self.packer.full:
            source = self.chooser.choose(wanted)
            if not self.stream.endless and self.positions[source] == self.orders[source].per_epoch:
                break
            amount = self._take(source)
            self.chooser.draw(source, amount if self.stream.mix_by == "tokens" else int(amount > 0), wanted)
        if not self.packer.waiting:
            return None
        sequences = self.packer.fill_row()
        self.given += 1
        return StreamRow(
            batch=pack_row(sequences, self.stream.budget),
            keys=tuple(sequence.key for sequence in sequences),
            stats=self.stats.take(),
            lane=self.index,
            state=self.state,
        )

    def _order(self, source: StreamSource) -> Order:
        order = Order(
            [facts.documents for facts in source.facts],
            lane=self.index,
            lanes=self.stream.lanes,
            window=self.stream.shuffle or STORED_WINDOW,
            seed=self.stream.seed if self.stream.endless else None,
        )
        if self.stream.endless and not order.per_epoch:
            raise UserError(
                f"{source.shards[0]} and the shards beside it hold fewer documents than data.lanes "
                f"({self.stream.lanes}): lower data.lanes."
            )
        return order

    def _take(self, source: int) -> int:
        """Reads the next document of a source; gives its tokens, 0 where it can't be used."""
        position = self.positions[source]
        self.positions[source] += 1
        name = self.stream.sources[source].name
        mixed = len(self.orders) > 1
        self.stats.read += 1
        if mixed:
            self.stats.read_of[name] += 1
        tokens = self._add(source, position)
        if tokens and mixed:
            self.stats.used_of[name] += 1
            self.stats.tokens_of[name] += tokens
        self._unusable[source] = 0 if tokens else self._unusable[source] + 1
        # The last of one pass and the first of the next may all be bad; one more, and no document of a pass is usable.
        if self.stream.endless and self._unusable[source] > 2 * (self.orders[source].per_epoch - 1):
            raise UserError(
                f"Lane {self.index} of {self.stream.lanes} finds no usable document in a whole pass over its part of "
                f"{self.stream.sources[source].shards[0]} and the other shards ({self.stats.summary()}): "
                + ("raise data.budget, or " if self.stats.skipped[TOO_LONG] else "")
                + "lower data.lanes, or mend the shards."
            )
        return tokens

    def _add(self, source: int, position: int) -> int:
        described, order = self.stream.sources[source], self.orders[source]
        for shard in order.needed_next(position):
            facts = described.facts[shard]
            self.shards.cache.prefetch(described.shards[shard], facts.bytes, facts.sha256)
        shard, number = order.place(position)
        where = described.shards[shard]
        try:
            found = self.shards.document(where, described.facts[shard], number)
            where = f"{where}: {found.key}"
            return self.packer.add(self.stream.builder.build(found), (source, position))
        except UnusableSampleError as error:
            self.stats.skip(error, where)
            return 0

    def _restore(self, waiting: tuple[tuple[int, int], ...]) -> None:
        for source, position in waiting:
            self._add(source, position)
        # They were counted when they were read first; only one that has become unusable since is news.
        restored = self.stats.take()
        self.stats.skipped, self.stats.examples = restored.skipped, restored.examples
