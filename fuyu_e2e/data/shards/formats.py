"""Turns the members of a sample into documents. Extensions and, in JSON, keys tell the format.

caption       jpg|jpeg|jpe|jfif|png|webp + txt, or + json with a "caption": img2dataset writes both; txt is preferred
chat          json with "conversations" (LLaVA's), "messages" or a list of turns alone (as converters to
              Megatron-Energon write it), next to its images, or without any
interleaved   json with "segments": [{"text": …} | {"image": extension of a member}, …]
text          txt, or jsonl with one object a line that has a "text", "conversations" or "messages"

Text counts as a text only if it was meant without an image, never if the sample's image is missing or of a kind that
can't be read. Several images are in the order of the JSON's list `image` or `images` if that names the members, else
in the order of their names, with numbers in them compared as numbers.
"""

import json
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from fuyu_e2e.data.document import Document, Image, Segment, Text
from fuyu_e2e.data.shards.extensions import IMAGES, UNREAD, last_extension
from fuyu_e2e.errors import UnusableSampleError, UserError


@dataclass(frozen=True)
class Sample:
    """The members of one document by extension: the name after its first dot, in lower case.

    Each line of a `jsonl` member is a document: its key is `sample/line`, its only member `jsonl`.
    """

    key: str
    shard: str
    members: dict[str, bytes] = field(default_factory=dict)


SegmentReader = Callable[[dict[str, Any], dict[str, Image], Sample], tuple[Segment, ...]]
"""Makes the segments of a JSON object and the images beside it, by extension."""
TEXT_BYTES = 2**22
"""Bytes of text above which a document is skipped: 4 MiB, for which sentencepiece takes 60 times as much memory."""
PLACEHOLDER = "<image>"
"""Placeholder of an image in LLaVA's conversations."""
IMAGE_KEYS = ("image", "images")
"""JSON keys for the images that a text is about."""
UNREAD_PLACEHOLDERS = ("<video>", "<audio>")
"""Placeholders in LLaVA's conversations for media that can't be read."""
UNREAD_KEYS = ("video", "videos", "audio", "audios")
"""JSON keys for media that a text is about and that can't be read."""
TURN_KEYS = (("from", "value"), ("role", "content"))
"""JSON keys of a turn's speaker and text: LLaVA's, and those of chat templates."""
SPEAKERS = {"human": False, "user": False, "system": False, "gpt": True, "assistant": True}
"""Whether the text of a speaker carries loss."""


def document(sample: Sample) -> Document:
    """Returns the document of a sample.

    Raises:
        UnusableSampleError: The sample has no known format, or violates it.
        UserError: The reader of its format raises another error, or returns something else than segments.
    """
    members, where = sample.members, f"{sample.shard}: {sample.key}"
    if "jsonl" in members:
        return _from_line(sample.key, members["jsonl"], where)
    if unread := sorted(name for name in members if last_extension(name) in UNREAD):
        raise UnusableSampleError("image-extension", f"{where} has .{unread[0]}, but read are {', '.join(IMAGES)}")
    images = {name: Image(data) for name, data in members.items() if last_extension(name) in IMAGES}
    try:
        described = description(sample)
    except UnusableSampleError:
        if EXTENSIONS.keys().isdisjoint(members):
            raise
        described = {}  # a text needs no json
    if not images:
        _check_names_no_media(described, where)
    found = next(((key, reader) for key, reader in FORMATS.items() if key in described), None) or next(
        ((extension, reader) for extension, reader in EXTENSIONS.items() if extension in members), None
    )
    if found is not None:
        return Document(sample.key, _read(*found, described, images, sample))
    if "caption" in described:
        return Document(sample.key, _captioned(_string(described["caption"], "caption", where), images, where))
    raise UnusableSampleError("format-unknown", _only(sample, described, where))


def _read(
    name: str, reader: SegmentReader, described: dict[str, Any], images: dict[str, Image], sample: Sample
) -> tuple[Segment, ...]:
    """Returns the segments that the reader of a format makes of a sample; a mistake in the reader ends the run."""
    where = f"{sample.shard}: {sample.key}"
    if not images and name not in TEXT_ALONE:
        raise UnusableSampleError("image-missing", f"{where} has {name!r}, but no image")
    said = f"{where}: the reader of {name!r}"
    try:
        segments = reader(described, images, sample)
    except (UnusableSampleError, MemoryError):
        raise
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[:2][-1]  # the line of the reader, if it was called at all
        raise UserError(
            f"{said} raises {type(error).__name__}: {error} ({Path(at.filename).name}, line {at.lineno}): raise "
            "UnusableSampleError to skip a sample."
        ) from error
    if not isinstance(segments, tuple | list):
        raise UserError(f"{said} returns a {type(segments).__name__}, where a tuple of Text and Image is expected.")
    for place, segment in enumerate(segments):
        if not isinstance(segment, Text | Image):
            kind = type(segment).__name__
            raise UserError(f"{said} returns a {kind} at place {place}, where Text or Image is expected.")
    return tuple(segments)


