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
RIGHT, WRONG, INK, GROUND = (0, 120, 40), (200, 0, 0), (40, 40, 40), (255, 255, 255)


@dataclass(frozen=True)
class Cell:
    """One picture, its truth and what a model read."""

    pixels: UInt8[np.ndarray, "H W 3"]
    truth: str
    reading: str


def contact_sheet(cells: Sequence[Cell], path: Path) -> None:
    """Writes a PNG: each picture enlarged by whole factors, its truth and its reading below, wrong ones in red."""
    rows = -(-len(cells) // COLUMNS)
    sheet = Pillow.new("RGB", (COLUMNS * CELL[0], TITLE + rows * CELL[1]), GROUND)
    pen = ImageDraw.Draw(sheet)
    right = sum(cell.truth == cell.reading for cell in cells)
    pen.text((12, 10), f"{right} of {len(cells)} read right", fill=INK, font=ImageFont.load_default(22))
    for number, cell in enumerate(cells):
        row, column = divmod(number, COLUMNS)
        _draw_cell(sheet, pen, cell, column * CELL[0], TITLE + row * CELL[1])
    sheet.save(path)


def _draw_cell(sheet: Pillow.Image, pen: ImageDraw.ImageDraw, cell: Cell, left: int, top: int) -> None:
    picture = Pillow.fromarray(cell.pixels)
    scale = min(PICTURE[0] // picture.width, PICTURE[1] // picture.height, 3)
    if scale:
        picture = picture.resize((picture.width * scale, picture.height * scale), Pillow.Resampling.NEAREST)
    else:
        picture.thumbnail(PICTURE)
    sheet.paste(picture, (left + (CELL[0] - picture.width) // 2, top + (PICTURE[1] - picture.height) // 2))
    font = ImageFont.load_default(20)
    pen.text((left + 12, top + PICTURE[1] + 4), f"truth {cell.truth}", fill=INK, font=font)
    colour = RIGHT if cell.truth == cell.reading else WRONG
    pen.text((left + 12, top + PICTURE[1] + 28), f"read  {cell.reading}", fill=colour, font=font)
