"""What rows of a user's files contain, for `data.shards.tables`: a kind turns each row into a sample's members."""

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuyu_e2e.data.shards.extensions import IMAGES, UNREAD, image_extension
from fuyu_e2e.data.shards.formats import IMAGE_KEYS, PLACEHOLDER, UNREAD_KEYS
from fuyu_e2e.data.shards.readers import Row
from fuyu_e2e.data.shards.values import REMOTE, extension_of, is_null, listed, not_read
from fuyu_e2e.errors import UnusableSampleError

Members = dict[str, bytes | Path]
"""The members of a sample by extension; a path is a file to be included as it is."""
Content = Mapping[str, bytes | Path | dict[str, Any]]
"""Members whose `json` is not encoded yet."""
QUESTION_COLUMNS = {"groups": "a JSON object of texts", "choices": "a JSON list of texts"}
"""Columns about a row as a question of an evaluation, with what it takes there."""


class Kind(ABC):
    """Interprets the rows of a source."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads; none of a folder."""
        return ()

    @abstractmethod
    def members(self, row: Row) -> Content:
        """Returns the members of a sample for a row.

        Raises:
            UnusableSampleError: The row can't be expressed as members. Their content is not checked.
        """


@dataclass(frozen=True)
class Pairs(Kind):
    """Images with captions in files next to them."""

    def members(self, row: Row) -> Content:
        """Returns an image and its txt."""
        files: list[Path] = row["files"]
        texts = [path for path in files if extension_of(path) == "txt"]
        images = [path for path in files if path not in texts]
        if images and extension_of(images[0]) in UNREAD:
            raise not_read(images[0])
        if not images:
            raise UnusableSampleError("image-missing", f"no image beside {texts[0]}")
        if not texts:
            raise UnusableSampleError("caption-missing", f"no .txt beside {images[0]}")
        if len(files) > 2:
            raise UnusableSampleError("caption-of-several-images", ", ".join(path.name for path in files))
        return {extension_of(images[0]): images[0], "txt": texts[0]}


@dataclass(frozen=True)
class TextFiles(Kind):
    """Files of text."""

    def members(self, row: Row) -> Content:
        """Returns a txt."""
        return {"txt": row["files"][0]}


@dataclass(frozen=True)
class Captions(Kind):
    """An image and its caption in two columns."""

    image_column: str
    text_column: str
    images: Path
    """The folder of relative paths."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The two columns that it reads."""
        return (self.image_column, self.text_column)

    def members(self, row: Row) -> Content:
        """Returns an image and its txt."""
        shown = listed(row.get(self.image_column))
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
        """The one column that it reads."""
        return (self.text_column,)

    def members(self, row: Row) -> Content:
        """Returns a txt."""
        return {"txt": _text(row.get(self.text_column), self.text_column)}


@dataclass(frozen=True)
class Chats(Kind):
    """Conversations in LLaVA's form: a column of turns, and columns with an image, a list of images, or none."""

    images: Path
    """The folder of relative paths."""
    turns_column: str = "conversations"
    image_columns: tuple[str, ...] = IMAGE_KEYS

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of turns and images, and LLaVA's further ones."""
        return ("id", *self.image_columns, *UNREAD_KEYS, self.turns_column)

    def members(self, row: Row) -> Content:
        """Returns the images in order, and a json with the conversation and the row's id."""
        for name in UNREAD_KEYS:
            if row.get(name):
                raise UnusableSampleError("image-extension", f"{name} {str(row[name])[:80]!r} is not read")
        shown = [value for name in self.image_columns for value in listed(row.get(name) or None)]
        found = [_image(self.images, value) for value in shown]
        members: Members = {_numbered(number, extension): data for number, (extension, data) in enumerate(found)}
        known_as = {} if row.get("id") is None else {"id": str(row["id"])}
        turns = _turns(row.get(self.turns_column), len(found))
        return {**members, "json": {**known_as, "conversations": turns}}


@dataclass(frozen=True)
class Interleaved(Kind):
    """Texts and images in any order: `segments`, each with a `text` (and a `loss`) or an `image`."""

    images: Path
    """The folder of relative paths."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The one column that it reads."""
        return ("segments",)

    def members(self, row: Row) -> Content:
        """Returns the images, and a json whose segments name them by extension."""
        segments = row.get("segments")
        members: Members = {}
        if isinstance(segments, list):
            # Columnar files fill missing keys of a segment with nulls.
            segments = [_without_nulls(segment) for segment in segments]
            for number, segment in enumerate(segments):
                if isinstance(segment, dict) and "image" in segment and "text" not in segment:
                    extension, content = _image(self.images, segment["image"])
                    name = _numbered(number, extension)
                    members[name] = content
                    segments[number] = {"image": name}
        return {**members, "json": {"segments": segments}}


