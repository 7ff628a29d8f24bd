"""Generation: continues many prompts at once, each with images of its own sizes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import inf
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sequence import Prompt, TokenSequence
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UserError
from fuyu_e2e.inference.cache import KeyValueCache
from fuyu_e2e.inference.cached_attention import decode_attention, prefill_attention
from fuyu_e2e.inference.compiled import compiled_cache, compiled_step
from fuyu_e2e.model.attention.interface import Places
from fuyu_e2e.model.attention.kernels import AttentionBackend
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.decoder import Decoder, Inputs
from fuyu_e2e.model.device_copy import to_device
from fuyu_e2e.model.graphs import many_graphs
from fuyu_e2e.model.rope import following_positions
from fuyu_e2e.model.row import Row

Watch = Callable[[Row], None]
"""Receives a row that was read, with the blocks' reports."""
PREFILL_TOKENS = {"cpu": 2_048, "cuda": 16_384}
"""Tokens of a dense decoder's prompts read at once. A GPU's host is busy as long with few tokens as with many."""
COLDEST = 1e-30
"""The lowest temperature that differs from greedy: logits divided by less would overflow float32."""
LOOK_EVERY = {"cpu": 1, "cuda": 8}
"""Steps between checks whether all sequences have ended; a GPU has to finish its queued work for each check."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from its logits.

    Raises:
        UserError: A value is out of its range.
    """

    temperature: float = 0.0
    """Divides the logits before the softmax; 0 always takes the likeliest token (greedy)."""
    top_k: int | None = None
    """Only this many of the likeliest tokens are candidates."""
    top_p: float | None = None
    """Only the likeliest tokens that together reach this probability are candidates (Holtzman et al. 2020, arXiv
    1904.09751)."""
    seed: int = 0
    """Seeds the draws."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < inf:
            raise UserError(f"temperature is {self.temperature}, but must be 0 (greedy) or a number above.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}, but must be at least 1.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, but must be above 0 and at most 1.")


GREEDY = Sampling()
"""Always the likeliest token."""


def choose(
    logits_BV: Float[Tensor, "B V"], sampling: Sampling, generator: torch.Generator | None
) -> Int64[Tensor, " B"]:
    """Returns the id of one token for each row of logits, chosen as `sampling` says."""
    if sampling.temperature < COLDEST:
        return logits_BV.argmax(dim=-1)
    # Relative to the greatest logit, so that the division can't overflow.
    logits_BV = logits_BV.float()
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None:
        kth = logits_BV.topk(min(sampling.top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth, float("-inf"))
    if sampling.top_p is not None:
        ranked, order = logits_BV.softmax(dim=-1).sort(descending=True, dim=-1)
        # A token stays while those before it have not reached top_p, so the likeliest always stays.
        dropped = ranked.cumsum(dim=-1) - ranked >= sampling.top_p
        logits_BV = logits_BV.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))
    return torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompts: Sequence[TokenSequence],
    *,
    max_new_tokens: int,
    eos_id: int,
    sampling: Sampling = GREEDY,
    compiled: bool = False,
) -> list[list[int]]:
    """Continues each prompt until its end of document, or for `max_new_tokens` tokens.

    Args:
        decoder: A decoder in evaluation mode; in training mode, blocks that select tokens would drop some.
        prompts: Results of `SequenceBuilder.prompt`, of any lengths.
        max_new_tokens: Most tokens generated for a prompt, including its end.
        eos_id: The token that ends a document.
        sampling: How tokens are chosen.
        compiled: Whether to compile the decoding step (`fuyu_e2e.inference.compiled`): slow in the first call with a
            new number of prompts or much longer ones, fast after that.

    Returns:
        The new tokens of each prompt, without the end of document.

    Raises:
        UserError: The decoder is in training mode, or can't be compiled as asked; or there is not enough memory for
            so many tokens.
    """
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    weight = decoder.embed_tokens.weight
    batch = pack_row(list(prompts))
    generator = torch.Generator(weight.device).manual_seed(sampling.seed)
    capacity = max(batch.document_lengths) + max_new_tokens
    if compiled:
        cache = compiled_cache(decoder, len(prompts), capacity)
    else:
        try:
            cache = KeyValueCache(decoder, len(prompts), capacity)
        except RuntimeError as error:  # torch has no class of its own for this on a CPU
            raise UserError(
                f"There is no memory for the keys and values of {len(prompts):,} x {capacity:,} tokens: lower "
                "max_new_tokens."
            ) from error
    logits_BV = decoder.lm_head(prefill(decoder, batch, cache))
    look_every = LOOK_EVERY.get(weight.device.type, LOOK_EVERY["cuda"])
    written: list[Tensor] = []
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=weight.device)
    with many_graphs() if compiled else nullcontext():
        while True:
            chosen = choose(logits_BV, sampling, generator).masked_fill(ended, eos_id)
            written.append(chosen)
            ended |= chosen == eos_id
            if len(written) == max_new_tokens or (len(written) % look_every == 0 and bool(ended.all())):
                break
            if compiled:
                logits_BV = compiled_step(decoder, chosen, cache)
            else:
                logits_BV = decoder.lm_head(decode_step(decoder, chosen, cache))
    rows = torch.stack(written, dim=1).tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


def prefill(
    decoder: Decoder, batch: PackedBatch, cache: KeyValueCache, watch: Watch | None = None
) -> Float[Tensor, "B D"]:
    """Reads a packed row of prompts into an empty cache; returns the last state of each prompt.

    A dense decoder reads `PREFILL_TOKENS` at a time, so that a long row takes little memory besides its cache. If a
    block selects tokens or reads `Row.info`, the row is read at once, since such a block may look at whole images.

    Args:
        decoder: A decoder in evaluation mode.
        batch: The row, preferably on the host.
        cache: The cache to fill.
        watch: Receives each row that was read.

    Raises:
        UserError: The decoder is in training mode.
    """
    if decoder.training:
        raise UserError("The decoder is in training mode, in which it can't generate: call decoder.eval() first.")
    length = sum(batch.document_lengths)
    device = decoder.embed_tokens.weight.device
    step = PREFILL_TOKENS.get(device.type, PREFILL_TOKENS["cuda"])
    if decoder.reads_info or decoder.selecting:
        step = length
    image_bounds = batch.image_bounds
    bounds = _bounds(length, step, image_bounds if decoder.config.needs_image_ids else ())
    embedded = torch.searchsorted(batch.patch_positions, torch.tensor(bounds, device=batch.tokens.device)).tolist()
    batch = batch.to(device)
    # All at once: pieces cut through images, and connectors may need whole images.
    images = decoder.embed_images(batch.patches, batch.images)
    # Other backends chosen for training may not support the dtype of generation, or only when compiled.
    backend: AttentionBackend = "documents" if decoder.attention == "documents" else "auto"
    plan = partial(decoder.plan, device=device, backend=backend)
    info = decoder.info(batch)
    cache.begin(batch.document_lengths)
    lasts = np.cumsum(batch.document_lengths) - 1
    rotary_positions, read = decoder.rotary_positions(batch), decoder.visible_image(batch)
    if read is not None:
        of_prompts = dict.fromkeys(range(len(lasts)), -1) | {d: n for n, d in enumerate(batch.image_documents)}
        cache.images, cache.visible_image = images, to_device(torch.tensor([*of_prompts.values()]), device)
    if rotary_positions.ndim == 2:
        following = following_positions(batch.document_lengths, batch.images)
        cache.shifts = to_device(torch.from_numpy(following - np.array(batch.document_lengths)), device)
    places = Places.of(batch.document_lengths, image_bounds)
    states = []
    for (start, stop), (first, end) in zip(pairwise(bounds), pairwise(embedded), strict=True):
        attends = prefill_attention(cache, places, image_bounds, start, stop, plan)
        turned, reads = rotary_positions[..., start:stop], None if read is None else read[start:stop]
        row = decoder.row_of(batch.positions[start:stop], attends, info, turned, reads)
        positions = batch.patch_positions[first:end] - start
        of_piece = images._replace(embeddings=images.embeddings[first:end])
        inputs = Inputs(batch.tokens[start:stop], patch_positions=positions, states=of_piece)
        with _uncompiled():
            hidden_TD = decoder(inputs, row)
        if watch is not None:
            watch(row)
        within = torch.from_numpy(lasts[(start <= lasts) & (lasts < stop)] - start)
        states.append(hidden_TD.index_select(0, to_device(within, device)))
    return torch.cat(states)


def _bounds(length: int, step: int, whole: tuple[tuple[int, int], ...]) -> list[int]:
    """Returns the bounds of pieces of about `step` tokens of a row, none of them within a `whole` span."""
    bounds = [0]
    while bounds[-1] < length:
        stop = min(length, bounds[-1] + step)
        bounds.append(next((end for begin, end in whole if begin < stop < end), stop))
    return bounds


def decode_step(
    decoder: Decoder, tokens: Int64[Tensor, " B"], cache: KeyValueCache, watch: Watch | None = None
) -> Float[Tensor, "B D"]:
    """Reads one more token of each sequence, and returns its state; `watch` receives the row."""
    attends = decode_attention(cache.blocks, cache.masks, cache.lengths, cache.longest + 1)
    row = decoder.row_of_new_tokens(cache.lengths, attends, cache.rotary_positions, cache.visible_image)
    cache.advance()
    with _uncompiled():
        hidden_BD = decoder(Inputs(tokens, states=cache.images), row)
    if watch is not None:
        watch(row)
    return hidden_BD


def _uncompiled() -> AbstractContextManager[Any]:
    """Bypasses blocks compiled for training: a graph for each length would soon be too many."""
    return torch.compiler.set_stance("force_eager")


def continue_texts(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> list[str]:
    """Continues each prompt, and returns the texts."""
    generated = generate(
        decoder,
        [prompt.sequence for prompt in prompts],
        max_new_tokens=max_new_tokens,
        eos_id=tokenizer.eos_id,
        sampling=sampling,
    )
    return [tokenizer.decode(ids) for ids in generated]
