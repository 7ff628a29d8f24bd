"""Writes shards of drawn pictures, each with LLaVA's JSON, several at once."""

import io
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image as Pillow

from fuyu_e2e.data.progress_bar import Advance, ProgressBar
from fuyu_e2e.data.shards.parallel import run_jobs
from fuyu_e2e.data.shards.tar_writer import write_samples
from fuyu_e2e.errors import UserError

Samples = Callable[[range], Iterable[dict[str, Any]]]
"""Returns the samples of a shard, in webdataset's form, for the numbers of its pictures: each a dict of its
`__key__`, unique and without dots and slashes, and of bytes by extension, such as `jpg` and `json`."""


def write_picture_shards(
    directory: Path, name: str, samples: Samples, count: int, *, processes: int, shard_size: int
) -> list[Path]:
    """Writes `count` pictures as webdataset shards.

    Args:
        directory: The folder of `{name}-00000.tar` and so on, created if needed.
        name: Prefix of the shards.
        samples: Draws the samples. More than one process needs it picklable: a function of a module, or
            `functools.partial` of one, but no lambda and no function within a function.
        count: Total number of pictures.
        processes: Shards written at once; their bytes don't depend on it.
        shard_size: Pictures of a shard.

    Returns:
        The shards, in order.

    Raises:
        UserError: A sample could not be read back from its shard, or `samples` can't be pickled.
    """
    if processes > 1:
        try:
            pickle.dumps(samples)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UserError(
                f"{processes} processes can't draw {name} by {samples!r} ({error}): make it functools.partial of a "
                "function at the top of a module, or draw with 1 process."
            ) from error
    directory.mkdir(parents=True, exist_ok=True)
    numbers = [range(start, min(start + shard_size, count)) for start in range(0, count, shard_size)]
    paths = [directory / f"{name}-{number:05}.tar" for number in range(len(numbers))]
    with ProgressBar(f"Drawing {name}", count, "pictures") as progress:
        # Tasks that draw don't import torch, so that a new process starts in a fraction of a second.
        for _ in run_jobs(partial(_write_shard, samples), list(zip(paths, numbers, strict=True)), processes, progress):
            pass
    return paths


def _write_shard(samples: Samples, job: tuple[Path, range], advance: Advance) -> None:
    """Writes a shard under a temporary name, then renames it: a shard is whole or absent."""
    path, numbers = job
    temporary = path.with_suffix(".tar.writing")
    try:
        with temporary.open("wb") as file:
            write_samples(file, _checked(samples(numbers), path.stem))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    advance(float(len(numbers)))


def _checked(samples: Iterable[dict[str, Any]], shard: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields the key and the members of each sample.

    Raises:
        UserError: A sample could not be read back.
    """
    seen: set[str] = set()
    for sample in samples:
        key = sample.pop("__key__", None)
        if not isinstance(key, str) or not key or "." in key or "/" in key:
            raise UserError(
                f"{shard}: a sample's __key__ is {key!r}, but must be text without dots and slashes: name it by the "
                "split and the number of the picture."
            )
        if key in seen:
            raise UserError(
                f"{shard}: two samples have the __key__ {key!r}: name each by the split and the number of the picture."
            )
        seen.add(key)
        for extension, content in sample.items():
            if not isinstance(content, bytes):
                raise UserError(
                    f"{shard}: {extension} of sample {key} is of type {type(content).__name__}, but must be bytes: "
                    "jpeg() encodes a picture, conversation() writes the json, and str.encode() a text."
                )
        yield key, sample


def jpeg(pixels: UInt8[ndarray, "H W 3"]) -> bytes:
    """Returns a picture as a JPEG file without chroma subsampling."""
    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, "JPEG", quality=92, subsampling=0)
    return file.getvalue()


def conversation(key: str, image: str, turns: Sequence[tuple[str, str]], **described: Any) -> bytes:
    """Returns LLaVA's JSON of questions about an image and their answers.

    Args:
        key: Name of the sample.
        image: Name of the image.
        turns: Pairs of a question and its answer, with `<image>` at the place of the image.
        described: Further entries of the JSON, such as `groups={"color": "red"}` and `choices=["yes", "no"]`.

    Raises:
        UserError: `turns` are no pairs of texts.
    """
    said = []
    for turn in turns:
        if isinstance(turn, str) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise UserError(
                f"{key}: a turn is {turn!r}, but must be a question and its answer, both text: "
                '[("<image>\\nHow many?", "3")].'
            )
        said += [{"from": name, "value": text} for name, text in zip(("human", "gpt"), turn, strict=True)]
    return json.dumps({"id": key, "image": image, **described, "conversations": said}).encode()
