"""The resolution task: one scene drawn at many sizes and shapes of picture, to be read in the same words.

A scene is a scan of a handwritten digit on a plain ground, described in fractions of the picture: the digit's place as
a fraction of the free room, its size as a fraction of the shorter side. So it keeps its proportions and content at any
size. Training pictures have sides of 32 to 96 pixels in proportions of up to 3 to 1. One patch grid in five among them
is held out (`between`), and larger pictures are held out (`beyond`).
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
"""(height, width) in pixels."""

QUESTION = "Read the digit."
VOCAB_SIZE = 320
"""Vocabulary of a tokenizer for this task: hardly more than bytes and special tokens."""
TEST_SEED = 1_000_003
"""Seed of test and validation scenes, the same for every training seed."""
PATCH_SIZE = 16
"""The patch size whose grids decide which sizes are held out."""
SHORTEST, LONGEST = 32, 96
"""Shortest and longest side of training pictures, in pixels."""
PROPORTION = 3.0
"""Largest ratio of the longer to the shorter side."""
DIGIT_HEIGHTS = (0.7, 0.85)
"""Range of digit heights, as fractions of the shorter side."""
ASPECT = 0.8
"""Width of a digit over its height."""
TEST_SIZES: tuple[Size, ...] = (
    *((32, 32), (48, 48), (64, 64), (96, 96), (40, 40), (56, 56)),
    *((64, 32), (32, 80), (32, 96), (64, 80), (80, 48), (48, 80), (96, 64), (96, 48), (64, 96), (80, 96)),
    *((80, 80), (64, 48), (32, 64), (96, 32), (48, 96), (72, 72), (56, 40)),
    *((112, 112), (128, 128), (160, 160), (54, 160), (160, 54), (80, 160), (160, 80), (112, 160), (160, 112)),
)
"""Sizes to score: trained ones, some between those, and some beyond."""


@dataclass(frozen=True)
class Scene:
    """The content of a picture, in fractions of its size."""

    scan: UInt8[np.ndarray, "8 8"]
    label: int
    place: tuple[float, float]
    """The digit's place: the fraction of the free height above it, and of the free width left of it."""
    tall: float
    """Height of the digit, as a fraction of the shorter side."""
    warp: tuple[float, float]
    """Rotation in radians, and shear."""
    ink: tuple[float, float, float]
    ground: tuple[float, float, float]
    noise: float
    """Standard deviation of the noise in each pixel value."""


def is_trained(height: int, width: int, longest: int = LONGEST) -> Trained:
    """Returns whether pictures of a size are in training with sides up to `longest`, or else where they are held
    out."""
    if max(height, width) > longest:
        return "beyond"
    rows, cols = -(-height // PATCH_SIZE), -(-width // PATCH_SIZE)
    return "between" if (rows + 2 * cols) % 5 == 0 else "yes"


def draw_size(rng: np.random.Generator, longest: int = LONGEST) -> Size:
    """Draws a training size: both sides log-uniform, in allowed proportions, of a patch grid that isn't held out."""
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
    """Returns the scene as a picture of any size, with noise from `rng`."""
    angle, shear = scene.warp
    tall = scene.tall * min(height, width)
    centre = [
        share * (side - size) + size / 2
        for share, side, size in zip(scene.place[::-1], (width, height), (tall * ASPECT, tall), strict=True)
    ]
    # Maps from pixels of the picture to pixels of the scan, which has a border of one empty pixel.
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
    """Describes the pictures of shards."""

    split: Split
    seed: int
    size: Size | None = None
    """(height, width) of all pictures; None draws a training size for each."""
    longest: int = LONGEST
    """The longest side that is drawn."""
    square: int | None = None
    """Side to which all pictures are squashed, as encoders with one fixed resolution require."""

    def sample(self, number: int) -> tuple[Size, Scene, UInt8[np.ndarray, "H W 3"]]:
        """Returns the native size, the scene and the pixels of a picture; the scene depends only on split, seed and
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
    """Writes `count` pictures as webdataset shards, each a JPEG with LLaVA's JSON.

    The JSON's `groups` are the native size, such as `64x96` (height first), and whether it is in training; its `image`
    is the same for one scene at all sizes.

    Args:
        directory: The folder of `{name}-00000.tar` and so on.
        name: Prefix of the shards.
        pictures: Describes the pictures.
        count: Total number of pictures.
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
