"""Writes shards of drawn pictures, each with LLaVA's JSON, several at once."""

import io
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image as Pillow

from fuyu_e2e.data.progress_bar import ProgressBar
from fuyu_e2e.data.shards.parallel import deaf_to_interrupts
from fuyu_e2e.data.shards.tar_writer import write_samples

Samples = Callable[[range], Iterable[dict[str, Any]]]
"""Returns the samples of a shard, in webdataset's form, for the numbers of its pictures; must be picklable."""


def write_picture_shards(
    directory: Path, name: str, samples: Samples, count: int, *, processes: int, shard_size: int
) -> list[Path]:
    """Writes `count` pictures as webdataset shards.

    Args:
        directory: The folder of `{name}-00000.tar` and so on.
        name: Prefix of the shards.
        samples: Draws the samples.
        count: Total number of pictures.
        processes: Shards written at once; their bytes don't depend on it.
        shard_size: Pictures of a shard.

    Returns:
        The shards, in order.
    """
    numbers = [range(start, min(start + shard_size, count)) for start in range(0, count, shard_size)]
    paths = [directory / f"{name}-{number:05}.tar" for number in range(len(numbers))]
    write = partial(_write_shard, samples)
    with ProgressBar(f"Drawing {name}", count, "pictures") as progress:
        if processes == 1 or len(paths) == 1:
            for path, own in zip(paths, numbers, strict=True):
                write(path, own)
                progress.advance(float(len(own)))
        else:
            # Not forked: a copy of a process that runs torch's threads can hang. Tasks that draw don't import torch,
            # so that a new process starts in a fraction of a second.
            with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
                with deaf_to_interrupts():
                    written = pool.map(write, paths, numbers)
                for own, _ in zip(numbers, written, strict=True):
                    progress.advance(float(len(own)))
    return paths


def _write_shard(samples: Samples, path: Path, numbers: range) -> None:
    with path.open("wb") as file:
        write_samples(file, ((sample.pop("__key__"), sample) for sample in samples(numbers)))


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
