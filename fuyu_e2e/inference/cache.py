"""The key/value cache: what a decoder remembers of each sequence, block by block.

A dense block remembers every token, in room that is there from the start: shapes never change, so a step can be
compiled. A routed block remembers those that passed it, or every token where skipped ones leave their keys behind;
how many that will be is not known before, so its room grows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fuyu_e2e.model.attention import Attend, Passing, RowAttention, attention_type
from fuyu_e2e.model.attention_plans import AttentionPlan, shared_attention
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.device_copy import to_device

GROWTH = 8
"""A full cache of a routed block grows by this fraction of its places: seldom copied, and never much too large."""


@dataclass(frozen=True)
class DenseBlockCache:
    """Keys and values of one dense block, those of each sequence from place 0 on.

    Sequences grow independently, so prompts of different lengths need no padding between prompt and answer.
    """

    keys: Float[Tensor, "B G S K"]
    values: Float[Tensor, "B G S K"]

    @classmethod
    def empty(cls, config: FuyuConfig, sequences: int, capacity: int, like: Tensor) -> "DenseBlockCache":
        """Room for `capacity` tokens of each sequence."""
        # Places behind a sequence's end are masked, but must hold numbers: 0 x nan would still be nan.
        shape = (sequences, config.kv_heads, capacity, config.head_size)
        return cls(like.new_zeros(shape), like.new_zeros(shape))

    def write(self, rows: Int64[Tensor, " nG"], keys: Float[Tensor, "n G K"], values: Float[Tensor, "n G K"]) -> None:
        """Stores tokens at the places that `rows_of` gives."""
        for store, new in ((self.keys, keys), (self.values, values)):
            # The cache may have been made outside of the autocast in which it is written.
            store.view(-1, store.shape[-1]).index_copy_(0, rows, new.flatten(0, 1).to(store.dtype))

    def attend(
        self, queries: Float[Tensor, "B H K"], places: int, seen: Bool[Tensor, "B places"]
    ) -> Float[Tensor, "B H K"]:
        """Attention of one token of each sequence to those of the first `places` that it sees."""
        # The query heads of one key stand as rows of one product, so that the cache is read once and never repeated.
        grouped = queries.unflatten(1, (self.keys.shape[1], -1)) * queries.shape[-1] ** -0.5
        scores = grouped @ self.keys[:, :, :places].transpose(2, 3)
        weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(dim=-1, dtype=torch.float32)
        return (weights.to(scores.dtype) @ self.values[:, :, :places]).flatten(1, 2)


def rows_of(
    sequence: Int64[Tensor, " n"], places: Int64[Tensor, " n"], block: DenseBlockCache
) -> Int64[Tensor, " nG"]:
    """Where tokens go in a dense block's room seen as one long list of heads; the same for every block."""
    kv_heads, capacity = block.keys.shape[1:3]
    heads = torch.arange(kv_heads, device=sequence.device)
    return ((sequence[:, None] * kv_heads + heads) * capacity + places[:, None]).flatten()


class RoutedBlockCache:
    """Keys and values of one routed block, those of each sequence from place 0 on; grows as it is written to."""

    def __init__(self, config: FuyuConfig, sequences: int, like: Tensor) -> None:
        # Places behind a sequence's end are masked, but must hold numbers: 0 x nan would still be nan.
        self.keys = like.new_zeros((sequences, 0, config.kv_heads, config.head_size))
        self.values = self.keys
        self.lengths = torch.zeros(sequences, dtype=torch.int64, device=like.device)
        self.longest = 0

    def write(
        self,
        sequence: Int64[Tensor, " n"],
        keys: Float[Tensor, "n G K"],
        values: Float[Tensor, "n G K"],
    ) -> None:
        """Appends tokens.

        Args:
            sequence: Of each token, in ascending order.
            keys: Of each token.
            values: Of each token.
        """
        counts = torch.bincount(sequence, minlength=len(self.lengths))
        place = torch.arange(len(sequence), device=sequence.device) - (counts.cumsum(0) - counts)[sequence]
        place = place + self.lengths[sequence]
        self.lengths = self.lengths + counts
        self.longest = int(self.lengths.max())
        if (more := self.longest - self.keys.shape[1]) > 0:
            more += self.longest // GROWTH
            self.keys, self.values = (F.pad(part, (0, 0, 0, 0, 0, more)) for part in (self.keys, self.values))
        # The cache may have been made outside of the autocast in which it is written.
        self.keys[sequence, place] = keys.to(self.keys.dtype)
        self.values[sequence, place] = values.to(self.values.dtype)

    def attend(self, sequence: Int64[Tensor, " n"], queries: Float[Tensor, "n H K"]) -> Float[Tensor, "n H K"]:
        """Attention of one token of each of some sequences to all cached ones of its own."""
        lengths = self.lengths[sequence]
        keys, values = (part[sequence, : self.longest].transpose(1, 2) for part in (self.keys, self.values))
        seen = (torch.arange(self.longest, device=lengths.device) < lengths[:, None])[:, None, None]
        return shared_attention(queries[:, :, None], keys, values, attn_mask=seen)[:, :, 0]