@dataclass(frozen=True)
class PairedLists(Kind):
    """OBELICS' documents: lists `images` and `texts` of equal length; one of each pair is null."""

    images: Path
    """The folder of relative paths."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The two columns that it reads."""
        return ("images", "texts")

    def members(self, row: Row) -> Content:
        """Returns the images, and a json whose segments name them by extension."""
        images, texts = row.get("images"), row.get("texts")
        if not isinstance(images, list) or not isinstance(texts, list):
            raise UnusableSampleError("segments-list", "images and texts are not both lists")
        if len(images) != len(texts):
            raise UnusableSampleError("segments-list", f"{len(images)} images and {len(texts)} texts, nulls included")
        for number, (image, text) in enumerate(zip(images, texts, strict=True)):
            if is_null(image) == (text is None):
                said = "neither an image nor a text" if text is None else "both an image and a text"
                raise UnusableSampleError("segments-kind", f"pair {number} has {said}")
        pairs = zip(images, texts, strict=True)
        segments = [{"image": image} if text is None else {"text": text} for image, text in pairs]
        return Interleaved(self.images).members({"segments": segments})


def fits_question(name: str, value: Any) -> bool:
    """Returns whether a value is null or what an evaluation takes for a column of `QUESTION_COLUMNS`."""
    if value is None:
        return True
    if not isinstance(value, dict if name == "groups" else list):
        return False
    return all(isinstance(text, str) for text in (_without_nulls(value).values() if name == "groups" else value))


def encode_json(content: Content, row: Row, question_columns: Collection[str]) -> Members:
    """Returns the members with their `json` in bytes, to which it adds what an evaluation reads there.

    That is the row's `question_columns` and, where there is a json and an image, the row's `image` if it is a text:
    samples with the same text are about one image.

    Raises:
        UnusableSampleError: A column has a value of another type, or a value can't be written as JSON.
    """
    members: Members = {name: value for name, value in content.items() if not isinstance(value, dict)}
    described: dict[str, Any] = {}
    for name in question_columns:
        if not fits_question(name, value := row.get(name)):
            raise UnusableSampleError("json-type", f"{name} is {value!r:.80}, not {QUESTION_COLUMNS[name]}")
        if value := _without_nulls(value):
            described[name] = value
    described |= written if isinstance(written := content.get("json"), dict) else {}
    if not described:
        return members
    if isinstance(image := row.get("image"), str) and image and members.keys() - {"txt"}:
        described["image"] = image
    return {**members, "json": _json(described)}


def is_exchange(value: Any) -> bool:
    """Returns whether a value is a turn of The Cauldron: a user's question and the answer."""
    return isinstance(value, dict) and value.keys() >= {"user", "assistant"}


def _turns(said: Any, images: int) -> Any:
    """Returns the turns of a sample; those of The Cauldron, whose images come first, in LLaVA's form."""
    if not isinstance(said, list) or not said or not all(map(is_exchange, said)):
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
    """Returns the extension and content of an image that a row contains, or names by path."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes):
        if data and image_extension(data) is None:
            raise UnusableSampleError("image-unreadable", f"it begins with {data[:8]!r}: read are JPEG, PNG and WebP")
        return image_extension(data) or IMAGES[0], data
    path = _locate(images, value.get("path") if isinstance(value, dict) and data is None else value)
    return extension_of(path), path


def _locate(images: Path, value: Any) -> Path:
    """Returns the file that a row names, below `images` or, in a user's own table, by an absolute path or `..`."""
    if value is None or value == "":
        raise UnusableSampleError("image-not-named")
    if not isinstance(value, str):
        raise UnusableSampleError("image-not-named", f"{type(value).__name__} where an image or a path is expected")
    if REMOTE.match(value):
        raise UnusableSampleError(
            "image-remote",
            f"{value}: fetch it and name the file; img2dataset fetches images with captions, and writes shards",
        )
    path = images / value
    if extension_of(path) not in IMAGES:
        raise not_read(value)
    return path


def _numbered(number: int, extension: str) -> str:
    """Returns the extension of one image among several; readers sort by it."""
    return f"{number:05}.{extension}"


def _text(value: Any, name: str) -> bytes:
    if not isinstance(value, str | None):
        raise UnusableSampleError("text-type", f"{name} is {type(value).__name__}, not text")
    return _utf8(value or "")


def _json(value: dict[str, Any]) -> bytes:
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
    return {k: v for k, v in segment.items() if not is_null(v)} if isinstance(segment, dict) else segment
