"""The digits task: handwritten digits in pictures of many sizes, read from left to right and top to bottom.

A picture shows one to four scans of `data/digits` on up to three lines, at varying scales and places, slightly warped
in training, in dark inks on light tinted grounds. It is 16 to 64 pixels high and 16 to 128 wide. One patch grid in
five is held out from training, spread among the others, to score reading at new sizes.
"""

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image as Pillow

from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.tasks.picture_shards import conversation, jpeg, write_picture_shards

Split = Literal["train-one", "train-two", "train", "val", "test", "test-new-sizes"]

QUESTION = "Read the digits."
VOCAB_SIZE = 320
"""Vocabulary of a tokenizer for this task: hardly more than bytes and special tokens."""
MAX_NEW_TOKENS = 16
"""Enough tokens for any answer."""
TEST_SEED = 1_000_003
"""Seed of test and validation pictures, the same for every training seed, so that seeds can be compared."""
MOST_DIGITS = 4
EASY: dict[Split, int] = {"train-one": 1, "train-two": 2}
"""Most digits in pictures to begin with."""
HEIGHTS, WIDTHS = (16, 64), (16, 128)
"""Smallest and largest side of a picture, in pixels."""
PIXELS_PER_DIGIT = 700
"""Largest area of a picture for each digit in it, since mostly empty pictures teach little for their tokens."""
DIGIT_HEIGHTS = (12, 24)
"""Smallest and largest height of a digit, in pixels."""
ASPECT = 0.8
"""Width of a digit over its height."""
PATCH_SIZE = 8
"""The patch size whose grids decide which sizes are held out."""
HELD_OUT = {"val": 150, "test": 150}
"""Scans held out from training."""


@dataclass(frozen=True)
class Scans:
    """Scans of single digits."""

    pixels: UInt8[np.ndarray, "scans 8 8"]
    """0 (white) to 16 (ink)."""
    labels: UInt8[np.ndarray, " scans"]


