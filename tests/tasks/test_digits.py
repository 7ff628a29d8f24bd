"""The digits task: a picture shows what its truth says, and nothing leaks between splits."""

import hashlib
import json
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.tasks.digits import (
    HEIGHTS,
    WIDTHS,
    Scans,
    compose,
    draw_size,
    is_new_size,
    lay_out,
    load_scans,
    possible_lines,
    write_shards,
)


def test_the_shipped_scans_are_those_the_readme_names() -> None:
    digest = hashlib.sha256(shipped("data/digits/digits.csv.gz").read_bytes()).hexdigest()
    assert digest in shipped("data/digits/README.md").read_text()


def test_splits_share_no_scan_and_make_up_the_whole() -> None:
    splits = [load_scans(split) for split in ("train", "val", "test")]  # type: ignore[arg-type]
    assert [len(scans.labels) for scans in splits] == [1_497, 150, 150]
    together = {scan.tobytes() for scans in splits for scan in scans.pixels}
    assert len(together) == sum(len({scan.tobytes() for scan in scans.pixels}) for scans in splits) == 1_797
    assert all(set(scans.labels.tolist()) == set(range(10)) for scans in splits)
    assert load_scans("test-new-sizes").pixels is not load_scans("train").pixels
    assert (load_scans("test-new-sizes").labels == load_scans("test").labels).all()


@given(seed=st.integers(0, 10_000), digits=st.integers(1, 4), new_sizes=st.booleans())
def test_digits_stand_inside_apart_and_in_reading_order(seed: int, digits: int, new_sizes: bool) -> None:
    rng = np.random.default_rng(seed)
    height, width = draw_size(rng, digits, new_sizes)
    assert is_new_size(height, width) == new_sizes
    assert HEIGHTS[0] <= height <= HEIGHTS[1]
    assert WIDTHS[0] <= width <= WIDTHS[1]
    boxes = lay_out(rng, digits, height, width)
    assert len(boxes) == digits
    for box in boxes:
        assert 0 <= box.left <= box.left + box.width <= width
        assert 0 <= box.top <= box.top + box.height <= height
        assert box.height >= 12
    for before, after in pairwise(boxes):
        beside = before.left + before.width <= after.left
        below = before.top + before.height <= after.top
        assert beside or below, "a digit overlaps the one read before it"


def test_sizes_held_out_are_about_one_in_five_and_within_the_trained_range() -> None:
    sizes = [(height, width) for height in range(16, 65) for width in range(16, 129)]
    assert 0.15 < np.mean([is_new_size(*size) for size in sizes]) < 0.25
    for digits in (1, 4):
        assert possible_lines(digits, 64, 128)
    assert not possible_lines(4, 16, 16)


@pytest.mark.parametrize("warp", [False, True])
def test_a_picture_shows_the_scans_its_truth_names(warp: bool) -> None:
    """Scans that are their own label: digit d is a square of d x d pixels, so ink tells them apart."""
    pixels = np.zeros((10, 8, 8), np.uint8)
    for digit in range(10):
        pixels[digit, 4 - digit // 2 : 4 + digit // 2, 4 - digit // 2 : 4 + digit // 2] = 16
    scans = Scans(pixels, np.arange(10, dtype=np.uint8))
    inks: dict[str, list[float]] = {}
    for seed in range(300):
        picture, truth = compose(np.random.default_rng(seed), scans, 1, 24, 24, warp)
        grey = picture.astype(float).mean(axis=2)
        inks.setdefault(truth, []).append(float((grey < (grey.min() + grey.max()) / 2).mean()) if truth > "3" else 0.0)
    means = [np.mean(inks[digit]) for digit in ("4", "6", "8")]
    assert means == sorted(means)
    assert means[0] > 0


def test_shards_are_the_same_for_any_number_of_processes_and_plain_webdataset_reads_them(
    tmp_path: Path, counts: dict[str, tuple[float | None, float]]
) -> None:
    written = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        paths = write_shards(folder, split="train", count=25, seed=3, processes=processes, shard_size=10)
        written[processes] = [path.read_bytes() for path in paths]
        assert counts.pop("Drawing train") == (25, 25)
    assert written[1] == written[2]
    assert len(written[1]) == 3
    samples = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False).decode("pil"))
    assert [sample["json"]["id"] for sample in samples] == [f"train-{number:06}" for number in range(25)]
    assert {len(sample["json"]["conversations"][1]["value"]) for sample in samples} == {1, 2, 3, 4}
    assert samples[0]["jpg"].mode == "RGB"


def test_other_seeds_and_splits_are_other_pictures(tmp_path: Path) -> None:
    def truths(split: str, seed: int) -> list[str]:
        (path,) = write_shards(tmp_path, split=split, count=20, seed=seed)  # type: ignore[arg-type]
        with tarfile.open(path) as tar:
            members = [tar.extractfile(member).read() for member in tar if member.name.endswith("json")]  # type: ignore[union-attr]
        return [json.loads(member)["conversations"][1]["value"] for member in members]

    assert truths("train", 0) == truths("train", 0)
    assert truths("train", 0) != truths("train", 1)
    assert truths("val", 0) != truths("test", 0)
