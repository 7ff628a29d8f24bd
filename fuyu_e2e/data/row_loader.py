"""The loader of packed rows, which Lightning can stop and resume."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
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
"""Under which a checkpoint says by which version of the rules samples counted as documents."""


def leave_signals_to_the_trainer(worker: int) -> None:
    """Keeps a loader's worker at work when a signal goes to all processes of a run, as Ctrl-C and SLURM's do.

    The trainer still needs its rows to finish the step. Only its parent's SIGTERM ends a worker, at once, as torch has
    it: that is how a loader gets rid of one. Where the sender can't be told (macOS), every SIGTERM ends it.
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
    """The rows of one process, shared out among its workers so that their order is that of one worker."""

    def __init__(self, stream: Stream, rank: int, world_size: int) -> None:
        self.stream = stream
        self.rank = rank
        self.world_size = world_size
        self.start = 0
        """Rows of this process to leave out, since they were read before."""
        self.states: dict[int, LaneState] = {}
        """Where each lane stood behind them."""

    def __iter__(self) -> Iterator[StreamRow]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        first = (self.start + worker) * self.world_size + self.rank
        return self.stream.rows(first, self.world_size * workers, self.states)

    @property
    def identity(self) -> dict[str, Any]:
        """What the order of rows depends on, in primitives."""
        stream = self.stream
        settings = {name: getattr(stream, name) for name in ("seed", "lanes", "shuffle", "budget", "mix_by")}
        digests = {source.name: source.digest for source in stream.sources}
        return settings | {"long_documents": stream.long_documents, "train": digests, RULES: VERSION}


class RowLoader(DataLoader):
    """A loader that Lightning can stop and resume, also with another number of processes and workers.

    Its state is where each lane stood behind the last row whose optimizer step is done.

    Args:
        dataset: The rows of this process.
        settled: How many of its rows are behind a step that is done; None for a loader that begins anew each time.
        anyone: Whether any process has a row, given whether this one has, where they have to go through the same
            number of rows: those that have no more give rows that hold nothing.
        options: As in torch's DataLoader.
    """

    def __init__(
        self,
        dataset: RowDataset,
        completed: Callable[[], int] | None,
        any_rank_has_rows: Callable[[bool], bool] | None = None,
        **options: Any,
    ) -> None:
        # Each iterator draws a seed for its workers, and training's random numbers are not to depend on how many there
        # were.
        own = torch.Generator()
        super().__init__(dataset, worker_init_fn=leave_signals_to_the_trainer, generator=own, **options)
        self.rows = dataset
        self.completed = completed
        self.any_rank_has_rows = any_rank_has_rows
        self._given: deque[StreamRow] = deque()

    def __iter__(self) -> Any:
        if self.completed:
            self._complete()
            self._given.clear()
        return self._rows(super().__iter__())

    def _rows(self, rows: Iterator[StreamRow]) -> Iterator[PackedRow]:
        try:
            for row in rows:
                if self.completed:
                    self._complete()
                    self._given.append(row)
                if self.any_rank_has_rows:
                    self.any_rank_has_rows(True)
                yield row
            while self.any_rank_has_rows and self.any_rank_has_rows(False):
                yield PackedRow(batch=empty_row(self.rows.stream.builder.images.patch_size))
        except Exception:
            # Left to the garbage collector behind an error, workers are waited for 5 seconds each.
            if isinstance(rows, _MultiProcessingDataLoaderIter):
                rows._shutdown_workers()
            raise

    def _complete(self) -> None:
        assert self.completed
        while self.rows.start < self.completed() and self._given:
            row = self._given.popleft()
            self.rows.states[row.lane] = row.state
            self.rows.start += 1

    def state_dict(self) -> dict[str, Any]:
        """Returns rows whose step is done, over all processes, and where each lane stands behind them; in
        primitives."""
        if not self.completed:
            return {}
        self._complete()
        states = {lane: asdict(state) for lane, state in self.rows.states.items()}
        if self.rows.world_size > 1:
            # Each process knows the lanes that it reads; of the others it may know where they were when it began.
            for rank, known in all_ranks((self.rows.rank, states)):
                states |= {lane: state for lane, state in known.items() if lane % self.rows.world_size == rank}
        return {
            "rows": self.rows.start * self.rows.world_size,
            "world_size": self.rows.world_size,
            "lanes": states,
            "data": self.rows.identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the state was taken.

        Raises:
            UserError: The data or its order are others than the state's.
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
            if value != (said := state["data"][name]):
                setting = "data.seed (seed_everything)" if name == "seed" else f"data.{name}"
                raise UserError(
                    f"The checkpoint was trained on other data: {setting} is not what it was"
                    + (f" ({said} there, {value} here)" if not isinstance(value, dict) else "")
                    + ". Give the run the same shards and settings, so that it goes on where it stopped."
                )
        self.rows.start = state["rows"] // self.rows.world_size
        self.rows.states = {lane: LaneState(**kept) for lane, kept in state["lanes"].items()}
