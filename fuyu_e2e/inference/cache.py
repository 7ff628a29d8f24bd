"""The key/value cache: what a decoder remembers of each sequence, block by block.

A dense block remembers every token that its mask may still show to a later one, in memory allocated at the start:
shapes never change, so a step can be compiled. Under a window the memory is a ring after the sinks. A block that
selects tokens remembers those that passed it, or every token if skipped ones leave their keys. Their number isn't
known in advance, so its memory grows, at most to the ring's size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fuyu_e2e.model.attention.grouped import shared_attention
from fuyu_e2e.model.attention.interface import attention_type
from fuyu_e2e.model.attention.mask import CAUSAL, AttentionMask
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.device_copy import to_device
from fuyu_e2e.model.images.connector import ImageStates

GROWTH = 8
"""A full cache grows by this fraction of its slots: rarely copied, and never much too large."""


@dataclass(frozen=True)
class DenseBlockCache:
    """Keys and values of one dense block; those of each sequence start at slot 0.

    Sequences grow independently, so prompts of different lengths need no padding between prompt and answer.
    """

    keys: Float[Tensor, "B G S K"]
    values: Float[Tensor, "B G S K"]

    @classmethod
    def empty(
        cls, config: FuyuConfig, sequences: int, capacity: int, mask: AttentionMask, like: Tensor
    ) -> "DenseBlockCache":
        """Allocates slots for `capacity` tokens of each sequence, or for as many as the mask shows."""
        capacity = capacity if mask.cache_slots is None else min(capacity, mask.cache_slots)
        # Slots after a sequence's end are masked, but must not hold nan: 0 x nan would still be nan.
        shape = (sequences, config.kv_heads, capacity, config.head_size)
        return cls(like.new_zeros(shape), like.new_zeros(shape))

    def write(self, rows: Int64[Tensor, " nG"], keys: Float[Tensor, "n G K"], values: Float[Tensor, "n G K"]) -> None:
        """Stores tokens at the rows that `rows_of` returns."""
        for store, new in ((self.keys, keys), (self.values, values)):
            # The cache may have been allocated outside the autocast in which it is written.
            store.view(-1, store.shape[-1]).index_copy_(0, rows, new.flatten(0, 1).to(store.dtype))

    def attend(self, queries: Float[Tensor, "B H K"], hidden: Bool[Tensor, "B 1 1 slots"]) -> Float[Tensor, "B H K"]:
        """Returns the attention of one token of each sequence to the first slots that aren't `hidden` from it."""
        slots = hidden.shape[-1]
        # The query heads of one key head are rows of one product, so that the cache is read once and never repeated.
        grouped = queries.unflatten(1, (self.keys.shape[1], -1)) * queries.shape[-1] ** -0.5
        scores = grouped @ self.keys[:, :, :slots].transpose(2, 3)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1, dtype=torch.float32)
        return (weights.to(scores.dtype) @ self.values[:, :, :slots]).flatten(1, 2)


def slots_of(places: Int64[Tensor, " n"], size: int, mask: AttentionMask) -> Int64[Tensor, " n"]:
    """Returns the slots of tokens at these places: the place itself, or its slot in the ring after the sinks."""
    if mask.cache_slots is None or size < mask.cache_slots:
        return places
    return torch.where(places < mask.sinks, places, mask.sinks + (places - mask.sinks) % (size - mask.sinks))


def rows_of(
    sequence: Int64[Tensor, " n"], places: Int64[Tensor, " n"], block: DenseBlockCache, mask: AttentionMask
) -> Int64[Tensor, " nG"]:
    """Returns the rows of tokens in a dense block's memory viewed as one list of heads; equal for blocks of equal
    masks."""
    kv_heads, size = block.keys.shape[1:3]
    heads = torch.arange(kv_heads, device=sequence.device)
    slots = slots_of(places, size, mask)
    return ((sequence.unsqueeze(1) * kv_heads + heads) * size + slots.unsqueeze(1)).flatten()


