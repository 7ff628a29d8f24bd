"""A blind question differs from the one that sees in its images alone, and those are of another picture."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.eval.blind import draw_partners, share_from_image, with_images_of, without_images
from fuyu_e2e.eval.question import Question

SEGMENTS = st.lists(st.one_of(st.binary(max_size=3), st.tuples(st.text(max_size=3), st.booleans())), max_size=6)
"""Images as bytes, texts with whether they carry loss."""


def made(segments: list, key: str = "key") -> Document:
    return Document(key, tuple(Image(part) if isinstance(part, bytes) else Text(*part) for part in segments))


def texts(document: Document) -> list[Text]:
    return [part for part in document.segments if isinstance(part, Text)]


@given(SEGMENTS, SEGMENTS, st.binary(max_size=3))
def test_only_images_change(segments: list, others: list, data: bytes) -> None:
    document, other = made(segments), made([*others, data], "other")
    theirs = [part for part in other.segments if isinstance(part, Image)]
    left_out, exchanged = without_images(document), with_images_of(document, other)
    assert list(left_out.segments) == texts(document)
    assert left_out.key == exchanged.key == document.key
    images = 0
    for before, after in zip(document.segments, exchanged.segments, strict=True):
        if isinstance(before, Text):
            assert after == before
        else:
            assert after == theirs[images % len(theirs)]
            images += 1


@given(st.lists(st.integers(0, 6), max_size=20), st.integers(0, 5))
def test_every_image_is_given_once_and_to_another(numbers: list[int], seed: int) -> None:
    asked = [
        Question(document=Document(str(n), (Image(bytes([n])),)), references=("x",), image=f"image{n}")
        for n in numbers
    ]
    partners = draw_partners(asked, np.random.default_rng(seed))
    images = {question.image for question in asked}
    if len(images) < 2:
        assert not partners
        return
    assert partners.keys() == images
    given_ = {image: partner.segments[0] for image, partner in partners.items()}
    assert all(part != Image(bytes([int(image.removeprefix("image"))])) for image, part in given_.items())
    assert len(set(given_.values())) == len(images)


def test_a_question_without_an_image_gives_none_away(make_question: Callable[..., Question]) -> None:
    blank = make_question(1, document=Document("text", (Text("Why?", loss=False),)), image="none")
    assert not draw_partners([blank, make_question(2)], np.random.default_rng(0))
    assert draw_partners([blank, make_question(2), make_question(3)], np.random.default_rng(0)).keys() == {
        "image2",
        "image3",
    }


def test_the_share_is_what_is_lost_blind() -> None:
    assert share_from_image(0.8, 0.2) == pytest.approx(0.75)
    assert share_from_image(0.5, 0.5) == 0.0
    assert share_from_image(0.0, 0.2) is None
    assert share_from_image(0.4, 0.6) == pytest.approx(-0.5)
