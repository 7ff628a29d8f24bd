"""Endless or single passes over shards, as packed rows in an order that depends only on the seed.

A stream consists of lanes (see `Lane`). The global order of rows is lane 0, 1, …, L-1, 0, 1, …; each of R readers
takes every R-th row, so the rows are the same for any number of processes and workers that divides the number of
lanes. Each row comes with the state from which its lane continues after it.
"""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fuyu_e2e.data.packing import TOO_LONG, LongDocuments, PackedRow, Packer, pack_row
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.data.shards.cache import ShardCache
from fuyu_e2e.data.shards.manifest import ShardFacts
from fuyu_e2e.data.shards.mixture import Chooser, Climb, MixBy, Source, shares
from fuyu_e2e.data.shards.open_shards import OpenShards
from fuyu_e2e.data.shards.order import Order
from fuyu_e2e.errors import UnusableSampleError, UserError

STORED_WINDOW = 1_024
"""Documents that an unshuffled lane looks ahead, to fetch the shards that follow."""


@dataclass(frozen=True, kw_only=True)
class StreamSource:
    """The shards of one source, and their facts."""

    name: str
    source: Source
    shards: tuple[str, ...]
    """Paths or URLs, in the order of the pattern."""
    facts: tuple[ShardFacts, ...]
    """The manifest's facts of each shard."""

    @property
    def digest(self) -> str:
        """The sha256 over the checksums of all shards, in hexadecimal: it identifies the data."""
        return hashlib.sha256("".join(facts.sha256 for facts in self.facts).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class LaneState:
    """The state of a lane after one of its rows, from which it continues exactly as it would have."""

    rows: int
    """Rows yielded so far."""
    positions: tuple[int, ...]
    """Documents taken from each source so far, over all epochs."""
    deficits: tuple[float, ...]
    """How far each source of a mixture lags its share."""
    waiting: tuple[tuple[int, int], ...]
    """(source, position) of each document that waits to be packed, oldest first; read again on resuming."""

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "LaneState":
        """Returns the state that a checkpoint holds in primitives; earlier versions called deficits `credits`."""
        return cls(**{"deficits" if name == "credits" else name: value for name, value in state.items()})


@dataclass(frozen=True, kw_only=True)
class StreamRow(PackedRow):
    """A row, and the state of its lane after it."""

    lane: int
    state: LaneState


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Everything that determines the rows of a stream."""

    sources: tuple[StreamSource, ...]
    """The sources that are mixed, at least one."""
    cache: ShardCache
    """The cache for remote shards."""
    builder: SequenceBuilder
    budget: int
    """Tokens of a row."""
    long_documents: LongDocuments
    """What to do with a document longer than a row."""
    lanes: int
    """Number of lanes."""
    shuffle: int
    """Documents that a lane shuffles together; 0 reads once in stored order, and ends."""
    seed: int = 0
    """Seeds the order of shards and documents."""
    mix_by: MixBy = "tokens"
    """The unit of the sources' shares."""
    rows_per_step: int = 1
    """Rows of a global batch, from which weights that change over steps know their step."""
    climb: Climb | None = None
    """Set if the keys of weights are rungs instead of steps."""
    climbed: tuple[int, ...] = ()
    """For each rung climbed, the rows of all processes that were trained when it was."""

    @property
    def endless(self) -> bool:
        """Whether the stream restarts at its end: training streams do, evaluation streams are read once."""
        return self.shuffle > 0

    def rung(self, step: int) -> int:
        """Returns the rung at a step, counted from 0."""
        return sum(self.holds_from(trained) <= step for trained in self.climbed)

    def holds_from(self, trained: int) -> int:
        """Returns the step, counted from 0, from which a rung holds that was climbed after so many trained rows.

        The running step, or the next one, has a row that Lightning has fetched ahead: the rung holds after it.
        """
        return trained // self.rows_per_step + 1

    def shares(self, step: int) -> tuple[float, ...]:
        """Returns the share of each source at a step; they add up to one.

        Raises:
            UserError: All weights are zero there.
        """
        mixture = [source.source for source in self.sources]
        return shares(mixture, step) if self.climb is None else shares(mixture, self.rung(step), "rung")

    def rows(
        self, first: int = 0, step: int = 1, states: Mapping[int, LaneState] | None = None
    ) -> Iterator[StreamRow]:
        """Yields every `step`-th row of the global order, starting with row `first`.

        Each row carries the stats of what was read since its lane's previous row.

        Args:
            first: Number of the first row.
            step: Number of readers (processes x workers) that share the rows.
            states: The state of each lane when row `first` comes next; lanes without one start from the beginning.

        Raises:
            UserError: The number of readers doesn't divide that of lanes, a lane has no documents, a whole pass over a
                source finds no usable one, or a shard can't be read.
        """
        if self.lanes % step:
            raise UserError(
                f"data.lanes is {self.lanes}, which {step} readers (processes x workers) don't divide: "
                f"set data.lanes to a multiple of {step}, or data.workers to fit."
            )
        shards, known = OpenShards(self.cache), states or {}
        numbers = [(first + turn * step) % self.lanes for turn in range(self.lanes // step)]
        running = [(number, Lane(self, number, shards, known.get(number))) for number in numbers]
        # The last row of a finite stream is held back for the stats of what lanes skipped after their own last rows.
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
    """A part of every source's documents, mixed, and packed by a separate packer.

    Args:
        stream: The stream of the lane.
        index: Number of the lane.
        shards: Provides the documents.
        state: The state to continue from; None starts from the beginning.

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
        """The current state of the lane."""
        return LaneState(
            rows=self.given,
            positions=tuple(self.positions),
            deficits=tuple(self.chooser.deficits),
            waiting=tuple(self.packer.waiting),
        )

    def next_row(self) -> StreamRow | None:
        """Returns the next row, with the stats of what was read to fill it; None after the last row of a finite
        stream."""
        wanted = self.stream.shares((self.given * self.stream.lanes + self.index) // self.stream.rows_per_step)
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
        """Reads the next document of a source; returns its tokens, 0 if it can't be used."""
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
        # The end of one pass and the start of the next may both be bad; with one more, no document of a pass is
        # usable.
        if self.stream.endless and self._unusable[source] > 2 * (self.orders[source].per_epoch - 1):
            remedies = ["raise data.budget"] if self.stats.skipped[TOO_LONG] else []
            if any(facts.kinds for facts in self.stream.sources[source].facts):  # other lanes may have usable ones
                remedies.append("lower data.lanes")
            raise UserError(
                f"Lane {self.index} of {self.stream.lanes} finds no usable document in a whole pass over its part of "
                f"{self.stream.sources[source].shards[0]} and the other shards ({self.stats.summary_with_examples}): "
                f"{', or '.join([*remedies, 'mend the shards'])}."
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
        # They were counted when they were first read; only documents that have become unusable since are news.
        restored = self.stats.take()
        self.stats.skipped, self.stats.examples = restored.skipped, restored.examples
