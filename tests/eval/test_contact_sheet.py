"""A person can check the sheet: every picture is on it, right readings green and wrong ones red."""

from pathlib import Path

import numpy as np
from PIL import Image as Pillow

from fuyu_e2e.eval.contact_sheet import CELL, COLUMNS, GROUND, QUESTION, RIGHT, WRONG, Cell, contact_sheet, draw_sheet


def colours(path: Path) -> set[tuple[int, ...]]:
    image = Pillow.open(path).convert("RGB")
    found = image.getcolors(maxcolors=image.width * image.height)
    assert found is not None
    return {colour for _, colour in found if isinstance(colour, tuple)}


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


def test_a_question_stands_above_its_answer_and_no_text_leaves_its_cell() -> None:
    """What counts as right is said by whoever scored it, not by the letters alone."""
    pixels = np.full((20, 20, 3), 9, np.uint8)
    plain, asked, wordy = (
        np.asarray(draw_sheet([Cell(pixels, "Yes", "yes", question, right=True)]))
        for question in ("", "Is it red?", "Is it red?\n" + "or rather something else " * 20)
    )
    assert (plain == RIGHT).all(axis=-1).any()
    assert not (plain == WRONG).all(axis=-1).any()
    assert len(asked) == len(plain) + QUESTION
    assert (asked != wordy).any()
    assert (wordy[:, CELL[0] :] == plain[0, -1]).all(), "the next cell is empty"
    assert tuple(plain[0, -1]) == GROUND
