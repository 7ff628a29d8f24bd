"""From a user's own files to rows: the source forms of `fuyu-e2e shards write`.

A source is a reader, which knows the container, and a kind, which knows what one of its rows says:

folder    rows of files with one stem               captions (x.jpg and x.txt), or text (x.txt)
          rows of metadata files                    those of a table, whose images are files of the folder
table     .csv, .tsv, .jsonl, .json, .parquet       captions (an image and a text column), chat ("conversations", as
                                                    LLaVA's, or another list of turns), interleaved ("segments", or
                                                    OBELICS' lists "images" and "texts"), or text ("text")

Any table can hold any kind that its columns can express; the kind is told by the columns of the first row. An image is
a path, an image file's bytes, or both as {"bytes": …, "path": …}, which Hugging Face's datasets write. A source is
read twice: once to plan, and once, row by row, where the plan says. So a reader hands out each row with its place (a
byte offset, a row number, or file names), by which another process finds it again, and no row has to be kept.
"""

import csv
import json
import mmap
import os
import re
import shlex
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from fuyu_e2e.errors import UnusableSampleError, UserError
from fuyu_e2e.shards.extensions import COMPRESSED, IMAGES, UNREAD, image_extension, is_media
from fuyu_e2e.shards.formats import IMAGE_KEYS, MEDIA_KEYS, PLACEHOLDER, TEXT_BYTES, are_turns

IMAGE_COLUMNS = ("image", "path", "filepath", "file", "image_path")
"""Columns taken for images, in any case, where none holds images that are no paths."""
TEXT_COLUMNS = ("caption", "text", "title")
"""Columns taken for captions, in any case."""
FORMS = (
    "a folder of images with x.txt beside x.jpg, or with a metadata.csv, .jsonl or .parquet that has file_name, a "
    "folder of .txt files, or a .csv, .tsv, .jsonl, .json or .parquet "
    'with an image and a text column, with "conversations" (LLaVA\'s), with "segments", with "images" and "texts", or '
    'with "text"'
)
"""What a source may be, for messages."""
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables of the images in their folder, as Hugging Face's `imagefolder` reads them."""
FILE_NAMES = ("file_name", "file_names")
"""Their columns of images: paths from the table's folder on."""
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""The splits that folders of these names are for Hugging Face's datasets."""
BATCH = 128
"""Rows of a Parquet file decoded at once: few, since each may hold images."""
TELLING = 1000
"""Rows looked at for one that tells what a table's texts are."""

_ELEMENT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},]', re.DOTALL)
"""What has to be seen of JSON to know where an element ends."""
_BLANK = re.compile(rb"\s*+")
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

Place = int | bytes
"""Where a row stands in its source, for its reader to find it again."""
Row = dict[str, Any]
Members = dict[str, bytes | Path]
"""The members of a sample by extension; a path stands for a file that goes in as it is."""


class Reader(ABC):
    """The rows of a file or folder."""

    @abstractmethod
    def rows(self, places: Sequence[Any] | None = None) -> Iterator[tuple[Place, Callable[[], Row]]]:
        """Places and makers of all rows, or of those at `places`, which are in stored order.

        A maker raises UnusableSampleError where its row is none.

        Raises:
            UserError: The source as a whole can't be read.
        """

    @abstractmethod
    def file(self, place: Place) -> str:
        """The file that the row at a place is of, for a person who looks for it."""

    def row_number(self, place: Place, number: int) -> int:
        """The number in its file of the row at a place, which has `number` in the source."""
        return number

    def image_columns(self, row: Row) -> tuple[str, ...]:
        """The columns that hold images themselves, not only their paths, as the first row tells."""
        return tuple(name for name, value in row.items() if any(map(_is_embedded, _listed(value))))