class GrowingBlockCache:
    """Keys and values of a block that selects tokens; those of each sequence start at slot 0. Grows when written
    to."""

    def __init__(self, config: FuyuConfig, sequences: int, mask: AttentionMask, like: Tensor) -> None:
        # Slots after a sequence's end are masked, but must not hold nan: 0 x nan would still be nan.
        self.keys = like.new_zeros((sequences, 0, config.kv_heads, config.head_size))
        self.values = self.keys
        self.positions = None if mask == CAUSAL else like.new_zeros((sequences, 0), dtype=torch.int64)
        """The position of each token in its document, if the mask counts the gaps between them."""
        self.mask = mask
        self.lengths = torch.zeros(sequences, dtype=torch.int64, device=like.device)
        """Tokens of each sequence that were written, including overwritten ones."""
        self.longest = 0

    def write(
        self,
        sequence: Int64[Tensor, " n"],
        keys: Float[Tensor, "n G K"],
        values: Float[Tensor, "n G K"],
        positions: Int64[Tensor, " T"],
        index: Int64[Tensor, " n"] | slice,
    ) -> None:
        """Appends tokens.

        Args:
            sequence: The sequence of each token, in ascending order.
            keys: The key of each token.
            values: The value of each token.
            positions: The positions of the row's tokens in their documents.
            index: The tokens' indices in the row.
        """
        counts = torch.bincount(sequence, minlength=len(self.lengths))
        place = torch.arange(len(sequence), device=sequence.device) - (counts.cumsum(0) - counts)[sequence]
        place = place + self.lengths[sequence]
        self.lengths = self.lengths + counts
        self.longest, room = int(self.lengths.max()), self.mask.cache_slots
        if room is not None and self.longest > room:
            # Drops tokens whose slot later ones of the same call take; the first call contains all sinks.
            stay = (place < self.mask.sinks) | (place >= (self.lengths - (room - self.mask.sinks))[sequence])
            sequence, keys, values = sequence[stay], keys[stay], values[stay]
            positions, index = positions[index][stay], slice(None)
            place, self.longest = slots_of(place[stay], room, self.mask), room
        if (more := self.longest - self.keys.shape[1]) > 0:
            more += self.longest // GROWTH if room is None else min(self.longest // GROWTH, room - self.longest)
            self.keys, self.values = (F.pad(part, (0, 0, 0, 0, 0, more)) for part in (self.keys, self.values))
            if self.positions is not None:
                self.positions = F.pad(self.positions, (0, more))
        # The cache may have been allocated outside the autocast in which it is written.
        self.keys[sequence, place] = keys.to(self.keys.dtype)
        self.values[sequence, place] = values.to(self.values.dtype)
        if self.positions is not None:
            self.positions[sequence, place] = positions[index]

    def attend(
        self, sequence: Int64[Tensor, " n"], positions: Int64[Tensor, " B"], queries: Float[Tensor, "n H K"]
    ) -> Float[Tensor, "n H K"]:
        """Returns the attention of one new token of each of some sequences to its sequence's tokens that it sees.

        Args:
            sequence: The sequence of each token.
            positions: The position in its document of every sequence's new token.
            queries: The query of each token.
        """
        lengths = self.lengths[sequence]
        keys, values = (part[sequence, : self.longest].transpose(1, 2) for part in (self.keys, self.values))
        seen = torch.arange(self.longest, device=lengths.device) < lengths[:, None]
        if self.positions is not None:
            shown = self.positions[sequence, : self.longest]
            seen = seen & self.mask.sees(positions[sequence, None], shown, False)
        return shared_attention(queries[:, :, None], keys, values, attn_mask=seen[:, None, None])[:, :, 0]


BlockCache = DenseBlockCache | GrowingBlockCache


class KeyValueCache:
    """The caches of all blocks, and the length of each sequence.

    Args:
        decoder: The decoder. Keys and values lie on the device of its weights, in their `attention_type`.
        sequences: The number of sequences.
        capacity: The most tokens that a sequence will have.
    """

    def __init__(self, decoder: Decoder, sequences: int, capacity: int) -> None:
        config, weight = decoder.config, decoder.embed_tokens.weight
        like = weight.new_empty(0, dtype=attention_type(weight))
        self.capacity = capacity
        self.masks, self.block_masks = config.masks, config.block_masks
        """The pattern of the blocks' masks, and the mask of each block."""
        self.blocks: list[BlockCache] = [
            GrowingBlockCache(config, sequences, block.mask, like)
            if block.selects_tokens
            else DenseBlockCache.empty(config, sequences, capacity, block.mask, like)
            for block in decoder.each_block()
        ]
        self.lengths = torch.zeros(sequences, dtype=torch.int64, device=like.device)
        self.longest = 0
        """Tokens of the longest sequence, known to the host."""
        self.shifts: Tensor | None = None
        """How far the next token's rotary position exceeds the sequence's length; None for 0."""
        self.images: ImageStates | None = None
        """The connector's output for the prompts' images."""
        self.visible_image: Tensor | None = None
        """The image that the next token of each sequence may read, if the connector gives features."""

    @property
    def dense(self) -> list[DenseBlockCache]:
        """The caches of the dense blocks."""
        return [block for block in self.blocks if isinstance(block, DenseBlockCache)]

    def dense_of(self, mask: AttentionMask) -> DenseBlockCache | None:
        """Returns the cache of a dense block with a mask; None if there is none."""
        of_mask = (block for block, own in zip(self.blocks, self.block_masks, strict=True) if own == mask)
        return next((block for block in of_mask if isinstance(block, DenseBlockCache)), None)

    @property
    def bytes(self) -> int:
        """Bytes of memory that the cache takes."""
        return sum(block.keys.nbytes + block.values.nbytes for block in self.blocks)

    def clear(self) -> None:
        """Empties the cache of a dense decoder, but keeps its memory."""
        for block in self.dense:
            block.keys.zero_()
            block.values.zero_()
        self.lengths = torch.zeros_like(self.lengths)
        self.longest, self.shifts, self.images, self.visible_image = 0, None, None, None

    def begin(self, document_lengths: tuple[int, ...]) -> None:
        """Sets the lengths of prompts, which `PrefillAttention` then writes."""
        self.lengths = to_device(torch.tensor(document_lengths), self.lengths.device)
        self.longest = max(document_lengths)

    @property
    def rotary_positions(self) -> Int64[Tensor, " B"]:
        """The rotary position of the next token of each sequence."""
        return self.lengths if self.shifts is None else self.lengths + self.shifts

    def advance(self) -> None:
        """Adds one to the length of each sequence."""
        self.lengths = self.lengths + 1
        self.longest += 1
