"""Lanes: the order of rows depends on the seed alone."""

import io
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from fuyu_e2e.errors import UserError
from fuyu_e2e.sequence import SequenceBuilder
from fuyu_e2e.shards.stream import Stream
from fuyu_e2e.tally import Tally

SHARDS, PER_SHARD = 5, 20


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(PER_SHARD):
                data = f"sample {shard} {number}".encode() if number else b""
                info = tarfile.TarInfo(f"{shard}-{number}.txt")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return tuple(str(folder / f"{shard}.tar") for shard in range(SHARDS))


def stream(shards: tuple[str, ...], builder: SequenceBuilder, **changed: int) -> Stream:
    settings = {"budget": 64, "lanes": 4, "shuffle": 8, "seed": 0} | changed
    return Stream(shards=shards, builder=builder, long_documents="skip", **settings)


def keys(rows: list) -> list[tuple[str, ...]]:
    return [row.keys for row in rows]


def test_an_evaluation_stream_gives_every_document_once_and_counts_the_rest(
    shards: tuple[str, ...], builder: SequenceBuilder
) -> None:
    for lanes in (1, 2, 4, 20):
        rows = list(stream(shards, builder, shuffle=0, lanes=lanes).rows())
        assert sorted(key for row in rows for key in row.keys) == sorted(
            f"{shard}-{number}" for shard in range(SHARDS) for number in range(1, PER_SHARD)
        )
        total = Tally()
        for row in rows:
            total.add(row.tally)
        assert total.read == total.used + total.skipped.total()
        assert total.used == SHARDS * (PER_SHARD - 1)


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_rows_are_the_same_for_every_number_of_readers(
    shards: tuple[str, ...], builder: SequenceBuilder, readers: int
) -> None:
    alone = keys(list(islice(stream(shards, builder).rows(), 24)))
    parts = [
        keys(list(islice(stream(shards, builder).rows(reader, readers), 24 // readers))) for reader in range(readers)
    ]
    assert [parts[index % readers][index // readers] for index in range(24)] == alone


def test_a_stream_continues_where_it_stopped(shards: tuple[str, ...], builder: SequenceBuilder) -> None:
    whole = keys(list(islice(stream(shards, builder).rows(), 30)))
    for start in (0, 1, 13):
        assert keys(list(islice(stream(shards, builder).rows(start=start), 30 - start))) == whole[start:]


def test_the_order_is_shuffled_by_the_seed_and_changes_with_each_pass(
    shards: tuple[str, ...], builder: SequenceBuilder
) -> None:
    def order(seed: int) -> list[str]:
        return [key for row in islice(stream(shards, builder, seed=seed).rows(), 200) for key in row.keys]

    assert order(0) == order(0)
    assert order(0) != order(1)
    first, second = order(0)[:95], order(0)[95:190]
    assert first != second
    assert first != sorted(first)


def test_every_document_comes_about_equally_often(shards: tuple[str, ...], builder: SequenceBuilder) -> None:
    counts = Counter(key for row in islice(stream(shards, builder).rows(), 1_000) for key in row.keys)
    assert len(counts) == SHARDS * (PER_SHARD - 1)
    assert max(counts.values()) < 1.6 * min(counts.values())


def test_readers_that_do_not_divide_the_lanes_are_refused(shards: tuple[str, ...], builder: SequenceBuilder) -> None:
    with pytest.raises(UserError, match=r"data\.lanes is 4.*multiple of 3"):
        stream(shards, builder).rows(0, 3)


def test_a_lane_without_any_usable_document_ends_with_a_sentence(tmp_path: Path, builder: SequenceBuilder) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("0.txt"))
    with pytest.raises(UserError, match=r"no usable document.*1 skipped \(text-empty 1\)"):
        next(stream((str(tmp_path / "bad.tar"),), builder, lanes=1).rows())
