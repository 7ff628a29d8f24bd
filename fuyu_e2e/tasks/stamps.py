"""The stamps task: what is in the picture, in English or in German, and where?

A picture shows one to three stamps of Tux Paint (`fuyu_e2e.tasks.stamp_kinds`), photographs and drawings, at many
sizes on random grounds, each of another kind. It is asked for their names from left to right, in the language of the
question, or for the box around one of them.

A box is written as in the released Fuyu's prompts: `<box>top, left, bottom, right</box>`, in pixels of the picture, of
which `bottom` and `right` are the first row and column below and beside the stamp. The decoder writes it letter for
letter. `transformers`' processor turns such a text in a prompt into the byte tokens `<0x00>` and `<0x01>` and halves
its numbers; our tokenizer doesn't. No question here holds a box, so an exported model writes the same letters.

Training pictures show all stamps of a kind but the last of several, and no held-out pair of kinds. `train-one`, to
begin with, shows single stamps in small pictures. Of the tests, `test` shows new pictures of the same stamps and
pairs, `test-new-combinations` a held-out pair in each picture, and `test-new-photographs` held-out stamps alone.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image as Pillow

from fuyu_e2e.errors import UserError
from fuyu_e2e.tasks.picture_shards import conversation, jpeg, write_picture_shards
from fuyu_e2e.tasks.stamp_kinds import Kind, is_held_out

Split = Literal["train-one", "train", "val", "test", "test-new-combinations", "test-new-photographs"]
Question = Literal["English", "German", "box"]
QUESTIONS: tuple[Question, ...] = get_args(Question)
Box = tuple[int, int, int, int]
"""Top, left, bottom and right in pixels; bottom and right are the first row and column outside."""

TEXTS: dict[Question, str] = {
    "English": "What is in the picture?",
    "German": "Was ist auf dem Bild?",
    "box": "Where is the {}?",
}
VOCAB_SIZE = 1_024
"""Vocabulary of a tokenizer for this task: bytes, special tokens, and names, most of which are one token or two."""
TEST_SEED = 1_000_003
"""Seed of test and validation pictures, the same for every training seed, so that seeds can be compared."""
SIDES, SMALL_SIDES = (64, 192), (48, 80)
"""Smallest and largest side of a picture, in pixels; of pictures to begin with."""
PROPORTION = 2.0
"""Largest ratio of a picture's sides."""
MOST_STAMPS = 3
SMALLEST = 24
"""Longer side, in pixels, of the smallest stamp."""
FILLED = 0.9
"""Largest part of a picture's shorter side that the longer side of a single stamp takes; of `n` stamps, that over the
root of `n`."""
COVERED = 32
"""Opacity, of 255, above which a pixel belongs to a stamp: fainter ones, such as soft shadows, are outside its box."""
OVERLAP = 0.1
"""Largest part of the smaller one of two boxes that the other covers."""
APART = 8
"""Smallest distance of two stamps' centres from left to right, in pixels, so that their order can be seen."""
TRIES = 50
"""Places tried for a stamp before the whole picture is drawn again."""
DRAWS = 1_000
"""Most draws of the kinds of a picture; of many kinds, one in two draws or so can be used."""
BINS = ((24, 31), (32, 47), (48, 71), (72, 107), (108, 192))
"""Ranges of a stamp's longer side, in pixels, that are scored together."""


@dataclass(frozen=True)
class Placed:
    """A stamp in a picture."""

    kind: Kind
    path: Path
    box: Box

    @property
    def side(self) -> int:
        """Its longer side in pixels."""
        top, left, bottom, right = self.box
        return max(bottom - top, right - left)


@dataclass(frozen=True)
class Composed:
    """A picture and what it shows."""

    pixels: UInt8[np.ndarray, "H W 3"]
    stamps: tuple[Placed, ...]
    """From left to right, by the centres of their boxes."""


@dataclass(frozen=True)
class Asked:
    """A question about a picture."""

    text: str
    answer: str
    groups: dict[str, str]
    """The groups of its score: `question`; of names how many are `named`, and the size of the `smallest` stamp; of a
    box the number of stamps `among` which it is to be found, and its `size`."""


@cache
def load_stamp(path: Path) -> Pillow.Image:
    """Returns a stamp cut to its box, no larger than a picture, as RGBA."""
    with Pillow.open(path) as file:
        stamp = _cut(file.convert("RGBA"))
    stamp.thumbnail((SIDES[1], SIDES[1]))
    return stamp


