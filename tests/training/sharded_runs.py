"""Runs a small training under several strategies and numbers of processes, and keeps what came of it.

    python sharded_runs.py FOLDER '[[2, [{"name": "fsdp2", "strategy": {}}, …]], [1, [{"name": "alone"}, …]]]'

For each number of processes, that many are forked, with torchrun's variables around them, and do the runs listed in
turn. FOLDER/NAME.json has the losses and gradient norms of the steps, FOLDER/NAME.pt weights and optimizer's state as
wholes, FOLDER/NAME/ the checkpoints. A run goes on from FOLDER/RESUME/last.ckpt of an earlier one.
"""

import json
import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from forked_ranks import become_rank, free_port
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy
from resumed_runs import CONFIG, prepare
from torch import Tensor
from torch.distributed.tensor import DTensor

from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.distributed import DataRank
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.routing.config import RoutingConfig
from fuyu_e2e.training.callbacks.bad_steps import BadSteps
from fuyu_e2e.training.callbacks.checkpoints import Checkpoints
from fuyu_e2e.training.callbacks.data_report import DataReport
from fuyu_e2e.training.callbacks.last_checkpoint import LastCheckpoint
from fuyu_e2e.training.checkpoint_io import BackgroundCheckpointIO
from fuyu_e2e.training.module import FuyuModule
from fuyu_e2e.training.optimizers import OptimizerConfig
from fuyu_e2e.training.strategies import Sharded

ROWS_PER_STEP = 4


class Learner(FuyuModule):
    """Takes the images out of every second row where it is told."""

    text_rows = False

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        place = DataRank.of(self.trainer)
        if self.text_rows and (batch_idx * place.size + place.rank) % 2 == 0:
            none = batch.patch_positions[:0]
            without = {"patches": batch.patches[:0], "patch_positions": none, "newline_positions": none}
            batch = replace(batch, images=(), image_documents=(), **without)
        return super().training_step(batch, batch_idx)


class Watch(Callback):
    """Writes down losses and gradient norms."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {"train/loss": [], "train/gradient_norm": [], "tokens": [], "val/loss": []}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            for name in ("train/loss", "train/gradient_norm", "tokens"):
                self.seen[name].append(float(trainer.callback_metrics[name]))

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen["val/loss"].append(float(trainer.callback_metrics["val/loss"]))


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def state(trainer: pl.Trainer, module: FuyuModule) -> dict[str, Tensor]:
    """All tensors of weights, buffers and optimizer, whole, by name."""
    optimizer = trainer.optimizers[0]
    names = {weight: name for name, weight in module.named_parameters()}
    kept = {f"{names[weight]}.{key}": part for weight, parts in optimizer.state.items() for key, part in parts.items()}
    return {name: whole(tensor) for name, tensor in (module.state_dict() | kept).items()}


def strategy(wanted: Any, world_size: int) -> Strategy | str:
    if wanted is None:
        return "ddp" if world_size > 1 else "auto"
    return Sharded(**wanted) if isinstance(wanted, dict) else wanted


def train(folder: Path, wanted: dict[str, Any], world_size: int) -> None:
    """One run of one process."""
    torch.manual_seed(3)
    routing = RoutingConfig(share=0.4, anneal=0.4, explore=0.2, blocks=(1,)) if wanted.get("routed") else None
    config = replace(CONFIG, heads=4, kv_heads=2, head_size=8, routing=routing)
    config = FuyuConfig.from_dict(config.to_dict() | wanted.get("decoder", {}))
    shards = f"{folder}/*.tar"
    data = FuyuDataModule(
        f"{folder}/tokenizer.model", 4, cache_dir=f"{folder}/cache", budget=96, lanes=12, shuffle=16, train=shards,
        val=f"{folder}/val/*.tar" if wanted.get("validate") else None,
    )  # fmt: skip
    chosen = strategy(wanted.get("strategy"), world_size)
    tensor_parallel = wanted["strategy"].get("tensor_parallel", 1) if isinstance(wanted.get("strategy"), dict) else 1
    watch = Watch()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=chosen,
        precision=wanted.get("precision", "32-true"),
        max_steps=wanted.get("steps", 6),
        accumulate_grad_batches=ROWS_PER_STEP * tensor_parallel // world_size,
        gradient_clip_val=wanted.get("clip"),
        val_check_interval=wanted.get("validate"),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        plugins=[BackgroundCheckpointIO()],
        callbacks=[
            BadSteps(),
            DataReport(),
            watch,
            LastCheckpoint(),
            Checkpoints(folder / wanted["name"], every_n_train_steps=1000, filename="{step}", save_last="link"),
        ],
    )
    module = Learner(
        config, optimizer=OptimizerConfig(name=wanted.get("optimizer", "muon"), lr=3e-3), **wanted.get("model", {})
    )
    module.text_rows = wanted.get("text_rows", False)
    resume = wanted.get("resume")
    trainer.fit(module, data, ckpt_path=folder / resume / "last.ckpt" if resume else None)
    final = state(trainer, module)
    if trainer.is_global_zero:
        torch.save(final, folder / f"{wanted['name']}.pt")
        (folder / f"{wanted['name']}.json").write_text(json.dumps(watch.seen))


def process(folder: Path, runs: list[dict[str, Any]], rank: int, world_size: int, port: int) -> None:
    """One process of several runs."""
    become_rank(rank, world_size, port)
    for wanted in runs:
        train(folder, wanted, world_size)


def launch(folder: Path, world_size: int, runs: list[dict[str, Any]]) -> None:
    """Forks the processes, and waits for them."""
    port = free_port()
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=process, args=(folder, runs, rank, world_size, port)) for rank in range(world_size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        sys.exit(f"exit codes {[rank.exitcode for rank in ranks]}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    prepare(folder)
    for world_size, runs in json.loads(sys.argv[2]):
        launch(folder, world_size, runs)
