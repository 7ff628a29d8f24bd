"""Readers of a user's files, for `fuyu_e2e.data.shards.tables`: folders, and tables of several formats.

A reader yields each row with its place (a byte offset, a row number, or file names), by which another process finds
the row again, so that no row has to be kept.
"""

import csv
import mmap
import os
import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from fuyu_e2e.data.shards.extensions import IMAGES, UNREAD
from fuyu_e2e.data.shards.formats import TEXT_BYTES, parse_json
from fuyu_e2e.data.shards.values import extension_of, is_embedded, is_image_type, listed
from fuyu_e2e.errors import UnusableSampleError, UserError

BATCH = 128
"""Rows of a Parquet file decoded at once; few, since each may contain images."""
_ELEMENT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},]', re.DOTALL)
"""The parts of JSON that determine where an element ends."""
_BLANK = re.compile(rb"\s*+")
Place = int | bytes
"""The place of a row in its source, by which its reader finds it again."""
Row = dict[str, Any]


class Reader(ABC):
    """The rows of a file or folder."""

    @abstractmethod
    def rows(self, places: Sequence[Any] | None = None) -> Iterator[tuple[Place, Callable[[], Row]]]:
        """Yields (place, maker) of all rows, or of those at `places`, which are in stored order.

        A maker raises UnusableSampleError if its row is invalid.

        Raises:
            UserError: The whole source can't be read.
        """

    @abstractmethod
    def file(self, place: Place) -> str:
        """Returns the file of the row at a place, for a person who looks for it."""

    def row_number(self, place: Place, number: int) -> int:
        """Returns a row's number in its file, given its `number` in the source."""
        return number

    def image_columns(self, row: Row) -> tuple[str, ...]:
        """Returns the columns that contain images rather than paths, judging by the first row."""
        return tuple(name for name, value in row.items() if any(map(is_embedded, listed(value))))


@dataclass(frozen=True)
class Folder(Reader):
    """Images, sounds, films and texts below a folder, one row for each stem; ignores hidden and other files.

    Follows links, each folder once. Media that can't be read join the row of a text that has no other, or form a row.
    """

    root: Path

    def rows(self, places: Sequence[Any] | None = None) -> Iterator[tuple[Place, Callable[[], Row]]]:
        """Yields a row `{"files": paths}` for each stem, folder by folder, sorted by name."""
        for place in self._places() if places is None else places:
            yield place, partial(self._row, place)

    def file(self, place: Place) -> str:
        """Returns the row's image, or its first file if it has none, relative to the folder."""
        names = [os.fsdecode(name) for name in self._names(place)]
        return next((name for name in names if extension_of(name) != "txt"), names[0])

    def _places(self) -> Iterator[bytes]:
        for folder, files in walk(self.root):
            stems: dict[str, list[str]] = {}
            unread: dict[str, list[str]] = {}
            for name in files:
                if extension_of(name) in (*IMAGES, "txt"):
                    stems.setdefault(Path(name).stem, []).append(name)
                elif extension_of(name) in UNREAD:
                    unread.setdefault(Path(name).stem, []).append(name)
            below = folder.relative_to(self.root)
            for stem in sorted(stems.keys() | unread.keys()):
                names = stems.get(stem, [])
                if all(extension_of(name) == "txt" for name in names):
                    names = names + unread.get(stem, [])
                yield b"\0".join(os.fsencode(below / name) for name in names)

    def _row(self, place: Place) -> Row:
        return {"files": [self.root / os.fsdecode(name) for name in self._names(place)]}

    def _names(self, place: Place) -> list[bytes]:
        assert isinstance(place, bytes)
        return place.split(b"\0")


@dataclass(frozen=True)
class Table(Reader):
    """The rows of one file."""

    path: Path

    def file(self, place: Place) -> str:
        """Returns the path of the file."""
        return str(self.path)


