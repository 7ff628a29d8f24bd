"""The house: a room imports only from rooms below it, and only the command line imports late."""

import ast
from pathlib import Path

import pytest

import fuyu_e2e

FLOORS = [
    {"__main__"},
    {"cli", "__init__"},
    {"studies"},
    {"bench"},
    {"export", "tasks"},
    {"training"},
    {"eval"},
    {"inference"},
    {"checkpoint"},
    {"data"},
    {"model"},
    {"distributed"},
    {"errors", "version"},
]
"""Rooms from the top of the house to its ground."""
PACKAGE = Path(fuyu_e2e.__file__).parent


def floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def imports(path: Path) -> set[tuple[str, bool]]:
    """The rooms that a file imports from, and whether it does so at its top (for type checkers alone, too)."""
    tree = ast.parse(path.read_text())
    top = [*tree.body, *(inner for node in tree.body if isinstance(node, ast.If) for inner in node.body)]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fuyu_e2e":
            parts = (node.module or "").split(".")
            found.add((parts[1] if len(parts) > 1 else "__init__", node in top))
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rooms_below_it(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other, at_the_top in imports(path):
        assert at_the_top or room == "cli", f"{path.name} imports {other} inside a function"
        if other != room:
            assert floor(other) > floor(room), f"{room} imports {other}, which is no lower"


def test_the_model_knows_nothing_of_files_lightning_or_tokenizers() -> None:
    for path in (PACKAGE / "model").rglob("*.py"):
        source = path.read_text()
        assert "lightning" not in source
        assert "sentencepiece" not in source
        assert {other for other, _ in imports(path)} <= {"model", "errors"}


def test_data_knows_of_the_model_what_a_packed_batch_is() -> None:
    for path in (PACKAGE / "data").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fuyu_e2e.model"):
                assert node.module in ("fuyu_e2e.model.batch", "fuyu_e2e.model.image_layout"), path


def test_at_the_top_are_rooms_and_what_all_of_them_need() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", "distributed", "errors", "version"}
