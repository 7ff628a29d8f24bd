"""Cached generation is the uncached forward, token for token."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sequence import Prompt, SequenceBuilder, TokenSequence
from fuyu_e2e.errors import UserError
from fuyu_e2e.inference import generation
from fuyu_e2e.inference.cache import KeyValueCache
from fuyu_e2e.inference.depth import token_depth
from fuyu_e2e.inference.generation import (
    LOOK_EVERY,
    Sampling,
    choose,
    continue_texts,
    decode_step,
    generate,
    prefill,
)
from fuyu_e2e.model.attention.interface import reference_attention
from fuyu_e2e.model.attention.kernels import AttentionBackend, VarlenRow
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.routing.block import routed_blocks
from fuyu_e2e.model.row import TrainingProgress

RandomDocument = Callable[[int], Document]


def uncached(decoder: Decoder, prompt: TokenSequence, steps: int, eos_id: int) -> list[int]:
    """The definition: the whole sequence again for every token."""
    row = pack_row([prompt])
    written: list[int] = []
    while len(written) < steps:
        tokens = torch.cat((row.tokens, torch.tensor(written, dtype=torch.int64)))
        longer = type(row)(
            tokens=tokens,
            positions=torch.arange(len(tokens)),
            patches=row.patches,
            patch_positions=row.patch_positions,
            target_positions=row.target_positions[:0],
            targets=row.targets[:0],
            newline_positions=row.newline_positions,
            images=row.images,
            document_lengths=(len(tokens),),
        )
        chosen = int(decoder.logits(longer)[-1].argmax())
        if chosen == eos_id:
            break
        written.append(chosen)
    return written


@torch.no_grad()
@given(seeds=st.lists(st.integers(0, 1_000), min_size=1, max_size=6))
def test_cached_greedy_generation_is_the_uncached_forward(
    seeds: list[int], decoder: Decoder, builder: SequenceBuilder, random_document: RandomDocument
) -> None:
    prompts = [builder.prompt(random_document(seed).prompt) for seed in seeds]
    together = generate(decoder, prompts, max_new_tokens=6, eos_id=builder.tokenizer.eos_id)
    assert together == [uncached(decoder, prompt, 6, builder.tokenizer.eos_id) for prompt in prompts]


def test_generation_stops_at_the_end_of_the_document(
    decoder: Decoder, builder: SequenceBuilder, random_document: RandomDocument
) -> None:
    """Whatever token a prompt is continued with first, taken as the end it ends that prompt and no other."""
    prompts = [builder.prompt(random_document(seed).prompt) for seed in range(6)]
    free = generate(decoder, prompts, max_new_tokens=5, eos_id=-1)
    end = free[0][2]
    stopped = generate(decoder, prompts, max_new_tokens=5, eos_id=end)
    assert stopped == [row[: row.index(end)] if end in row else row for row in free]
    assert generate(decoder, [], max_new_tokens=5, eos_id=end) == []
    assert generate(decoder, prompts[:1], max_new_tokens=0, eos_id=end) == [[]]


def test_looking_seldom_for_the_end_changes_nothing(
    decoder: Decoder,
    builder: SequenceBuilder,
    random_document: RandomDocument,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU: sequences that ended are read on, and what they write then is no part of them."""
    prompts = [builder.prompt(random_document(seed).prompt) for seed in range(6)]
    end = generate(decoder, prompts[:1], max_new_tokens=5, eos_id=-1)[0][1]
    expected = generate(decoder, prompts, max_new_tokens=9, eos_id=end)
    assert len(expected[0]) == 1
    for every in (2, 4, 8, 100):
        monkeypatch.setitem(LOOK_EVERY, "cpu", every)
        assert generate(decoder, prompts[:1], max_new_tokens=9, eos_id=end) == expected[:1]
        assert generate(decoder, prompts, max_new_tokens=9, eos_id=end) == expected


