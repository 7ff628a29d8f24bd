"""Under masks by depth, generation from a cache that forgets what no block sees is the uncached forward."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sequence import SequenceBuilder, TokenSequence
from fuyu_e2e.errors import UserError
from fuyu_e2e.inference import generation
from fuyu_e2e.inference.cache import KeyValueCache
from fuyu_e2e.inference.generation import decode_step, generate, prefill
from fuyu_e2e.model.attention.mask import CAUSAL, AttentionMask
from fuyu_e2e.model.decoder import Decoder

from .test_generation import uncached

RandomDocument = Callable[[int], Document]
LARGEST = 54
"""Tokens of the largest image of `random_document`."""


@dataclass(frozen=True, kw_only=True)
class EvenDistance(AttentionMask):
    """Shows tokens at an even distance: a mask of a user's own."""

    def sees(self, query: Any, key: Any, same_image: Any) -> Any:
        return super().sees(query, key, same_image) & ((query - key) % 2 == 0)


PATTERNS = {
    "window": (AttentionMask(window=5),),
    "sinks": (AttentionMask(window=5, sinks=2), CAUSAL),
    "bidirectional": (AttentionMask(window=5), AttentionMask(window=LARGEST, images="bidirectional"), CAUSAL),
    "own": (EvenDistance(window=7, sinks=3), CAUSAL),
}
patterns = pytest.mark.parametrize("masks", PATTERNS.values(), ids=PATTERNS)


def masked(decoder: Decoder, masks: tuple[AttentionMask, ...]) -> Decoder:
    """The same weights under other masks."""
    made = Decoder(replace(decoder.config, masks=masks))
    made.load_state_dict(decoder.state_dict())
    return made.eval()


def short_and_long(builder: SequenceBuilder, random_document: RandomDocument, seeds: list[int]) -> list[TokenSequence]:
    """Prompts of a few tokens, fewer than a window has, beside those of documents with images."""
    short = [builder.prompt(Document(text, (Text(text, loss=False),))) for text in ("a", "4072")]
    assert len(short[0]) < 5
    return [*short, *(builder.prompt(random_document(seed).prompt) for seed in seeds)]


