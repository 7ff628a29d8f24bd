"""The key/value cache: what a decoder remembers of each sequence, block by block."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from fuyu_e2e.model.attention import AttentionPlan
from fuyu_e2e.model.config import FuyuConfig


class KeyValueCache:
    """Keys and values of a batch of sequences, each from place 0 on, with room for `capacity` tokens each.

    Sequences grow independently, so prompts of different lengths need no padding between prompt and answer.
    """

    def __init__(self, config: FuyuConfig, sequences: int, capacity: int, like: Tensor) -> None:
        shape = (config.layers, sequences, capacity, config.kv_heads, config.head_size)
        # Places behind a sequence's end are masked, but must hold numbers: 0 x nan would still be nan.
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)
        self.lengths = torch.zeros(sequences, dtype=torch.int64, device=like.device)

    @property
    def bytes(self) -> int:
        """Memory that the cache takes."""
        return self.keys.nbytes + self.values.nbytes


class Prefill:
    """Attends within a packed row of prompts, and writes their keys and values to the cache.

    Args:
        cache: An empty cache with a place for each document of the row.
        document_lengths: Tokens of each prompt, in the order of the cache's sequences.
    """

    def __init__(self, cache: KeyValueCache, document_lengths: tuple[int, ...]) -> None:
        device = cache.keys.device
        self.cache = cache
        self.plan = AttentionPlan.of(document_lengths, device)
        cache.lengths.copy_(torch.tensor(document_lengths))
        self.sequence = torch.repeat_interleave(cache.lengths)
        starts = cache.lengths.cumsum(0) - cache.lengths
        self.place = torch.arange(len(self.sequence), device=device) - starts[self.sequence]

    def __call__(
        self,
        layer: int,
        queries: Float[Tensor, "T H K"],
        keys: Float[Tensor, "T G K"],
        values: Float[Tensor, "T G K"],
    ) -> Float[Tensor, "T H K"]:
        """Attention as in training."""
        self.cache.keys[layer, self.sequence, self.place] = keys
        self.cache.values[layer, self.sequence, self.place] = values
        return self.plan(layer, queries, keys, values)


class DecodeStep:
    """Attends from one new token of each sequence to all of its cached ones and itself."""

    def __init__(self, cache: KeyValueCache) -> None:
        self.cache = cache
        self.place: Int64[Tensor, " B"] = cache.lengths.clone()
        self.sequence = torch.arange(len(self.place), device=self.place.device)
        self.longest = int(self.place.max()) + 1
        self.allowed = torch.arange(self.longest, device=self.place.device) <= self.place[:, None]
        cache.lengths += 1

    def __call__(
        self,
        layer: int,
        queries: Float[Tensor, "B H K"],
        keys: Float[Tensor, "B G K"],
        values: Float[Tensor, "B G K"],
    ) -> Float[Tensor, "B H K"]:
        """Attention of each sequence's new token."""
        self.cache.keys[layer, self.sequence, self.place] = keys
        self.cache.values[layer, self.sequence, self.place] = values
        cached_keys = self.cache.keys[layer, :, : self.longest].transpose(1, 2)
        cached_values = self.cache.values[layer, :, : self.longest].transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            queries[:, :, None],
            cached_keys,
            cached_values,
            attn_mask=self.allowed[:, None, None],
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
        return attended[:, :, 0]
