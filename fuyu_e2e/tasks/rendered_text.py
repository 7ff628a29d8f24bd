"""The reading task: words from a list, rendered in many fonts, sizes, colours and angles, to be spelled.

A picture shows one word whose capitals are, or would be, 6 to 40 pixels high. Training starts with `letters`, single
letters of medium height, and continues with `easy` pictures, short training words of that height. Test pictures show
words that no training picture shows, in fonts that no training picture uses (`test`) or in training fonts
(`test-known-fonts`).
"""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from string import ascii_lowercase
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.errors import UserError
from fuyu_e2e.tasks.picture_shards import conversation, jpeg, write_picture_shards

Split = Literal["train", "letters", "easy", "val", "test", "test-known-fonts"]

QUESTION = "Read the word."
VOCAB_SIZE = 320
"""Vocabulary of a tokenizer for this task: bytes, special tokens, and the letters."""
TEST_SEED = 1_000_003
"""Seed of test and validation pictures, the same for every training seed."""
LETTERS = (2, 6)
"""Letters of the shortest and the longest word."""
CAPITALISED = 0.1
"""Fraction of words that start with a capital."""
HEIGHTS = (6, 40)
"""Smallest and largest height of a capital, in pixels."""
EASY_LETTERS, EASY_HEIGHTS = 3, (12, 20)
"""Most letters, and the heights, of words at the start of training: many pictures fit a row, and no letter is tiny."""
BINS = ((6, 7), (8, 9), (10, 12), (13, 16), (17, 22), (23, 30), (31, 40))
"""Ranges of heights that are scored together; test pictures have equally many of each."""
ANGLE = 4.0
"""Largest rotation of a word, in degrees either way."""
CONTRAST = 80
"""Smallest difference in brightness between ink and ground, of 255."""
FONT_FOLDER = Path("/usr/share/fonts")
"""The folder of Debian's font packages."""
STYLES = ("", *(f"-{style}" for style in ("Regular", "Bold", "Italic", "BoldItalic", "Oblique", "BoldOblique")),
          "Bold", "Oblique", "Italic", "BoldOblique", "BoldItalic", "_R", "_RB", "_RI", "_RBI")  # fmt: skip
"""Suffixes of font file names after the family; thin and black weights are left out."""
TRAINING_FONTS = {
    "fonts-dejavu-core": ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono"),
    "fonts-liberation": ("LiberationSans", "LiberationSansNarrow", "LiberationSerif", "LiberationMono"),
    "fonts-freefont-ttf": ("FreeSans", "FreeSerif", "FreeMono"),
    "fonts-lato": ("Lato",),
    "fonts-open-sans": ("OpenSans",),
    "fonts-roboto-unhinted": ("Roboto", "RobotoCondensed"),
    "fonts-crosextra-carlito": ("Carlito",),
    "fonts-inconsolata": ("Inconsolata",),
    "fonts-cantarell": ("Cantarell",),
    "fonts-ebgaramond": ("EBGaramond12",),
    "fonts-linuxlibertine": ("LinLibertine",),
    "fonts-jetbrains-mono": ("JetBrainsMono",),
    "fonts-vollkorn": ("Vollkorn",),
    "fonts-oldstandard": ("OldStandard",),
    "fonts-cabin": ("Cabin",),
    "fonts-sil-charis": ("CharisSIL",),
    "fonts-go": ("Go", "Go-Mono"),
    "fonts-clear-sans": ("ClearSans",),
    "fonts-comic-neue": ("ComicNeue",),
    "fonts-b612": ("B612",),
}
"""Debian packages and their font families for training."""
HELD_OUT_FONTS = {
    "fonts-crosextra-caladea": ("Caladea",),
    "fonts-hack-ttf": ("Hack",),
    "fonts-karla": ("Karla",),
    "fonts-sil-andika": ("Andika",),
    "fonts-averia-serif-gwf": ("AveriaSerifGWF",),
    "fonts-quattrocento": ("Quattrocento",),
    "fonts-play": ("Play",),
}
"""Packages and families that only tests use."""


def find_fonts(split: Split, folder: Path = FONT_FOLDER) -> tuple[Path, ...]:
    """Returns the installed font files of a split, sorted by name.

    Raises:
        UserError: None is installed.
    """
    wanted = HELD_OUT_FONTS if split == "test" else TRAINING_FONTS
    names = {family + style for families in wanted.values() for family in families for style in STYLES}
    found = {path.stem: path for path in sorted(folder.rglob("*.[ot]tf")) if path.stem in names}
    if not found:
        raise UserError(
            f"{folder} holds none of the fonts that {split} pictures are rendered in; on Debian or Ubuntu: apt-get "
            f"install {' '.join(wanted)}."
        )
    return tuple(found[name] for name in sorted(found))


@cache
def load_words(split: Split) -> tuple[str, ...]:
    """Returns the words of a split: by checksum, eight in ten for training, one for validation and one for tests.

    The words of `letters` are the letters of the alphabet.
    """
    if split == "letters":
        return tuple(ascii_lowercase)
    with gzip.open(shipped("data/words/words.txt.gz"), "rt") as file:
        words = [word for word in file.read().split() if LETTERS[0] <= len(word) <= LETTERS[1]]
    part = {"val": (8,), "train": range(8), "easy": range(8)}.get(split, (9,))
    most = EASY_LETTERS if split == "easy" else LETTERS[1]
    return tuple(word for word in words if zlib.crc32(word.encode()) % 10 in part and len(word) <= most)


