"""What is shown is what enters the model, for every kind of document."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.image import PADDING, ImagePolicy
from fuyu_e2e.data.inspection import GRID, NEWLINE, PADDED, draw_patches, draw_sequence, show_tokens
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.errors import UserError


def test_tokens_are_shown_row_by_row_with_those_that_carry_loss_marked(
    builder: SequenceBuilder, make_png: Callable[..., bytes]
) -> None:
    document = Document("key", (Image(make_png(8, 12)), Text("1", loss=False), Text("2")))
    assert show_tokens(builder.build(document), builder.tokenizer).plain == (
        "key: 13 tokens, 6 patches in 1 images, 2 tokens with loss\n"
        "|SPEAKER|x3 |NEWLINE|\n|SPEAKER|x3 |NEWLINE|\n<s> 1 <0x04> [2] [</s>] "
    )


def test_every_kind_of_document_is_shown_and_drawn(
    builder: SequenceBuilder, random_document: Callable[[int], Document], tmp_path: Path
) -> None:
    for seed in range(10):
        sequence = builder.build(random_document(seed))
        shown = show_tokens(sequence, builder.tokenizer).plain
        assert shown.count("|NEWLINE|") == sum(span.rows for span in sequence.images)
        if sequence.images:
            draw_sequence(sequence, 4, tmp_path / f"{seed}.png")
            assert Pillow.open(tmp_path / f"{seed}.png").height > 4
        else:
            with pytest.raises(UserError, match="no image to draw"):
                draw_sequence(sequence, 4, tmp_path / "none.png")


@pytest.mark.parametrize(("height", "width"), [(13, 18), (16, 17), (9, 24)])
def test_padding_is_striped_and_no_other_pixel(
    builder: SequenceBuilder, encode_png: Callable[[np.ndarray], bytes], tmp_path: Path, height: int, width: int
) -> None:
    """Also beside pixels of the very colour that padding has."""
    builder = replace(builder, images=ImagePolicy(patch_size=8))
    image = Image(encode_png(np.full((height, width, 3), PADDING, np.uint8)))
    sequence = builder.build(Document("key", (image, Text("x"))))
    [padding], [padded] = sequence.paddings, sequence.pictures
    assert padding == (-height % 8, -width % 8)
    assert sequence.unpadded_pictures[0].shape == (height, width, 3)
    assert (padded == PADDING).all(), "what the model sees stays"
    drawn = np.asarray(draw_patches(padded, 8, padding))
    scale = 16
    for row in range(len(padded)):
        for column in range(padded.shape[1]):
            cell = drawn[row * scale + 1 : (row + 1) * scale, column * scale + 1 : (column + 1) * scale].reshape(-1, 3)
            colours = {tuple(colour) for colour in np.unique(cell, axis=0).tolist()}
            if row < height and column < width:
                assert colours == {(PADDING,) * 3}
            else:
                assert colours == set(PADDED)
    draw_sequence(sequence, 8, tmp_path / "new" / "drawn.png")
    sheet = np.asarray(Pillow.open(tmp_path / "new" / "drawn.png"))
    assert (sheet == PADDED[0]).all(axis=-1).any()


def test_a_picture_that_cannot_be_written_is_named(
    builder: SequenceBuilder, make_png: Callable[..., bytes], tmp_path: Path
) -> None:
    sequence = builder.build(Document("key", (Image(make_png(8, 12)), Text("x"))))
    with pytest.raises(UserError, match=rf"{tmp_path} can't be written \(Is a directory\)"):
        draw_sequence(sequence, 4, tmp_path)


def test_the_grid_lies_around_patches_and_a_newline_ends_each_row() -> None:
    pixels = np.full((16, 24, 3), 200, np.uint8)
    drawn = np.asarray(draw_patches(pixels, 8))
    side = 8 * 16
    assert (drawn[0, : 3 * side] == GRID).all()
    assert (drawn[: 2 * side, side] == GRID).all()
    assert (drawn[side // 2, side // 2] == 200).all()
    for row in range(2):
        assert (drawn[row * side + side // 2, 3 * side + side // 4] == NEWLINE).all()
