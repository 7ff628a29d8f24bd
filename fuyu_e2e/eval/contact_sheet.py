"""A contact sheet: pictures with what stands in them and what was read, for a person to check."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

CELL = (272, 236)
"""Width and height of a cell in pixels, its text included."""
PICTURE = (256, 176)
"""Room for a picture in it."""
COLUMNS = 6
TITLE = 44
QUESTION = 24
"""Room for a line with the question, in pixels, on a sheet whose pictures are asked about."""
MARGIN = 12
RIGHT, WRONG, INK, GROUND = (0, 120, 40), (200, 0, 0), (40, 40, 40), (255, 255, 255)


@dataclass(frozen=True)
class Cell:
    """One picture, its truth and what a model read."""

    pixels: UInt8[np.ndarray, "H W 3"]
    truth: str
    reading: str
    question: str = ""
    """What was asked about it."""
    right: bool | None = None
    """Whether the reading counts as right; None where it has to be the truth letter for letter."""

    @property
    def is_right(self) -> bool:
        """Whether the reading counts as right."""
        return self.truth == self.reading if self.right is None else self.right


def contact_sheet(cells: Sequence[Cell], path: Path) -> None:
    """Writes what `draw_sheet` draws as a PNG."""
    draw_sheet(cells).save(path)


def draw_sheet(cells: Sequence[Cell]) -> Pillow.Image:
    """Returns each picture enlarged by whole factors, its truth and its reading below, wrong ones in red.

    Where there are questions, they stand above the truth. Texts are cut to the width of a cell.
    """
    rows = -(-len(cells) // COLUMNS)
    height = CELL[1] + (QUESTION if any(cell.question for cell in cells) else 0)
    sheet = Pillow.new("RGB", (COLUMNS * CELL[0], TITLE + rows * height), GROUND)
    pen = ImageDraw.Draw(sheet)
    right = sum(cell.is_right for cell in cells)
    pen.text((12, 10), f"{right} of {len(cells)} read right", fill=INK, font=ImageFont.load_default(22))
    for number, cell in enumerate(cells):
        row, column = divmod(number, COLUMNS)
        _draw_cell(sheet, pen, cell, column * CELL[0], TITLE + row * height)
    return sheet


def _draw_cell(sheet: Pillow.Image, pen: ImageDraw.ImageDraw, cell: Cell, left: int, top: int) -> None:
    picture = Pillow.fromarray(cell.pixels)
    scale = min(PICTURE[0] // picture.width, PICTURE[1] // picture.height, 3)
    if scale:
        picture = picture.resize((picture.width * scale, picture.height * scale), Pillow.Resampling.NEAREST)
    else:
        picture.thumbnail(PICTURE)
    sheet.paste(picture, (left + (CELL[0] - picture.width) // 2, top + (PICTURE[1] - picture.height) // 2))
    font = ImageFont.load_default(20)
    line = top + PICTURE[1] + 4
    if cell.question:
        pen.text((left + MARGIN, line), _fitting(cell.question, font), fill=INK, font=font)
        line += QUESTION
    pen.text((left + MARGIN, line), _fitting(f"truth {cell.truth}", font), fill=INK, font=font)
    colour = RIGHT if cell.is_right else WRONG
    pen.text((left + MARGIN, line + 24), _fitting(f"read  {cell.reading}", font), fill=colour, font=font)


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Returns a text as one line, as much of it as a cell is wide."""
    line = " ".join(text[: CELL[0]].splitlines())
    while font.getlength(line) > CELL[0] - 2 * MARGIN:
        line = f"{line.removesuffix('…')[:-1]}…"
    return line
