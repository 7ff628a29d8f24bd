"""What is shown is what enters the model, for every kind of document."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from fuyu_e2e.document import Document, Image, Text
from fuyu_e2e.errors import UserError
from fuyu_e2e.inspection import GRID, NEWLINE, draw_patches, draw_sequence, show_tokens
from fuyu_e2e.sequence import SequenceBuilder


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


def test_the_grid_lies_around_patches_and_a_newline_ends_each_row() -> None:
    pixels = np.full((16, 24, 3), 200, np.uint8)
    drawn = np.asarray(draw_patches(pixels, 8))
    side = 8 * 16
    assert (drawn[0, : 3 * side] == GRID).all()
    assert (drawn[: 2 * side, side] == GRID).all()
    assert (drawn[side // 2, side // 2] == 200).all()
    for row in range(2):
        assert (drawn[row * side + side // 2, 3 * side + side // 4] == NEWLINE).all()
