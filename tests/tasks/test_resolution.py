"""The resolution task: a scene is the same at all sizes, and sizes held out are in no training picture."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from fuyu_e2e.tasks.digits import load_scans
from fuyu_e2e.tasks.resolution import (
    ASPECT,
    LONGEST,
    PROPORTION,
    SHORTEST,
    TEST_SIZES,
    Pictures,
    Scene,
    draw,
    draw_scene,
    draw_size,
    is_trained,
    write_shards,
)

SIDES = st.integers(SHORTEST, 160)


@given(seed=st.integers(0, 10_000), longest=st.sampled_from([LONGEST, 160]))
def test_sizes_to_train_on_are_none_of_those_held_out(seed: int, longest: int) -> None:
    height, width = draw_size(np.random.default_rng(seed), longest)
    assert is_trained(height, width, longest) == "yes"
    assert min(height, width) >= SHORTEST
    assert max(height, width) <= longest
    assert max(height, width) / min(height, width) <= PROPORTION


def test_sizes_to_score_are_of_all_kinds_and_a_fifth_is_held_out_between() -> None:
    kinds = [is_trained(*size) for size in TEST_SIZES]
    assert all(kinds.count(kind) >= 4 for kind in ("yes", "between", "beyond"))  # type: ignore[arg-type]
    assert len(set(TEST_SIZES)) == len(TEST_SIZES)
    sides = range(SHORTEST, LONGEST + 1)
    assert 0.1 < np.mean([is_trained(*size) == "between" for size in product(sides, sides)]) < 0.3
    assert is_trained(LONGEST, LONGEST + 1) == "beyond"


@given(seed=st.integers(0, 10_000), height=SIDES, width=SIDES)
def test_a_digit_stands_whole_in_the_picture_as_high_as_the_scene_says(seed: int, height: int, width: int) -> None:
    """Whole: of the same picture with a margin around it, next to no ink is in the margin."""
    scene = replace(draw_scene(np.random.default_rng(seed), load_scans("test"), warp=False), noise=0.0)
    ink = _ink(scene, height, width)
    rows, cols = np.nonzero(ink > 0.3)
    tall = scene.tall * min(height, width)
    assert 0.5 * tall <= rows.max() - rows.min() + 1 <= 1.1 * tall + 2
    assert cols.max() - cols.min() + 1 <= 1.1 * ASPECT * tall + 2

    margin = 20
    sides, digit = np.array([height, width]), np.array([tall, tall * ASPECT])
    place = (np.array(scene.place) * (sides - digit) + margin) / (sides + 2 * margin - digit)
    within = replace(scene, place=tuple(place.tolist()), tall=tall / (min(height, width) + 2 * margin))
    roomy = _ink(within, height + 2 * margin, width + 2 * margin)
    inside = roomy[margin:-margin, margin:-margin]
    # A colour is a whole number, of 75 at least from the ground's to the ink's.
    np.testing.assert_allclose(inside, ink, atol=1 / 75)
    assert roomy[roomy > 0.05].sum() <= 1.05 * inside[inside > 0.05].sum()


def _ink(scene: Scene, height: int, width: int) -> np.ndarray:
    """How far each pixel is on the way from ground to ink."""
    pixels = draw(scene, height, width, np.random.default_rng(0)).astype(float)
    ground, ink = np.array(scene.ground), np.array(scene.ink)
    return ((pixels - ground) @ (ink - ground)) / ((ink - ground) @ (ink - ground))


@given(number=st.integers(0, 1_000))
def test_a_scene_drawn_larger_and_scaled_down_is_the_scene_drawn_smaller(number: int) -> None:
    small, large = (Pictures(split="test", seed=1, size=size).sample(number) for size in ((36, 60), (108, 180)))
    assert small[1].label == large[1].label
    scaled = np.asarray(Pillow.fromarray(large[2]).resize((60, 36), Pillow.Resampling.BOX), float)
    assert np.abs(scaled - small[2]).mean() < 12


def test_squashed_pictures_are_square_and_their_scenes_and_sizes_the_same() -> None:
    for number in range(5):
        size, scene, pixels = Pictures(split="train", seed=0, square=64).sample(number)
        native_size, native_scene, native = Pictures(split="train", seed=0).sample(number)
        assert pixels.shape == (64, 64, 3)
        assert native.shape[:2] == native_size == size
        assert scene.label == native_scene.label


def test_shards_name_the_size_of_each_picture_and_are_the_same_written_anew(tmp_path: Path) -> None:
    written = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        pictures = Pictures(split="test", seed=3)
        pictures.sample(len(written))
        paths = write_shards(folder, "pictures", pictures, 12, processes=1, shard_size=5)
        written.append([path.read_bytes() for path in paths])
    assert written[0] == written[1]
    samples = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False).decode("pil"))
    assert [sample["json"]["image"] for sample in samples] == [f"test-{number:06}" for number in range(12)]
    for sample in samples:
        width, height = sample["jpg"].size
        assert sample["json"]["groups"] == {"size": f"{height}x{width}", "trained": is_trained(height, width)}