def _cut(stamp: Pillow.Image) -> Pillow.Image:
    """Returns the part of a stamp that is more than faint, or all of it if nothing is."""
    return stamp.crop(stamp.getchannel("A").point(lambda alpha: 255 * (alpha > COVERED)).getbbox())


def draw_ground(rng: np.random.Generator, height: int, width: int) -> Float32[np.ndarray, "H W 3"]:
    """Returns a ground: a tint, at random with a gradient, soft blobs, coarse texture and fine noise; 0 to 255."""
    rows, columns = np.linspace(0, 1, height, dtype=np.float32)[:, None], np.linspace(0, 1, width, dtype=np.float32)
    ground = np.broadcast_to(rng.uniform(0, 255, 3).astype(np.float32), (height, width, 3)).copy()
    if rng.random() < 0.5:
        across = rng.uniform(-1, 1) * rows + rng.uniform(-1, 1) * columns
        ground += across[:, :, None] * rng.uniform(-120, 120, 3).astype(np.float32)
    for _ in range(rng.integers(0, 4)):
        row, column = rng.uniform(0, 1, 2)
        distance = ((rows - row) ** 2 + (columns - column) ** 2) / rng.uniform(0.05, 0.4) ** 2
        ground += np.exp(-distance)[:, :, None] * rng.uniform(-120, 120, 3).astype(np.float32)
    if rng.random() < 0.5:
        cells = rng.integers(4, 16, 2).tolist()
        coarse = Pillow.fromarray(rng.standard_normal(cells, np.float32))
        texture = np.asarray(coarse.resize((width, height), Pillow.Resampling.BICUBIC))
        ground += texture[:, :, None] * rng.uniform(0, 40, 3).astype(np.float32)
    ground += rng.uniform(0, 12) * rng.standard_normal((height, width, 1), np.float32)
    return ground.clip(0, 255)


def _draw_sides(rng: np.random.Generator, sides: tuple[int, int]) -> tuple[int, int]:
    low, high = np.log(sides).tolist()
    while True:
        height, width = np.exp(rng.uniform(low, high, 2)).round().astype(int).tolist()
        if max(height, width) <= PROPORTION * min(height, width):
            return height, width


def _draw_stamp(rng: np.random.Generator, path: Path, largest: float) -> Pillow.Image:
    """Returns a stamp at a random size, at random mirrored, cut to its box."""
    stamp = load_stamp(path)
    scale = rng.uniform(SMALLEST, max(SMALLEST, largest)) / max(stamp.size)
    width, height = (max(1, round(scale * side)) for side in stamp.size)
    if rng.integers(2):
        stamp = stamp.transpose(Pillow.Transpose.FLIP_LEFT_RIGHT)
    return _cut(stamp.resize((width, height), Pillow.Resampling.BICUBIC))


