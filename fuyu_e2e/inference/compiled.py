"""The compiled decoding step: one graph from tokens to logits, and on a GPU one CUDA graph.

A change of shapes would compile it again. So caches have a power of two of slots, and a step looks at the smallest
power of two that covers all sequences. A decoder is compiled once for each number of sequences and each cache size,
and for each power of two that its sequences pass through.
"""

from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fuyu_e2e.errors import UserError
from fuyu_e2e.inference.cache import DenseBlockCache, KeyValueCache
from fuyu_e2e.inference.cached_attention import decode_attention
from fuyu_e2e.inference.packed import PackedDecoder
from fuyu_e2e.model.attention.interface import attention_type
from fuyu_e2e.model.decoder import Decoder, Inputs

SMALLEST = 128
"""Fewest slots looked at: fewer would save less time than another compilation costs."""

_caches: WeakKeyDictionary[Decoder, KeyValueCache] = WeakKeyDictionary()
"""The cache of each decoder's last call: a CUDA graph writes to the memory that it was recorded with."""
_packed: WeakKeyDictionary[Decoder, PackedDecoder] = WeakKeyDictionary()
"""The packed copies that run in place of decoders on a CPU."""


def compiled_cache(decoder: Decoder, sequences: int, capacity: int) -> KeyValueCache:
    """Returns an empty cache for `compiled_step`: the one of the decoder's last call if its shape fits, else a new
    one.

    Raises:
        UserError: The decoder has blocks that select tokens, or its connector gives features.
    """
    for selecting in decoder.selecting.values():
        raise UserError(
            f"The decoding step of a decoder with {selecting.kind} blocks can't be compiled, as what its cache holds "
            "depends on what passes: generate with compiled=False."
        )
    if decoder.config.connector.gives_features:
        raise UserError(
            "The decoding step of a decoder whose connector gives features can't be compiled, as their number differs "
            "from prompt to prompt: generate with compiled=False."
        )
    if PackedDecoder.serves(decoder):
        if decoder not in _packed:
            _packed[decoder] = PackedDecoder(decoder)
        _packed[decoder].follow(decoder, sequences)
    weight = decoder.embed_tokens.weight
    capacity = _bucket(capacity)
    cache = _caches.get(decoder)
    if cache is None or _shape(cache) != (sequences, capacity, attention_type(weight), weight.device):
        cache = _caches[decoder] = KeyValueCache(decoder, sequences, capacity)
        if weight.device.type == "cuda":
            for block in cache.dense:
                # Otherwise a graph that writes to its inputs is not recorded as a CUDA graph.
                torch._dynamo.mark_static_address(block.keys, guard=False)
                torch._dynamo.mark_static_address(block.values, guard=False)
    else:
        cache.clear()
    return cache


def compiled_step(decoder: Decoder, tokens: Int64[Tensor, " B"], cache: KeyValueCache) -> Float[Tensor, "B V"]:
    """Reads one more token of each sequence; returns the logits of the next, valid until the next call.

    Call it within `many_graphs`.
    """
    places = _bucket(cache.longest + 1)
    keys, values = [block.keys for block in cache.dense], [block.values for block in cache.dense]
    runs = _packed[decoder].decoder if PackedDecoder.serves(decoder) else decoder
    if tokens.device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()
        logits_BV = _on_gpu(runs, tokens, cache.lengths, cache.shifts, keys, values, places)
    else:
        logits_BV = _on_cpu(runs, tokens, cache.lengths, cache.shifts, keys, values, places)
    cache.advance()
    return logits_BV


def _shape(cache: KeyValueCache) -> tuple[int, int, torch.dtype, torch.device]:
    keys = cache.dense[0].keys
    return len(keys), cache.capacity, keys.dtype, keys.device


def _bucket(places: int) -> int:
    return max(SMALLEST, 1 << (places - 1).bit_length())


def _step(
    decoder: Decoder,
    tokens: Int64[Tensor, " B"],
    lengths: Int64[Tensor, " B"],
    shifts: Int64[Tensor, " B"] | None,
    keys: list[Tensor],
    values: list[Tensor],
    places: int,
) -> Float[Tensor, "B V"]:
    blocks = [DenseBlockCache(*stores) for stores in zip(keys, values, strict=True)]
    attends = decode_attention(blocks, decoder.config.masks, lengths, places)
    row = decoder.row_of(lengths, attends, rotary_positions=None if shifts is None else lengths + shifts)
    return decoder.lm_head(decoder(Inputs(tokens), row))


_on_cpu = torch.compile(_step, fullgraph=True, dynamic=False)
_on_gpu = torch.compile(_step, fullgraph=True, dynamic=False, mode="reduce-overhead")
