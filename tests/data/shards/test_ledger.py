"""A ledger over two epochs: stopped 20 times, on other workers and processes each time, nothing is lost or doubled."""

import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fuyu_e2e.data import row_loader
from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.data.packing import PackedRow
from fuyu_e2e.data.row_loader import RowDataset, RowLoader
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.mixture import Climb, Source
from fuyu_e2e.data.shards.order import Order
from fuyu_e2e.data.tokenizer import Tokenizer

SHARDS, PER_SHARD, LANES, ROWS_PER_STEP, STOPS = 6, 120, 12, 6, 20
BAD = {(shard, 7) for shard in range(SHARDS)}


@pytest.fixture
def data(tmp_path: Path, tokenizer: Tokenizer) -> FuyuDataModule:
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(PER_SHARD):
                words = " ".join(rng.choice(["red", "square", "4072", "digits"], rng.integers(1, 8)))
                content = b"" if (shard, number) in BAD else words.encode()
                info = tarfile.TarInfo(f"{shard}-{number}.txt")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    tokenizer.save(tmp_path / "tokenizer.model")
    return FuyuDataModule(
        str(tmp_path / "tokenizer.model"), 4, train=str(tmp_path), budget=96, lanes=LANES, shuffle=32, seed=5
    )


def digest(row: PackedRow) -> str:
    parts = (getattr(row.batch, field.name) for field in fields(row.batch))
    content = b"".join(part.numpy().tobytes() for part in parts if isinstance(part, torch.Tensor))
    return hashlib.sha256(content + repr(row.keys).encode()).hexdigest()