class KeyValueCache:
    """The caches of all blocks, and how many tokens each sequence has.

    Args:
        config: Of the decoder.
        sequences: How many are cached.
        capacity: Tokens of the longest that there will be.
        like: A weight of the decoder. Keys and values lie on its device, in its `attention_type`.
    """

    def __init__(self, config: FuyuConfig, sequences: int, capacity: int, like: Tensor) -> None:
        like = like.new_empty(0, dtype=attention_type(like))
        self.blocks = [
            RoutedBlockCache(config, sequences, like)
            if layer in config.routed
            else DenseBlockCache.empty(config, sequences, capacity, like)
            for layer in range(config.layers)
        ]
        self.lengths = torch.zeros(sequences, dtype=torch.int64, device=like.device)
        self.longest = 0
        """Tokens of the longest sequence, known to the host."""

    @property
    def dense(self) -> list[DenseBlockCache]:
        """The caches of the dense blocks, of which every decoder has one."""
        return [block for block in self.blocks if isinstance(block, DenseBlockCache)]

    @property
    def bytes(self) -> int:
        """Memory that the cache takes."""
        return sum(block.keys.nbytes + block.values.nbytes for block in self.blocks)

    def clear(self) -> None:
        """Forgets all sequences of a dense decoder, but keeps their room."""
        for block in self.dense:
            block.keys.zero_()
            block.values.zero_()
        self.lengths = torch.zeros_like(self.lengths)
        self.longest = 0

    def begin(self, document_lengths: tuple[int, ...]) -> None:
        """Counts the tokens of prompts, which are then written by `Prefill`."""
        self.lengths = to_device(torch.tensor(document_lengths), self.lengths.device)
        self.longest = max(document_lengths)

    def advance(self) -> None:
        """Counts one more token of each sequence."""
        self.lengths = self.lengths + 1
        self.longest += 1


BlockCache = DenseBlockCache | RoutedBlockCache


class Prefill:
    """A packed row of prompts, or a piece of it, whose keys and values go to the cache.

    The first prompt of a piece may have begun in an earlier one.

    Args:
        cache: With a place for each document of the row, filled with the row's tokens before `start`.
        document_lengths: Tokens of each prompt of the whole row, in the order of the cache's sequences.
        start: Where the piece begins in the row.
        stop: Where it ends.
        plan: The attention of documents of some lengths in a row, the piece's own.
    """

    def __init__(
        self,
        cache: KeyValueCache,
        document_lengths: tuple[int, ...],
        start: int,
        stop: int,
        plan: Callable[[tuple[int, ...]], RowAttention],
    ) -> None:
        self.cache = cache
        device = cache.lengths.device
        ends = np.cumsum(document_lengths)
        starts = ends - document_lengths
        inside = np.minimum(ends, stop) - np.maximum(starts, start)
        members = np.flatnonzero(inside > 0)
        self.first = int(members[0])
        """The document that the piece begins in."""
        self.known = int(max(0, start - starts[self.first]))
        """Its tokens that an earlier piece held."""
        self.continued = int(inside[self.first]) if self.known else 0
        """Its tokens in this piece, if there were any before."""
        lengths = [int(length) for length in inside[members]]
        others = tuple(lengths[1:] if self.known else lengths)
        self.plan = plan(others) if others else AttentionPlan.of((), device)
        document = np.repeat(members, lengths)
        places = np.arange(start, stop) - np.repeat(starts[members], lengths)
        self.document, within = to_device(torch.from_numpy(np.stack((document, places))), device)
        self.rows = rows_of(self.document, within, cache.dense[0])

    @property
    def attends(self) -> list[RowAttention]:
        """How each block attends."""
        return [PrefillBlock(self, block) for block in self.cache.blocks]


