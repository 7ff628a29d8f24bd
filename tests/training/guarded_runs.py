"""Runs a small training several times on two processes that hear signals, meet NaN, hang or lose each other.

    python guarded_runs.py FOLDER '[{"name": "whole"}, {"name": "stopped", "signal": "SIGTERM", "ranks": [1]}, …]'

The processes are forked, with torchrun's variables around them. FOLDER/results.json says of each run the exit codes
and the seconds from its signal to the last exit, FOLDER/NAME/RANK.log what a rank printed, FOLDER/NAME/RANK.json what
it saw. No run is so fast that its signal comes too late, and one that hangs is killed after DEADLINE seconds.

With "hosts", each of the two processes is alone on a host: "pids" are processes in the network namespaces of these
hosts, "address" is the first's, "shards" where they stream from, "cut" a command that takes the network down.
"""

import ctypes
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from forked_ranks import become_rank, free_port
from lightning.pytorch.callbacks import Callback
from resumed_runs import CONFIG, ROWS_PER_STEP, STEPS, digest, prepare

from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.data.shards.cache import ShardCache
from fuyu_e2e.data.shards.manifest import index
from fuyu_e2e.training.callbacks.bad_steps import BadSteps
from fuyu_e2e.training.callbacks.checkpoints import Checkpoints
from fuyu_e2e.training.callbacks.data_report import DataReport
from fuyu_e2e.training.callbacks.heartbeat import Heartbeat
from fuyu_e2e.training.callbacks.last_checkpoint import LastCheckpoint
from fuyu_e2e.training.callbacks.signals import StopSignals
from fuyu_e2e.training.callbacks.watchdog import Watchdog
from fuyu_e2e.training.checkpoint_io import BackgroundCheckpointIO
from fuyu_e2e.training.gradients import local
from fuyu_e2e.training.module import FuyuModule
from fuyu_e2e.training.optimizers import OptimizerConfig
from fuyu_e2e.training.settings.launcher_environment import launched_processes
from fuyu_e2e.training.strategies import Sharded

RANKS = 2
ROW_SECONDS = 0.03
"""What a row takes at least, so that signals come in at many places of a step."""
DEADLINE = 300.0
WAITING_ROWS = 6
"""Rows after the one that a signal is to come in, after which a rank waits for the signal to be sent."""


def tensors(trainer: pl.Trainer, module: Any) -> str:
    """A digest of all that a step changes."""
    parts = [*module.decoder.state_dict().values()]
    for state in trainer.optimizers[0].state.values():
        parts += [value for _, value in sorted(state.items())]
    return hashlib.sha256(b"".join(local(part).detach().numpy().tobytes() for part in parts)).hexdigest()


def mark(path: Path, number: int) -> None:
    """Writes a number that is there as a whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(str(number))
    part.rename(path)


class Plant(Callback):
    """Plants what a run is to survive, and writes down what a rank saw."""

    def __init__(self, folder: Path, wanted: dict[str, Any], watchdog: Watchdog) -> None:
        self.folder, self.wanted, self.watchdog = folder, wanted, watchdog
        self.rows: list[str] = []
        self.losses: list[float] = []
        self.after_step: list[str] = []
        self.validated = 0

    def here(self, trainer: pl.Trainer) -> bool:
        """Whether something is planted on this rank in this step."""
        return trainer.global_rank in self.wanted.get("ranks", []) and trainer.global_step in self.wanted["steps"]

    def wait_for_signal(self, too_far: bool) -> None:
        while too_far and "signal" in self.wanted and not (self.folder / "sent").exists():
            time.sleep(0.005)

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.after_step.append(tensors(trainer, module))

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
        time.sleep(ROW_SECONDS)
        mark(self.folder / f"{trainer.global_rank}.row", index)
        self.wait_for_signal("when" not in self.wanted and index >= self.wanted.get("row", 0) + WAITING_ROWS)
        if "limit_from_there" in self.wanted and trainer.global_step in self.wanted["steps"]:
            self.watchdog.limit = self.wanted["limit_from_there"]  # steps before, on a busy machine, may take longer
            self.watchdog.on_train_start(trainer, module)
        if "hang" in self.wanted and self.here(trainer):
            time.sleep(600)

    def on_after_backward(self, trainer: pl.Trainer, module: Any) -> None:
        last = not trainer.fit_loop.epoch_loop._should_accumulate()
        if last and self.wanted.get("nan") == "gradient" and self.here(trainer):
            local(module.decoder.lm_head.weight.grad)[3, 3] = float("nan")

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.rows.append(digest(batch))
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.after_step.append(tensors(trainer, module))
            self.write(trainer)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.validated += 1
        mark(self.folder / f"{trainer.global_rank}.validating", self.validated)
        self.wait_for_signal(self.validated > 1)
        time.sleep(0.3)

    def write(self, trainer: pl.Trainer) -> None:
        seen = {"rows": self.rows, "losses": self.losses, "after_step": self.after_step}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(seen))


class Learner(FuyuModule):
    """Gives a loss that is no number where it is told."""

    wanted: dict[str, Any]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        planted = (
            self.wanted.get("nan") == "loss"
            and batch_idx % self.trainer.accumulate_grad_batches == 1
            and self.trainer.global_rank in self.wanted["ranks"]
            and self.trainer.global_step in self.wanted["steps"]
        )
        return loss * float("nan") if planted else loss


def enter(pid: int) -> None:
    """Makes this process one of the host on which process `pid` runs."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("net", "uts"):
        with Path(f"/proc/{pid}/ns/{kind}").open() as namespace:
            if libc.setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"can't enter the {kind} namespace of {pid}")


