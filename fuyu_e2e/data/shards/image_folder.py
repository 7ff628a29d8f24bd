"""Reads a folder of images described by tables: Hugging Face's `imagefolder`."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from fuyu_e2e.data.shards.extensions import IMAGES, is_media
from fuyu_e2e.data.shards.readers import Folder, Place, Reader, Row, Table
from fuyu_e2e.data.shards.values import REMOTE, extension_of, listed, not_read
from fuyu_e2e.errors import UnusableSampleError, UserError

FILE_NAMES = ("file_name", "file_names")
"""Image columns of a metadata file, with paths relative to the file's folder."""


@dataclass(frozen=True)
class ImageFolder(Reader):
    """The rows of the metadata files below a folder, then an unusable row for each image that no file lists."""

    root: Path
    tables: tuple[Table, ...]

    def rows(self, places: Sequence[Any] | None = None) -> Iterator[tuple[Place, Callable[[], Row]]]:
        """Yields the rows of the tables, with `file_name` and `file_names` relative to the folder.

        Raises:
            UserError: A table can't be read, or an image also has a .txt next to it.
        """
        yield from self._all() if places is None else self._at(places)

    def file(self, place: Place) -> str:
        """Returns the table of a row, or for an unlisted image its path relative to the folder."""
        table = self._table(place)
        return self._unlisted(place) if table is None else self.tables[table].file(place)

    def row_number(self, place: Place, number: int) -> int:
        """Returns the row's number in its table."""
        assert isinstance(place, bytes)
        return number if self._table(place) is None else int(place.split()[1])

    def _all(self) -> Iterator[tuple[Place, Callable[[], Row]]]:
        named: set[str] = set()
        for number, table in enumerate(self.tables):
            for line, (place, make) in enumerate(table.rows()):
                here = " ".join(map(str, (number, line, place))).encode()
                try:
                    row = self._row(table, make)
                except UnusableSampleError:
                    yield here, partial(self._row, table, make)
                    continue
                named.update(name for key in FILE_NAMES for name in listed(row.get(key)) if isinstance(name, str))
                yield here, partial(dict, row)
        for _, make in Folder(self.root).rows():
            files = [file.relative_to(self.root) for file in make()["files"]]
            images = [file for file in files if is_media(extension_of(file))]
            if 0 < len(images) < len(files):
                texts = [file for file in files if file not in images]
                both = f"{self.tables[0].path} and in {self.root / texts[0]}"
                raise UserError(f"{self.root} has captions in {both}: move the one or the other out of it.")
            for image in images:
                if str(image) not in named:
                    yield b"/" + os.fsencode(image), partial(self._refuse, str(image))

    def _at(self, places: Sequence[Any]) -> Iterator[tuple[Place, Callable[[], Row]]]:
        for number, group in groupby(places, self._table):
            here = list(group)
            if number is None:
                yield from ((place, partial(self._refuse, self._unlisted(place))) for place in here)
                continue
            table = self.tables[number]
            within = table.rows([int(place.split()[2]) for place in here])
            yield from (
                (place, partial(self._row, table, make)) for place, (_, make) in zip(here, within, strict=False)
            )

    def _row(self, table: Table, make: Callable[[], Row]) -> Row:
        row, below = make(), table.path.parent.relative_to(self.root)
        return row | {name: _below(below, row[name]) for name in FILE_NAMES if name in row}

    def _refuse(self, image: str) -> Row:
        if extension_of(image) not in IMAGES:
            raise not_read(image)
        raise UnusableSampleError("caption-missing", f"{image} is in no {self.tables[0].path.name}")

    @staticmethod
    def _table(place: Place) -> int | None:
        """Returns the number of a place's table; None for an unlisted image."""
        assert isinstance(place, bytes)
        return None if place.startswith(b"/") else int(place.split()[0])

    @staticmethod
    def _unlisted(place: Place) -> str:
        assert isinstance(place, bytes)
        return os.fsdecode(place[1:])


def _below(folder: Path, value: Any) -> Any:
    """Returns a path, or a list of them, that is relative to `folder`, joined to it; other values as they are."""
    if isinstance(value, list):
        return [_below(folder, each) for each in value]
    return os.path.normpath(folder / value) if isinstance(value, str) and value and not REMOTE.match(value) else value
