"""Ends a run on several hosts when one host is lost, and names it, even if no connection fails.

A host whose processes are killed closes its connections, and collectives fail at once. A host that loses network or
power says nothing: the collectives of the others wait for their group's timeout, 30 minutes in Lightning, or 10
if NCCL carries the parts of a sharded model. So each host writes a sign of life to the process group's store every few
seconds, and all hosts check for it.
"""

import os
import socket
import sys
import threading
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from fuyu_e2e.distributed import all_ranks
from fuyu_e2e.errors import HOST_LOST, UserError

TICKS = 10
"""Signs of life within the limit."""
SLACK = 2
"""Ticks by which silences that began together may differ, since threads tick independently."""
STORE_HOST = 0
"""Node rank of the host that keeps the store: its first process keeps it, or the torchrun that started that."""


@dataclass(frozen=True)
class Host:
    """One host of a run, with what a user knows it by."""

    name: str
    address: str
    node_rank: int
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        ranks = f"rank {self.ranks[0]}" if len(self.ranks) == 1 else f"ranks {self.ranks[0]} to {self.ranks[-1]}"
        return f"host {self.name} ({self.address}, node rank {self.node_rank}, {ranks})"


class Heartbeat(Callback):
    """Ends the process when another host of the run has been silent for longer than a limit.

    A thread writes the name of that host to stderr and exits with code 5, even if the main thread hangs in a
    collective. A collective that fails waits for that message before its traceback. A second thread talks to the
    store: its calls hang, whatever their timeout, if the lost host is the one that keeps the store. While the whole
    process is stopped, it doesn't count the silence of others, but is silent itself. On a single host nothing is
    monitored: there the launcher sees processes die.

    Args:
        limit: Seconds that a host may be silent; None turns the heartbeat off. Under torchrun, less than the 30
            seconds that torchrun leaves its processes after it has lost the others itself.

    Raises:
        UserError: The limit is out of its range.
    """

    def __init__(self, limit: float | None = 20.0) -> None:
        if limit is not None and not limit > 0:
            raise UserError(f"hosts.limit is {limit} seconds, but must be above 0.")
        self.limit = limit
        self._step = 0
        self._answers = 0
        self._signs: list[bytes] = []
        self._done = threading.Event()
        self._threads: list[threading.Thread] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Exchanges the hosts' names and starts the threads."""
        if stage != "fit" or self.limit is None or trainer.num_nodes == 1 or not dist.is_initialized():
            return
        # Under torchrun the store outlives restarts of the run, and with it the signs of lost hosts.
        run = trainer.strategy.broadcast(os.urandom(8).hex())
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        if trainer.local_rank == 0:
            store.set(_key(run, trainer.node_rank), "")
        known = all_ranks((trainer.node_rank, socket.gethostname(), _address()))
        hosts = [
            Host(name, address, node_rank, tuple(rank for rank, other in enumerate(known) if other[0] == node_rank))
            for node_rank, name, address in dict.fromkeys(known)
        ]
        others = [host for host in hosts if host.node_rank != trainer.node_rank]
        self._answers, self._signs, self._done = 0, [b""] * len(others), threading.Event()
        own = _key(run, trainer.node_rank) if trainer.local_rank == 0 else None
        interval, keys = self.limit / TICKS, [_key(run, host.node_rank) for host in others]
        [keeper] = [host for host in hosts if host.node_rank == STORE_HOST]
        self._threads = [
            threading.Thread(target=self._talk, args=(store, own, keys, interval, self._done), daemon=True),
            threading.Thread(target=self._watch, args=(others, keeper, interval, self._done), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Stores the step for the message."""
        self._step = trainer.global_step

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stops the threads."""
        self._end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stops the threads; if a collective failed, first waits to see whether a host is lost."""
        if self.limit is not None and self._threads and _is_of_a_collective(exception):
            self._threads[-1].join(self.limit * (1 + 2 * SLACK / TICKS))
        self._end()

    def _end(self) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(1.0)
        self._threads = []

    def _talk(
        self, store: dist.Store, own: str | None, keys: list[str], interval: float, done: threading.Event
    ) -> None:
        """Sends this host's sign of life, if `own` is its key, and stores the latest signs of the others."""
        while not done.wait(interval):
            try:
                if own is not None:
                    store.set(own, str(self._answers))
                self._signs = store.multi_get(keys)
            except RuntimeError:
                return  # the connection is closed for good: from now on the store is silent
            self._answers += 1

    def _watch(self, others: list[Host], keeper: Host, interval: float, done: threading.Event) -> None:
        heard, answers = self._signs, self._answers
        silent, unanswered = [0] * len(others), 0
        while max(silent) < TICKS:
            if done.wait(interval):
                return
            signs = self._signs
            silent = [count + 1 if new == old else 0 for count, new, old in zip(silent, signs, heard, strict=True)]
            unanswered = unanswered + 1 if self._answers == answers else 0
            heard, answers = signs, self._answers
        # Without the store all hosts seem silent.
        lost = [host for host, count in zip(others, silent, strict=True) if count >= TICKS - SLACK]
        lost = [keeper] if unanswered >= TICKS - SLACK else lost
        print(
            f"\nfuyu-e2e: {' and '.join(map(str, lost))} {'is' if len(lost) == 1 else 'are'} lost: not heard for "
            f"{self.limit:g} s (hosts.limit) after step {self._step}. This rank ends; the last checkpoint is as it "
            "was: go on from it with --ckpt_path last.",
            file=sys.__stderr__,
            flush=True,
        )
        os._exit(HOST_LOST)


def _key(run: str, node_rank: int) -> str:
    return f"fuyu_e2e/hosts/{run}/{node_rank}"


def _address() -> str:
    """Returns the address that this host uses to reach the first one."""
    family, kind, _, _, first = socket.getaddrinfo(os.environ["MASTER_ADDR"], 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as way:
        way.connect(first)  # sends nothing: a datagram socket only looks up the route
        return str(way.getsockname()[0])


def _is_of_a_collective(exception: BaseException) -> bool:
    # gloo raises RuntimeErrors that start with a place in its source.
    return isinstance(exception, dist.DistError) or (isinstance(exception, RuntimeError) and "gloo" in str(exception))
