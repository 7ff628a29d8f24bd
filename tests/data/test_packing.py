"""Laws of packed rows, and how full they are."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.packing import Packer, pack_row
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.sequence import SequenceBuilder, TokenSequence
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.image_layout import ImageSpan

PATCH = 3


def sequence(length: int, rows: int = 0, cols: int = 0, key: str = "key") -> TokenSequence:
    """A document of `length` tokens that opens with an image and ends with supervised text."""
    tokens = np.arange(100, 100 + length, dtype=np.int64)
    image = rows * (cols + 1)
    span = ImageSpan.of_grid(0, rows, cols)
    tokens[span.patch_positions] = PATCH
    loss = np.zeros(length, bool)
    loss[image:] = True  # a first token too, which nothing comes before
    patches = np.zeros((rows * cols, 48), np.uint8)
    return TokenSequence(key=key, tokens=tokens, loss=loss, patches=patches, images=(span,) if rows else ())


def test_the_row_that_the_batch_module_shows(builder: SequenceBuilder, make_png: Callable[..., bytes]) -> None:
    about_an_image = builder.build(Document("1", (Image(make_png(1, 1)), Text("q", loss=False), Text("7"))))
    plain = builder.build(Document("2", (Text("a"),)))
    row = pack_row([about_an_image, plain])
    tokenizer = builder.tokenizer
    shown = ["|SPEAKER|", "|NEWLINE|", "<s>", "q", "<0x04>", "7", "</s>", "<s>", "a", "</s>"]
    assert [tokenizer.piece(token) for token in row.tokens.tolist()] == shown
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]
    assert row.target_positions.tolist() == [4, 5, 7, 8]
    assert [tokenizer.piece(token) for token in row.targets.tolist()] == ["7", "</s>", "a", "</s>"]
    assert row.patch_positions.tolist() == [0]
    assert row.document_lengths == (7, 3)


@given(
    lengths=st.lists(st.integers(2, 130), min_size=1, max_size=60),
    budget=st.integers(20, 120),
    long_documents=st.sampled_from(["skip", "cut"]),
)
def test_rows_keep_documents_whole_and_lose_none_without_a_number(
    lengths: list[int], budget: int, long_documents: str
) -> None:
    stats = SampleStats()
    packer = Packer(budget, long_documents, stats)
    together = list(packer.pack(sequence(length, key=str(i)) for i, length in enumerate(lengths)))
    rows = [pack_row(sequences, budget) for sequences in together]
    boundaries = 0
    for row in rows:
        assert row.tokens.shape == (budget,)
        starts = np.cumsum([0, *row.document_lengths])
        for start, stop in pairwise(starts.tolist()):
            assert row.positions[start:stop].tolist() == list(range(stop - start))
        ends = set((starts[1:] - 1).tolist())
        assert not ends & set(row.target_positions.tolist()), "a target crosses into the next document"
        assert (row.tokens[row.target_positions + 1] == row.targets).all()
        assert (row.target_positions < starts[-1]).all(), "padding carries loss"
        boundaries += len(row.document_lengths)
    packed = sorted(sequence.key for sequences in together for sequence in sequences)
    fitting = [str(i) for i, length in enumerate(lengths) if long_documents == "cut" or length <= budget]
    assert packed == sorted(fitting)
    assert boundaries == stats.used == len(fitting)
    assert stats.skipped["longer-than-row"] == len(lengths) - len(fitting)
    cut = sum(max(0, length - budget) for length in lengths) if long_documents == "cut" else 0
    assert stats.tokens_cut == cut
    assert sum(sum(row.document_lengths) for row in rows) == sum(lengths[int(key)] for key in packed) - cut


def test_the_laws_saw_enough_cases() -> None:
    """Guards the test above: its rows do hold several documents, and its inputs documents too long for a row."""
    rng = np.random.default_rng(0)
    stats = SampleStats()
    rows = list(Packer(100, "skip", stats).pack(sequence(int(n)) for n in rng.integers(2, 130, 500)))
    assert np.mean([len(row) for row in rows]) > 1.5
    assert stats.skipped["longer-than-row"] > 50


def test_a_document_that_an_image_makes_too_long_is_skipped_and_counted_in_either_mode() -> None:
    for mode in ("skip", "cut"):
        stats = SampleStats()
        assert list(Packer(20, mode, stats).pack([sequence(40, rows=5, cols=5)])) == []
        assert stats.skipped == {"longer-than-row": 1}


def test_no_sequence_waits_for_ever() -> None:
    """The longest wait is a few rows although better fits keep coming."""
    rng = np.random.default_rng(1)
    lengths = [97, *rng.choice([50, 25], 2000)]
    rows = Packer(100, "skip", SampleStats()).pack(sequence(int(n), key=str(i)) for i, n in enumerate(lengths))
    assert next(i for i, row in enumerate(rows) if "0" in [sequence.key for sequence in row]) < 10


def caption_lengths(rng: np.random.Generator, count: int) -> list[int]:
    """Tokens of captioned images as img2dataset keeps them, 128 to 512 pixels in any aspect at patches of 16."""
    heights, widths = rng.integers(8, 33, (2, count))
    words = rng.lognormal(2.5, 0.5, count).astype(int) + 3
    return (heights * (widths + 1) + words).tolist()


@pytest.mark.parametrize("budget", [2048, 4096])
def test_rows_of_a_caption_mixture_are_at_least_97_percent_full(budget: int) -> None:
    lengths = caption_lengths(np.random.default_rng(2), 4_000)
    rows = list(Packer(budget, "skip", SampleStats()).pack(sequence(n) for n in lengths))
    assert sum(len(sequence) for row in rows for sequence in row) / (budget * len(rows)) >= 0.97


def test_a_batch_moves_with_all_it_knows(builder: SequenceBuilder, random_document: Callable[[int], Document]) -> None:
    batch = pack_row([builder.build(random_document(1))])
    moved = batch.to("meta")
    assert moved.tokens.device.type == moved.patches.device.type == "meta"
    assert moved.document_lengths == batch.document_lengths
    assert (moved.images, moved.document_ids) == (batch.images, batch.document_ids)
    assert isinstance(moved, PackedBatch)
    assert torch.equal(batch.to("cpu").tokens, batch.tokens)
