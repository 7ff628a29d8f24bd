"""Attention that reads and fills the key/value cache, for prompts and for decoding steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fuyu_e2e.inference.cache import BlockCache, DenseBlockCache, GrowingBlockCache, KeyValueCache, rows_of, slots_of
from fuyu_e2e.model.attention.grouped import TiledAttention
from fuyu_e2e.model.attention.interface import Attend, Passing, Places, RowAttention
from fuyu_e2e.model.attention.mask import AttentionMask
from fuyu_e2e.model.device_copy import to_device

Plan = Callable[[AttentionMask, tuple[int, ...], tuple[tuple[int, int], ...]], RowAttention]
"""Plans attention: (mask, document lengths, (start, stop) of each image) to a `RowAttention`."""


@dataclass
class _Piece:
    """How blocks with one mask attend within a piece of a row of prompts."""

    attention: RowAttention | TiledAttention
    """Attention among the piece's tokens; for a continued document, also to what the cache holds of it."""
    known: Int64[Tensor, " known"] | None
    """The slots of those cached tokens; None if no document is continued."""
    kept: Int64[Tensor, " kept"] | None = None
    """The tokens of the piece whose keys stay in the cache of a dense block; None for all."""
    rows: Int64[Tensor, " keptG"] | None = None
    """Their rows in the cache; None if no dense block has the mask."""


def prefill_attention(
    cache: KeyValueCache, places: Places, images: tuple[tuple[int, int], ...], start: int, stop: int, plan: Plan
) -> list[RowAttention]:
    """Returns the attention of each block within a piece of a packed row of prompts, which also fills the cache.

    The first prompt of the piece may have started in an earlier piece.

    Args:
        cache: The cache, with a sequence for each document of the row, filled with the row's tokens before `start`.
        places: The places of the whole row's tokens, on the host; prompts are in the order of the cache's sequences.
        images: The (start, stop) indices of each image in the row.
        start: Start of the piece in the row; not within an image whose tokens see each other.
        stop: End of the piece.
        plan: Plans attention within the piece.
    """
    device = cache.lengths.device
    inside = places.take(slice(start, stop))
    first, known = int(inside.document[0]), int(inside.position[0])
    lengths = np.bincount(inside.document - first)
    before = places.take(slice(start - known, start))
    within = tuple((max(a, start) - start, min(b, stop) - start) for a, b in images if a < stop and b > start)
    document, position, _ = inside.on(device)

    def piece(mask: AttentionMask, block: DenseBlockCache | None) -> _Piece:
        seen, kept = before.position, None
        if mask.window is not None:
            seen = seen[(seen < mask.sinks) | (seen > known - mask.window)]
            ends = np.repeat(inside.position[np.cumsum(lengths) - 1] + 1, lengths)
            stay = (inside.position < mask.sinks) | (inside.position >= ends - mask.window)
            kept = to_device(torch.from_numpy(np.flatnonzero(stay)), device)
        if known:
            keys = Places(*map(np.concatenate, zip(before.take(seen), inside, strict=True)))
            attention: RowAttention | TiledAttention = TiledAttention.of(mask, inside, keys, device)
        else:
            attention = plan(mask, tuple(lengths.tolist()), within)
        if block is None:
            return _Piece(attention, None)
        index = slice(None) if kept is None else kept
        rows = rows_of(document[index], position[index], block, mask)
        if not known:  # torch.export can't store an empty list of slots
            return _Piece(attention, None, kept, rows)
        slots = slots_of(to_device(torch.from_numpy(seen), device), block.keys.shape[2], mask)
        return _Piece(attention, slots, kept, rows)

    pieces = {mask: piece(mask, cache.dense_of(mask)) for mask in set(cache.masks)}
    return [
        PrefillAttention(pieces[mask], block, first, document, position)
        for mask, block in zip(cache.block_masks, cache.blocks, strict=True)
    ]