def _overlap(one: Box, other: Box) -> float:
    """Returns which part of the smaller box is covered by the other."""
    rows = min(one[2], other[2]) - max(one[0], other[0])
    columns = min(one[3], other[3]) - max(one[1], other[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return max(0, rows) * max(0, columns) / smaller


def _free_place(
    rng: np.random.Generator, stamp: Pillow.Image, height: int, width: int, taken: Sequence[Box]
) -> Box | None:
    """Returns a box inside the picture that is free and in an order with others, or None if none was found."""
    for _ in range(TRIES):
        top, left = rng.integers(height - stamp.height + 1), rng.integers(width - stamp.width + 1)
        box = (int(top), int(left), int(top) + stamp.height, int(left) + stamp.width)
        if all(
            _overlap(box, other) <= OVERLAP and abs(box[1] + box[3] - other[1] - other[3]) >= 2 * APART
            for other in taken
        ):
            return box
    return None


def compose(rng: np.random.Generator, stamps: Sequence[tuple[Kind, Path]], sides: tuple[int, int] = SIDES) -> Composed:
    """Returns a picture of some stamps, with sides in a range of pixels."""
    while True:
        height, width = _draw_sides(rng, sides)
        largest = FILLED * min(height, width) / len(stamps) ** 0.5
        boxes: list[Box] = []
        cut = [_draw_stamp(rng, path, largest) for _, path in stamps]
        for stamp in cut:
            box = _free_place(rng, stamp, height, width, boxes)
            if box is None:
                break
            boxes.append(box)
        else:
            break
    pixels = draw_ground(rng, height, width)
    for stamp, (top, left, bottom, right) in zip(cut, boxes, strict=True):
        values = np.asarray(stamp, np.float32)
        below = pixels[top:bottom, left:right]
        below += values[:, :, 3:] / 255 * (values[:, :, :3] - below)
    placed = [Placed(kind, path, box) for (kind, path), box in zip(stamps, boxes, strict=True)]
    placed.sort(key=lambda stamp: stamp.box[1] + stamp.box[3])
    return Composed(pixels.round().astype(np.uint8), tuple(placed))


def ask(rng: np.random.Generator, question: Question, stamps: Sequence[Placed]) -> Asked:
    """Returns a question about stamps in the order from left to right, with its answer."""
    count = str(len(stamps))
    if question == "box":
        asked = stamps[int(rng.integers(len(stamps)))]
        answer = "<box>{}, {}, {}, {}</box>".format(*asked.box)
        groups = {"question": question, "among": count, "size": size_bin(asked.side)}
        return Asked(TEXTS[question].format(asked.kind.english), answer, groups)
    names = [stamp.kind.english if question == "English" else stamp.kind.german for stamp in stamps]
    smallest = size_bin(min(stamp.side for stamp in stamps))
    return Asked(TEXTS[question], ", ".join(names), {"question": question, "named": count, "smallest": smallest})


def size_bin(side: int) -> str:
    """Returns the name of the range of a stamp's longer side, such as `024-031`, so that ranges sort as text.

    A stamp whose faint edges were cut off is counted in the smallest range, however small it is.
    """
    low, high = next((low, high) for low, high in BINS if side <= high)
    return f"{low:03}-{high:03}"


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Describes the pictures of shards."""

    split: Split
    seed: int
    kinds: tuple[Kind, ...]

    def sample(self, number: int) -> tuple[Composed, Asked]:
        """Returns picture number `number` and its question, which depend only on that, the fields and the stamps.

        Questions and numbers of stamps take turns, so that each occurs equally often.
        """
        rng = np.random.default_rng([self.seed, zlib.crc32(self.split.encode()), number])
        turn, question = divmod(number, len(QUESTIONS))
        fewest, most = {"train-one": (1, 1), "test-new-combinations": (2, MOST_STAMPS)}.get(
            self.split, (1, MOST_STAMPS)
        )
        kinds = self._draw_kinds(rng, fewest + turn % (most - fewest + 1))
        stamps = [(kind, paths[rng.integers(len(paths))]) for kind in kinds if (paths := self._stamps(kind))]
        composed = compose(rng, stamps, SMALL_SIDES if self.split == "train-one" else SIDES)
        return composed, ask(rng, QUESTIONS[question], composed.stamps)

    def _stamps(self, kind: Kind) -> tuple[Path, ...]:
        return kind.held_out if self.split == "test-new-photographs" else kind.known

    def _draw_kinds(self, rng: np.random.Generator, count: int) -> list[Kind]:
        """Returns kinds among which there is a held-out pair, or none, as the split says.

        Raises:
            UserError: There are too few kinds for that.
        """
        usable = [kind for kind in self.kinds if self._stamps(kind)]
        for _ in range(DRAWS):
            kinds = [usable[place] for place in rng.permutation(len(usable))[:count]]
            new = any(is_held_out(one, other) for one, other in combinations(kinds, 2))
            if len(kinds) == count and new == (self.split == "test-new-combinations"):
                return kinds
        raise UserError(
            f"{len(usable)} kinds of stamps are too few for {count} in a picture of {self.split}: name a folder with "
            "more by --stamps."
        )


def write_shards(
    directory: Path, pictures: Pictures, count: int, *, processes: int = 2, shard_size: int = 2_000
) -> list[Path]:
    """Writes `count` pictures as webdataset shards, each a JPEG with LLaVA's JSON.

    A sample is one question followed by its picture, so that the model knows what to look for when it reads the
    patches.

    Args:
        directory: The folder of `{split}-00000.tar` and so on.
        pictures: Describes the pictures.
        count: Total number of pictures.
        processes: Shards written at once; their bytes don't depend on it.
        shard_size: Pictures of a shard.

    Returns:
        The shards, in order.
    """
    samples = partial(_samples, pictures)
    return write_picture_shards(directory, pictures.split, samples, count, processes=processes, shard_size=shard_size)


def _samples(pictures: Pictures, numbers: range) -> Iterator[dict[str, Any]]:
    for number in numbers:
        composed, asked = pictures.sample(number)
        key = f"{pictures.split}-{number:06}"
        described = conversation(key, key, [(f"{asked.text}\n<image>", asked.answer)], groups=asked.groups)
        yield {"__key__": key, "jpg": jpeg(composed.pixels), "json": described}