@torch.no_grad()
@patterns
@given(seeds=st.lists(st.integers(0, 1_000), min_size=1, max_size=4))
@settings(max_examples=settings.default.max_examples // 12)
def test_cached_greedy_generation_is_the_uncached_forward(
    masks: tuple[AttentionMask, ...],
    seeds: list[int],
    decoder: Decoder,
    builder: SequenceBuilder,
    random_document: RandomDocument,
) -> None:
    """Of prompts shorter and longer than the window, twice round its ring."""
    reader = masked(decoder, masks)
    prompts = short_and_long(builder, random_document, seeds)
    together = generate(reader, prompts, max_new_tokens=13, eos_id=-1)
    assert together == [uncached(reader, prompt, 13, -1) for prompt in prompts]


@torch.no_grad()
@patterns
def test_every_step_gives_the_logits_of_the_whole(
    masks: tuple[AttentionMask, ...], decoder: Decoder, builder: SequenceBuilder, random_document: RandomDocument
) -> None:
    """Of a long text after images, which the greedy choice of one token may hide."""
    reader = masked(decoder, masks)
    sequence = builder.build(
        Document("key", (*random_document(4).segments, Text("What is it? 4072 19 8 3", loss=True)))
    )
    start = max(span.stop for span in sequence.images) + 1
    prompt = sequence.cut(start) or replace(sequence, tokens=sequence.tokens[:start], loss=sequence.loss[:start])
    expected = reader.logits(pack_row([sequence]))[start - 1 :]
    assert len(expected) > 12
    cache = KeyValueCache(reader, 1, len(sequence))
    states = [prefill(reader, pack_row([prompt]), cache)]
    states += [decode_step(reader, torch.tensor([token]), cache) for token in sequence.tokens[start:].tolist()]
    torch.testing.assert_close(reader.lm_head(torch.cat(states)), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@patterns
@given(seeds=st.lists(st.integers(0, 1_000), min_size=1, max_size=4), tokens=st.integers(1, 200))
@settings(max_examples=settings.default.max_examples // 10)
def test_a_row_read_in_pieces_leaves_what_the_whole_row_leaves(
    masks: tuple[AttentionMask, ...],
    seeds: list[int],
    tokens: int,
    decoder: Decoder,
    builder: SequenceBuilder,
    random_document: RandomDocument,
) -> None:
    """The same last states, and the same keys and values in every place of every block's ring."""
    reader = masked(decoder, masks)
    row = pack_row(short_and_long(builder, random_document, seeds))

    def read(piece: int) -> tuple[torch.Tensor, KeyValueCache]:
        cache = KeyValueCache(reader, len(row.document_lengths), max(row.document_lengths) + 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(generation.PREFILL_TOKENS, "cpu", piece)
            return prefill(reader, row, cache), cache

    (whole, one), (pieces, many) = read(len(row.tokens)), read(tokens)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)
    for block, other in zip(one.dense, many.dense, strict=True):
        torch.testing.assert_close(other.keys, block.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other.values, block.values, atol=1e-5, rtol=1e-5)


ROUTED = {
    "window": (AttentionMask(window=5),),
    "sinks": (AttentionMask(window=9, sinks=2), AttentionMask(window=5, sinks=2)),
    "bidirectional": (CAUSAL, AttentionMask(window=LARGEST, images="bidirectional")),
    "own": (CAUSAL, EvenDistance(window=16, sinks=3)),
}
"""The second and the fourth block are routed."""


@torch.no_grad()
@pytest.mark.parametrize("masks", ROUTED.values(), ids=ROUTED)
@pytest.mark.parametrize("skipped", ["nothing", "keys"])
@given(seeds=st.lists(st.integers(0, 1_000), min_size=1, max_size=4))
@settings(max_examples=settings.default.max_examples // 16)
def test_routed_cached_generation_is_the_uncached_forward(
    skipped: str,
    masks: tuple[AttentionMask, ...],
    seeds: list[int],
    routed_decoder: Callable[..., Decoder],
    builder: SequenceBuilder,
    random_document: RandomDocument,
) -> None:
    """Windows count the tokens that passed by a block, too."""
    reader = masked(routed_decoder(share=0.4, skipped=skipped), masks)
    prompts = short_and_long(builder, random_document, seeds)
    together = generate(reader, prompts, max_new_tokens=13, eos_id=-1)
    assert together == [uncached(reader, prompt, 13, -1) for prompt in prompts]


@torch.no_grad()
@pytest.mark.parametrize("skipped", [None, "nothing", "keys"])
def test_a_windowed_block_keeps_its_window_and_sinks(
    skipped: str | None,
    decoder: Decoder,
    routed_decoder: Callable[..., Decoder],
    builder: SequenceBuilder,
    make_png: Callable[..., bytes],
) -> None:
    """Of each sequence, whatever its length; a routed block keeps no more than that."""
    masks = (AttentionMask(window=40, sinks=3), AttentionMask(window=20), CAUSAL)
    reader = masked(decoder if skipped is None else routed_decoder(share=0.9, skipped=skipped), masks)
    row = pack_row([builder.prompt(Document(f"{side}", (Image(make_png(side, side)),))) for side in (32, 44)])
    capacity = max(row.document_lengths) + 60
    cache = KeyValueCache(reader, 2, capacity)
    prefill(reader, row, cache)
    for token in range(60):
        decode_step(reader, torch.tensor([token, token + 1]), cache)
    slots = [block.keys.numel() // (2 * 2 * 12) for block in cache.blocks]
    rooms = [43, 20, capacity, 43, 20][: len(slots)]
    routed = reader.config.routed
    assert [kept for block, kept in enumerate(slots) if block not in routed] == [
        room for block, room in enumerate(rooms) if block not in routed
    ]
    for block in routed:
        assert slots[block] == rooms[block], "many more than the window passed"
    assert cache.bytes == sum(2 * 2 * kept * 2 * 12 * 4 for kept in slots)


def test_an_image_larger_than_the_window_it_is_seen_through_is_refused(
    decoder: Decoder, builder: SequenceBuilder, make_png: Callable[..., bytes]
) -> None:
    reader = masked(decoder, (CAUSAL, AttentionMask(window=41, images="bidirectional")))
    [fitting, larger] = [builder.prompt(Document("d", (Image(make_png(24, side)),))) for side in (20, 24)]
    generate(reader, [fitting], max_new_tokens=2, eos_id=-1)
    with pytest.raises(UserError, match="window of 41, but an image has up to 42 tokens: set the window to 42"):
        generate(reader, [fitting, larger], max_new_tokens=2, eos_id=-1)