def description(sample: Sample) -> dict[str, Any]:
    """Returns the JSON object of a sample, with its turns as `conversations`; empty if it has none.

    Raises:
        UnusableSampleError: The JSON is neither an object nor a list of turns.
    """
    return _described(sample.members["json"], f"{sample.shard}: {sample.key}") if "json" in sample.members else {}


def _described(data: bytes, where: str) -> dict[str, Any]:
    parsed = parse_json(data, where)
    if are_turns(parsed):
        return {"conversations": parsed}
    if not isinstance(parsed, dict):
        raise UnusableSampleError("json-invalid", f"{where}: a {type(parsed).__name__} where an object is expected")
    return {"conversations": parsed["messages"]} | parsed if are_turns(parsed.get("messages")) else parsed


def are_turns(value: Any) -> bool:
    """Returns whether a JSON value is a list of turns, with any speakers and contents."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and any(set(keys) <= turn.keys() for keys in TURN_KEYS) for turn in value)
    )


def _only(sample: Sample, described: dict[str, Any], where: str) -> str:
    """Returns a description of a sample of no known format: its members, its JSON keys, and advice about dots in
    names."""
    names = sorted(sample.members)
    if not names:
        return f"{where} has no members"
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")
    keys = f", whose json has only {', '.join(map(repr, list(described)[:8]))}" if described else ""
    said = f"{where} has only {shown}{keys}"
    usable = [name for name in names if (last := last_extension(name)) in IMAGES or is_text(last)]
    dotted = {name.rpartition(".")[0] for name in usable if "." in name}
    if not dotted:
        return said
    what = "a sample" if len(dotted) == 1 else f"{len(dotted):,} samples"
    why = f"a sample's name ends at its first dot, and {what} with dots in the name can't be used"
    return f"{said}: {why}; rename the files"


def _in_order(images: dict[str, Image], described: dict[str, Any], sample: Sample) -> list[Image]:
    """Returns the images in the order that the JSON lists, or sorted by name."""
    listed = next(filter(None, (_names(described.get(name)) for name in IMAGE_KEYS)), [])
    stem = PurePosixPath(sample.key).name.lower()
    members = {f"{stem}.{name}": image for name, image in images.items()} | images
    named = [members.get(PurePosixPath(name).name.lower()) for name in listed]
    if not any(named):  # the JSON has paths of the original data set
        return [images[name] for name in sorted(images, key=_numbers_as_numbers)]
    found = [image for image in named if image is not None]
    if len(found) < len(named) or len({id(image) for image in found}) < len(images):
        raise UnusableSampleError(
            "chat-images",
            f"{sample.shard}: {sample.key} lists {', '.join(listed)} but has {', '.join(sorted(images))}",
        )
    return found


def _numbers_as_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _names(value: Any) -> list[str]:
    """Returns the names in a JSON value, a text or a list of texts; an empty list for other values."""
    texts = [value] if isinstance(value, str) else value
    return texts if isinstance(texts, list) and all(isinstance(text, str) and text for text in texts) else []


def _check_names_no_media(described: dict[str, Any], where: str) -> None:
    for name in (*IMAGE_KEYS, *UNREAD_KEYS):
        if named := _names(described.get(name)):
            raise UnusableSampleError("image-missing", f"{where} names {named[0]} under {name!r}, but has no image")


def _from_line(key: str, line: bytes, where: str) -> Document:
    described = _described(line, where)
    _check_names_no_media(described, where)
    if "conversations" in described:
        return Document(key, _chat(described["conversations"], [], where))
    if "text" not in described:
        raise UnusableSampleError("format-unknown", f"{where} has neither text nor conversations")
    if not (text := _string(described["text"], "text", where)).strip():
        raise UnusableSampleError("text-empty", where)
    return Document(key, (Text(text),))


def _txt(described: dict[str, Any], images: dict[str, Image], sample: Sample) -> tuple[Segment, ...]:
    where = f"{sample.shard}: {sample.key}"
    return _captioned(_decode(sample.members["txt"], where), images, where)


def _captioned(text: str, images: dict[str, Image], where: str) -> tuple[Segment, ...]:
    if not (text := text.strip()):
        raise UnusableSampleError("caption-empty" if images else "text-empty", where)
    if len(images) > 1:
        raise UnusableSampleError("caption-of-several-images", f"{where}: {', '.join(images)}")
    return (*images.values(), Text(text))


def _conversation(described: dict[str, Any], images: dict[str, Image], sample: Sample) -> tuple[Segment, ...]:
    ordered = _in_order(images, described, sample)
    return _chat(described["conversations"], ordered, f"{sample.shard}: {sample.key}")


def _chat(turns: Any, images: list[Image], where: str) -> tuple[Segment, ...]:
    if not isinstance(turns, list) or not turns:
        raise UnusableSampleError("chat-turns", f"{where}: conversations is no list of turns")
    said: list[tuple[str, bool]] = []
    for turn in turns:
        given = turn if isinstance(turn, dict) else {}
        # A row of a columnar file has the keys of all rows, with nulls under those that are not its own.
        who, what = next((keys for keys in TURN_KEYS if given.get(keys[0]) is not None), TURN_KEYS[0])
        speaker = given.get(who)
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise UnusableSampleError("chat-speaker", f"{where}: {speaker!r} is none of {', '.join(SPEAKERS)}")
        said.append((_string(given.get(what), what, where), SPEAKERS[speaker]))
    if not any(loss for _, loss in said):
        raise UnusableSampleError("chat-no-answer", where)
    for unread in UNREAD_PLACEHOLDERS:
        if any(unread in value and not loss for value, loss in said):
            raise UnusableSampleError("image-extension", f"{where} asks about {unread}, which is not read")
    placeholders = sum(value.count(PLACEHOLDER) for value, _ in said)
    if placeholders != len(images) and (placeholders or len(images) > 1):
        raise UnusableSampleError("chat-images", f"{where}: {placeholders} placeholders, {len(images)} images")
    segments: list[Segment] = []
    remaining = iter(images)
    if not placeholders:
        segments.extend(remaining)  # without a placeholder, the whole conversation is about the image
    for value, loss in said:
        before, *after = value.split(PLACEHOLDER)
        pieces: list[Segment] = [Text(before.removesuffix("\n") if after else before, loss)]
        for number, text in enumerate(after):
            text = text.removeprefix("\n")
            last = number == len(after) - 1
            pieces += [next(remaining), Text(text if last else text.removesuffix("\n"), loss)]
        segments += [piece for piece in pieces if isinstance(piece, Image) or piece.text]
    return tuple(segments)


def _interleaved(described: dict[str, Any], images: dict[str, Image], sample: Sample) -> tuple[Segment, ...]:
    listed, where = described["segments"], f"{sample.shard}: {sample.key}"
    if not isinstance(listed, list) or not listed:
        raise UnusableSampleError("segments-list", f"{where}: segments is no list of segments")
    segments: list[Segment] = []
    for segment in listed:
        if not isinstance(segment, dict) or ("text" in segment) == ("image" in segment):
            raise UnusableSampleError("segments-kind", f"{where}: a segment is neither a text nor an image")
        if "text" in segment:
            loss = segment.get("loss", True)
            if not isinstance(loss, bool):
                raise UnusableSampleError("segments-loss", f"{where}: loss is {loss!r}")
            segments.append(Text(_string(segment["text"], "text", where), loss))
        else:
            name = _string(segment["image"], "image", where).lower()
            if name not in images:
                raise UnusableSampleError("segments-image", f"{where} has no image {name!r}")
            segments.append(images[name])
    return tuple(segments)


FORMATS: dict[str, SegmentReader] = {
    "conversations": _conversation,
    "segments": _interleaved,
}
"""The reader of each format, by the JSON key that tells it; the first that is there counts."""
EXTENSIONS: dict[str, SegmentReader] = {"txt": _txt}
"""The reader of each format that a member's extension tells, if no JSON key does; the first that is there counts."""
TEXT_ALONE = ("conversations", "segments", "txt")
"""Formats whose text may be meant without an image; for others, it counts as missing."""


def is_text(extension: str) -> bool:
    """Returns whether a member with this extension may be the text about an image."""
    return extension == "json" or extension in EXTENSIONS


def parse_json(data: bytes, where: str, reason: str = "json-invalid") -> Any:
    """Returns the value that JSON describes, by the standard: without NaN and infinities.

    Raises:
        UnusableSampleError: It is too long, not UTF-8, or, as `reason`, not JSON.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(_decode(data, where), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UnusableSampleError(reason, f"{where}: {error}") from error


def _decode(data: bytes, where: str) -> str:
    if len(data) > TEXT_BYTES:
        raise UnusableSampleError("text-too-long", f"{where}: more than {TEXT_BYTES:,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableSampleError("text-not-utf8", f"{where}: {error}") from error


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UnusableSampleError("json-type", f"{where}: {name} is {type(value).__name__}, not text")
    return value