class Processes:
    """Loaders of several processes, side by side in this one."""

    def __init__(self, data: FuyuDataModule, count: int, workers: int, state: dict[str, Any] | None) -> None:
        self.steps = 0
        self.begun = state["rows"] // count if state else 0
        stream = data.stream("train")
        self.loaders = [
            RowLoader(
                RowDataset(stream, rank, count),
                lambda: self.begun + self.steps * ROWS_PER_STEP // count,
                batch_size=None,
                num_workers=workers,
            )
            for rank in range(count)
        ]
        for loader in self.loaders:
            if state:
                loader.load_state_dict(state)

    def rows(self) -> Iterator[PackedRow]:
        """The rows of all, in global order; one more of each is fetched ahead, as Lightning does."""
        streams = [iter(loader) for loader in self.loaders]
        ahead = [next(stream) for stream in streams]
        while True:
            for rank, stream in enumerate(streams):
                row, ahead[rank] = ahead[rank], next(stream)
                yield row

    def state_dict(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """What process 0 saves, having gathered from all."""
        own: list[Any] = []

        def ask(mine: Any) -> list[Any]:
            own.append(mine)
            return [(0, {})]

        for gather in (ask, lambda mine: own):
            monkeypatch.setattr(row_loader, "all_ranks", gather)
            saved = [loader.state_dict() for loader in self.loaders]
        return saved[0]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
def test_stopped_twenty_times_the_batches_are_those_of_one_uninterrupted_run(
    data: FuyuDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    whole: list[PackedRow] = []
    uninterrupted = Processes(data, 1, 0, None).rows()
    read = Counter[str]()
    while min(read.values(), default=0) < 2 or len(read) < SHARDS * PER_SHARD - len(BAD):
        whole += [next(uninterrupted) for _ in range(ROWS_PER_STEP)]
        read = Counter(key for row in whole for key in row.keys)
    steps = len(whole) // ROWS_PER_STEP
    stops = [*sorted(rng.choice(np.arange(1, steps), STOPS, replace=False).tolist()), steps]
    seen: list[str] = []
    state: dict[str, Any] | None = None
    used = set()
    for number, stop in enumerate(stops):
        count, workers = [(1, 0), (2, 3), (1, 1), (2, 0), (1, 3), (2, 1)][number % 6]
        used.add((count, workers))
        processes = Processes(data, count, workers, state)
        rows = processes.rows()
        while len(seen) < stop * ROWS_PER_STEP:
            seen += [digest(next(rows)) for _ in range(ROWS_PER_STEP)]
            processes.steps += 1
        state = processes.state_dict(monkeypatch)
        # Killed within the next step: its rows were read, and are read again.
        for _ in range(int(rng.integers(0, ROWS_PER_STEP))):
            next(rows)
    assert len(used) == 6
    assert seen == [digest(row) for row in whole]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
def test_on_any_processes_and_workers_a_climb_gives_the_rows_of_a_stream_that_knew_of_it(
    data: FuyuDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Climbs after steps 3 and 4, and stops after some steps, before or after the climb."""
    weights = ({0: 1.0, 1: 0.0, 2: 1.0}, {0: 0.0, 1: 1.0, 2: 3.0})
    halves = ([0, 1, 2], [3, 4, 5])
    data.mixture = {
        name: Source([f"{tmp_path}/{shard}.tar" for shard in shards], weight)
        for name, shards, weight in zip("ab", halves, weights, strict=True)
    }
    mixed = replace(data.stream("train"), rows_per_step=ROWS_PER_STEP, climb=Climb("val/loss", [1.0, 1.0]))
    monkeypatch.setattr(data, "stream", lambda split: mixed)
    knew = replace(mixed, climbed=(3 * ROWS_PER_STEP, 4 * ROWS_PER_STEP)).rows()
    expected = [digest(next(knew)) for _ in range(8 * ROWS_PER_STEP)]
    for count, workers, stops in [(1, 3, ()), (2, 3, (3, 4)), (1, 0, (5,)), (2, 0, (2, 3, 6))]:
        processes = Processes(data, count, workers, None)
        rows, seen = processes.rows(), []
        for step in range(1, 9):
            seen += [digest(next(rows)) for _ in range(ROWS_PER_STEP)]
            processes.steps += 1
            if step in (3, 4):
                for loader in processes.loaders:
                    loader.climb(step * ROWS_PER_STEP // count)
            if step in stops:  # goes on with as many workers on the other number of processes
                count = 3 - count
                processes = Processes(data, count, workers, processes.state_dict(monkeypatch))
                rows = processes.rows()
        assert seen == expected


@pytest.mark.parametrize("rows", [1, 40, 41, 150])
def test_at_any_moment_each_document_was_used_or_skipped_or_waits_once_an_epoch(
    data: FuyuDataModule, rows: int
) -> None:
    """In every lane: the documents of the first so many places are those used, those skipped and those that wait."""
    stream = data.stream("train")
    used: dict[int, Counter[str]] = {lane: Counter() for lane in range(LANES)}
    states, all_stats = {}, {lane: SampleStats() for lane in range(LANES)}
    for number, row in enumerate(stream.rows()):
        if number == rows:
            break
        used[row.lane].update(row.keys)
        states[row.lane] = row.state
        all_stats[row.lane].add(row.stats)
    for lane, state in states.items():
        order = Order([PER_SHARD] * SHARDS, lane=lane, lanes=LANES, window=32, seed=5)
        drawn = [order.place(position) for position in range(state.positions[0])]
        expected = Counter(f"{shard}-{number}" for shard, number in drawn if (shard, number) not in BAD)
        waiting = Counter("-".join(map(str, order.place(position))) for _, position in state.waiting)
        assert used[lane] + waiting == expected
        assert all_stats[lane].skipped.total() == sum(place in BAD for place in drawn)
        assert all_stats[lane].read == len(drawn)
        assert all_stats[lane].used == used[lane].total()


def test_a_lanes_state_is_a_few_kilobytes(data: FuyuDataModule) -> None:
    data.budget = 512
    row = next(iter(data.stream("train").rows()))
    assert len(row.state.waiting) > 150
    assert len(repr(row.state)) < 4_096