@torch.no_grad()
@given(seeds=st.lists(st.integers(0, 1_000), min_size=1, max_size=4), tokens=st.integers(5, 200))
@settings(max_examples=settings.default.max_examples // 2)
def test_a_row_read_in_pieces_leaves_what_the_whole_row_leaves(
    seeds: list[int], tokens: int, decoder: Decoder, builder: SequenceBuilder, random_document: RandomDocument
) -> None:
    """Pieces cut prompts and images anywhere: the same last states, and the same keys and values in every block."""
    row = pack_row([builder.prompt(random_document(seed).prompt) for seed in seeds])
    longest = max(row.document_lengths)

    def read(piece: int) -> tuple[torch.Tensor, KeyValueCache]:
        cache = KeyValueCache(decoder, len(seeds), longest + 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(generation.PREFILL_TOKENS, "cpu", piece)
            return prefill(decoder, row, cache), cache

    (whole, one), (pieces, many) = read(len(row.tokens)), read(tokens)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)
    assert torch.equal(many.lengths, torch.tensor(row.document_lengths))
    for block, other in zip(one.dense, many.dense, strict=True):
        torch.testing.assert_close(other.keys, block.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other.values, block.values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("chosen", "asked"), [("auto", "auto"), ("documents", "documents"), ("flex", "auto")])
@pytest.mark.parametrize("routing", [None, {"share": 0.4}, {"share": 0.4, "skipped": "keys"}])
def test_prompts_are_read_with_the_attention_that_serves_the_device(
    routing: dict | None,
    chosen: AttentionBackend,
    asked: str,
    decoder: Decoder,
    routed_decoder: Callable[..., Decoder],
    builder: SequenceBuilder,
    random_document: RandomDocument,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel for GPUs is replaced by its definition; pieces begin within prompts, and may hold no other."""
    reader = copy.deepcopy(decoder) if routing is None else routed_decoder(**routing)
    prompts = [builder.prompt(random_document(seed).prompt) for seed in range(5)]
    expected = generate(reader, prompts, max_new_tokens=4, eos_id=-1)
    planned: list[tuple] = []

    def kernel(queries: Tensor, keys: Tensor, values: Tensor, starts: Tensor, longest: int) -> Tensor:
        return reference_attention(queries, keys, values, tuple(starts.diff().tolist()))

    def plan(lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype, backend: str, **_: int) -> VarlenRow:
        planned.append((dtype, backend))
        return VarlenRow.of(lengths, device, kernel)

    monkeypatch.setattr("fuyu_e2e.model.decoder.plan_attention", plan)
    monkeypatch.setitem(generation.PREFILL_TOKENS, "cpu", 17)
    reader.attention = chosen
    assert generate(reader, prompts, max_new_tokens=4, eos_id=-1) == expected
    assert set(planned) == {(torch.float32, asked)}


@given(seed=st.integers(0, 1_000), top_k=st.integers(1, 12), top_p=st.floats(0.05, 1.0))
def test_sampling_draws_only_candidates(seed: int, top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 12, generator=generator) * 3
    by_k = choose(logits, Sampling(temperature=1.0, top_k=top_k), generator)
    ranks = (logits > logits.gather(1, by_k[:, None])).sum(dim=1)
    assert (ranks < top_k).all()
    by_p = choose(logits, Sampling(temperature=1.0, top_p=top_p), generator)
    probabilities = logits.softmax(dim=1)
    before = torch.where(probabilities > probabilities.gather(1, by_p[:, None]), probabilities, 0).sum(dim=1)
    assert (before < top_p).all()


def test_sampling_follows_the_probabilities_and_the_seed() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]]).repeat(20_000, 1)
    for temperature in (0.5, 1.0, 2.0):
        drawn = choose(logits, Sampling(temperature=temperature), torch.Generator().manual_seed(0))
        shares = torch.bincount(drawn, minlength=3) / len(drawn)
        torch.testing.assert_close(shares, (logits[0] / temperature).softmax(0), atol=0.015, rtol=0)
    assert (choose(logits, Sampling(), None) == 2).all()
    for coldest in (1e-320, 1e-30, 1e-29):
        assert (choose(logits, Sampling(temperature=coldest), torch.Generator()) == 2).all()
    hottest = choose(logits, Sampling(temperature=1e300), torch.Generator().manual_seed(0))
    assert len(hottest.unique()) == logits.shape[-1], "any token"


def test_the_same_seed_writes_the_same_text(
    decoder: Decoder, builder: SequenceBuilder, make_png: Callable[..., bytes]
) -> None:
    document = Document("key", (Image(make_png(9, 30)), Text("What?", loss=False)))
    prompts = [Prompt(document, builder.prompt(document))]

    def write(seed: int) -> str:
        sampling = Sampling(temperature=1.5, seed=seed)
        return continue_texts(decoder, builder.tokenizer, prompts, max_new_tokens=20, sampling=sampling)[0]

    assert write(1) == write(1) != write(2)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_impossible_sampling_is_refused(wrong: dict, name: str) -> None:
    with pytest.raises(UserError, match=name):
        Sampling(**wrong)


def test_a_decoder_in_training_mode_is_told_from_one_that_generates(
    decoder: Decoder, builder: SequenceBuilder
) -> None:
    prompt = builder.prompt(Document("d", (Text("a", loss=False),)))
    decoder.train()
    try:
        with pytest.raises(UserError, match=r"decoder\.eval\(\)"):
            generate(decoder, [prompt], max_new_tokens=2, eos_id=1)
    finally:
        decoder.eval()


def test_the_cache_says_what_it_takes(decoder: Decoder) -> None:
    cache = KeyValueCache(decoder, sequences=3, capacity=10)
    assert cache.bytes == 2 * 3 * 3 * 10 * 2 * 12 * 4


ROUTED = [
    {"rule": "threshold", "share": 0.3},
    {"rule": "threshold", "share": 0.3, "skipped": "keys"},
    {"rule": "threshold", "share": 0.05},
    {"rule": "topk", "share": 0.3},
    {"rule": "image_topk", "share": 0.3},
    {"rule": "fixed", "share": 0.2, "text_share": 0.6},
    {"rule": "random", "share": 0.3},
]


def label(routing: dict) -> str:
    return "-".join(map(str, routing.values()))


@torch.no_grad()
@pytest.mark.parametrize("routing", ROUTED, ids=label)
@given(seeds=st.lists(st.integers(0, 1_000), min_size=1, max_size=6))
@settings(max_examples=settings.default.max_examples // 3)
def test_routed_cached_generation_is_the_uncached_forward(
    routing: dict,
    seeds: list[int],
    routed_decoder: Callable[..., Decoder],
    builder: SequenceBuilder,
    random_document: RandomDocument,
) -> None:
    decoder = routed_decoder(**routing)
    prompts = [builder.prompt(random_document(seed).prompt) for seed in seeds]
    together = generate(decoder, prompts, max_new_tokens=6, eos_id=builder.tokenizer.eos_id)
    assert together == [uncached(decoder, prompt, 6, builder.tokenizer.eos_id) for prompt in prompts]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skipped", ["nothing", "keys"])
def test_cached_decoding_chooses_the_tokens_of_the_training_forward(
    routed_decoder: Callable[..., Decoder],
    builder: SequenceBuilder,
    random_document: RandomDocument,
    skipped: str,
    dtype: torch.dtype,
) -> None:
    """Each document read token by token after its image, against all at once in a row with a fixed capacity."""
    decoder = routed_decoder(share=0.3, skipped=skipped, slack=3.0, explore=0.0).to(dtype)
    same = total = 0
    for seed in range(25):
        sequence = builder.build(random_document(seed))
        start = max((span.stop for span in sequence.images), default=0) + 1
        batch = pack_row([sequence])
        row = decoder.train().row(batch)
        decoder.logits(batch, row)
        assert not any((routed.chosen & ~routed.passed).any() for routed in routed_blocks(row))
        expected = torch.stack([routed.passed for routed in routed_blocks(row)])
        prompt = sequence.cut(start) or replace(sequence, tokens=sequence.tokens[:start], loss=sequence.loss[:start])
        depth = token_depth(decoder.eval(), prompt, sequence.tokens[start:].tolist())
        assert depth.passed.shape == expected.shape
        same += int((depth.passed == expected).sum())
        total += expected.numel()
    assert total > 1_200
    # Random weights leave many scores near a threshold, where bfloat16 rounds either way.
    assert same == total if dtype == torch.float32 else same >= 0.99 * total, same / total


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("routed", [False, True])
def test_under_autocast_a_cache_is_in_its_type_and_gives_the_uncached_logits(
    routed: bool,
    decoder: Decoder,
    routed_decoder: Callable[..., Decoder],
    builder: SequenceBuilder,
    random_document: RandomDocument,
) -> None:
    if routed:  # everything passes, since where a score is rounded over the threshold, logits are others
        decoder = routed_decoder(share=1.0, skipped="keys", slack=0.0)
    sequence = builder.build(random_document(2))
    start = max(span.stop for span in sequence.images) + 1
    prompt = sequence.cut(start) or replace(sequence, tokens=sequence.tokens[:start], loss=sequence.loss[:start])
    exact = decoder.logits(pack_row([sequence]))[start - 1 :]
    with torch.autocast("cpu", torch.bfloat16):
        expected = decoder.logits(pack_row([sequence]))[start - 1 :]
        cache = KeyValueCache(decoder, 1, len(sequence))
        states = [prefill(decoder, pack_row([prompt]), cache)]
        states += [decode_step(decoder, torch.tensor([token]), cache) for token in sequence.tokens[start:].tolist()]
        found = decoder.lm_head(torch.cat(states))
    assert {part.dtype for block in cache.blocks for part in (block.keys, block.values)} == {torch.bfloat16}
    rounding = (expected - exact).abs().max()
    assert 0 < rounding < 0.05 * exact.abs().max()
    assert (found - expected).abs().max() < 2 * rounding


@torch.no_grad()
def test_a_routed_cache_holds_what_passed(
    routed_decoder: Callable[..., Decoder], builder: SequenceBuilder, make_png: Callable[..., bytes]
) -> None:
    """At a share of 0.125 in every second block, little more than (1 + 0.125) / 2 of a dense cache."""
    settings = {"share": 0.125, "blocks": (1, 3), "slack": 0.0}
    documents = [Document(f"{seed}", (Image(make_png(120, 120, seed=seed)),)) for seed in range(4)]
    rows = pack_row([builder.prompt(document) for document in documents])
    sizes = {}
    for skipped in ("nothing", "keys"):
        decoder = routed_decoder(**settings, skipped=skipped)
        for _ in range(30):  # thresholds of these very documents
            row = decoder.row(rows)
            decoder.logits(rows, row)
            decoder.observe(row)
            decoder.end_step(TrainingProgress(), lambda counts: counts)
        cache = KeyValueCache(decoder, 4, max(rows.document_lengths))
        prefill(decoder, rows, cache)
        sizes[skipped] = [block.keys.numel() // (4 * 2 * 12) for block in cache.blocks]
        dense = 2 * 5 * 4 * max(rows.document_lengths) * 2 * 12 * 4
        assert cache.bytes < (3 + 2 * 1.0) / 5 * 1.06 * dense
        if skipped == "nothing":
            assert cache.bytes == pytest.approx((3 + 2 * 0.125 * 9 / 8) / 5 * dense, rel=0.12)
    assert all(places == rows.document_lengths[0] for places in sizes["nothing"][::2])
    assert max(sizes["nothing"][1::2]) < 0.3 * rows.document_lengths[0]
    assert min(sizes["keys"][1::2]) >= rows.document_lengths[0]
