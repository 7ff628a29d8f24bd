"""Rotary positions along the rows and columns of images, against their definitions."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.errors import UserError
from fuyu_e2e.export.graphs import export_decode_step, export_prefill
from fuyu_e2e.export.transformers import to_transformers
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.image_layout import FUYU_LAYOUT, Grid, ImageSpan
from fuyu_e2e.model.rope import following_positions, grid_positions, rotary

from .test_images import MeanConfig

Part = int | tuple[Grid, ...]
"""Words, or the views of an image."""

grids = st.tuples(st.integers(1, 5), st.integers(1, 5))
parts = st.integers(1, 4) | st.lists(grids, min_size=1, max_size=2).map(tuple)
rows = st.lists(st.lists(parts, min_size=1, max_size=5), min_size=1, max_size=3)


def laid_out(documents: list[list[Part]]) -> tuple[tuple[int, ...], tuple[ImageSpan, ...]]:
    """Lengths of documents and the spans of their images."""
    lengths, spans, place = [], [], 0
    for document in documents:
        begin = place
        for part in document:
            if isinstance(part, int):
                place += part
            else:
                spans.append(ImageSpan(place, part, FUYU_LAYOUT.tokens(part).tobytes()))
                place = spans[-1].stop
        lengths.append(place - begin)
    return tuple(lengths), tuple(spans)


def counted(document: list[Part]) -> tuple[list[tuple[int, int]], int]:
    """The row and column of each token of a document, one after the other, and the number that follows them."""
    found, number = [], 0
    for part in document:
        if isinstance(part, int):
            for _ in range(part):
                found.append((number, number))
                number += 1
            continue
        for height, width in part:
            for row in range(height):
                for column in range(width):
                    found.append((number + row, number + column))
                found.append((number + row, number + width))
            number += max(height, width + 1)
    return found, number


@given(documents=rows)
def test_positions_are_those_counted_one_by_one(documents: list[list[Part]]) -> None:
    lengths, spans = laid_out(documents)
    expected = [place for document in documents for place in counted(document)[0]]
    np.testing.assert_array_equal(grid_positions((*lengths, 3), spans)[:, :-3].T, expected)
    assert grid_positions((*lengths, 3), spans)[:, -3:].tolist() == [[0, 1, 2]] * 2, "padding"
    following = [counted(document)[1] for document in documents]
    assert following_positions(lengths, spans).tolist() == following


def test_text_turns_bit_for_bit_as_in_one_dimension() -> None:
    along = torch.arange(3_000)
    for one, two in zip(rotary(along, 12, 1e4), rotary(along.expand(2, -1), 12, 1e4), strict=True):
        assert torch.equal(one, two)


@given(seed=st.integers(0, 1_000), size=st.sampled_from([4, 8, 12, 64]), theta=st.sampled_from([100.0, 1e4]))
def test_pairs_turn_by_row_and_column_in_turn(seed: int, size: int, theta: float) -> None:
    positions = np.random.default_rng(seed).integers(0, 500, (2, 9))
    cos, sin = rotary(torch.from_numpy(positions), size, theta)
    assert cos.dtype == torch.float32
    assert cos.shape == (9, 1, size)
    for pair in range(size // 2):
        angle = positions[pair % 2].astype(np.float64) * theta ** (-2 * pair / size)
        for place in (pair, pair + size // 2):
            np.testing.assert_allclose(cos[:, 0, place], np.cos(angle), atol=1e-4)
            np.testing.assert_allclose(sin[:, 0, place], np.sin(angle), atol=1e-4)


@pytest.fixture(scope="module")
def turned(decoder: Decoder) -> Decoder:
    """The same weights with rows and columns."""
    made = Decoder(replace(decoder.config, rotary="2d"))
    made.load_state_dict(decoder.state_dict())
    return made.eval()


@pytest.fixture(scope="module")
def documents(make_png: Callable[..., bytes]) -> list[Document]:
    segments = [
        (Text("What is it? 4072", loss=True),),
        (Text("4072", loss=True), Image(make_png(13, 9, seed=1)), Text("19 8 3", loss=True)),
        (Image(make_png(4, 30, seed=2)), Image(make_png(17, 5, seed=3)), Text("a red square", loss=True)),
    ]
    return [Document(str(number), parts) for number, parts in enumerate(segments)]


@torch.no_grad()
def test_what_stands_before_every_image_is_read_as_in_one_dimension(
    decoder: Decoder, turned: Decoder, builder: SequenceBuilder, documents: list[Document]
) -> None:
    for document in documents:
        batch = pack_row([builder.build(document)])
        one, two = decoder.logits(batch), turned.logits(batch)
        first = min((span.start for span in batch.images), default=len(one))
        assert torch.equal(one[:first], two[:first])
        last = max((span.stop for span in batch.images), default=len(one))
        assert ((one[last:] - two[last:]).abs().amax(dim=1) > 1e-3).all()


@torch.no_grad()
def test_a_packed_row_is_each_document_alone(
    turned: Decoder, builder: SequenceBuilder, documents: list[Document]
) -> None:
    sequences = [builder.build(document) for document in documents]
    together = turned.logits(pack_row(sequences, 120))
    alone = torch.cat([turned.logits(pack_row([sequence])) for sequence in sequences])
    torch.testing.assert_close(together[: len(alone)], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"head_size": 6}, "'2d' and decoder.head_size is 6, .* make it a multiple of 4, or leave rotary at '1d'"),
        (
            {"head_size": 12, "dialect": "fuyu", "kv_heads": 4},
            "'2d' and decoder.head_size is 12, .* make it a multiple of 8, or leave rotary at '1d'",
        ),
        ({"connector": MeanConfig()}, "'2d', but the connector MeanConfig .* leave it at '1d', or take another"),
    ],
)
def test_what_has_no_rows_and_columns_is_refused(config: FuyuConfig, settings: dict, said: str) -> None:
    replace(config, **settings)
    with pytest.raises(UserError, match=said):
        replace(config, **settings, rotary="2d")


def test_what_knows_no_rows_and_columns_is_no_export(turned: Decoder) -> None:
    with pytest.raises(UserError, match=r"decoder\.rotary '2d' can't be .* transformers'.* `--to fuyu-e2e`"):
        to_transformers(turned.state_dict(), turned.config)
    for export in (
        lambda: export_prefill(turned, tokens=20, patches=6, capacity=30),
        lambda: export_decode_step(turned, sequences=1, capacity=30),
    ):
        with pytest.raises(UserError, match=r"decoder\.rotary '2d' has no graph of fixed shapes.*`fuyu-e2e generate`"):
            export()


def test_settings_survive_as_primitives(config: FuyuConfig) -> None:
    whole = replace(config, rotary="2d")
    assert FuyuConfig.from_dict(whole.to_dict()) == whole
