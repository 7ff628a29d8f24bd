"""The key/value cache: what a decoder remembers of each sequence, block by block.

A dense block remembers every token. A routed block remembers those that passed it, or every token where skipped ones
leave their keys behind.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from fuyu_e2e.model.attention import Attend, AttentionPlan, Passing, RowAttention
from fuyu_e2e.model.config import FuyuConfig

GROWTH = 8
"""A full cache of a routed block grows by this fraction of its places: seldom copied, and never much too large."""


class BlockCache:
    """Keys and values of one block, those of each sequence from place 0 on; grows as it is written to.

    Sequences grow independently, so prompts of different lengths need no padding between prompt and answer.
    """

    def __init__(self, config: FuyuConfig, sequences: int, like: Tensor) -> None:
        # Places behind a sequence's end are masked, but must hold numbers: 0 x nan would still be nan.
        self.keys = like.new_zeros((sequences, 0, config.kv_heads, config.head_size))
        self.values = self.keys
        self.lengths = torch.zeros(sequences, dtype=torch.int64, device=like.device)
        self.longest = 0

    def reserve(self, places: int) -> None:
        """Makes room for so many tokens of each sequence."""
        if (more := places - self.keys.shape[1]) > 0:
            self.keys, self.values = (F.pad(part, (0, 0, 0, 0, 0, more)) for part in (self.keys, self.values))

    def write(
        self,
        sequence: Int64[Tensor, " n"],
        keys: Float[Tensor, "n G K"],
        values: Float[Tensor, "n G K"],
        longest: int | None = None,
    ) -> None:
        """Appends tokens.

        Args:
            sequence: Of each token, in ascending order.
            keys: Of each token.
            values: Of each token.
            longest: Tokens of the longest sequence with these; where the host doesn't know, it is read.
        """
        counts = torch.bincount(sequence, minlength=len(self.lengths))
        place = torch.arange(len(sequence), device=sequence.device) - (counts.cumsum(0) - counts)[sequence]
        place = place + self.lengths[sequence]
        self.lengths = self.lengths + counts
        if self.longest == 0:  # under autocast, keys and values come in other types than weights
            self.keys, self.values = self.keys.to(keys.dtype), self.values.to(values.dtype)
        self.longest = int(self.lengths.max()) if longest is None else longest
        if self.longest > self.keys.shape[1]:
            self.reserve(self.longest + self.longest // GROWTH)
        self.keys[sequence, place] = keys
        self.values[sequence, place] = values

    def attend(self, sequence: Int64[Tensor, " n"], queries: Float[Tensor, "n H K"]) -> Float[Tensor, "n H K"]:
        """Attention of one token of each of some sequences to all cached ones of its own."""
        lengths = self.lengths[sequence]
        keys, values = (part[sequence, : self.longest].transpose(1, 2) for part in (self.keys, self.values))
        attended = F.scaled_dot_product_attention(
            queries[:, :, None],
            keys,
            values,
            attn_mask=(torch.arange(self.longest, device=lengths.device) < lengths[:, None])[:, None, None],
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
        return attended[:, :, 0]


class KeyValueCache:
    """The caches of all blocks, and how many tokens each sequence has."""

    def __init__(self, config: FuyuConfig, sequences: int, capacity: int, like: Tensor) -> None:
        self.blocks = [BlockCache(config, sequences, like) for _ in range(config.layers)]
        for layer, block in enumerate(self.blocks):
            if layer not in config.routed:
                block.reserve(capacity)
        self.lengths = torch.zeros(sequences, dtype=torch.int64, device=like.device)
        self.longest = 0
        """Tokens of the longest sequence, known to the host."""

    @property
    def bytes(self) -> int:
        """Memory that the cache takes."""
        return sum(block.keys.nbytes + block.values.nbytes for block in self.blocks)


class Prefill(RowAttention):
    """Attends within a packed row of prompts, and writes their keys and values to the cache.

    Args:
        cache: An empty cache with a place for each document of the row.
        document_lengths: Tokens of each prompt, in the order of the cache's sequences.
    """

    def __init__(self, cache: KeyValueCache, document_lengths: tuple[int, ...]) -> None:
        self.cache = cache
        self.plan = AttentionPlan.of(document_lengths, cache.lengths.device)
        cache.lengths = torch.tensor(document_lengths, device=cache.lengths.device)
        cache.longest = max(document_lengths)

    def __call__(
        self,
        layer: int,
        queries: Float[Tensor, "T H K"],
        keys: Float[Tensor, "T G K"],
        values: Float[Tensor, "T G K"],
    ) -> Float[Tensor, "T H K"]:
        """Attention as in training."""
        self.cache.blocks[layer].write(self.plan.document, keys, values, self.cache.longest)
        return self.plan(layer, queries, keys, values)

    def among(self, passing: Passing) -> Attend:
        """Attention of passing tokens to each other, of which alone the cache keeps something."""
        return self._writing(self.plan.document.index_select(0, passing.index), self.plan.among(passing))

    def asking(self, passing: Passing) -> Attend:
        """Attention of passing tokens to the whole row, which the cache keeps."""
        return self._writing(self.plan.document, self.plan.asking(passing))

    def _writing(self, sequence: Int64[Tensor, " n"], attend: Attend) -> Attend:
        def write_and_attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            self.cache.blocks[layer].write(sequence, keys, values)
            return attend(layer, queries, keys, values)

        return write_and_attend


class DecodeStep(RowAttention):
    """Attends from one new token of each sequence to all of its cached ones and itself.

    Attributes:
        positions: Of the new tokens in their documents.
    """

    def __init__(self, cache: KeyValueCache) -> None:
        self.cache = cache
        self.positions = cache.lengths
        self.sequence = torch.arange(len(cache.lengths), device=cache.lengths.device)
        cache.lengths = cache.lengths + 1
        cache.longest += 1

    def __call__(
        self,
        layer: int,
        queries: Float[Tensor, "B H K"],
        keys: Float[Tensor, "B G K"],
        values: Float[Tensor, "B G K"],
    ) -> Float[Tensor, "B H K"]:
        """Attention of each sequence's new token."""
        block = self.cache.blocks[layer]
        block.write(self.sequence, keys, values, self.cache.longest)
        return block.attend(self.sequence, queries)

    def among(self, passing: Passing) -> Attend:
        """Attention of the passing ones of the new tokens to what passed before them."""
        sequence = self.sequence.index_select(0, passing.index)
        return self._writing(sequence, sequence)

    def asking(self, passing: Passing) -> Attend:
        """Attention of the passing ones of the new tokens to all before them."""
        return self._writing(self.sequence, self.sequence.index_select(0, passing.index))

    def _writing(self, written: Int64[Tensor, " n"], asking: Int64[Tensor, " m"]) -> Attend:
        def write_and_attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            block = self.cache.blocks[layer]
            block.write(written, keys, values)
            return block.attend(asking, queries)

        return write_and_attend
