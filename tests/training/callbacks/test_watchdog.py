"""A run that makes no progress ends by itself, and each rank's log says where it was."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from fuyu_e2e.errors import UserError
from fuyu_e2e.training.callbacks.watchdog import Watchdog


def test_a_hang_on_one_rank_ends_all_with_their_stacks(
    guarded_runs: Callable[..., tuple[Path, dict[str, Any]]],
) -> None:
    """Rank 1 hangs by itself, rank 0 in the collective where it waits for the other."""
    folder, results = guarded_runs({"name": "hang", "hang": True, "ranks": [1], "steps": [2], "limit_from_there": 3.0})
    waiting, hanging = ((folder / "hang" / f"{rank}.log").read_text() for rank in range(2))
    assert results["hang"]["codes"] == [4, 4], waiting + hanging
    for rank, log in enumerate((waiting, hanging)):
        assert f"rank {rank} made no step in 3 s (watchdog.limit) after step 2" in log
    assert "guarded_runs.py" in hanging.split("watchdog.limit")[1]
    assert "on_train_batch_start" in hanging.split("watchdog.limit")[1]
    assert "torch/" in waiting.split("watchdog.limit")[1]


class Looks(threading.Event):
    """What the thread waits with: nothing, but for what a test does at each look."""

    def __init__(self, at_look: Callable[[int], Any], looks: int) -> None:
        super().__init__()
        self.at_look, self.looks, self.looked = at_look, looks, 0

    def wait(self, timeout: float | None = None) -> bool:
        self.looked += 1
        self.at_look(self.looked)
        return self.looked == self.looks


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes of processes that would have ended."""
    left: list[int] = []
    monkeypatch.setattr("os._exit", left.append)
    return left


def test_a_process_that_was_stopped_for_longer_than_the_limit_is_not_ended(left: list[int]) -> None:
    """Ctrl-Z: the time in which nothing could move counts as one look."""
    Watchdog(0.1)._watch(0.1, Looks(lambda look: time.sleep(0.2 if look == 3 else 0), looks=10))
    assert left == []


def test_as_long_as_rows_are_trained_or_validated_nothing_ends(left: list[int]) -> None:
    watch = Watchdog(0.1)

    def rows(look: int) -> None:
        if look % 15 == 0:
            watch.on_validation_batch_end(pl.Trainer(accelerator="cpu", logger=False), pl.LightningModule())

    watch._watch(0.1, Looks(rows, looks=100))
    assert left == []
    watch._watch(0.1, Looks(lambda look: None, looks=100))
    assert left == [4]


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_bad_limits(limit: float) -> None:
    with pytest.raises(UserError, match=r"watchdog\.limit is"):
        Watchdog(limit)