@dataclass(frozen=True)
class Folder(Reader):
    """Images, sound, films and texts below a folder, one stem a row; hidden and all other files are no rows.

    Links are followed, each folder once. What isn't read joins the row of a text that has nothing else, or is a row.
    """

    root: Path

    def rows(self, places: Sequence[Any] | None = None) -> Iterator[tuple[Place, Callable[[], Row]]]:
        """One row `{"files": paths}` for each stem, folder by folder, in the order of their names."""
        for place in self._places() if places is None else places:
            yield place, partial(self._row, place)

    def file(self, place: Place) -> str:
        """The image of the row, or its first file where it has none, from the folder on."""
        names = [os.fsdecode(name) for name in self._names(place)]
        return next((name for name in names if _extension(name) != "txt"), names[0])

    def _places(self) -> Iterator[bytes]:
        for folder, files in _walk(self.root):
            stems: dict[str, list[str]] = {}
            unread: dict[str, list[str]] = {}
            for name in files:
                if _extension(name) in (*IMAGES, "txt"):
                    stems.setdefault(Path(name).stem, []).append(name)
                elif _extension(name) in UNREAD:
                    unread.setdefault(Path(name).stem, []).append(name)
            below = folder.relative_to(self.root)
            for stem in sorted(stems.keys() | unread.keys()):
                names = stems.get(stem, [])
                if all(_extension(name) == "txt" for name in names):
                    names = names + unread.get(stem, [])
                yield b"\0".join(os.fsencode(below / name) for name in names)

    def _row(self, place: Place) -> Row:
        return {"files": [self.root / os.fsdecode(name) for name in self._names(place)]}

    def _names(self, place: Place) -> list[bytes]:
        assert isinstance(place, bytes)
        return place.split(b"\0")


@dataclass(frozen=True)
class ImageFolder(Reader):
    """The rows of the metadata files below a folder, then an unusable row for each image that stands in none."""

    root: Path
    tables: tuple[Path, ...]

    def rows(self, places: Sequence[Any] | None = None) -> Iterator[tuple[Place, Callable[[], Row]]]:
        """The rows of the tables; their `file_name` and `file_names` start from the folder.

        Raises:
            UserError: A table can't be read, or an image has a .txt beside it, too.
        """
        yield from self._all() if places is None else self._at(places)

    def file(self, place: Place) -> str:
        """The table of a row; an image in no table itself, from the folder on."""
        table = self._table(place)
        return self._unlisted(place) if table is None else str(self.tables[table])

    def row_number(self, place: Place, number: int) -> int:
        """The number in its table."""
        assert isinstance(place, bytes)
        return number if self._table(place) is None else int(place.split()[1])

    def _all(self) -> Iterator[tuple[Place, Callable[[], Row]]]:
        named: set[str] = set()
        for number, table in enumerate(self.tables):
            for line, (place, make) in enumerate(_reader(table).rows()):
                here = " ".join(map(str, (number, line, place))).encode()
                try:
                    row = self._row(table, make)
                except UnusableSampleError:
                    yield here, partial(self._row, table, make)
                    continue
                named.update(name for key in FILE_NAMES for name in _listed(row.get(key)) if isinstance(name, str))
                yield here, partial(dict, row)
        for _, make in Folder(self.root).rows():
            files = [file.relative_to(self.root) for file in make()["files"]]
            images = [file for file in files if is_media(_extension(file))]
            if 0 < len(images) < len(files):
                texts = [file for file in files if file not in images]
                raise UserError(
                    f"{self.root} has captions in {self.tables[0]} and in {self.root / texts[0]}: move the one or the "
                    "other out of it."
                )
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
            within = _reader(table).rows([int(place.split()[2]) for place in here])
            yield from (
                (place, partial(self._row, table, make)) for place, (_, make) in zip(here, within, strict=False)
            )

    def _row(self, table: Path, make: Callable[[], Row]) -> Row:
        row, below = make(), table.parent.relative_to(self.root)
        return row | {name: _below(below, row[name]) for name in FILE_NAMES if name in row}

    def _refuse(self, image: str) -> Row:
        if _extension(image) not in IMAGES:
            raise _not_read(image)
        raise UnusableSampleError("caption-missing", f"{image} stands in no {Path(self.tables[0]).name}")

    @staticmethod
    def _table(place: Place) -> int | None:
        """The number of the table that a place is in; None where it is an image in none."""
        assert isinstance(place, bytes)
        return None if place.startswith(b"/") else int(place.split()[0])

    @staticmethod
    def _unlisted(place: Place) -> str:
        assert isinstance(place, bytes)
        return os.fsdecode(place[1:])


