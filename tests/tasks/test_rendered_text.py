"""The reading task: a word lies whole in its picture, as high as its bin says, and nothing leaks between splits."""

import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow
from PIL import ImageDraw

from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.errors import UserError
from fuyu_e2e.tasks import rendered_text
from fuyu_e2e.tasks.rendered_text import (
    ANGLE,
    BINS,
    HEIGHTS,
    HELD_OUT_FONTS,
    TRAINING_FONTS,
    Pictures,
    find_fonts,
    height_bin,
    load_words,
    render,
    sized_font,
    write_shards,
)

if (matplotlib := find_spec("matplotlib")) is None or not matplotlib.submodule_search_locations:
    pytest.skip("matplotlib's DejaVu fonts are missing: pip install matplotlib", allow_module_level=True)
FOLDER = Path(matplotlib.submodule_search_locations[0]) / "mpl-data" / "fonts"
FONTS = find_fonts("train", FOLDER)
SPLITS = ("train", "val", "test", "test-known-fonts")


def test_the_shipped_words_are_those_the_readme_names() -> None:
    digest = hashlib.sha256(shipped("data/words/words.txt.gz").read_bytes()).hexdigest()
    assert digest in shipped("data/words/README.md").read_text()
    assert "without fee" in shipped("data/words/LICENSE").read_text()


def test_words_and_fonts_of_tests_are_none_of_training(tmp_path: Path) -> None:
    words = {split: set(load_words(split)) for split in SPLITS}  # type: ignore[arg-type]
    assert words["test"] == words["test-known-fonts"]
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not words[one] & words[other]
    assert set(load_words("easy")) < words["train"]
    assert "".join(load_words("letters")) == "abcdefghijklmnopqrstuvwxyz"
    assert 0.75 < len(words["train"]) / len(words["train"] | words["val"] | words["test"]) < 0.85

    for packages in (TRAINING_FONTS, HELD_OUT_FONTS):
        for family in (family for families in packages.values() for family in families):
            (tmp_path / f"{family}-Bold.ttf").touch()
            (tmp_path / f"{family}-Thin.ttf").touch()
    trained, held_out = (set(find_fonts(split, tmp_path)) for split in ("train", "test"))  # type: ignore[arg-type]
    assert trained
    assert held_out
    assert not trained & held_out
    assert len(trained | held_out) == len(list(tmp_path.glob("*-Bold.ttf")))


def test_missing_fonts_are_named_by_the_packages_that_have_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"apt-get install .*fonts-hack-ttf"):
        find_fonts("test", tmp_path)


@given(
    word=st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8),
    capital=st.booleans(),
    path=st.sampled_from(FONTS),
    height=st.integers(*HEIGHTS),
    angle=st.floats(-ANGLE, ANGLE),
)
def test_a_word_is_rendered_whole(word: str, capital: bool, path: Path, height: int, angle: float) -> None:
    """Cut from a far larger sheet that is turned likewise, it is the same, with an empty pixel around it."""
    word = word.capitalize() if capital else word
    font = sized_font(path, height)
    ink = render(word, font, angle).astype(int)
    left, top, right, bottom = font.getbbox(word)
    room = 200  # alike on all sides, so that pixels lie as far from the centre of the turn
    sheet = Pillow.new("L", (round(right - left) + 2 * room, round(bottom - top) + 2 * room))
    ImageDraw.Draw(sheet).text((room - left, room - top), word, fill=255, font=font)
    turned = sheet.rotate(angle, Pillow.Resampling.BICUBIC, expand=True)
    whole = np.pad(np.asarray(turned.crop(turned.getbbox()), int), 1)
    assert ink.shape == whole.shape
    assert np.abs(ink - whole).max() <= 1  # the centre's coordinates are rounded


@given(number=st.integers(0, 10_000), split=st.sampled_from(["train", "val", "test"]))
def test_the_height_of_a_sample_is_that_of_its_letters(number: int, split: str) -> None:
    """Counted in pictures that show nothing but an upright H, black on white."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendered_text, "load_words", lambda split: ("H",))
        patch.setattr(rendered_text, "ANGLE", 0.0)
        patch.setattr(rendered_text, "_colours", lambda rng, h, w: (np.zeros(3), np.full((h, w, 3), 255.0)))
        rendered = Pictures(split=split, seed=3, fonts=FONTS).sample(number)  # type: ignore[arg-type]
    dark = int((rendered.pixels.mean(axis=2) < 160).any(axis=1).sum())
    assert abs(dark - rendered.height) <= 1
    low, high = BINS[number % len(BINS)] if split != "train" else HEIGHTS
    assert low <= rendered.height <= high
    bounds = [int(bound) for bound in height_bin(rendered.height).split("-")]
    assert bounds[0] <= rendered.height <= bounds[1]


@given(number=st.integers(0, 10_000), split=st.sampled_from(SPLITS))
def test_a_sample_shows_a_word_of_its_split_with_margins_of_half_a_letter_at_most(number: int, split: str) -> None:
    rendered = Pictures(split=split, seed=3, fonts=FONTS).sample(number)  # type: ignore[arg-type]
    assert rendered.word.lower() in load_words(split)  # type: ignore[arg-type]
    assert rendered.pixels.shape[0] <= 4 * rendered.height + 8


@given(number=st.integers(0, 10_000))
def test_ink_and_ground_can_be_told_apart(number: int) -> None:
    pixels = Pictures(split="train", seed=1, fonts=FONTS).sample(number).pixels
    grey = np.sort(pixels.astype(float).mean(axis=2), axis=None)
    assert grey[-len(grey) // 100 - 1] - grey[len(grey) // 100] > 30


def test_shards_hold_one_question_each_and_are_the_same_written_anew(tmp_path: Path) -> None:
    written = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        pictures = Pictures(split="test", seed=3, fonts=FONTS[:2])
        pictures.sample(len(written))
        paths = write_shards(folder, pictures, 21, processes=1, shard_size=8)
        written.append([path.read_bytes() for path in paths])
    assert written[0] == written[1]
    assert len(paths) == 3
    samples = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False).decode("pil"))
    about = [sample["json"] for sample in samples]
    assert [one["groups"]["height"] for one in about[:7]] == [f"{low:02}-{high:02}" for low, high in BINS]
    assert len({one["image"] for one in about}) == 21
    assert all(len(one["conversations"]) == 2 for one in about)
