"""Opens a user's files as rows: the source forms of `fuyu-e2e shards write`.

A source is a reader, for the container, and a kind, for the content of its rows:

folder    rows of files with one stem               captions (x.jpg and x.txt), or text (x.txt)
          rows of metadata files                    as in a table, with images from the folder
table     .csv, .tsv, .jsonl, .json, .parquet       captions (an image and a text column), chat ("conversations", as
                                                    LLaVA's, or another list of turns), interleaved ("segments", or
                                                    OBELICS' lists "images" and "texts"), or text ("text")

Any table can have any kind that its columns can express; the columns of the first row decide. An image is a path, an
image file's bytes, or both as {"bytes": …, "path": …}, which Hugging Face's datasets write. A source is read twice:
once to plan, and once, row by row, as planned. So a reader yields each row with its place (a byte offset, a row
number, or file names), by which another process finds the row again, and no row has to be kept.
"""

import logging
import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fuyu_e2e.data.shards.extensions import COMPRESSED
from fuyu_e2e.data.shards.formats import IMAGE_KEYS, are_turns
from fuyu_e2e.data.shards.image_folder import FILE_NAMES, ImageFolder
from fuyu_e2e.data.shards.kinds import (
    QUESTION_COLUMNS,
    Captions,
    Chats,
    Interleaved,
    Kind,
    Members,
    PairedLists,
    Pairs,
    TextFiles,
    Texts,
    encode_json,
    fits_question,
    is_exchange,
)
from fuyu_e2e.data.shards.readers import READERS, Folder, Parquet, Place, Reader, Row, Table, walk
from fuyu_e2e.data.shards.values import extension_of, listed, names_media
from fuyu_e2e.errors import UnusableSampleError, UserError

IMAGE_COLUMNS = ("image", "path", "filepath", "file", "image_path")
"""Names of image columns, in any case, if no column contains images rather than paths."""
TEXT_COLUMNS = ("caption", "text", "title")
"""Names of caption columns, in any case."""
FORMS = (
    "a folder of images with x.txt beside x.jpg, or with a metadata.csv, .jsonl or .parquet that has file_name, a "
    "folder of .txt files, or a .csv, .tsv, .jsonl, .json or .parquet "
    'with an image and a text column, with "conversations" (LLaVA\'s), with "segments", with "images" and "texts", or '
    'with "text"'
)
"""The forms of a source, for messages."""
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Metadata files of the images in their folder, as in Hugging Face's `imagefolder`."""
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Splits that Hugging Face's datasets derive from folder names."""
_log = logging.getLogger(__name__)
TELLING = 1000
"""Most rows searched for one that shows what a table's texts are."""


@dataclass(frozen=True)
class RowSource:
    """A reader and the kind of its rows."""

    reader: Reader
    kind: Kind
    question_columns: tuple[str, ...] = ()
    """Columns of `QUESTION_COLUMNS` that go into the samples' JSON."""

    def samples(self, places: Sequence[Any] | None = None) -> Iterator[tuple[Place, Callable[[], Members]]]:
        """Yields (place, maker of the members) of all rows, or of those at `places`.

        A maker raises UnusableSampleError if its row can't be used.
        """
        for place, make in self.reader.rows(places):
            yield place, partial(self._members, make)

    def _members(self, make: Callable[[], Row]) -> Members:
        row = make()
        return encode_json(self.kind.members(row), row, self.question_columns)