def train(folder: Path, wanted: dict[str, Any], rank: int, port: int) -> None:
    """One rank of one run."""
    own = folder / wanted["name"]
    log = os.open(own / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    hosts = wanted.get("hosts")
    become_rank(rank, RANKS, port)
    if hosts:
        enter(hosts["pids"][rank])
        os.environ |= {
            "MASTER_ADDR": hosts["address"],
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "GROUP_RANK": str(rank),
            "GROUP_WORLD_SIZE": str(RANKS),
        }
    torch.manual_seed(3)
    data = FuyuDataModule(
        f"{folder}/tokenizer.model",
        4,
        workers=wanted.get("workers", 0),
        cache_dir=f"{own}/cache{rank}" if hosts else f"{folder}/cache",
        budget=96,
        lanes=12,
        shuffle=16,
        train=hosts["shards"].format(folder.name) if hosts else f"{folder}/*.tar",
        val=f"{folder}/val/*.tar" if wanted.get("validate") else None,
    )
    report = DataReport()
    watchdog = Watchdog(None)
    plant = Plant(own, {"steps": [], **wanted}, watchdog)
    # A loader's worker that doesn't leave would be waited for until the deadline, not for torch's five seconds.
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 2 * DEADLINE
    trainer = pl.Trainer(
        accelerator="cpu",
        **launched_processes(),  # type: ignore[arg-type]
        strategy=Sharded() if wanted.get("sharded") else "ddp",
        max_steps=STEPS,
        accumulate_grad_batches=ROWS_PER_STEP // RANKS,
        val_check_interval=wanted.get("validate"),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        plugins=[BackgroundCheckpointIO()],
        callbacks=[
            BadSteps(in_a_row=3),
            watchdog,
            Heartbeat(wanted.get("silence")),
            report,
            plant,
            LastCheckpoint(),
            StopSignals(),
            Checkpoints(own, every_n_train_steps=wanted.get("save_every", 1000), filename="{step}", save_last="link"),
        ],
    )
    module = Learner(CONFIG, optimizer=OptimizerConfig(name="muon"))
    module.wanted = plant.wanted
    resume = wanted.get("resume")
    trainer.fit(module, data, ckpt_path=folder / resume / "last.ckpt" if resume else None)


def launch(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """One run: starts its ranks, signals some of them, waits for all."""
    (folder / wanted["name"]).mkdir()
    port = free_port()
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=train, args=(folder, wanted, rank, port)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    if "signal" in wanted or "cut" in wanted:
        marks = [folder / wanted["name"] / f"{rank}.{wanted.get('when', 'row')}" for rank in range(RANKS)]
        while not all(path.is_file() and int(path.read_text()) >= wanted.get("row", 0) for path in marks):
            time.sleep(0.005)
    if "cut" in wanted:
        subprocess.run(wanted["cut"], check=True)
    if "signal" in wanted:
        for rank in wanted["ranks"]:
            pid = ranks[rank].pid
            assert pid is not None
            (os.killpg if wanted.get("group") else os.kill)(pid, signal.Signals[wanted["signal"]])
        (folder / wanted["name"] / "sent").touch()
    began = time.perf_counter()
    deadline = began + DEADLINE
    for rank in ranks:
        rank.join(max(0.0, deadline - time.perf_counter()))
        if rank.is_alive():
            rank.kill()
            rank.join()
    return {"codes": [rank.exitcode for rank in ranks], "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    prepare(folder)
    index(sorted(map(str, folder.glob("*.tar"))), ShardCache.at(f"{folder}/cache"))
    results = {wanted["name"]: launch(folder, wanted) for wanted in json.loads(sys.argv[2])}
    (folder / "results.json").write_text(json.dumps(results))
