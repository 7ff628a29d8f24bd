"""Runs a small training several times, in one process or in each of several that torchrun started.

    python resumed_runs.py FOLDER '[{"name": "whole", "workers": 0, "resume": null}, …]'

Each run writes `FOLDER/NAME-RANK.json`, its losses and rows, and `FOLDER/NAME.ckpt`; the first also saves checkpoints
at the positions in SAVED_BEHIND.
"""

import hashlib
import json
import os
import random
import sys
import tarfile
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image as Pillow

from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.data.tokenizer import train_tokenizer
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.routing.config import RoutingConfig
from fuyu_e2e.training.callbacks.data_report import DataReport
from fuyu_e2e.training.callbacks.random_state import RandomState
from fuyu_e2e.training.module import FuyuModule
from fuyu_e2e.training.optimizers import OptimizerConfig

STEPS, ROWS_PER_STEP, DOCUMENTS = 8, 6, 48
SAVED_BEHIND = {"boundary": 18, "mid-accumulation": 28, "epoch-edge": 36}
"""Rows of all processes after which a checkpoint is saved."""
CONFIG = FuyuConfig(
    vocab_size=300,
    patch_size=4,
    layers=3,
    width=32,
    heads=2,
    kv_heads=1,
    head_size=16,
    feed_forward=48,
    routing=RoutingConfig(share=0.4, anneal=0.4, explore=0.2, blocks=(1,)),
)


def prepare(folder: Path) -> None:
    """Writes the shards and the tokenizer of all runs: three to train on, and `val/3.tar`."""
    rng = np.random.default_rng(0)
    (folder / "val").mkdir(exist_ok=True)
    for shard, name in enumerate(("0.tar", "1.tar", "2.tar", "val/3.tar")):
        with tarfile.open(folder / name, "w") as tar:
            for number in range(DOCUMENTS // 3):
                picture = BytesIO()
                Pillow.fromarray(rng.integers(0, 256, (rng.integers(4, 20), 16, 3), np.uint8)).save(picture, "PNG")
                text = b"" if number == 3 else f"number {number} of {shard}".encode()
                for extension, data in (("png", picture.getvalue()), ("txt", text)):
                    info = tarfile.TarInfo(f"{shard}-{number}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, BytesIO(data))
    train_tokenizer(["number 1 of 2"] * 5, CONFIG.vocab_size).save(folder / "tokenizer.model")


def digest(batch: PackedBatch) -> str:
    """Of all that a row holds."""
    parts = (getattr(batch, field.name) for field in fields(batch))
    content = b"".join(part.numpy().tobytes() for part in parts if isinstance(part, torch.Tensor))
    return hashlib.sha256(content + repr((batch.document_ids, batch.document_lengths)).encode()).hexdigest()


class Watch(Callback):
    """Writes down rows, losses and numbers from each global generator, and saves where it is told."""

    def __init__(self, folder: Path, save: bool) -> None:
        self.folder, self.save = folder, save
        self.rows: list[str] = []
        self.losses: list[float] = []
        self.drawn: dict[str, list[float]] = {"python": [], "numpy": [], "torch": []}

    def on_train_batch_start(self, *_: Any) -> None:
        # Python and numpy make normal numbers in pairs, and keep the second one for later.
        self.drawn["python"] += [random.gauss(), random.random()]
        self.drawn["numpy"] += [np.random.randn(), np.random.rand()]
        self.drawn["torch"] += torch.rand(2).tolist()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.rows.append(digest(batch))
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
        for name, rows in SAVED_BEHIND.items():
            if self.save and rows == (index + 1) * trainer.world_size:
                trainer.save_checkpoint(self.folder / f"{name}.ckpt")


def run(folder: Path, name: str, workers: int, resume: str | None, world_size: int = 1, **changed: Any) -> Watch:
    """One run; `world_size` processes are there already."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3 + int(os.environ.get("RANK", "0")))
    torch.set_num_threads(1)
    settings = {"budget": 96, "lanes": 12, "shuffle": 16, "train": f"{folder}/*.tar"} | changed
    data = FuyuDataModule(f"{folder}/tokenizer.model", 4, workers=workers, cache_dir=f"{folder}/cache", **settings)
    watch = Watch(folder, save=resume is None)
    report = DataReport()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        max_steps=STEPS,
        accumulate_grad_batches=ROWS_PER_STEP // world_size,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[RandomState(), report, watch],
    )
    module = FuyuModule(CONFIG, optimizer=OptimizerConfig(name="muon"))
    trainer.fit(module, data, ckpt_path=folder / f"{resume}.ckpt" if resume else None)
    trainer.save_checkpoint(folder / f"{name}.ckpt")
    counts = report.state_dict()
    described = {"rows": watch.rows, "losses": watch.losses, "drawn": watch.drawn, "counts": counts}
    (folder / f"{name}-{trainer.global_rank}.json").write_text(json.dumps(described))
    return watch


if __name__ == "__main__":
    for wanted in json.loads(sys.argv[2]):
        run(Path(sys.argv[1]), **wanted, world_size=2)
