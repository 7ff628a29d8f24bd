"""Shards of drawn pictures are whole or absent."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fuyu_e2e.tasks.picture_shards import write_picture_shards


def samples(breaks_at: int, numbers: range) -> Iterator[dict[str, Any]]:
    """Draws one-byte pictures; stands for a generator with a mistake that only some pictures show."""
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
