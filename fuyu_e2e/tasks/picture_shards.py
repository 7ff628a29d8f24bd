"""Writes shards of drawn pictures, each with LLaVA's JSON, several at once."""

import io
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image as Pillow

from fuyu_e2e.data.progress_bar import Advance, ProgressBar
from fuyu_e2e.data.shards.parallel import run_jobs
from fuyu_e2e.data.shards.tar_writer import write_samples

Samples = Callable[[range], Iterable[dict[str, Any]]]
"""Returns the samples of a shard, in webdataset's form, for the numbers of its pictures; must be picklable."""


def write_picture_shards(
    directory: Path, name: str, samples: Samples, count: int, *, processes: int, shard_size: int
) -> list[Path]:
    """Writes `count` pictures as webdataset shards.

    Args:
        directory: The folder of `{name}-00000.tar` and so on, created if needed.
        name: Prefix of the shards.
        samples: Draws the samples.
        count: Total number of pictures.
        processes: Shards written at once; their bytes don't depend on it.
        shard_size: Pictures of a shard.

    Returns:
        The shards, in order.
    """
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
            write_samples(file, ((sample.pop("__key__"), sample) for sample in samples(numbers)))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    advance(float(len(numbers)))


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
        described: Further entries of the JSON.
    """
    speakers = ("human", "gpt")
    said = [{"from": name, "value": text} for turn in turns for name, text in zip(speakers, turn, strict=True)]
    return json.dumps({"id": key, "image": image, **described, "conversations": said}).encode()