@dataclass(frozen=True)
class Lines(Reader):
    """JSON Lines: one object a line, found again by its byte offset; blank lines are no rows."""

    path: Path

    def rows(self, places: Sequence[Any] | None = None) -> Iterator[tuple[Place, Callable[[], Row]]]:
        """One row for each line."""
        with _open(self.path) as file:
            for place in _offsets(file) if places is None else places:
                file.seek(place)
                if (line := _line(file)).strip():
                    yield place, partial(_object, line)

    def file(self, place: Place) -> str:
        """The file itself."""
        return str(self.path)


@dataclass(frozen=True)
class Elements(Reader):
    """A JSON list of objects, found again by their byte offsets, so that the list need never be in memory."""

    path: Path

    def rows(self, places: Sequence[Any] | None = None) -> Iterator[tuple[Place, Callable[[], Row]]]:
        """One row for each element; a list that breaks off ends with a row that is none.

        Raises:
            UserError: Something stands behind the list.
        """
        with _open(self.path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            for place in self._places(text) if places is None else places:
                end = _element_end(text, place)
                # One byte more than is read of any text shows that it is too long.
                yield place, partial(_object, text[place : min(end, place + TEXT_BYTES + 1)])

    def file(self, place: Place) -> str:
        """The file itself."""
        return str(self.path)

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
                f"{self.path} goes on behind its list, at byte {start}: write one list, or one object a line."
            )


@dataclass(frozen=True)
class Delimited(Reader):
    """CSV or TSV with a header, its records found again by their byte offsets; empty lines are no rows.

    A field may be quoted and hold line breaks (RFC 4180). A row that is none, as after a quote that nobody closes,
    ends with its first line, so that it costs no other row.
    """

    path: Path
    delimiter: str

    def rows(self, places: Sequence[Any] | None = None) -> Iterator[tuple[Place, Callable[[], Row]]]:
        """One row for each record behind the header."""
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

    def file(self, place: Place) -> str:
        """The file itself."""
        return str(self.path)

    def _record(self, file: BinaryIO, fields: int | None) -> list[str] | csv.Error | None:
        """The record at the file's position, expected to have `fields` fields."""
        start = file.tell()
        # Bytes that are not UTF-8 come back as they are, and are refused where the text is written.
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
class Parquet(Reader):
    """A Parquet file, its rows found again by their numbers; only the row groups that hold them are read."""

    path: Path
    columns: tuple[str, ...] | None = None
    """Those to read; all where None."""

    def rows(self, places: Sequence[Any] | None = None) -> Iterator[tuple[Place, Callable[[], Row]]]:
        """One row for each row.

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

    def file(self, place: Place) -> str:
        """The file itself."""
        return str(self.path)

    def _group(
        self, file: Any, group: int, start: int, wanted: Sequence[int]
    ) -> Iterator[tuple[Place, Callable[[], Row]]]:
        for batch in file.iter_batches(BATCH, row_groups=[group], columns=self.columns and list(self.columns)):
            for place in _between(wanted, start, start + batch.num_rows):
                yield place, partial(self._row, batch, place - start)
            start += batch.num_rows

    def image_columns(self, row: Row) -> tuple[str, ...]:
        """Those of the first row, and those whose type is that of images, though the first row may have none."""
        from pyarrow.parquet import read_schema

        typed = [field.name for field in read_schema(self.path) if _is_image_type(field.type)]
        told = (*super().image_columns(row), *typed)
        return tuple(name for name in row if name in told)

    def _row(self, batch: Any, index: int) -> Row:
        try:
            return {name: batch.column(name)[index].as_py() for name in batch.schema.names}
        except UnicodeDecodeError as error:
            raise UnusableSampleError("text-not-utf8", str(error)) from error
        except (ValueError, OverflowError) as error:  # a date that Python has none for, say
            raise UnusableSampleError("row-value", str(error)) from error


class Kind(ABC):
    """What the rows of a source say."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The columns it looks at."""

    @abstractmethod
    def members(self, row: Row) -> Members:
        """The members that say in a shard what a row says.

        Raises:
            UnusableSampleError: The row can't be put that way. What the members then say is not looked at.
        """


