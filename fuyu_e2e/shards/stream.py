"""Endless or single passes over shards, as packed rows in an order that depends on the seed alone.

A stream consists of lanes (see `Lane`). The global order of rows is lane 0, 1, …, L-1, 0, 1, …; reader r of R takes
the rows whose index is r modulo R, so the rows are the same for every number of processes and workers that divides
the number of lanes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from fuyu_e2e.batch import PackedBatch
from fuyu_e2e.document import Document
from fuyu_e2e.errors import UnusableSampleError, UserError
from fuyu_e2e.packing import LongDocuments, Packer
from fuyu_e2e.sequence import SequenceBuilder, TokenSequence
from fuyu_e2e.shards.formats import read_documents
from fuyu_e2e.tally import Tally


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What fixes every row of a stream."""

    shards: tuple[str, ...]
    """The shards, in the order of the pattern."""
    builder: SequenceBuilder
    budget: int
    """Tokens of a row."""
    long_documents: LongDocuments
    """What becomes of a document longer than a row."""
    lanes: int
    """Number of lanes."""
    shuffle: int
    """Documents in each lane's shuffle buffer; 0 reads once, in stored order, and ends."""
    seed: int = 0
    """Seeds the order of shards and documents."""

    @property
    def endless(self) -> bool:
        """Whether the stream begins anew at its end: training streams do, evaluation streams are read once."""
        return self.shuffle > 0

    def rows(self, reader: int = 0, readers: int = 1, start: int = 0) -> Iterator[PackedBatch]:
        """The rows of one reader of several, from its `start`-th on.

        Each row carries the tally of what was read since the lane's row before. Rows before `start` are read and
        packed like all others, then dropped: slow, but exact.

        Raises:
            UserError: The readers don't divide the lanes, or a whole pass over a lane's shards gives no row.
        """
        if self.lanes % readers:
            raise UserError(
                f"data.lanes is {self.lanes}, which {readers} readers (processes x workers) don't divide: "
                f"set data.lanes to a multiple of {readers}, or data.workers to fit."
            )
        lanes = [Lane(self, lane).rows() for lane in range(reader, self.lanes, readers)]
        return islice(_round_robin(lanes), start, None)

    def documents(self, tally: Tally) -> Iterator[Document]:
        """All documents once, in stored order; unusable samples are counted in `tally`."""
        for shard in self.shards:
            yield from read_documents(shard, tally)


@dataclass(frozen=True)
class Lane:
    """One deterministic stream: its own part of the shards, its own shuffle buffer, its own packer."""

    stream: Stream
    index: int

    def rows(self) -> Iterator[PackedBatch]:
        """The lane's rows, each with the tally of what it took to fill it."""
        tally = Tally()
        packer = Packer(self.stream.budget, self.stream.long_documents, tally)
        for row in packer.pack(self._sequences(tally)):
            yield replace(row, tally=tally.take())

    def _sequences(self, tally: Tally) -> Iterator[TokenSequence]:
        for document in self._shuffled(tally):
            try:
                yield self.stream.builder.build(document)
            except UnusableSampleError as error:
                tally.skip(error)

    def _shuffled(self, tally: Tally) -> Iterator[Document]:
        if not self.stream.endless:
            yield from self._one_pass(tally, np.arange(len(self.stream.shards)))
            return
        buffer: list[Document] = []
        rng = np.random.default_rng([self.stream.seed, self.index])
        for document in self._endless(tally):
            if len(buffer) < self.stream.shuffle:
                buffer.append(document)
                continue
            chosen = int(rng.integers(len(buffer)))
            yield buffer[chosen]
            buffer[chosen] = document

    def _endless(self, tally: Tally) -> Iterator[Document]:
        epoch = 0
        while True:
            empty = True
            # All lanes draw the same order, so that each epoch gives every document to one lane.
            order = np.random.default_rng([self.stream.seed, epoch]).permutation(len(self.stream.shards))
            for document in self._one_pass(tally, order):
                empty = False
                yield document
            if empty:
                raise UserError(
                    f"Lane {self.index} of {self.stream.lanes} finds no usable document in a whole pass over its part "
                    f"of {self.stream.shards[0]} and the other shards ({tally.summary()}): lower data.lanes, or mend "
                    "the shards."
                )
            epoch += 1

    def _one_pass(self, tally: Tally, order: np.ndarray) -> Iterator[Document]:
        # With fewer shards than lanes, several lanes read the same shard and share its documents out among them.
        parts = -(-self.stream.lanes // len(order))
        units = [(shard, part) for shard in order for part in range(parts)]
        for shard, part in units[self.index :: self.stream.lanes]:
            yield from read_documents(self.stream.shards[shard], tally, part, parts)


def _round_robin(lanes: Iterable[Iterator[PackedBatch]]) -> Iterator[PackedBatch]:
    lanes = list(lanes)
    while lanes:
        remaining = []
        for lane in lanes:
            row = next(lane, None)
            if row is not None:
                remaining.append(lane)
                yield row
        lanes = remaining
