"""Sort-of-CLEVR (Santoro et al. 2017, arXiv 1706.01427, section 3.3): questions about objects and how they relate.

A picture of 75 x 75 pixels has six objects, one of each colour, each a square or a circle. There are eighteen
questions about one object alone (its shape, whether it is on the left, whether it is at the top) and eighteen that
relate it to others (the shape of the closest and of the furthest object, how many objects share its shape); ten of
either kind are drawn. Sizes, colours and rules are those of the usual generators, with three differences: boxes around
objects never overlap, no question is asked twice about a picture, and each has one right answer, since a picture is
redrawn if objects of both shapes are equally close to another, or equally far.
"""

import io
import zlib
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import UInt8
from PIL import Image as Pillow

from fuyu_e2e.tasks.picture_shards import conversation, write_picture_shards

Split = Literal["train", "val", "test"]
Shape = Literal["square", "circle"]
Kind = Literal["relational", "non-relational"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Selection = Kind | Literal["close-calls"]
"""The questions to ask: a kind, or the relational ones that require exact places."""

RADIUS = 5
"""Pixels from an object's centre to its edge: objects are 11 pixels wide."""
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "orange": (255, 156, 0),
    "yellow": (255, 255, 0),
    "gray": (128, 128, 128),
}
GROUND = (255, 255, 255)
OBJECTS = len(COLOURS)
"""Objects in a picture of the task; pictures for the start of training have fewer and are smaller."""
ASKED = 10
"""Questions of each kind about a picture."""
LEADS = (0, 2, 4, 8, 16)
"""Bounds, in pixels, of the ranges in which questions about distance are scored together."""
CLOSE_CALL = 8
"""A question about distance is a close call if the right object leads by less than this many pixels."""
VOCAB_SIZE = 448
"""Vocabulary of a tokenizer for this task: bytes, special tokens, and all its words, so that an answer is one
token."""
TEST_SEED = 1_000_003
"""Seed of test and validation pictures, the same for every training seed, so that seeds can be compared."""


@dataclass(frozen=True)
class Thing:
    """An object of a picture."""

    colour: str
    shape: Shape
    row: int
    column: int
    """Row and column are those of its centre pixel."""

    def distance(self, other: "Thing") -> int:
        """Returns the squared distance to another object's centre, in pixels."""
        return (self.row - other.row) ** 2 + (self.column - other.column) ** 2


Scene = tuple[Thing, ...]
"""The objects of a picture, in the order of `COLOURS`."""


def side(objects: int) -> int:
    """Returns the side in pixels of a picture with `objects` objects: 25 for one, and 75 for six, as in the task."""
    return 15 + 10 * objects


def _shape(scene: Scene, asked: Thing) -> str:
    return asked.shape


def _left(scene: Scene, asked: Thing) -> str:
    return "yes" if 2 * asked.column < side(len(scene)) else "no"


def _top(scene: Scene, asked: Thing) -> str:
    return "yes" if 2 * asked.row < side(len(scene)) else "no"


def _closest(scene: Scene, asked: Thing) -> str:
    return min((thing for thing in scene if thing != asked), key=asked.distance).shape


def _furthest(scene: Scene, asked: Thing) -> str:
    return max(scene, key=asked.distance).shape


def _count(scene: Scene, asked: Thing) -> str:
    return str(sum(thing.shape == asked.shape for thing in scene))


@dataclass(frozen=True)
class Form:
    """A form of question, to be asked about any object."""

    kind: Kind
    text: str
    answer: Callable[[Scene, Thing], str]
    extreme: Callable[[Iterable[float]], float] | None = None
    """For a question about distance, `min` or `max`, whichever decides it; it needs more than one object."""


FORMS = {
    "shape": Form("non-relational", "What shape is the {} object?", _shape),
    "left": Form("non-relational", "Is the {} object on the left?", _left),
    "top": Form("non-relational", "Is the {} object at the top?", _top),
    "closest": Form("relational", "What shape is closest to the {} object?", _closest, extreme=min),
    "furthest": Form("relational", "What shape is furthest from the {} object?", _furthest, extreme=max),
    "count": Form("relational", "How many objects have the shape of the {} object?", _count),
}
"""The six questions, by their subject. A count includes the object that it is asked about."""


@dataclass(frozen=True)
class Asked:
    """A question about a picture."""

    form: str
    text: str
    answer: str
    lead: float | None
    """Pixels by which the closest or furthest object leads the first of the other shape, infinite if there is none;
    None for a question that isn't about distance."""

    @property
    def groups(self) -> dict[str, str]:
        """The groups of its score; leads are in ranges that sort as text, such as `02-04` and `16+`."""
        groups = {"kind": FORMS[self.form].kind, "question": self.form}
        if self.lead is not None:
            low, *high = LEADS[bisect(LEADS, self.lead) - 1 :][:2]
            groups["lead"] = f"{low:02}-{high[0]:02}" if high else f"{low:02}+"
        return groups


def draw_scene(rng: np.random.Generator, objects: int = OBJECTS) -> Scene:
    """Draws objects that don't overlap, for which every question has one right answer."""
    colours = list(COLOURS)
    while True:
        scene: list[Thing] = []
        for number in sorted(rng.permutation(len(colours))[:objects]):
            shape: Shape = "square" if rng.integers(2) else "circle"
            row, column = _free_place(rng, scene, side(objects))
            scene.append(Thing(colours[number], shape, row, column))
        drawn = tuple(scene)
        if not any(_tied(drawn, asked) for asked in drawn):
            return drawn


