"""Contact sheets: pictures with their true texts and the model's readings, for a person to check."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

CELL = (272, 236)
"""Width and height of a cell in pixels, including its text."""
PICTURE = (256, 176)
"""Width and height in pixels of the room for its picture."""
COLUMNS = 6
TITLE = 44
QUESTION = 24
"""Height in pixels of the line with the question, on sheets with questions."""
MARGIN = 12
RIGHT, WRONG, INK, GROUND = (0, 120, 40), (200, 0, 0), (40, 40, 40), (255, 255, 255)


@dataclass(frozen=True)
class Cell:
    """One picture with its truth and a model's reading."""

    pixels: UInt8[np.ndarray, "H W 3"]
    truth: str
    reading: str
    question: str = ""
    """The question about it."""
    right: bool | None = None
    """Whether the reading counts as right; None compares it with the truth letter for letter."""

    @property
    def is_right(self) -> bool:
        """Whether the reading counts as right."""
        return self.truth == self.reading if self.right is None else self.right


def contact_sheet(cells: Sequence[Cell], path: Path) -> None:
    """Writes the sheet of `draw_sheet` as a PNG."""
    draw_sheet(cells).save(path)


def draw_sheet(cells: Sequence[Cell]) -> Pillow.Image:
    """Returns a sheet of pictures enlarged by whole factors, with truth and reading below, wrong ones in red.

    Questions, if there are any, are above the truth. Texts are cut to the width of a cell.
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
    """Returns a text as one line, cut to the width of a cell."""
    line = " ".join(text[: CELL[0]].splitlines())
    while font.getlength(line) > CELL[0] - 2 * MARGIN:
        line = f"{line.removesuffix('…')[:-1]}…"
    return line