@dataclass(frozen=True)
class Lines(Table):
    """JSON Lines: one object a line, found again by its byte offset; blank lines are not rows."""

    def rows(self, places: Sequence[Any] | None = None) -> Iterator[tuple[Place, Callable[[], Row]]]:
        """Yields a row for each line."""
        with _open(self.path) as file:
            for place in _offsets(file) if places is None else places:
                file.seek(place)
                if (line := _line(file)).strip():
                    yield place, partial(_object, line, place)


@dataclass(frozen=True)
class Elements(Table):
    """A JSON list of objects, found again by their byte offsets, so that the list is never in memory as a whole.

    json's `raw_decode` needs the whole text, and finds nothing after a broken element; pyarrow reads no lists.
    """

    def rows(self, places: Sequence[Any] | None = None) -> Iterator[tuple[Place, Callable[[], Row]]]:
        """Yields a row for each element; a truncated list ends with an invalid row.

        Raises:
            UserError: Something follows the list.
        """
        with _open(self.path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            for place in self._places(text) if places is None else places:
                end = _element_end(text, place)
                # Reads one byte more than the longest allowed text, to show that a row is too long.
                yield place, partial(_object, text[place : min(end, place + TEXT_BYTES + 1)], place)

    def _places(self, text: mmap.mmap) -> Iterator[int]:
        start = text.find(b"[") + 1
        while True:
            end = _element_end(text, start)
            broken_off = end == len(text)
            if broken_off or _blank_end(text, start) < end:
                yield start
            if broken_off:
                return
            start = end + 1
            if text[end] in b"]}":
                break
        if _blank_end(text, start) < len(text):
            raise UserError(
                f"{self.path} goes on after its list, at byte {start}: write one list, or one object a line."
            )


@dataclass(frozen=True)
class Delimited(Table):
    """CSV or TSV with a header; records are found again by their byte offsets; empty lines are not rows.

    A field may be quoted and contain line breaks (RFC 4180). An invalid row, for example after an unclosed quote, ends
    with its first line, so that it affects no other row.
    """

    delimiter: str

    def rows(self, places: Sequence[Any] | None = None) -> Iterator[tuple[Place, Callable[[], Row]]]:
        """Yields a row for each record after the header."""
        with _open(self.path) as file:
            header = self._record(file, None)
            if isinstance(header, csv.Error):
                raise UserError(f"The header of {self.path} is no line of a table: {header}.")
            names = [name.removeprefix("\ufeff") for name in header or []]
            for place in _offsets(file) if places is None else places:
                file.seek(place)
                record = self._record(file, len(names))
                if record:
                    yield place, partial(self._row, names, record)

    def _record(self, file: BinaryIO, fields: int | None) -> list[str] | csv.Error | None:
        """Returns the record at the file's position, which should have `fields` fields."""
        start = file.tell()
        # Bytes that are not UTF-8 are kept, and refused when the text is written.
        lines = iter(lambda: _line(file).decode("utf-8", "surrogateescape"), "")
        record: list[str] | csv.Error | None
        try:
            record = next(csv.reader(lines, delimiter=self.delimiter, strict=True), None)
        except csv.Error as error:
            record = error
        if isinstance(record, csv.Error) or (record and fields is not None and len(record) != fields):
            file.seek(start)
            _line(file)
        return record

    def _row(self, names: list[str], record: list[str] | csv.Error) -> Row:
        if isinstance(record, csv.Error):
            raise UnusableSampleError("row-not-csv", str(record))
        if len(record) != len(names):
            raise UnusableSampleError("row-columns", f"{len(record)} fields under a header of {len(names)}")
        return dict(zip(names, record, strict=True))


@dataclass(frozen=True)
class Parquet(Table):
    """A Parquet file; rows are found again by number, and only the row groups that contain them are read."""

    columns: tuple[str, ...] | None = None
    """The columns to read; None for all."""

    def rows(self, places: Sequence[Any] | None = None) -> Iterator[tuple[Place, Callable[[], Row]]]:
        """Yields a row for each row of the file.

        Raises:
            UserError: pyarrow is missing, or can't read the file.
        """
        try:
            import pyarrow as arrow
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise UserError(
                f"Reading {self.path} needs pyarrow: install it with pip install 'fuyu-e2e[parquet]'."
            ) from error
        try:
            with ParquetFile(self.path) as file:
                start = 0
                for group in range(file.num_row_groups):
                    stop = start + file.metadata.row_group(group).num_rows
                    wanted = range(start, stop) if places is None else _between(places, start, stop)
                    if wanted:
                        yield from self._group(file, group, start, wanted)
                    start = stop
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"{self.path} can't be read as Parquet: {str(error).splitlines()[0]}.") from error

    def _group(
        self, file: Any, group: int, start: int, wanted: Sequence[int]
    ) -> Iterator[tuple[Place, Callable[[], Row]]]:
        for batch in file.iter_batches(BATCH, row_groups=[group], columns=self.columns and list(self.columns)):
            for place in _between(wanted, start, start + batch.num_rows):
                yield place, partial(self._row, batch, place - start)
            start += batch.num_rows

    def image_columns(self, row: Row) -> tuple[str, ...]:
        """Returns the image columns of the first row, and columns of an image type that the first row may leave
        empty."""
        from pyarrow.parquet import read_schema

        typed = [field.name for field in read_schema(self.path) if is_image_type(field.type)]
        told = (*super().image_columns(row), *typed)
        return tuple(name for name in row if name in told)

    def _row(self, batch: Any, index: int) -> Row:
        try:
            return {name: batch.column(name)[index].as_py() for name in batch.schema.names}
        except UnicodeDecodeError as error:
            raise UnusableSampleError("text-not-utf8", str(error)) from error
        except (ValueError, OverflowError) as error:  # a date that Python has none for, say
            raise UnusableSampleError("row-value", str(error)) from error