@dataclass
class PrefillAttention(RowAttention):
    """Attends within a piece of a row of prompts, and writes its keys and values to the cache of one block.

    Tokens of a prompt that started in an earlier piece also attend to the cache.
    """

    piece: _Piece
    block: BlockCache
    first: int
    """The document that the piece starts in."""
    document: Int64[Tensor, " T"]
    """The document of each token of the piece."""
    position: Int64[Tensor, " T"]
    """The position of each token in its document."""

    def __call__(
        self,
        queries: Float[Tensor, "T H K"],
        keys: Float[Tensor, "T G K"],
        values: Float[Tensor, "T G K"],
    ) -> Float[Tensor, "T H K"]:
        """Returns the attention of every token to the tokens of its document that the mask shows it."""
        block, piece = self.block, self.piece
        assert isinstance(block, DenseBlockCache)
        attended = piece.attention(queries, self._shown(block.keys, keys), self._shown(block.values, values))
        assert piece.rows is not None
        if piece.kept is not None:
            keys, values = keys.index_select(0, piece.kept), values.index_select(0, piece.kept)
        block.write(piece.rows, keys, values)
        return attended

    def _shown(self, store: Float[Tensor, "B G slots K"], new: Float[Tensor, "T G K"]) -> Float[Tensor, "S G K"]:
        """Returns the cached part of a continued document and the new tokens; read before the ring is overwritten."""
        if self.piece.known is None:
            return new
        old = store[self.first].index_select(1, self.piece.known).transpose(0, 1)
        return torch.cat((old.to(new.dtype), new))  # the cache may have another dtype

    def select(self, passing: Passing) -> Attend:
        """Returns attention among the selected tokens, the only ones that the cache keeps."""
        assert isinstance(self.piece.attention, RowAttention)
        return partial(self._write_and_attend, passing.index, self.piece.attention.select(passing))

    def cross(self, passing: Passing) -> Attend:
        """Returns attention of the selected tokens to the whole row, which the cache keeps."""
        assert isinstance(self.piece.attention, RowAttention)
        return partial(self._write_and_attend, slice(None), self.piece.attention.cross(passing))

    def _write_and_attend(
        self,
        written: Int64[Tensor, " n"] | slice,
        attend: Attend,
        queries: Float[Tensor, "Q H K"],
        keys: Float[Tensor, "n G K"],
        values: Float[Tensor, "n G K"],
    ) -> Float[Tensor, "Q H K"]:
        assert isinstance(self.block, GrowingBlockCache)
        self.block.write(self.document[written], keys, values, self.position, written)
        return attend(queries, keys, values)


def decode_attention(
    blocks: Sequence[BlockCache], masks: Sequence[AttentionMask], lengths: Int64[Tensor, " B"], places: int
) -> list[RowAttention]:
    """Returns the attention of each block from one new token of each sequence, which also adds it to the cache.

    Args:
        blocks: The cache of each block.
        masks: The pattern of the blocks' masks.
        lengths: Tokens of each sequence in the cache, which are the positions of the new ones.
        places: Slots to look at: enough for every sequence including its new token.
    """
    sequence, period = torch.arange(len(lengths), device=lengths.device), len(masks)
    # By index in the pattern: torch.compile can't use masks as keys.
    shown: list[tuple[Tensor, Tensor] | tuple[None, None]] = []
    for first, mask in enumerate(masks):
        dense = next((block for block in blocks[first::period] if isinstance(block, DenseBlockCache)), None)
        shown.append(
            (None, None)
            if dense is None
            else (rows_of(sequence, lengths, dense, mask), _hidden(dense, mask, lengths, places))
        )
    return [DecodeAttention(block, lengths, sequence, *shown[number % period]) for number, block in enumerate(blocks)]


def _hidden(
    block: DenseBlockCache, mask: AttentionMask, lengths: Int64[Tensor, " B"], places: int
) -> Bool[Tensor, "B 1 1 slots"]:
    """Returns which of a dense block's first slots are hidden from the new tokens, after these are written."""
    size = block.keys.shape[2]
    slots, at = torch.arange(min(places, size), device=lengths.device), lengths.view(-1, 1, 1, 1)
    if type(mask) is AttentionMask:  # the ring holds exactly what the mask shows
        return slots > at
    positions = slots
    if mask.window is not None and size == mask.cache_slots:
        ring = size - mask.sinks
        positions = torch.where(slots < mask.sinks, slots, slots + (at - slots) // ring * ring)
    return (slots > at) | ~mask.sees(at, positions, False)


@dataclass
class DecodeAttention(RowAttention):
    """Attends from one new token of each sequence to its cached tokens of one block and to itself."""

    block: BlockCache
    lengths: Int64[Tensor, " B"]
    """Tokens of each sequence before the new one."""
    sequence: Int64[Tensor, " B"]
    """The number of each sequence."""
    rows: Int64[Tensor, " BG"] | None
    """Rows of the new keys in a dense block's cache."""
    hidden: Bool[Tensor, "B 1 1 slots"] | None
    """Slots of a dense block that the new tokens don't see."""

    def __call__(
        self,
        queries: Float[Tensor, "B H K"],
        keys: Float[Tensor, "B G K"],
        values: Float[Tensor, "B G K"],
    ) -> Float[Tensor, "B H K"]:
        """Returns the attention of each sequence's new token."""
        assert isinstance(self.block, DenseBlockCache)
        assert self.rows is not None
        assert self.hidden is not None
        self.block.write(self.rows, keys, values)
        return self.block.attend(queries, self.hidden)

    def select(self, passing: Passing) -> Attend:
        """Returns attention of the selected new tokens to the tokens selected before them."""
        return partial(self._write_and_attend, passing.index, passing.index)

    def cross(self, passing: Passing) -> Attend:
        """Returns attention of the selected new tokens to all tokens before them."""
        return partial(self._write_and_attend, self.sequence, passing.index)

    def _write_and_attend(
        self,
        written: Int64[Tensor, " n"],
        attending: Int64[Tensor, " m"],
        queries: Float[Tensor, "m H K"],
        keys: Float[Tensor, "n G K"],
        values: Float[Tensor, "n G K"],
    ) -> Float[Tensor, "m H K"]:
        assert isinstance(self.block, GrowingBlockCache)
        self.block.write(written, keys, values, self.lengths, written)
        return self.block.attend(attending, self.lengths, queries)
