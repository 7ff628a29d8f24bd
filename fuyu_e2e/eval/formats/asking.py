"""Turns entries of benchmark files into questions: adds the prompt after the image, and reads images from one
folder."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.errors import UserError
from fuyu_e2e.eval.question import Question

QUESTION = "{question}"
"""The place of the question in a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One question of a file, without its image's content."""

    key: str
    image: str
    """File name in the folder of images."""
    prompt: str
    references: tuple[str, ...]
    groups: Mapping[str, str] = field(default_factory=dict)


def filled(prompt: str, question: str) -> str:
    """Returns a prompt with the question inserted.

    Raises:
        UserError: The prompt has no place for a question.
    """
    if QUESTION not in prompt:
        raise UserError(f"prompt is {prompt!r}, but must hold {QUESTION}: no question would be asked.")
    return prompt.replace(QUESTION, question)


def ask(entries: Sequence[Entry], source: str | Path, images: str | Path, stats: SampleStats) -> Iterator[Question]:
    """Returns the questions of a file, in order; reads their images one by one.

    Refuses an incomplete benchmark, since a score on some of its questions compares with no other: first checks that
    all images exist. Follows links in the folder, since its owner made them. The content of an image file is checked
    when it is decoded.

    Args:
        entries: The file's entries.
        source: The file, for error messages.
        images: The folder of their images.
        stats: Counts the questions that are read.

    Raises:
        UserError: Two entries share a key, an image's name leads out of the folder, or images are missing.
    """
    keys = set()
    for entry in entries:
        if entry.key in keys:
            raise UserError(f"{source}: two entries are called {entry.key!r}.")
        keys.add(entry.key)
    asked_of: dict[str, str] = {}
    for entry in entries:
        asked_of.setdefault(entry.image, entry.key)
    missing = [name for name, key in asked_of.items() if not _is_file(_inside(images, name, f"{source}: {key}"))]
    if missing:
        raise UserError(
            f"{source} asks about {len(asked_of):,} images, but {len(missing):,} of them are no files in {images}: "
            f"{asked_of[missing[0]]} asks about {missing[0]!r}. Is this the folder of its images, all unpacked?"
        )
    return _asked(entries, Path(images), stats)


def _asked(entries: Sequence[Entry], images: Path, stats: SampleStats) -> Iterator[Question]:
    for entry in entries:
        try:
            image = Image((images / entry.image).read_bytes())
        except OSError as error:
            raise UserError(f"{images / entry.image} can't be read: {error.strerror}.") from error
        stats.read += 1
        prompt = (Text(entry.prompt, loss=False),) if entry.prompt else ()
        yield Question(
            document=Document(entry.key, (image, *prompt)),
            references=entry.references,
            image=entry.image,
            groups=entry.groups,
        )


def _inside(folder: str | Path, name: str, where: str) -> Path:
    """Returns the path of a file in a folder, by Windows' rules: both slashes separate names, a colon ends a
    drive's."""
    path = PureWindowsPath(name)
    if path.anchor or ".." in path.parts:
        raise UserError(f"{where} asks about the image {name!r}, which leads out of its folder.")
    return Path(folder, name)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False