@dataclass(frozen=True)
class Pairs(Kind):
    """Captions in files beside their images."""

    @property
    def columns(self) -> tuple[str, ...]:
        """None: a folder has no columns."""
        return ()

    def members(self, row: Row) -> Members:
        """An image and its txt."""
        files: list[Path] = row["files"]
        texts = [path for path in files if _extension(path) == "txt"]
        images = [path for path in files if path not in texts]
        if images and _extension(images[0]) in UNREAD:
            raise _not_read(images[0])
        if not images:
            raise UnusableSampleError("image-missing", f"no image beside {texts[0]}")
        if not texts:
            raise UnusableSampleError("caption-missing", f"no .txt beside {images[0]}")
        if len(files) > 2:
            raise UnusableSampleError("caption-of-several-images", ", ".join(path.name for path in files))
        return {_extension(images[0]): images[0], "txt": texts[0]}


@dataclass(frozen=True)
class TextFiles(Kind):
    """Files of text."""

    @property
    def columns(self) -> tuple[str, ...]:
        """None: a folder has no columns."""
        return ()

    def members(self, row: Row) -> Members:
        """A txt."""
        return {"txt": row["files"][0]}


@dataclass(frozen=True)
class Captions(Kind):
    """An image and its caption in two columns."""

    image_column: str
    text_column: str
    images: Path
    """What relative paths start from."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The two."""
        return (self.image_column, self.text_column)

    def members(self, row: Row) -> Members:
        """An image and its txt."""
        shown = _listed(row.get(self.image_column))
        if len(shown) > 1:
            raise UnusableSampleError("caption-of-several-images", f"{len(shown)} in {self.image_column}")
        extension, content = _image(self.images, shown[0] if shown else None)
        return {extension: content, "txt": _text(row.get(self.text_column), self.text_column)}


@dataclass(frozen=True)
class Texts(Kind):
    """Text in a column."""

    text_column: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The one."""
        return (self.text_column,)

    def members(self, row: Row) -> Members:
        """A txt."""
        return {"txt": _text(row.get(self.text_column), self.text_column)}


@dataclass(frozen=True)
class Chats(Kind):
    """Conversations, as LLaVA's: a column of turns, and columns with an image, a list of images, or none."""

    images: Path
    """What relative paths start from."""
    turns_column: str = "conversations"
    image_columns: tuple[str, ...] = IMAGE_KEYS

    @property
    def columns(self) -> tuple[str, ...]:
        """The two kinds, and what LLaVA has beside them."""
        return ("id", *self.image_columns, *self._unread, self.turns_column)

    @property
    def _unread(self) -> tuple[str, ...]:
        return tuple(name for name in MEDIA_KEYS if name not in IMAGE_KEYS)

    def members(self, row: Row) -> Members:
        """The images in their order, and json with the conversation and the row's own id."""
        for name in self._unread:
            if row.get(name):
                raise UnusableSampleError("image-extension", f"{name} {str(row[name])[:80]!r} is not read")
        shown = [value for name in self.image_columns for value in _listed(row.get(name) or None)]
        found = [_image(self.images, value) for value in shown]
        members: Members = {_numbered(number, extension): data for number, (extension, data) in enumerate(found)}
        known_as = {} if row.get("id") is None else {"id": str(row["id"])}
        turns = _turns(row.get(self.turns_column), len(found))
        return {**members, "json": _json({**known_as, "conversations": turns})}


@dataclass(frozen=True)
class Interleaved(Kind):
    """Texts and images in any order: `segments`, each with a `text` (and a `loss`) or an `image`."""

    images: Path
    """What relative paths start from."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The one."""
        return ("segments",)

    def members(self, row: Row) -> Members:
        """The images, and json whose segments name them by their extensions."""
        segments = row.get("segments")
        members: Members = {}
        if isinstance(segments, list):
            # Columnar files fill the keys that a segment lacks with nulls.
            segments = [_without_nulls(segment) for segment in segments]
            for number, segment in enumerate(segments):
                if isinstance(segment, dict) and "image" in segment and "text" not in segment:
                    extension, content = _image(self.images, segment["image"])
                    name = _numbered(number, extension)
                    members[name] = content
                    segments[number] = {"image": name}
        return {**members, "json": _json({"segments": segments})}


