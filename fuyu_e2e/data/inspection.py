"""Shows a sample as it enters the model: its tokens, and its images with their patch grid."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image as Pillow
from PIL import ImageDraw
from rich.text import Text as StyledText

from fuyu_e2e.data.sequence import TokenSequence
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UserError, writing

LONGEST_SIDE = 1_600
"""The largest side in pixels to which a drawn image is enlarged."""
MARGIN = 12
"""Pixels around and between drawn images."""
GRID, NEWLINE, GROUND = (255, 64, 64), (40, 90, 220), (255, 255, 255)
PADDED = ((225, 225, 225), (170, 170, 170))
"""Colours of the stripes over padding, which the model sees as black."""
STRIPE = 6
"""Width and height in pixels of the steps that stripes are made of."""


def show_tokens(sequence: TokenSequence, tokenizer: Tokenizer) -> StyledText:
    """Returns the sequence as text: a run of patches as one mark, tokens with loss in `[brackets]` and green.

    Each row of an image is one line, which its newline token ends.
    """
    shown = StyledText(f"{sequence.key}: {len(sequence)} tokens, {len(sequence.patches)} patches in ")
    shown.append(f"{len(sequence.images)} images, {int(sequence.loss.sum())} tokens with loss\n")
    run = 0
    for token, loss in zip(sequence.tokens.tolist(), sequence.loss.tolist(), strict=True):
        if token == tokenizer.patch_id:
            run += 1
            continue
        if run:
            shown.append(f"{tokenizer.piece(tokenizer.patch_id)}x{run} ", style="red")
            run = 0
        piece = tokenizer.piece(token)
        if token == tokenizer.newline_id:
            shown.append(f"{piece}\n", style="blue")
        elif loss:
            shown.append(f"[{piece}] ", style="bold green")
        else:
            shown.append(f"{piece} ", style="dim")
    return shown


def draw_patches(
    pixels: UInt8[np.ndarray, "H W 3"], patch_size: int, padding: tuple[int, int] = (0, 0)
) -> Pillow.Image:
    """Returns an enlarged image with a line around each patch, and a blue bar for the newline that ends each row.

    Stripes cover the rows at the bottom and the columns at the right that are padding.
    """
    height, width = pixels.shape[:2]
    scale = max(1, min(16, LONGEST_SIDE // max(height, width)))
    side = patch_size * scale
    picture = Pillow.fromarray(pixels).resize((width * scale, height * scale), Pillow.Resampling.NEAREST)
    real = ((width - padding[1]) * scale, (height - padding[0]) * scale)
    if real != picture.size:
        striped = _stripes(picture.size)
        striped.paste(picture.crop((0, 0, *real)))
        picture = striped
    drawn = Pillow.new("RGB", (picture.width + side // 2 + 1, picture.height + 1), GROUND)
    drawn.paste(picture)
    pen = ImageDraw.Draw(drawn)
    for x in range(0, picture.width + 1, side):
        pen.line([(x, 0), (x, picture.height)], fill=GRID)
    for y in range(0, picture.height + 1, side):
        pen.line([(0, y), (picture.width, y)], fill=GRID)
    for y in range(0, picture.height, side):
        pen.rectangle([picture.width + side // 8, y + side // 8, drawn.width - 2, y + side - side // 8], fill=NEWLINE)
    return drawn


def _stripes(size: tuple[int, int]) -> Pillow.Image:
    across, down = np.arange(size[0]) // STRIPE, np.arange(size[1]) // STRIPE
    return Pillow.fromarray(np.array(PADDED, np.uint8)[(down[:, None] + across) % 4 // 2])


def draw_sequence(sequence: TokenSequence, patch_size: int, path: Path) -> None:
    """Writes a PNG of all images of a sequence, one below another.

    Raises:
        UserError: The sequence has no image, or the file can't be written.
    """
    shown = zip(sequence.pictures, sequence.paddings, strict=True)
    drawn = [draw_patches(pixels, patch_size, padding) for pixels, padding in shown]
    if not drawn:
        raise UserError(f"{sequence.key} has no image to draw.")
    width = max(picture.width for picture in drawn) + 2 * MARGIN
    sheet = Pillow.new("RGB", (width, sum(picture.height + MARGIN for picture in drawn) + MARGIN), GROUND)
    top = MARGIN
    for picture in drawn:
        sheet.paste(picture, (MARGIN, top))
        top += picture.height + MARGIN
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, "PNG")
