"""A person can check the sheet: every picture is on it, right readings green and wrong ones red."""

from pathlib import Path

import numpy as np
from PIL import Image as Pillow

from fuyu_e2e.eval.contact_sheet import COLUMNS, RIGHT, WRONG, Cell, contact_sheet


def colours(path: Path) -> set[tuple[int, ...]]:
    return set(map(tuple, np.asarray(Pillow.open(path).convert("RGB")).reshape(-1, 3).tolist()))


def test_pictures_of_any_size_stand_on_the_sheet_with_their_readings(tmp_path: Path) -> None:
    shapes = [(1, 1), (16, 128), (64, 16), (700, 900), (64, 128), (8, 8), (30, 30)]
    pens = [(10 * i + 5, 200, 77) for i in range(len(shapes))]
    cells = [Cell(np.full((*shape, 3), pen, np.uint8), "12", "12") for shape, pen in zip(shapes, pens, strict=True)]
    contact_sheet(cells, tmp_path / "right.png")
    assert {*pens, RIGHT} <= colours(tmp_path / "right.png")
    assert WRONG not in colours(tmp_path / "right.png")
    contact_sheet([*cells, Cell(cells[0].pixels, "12", "21")], tmp_path / "wrong.png")
    assert WRONG in colours(tmp_path / "wrong.png")
    one_row, two_rows = (Pillow.open(tmp_path / name) for name in ("right.png", "wrong.png"))
    assert one_row.size == two_rows.size, f"{len(cells)} and {len(cells) + 1} cells take two rows of {COLUMNS}"