@dataclass(frozen=True)
class PairedLists(Kind):
    """OBELICS' documents: lists `images` and `texts` of one length, of each pair of which one is null."""

    images: Path
    """What relative paths start from."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The two."""
        return ("images", "texts")

    def members(self, row: Row) -> Members:
        """The images, and json whose segments name them by their extensions."""
        images, texts = row.get("images"), row.get("texts")
        if not isinstance(images, list) or not isinstance(texts, list):
            raise UnusableSampleError("segments-list", "images and texts are not both lists")
        if len(images) != len(texts):
            raise UnusableSampleError("segments-list", f"{len(images)} images and {len(texts)} texts, nulls included")
        for number, (image, text) in enumerate(zip(images, texts, strict=True)):
            if _is_null(image) == (text is None):
                said = "neither an image nor a text" if text is None else "both an image and a text"
                raise UnusableSampleError("segments-kind", f"pair {number} has {said}")
        pairs = zip(images, texts, strict=True)
        segments = [{"image": image} if text is None else {"text": text} for image, text in pairs]
        return Interleaved(self.images).members({"segments": segments})


@dataclass(frozen=True)
class RowSource:
    """A reader and what its rows say."""

    reader: Reader
    kind: Kind

    def samples(self, places: Sequence[Any] | None = None) -> Iterator[tuple[Place, Callable[[], Members]]]:
        """Places of all rows, or of those at `places`, and makers of their members.

        A maker raises UnusableSampleError where its row can't be used.
        """
        for place, make in self.reader.rows(places):
            yield place, partial(self._members, make)

    def _members(self, make: Callable[[], Row]) -> Members:
        return self.kind.members(make())


def open_source(
    path: Path, *, image_column: str | None = None, text_column: str | None = None, images: Path | None = None
) -> RowSource:
    """Tells by its name and its first row what a source is.

    Args:
        path: A file or a folder.
        image_column: The column of images, where its name is none of `IMAGE_COLUMNS`.
        text_column: The column of texts or of turns, where its name is none of `TEXT_COLUMNS`.
        images: The folder that relative image paths start from; by default the one that `path` lies in.

    Raises:
        UserError: It is of none of the forms, of several, or holds no row.
    """
    if path.is_dir():
        tables = _metadata(path)
        if images or (not tables and (image_column or text_column)):
            raise UserError(f"{path} is a folder: --image-column, --text-column and --images are for tables only.")
        return _open_image_folder(path, tables, image_column, text_column) if tables else _open_folder(path)
    if not path.is_file():
        raise UserError(f"{path} is neither a file nor a folder: name {FORMS}.")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty: name {FORMS}.")
    reader = _reader(path)
    row = _first_row(reader, path)
    kind = _kind(row, path, reader.image_columns(row), image_column, text_column, images or path.parent)
    if isinstance(reader, Parquet):
        reader = replace(reader, columns=tuple(name for name in kind.columns if name in row))
    return RowSource(reader, kind)


def _metadata(path: Path) -> tuple[Path, ...]:
    """The metadata files in and below a folder that name its images."""
    tables: list[Path] = []
    for folder, files in _walk(path):
        here = [folder / name for name in METADATA if name in files]
        here = [table for table in here if not _first_row(_reader(table), table).keys().isdisjoint(FILE_NAMES)]
        if len(here) > 1:
            raise UserError(f"{folder} has {here[0].name} and {here[1].name}: move the one or the other out of it.")
        tables += here
    return tuple(tables)


def _open_image_folder(
    path: Path, tables: tuple[Path, ...], image_column: str | None, text_column: str | None
) -> RowSource:
    folders = sorted({table.relative_to(path).parts[0] for table in tables})
    splits = {SPLITS[folder]: path / folder for folder in folders if folder in SPLITS}
    if len(splits) > 1:
        raise UserError(
            f"{path} holds the splits {', '.join(map(str, splits.values()))}, which would be mixed: write each with a "
            "command of its own."
        )
    reader = ImageFolder(path, tables)
    row = _first_row(reader, tables[0])
    named = image_column or _only([name for name in FILE_NAMES if name in row], tables[0], "--image-column")
    kind = _kind(row, tables[0], reader.image_columns(row), named, text_column, path)
    for table in tables[1:]:
        others = _first_row(_reader(table), table)
        if lacking := [name for name in kind.columns if name in row and name not in others]:
            raise UserError(
                f"{table} has no column {lacking[0]!r}, as {tables[0]} has: name their columns alike, or write each "
                "folder with a command of its own."
            )
    return RowSource(reader, kind)