def height_bin(height: int) -> str:
    """Returns the name of a height's range, such as `08-09`, so that ranges sort as text.

    Raises:
        ValueError: The height is in no range.
    """
    for low, high in BINS:
        if low <= height <= high:
            return f"{low:02}-{high:02}"
    raise ValueError(f"{height} is outside {HEIGHTS[0]} to {HEIGHTS[1]}")


@cache
def sized_font(path: Path, height: int) -> ImageFont.FreeTypeFont:
    """Returns a font at the size, in half points, whose rendered capitals are closest to `height` pixels high."""
    sizes = np.arange(height, 3 * height, 0.5)
    fonts = {float(size): ImageFont.truetype(str(path), float(size)) for size in _around(path, height, sizes)}
    return min(fonts.values(), key=lambda font: abs(capital_height(font) - height))


def _around(path: Path, height: int, sizes: Float[np.ndarray, " sizes"]) -> Float[np.ndarray, " near"]:
    """Returns the sizes near the one that the font's proportions suggest."""
    proportion = capital_height(ImageFont.truetype(str(path), 200)) / 200
    return sizes[np.abs(sizes - height / proportion) <= 1.5]


def capital_height(font: ImageFont.FreeTypeFont) -> int:
    """Returns the height of a rendered H in pixels."""
    box = font.getmask("H").getbbox()
    return box[3] - box[1]


def render(word: str, font: ImageFont.FreeTypeFont, angle: float) -> UInt8[np.ndarray, "h w"]:
    """Returns a word's ink, 0 to 255, rotated by `angle` degrees anticlockwise, with an empty border of one pixel."""
    left, top, right, bottom = font.getbbox(word)
    # Half the letters' height on each side, for rotated words and slanted letters.
    room = 2 + round(bottom - top) // 2
    drawn = Pillow.new("L", (round(right - left) + 2 * room, round(bottom - top) + 2 * room))
    ImageDraw.Draw(drawn).text((room - left, room - top), word, fill=255, font=font)
    turned = drawn.rotate(angle, Pillow.Resampling.BICUBIC, expand=True)
    box = turned.getbbox()
    assert box is not None, f"{font.getname()} has no ink for {word}"
    return np.asarray(turned.crop((box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1)))


def compose(rng: np.random.Generator, ink: UInt8[np.ndarray, "h w"], height: int) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the ink in a colour on a ground with a gradient, with margins of up to half a letter."""
    top, bottom, left, right = rng.integers(0, max(2, height // 2) + 1, 4)
    covered = np.pad(ink, ((top, bottom), (left, right)))[:, :, None].astype(np.float32) / 255
    colour, ground = _colours(rng, *covered.shape[:2])
    pixels = ground + covered * (colour - ground)
    pixels += rng.uniform(0, 8) * rng.standard_normal(pixels.shape, np.float32)
    return pixels.clip(0, 255).astype(np.uint8)


def _colours(
    rng: np.random.Generator, height: int, width: int
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "H W 3"]]:
    """Returns an ink and a ground, either of them darker, with enough contrast at both ends of the gradient."""
    while True:
        ink, start = rng.uniform(0, 255, (2, 3))
        end = (start + rng.uniform(-40, 40, 3)).clip(0, 255)
        apart = [ink.mean() - ground.mean() for ground in (start, end)]
        if min(np.abs(apart)) >= CONTRAST and apart[0] * apart[1] > 0:
            break
    direction = rng.uniform(-1, 1, 2)
    across = direction[0] * np.linspace(0, 1, height)[:, None] + direction[1] * np.linspace(0, 1, width)
    across = (across - across.min()) / max(float(np.ptp(across)), 1e-6)
    ground = start + across[:, :, None] * (end - start)
    return ink.astype(np.float32), ground.astype(np.float32)


@dataclass(frozen=True)
class Rendered:
    """A picture and facts about it."""

    pixels: UInt8[np.ndarray, "H W 3"]
    word: str
    font: str
    height: int
    """Rendered height of a capital, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Describes the pictures of shards."""

    split: Split
    seed: int
    fonts: tuple[Path, ...]

    def sample(self, number: int) -> Rendered:
        """Returns picture number `number`, which depends only on that and the fields."""
        rng = np.random.default_rng([self.seed, zlib.crc32(self.split.encode()), number])
        words = load_words(self.split)
        word = words[rng.integers(len(words))]
        if rng.random() < CAPITALISED:
            word = word.capitalize()
        trained_on = {"train": HEIGHTS, "letters": EASY_HEIGHTS, "easy": EASY_HEIGHTS}
        low, high = trained_on.get(self.split, BINS[number % len(BINS)])
        while True:
            path = self.fonts[rng.integers(len(self.fonts))]
            font = sized_font(path, int(np.exp(rng.uniform(*np.log([low, high + 1])))))
            height = capital_height(font)
            if low <= height <= high:  # hinting may keep a font from a height
                break
        pixels = compose(rng, render(word, font, float(rng.uniform(-ANGLE, ANGLE))), height)
        return Rendered(pixels, word, path.stem, height)


def write_shards(
    directory: Path, pictures: Pictures, count: int, *, processes: int = 2, shard_size: int = 2_500
) -> list[Path]:
    """Writes `count` pictures as webdataset shards, each a JPEG with LLaVA's JSON.

    The JSON's `groups` are the range of the letters' height in pixels, and the font.

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
        rendered = pictures.sample(number)
        key = f"{pictures.split}-{number:06}"
        groups = {"height": height_bin(rendered.height), "font": rendered.font}
        described = conversation(key, key, [(f"<image>\n{QUESTION}", rendered.word)], groups=groups)
        yield {"__key__": key, "jpg": jpeg(rendered.pixels), "json": described}
