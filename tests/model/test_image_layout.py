"""Layouts of images: views and tokens, from the builder to the packed batch."""

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image as Pillow

from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.image import load_views, to_patches
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.model.image_layout import (
    FUYU_LAYOUT,
    Grid,
    ImageLayout,
    ImagePolicy,
    ImageSpan,
    View,
    fit_policy,
    most_tokens,
)

MakePng = Callable[..., bytes]


class Thumbnail(ImageLayout):
    """The whole image on one patch, then its left half at full size; newlines after the latter's rows alone."""

    def views(self, width: int, height: int, policy: ImagePolicy) -> tuple[View, ...]:
        size = fit_policy(width, height, policy)
        thumbnail = View((policy.patch_size, policy.patch_size))
        return thumbnail, View(size, (0, 0, max(1, size[0] // 2), size[1]))

    def tokens(self, grids: tuple[Grid, ...]) -> np.ndarray:
        return np.concatenate([[False], super().tokens(grids[1:])])


class Resampled(ImageLayout):
    """Two embeddings for each image, however many patches it has, and a newline after them."""

    def tokens(self, grids: tuple[Grid, ...]) -> np.ndarray:
        return np.array([False, False, True])


class Unseen(ImageLayout):
    """No tokens at all: whatever reads the patches does so beside the sequence."""

    def tokens(self, grids: tuple[Grid, ...]) -> np.ndarray:
        return np.empty(0, bool)


def document(*images: bytes) -> Document:
    return Document("key", (Text("7"), *map(Image, images), Text("4072")))


@pytest.mark.parametrize("shape", [(1, 1), (9, 20), (17, 4)])
def test_a_span_of_a_grid_is_the_one_that_the_builder_lays_out(
    builder: SequenceBuilder, make_png: MakePng, shape: tuple[int, int]
) -> None:
    rows, cols = -(-shape[0] // 4), -(-shape[1] // 4)
    [span] = builder.build(document(make_png(*shape))).images
    assert span == ImageSpan.of_grid(span.start, rows, cols, (-shape[0] % 4, -shape[1] % 4))
    assert span.patches == span.places == rows * cols
    assert span.newline_positions.tolist() == [span.start + (row + 1) * (cols + 1) - 1 for row in range(rows)]
    positions = [span.start + row * (cols + 1) + col for row in range(rows) for col in range(cols)]
    assert span.patch_positions.tolist() == positions


def test_each_view_shows_its_part_of_the_image(make_png: MakePng) -> None:
    png, policy = make_png(12, 20), ImagePolicy(patch_size=4)
    pixels = np.asarray(Pillow.open(io.BytesIO(png)))
    thumbnail, half = load_views(png, policy, Thumbnail())
    assert (thumbnail.rows, thumbnail.cols) == (1, 1)
    assert abs(thumbnail.values.mean() - pixels.mean()) < 2
    assert (half.rows, half.cols, half.padding) == (3, 3, (0, 2))
    assert (half.values == to_patches(np.ascontiguousarray(pixels[:, :10]), 4).values).all()


def test_a_jpeg_is_decoded_as_large_as_its_largest_view_needs() -> None:
    """At an eighth for a thumbnail alone, and whole for a view of native size, bit for bit as without the other."""

    class Small(ImageLayout):
        def views(self, width: int, height: int, policy: ImagePolicy) -> tuple[View, ...]:
            return (View((width // 8, height // 8)),)

    class Both(Small):
        def views(self, width: int, height: int, policy: ImagePolicy) -> tuple[View, ...]:
            return (*super().views(width, height, policy), View((width, height)))

    file, policy = io.BytesIO(), ImagePolicy(patch_size=8, max_patches=10_000)
    noise = np.random.default_rng(0).integers(0, 256, (256, 512, 3), np.uint8)
    Pillow.fromarray(noise).save(file, "JPEG")
    reader = Pillow.open(io.BytesIO(file.getvalue()))
    reader.draft(None, (64, 32))
    assert reader.size == (64, 32)
    [small] = load_views(file.getvalue(), policy, Small())
    assert (small.values == to_patches(np.asarray(reader), 8).values).all()
    assert (load_views(file.getvalue(), policy, Both())[1].values == load_whole(file.getvalue(), policy)).all()


def load_whole(data: bytes, policy: ImagePolicy) -> np.ndarray:
    return load_views(data, policy, FUYU_LAYOUT)[0].values


def test_several_views_go_through_the_sequence_and_the_row(builder: SequenceBuilder, make_png: MakePng) -> None:
    ours = replace(builder, layout=Thumbnail())
    wide, tall = make_png(4, 16), make_png(9, 7)
    sequence = ours.build(document(wide, tall))
    pieces = [builder.tokenizer.piece(token) for token in sequence.tokens.tolist()]
    p, n = "|SPEAKER|", "|NEWLINE|"
    assert pieces == ["<s>", "7", p, p, p, n, p, *[p, n] * 3, "4", "0", "7", "2", "</s>"]
    first, second = sequence.images
    assert (first.start, first.grids, first.patches) == (2, ((1, 1), (1, 2)), 3)
    assert (second.start, second.grids, second.patches) == (6, ((1, 1), (3, 1)), 4)
    assert [picture.shape[:2] for picture in sequence.unpadded_pictures] == [(4, 4), (4, 8), (4, 4), (9, 3)]
    assert (sequence.pictures[1] == np.asarray(Pillow.open(io.BytesIO(wide)))[:, :8]).all()

    row = pack_row([builder.build(document()), sequence], 64)
    shift = row.document_lengths[0]
    assert row.images == (replace(first, start=shift + 2), replace(second, start=shift + 6))
    assert len(row.images) == 2
    assert (row.tokens[row.patch_positions] == builder.tokenizer.patch_id).all()
    assert (row.tokens[row.newline_positions] == builder.tokenizer.newline_id).all()
    assert (row.patch_positions.numpy() == sequence.patch_positions + shift).all()
    assert len(row.patches) == 7


@pytest.mark.parametrize(("layout", "tokens"), [(Resampled(), 3), (Unseen(), 0)])
def test_an_image_may_have_fewer_tokens_than_patches_or_none(
    builder: SequenceBuilder, make_png: MakePng, layout: ImageLayout, tokens: int
) -> None:
    plain = builder.build(document())
    sequence = replace(builder, layout=layout).build(document(make_png(8, 8), make_png(4, 12)))
    assert len(sequence) == len(plain) + 2 * tokens
    assert [span.start for span in sequence.images] == [2, 2 + tokens]
    assert [span.patches for span in sequence.images] == [4, 3]
    assert [picture.shape[:2] for picture in sequence.pictures] == [(8, 8), (4, 12)]
    row = pack_row([sequence, sequence], 64)
    assert len(row.patches) == 14
    assert len(row.patch_positions) == 4 * max(0, tokens - 1)
    assert [span.start for span in row.images] == [2, 2 + tokens, len(sequence) + 2, len(sequence) + 2 + tokens]


def test_a_cut_keeps_the_patches_of_all_views_of_the_images_that_stay(
    builder: SequenceBuilder, make_png: MakePng
) -> None:
    sequence = replace(builder, layout=Thumbnail()).build(document(make_png(4, 16), make_png(9, 7)))
    cut = sequence.cut(len(sequence) - 6)
    assert cut is not None
    assert len(cut) == cut.images[-1].stop == 6
    assert (cut.patches == sequence.patches[:3]).all()
    assert len(cut.pictures) == 2


def test_a_cut_counts_patches_not_tokens(builder: SequenceBuilder, make_png: MakePng) -> None:
    sequence = replace(builder, layout=Resampled()).build(document(make_png(8, 8), make_png(4, 12)))
    cut = sequence.cut(6)
    assert cut is not None
    assert (len(cut), len(cut.images)) == (5, 1)
    assert (cut.patches == sequence.patches[:4]).all()


def test_how_many_tokens_an_image_may_have_is_known_from_the_policy() -> None:
    assert most_tokens(FUYU_LAYOUT, ImagePolicy(patch_size=4, max_patches=80)) == 160, "of one column"
    assert most_tokens(FUYU_LAYOUT, ImagePolicy(patch_size=4, max_patches=80, max_aspect=1.0)) == 8 * 9
    sized = ImagePolicy(patch_size=4, max_patches=80, max_size=(16, 32), max_aspect=2.0)
    assert most_tokens(FUYU_LAYOUT, sized) == 4 * 8 + 4
    assert most_tokens(Resampled(), ImagePolicy(patch_size=4)) == 3
    assert most_tokens(Thumbnail(), ImagePolicy(patch_size=4, max_patches=64, max_aspect=1.0)) == 1 + 8 * 5
