"""The resolution task: one scene drawn at many sizes and shapes of picture, to be read in the same words.

A scene is one scan of a handwritten digit on a plain ground. It is made of shares of the picture: the digit's place is
one of the room that it leaves free, its size one of the shorter side, so that it keeps its proportions and shows as
much at any size. Pictures to train on have sides of 32 to 96 pixels in proportions of up to 3 to 1. One patch grid in
five is left out between them (`between`), and larger pictures are left out beyond.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image as Pillow

from fuyu_e2e.tasks.digits import Scans, load_scans
from fuyu_e2e.tasks.picture_shards import conversation, jpeg, write_picture_shards

Split = Literal["train", "val", "test"]
Trained = Literal["yes", "between", "beyond"]
Size = tuple[int, int]
"""Height and width in pixels."""

QUESTION = "Read the digit."
VOCAB_SIZE = 320
"""Of a tokenizer for this task: hardly more than bytes and special tokens."""
MAX_NEW_TOKENS = 4
"""Room for an answer, with some to spare."""
TEST_SEED = 1_000_003
"""Test and validation scenes are the same for every seed of training."""
PATCH_SIZE = 16
"""The patch that sizes are held out by."""
SHORTEST, LONGEST = 32, 96
"""Sides of pictures to train on, in pixels."""
PROPORTION = 3.0
"""Longer side over shorter at most."""
DIGIT_HEIGHTS = (0.7, 0.85)
"""Of digits, as shares of the shorter side."""
ASPECT = 0.8
"""Width of a digit over its height."""
TEST_SIZES: tuple[Size, ...] = (
    *((32, 32), (48, 48), (64, 64), (96, 96), (40, 40), (56, 56)),
    *((64, 32), (32, 80), (32, 96), (64, 80), (80, 48), (48, 80), (96, 64), (96, 48), (64, 96), (80, 96)),
    *((80, 80), (64, 48), (32, 64), (96, 32), (48, 96), (72, 72), (56, 40)),
    *((112, 112), (128, 128), (160, 160), (54, 160), (160, 54), (80, 160), (160, 80), (112, 160), (160, 112)),
)
"""Sizes to score: trained on, between those, beyond them."""


@dataclass(frozen=True)
class Scene:
    """What is to be drawn, in shares of a picture."""

    scan: UInt8[np.ndarray, "8 8"]
    label: int
    place: tuple[float, float]
    """Of the digit: shares of the free height that is above it and of the free width left of it."""
    tall: float
    """Height of the digit, as a share of the shorter side."""
    warp: tuple[float, float]
    """How far it is turned, in radians, and sheared."""
    ink: tuple[float, float, float]
    ground: tuple[float, float, float]
    noise: float
    """Standard deviation of the noise in each value of a pixel."""


def is_trained(height: int, width: int, longest: int = LONGEST) -> Trained:
    """Returns whether pictures of a size are trained on, where the longest side is so long, or how they lie to
    those."""
    if max(height, width) > longest:
        return "beyond"
    rows, cols = -(-height // PATCH_SIZE), -(-width // PATCH_SIZE)
    return "between" if (rows + 2 * cols) % 5 == 0 else "yes"


def draw_size(rng: np.random.Generator, longest: int = LONGEST) -> Size:
    """Draws a size to train on: both sides log-uniform, in allowed proportions, of a patch grid not held out."""
    while True:
        height, width = (int(np.exp(rng.uniform(*np.log([SHORTEST, longest + 1])))) for _ in range(2))
        proportion = max(height, width) / min(height, width)
        if proportion <= PROPORTION and is_trained(height, width, longest) == "yes":
            return height, width


def draw_scene(rng: np.random.Generator, scans: Scans, warp: bool) -> Scene:
    """Draws a scene; `warp` turns and shears the scan a little."""
    number = int(rng.integers(len(scans.labels)))
    turn, shear = rng.uniform(-1, 1, 2) * ([0.17, 0.15] if warp else [0.0, 0.0])
    return Scene(
        scan=scans.pixels[number],
        label=int(scans.labels[number]),
        place=tuple(rng.uniform(0, 1, 2).tolist()),
        tall=float(rng.uniform(*DIGIT_HEIGHTS)),
        warp=(float(turn), float(shear)),
        ink=tuple(rng.uniform(0, 90, 3).tolist()),
        ground=tuple(rng.uniform(165, 255, 3).tolist()),
        noise=float(rng.uniform(0, 8)),
    )


def draw(scene: Scene, height: int, width: int, rng: np.random.Generator) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the scene as a picture of any size; `rng` gives the noise."""
    angle, shear = scene.warp
    tall = scene.tall * min(height, width)
    centre = [
        share * (side - size) + size / 2
        for share, side, size in zip(scene.place[::-1], (width, height), (tall * ASPECT, tall), strict=True)
    ]
    # From a place in the picture to one in the scan, in pixels of each; one empty pixel is put around the scan.
    matrix = np.array([[np.cos(angle), shear - np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = matrix @ np.diag([8 / (tall * ASPECT), 8 / tall])
    offset = 5 - matrix @ centre
    scan = Pillow.fromarray(np.pad((scene.scan * (255 / 16)).astype(np.uint8), 1))
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    drawn = scan.transform(
        (width, height), Pillow.Transform.AFFINE, coefficients, Pillow.Resampling.BICUBIC, fillcolor=0
    )
    ink = np.asarray(drawn, np.float32)[:, :, None] / 255
    ground = np.array(scene.ground, np.float32)
    pixels = ground + ink * (np.array(scene.ink, np.float32) - ground)
    pixels += scene.noise * rng.standard_normal(pixels.shape, np.float32)
    return pixels.clip(0, 255).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Which pictures shards hold."""

    split: Split
    seed: int
    size: Size | None = None
    """Height and width of all; None draws one for each, among those to train on."""
    longest: int = LONGEST
    """The longest side that is drawn."""
    square: int | None = None
    """Side that all are squashed to, whatever their size, as encoders of one fixed resolution need it."""

    def sample(self, number: int) -> tuple[Size, Scene, UInt8[np.ndarray, "H W 3"]]:
        """Returns a picture with its native size and its scene, which depends on nothing but split, seed and
        number."""
        identity = [self.seed, zlib.crc32(self.split.encode()), number]
        scene = draw_scene(np.random.default_rng(identity), load_scans(self.split), warp=self.split == "train")
        rng = np.random.default_rng([*identity, 1])
        size = self.size or draw_size(rng, self.longest)
        pixels = draw(scene, *size, rng)
        if self.square is not None:
            squashed = Pillow.fromarray(pixels).resize((self.square, self.square), Pillow.Resampling.BICUBIC)
            pixels = np.asarray(squashed)
        return size, scene, pixels


def write_shards(
    directory: Path, name: str, pictures: Pictures, count: int, *, processes: int = 2, shard_size: int = 2_500
) -> list[Path]:
    """Writes `count` pictures as webdataset shards, each a JPEG with LLaVA's JSON beside it.

    The JSON's `groups` name the native size, as `64x96` (height first), and whether it is trained on; its `image` is
    the same for one scene at all sizes.

    Args:
        directory: Where `{name}-00000.tar` and those behind it go.
        name: What the shards begin with.
        pictures: What they hold.
        count: Pictures in all.
        processes: Shards written at once; their bytes don't depend on it.
        shard_size: Pictures of a shard.

    Returns:
        The shards, in order.
    """
    samples = partial(_samples, name, pictures)
    return write_picture_shards(directory, name, samples, count, processes=processes, shard_size=shard_size)


def _samples(name: str, pictures: Pictures, numbers: range) -> Iterator[dict[str, Any]]:
    for number in numbers:
        (height, width), scene, pixels = pictures.sample(number)
        key = f"{name}-{number:06}"
        groups = {"size": f"{height}x{width}", "trained": is_trained(height, width)}
        turns = [(f"<image>\n{QUESTION}", str(scene.label))]
        described = conversation(key, f"{pictures.split}-{number:06}", turns, groups=groups)
        yield {"__key__": key, "jpg": jpeg(pixels), "json": described}