@cache
def load_scans(split: Split) -> Scans:
    """Returns the scans of a split: 1,497 for training, 150 for validation, 150 for tests, without overlap."""
    with gzip.open(shipped("data/digits/digits.csv.gz"), "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    order = np.random.default_rng(0).permutation(len(rows))
    val, test = HELD_OUT["val"], HELD_OUT["test"]
    chosen = {"val": order[:val], "test": order[val : val + test], "train": order[val + test :]}[split.split("-")[0]]
    return Scans(rows[chosen, :64].reshape(-1, 8, 8), rows[chosen, 64])


@dataclass(frozen=True)
class Box:
    """The place of a digit, in pixels."""

    left: int
    top: int
    width: int
    height: int


def is_new_size(height: int, width: int) -> bool:
    """Returns whether pictures of this size are held out from training: every fifth patch grid, on the diagonals."""
    rows, cols = -(-height // PATCH_SIZE), -(-width // PATCH_SIZE)
    return (rows + 2 * cols) % 5 == 0


def draw_size(rng: np.random.Generator, digits: int, new_sizes: bool) -> tuple[int, int]:
    """Draws a (height, width) with room for `digits` digits, among the trained or the held-out sizes."""
    while True:
        height, width = (int(np.exp(rng.uniform(*np.log([low, high + 1])))) for low, high in (HEIGHTS, WIDTHS))
        roomy = height * width > PIXELS_PER_DIGIT * digits
        if is_new_size(height, width) == new_sizes and possible_lines(digits, height, width) and not roomy:
            return height, width


def possible_lines(digits: int, height: int, width: int) -> list[int]:
    """Returns the numbers of lines on which `digits` digits of the smallest size fit."""
    smallest = DIGIT_HEIGHTS[0]
    return [
        lines
        for lines in range(1, min(3, digits) + 1)
        if lines * smallest <= height and -(-digits // lines) * round(smallest * ASPECT) <= width
    ]


def lay_out(rng: np.random.Generator, digits: int, height: int, width: int) -> list[Box]:
    """Returns boxes for digits in reading order: lines below one another, digits side by side, without overlap.

    The picture must have room for them (`possible_lines`).
    """
    lines = int(rng.choice(possible_lines(digits, height, width)))
    counts = [len(part) for part in np.array_split(np.arange(digits), lines)]
    rng.shuffle(counts)
    smallest, largest = DIGIT_HEIGHTS
    room = min(largest, height // lines, int(width / max(counts) / ASPECT))
    tall = int(rng.integers(smallest, max(room, smallest) + 1))
    boxes = []
    tops = _spread(rng, [tall] * lines, height)
    for top, count in zip(tops, counts, strict=True):
        heights = [max(smallest, round(tall * share)) for share in rng.uniform(0.85, 1.0, count)]
        widths = [int(h * ASPECT) for h in heights]
        for left, w, h in zip(_spread(rng, widths, width), widths, heights, strict=True):
            boxes.append(Box(left, top + int(rng.integers(tall - h + 1)), w, h))
    return boxes


def _spread(rng: np.random.Generator, lengths: Sequence[int], room: int) -> list[int]:
    """Returns starts of intervals with these lengths, in order, with the free room distributed at random."""
    free = np.sort(rng.integers(0, room - sum(lengths) + 1, len(lengths)))
    return (free + np.cumsum([0, *lengths[:-1]])).tolist()


def compose(
    rng: np.random.Generator, scans: Scans, digits: int, height: int, width: int, warp: bool
) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
    """Returns a picture of `digits` scans and its digits in reading order; `warp` turns and shears each a little."""
    chosen = rng.integers(len(scans.labels), size=digits)
    ink = np.zeros((height, width), np.float32)
    for scan, box in zip(chosen, lay_out(rng, digits, height, width), strict=True):
        drawn = _draw(rng, scans.pixels[scan], box, warp)
        ink[box.top : box.top + box.height, box.left : box.left + box.width] = drawn
    ground, colour = _colours(rng, height, width)
    pixels = ground + ink[:, :, None] * (colour - ground)
    pixels += rng.normal(0, rng.uniform(0, 8), pixels.shape).astype(np.float32)
    truth = "".join(str(label) for label in scans.labels[chosen])
    return pixels.clip(0, 255).astype(np.uint8), truth


def _draw(rng: np.random.Generator, scan: UInt8[np.ndarray, "8 8"], box: Box, warp: bool) -> Float[np.ndarray, "h w"]:
    angle, shear = rng.uniform(-1, 1, 2) * ([0.17, 0.15] if warp else [0.0, 0.0])
    # Maps from pixel centres of the box to pixels of the scan.
    matrix = np.array([[np.cos(angle), shear - np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = matrix @ np.diag([8 / box.width, 8 / box.height])
    offset = 4 - matrix @ [box.width / 2, box.height / 2]
    small = Pillow.fromarray((scan * (255 / 16)).astype(np.uint8))
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    drawn = small.transform(
        (box.width, box.height), Pillow.Transform.AFFINE, coefficients, Pillow.Resampling.BICUBIC, fillcolor=0
    )
    return np.asarray(drawn, np.float32) / 255


def _colours(
    rng: np.random.Generator, height: int, width: int
) -> tuple[Float[np.ndarray, "H W 3"], Float[np.ndarray, " 3"]]:
    """Returns a light ground with a gradient between two tints, and a dark ink."""
    start, end, ink = *rng.uniform(165, 255, (2, 3)), rng.uniform(0, 90, 3)
    direction = rng.uniform(-1, 1, 2)
    across = direction[0] * np.linspace(0, 1, height)[:, None] + direction[1] * np.linspace(0, 1, width)
    across = (across - across.min()) / max(float(np.ptp(across)), 1e-6)
    ground = start + across[:, :, None] * (end - start)
    return ground.astype(np.float32), ink.astype(np.float32)


def write_shards(
    directory: Path,
    *,
    split: Split,
    count: int,
    seed: int,
    most_digits: int = MOST_DIGITS,
    processes: int = 2,
    shard_size: int = 2_500,
) -> list[Path]:
    """Writes `count` pictures as webdataset shards, each a JPEG with LLaVA's JSON.

    Args:
        directory: The folder of `{split}-00000.tar` and so on.
        split: Chooses scans and sizes; `test-new-sizes` are test scans at held-out sizes, `train-one` and `train-two`
            training scans in pictures of one digit, and of one or two.
        count: Total number of pictures, with one to `most_digits` digits equally often.
        seed: Seeds the pictures; their bytes don't depend on `processes`.
        most_digits: Most digits in a picture.
        processes: Shards written at once.
        shard_size: Pictures of a shard.

    Returns:
        The shards, in order.
    """
    samples = partial(_samples, split, seed, most_digits)
    return write_picture_shards(directory, split, samples, count, processes=processes, shard_size=shard_size)


def _samples(split: Split, seed: int, most_digits: int, numbers: range) -> Iterator[dict[str, Any]]:
    scans = load_scans(split)
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), numbers.start])
    for number in numbers:
        key = f"{split}-{number:06}"
        digits = int(rng.integers(1, EASY.get(split, most_digits) + 1))
        size = draw_size(rng, digits, new_sizes=split == "test-new-sizes")
        pixels, truth = compose(rng, scans, digits, *size, warp=split.startswith("train"))
        turns = [(f"<image>\n{QUESTION}", truth)]
        groups = {"digits": str(digits)}
        yield {"__key__": key, "jpg": jpeg(pixels), "json": conversation(key, f"{key}.jpg", turns, groups=groups)}