def _json_reader(path: Path) -> Table:
    """Returns the reader for a .json file: of a list, or of one object a line."""
    with _open(path) as file:
        return Elements(path) if file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[" else Lines(path)


READERS: dict[str, Callable[[Path], Table]] = {
    "csv": partial(Delimited, delimiter=","),
    "tsv": partial(Delimited, delimiter="\t"),
    "parquet": Parquet,
    "jsonl": Lines,
    "ndjson": Lines,
    "json": _json_reader,
}
"""The reader of a table by its extension."""


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yields a folder and those below it, with the names of their files; omits hidden ones.

    Sorted by name. Follows links, each folder once.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"The folder {error.filename} can't be read: {error.strerror}.") from error

    seen: set[str] = set()
    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link to a parent folder would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(folder), sorted(name for name in files if not name.startswith("."))


def _object(data: bytes, place: int) -> Row:
    parsed = parse_json(data, f"byte {place}", "row-not-json")
    if not isinstance(parsed, dict):
        raise UnusableSampleError("row-not-json", f"a {type(parsed).__name__} where an object is expected")
    return parsed


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from error


def _offsets(file: BinaryIO) -> Iterator[int]:
    """Yields offsets until the end of a file; the caller must read the line at each before it takes the next."""
    place = -1
    while (here := file.tell()) != place:
        yield (place := here)


def _line(file: BinaryIO) -> bytes:
    """Returns the next line; if it is longer than any allowed text, only its beginning."""
    line = rest = file.readline(TEXT_BYTES + 1)
    while len(rest) > TEXT_BYTES and not rest.endswith(b"\n"):
        rest = file.readline(TEXT_BYTES + 1)
    return line


def _element_end(text: mmap.mmap, start: int) -> int:
    """Returns the end of the list element that starts at `start`: a comma, the list's end, or the file's end."""
    depth = 0
    for match in _ELEMENT.finditer(text, start):
        mark = text[match.start()]
        if mark in b"[{":
            depth += 1
        elif mark in b",]}" and depth == 0:
            return match.start()
        elif mark in b"]}":
            depth -= 1
    return len(text)


def _blank_end(text: mmap.mmap, start: int) -> int:
    match = _BLANK.match(text, start)
    assert match is not None
    return match.end()


def _between(places: Sequence[int], start: int, stop: int) -> Sequence[int]:
    """Returns the places from `start` up to `stop` among sorted places."""
    return places[bisect_left(places, start) : bisect_left(places, stop)]