@dataclass(frozen=True)
class PrefillBlock(RowAttention):
    """Attends within a piece of a row of prompts, and writes its keys and values to the cache of one block.

    The tokens of a prompt that began in an earlier piece attend to the cache, all others as in training.
    """

    piece: Prefill
    block: BlockCache

    def __call__(
        self,
        queries: Float[Tensor, "T H K"],
        keys: Float[Tensor, "T G K"],
        values: Float[Tensor, "T G K"],
    ) -> Float[Tensor, "T H K"]:
        """Causal attention of every token to the tokens of its own document up to itself."""
        piece, block = self.piece, self.block
        assert isinstance(block, DenseBlockCache)
        block.write(piece.rows, keys, values)
        if not piece.known:
            return piece.plan(queries, keys, values)
        n = piece.continued
        return torch.cat((self._continue(block, queries[:n]), piece.plan(queries[n:], keys[n:], values[n:])))

    def _continue(self, block: DenseBlockCache, queries: Float[Tensor, "n H K"]) -> Float[Tensor, "n H K"]:
        """Attention of the tokens of a document that began in an earlier piece."""
        places = self.piece.known + self.piece.continued
        keys, values = (part[self.piece.first, None, :, :places] for part in (block.keys, block.values))
        order = torch.arange(places, device=queries.device)
        seen = order <= order[self.piece.known :, None]
        return shared_attention(queries.transpose(0, 1)[None], keys, values, attn_mask=seen)[0].transpose(0, 1)

    def among(self, passing: Passing) -> Attend:
        """Attention of passing tokens to each other, of which alone the cache keeps something."""
        document = self.piece.document.index_select(0, passing.index)
        return partial(self._write_and_attend, document, self.piece.plan.among(passing))

    def asking(self, passing: Passing) -> Attend:
        """Attention of passing tokens to the whole row, which the cache keeps."""
        return partial(self._write_and_attend, self.piece.document, self.piece.plan.asking(passing))

    def _write_and_attend(
        self,
        document: Int64[Tensor, " n"],
        attend: Attend,
        queries: Float[Tensor, "C H K"],
        keys: Float[Tensor, "n G K"],
        values: Float[Tensor, "n G K"],
    ) -> Float[Tensor, "C H K"]:
        assert isinstance(self.block, RoutedBlockCache)
        self.block.write(document, keys, values)
        return attend(queries, keys, values)


class DecodeStep:
    """One new token of each sequence.

    Args:
        blocks: What the cache holds of each block.
        lengths: Tokens that each sequence has in it, which are the positions of the new ones.
        places: Places of dense blocks that are looked at: enough for every sequence with its new token.
    """

    def __init__(self, blocks: Sequence[BlockCache], lengths: Int64[Tensor, " B"], places: int) -> None:
        self.places = places
        self.sequence = torch.arange(len(lengths), device=lengths.device)
        dense = next(block for block in blocks if isinstance(block, DenseBlockCache))
        self.rows = rows_of(self.sequence, lengths, dense)
        self.seen = torch.arange(places, device=lengths.device) <= lengths[:, None]
        self.attends: list[RowAttention] = [DecodeStepBlock(self, block) for block in blocks]
        """How each block attends."""


@dataclass(frozen=True)
class DecodeStepBlock(RowAttention):
    """Attends from one new token of each sequence to all that one block has cached of it, and to itself."""

    step: DecodeStep
    block: BlockCache

    def __call__(
        self,
        queries: Float[Tensor, "B H K"],
        keys: Float[Tensor, "B G K"],
        values: Float[Tensor, "B G K"],
    ) -> Float[Tensor, "B H K"]:
        """Attention of each sequence's new token."""
        assert isinstance(self.block, DenseBlockCache)
        self.block.write(self.step.rows, keys, values)
        return self.block.attend(queries, self.step.places, self.step.seen)

    def among(self, passing: Passing) -> Attend:
        """Attention of the passing ones of the new tokens to what passed before them."""
        sequence = self.step.sequence.index_select(0, passing.index)
        return partial(self._write_and_ask, sequence, sequence)

    def asking(self, passing: Passing) -> Attend:
        """Attention of the passing ones of the new tokens to all before them."""
        return partial(self._write_and_ask, self.step.sequence, self.step.sequence.index_select(0, passing.index))

    def _write_and_ask(
        self,
        written: Int64[Tensor, " n"],
        asking: Int64[Tensor, " m"],
        queries: Float[Tensor, "m H K"],
        keys: Float[Tensor, "n G K"],
        values: Float[Tensor, "n G K"],
    ) -> Float[Tensor, "m H K"]:
        assert isinstance(self.block, RoutedBlockCache)
        self.block.write(written, keys, values)
        return self.block.attend(asking, queries)
