"""From the members of a sample to documents, by their extensions alone.

caption       jpg|jpeg|png|webp + txt, or + json with a "caption": what img2dataset writes (all three; txt counts)
chat          json with "conversations" (LLaVA's), the images it speaks of beside it, or none
interleaved   json with "segments": [{"text": …} | {"image": extension of a member}, …]
text          txt, or jsonl with one object a line that has a "text" or "conversations"
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuyu_e2e.document import Document, Image, Segment, Text
from fuyu_e2e.errors import UnusableSampleError
from fuyu_e2e.shards.progress import Advance, untold
from fuyu_e2e.shards.reading import Sample, Shard
from fuyu_e2e.tally import Tally

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TEXT_BYTES = 2**22
"""Bytes of text above which a document is left out: 4 MiB, for which sentencepiece takes 60 times as much memory."""
PLACEHOLDER = "<image>"
"""Where an image stands in LLaVA's conversations."""
SPEAKERS = {"human": False, "user": False, "system": False, "gpt": True, "assistant": True}
"""Whether what a speaker says carries loss."""


def read_documents(path: Path, tally: Tally, name: str | None = None, advance: Advance = untold) -> Iterator[Document]:
    """The usable documents of a local shard, in stored order; `name` is what errors call it.

    Counts every document as read, and those that can't be used by reason; and the whole shard as 1 to `advance`.

    Raises:
        UserError: The file can't be read, or is no tar.
    """
    shard = Shard(path, name)
    for number in range(len(shard)):
        tally.read += 1
        try:
            yield document(shard.sample(number))
        except UnusableSampleError as error:
            tally.skip(error)
        advance(1 / len(shard))


def document(sample: Sample) -> Document:
    """The document that a sample says.

    Raises:
        UnusableSampleError: It is of no known format, or not what its format says.
    """
    members, where = sample.members, f"{sample.shard}: {sample.key}"
    if "jsonl" in members:
        return _from_line(sample.key, members["jsonl"], where)
    images = {name: Image(data) for name, data in sorted(members.items()) if name.split(".")[-1] in IMAGE_EXTENSIONS}
    described = description(sample)
    if "conversations" in described:
        return Document(sample.key, _chat(described["conversations"], list(images.values()), where))
    if "segments" in described:
        return Document(sample.key, _interleaved(described["segments"], images, where))
    if "txt" in members:
        text = _decode(members["txt"], where).strip()
    elif "caption" in described:
        text = _string(described["caption"], "caption", where).strip()
    else:
        raise UnusableSampleError("format-unknown", f"{where} has only {', '.join(sorted(members)) or 'no members'}")
    if not text:
        raise UnusableSampleError("caption-empty" if images else "text-empty", where)
    if len(images) > 1:
        raise UnusableSampleError("caption-of-several-images", f"{where}: {', '.join(images)}")
    return Document(sample.key, (*images.values(), Text(text)))


def description(sample: Sample) -> dict[str, Any]:
    """The JSON object beside the images of a sample; empty where it has none.

    Raises:
        UnusableSampleError: It is no JSON object.
    """
    where = f"{sample.shard}: {sample.key}"
    return _parse(sample.members["json"], where) if "json" in sample.members else {}


def _from_line(key: str, line: bytes, where: str) -> Document:
    described = _parse(line, where)
    if "conversations" in described:
        return Document(key, _chat(described["conversations"], [], where))
    if "text" not in described:
        raise UnusableSampleError("format-unknown", f"{where} has neither text nor conversations")
    if not (text := _string(described["text"], "text", where)).strip():
        raise UnusableSampleError("text-empty", where)
    return Document(key, (Text(text),))


def _chat(turns: Any, images: list[Image], where: str) -> tuple[Segment, ...]:
    if not isinstance(turns, list) or not turns:
        raise UnusableSampleError("chat-turns", f"{where}: conversations is no list of turns")
    said: list[tuple[str, bool]] = []
    for turn in turns:
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise UnusableSampleError("chat-speaker", f"{where}: {speaker!r} is none of {', '.join(SPEAKERS)}")
        said.append((_string(turn.get("value"), "value", where), SPEAKERS[speaker]))
    if not any(loss for _, loss in said):
        raise UnusableSampleError("chat-no-answer", where)
    placeholders = sum(value.count(PLACEHOLDER) for value, _ in said)
    if placeholders != len(images) and (placeholders or len(images) > 1):
        raise UnusableSampleError("chat-images", f"{where}: {placeholders} placeholders, {len(images)} images")
    segments: list[Segment] = []
    remaining = iter(images)
    if not placeholders:
        segments.extend(remaining)  # an image that nobody points at is what the whole conversation is about
    for value, loss in said:
        before, *behind = value.split(PLACEHOLDER)
        pieces: list[Segment] = [Text(before.removesuffix("\n") if behind else before, loss)]
        for number, text in enumerate(behind):
            text = text.removeprefix("\n")
            last = number == len(behind) - 1
            pieces += [next(remaining), Text(text if last else text.removesuffix("\n"), loss)]
        segments += [piece for piece in pieces if isinstance(piece, Image) or piece.text]
    return tuple(segments)


def _interleaved(listed: Any, images: dict[str, Image], where: str) -> tuple[Segment, ...]:
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


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(_decode(data, where), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise UnusableSampleError("json-invalid", f"{where}: {error}") from error
    if not isinstance(parsed, dict):
        raise UnusableSampleError("json-invalid", f"{where}: a {type(parsed).__name__} where an object is expected")
    return parsed


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _decode(data: bytes, where: str) -> str:
    if len(data) > TEXT_BYTES:
        raise UnusableSampleError("text-too-long", f"{where}: {len(data):,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableSampleError("text-not-utf8", f"{where}: {error}") from error


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UnusableSampleError("json-type", f"{where}: {name} is {type(value).__name__}, not text")
    return value
