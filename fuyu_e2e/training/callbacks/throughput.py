"""Measures how fast a run is, where its time goes, and which rank the others wait for.

Lightning's ThroughputMonitor tells none of the padding of packed rows, waiting for data, and differences of ranks.
"""

import resource
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from fuyu_e2e.data.lightning_internals import accumulates, steps_between_logs
from fuyu_e2e.distributed import DataRank, all_ranks
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.cost import batch_cost
from fuyu_e2e.training.device_limits import known_peak
from fuyu_e2e.training.module import FuyuModule


class Throughput(Callback):
    """Logs tokens/s, images/s, packing efficiency, the fraction of time spent waiting for data, MFU, and ranks.

    Each figure covers the batches since the last logged one, without validation and checkpoints. Rates are of all
    processes, assuming that each is as fast as this one. MFU is the training operations, counted by
    `fuyu_e2e.model.cost`, over the device's dense peak; it is logged if Lightning knows that peak.

    For each rank it logs under `ranks/`: seconds a step, the part of them before the backward passes, the part spent
    waiting for data, and the peak memory so far in GiB, the device's if that is a GPU. Ranks wait for each other in
    the backward pass, which makes their steps equally long: the slowest rank is the one that takes longest to get
    there. On a GPU that is the time to queue the work, so a slow GPU shows less than slow data.

    Attributes:
        tokens: Tokens of documents that this process has trained on since training began.
        seconds: Time spent on that, including waiting for data.
        rate: Tokens a second of all processes, as last logged; 0 before that.
    """

    def __init__(self) -> None:
        self.rate = 0.0
        self.tokens = 0
        self.seconds = 0.0
        self._window = _Window()
        self._last_end = 0.0
        self._started_at = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._window = _Window()
        self._last_end = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Excludes the time of a validation."""
        self.leave_out()

    def leave_out(self) -> None:
        """Excludes the time since the last batch."""
        self._last_end = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Counts the time since the last batch as waiting."""
        self._started_at = time.perf_counter()
        self._window.waited += self._started_at - self._last_end

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Counts the time that this rank worked independently of others."""
        self._window.alone += time.perf_counter() - self._last_end

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        """Counts the batch, and logs at every `log_every_n_steps`-th step."""
        assert isinstance(pl_module, FuyuModule)
        window, now = self._window, time.perf_counter()
        row = batch_cost(pl_module.config, batch, done=pl_module.decoder.progress.done)
        window.tokens += row.tokens
        window.budget += batch.tokens.shape[0]
        window.images += len(batch.images)
        window.flops += row.training_flops
        window.seconds += now - self._last_end
        self.tokens += row.tokens
        self.seconds += now - self._last_end
        self._last_end = now
        if accumulates(trainer):
            return
        window.steps += 1
        if trainer.global_step % steps_between_logs(trainer) == 0:
            self._log(trainer, pl_module)
            self._window = _Window()

    def _log(self, trainer: pl.Trainer, pl_module: FuyuModule) -> None:
        window, place = self._window, DataRank.of(trainer)
        self.rate = place.size * window.tokens / window.seconds
        pl_module.log("tokens/s", self.rate, prog_bar=True)
        pl_module.log("throughput/images_per_second", place.size * window.images / window.seconds)
        pl_module.log("throughput/packing_efficiency", window.tokens / window.budget)
        pl_module.log("throughput/data_wait_share", window.waited / window.seconds)
        self._log_ranks(pl_module)
        dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
        if peak := known_peak(pl_module.device, dtype):
            pl_module.log("throughput/mfu", window.flops / place.replicas / window.seconds / peak)

    def _log_ranks(self, pl_module: FuyuModule) -> None:
        window = self._window
        seconds = (window.seconds, window.alone, window.waited)
        own = [*(part / window.steps for part in seconds), _peak_memory(pl_module.device)]
        by_figure = list(zip(*all_ranks(own), strict=True))
        names = ("step_seconds", "seconds_before_backward", "data_wait_seconds", "memory_gib")
        for name, values in zip(names, by_figure, strict=True):
            for rank, value in enumerate(values):
                pl_module.log(f"ranks/{name}/{rank}", value)
        alone = by_figure[1]
        pl_module.log("ranks/slowest", float(alone.index(max(alone))))


def throughput_of(trainer: pl.Trainer) -> Throughput | None:
    """Returns the callback that measures a run, or None."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, Throughput)), None)


def _peak_memory(device: torch.device) -> float:
    """Returns the peak memory so far in GiB: allocated on a CUDA device, else resident of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class _Window:
    """Sums over the batches since the last log."""

    def __init__(self) -> None:
        self.tokens = self.budget = self.images = self.flops = self.steps = 0
        self.seconds = self.alone = self.waited = 0.0
