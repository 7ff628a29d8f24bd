"""Exports prefill and decoding step as graphs of fixed shapes (`torch.export`), for runtimes without Python.

Both are pure functions that take and return the cache: a list of keys and a list of values, with an entry for each
block of the shape (sequences, key/value heads, capacity, head size).
"""

from functools import partial

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.export import ExportedProgram

from fuyu_e2e.errors import UserError
from fuyu_e2e.inference.cache import DenseBlockCache, KeyValueCache
from fuyu_e2e.inference.cached_attention import decode_attention, prefill_attention
from fuyu_e2e.model.attention.interface import Places
from fuyu_e2e.model.decoder import Decoder, Inputs

Outputs = tuple[Tensor, list[Tensor], list[Tensor]]
"""Logits of the next token, keys, values."""


@torch.no_grad()
def export_prefill(decoder: Decoder, *, tokens: int, patches: int, capacity: int) -> ExportedProgram:
    """Returns the graph that reads one prompt.

    Its inputs are token ids, raw patches and the positions of the patches, as in `pack_row`.

    Args:
        decoder: A dense decoder in evaluation mode.
        tokens: Tokens of the prompt, including patches and newlines.
        patches: Number of patches among them.
        capacity: Slots of the returned cache.

    Raises:
        UserError: The decoder has blocks that select tokens, reads the grids or places of images; or the prompt
            doesn't fit the cache.
    """
    _check_dense(decoder)
    if (mask := next((mask for mask in decoder.config.block_masks if mask.needs_image_ids), None)) is not None:
        raise UserError(
            f"A decoder with decoder.masks that may ask which tokens are of one image (images {mask.images!r} of "
            f"{type(mask).__name__}) has no graph for prompts, which is not given where images are: generate with "
            "`fuyu-e2e generate`."
        )
    if decoder.config.grid_embeddings is not None or not decoder.config.connector.one_per_patch:
        raise _no_graph("parts that read the grids of images", "prompts of one length may have any grids")
    if capacity < tokens:
        raise UserError(f"A cache of {capacity} places doesn't hold a prompt of {tokens} tokens: raise the capacity.")
    device = decoder.embed_tokens.weight.device
    example = (
        torch.zeros(tokens, dtype=torch.int64, device=device),
        torch.zeros(patches, decoder.config.patch_values, dtype=torch.uint8, device=device),
        torch.arange(patches, device=device),
    )
    return torch.export.export(_Prefill(decoder, capacity), example)


@torch.no_grad()
def export_decode_step(decoder: Decoder, *, sequences: int, capacity: int) -> ExportedProgram:
    """Returns the graph that reads one more token of each sequence.

    Its inputs are these tokens, the number of cached tokens of each sequence, keys and values.

    Args:
        decoder: A dense decoder in evaluation mode.
        sequences: Number of sequences.
        capacity: Slots of the cache.

    Raises:
        UserError: The decoder has blocks that select tokens.
    """
    _check_dense(decoder)
    cache = KeyValueCache(decoder, sequences, capacity)
    tokens = torch.zeros_like(cache.lengths)
    keys, values = _stores(cache)
    return torch.export.export(_DecodeStep(decoder, capacity), (tokens, torch.zeros_like(tokens), keys, values))


def _check_dense(decoder: Decoder) -> None:
    if decoder.config.rotary == "2d":
        raise _no_graph("decoder.rotary '2d'", "positions depend on the grids of images")
    connector = decoder.config.connector
    if connector.gives_features:
        raise _no_graph(
            f"the connector {type(connector).__name__}", "its blocks read features of images beside the cache"
        )
    for block in decoder.selecting.values():
        raise _no_graph(f"{block.kind} blocks", "what its cache holds depends on what passes")


def _no_graph(held: str, why: str) -> UserError:
    return UserError(
        f"A decoder with {held} has no graph of fixed shapes, as {why}: generate with `fuyu-e2e generate`."
    )


def _stores(cache: KeyValueCache) -> tuple[list[Tensor], list[Tensor]]:
    return [block.keys for block in cache.dense], [block.values for block in cache.dense]


class _Prefill(nn.Module):
    def __init__(self, decoder: Decoder, capacity: int) -> None:
        super().__init__()
        self.decoder, self.capacity = decoder, capacity

    def forward(
        self, tokens: Int64[Tensor, " T"], patches: UInt8[Tensor, "P C"], patch_positions: Int64[Tensor, " P"]
    ) -> Outputs:
        length = tokens.shape[0]
        cache = KeyValueCache(self.decoder, 1, self.capacity)
        plan = partial(self.decoder.plan, device=tokens.device, backend="documents")
        positions = torch.arange(length, device=tokens.device)
        attends = prefill_attention(cache, Places.of((length,), ()), (), 0, length, plan)
        row = self.decoder.row_of(positions, attends)
        hidden_TD = self.decoder(Inputs(tokens, patches, patch_positions), row)
        return self.decoder.lm_head(hidden_TD[-1:]), *_stores(cache)


class _DecodeStep(nn.Module):
    def __init__(self, decoder: Decoder, capacity: int) -> None:
        super().__init__()
        self.decoder, self.capacity = decoder, capacity

    def forward(
        self,
        tokens: Int64[Tensor, " B"],
        lengths: Int64[Tensor, " B"],
        keys: list[Float[Tensor, "B G _ K"]],
        values: list[Float[Tensor, "B G _ K"]],
    ) -> Outputs:
        blocks = [DenseBlockCache(*(store.clone() for store in stores)) for stores in zip(keys, values, strict=True)]
        attends = decode_attention(blocks, self.decoder.config.masks, lengths, self.capacity)
        row = self.decoder.row_of(lengths, attends)
        hidden_BD = self.decoder(Inputs(tokens), row)
        return self.decoder.lm_head(hidden_BD), [block.keys for block in blocks], [block.values for block in blocks]
