"""Lanes: the order of rows depends on the seed alone."""

import io
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.data.shards.cache import ShardCache
from fuyu_e2e.data.shards.manifest import facts_of
from fuyu_e2e.data.shards.mixture import Source
from fuyu_e2e.data.shards.open_shards import OpenShards
from fuyu_e2e.data.shards.stream import LaneState, Stream, StreamRow, StreamSource
from fuyu_e2e.errors import UserError

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


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ShardCache:
    return ShardCache(tmp_path_factory.mktemp("cache"), 10**9)


Make = Callable[..., Stream]


@pytest.fixture
def stream(shards: tuple[str, ...], builder: SequenceBuilder, cache: ShardCache) -> Make:
    """Makes a stream over the shards, or over several sources with weights."""

    def make(sources: dict[str, tuple[Sequence[str], Any]] | None = None, **changed: Any) -> Stream:
        settings = {"budget": 64, "lanes": 4, "shuffle": 8, "seed": 0, "long_documents": "skip"} | changed
        described = tuple(
            StreamSource(
                name=name, source=Source(list(named), weight), shards=tuple(named), facts=facts_of(named, cache)
            )
            for name, (named, weight) in (sources or {"train": (shards, 1.0)}).items()
        )
        return Stream(sources=described, builder=builder, cache=cache, **settings)

    return make


def keys(rows: Iterable[StreamRow]) -> list[tuple[str, ...]]:
    return [row.keys for row in rows]


def test_an_evaluation_stream_gives_every_document_once_and_counts_the_rest(stream: Make) -> None:
    for lanes in (1, 2, 4, 20):
        rows = list(stream(shuffle=0, lanes=lanes).rows())
        assert sorted(key for row in rows for key in row.keys) == sorted(
            f"{shard}-{number}" for shard in range(SHARDS) for number in range(1, PER_SHARD)
        )
        total = SampleStats()
        for row in rows:
            total.add(row.stats)
        assert total.read == total.used + total.skipped.total() == SHARDS * PER_SHARD
        assert total.used == SHARDS * (PER_SHARD - 1)


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_rows_are_the_same_for_every_number_of_readers(stream: Make, readers: int) -> None:
    alone = keys(islice(stream().rows(), 24))
    parts = [keys(islice(stream().rows(reader, readers), 24 // readers)) for reader in range(readers)]
    assert [parts[index % readers][index // readers] for index in range(24)] == alone


def test_a_stream_continues_from_the_states_of_its_lanes(stream: Make) -> None:
    whole = list(islice(stream().rows(), 60))
    states: dict[int, LaneState] = {}
    for start, row in enumerate(whole[:40]):
        if start % 7 in (0, 1):
            rest = islice(stream().rows(start, 1, states), 12)
            assert keys(rest) == keys(whole[start : start + 12])
        states[row.lane] = row.state


def test_the_order_is_shuffled_by_the_seed_and_changes_with_each_pass(stream: Make) -> None:
    def order(seed: int) -> list[str]:
        return [key for row in islice(stream(seed=seed).rows(), 40) for key in row.keys]

    found = order(0)
    assert order(0) == found
    assert order(1) != found
    first, second = found[:95], found[95:190]
    assert first != second
    assert first != sorted(first)


def test_every_document_comes_about_equally_often(stream: Make) -> None:
    counts = Counter(key for row in islice(stream().rows(), 400) for key in row.keys)
    assert len(counts) == SHARDS * (PER_SHARD - 1)
    # Lanes with longer documents lag behind by a few of them, not by more and more.
    assert max(counts.values()) <= 1.25 * min(counts.values())


def test_readers_that_do_not_divide_the_lanes_are_refused(stream: Make) -> None:
    with pytest.raises(UserError, match=r"data\.lanes is 4.*multiple of 3"):
        next(stream().rows(0, 3))


def test_more_lanes_than_documents_are_refused(stream: Make) -> None:
    with pytest.raises(UserError, match=r"fewer documents than data\.lanes \(101\)"):
        next(stream(lanes=101).rows())


def test_a_lane_without_any_usable_document_ends_with_a_sentence(tmp_path: Path, stream: Make) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("0.txt"))
    said = r"no usable document.*1 skipped \(text-empty 1\); skipped first: text-empty: .*: 0\): mend the shards\.$"
    with pytest.raises(UserError, match=said):
        next(stream({"train": ([str(tmp_path / "bad.tar")], 1.0)}, lanes=1).rows())
    with pytest.raises(UserError, match=r"longer-than-row.*: raise data\.budget, or lower data\.lanes"):
        next(stream(budget=2).rows())


@pytest.mark.parametrize("mix_by", ["tokens", "documents"])
def test_a_mixture_holds_its_shares_and_each_source_its_epochs(
    shards: tuple[str, ...], stream: Make, mix_by: str
) -> None:
    sources = {"long": (shards[:1], 1.0), "rest": (shards[1:], 3.0)}
    mixed = stream(sources, mix_by=mix_by)
    rows = list(islice(mixed.rows(), 200))
    total = SampleStats()
    for row in rows:
        total.add(row.stats)
    drawn = total.tokens_of if mix_by == "tokens" else total.used_of
    assert drawn["long"] / drawn.total() == pytest.approx(0.25, abs=0.01)
    assert total.read == total.read_of.total() >= total.used_of.total() > 0
    # Both sources give all their documents about equally often, the small one more often.
    often = Counter(key for row in rows for key in row.keys)
    small = [count for key, count in often.items() if key.startswith("0-")]
    assert len(often) == SHARDS * (PER_SHARD - 1)
    assert min(small) > max(often[key] for key in often if not key.startswith("0-")) * 0.9


def test_a_mixture_goes_on_from_its_states_and_weights_follow_the_steps(shards: tuple[str, ...], stream: Make) -> None:
    sources = {"early": (shards[:2], {0: 1.0, 10: 0.0}), "late": (shards[2:], {0: 0.0, 10: 1.0})}
    mixed = stream(sources, rows_per_step=4)
    whole = list(islice(mixed.rows(), 80))
    states = {row.lane: row.state for row in whole[:30]}
    assert keys(islice(mixed.rows(30, 1, states), 50)) == keys(whole[30:])

    def share_early(rows: list[StreamRow]) -> float:
        tokens = sum((row.stats.tokens_of for row in rows), Counter())
        return tokens["early"] / tokens.total()

    assert share_early(whole[:4]) > 0.9
    assert 0.2 < share_early(whole[16:24]) < 0.8
    assert share_early(whole[48:]) == 0


def test_a_shard_with_more_documents_than_its_manifest_says_is_refused_each_time(
    shards: tuple[str, ...], cache: ShardCache
) -> None:
    [facts] = facts_of(shards[:1], cache)
    opened = OpenShards(cache)
    for _ in range(2):
        with pytest.raises(UserError, match=f"holds {PER_SHARD} documents, but its manifest says {PER_SHARD - 1}"):
            opened.document(shards[0], replace(facts, documents=PER_SHARD - 1), 0)