def open_source(
    path: Path, *, image_column: str | None = None, text_column: str | None = None, images: Path | None = None
) -> RowSource:
    """Opens a source; its name and its first row decide what it is.

    Args:
        path: A file or a folder.
        image_column: The image column, if its name is not in `IMAGE_COLUMNS`.
        text_column: The column of texts or turns, if its name is not in `TEXT_COLUMNS`.
        images: The folder of relative image paths; by default the folder of `path`.

    Raises:
        UserError: The source has none of the forms, or several, or contains no row.
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
    asked = _question_columns(row, path, kind)
    if isinstance(reader, Parquet):
        reader = replace(reader, columns=tuple(name for name in (*kind.columns, *asked) if name in row))
    return RowSource(reader, kind, asked)


def _metadata(path: Path) -> tuple[Table, ...]:
    """Returns the readers of the metadata files in and below a folder that name its images."""
    tables: list[Table] = []
    for folder, files in walk(path):
        there = [_reader(folder / name) for name in METADATA if name in files]
        here = [table for table in there if not _first_row(table, table.path).keys().isdisjoint(FILE_NAMES)]
        if len(here) > 1:
            names = " and ".join(table.path.name for table in here)
            raise UserError(f"{folder} has {names}: move the one or the other out of it.")
        tables += here
    return tuple(tables)


def _open_image_folder(
    path: Path, tables: tuple[Table, ...], image_column: str | None, text_column: str | None
) -> RowSource:
    first = tables[0].path
    folders = sorted({table.path.relative_to(path).parts[0] for table in tables})
    splits = {SPLITS[folder]: path / folder for folder in folders if folder in SPLITS}
    if len(splits) > 1:
        raise UserError(
            f"{path} holds the splits {', '.join(map(str, splits.values()))}, which would be mixed: write each with a "
            "command of its own."
        )
    reader = ImageFolder(path, tables)
    row = _first_row(reader, first)
    named = image_column or _only([name for name in FILE_NAMES if name in row], first, "--image-column")
    kind = _kind(row, first, reader.image_columns(row), named, text_column, path)
    for table in tables[1:]:
        others = _first_row(table, table.path)
        if lacking := [name for name in kind.columns if name in row and name not in others]:
            raise UserError(
                f"{table.path} has no column {lacking[0]!r}, as {first} has: name their columns alike, or write each "
                "folder with a command of its own."
            )
    return RowSource(reader, kind, _question_columns(row, first, kind))


def _question_columns(row: Row, path: Path, kind: Kind) -> tuple[str, ...]:
    """Returns the columns about questions that go into the samples' JSON: not those whose first value has another
    type, as all in a CSV have, which it says."""
    columns = []
    for name in sorted(QUESTION_COLUMNS.keys() - set(kind.columns)):
        if fits_question(name, row.get(name)):
            columns.append(name)
        else:
            takes = QUESTION_COLUMNS[name]
            _log.warning("%s: %r is not written into the shards: an evaluation takes %s.", path, name, takes)
    return tuple(columns)


def _open_folder(path: Path) -> RowSource:
    reader = Folder(path)
    extensions: set[str] = set()
    for _, make in reader.rows():
        extensions |= {extension_of(file) for file in make()["files"]}
        if "txt" in extensions and len(extensions) > 1:
            return RowSource(reader, Pairs())
    if "txt" not in extensions:
        held = "images, but no .txt beside them" if extensions else "neither images nor .txt files"
        if strange := next((path / name for name in METADATA if (path / name).is_file()), None):
            columns = ", ".join(map(repr, _first_row(_reader(strange), strange)))
            held += f", and {strange.name} has no column file_name (it has {columns})"
        elif tables := [
            folder / name for folder, files in walk(path) for name in files if extension_of(name) in READERS
        ]:
            raise UserError(f"The folder {path} holds {held}; it has tables: name one of them, as {tables[0]}.")
        raise UserError(f"The folder {path} holds {held}: name {FORMS}.")
    return RowSource(reader, TextFiles())


def _reader(path: Path) -> Table:
    extension = extension_of(path)
    if extension in READERS:
        return READERS[extension](path)
    if extension == "tar":
        raise UserError(
            f"{path} is a shard already, or holds files: unpack files with `tar xf {shlex.quote(str(path))}`."
        )
    if extension in ("gz", "tgz"):
        how = "tar xzf" if path.name.lower().endswith(COMPRESSED) else "gunzip"
        raise UserError(
            f"{path} is compressed: unpack it with `{how} {shlex.quote(str(path))}`, and name what was in it."
        )
    raise UserError(f"{path} has the extension of none of the forms: name {FORMS}.")


def _first_row(reader: Reader, path: Path) -> Row:
    """Returns the first row; if its `texts` are all null, the first row soon after that has a text, if there is
    one."""
    first: Row | None = None
    for number, (_, make) in enumerate(reader.rows()):
        try:
            row = make()
        except UnusableSampleError:
            continue  # counted when the rows are written
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
    """Returns the kind of a table's rows, by its first row and the columns that contain images."""
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
    known = (*IMAGE_COLUMNS, FILE_NAMES[0]) if names_media(row.get(FILE_NAMES[0])) else IMAGE_COLUMNS
    return _column(row, path, named, known, "--image-column")


def _column(row: Row, path: Path, named: str | None, known: Collection[str], option: str) -> str | None:
    """Returns the named column, else the only one with a known name, or None."""
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
    """Raises a UserError if a table taken for text seems to have images: an uncommon column name must not hide
    them."""
    for name, value in others.items():
        first = next(iter(listed(value)), None)
        if isinstance(first, bytes):
            raise UserError(
                f"{path} holds bytes in {name!r}: say --image-column {name} if they are images, else leave it out."
            )
        if names_media(first):
            raise UserError(
                f"{path} seems to name images in {name!r}: say so with --image-column {name}"
                + (", one image a row." if isinstance(value, list) else ".")
            )


def _holds_turns(value: Any) -> bool:
    return are_turns(value) or (isinstance(value, list) and bool(value) and all(map(is_exchange, value)))
