"""Shards of drawn pictures are whole or absent, and mistakes of a generator are told before they are written."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fuyu_e2e.errors import UserError
from fuyu_e2e.tasks.picture_shards import conversation, write_picture_shards


def samples(breaks_at: int, numbers: range) -> Iterator[dict[str, Any]]:
    """Draws one-byte pictures; like a generator with a mistake that only some pictures show."""
    for number in numbers:
        if number == breaks_at:
            raise ZeroDivisionError
        yield {"__key__": f"{number:03}", "jpg": bytes([number])}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_shard_whose_generator_breaks_is_absent(tmp_path: Path, processes: int) -> None:
    folder = tmp_path / "new/shards"
    with pytest.raises(ZeroDivisionError):
        write_picture_shards(folder, "train", partial(samples, 3), 4, processes=processes, shard_size=2)
    assert [path.name for path in folder.iterdir()] == ["train-00000.tar"]
    paths = write_picture_shards(folder, "train", partial(samples, -1), 4, processes=processes, shard_size=2)
    assert sorted(folder.iterdir()) == paths == [folder / f"train-0000{number}.tar" for number in range(2)]


@pytest.mark.parametrize(
    ("drawn", "told"),
    [
        ([{"jpg": b""}], "train-00000: a sample's __key__ is None, but must be text"),
        ([{"__key__": 3, "jpg": b""}], "a sample's __key__ is 3, but must be text"),
        ([{"__key__": "a.b", "jpg": b""}], "'a.b', but must be text without dots and slashes"),
        ([{"__key__": "a/b", "jpg": b""}], "'a/b', but must be text without dots and slashes"),
        ([{"__key__": "a", "jpg": b""}] * 2, "train-00000: two samples have the __key__ 'a'"),
        ([{"__key__": "a", "jpg": b"", "txt": "red"}], "train-00000: txt of sample a is of type str"),
    ],
)
def test_a_sample_that_could_not_be_read_back_is_told(tmp_path: Path, drawn: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(UserError, match=told):
        write_picture_shards(
            tmp_path, "train", lambda numbers: map(dict, drawn), len(drawn), processes=1, shard_size=len(drawn)
        )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("turns", [("how many?", "3"), [("how many?", 3)], [("how many?",)], ["no"]])
def test_turns_that_are_no_pairs_of_texts_are_told(turns: Any) -> None:
    with pytest.raises(UserError, match=r"train-3: a turn is .*, but must be a question and its answer, both text"):
        conversation.__wrapped__("train-3", "train-3.jpg", turns)  # without the tests' own check of types


def test_processes_need_samples_that_can_be_pickled(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"2 processes can't draw train by .*: make it functools\.partial of a function"
    ):
        write_picture_shards(tmp_path, "train", lambda numbers: iter([]), 4, processes=2, shard_size=2)
