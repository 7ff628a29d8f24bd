"""The layout of sequences: what comes where, and what carries loss."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.sequence import SequenceBuilder, TokenSequence
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UnusableSampleError

MakePng = Callable[..., bytes]


def readable(sequence: TokenSequence, tokenizer: Tokenizer) -> list[str]:
    """Each token, in brackets where it carries loss."""
    pieces = [tokenizer.piece(token) for token in sequence.tokens.tolist()]
    return [f"[{piece}]" if loss else piece for piece, loss in zip(pieces, sequence.loss.tolist(), strict=True)]


def lay_out(builder: SequenceBuilder, *segments: Text | Image) -> list[str]:
    return readable(builder.build(Document("key", segments)), builder.tokenizer)


P, N, ASK, END = "|SPEAKER|", "|NEWLINE|", "<0x04>", "[</s>]"


def test_a_question_about_an_image_is_laid_out_as_the_module_says(builder: SequenceBuilder, make_png: MakePng) -> None:
    image = Image(make_png(4, 8))
    laid_out = lay_out(builder, image, Text("q", loss=False), Text("7"))
    assert laid_out == [P, P, N, "<s>", "q", ASK, "[7]", END]


def test_captions_and_plain_text_carry_loss_throughout(builder: SequenceBuilder, make_png: MakePng) -> None:
    image = Image(make_png(9, 1))
    assert lay_out(builder, image, Text("a1")) == [P, N, P, N, P, N, "<s>", "[a]", "[1]", END]
    assert lay_out(builder, Text("a1")) == ["<s>", "[a]", "[1]", END]


def test_each_answer_of_a_chat_begins_and_ends(builder: SequenceBuilder, make_png: MakePng) -> None:
    chat = (Text("1", False), Text("2"), Text("3", False), Text("4"))
    assert lay_out(builder, *chat) == ["<s>", "1", ASK, "[2]", END, "3", ASK, "[4]", END]
    asked_before_the_image = (Text("1", False), Image(make_png(1, 1)), Text("2"))
    assert lay_out(builder, *asked_before_the_image) == ["<s>", "1", P, N, ASK, "[2]", END]


def test_interleaved_text_is_opened_once_and_ends_without_loss_behind_an_image(
    builder: SequenceBuilder, make_png: MakePng
) -> None:
    image = Image(make_png(1, 1))
    assert lay_out(builder, image, Text("1"), image, Text("2"), image) == (
        [P, N, "<s>", "[1]", P, N, "[2]", P, N, "</s>"]
    )


@pytest.mark.parametrize(
    "segments",
    [[], [Text("only read", loss=False)], [Text("", loss=True)]],
    ids=["empty", "prompt only", "empty text"],
)
def test_a_document_without_anything_to_learn_is_refused(builder: SequenceBuilder, segments: list) -> None:
    with pytest.raises(UnusableSampleError, match="nothing-to-learn"):
        builder.build(Document("key", tuple(segments)))


def test_a_prompt_is_the_beginning_of_what_is_trained_on(
    builder: SequenceBuilder, random_document: Callable[[int], Document]
) -> None:
    for seed in range(40):
        document = random_document(seed)
        prompt, trained = builder.prompt(document.prompt), builder.build(document)
        assert trained.tokens[: len(prompt)].tolist() == prompt.tokens.tolist(), seed
        answer = builder.tokenizer.decode(trained.tokens[len(prompt) :].tolist()[:-1])
        assert answer == document.answer
        assert trained.loss[len(prompt) :].all()


def test_documents_without_images_that_can_be_used_are_counted_not_prompted(builder: SequenceBuilder) -> None:
    stats = SampleStats()
    broken = Document("broken", (Image(b"no image"), Text("1")))
    assert list(builder.prompts([broken], stats)) == []
    assert stats.skipped == {"image-unreadable": 1}


@given(
    shapes=st.lists(st.tuples(st.integers(1, 21), st.integers(1, 21)), min_size=1, max_size=3), seed=st.integers(0, 99)
)
def test_pictures_and_patch_positions_belong_together(
    builder: SequenceBuilder, make_png: MakePng, shapes: list[tuple[int, int]], seed: int
) -> None:
    encoded = [make_png(*shape, seed=seed) for shape in shapes]
    sequence = builder.build(Document("key", (*map(Image, encoded), Text("1"))))
    assert (sequence.tokens[sequence.patch_positions] == builder.tokenizer.patch_id).all()
    assert len(sequence.patch_positions) == len(sequence.patches)
    for data, picture in zip(encoded, sequence.pictures, strict=True):
        pixels = np.asarray(Pillow.open(io.BytesIO(data)))
        assert (picture[: pixels.shape[0], : pixels.shape[1]] == pixels).all()


@given(seed=st.integers(0, 10_000), budget=st.integers(1, 300))
def test_a_cut_is_a_valid_beginning(
    builder: SequenceBuilder, random_document: Callable[[int], Document], seed: int, budget: int
) -> None:
    whole = builder.build(random_document(seed))
    cut = whole.cut(budget)
    if cut is None:
        assert not whole.loss[1:budget].any() or any(s.start < budget < s.stop for s in whole.images)
        return
    assert len(cut) <= budget
    assert (cut.tokens == whole.tokens[: len(cut)]).all()
    assert len(cut.patch_positions) == len(cut.patches) == (cut.tokens == builder.tokenizer.patch_id).sum()
    assert all(span.stop <= len(cut) for span in cut.images)
    assert cut.loss[1:].any()