def _free_place(rng: np.random.Generator, scene: Sequence[Thing], room: int) -> tuple[int, int]:
    while True:
        row, column = rng.integers(RADIUS, room - RADIUS, 2).tolist()
        if all(max(abs(row - thing.row), abs(column - thing.column)) > 2 * RADIUS for thing in scene):
            return row, column


def _tied(scene: Scene, asked: Thing) -> bool:
    """Returns whether objects of both shapes tie as closest or furthest."""
    return any(_lead(scene, form, asked) == 0 for form in FORMS)


def draw_questions(rng: np.random.Generator, scene: Scene) -> list[Asked]:
    """Draws ten relational and ten non-relational questions, or as many as there are, in random order."""
    drawn: list[tuple[str, Thing]] = []
    for kind in KINDS:
        forms = [name for name in _askable(scene) if FORMS[name].kind == kind]
        all_of_kind = [(name, thing) for name in forms for thing in scene]
        drawn += [all_of_kind[number] for number in rng.permutation(len(all_of_kind))[:ASKED]]
    return [ask(scene, *drawn[number]) for number in rng.permutation(len(drawn))]


def close_calls(scene: Scene) -> list[Asked]:
    """Returns all questions about distance in a scene that require objects' places to within a few pixels.

    They are three in ten of the questions about distance in pictures of six objects, and most of those that a trained
    model gets wrong.
    """
    asked = (ask(scene, name, thing) for name in _askable(scene) for thing in scene)
    return [question for question in asked if question.lead is not None and question.lead < CLOSE_CALL]


def _askable(scene: Scene) -> list[str]:
    return [name for name, form in FORMS.items() if len(scene) > 1 or form.extreme is None]


def ask(scene: Scene, form: str, thing: Thing) -> Asked:
    """Returns a question about an object, with its answer."""
    text, answer = FORMS[form].text.format(thing.colour), FORMS[form].answer(scene, thing)
    return Asked(form, text, answer, _lead(scene, form, thing))


def _lead(scene: Scene, form: str, asked: Thing) -> float | None:
    extreme = FORMS[form].extreme
    if extreme is None:
        return None
    distances: dict[str, list[float]] = {}
    for thing in scene:
        if thing != asked:
            distances.setdefault(thing.shape, []).append(asked.distance(thing) ** 0.5)
    if len(distances) < 2:
        return float("inf")
    one, other = (extreme(of_shape) for of_shape in distances.values())
    return abs(one - other)


def render(scene: Scene) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the picture of a scene."""
    pixels = np.full((side(len(scene)), side(len(scene)), 3), GROUND, np.uint8)
    for thing in scene:
        rows, columns = (slice(middle - RADIUS, middle + RADIUS + 1) for middle in (thing.row, thing.column))
        pixels[rows, columns][_MASKS[thing.shape]] = COLOURS[thing.colour]
    return pixels


_OFFSETS = np.arange(-RADIUS, RADIUS + 1) ** 2
_MASKS = {
    "square": np.ones((2 * RADIUS + 1, 2 * RADIUS + 1), bool),
    # The radius plus half a pixel, so that a circle is as wide as a square.
    "circle": _OFFSETS[:, None] + _OFFSETS <= (RADIUS + 0.5) ** 2,
}


def write_shards(
    directory: Path,
    *,
    split: Split,
    count: int,
    seed: int,
    objects: int = OBJECTS,
    kind: Selection | None = None,
    processes: int = 2,
    shard_size: int = 500,
) -> list[Path]:
    """Writes the questions about `count` pictures as webdataset shards, each a PNG with LLaVA's JSON.

    A sample is one question followed by its picture, so that the model knows the question when it reads the patches.
    In its JSON, `groups` are the groups of its score, and `image` identifies samples with the same picture.

    Args:
        directory: The folder of `{split}-00000.tar` and so on, or `{split}-of-{objects}-{kind}-00000.tar` for fewer
            objects and for a single kind.
        split: The use of the samples; no two splits draw the same pictures.
        count: Total number of pictures.
        seed: Seeds the pictures; their bytes don't depend on `processes`.
        objects: Objects in each picture, whose `side` depends on it.
        kind: The questions to ask; None asks both kinds. The pictures are the same, without those that have none.
        processes: Shards written at once.
        shard_size: Pictures of a shard.

    Returns:
        The shards, in order.
    """
    name = split + (f"-of-{objects}" if objects < OBJECTS else "") + (f"-{kind}" if kind else "")
    samples = partial(_samples, split, seed, objects, kind)
    return write_picture_shards(directory, name, samples, count, processes=processes, shard_size=shard_size)


def _samples(
    split: Split, seed: int, objects: int, kind: Selection | None, numbers: range
) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), numbers.start, objects])
    for number in numbers:
        name = f"{split}-of-{objects}-{number:06}"
        scene = draw_scene(rng, objects)
        questions, picture = draw_questions(rng, scene), _png(render(scene))
        if kind == "close-calls":
            # Only after both kinds were drawn, so that the following pictures are the same.
            questions = close_calls(scene)
        for place, question in enumerate(questions):
            if kind in KINDS and question.groups["kind"] != kind:
                continue
            key = f"{name}-{place:02}"
            turn = (f"{question.text}\n<image>", question.answer)
            yield {"__key__": key, "png": picture, "json": conversation(key, name, [turn], groups=question.groups)}


def _png(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