def _open_folder(path: Path) -> RowSource:
    reader = Folder(path)
    extensions: set[str] = set()
    for _, make in reader.rows():
        extensions |= {_extension(file) for file in make()["files"]}
        if "txt" in extensions and len(extensions) > 1:
            return RowSource(reader, Pairs())
    if "txt" not in extensions:
        held = "images, but no .txt beside them" if extensions else "neither images nor .txt files"
        if strange := next((path / name for name in METADATA if (path / name).is_file()), None):
            columns = ", ".join(map(repr, _first_row(_reader(strange), strange)))
            held += f", and {strange.name} has no column file_name (it has {columns})"
        raise UserError(f"The folder {path} holds {held}: name {FORMS}.")
    return RowSource(reader, TextFiles())


def _reader(path: Path) -> Reader:
    match path.suffix.lower():
        case ".csv":
            return Delimited(path, ",")
        case ".tsv":
            return Delimited(path, "\t")
        case ".parquet":
            return Parquet(path)
        case ".jsonl" | ".ndjson":
            return Lines(path)
        case ".json":
            with _open(path) as file:
                return Elements(path) if file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[" else Lines(path)
        case ".tar":
            raise UserError(
                f"{path} is a shard already, or holds files: unpack files with `tar xf {shlex.quote(str(path))}`."
            )
        case ".gz" | ".tgz":
            how = "tar xzf" if path.name.lower().endswith(COMPRESSED) else "gunzip"
            raise UserError(
                f"{path} is compressed: unpack it with `{how} {shlex.quote(str(path))}`, and name what was in it."
            )
    raise UserError(f"{path} has the extension of none of the forms: name {FORMS}.")


def _first_row(reader: Reader, path: Path) -> Row:
    """The first row; of one whose `texts` are all null, the first that shows what they are, if one soon does."""
    first: Row | None = None
    for number, (_, make) in enumerate(reader.rows()):
        try:
            row = make()
        except UnusableSampleError:
            continue  # counted with all others once the rows are written
        texts = row.get("texts")
        if not isinstance(texts, list) or any(text is not None for text in texts):
            return row
        first = row if first is None else first
        if number >= TELLING:
            break
    if first is None:
        raise UserError(f"{path} holds no row that can be read: name {FORMS}.")
    return first


def _kind(
    row: Row,
    path: Path,
    embedded: Sequence[str],
    image_column: str | None,
    text_column: str | None,
    images: Path,
) -> Kind:
    """What the rows of a table say, by its first one and the columns that hold images themselves."""
    turns = _turns_column(row, path, text_column)
    paired = turns != "texts" and all(isinstance(row.get(name), list) for name in ("images", "texts"))
    has = [name for name in (turns, "segments" if "segments" in row else None, "texts" if paired else None) if name]
    if len(has) > 1:
        raise UserError(f"The first row of {path} has both {' and '.join(has)}: keep one; a source is {FORMS}.")
    if turns:
        return Chats(images, turns, _chat_image_columns(row, path, embedded, image_column))
    if has:
        if image_column or text_column:
            raise UserError(f"{path} has {has[0]}: --image-column and --text-column are for other tables.")
        if others := [name for name in embedded if not (paired and name == "images")]:
            raise UserError(f"{path} holds images in {others[0]!r} beside its {has[0]}: leave one of the columns out.")
        return PairedLists(images) if paired else Interleaved(images)
    image = _image_column(row, path, embedded, image_column)
    if image is None:
        text = _column(row, path, text_column, ("text",), "--text-column")
        if text is not None:
            _check_text_only({name: value for name, value in row.items() if name != text}, path)
            return Texts(text)
    else:
        text = _column(row, path, text_column, TEXT_COLUMNS, "--text-column")
        if text is not None:
            return Captions(image, text, images)
    lacking = "no column known to hold images" if image is None else f"images ({image}), but no text column"
    raise UserError(
        f"{path} has {lacking} among {', '.join(map(repr, row)) or 'none'}: name it with --image-column or "
        f"--text-column, or take {FORMS}."
    )


def _turns_column(row: Row, path: Path, named: str | None) -> str | None:
    if "conversations" in row and named in (None, "conversations"):
        return "conversations"
    found = [name for name, value in row.items() if _holds_turns(value) and named in (None, name)]
    return _only(found, path, "--text-column")


def _chat_image_columns(row: Row, path: Path, embedded: Sequence[str], named: str | None) -> tuple[str, ...]:
    if named is None and set(embedded) <= set(IMAGE_KEYS):
        return IMAGE_KEYS
    found = [*embedded, *(name for name in IMAGE_KEYS if name in row and name not in embedded)]
    column = _named(row, path, named, "--image-column") or _only(found, path, "--image-column")
    return () if column is None else (column,)


def _image_column(row: Row, path: Path, embedded: Sequence[str], named: str | None) -> str | None:
    if named is None and embedded:
        return _only(embedded, path, "--image-column")
    known = (*IMAGE_COLUMNS, FILE_NAMES[0]) if _names_media(row.get(FILE_NAMES[0])) else IMAGE_COLUMNS
    return _column(row, path, named, known, "--image-column")


def _column(row: Row, path: Path, named: str | None, known: Collection[str], option: str) -> str | None:
    """The column that was named, else the only one with a known name, if there is one."""
    return _named(row, path, named, option) or _only([name for name in row if name.lower() in known], path, option)


def _named(row: Row, path: Path, named: str | None, option: str) -> str | None:
    if named is not None and named not in row:
        raise UserError(f"{option} {named} is no column of {path}: it has {', '.join(map(repr, row))}.")
    return named


def _only(found: Sequence[str], path: Path, option: str) -> str | None:
    if len(found) > 1:
        raise UserError(f"{path} has several columns to choose from ({', '.join(found)}): name one with {option}.")
    return found[0] if found else None


def _check_text_only(others: Row, path: Path) -> None:
    """Captions whose image column has an uncommon name would else go for text without a word."""
    for name, value in others.items():
        first = next(iter(_listed(value)), None)
        if isinstance(first, bytes):
            raise UserError(
                f"{path} holds bytes in {name!r}: say --image-column {name} if they are images, else leave it out."
            )
        if _names_media(first):
            raise UserError(
                f"{path} seems to name images in {name!r}: say so with --image-column {name}"
                + (", one image a row." if isinstance(value, list) else ".")
            )


def _names_media(value: Any) -> bool:
    """Whether a value is the path of an image, sound or film; an address may be where a text is from."""
    return isinstance(value, str) and is_media(_extension(value)) and not _REMOTE.match(value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if _is_null(value) else [value]


def _is_null(value: Any) -> bool:
    """Whether a value is null, or an image of Hugging Face's datasets of which both parts are."""
    return value is None or value == {"bytes": None, "path": None}


def _is_embedded(value: Any) -> bool:
    """Whether a value is an image as Hugging Face's datasets store it, or the bytes of an image file."""
    if isinstance(value, dict):
        return value.keys() >= {"bytes", "path"}
    return isinstance(value, bytes) and image_extension(value) is not None


def _is_image_type(kind: Any) -> bool:
    """Whether an Arrow type is that of images as Hugging Face's datasets store them, or of lists of them."""
    from pyarrow import types

    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    return types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}


def _holds_turns(value: Any) -> bool:
    return are_turns(value) or (isinstance(value, list) and bool(value) and all(map(_is_exchange, value)))


def _is_exchange(value: Any) -> bool:
    """Whether a value is a turn of The Cauldron: what a user asks, and the answer."""
    return isinstance(value, dict) and value.keys() >= {"user", "assistant"}


def _turns(said: Any, images: int) -> Any:
    """Turns as a sample has them: those of The Cauldron, whose images come before all else, in LLaVA's form."""
    if not isinstance(said, list) or not said or not all(map(_is_exchange, said)):
        return said
    turns = [
        {"from": speaker, "value": exchange[key]}
        for exchange in said
        for speaker, key in (("human", "user"), ("gpt", "assistant"))
    ]
    if isinstance(turns[0]["value"], str) and not any(PLACEHOLDER in str(turn["value"]) for turn in turns):
        turns[0]["value"] = f"{PLACEHOLDER}\n" * images + turns[0]["value"]
    return turns


def _image(images: Path, value: Any) -> tuple[str, bytes | Path]:
    """The extension and the content of an image that a row holds, or names by its path."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes):
        if data and image_extension(data) is None:
            raise UnusableSampleError("image-unreadable", f"it begins with {data[:8]!r}: read are JPEG, PNG and WebP")
        return image_extension(data) or IMAGES[0], data
    path = _locate(images, value.get("path") if isinstance(value, dict) and data is None else value)
    return _extension(path), path


def _locate(images: Path, value: Any) -> Path:
    """The file that a row names: below `images`, or wherever an absolute path or `..` leads in a user's own table."""
    if value is None or value == "":
        raise UnusableSampleError("image-not-named")
    if not isinstance(value, str):
        raise UnusableSampleError("image-not-named", f"{type(value).__name__} where an image or a path is expected")
    if _REMOTE.match(value):
        raise UnusableSampleError(
            "image-remote",
            f"{value}: fetch it and name the file; img2dataset fetches images with captions, and writes shards",
        )
    path = images / value
    if _extension(path) not in IMAGES:
        raise _not_read(value)
    return path


def _not_read(image: Path | str) -> UnusableSampleError:
    return UnusableSampleError("image-extension", f"{image}: read are {', '.join(IMAGES)}")


def _extension(path: Path | str) -> str:
    return Path(path).suffix[1:].lower()


def _numbered(number: int, extension: str) -> str:
    """The extension of one image among several; readers put them in the order of their names."""
    return f"{number:05}.{extension}"


def _text(value: Any, name: str) -> bytes:
    if not isinstance(value, str | None):
        raise UnusableSampleError("text-type", f"{name} is {type(value).__name__}, not text")
    return _utf8(value or "")


def _json(value: Any) -> bytes:
    try:
        return _utf8(json.dumps(value, ensure_ascii=False))
    except TypeError as error:
        raise UnusableSampleError("text-type", str(error)) from error


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, or bytes of a CSV that were not UTF-8
        raise UnusableSampleError("text-not-utf8", str(error)) from error


def _without_nulls(segment: Any) -> Any:
    return {k: v for k, v in segment.items() if not _is_null(v)} if isinstance(segment, dict) else segment


def _object(data: bytes) -> Row:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    if len(data) > TEXT_BYTES:
        raise UnusableSampleError("text-too-long", f"a row of more than {TEXT_BYTES:,} bytes")
    try:
        parsed = json.loads(data.decode("utf-8-sig"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise UnusableSampleError("text-not-utf8", str(error)) from error
    except (ValueError, RecursionError) as error:
        raise UnusableSampleError("row-not-json", str(error)) from error
    if not isinstance(parsed, dict):
        raise UnusableSampleError("row-not-json", f"a {type(parsed).__name__} where an object is expected")
    return parsed


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and those below it, with the names of their files; what is hidden is left out.

    In the order of their names. Links are followed, each folder once.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"The folder {error.filename} can't be read: {error.strerror}.") from error

    seen: set[str] = set()
    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link into a folder above it has no end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(folder), sorted(name for name in files if not name.startswith("."))


def _below(folder: Path, value: Any) -> Any:
    """Paths, one or several, that start from a folder, as they start from where the folder's own path does."""
    if isinstance(value, list):
        return [_below(folder, each) for each in value]
    return os.path.normpath(folder / value) if isinstance(value, str) and value and not _REMOTE.match(value) else value


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from error


def _offsets(file: BinaryIO) -> Iterator[int]:
    """Offsets up to the end of a file; whoever takes one reads what stands there before taking the next."""
    place = -1
    while (here := file.tell()) != place:
        yield (place := here)


def _line(file: BinaryIO) -> bytes:
    """The next line, or as much of one as shows that it is longer than any text that is read."""
    line = rest = file.readline(TEXT_BYTES + 1)
    while len(rest) > TEXT_BYTES and not rest.endswith(b"\n"):
        rest = file.readline(TEXT_BYTES + 1)
    return line


def _element_end(text: mmap.mmap, start: int) -> int:
    """Where the list's element from `start` on ends: at a comma, at the list's end, or where the file breaks off."""
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
    """The places from `start` up to `stop`, of places in order."""
    return places[bisect_left(places, start) : bisect_left(places, stop)]
