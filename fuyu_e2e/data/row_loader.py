"""The loader of packed rows, which Lightning can stop and resume."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from fuyu_e2e.data.packing import PackedRow, empty_row
from fuyu_e2e.data.shards.manifest import VERSION
from fuyu_e2e.data.shards.stream import LaneState, Stream, StreamRow
from fuyu_e2e.distributed import all_ranks
from fuyu_e2e.errors import STOP_SIGNALS, UserError

RULES = "rules"
"""The key of a checkpoint for the version of the rules by which samples count as documents."""
NOT_SET = "not set"
"""What a checkpoint says, or an earlier one means, of a setting that the run doesn't have."""


def leave_signals_to_the_trainer(worker: int) -> None:
    """Keeps a loader's worker running when a signal goes to all processes of a run, as Ctrl-C and SLURM's do.

    The trainer still needs its rows to finish the step. Only SIGTERM from its parent ends a worker, at once: torch's
    loader ends its workers that way. If the sender can't be determined (macOS), every SIGTERM ends it.
    """
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_leave_for, args=(os.getppid(),), daemon=True).start()


def _leave_for(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class RowDataset(IterableDataset):
    """The rows of one process, distributed over its workers so that their order is that of a single worker."""

    def __init__(self, stream: Stream, rank: int, world_size: int) -> None:
        self.stream = stream
        self.rank = rank
        self.world_size = world_size
        self.start = 0
        """Rows of this process to skip, since they were read before."""
        self.states: dict[int, LaneState] = {}
        """The state of each lane after those rows."""

    def __iter__(self) -> Iterator[StreamRow]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        first = (self.start + worker) * self.world_size + self.rank
        return self.stream.rows(first, self.world_size * workers, self.states)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the order of rows depends on, as primitives."""
        stream = self.stream
        settings = {name: getattr(stream, name) for name in ("seed", "lanes", "shuffle", "budget", "mix_by")}
        digests = {source.name: source.digest for source in stream.sources}
        # When to climb may change, as weights may. Whether their keys are rungs may not: the rungs climbed so far are
        # in the state.
        climb = "set" if stream.climb else NOT_SET
        return settings | {
            "long_documents": stream.long_documents,
            "train": digests,
            "climb": climb,
            RULES: VERSION,
        }


class RowLoader(DataLoader):
    """A loader that Lightning can stop and resume, even with another number of processes and workers.

    Its state is the state of each lane after the last row of a completed optimizer step, and the rungs climbed so far.

    Args:
        dataset: The rows of this process.
        completed: Returns how many rows of this process belong to completed steps; None for a loader that starts over
            each time.
        any_rank_has_rows: Returns whether any process has a row, given whether this one has. Set if all processes
            must go through the same number of rows: one that has none left then yields empty rows.
        options: As in torch's DataLoader.
    """

    def __init__(
        self,
        dataset: RowDataset,
        completed: Callable[[], int] | None,
        any_rank_has_rows: Callable[[bool], bool] | None = None,
        **options: Any,
    ) -> None:
        # Each iterator draws a seed for its workers; training's random numbers must not depend on how many iterators
        # there were.
        own = torch.Generator()
        super().__init__(dataset, worker_init_fn=leave_signals_to_the_trainer, generator=own, **options)
        self.rows = dataset
        self.completed = completed
        self.any_rank_has_rows = any_rank_has_rows
        self._given: deque[StreamRow] = deque()
        self._outdated = False
        """Whether the rows that were drawn ahead have to be drawn again."""

    def __iter__(self) -> Any:
        if self.completed:
            self._complete()
            self._given.clear()
        return self._rows(self._draw())

    def climb(self, trained: int) -> None:
        """Climbs a rung after so many trained rows of this process; all ranks call it.

        At most one more row was given out, which keeps its weights. Those that were drawn ahead of it are drawn again
        when the next one is due.
        """
        climbed = (*self.rows.stream.climbed, trained * self.rows.world_size)
        self.rows.stream = replace(self.rows.stream, climbed=climbed)
        self._outdated = True

    def _draw(self) -> Any:
        """Returns an iterator over the rows that follow those given out."""
        self._outdated = False
        completed = self.rows.start, self.rows.states
        self.rows.start += len(self._given)
        self.rows.states = self.rows.states | {row.lane: row.state for row in self._given}
        rows = super().__iter__()
        self.rows.start, self.rows.states = completed
        return rows

    def _rows(self, rows: Any) -> Iterator[PackedRow]:
        try:
            while True:
                if self._outdated:
                    _end(rows)
                    rows = self._draw()
                if (row := next(rows, None)) is None:
                    break
                if self.completed:
                    self._complete()
                    self._given.append(row)
                if self.any_rank_has_rows:
                    self.any_rank_has_rows(True)
                yield row
            while self.any_rank_has_rows and self.any_rank_has_rows(False):
                yield PackedRow(batch=empty_row(self.rows.stream.builder.images.patch_size))
        except Exception:
            _end(rows)
            raise

    def _complete(self) -> None:
        assert self.completed
        while self.rows.start < self.completed() and self._given:
            row = self._given.popleft()
            self.rows.states[row.lane] = row.state
            self.rows.start += 1

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of rows in completed steps, over all processes, and the state of each lane after them, as
        primitives."""
        if not self.completed:
            return {}
        self._complete()
        states = {lane: asdict(state) for lane, state in self.rows.states.items()}
        if self.rows.world_size > 1:
            # Each process knows the lanes that it reads; its states of other lanes may be from its start.
            for rank, known in all_ranks((self.rows.rank, states)):
                states |= {lane: state for lane, state in known.items() if lane % self.rows.world_size == rank}
        completed = self.rows.start * self.rows.world_size
        return {
            "rows": completed,
            "world_size": self.rows.world_size,
            "lanes": states,
            # A validation within a step comes again when the step is done again.
            "climbed": [trained for trained in self.rows.stream.climbed if trained <= completed],
            "data": self.rows.identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state.

        Raises:
            UserError: The data or their order differ from the state's.
        """
        if not self.completed:
            return
        if not state:
            raise UserError(
                "The checkpoint was trained with trainer.overfit_batches, and has no place in the data: begin "
                "a new run with its weights (model.weights)."
            )
        if (rules := state["data"].get(RULES, 1)) != VERSION:
            raise UserError(
                f"The checkpoint was trained under rules {rules} of which samples count as documents, and these are "
                f"rules {VERSION}: go on with the version of fuyu-e2e that the run began with, or begin a new run."
            )
        for name, value in self.rows.identity.items():
            if value != (said := state["data"].get(name, NOT_SET)):
                setting = "data.seed (seed_everything)" if name == "seed" else f"data.{name}"
                raise UserError(
                    f"The checkpoint was trained on other data: {setting} is not what it was"
                    + (f" ({said} there, {value} here)" if not isinstance(value, dict) else "")
                    + ". Give the run the same shards and settings, so that it goes on where it stopped."
                )
        self.rows.start = state["rows"] // self.rows.world_size
        self.rows.states = {lane: LaneState.from_dict(kept) for lane, kept in state["lanes"].items()}
        self.rows.stream = replace(self.rows.stream, climbed=tuple(state.get("climbed", ())))


def _end(rows: Any) -> None:
    """Ends the workers of an iterator at once; the garbage collector may wait 5 seconds for each."""
    if isinstance(rows, _MultiProcessingDataLoaderIter):
        rows._shutdown_workers()
