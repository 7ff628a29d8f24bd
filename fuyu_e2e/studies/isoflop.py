"""Does routing help? Trains dense and routed decoders to the same number of operations, on the same rows.

Each contender trains from scratch for each budget, with a learning rate that falls to zero at its end: what counts is
what a budget buys. Budgets are in steps of the dense decoder. The loss is causal, on held-out pictures, as in
generation.
"""

import json
import os
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from fuyu_e2e.bench.documents import Rows
from fuyu_e2e.bench.measure import environment, write_json
from fuyu_e2e.checkpoint.loading import TrainedModel
from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.reading import read_documents
from fuyu_e2e.data.tokenizer import train_tokenizer
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.cost import batch_cost
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.routing.config import RoutingConfig
from fuyu_e2e.studies.isoflop_report import report
from fuyu_e2e.studies.reading import share_read
from fuyu_e2e.tasks.digits import MAX_NEW_TOKENS, TEST_SEED, VOCAB_SIZE, write_shards
from fuyu_e2e.training.module import FuyuModule
from fuyu_e2e.training.optimizers import OptimizerConfig
from fuyu_e2e.training.schedule import Schedule

MOST_DIGITS = 2
"""Most digits in a picture: half the quickstart's, learnt in a fraction of its time."""
ROW_TOKENS = 1_024
"""Tokens of a step."""
DENSE = FuyuConfig(
    vocab_size=VOCAB_SIZE, patch_size=8, layers=6, width=96, heads=3, kv_heads=3, head_size=32, feed_forward=256
)
"""The quickstart's decoder with two more blocks; by default two of the six are routed."""
DEEPER = replace(DENSE, layers=8)
"""A deeper decoder that spends the saved operations; three of its eight blocks are routed."""
CONTENDERS = {
    "dense": DENSE,
    "threshold 0.125": replace(DENSE, routing=RoutingConfig(share=0.125)),
    "fixed 0.125": replace(DENSE, routing=RoutingConfig(rule="fixed", share=0.125)),
    "random 0.125": replace(DENSE, routing=RoutingConfig(rule="random", share=0.125)),
    "threshold 0.125, deeper": replace(DEEPER, routing=RoutingConfig(share=0.125)),
    "topk 0.125": replace(DENSE, routing=RoutingConfig(rule="topk", share=0.125)),
    "image_topk 0.125": replace(DENSE, routing=RoutingConfig(rule="image_topk", share=0.125)),
    "threshold 0.25": replace(DENSE, routing=RoutingConfig(share=0.25)),
    "threshold 0.5": replace(DENSE, routing=RoutingConfig(share=0.5)),
    "threshold 0.5 to 0.125": replace(DENSE, routing=RoutingConfig(share=(0.5, 0.125))),
    "threshold 0.125, keys": replace(DENSE, routing=RoutingConfig(share=0.125, skipped="keys")),
}


@dataclass(frozen=True)
class Job:
    """All runs of one seed."""

    seed: int
    budgets: tuple[int, ...]
    contenders: tuple[str, ...]
    pictures: int
    test_pictures: int
    threads: int
    done: tuple[tuple[str, int], ...]
    """Runs with known results."""
    results: Path
    """The file for results, one line of JSON for each, as soon as it is known."""


def isoflop(args: Sequence[str]) -> None:
    """Trains dense and routed decoders to equal operations, and compares held-out loss and exact match."""
    parser = ArgumentParser(prog="python -m fuyu_e2e.studies isoflop", description=isoflop.__doc__)
    parser.add_argument("--budgets", type=int, nargs="+", default=[150, 300, 600], help="Steps of the dense decoder.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--pictures", type=int, default=30_000, help="Training pictures (default: %(default)s).")
    parser.add_argument("--test-pictures", type=int, default=1_000)
    parser.add_argument("--threads", type=int, help="Of each seed's process; by default they share the machine.")
    parser.add_argument(
        "--out", type=Path, default=Path("bench-isoflop.json"), help="What it holds already is not run again."
    )
    options = parser.parse_args(args)
    lines = options.out.with_suffix(".jsonl")
    known = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    jobs = [
        Job(
            seed,
            tuple(options.budgets),
            tuple(options.contenders),
            options.pictures,
            options.test_pictures,
            options.threads or max(1, (os.cpu_count() or 1) // len(options.seeds)),
            tuple((result["contender"], result["budget"]) for result in known if result["seed"] == seed),
            lines,
        )
        for seed in options.seeds
    ]
    with ProcessPoolExecutor(len(jobs), mp_context=get_context("spawn")) as pool:
        for finished in [pool.submit(_run_seed, job) for job in jobs]:
            finished.result()
    results = [json.loads(line) for line in lines.read_text().splitlines()]
    shapes = {name: asdict(CONTENDERS[name]) for name in options.contenders}
    write_json(options.out, {**environment("cpu"), "contenders": shapes, "results": results})
    report(results, options.out.with_suffix(".png"))


class StoredRows(FuyuDataModule):
    """The quickstart's data, with each training row packed once and kept for all contenders."""

    def store(self, count: int) -> None:
        """Packs and stores the first `count` rows."""
        self.rows = list(islice(self.stream("train").rows(), count))

    def train_dataloader(self) -> DataLoader:  # type: ignore[override]
        """Returns the stored rows, from the first on."""
        return DataLoader(Rows(self.rows), batch_size=None)


def _run_seed(job: Job) -> None:
    torch.set_num_threads(job.threads)
    wanted = [(name, budget) for budget in job.budgets for name in job.contenders if (name, budget) not in job.done]
    if not wanted:
        return
    with TemporaryDirectory() as folder:
        data = prepare(
            Path(folder),
            seed=job.seed,
            pictures=job.pictures,
            test_pictures=job.test_pictures,
            most_digits=MOST_DIGITS,
            row_tokens=ROW_TOKENS,
        )
        sample = [row.batch for row in islice(data.stream("train").rows(), 16)]
        steps = {run: _steps(CONTENDERS[run[0]], run[1], sample) for run in wanted}
        data.store(max(steps.values()))
        for run in wanted:
            result = _train(*run, job.seed, steps[run], data, Path(folder))
            with job.results.open("a") as file:
                file.write(json.dumps(result) + "\n")


def prepare(
    folder: Path, *, seed: int, pictures: int, test_pictures: int, most_digits: int, row_tokens: int
) -> StoredRows:
    """Writes digits for training and tests, with a tokenizer, and returns them as data in the seed's order."""
    train = write_shards(folder, split="train", count=pictures, seed=seed, most_digits=most_digits, processes=1)
    write_shards(folder, split="test", count=test_pictures, seed=TEST_SEED, most_digits=most_digits, processes=1)
    texts = (text for document in read_documents(train[0], SampleStats()) for text in document.texts)
    train_tokenizer(texts, VOCAB_SIZE).save(folder / "tokenizer.model")
    return stored_rows(folder, seed, row_tokens)


def stored_rows(folder: Path, seed: int, row_tokens: int) -> StoredRows:
    """Returns the digits that `prepare` wrote, in another seed's order."""
    return StoredRows(
        str(folder / "tokenizer.model"),
        DENSE.patch_size,
        train=str(folder / "train-*.tar"),
        val=str(folder / "test-*.tar"),
        budget=row_tokens,
        lanes=4,
        shuffle=512,
        seed=seed,
    )


def _row_cost(config: FuyuConfig, row: PackedBatch, done: float) -> int:
    return batch_cost(config, row, done=done).training_flops


def _steps(config: FuyuConfig, budget: int, sample: list[PackedBatch]) -> int:
    """Returns how many steps cost as much as `budget` steps of the dense decoder, including the annealing."""
    dense = sum(_row_cost(DENSE, row, 1.0) for row in sample)
    annealed = config.routing.dense(None) if config.routing is not None else 0.0
    routed = sum(
        (1 - annealed) * _row_cost(config, row, 1.0) + annealed * _row_cost(config, row, 0.0) for row in sample
    )
    return round(budget * dense / routed)


def _train(name: str, budget: int, seed: int, steps: int, data: StoredRows, folder: Path) -> dict[str, Any]:
    pl.seed_everything(seed, verbose=False)
    learner = FuyuModule(
        CONTENDERS[name],
        OptimizerConfig(name="muon", lr=3e-3, weight_decay=0.0),
        Schedule(shape="wsd", decay=0.5),
        max_new_tokens=MAX_NEW_TOKENS,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
    )
    started_at = time.perf_counter()
    trainer.fit(learner, data)
    seconds = time.perf_counter() - started_at
    decoder = learner.decoder
    routing = decoder.config.routing
    flops = sum(_row_cost(decoder.config, row.batch, step / steps) for step, row in enumerate(data.rows[:steps]))
    model = TrainedModel(decoder.eval(), data.builder, steps)
    result = {
        "contender": name,
        "budget": budget,
        "seed": seed,
        "steps": steps,
        "training_flops": flops,
        "parameters": sum(weight.numel() for weight in decoder.parameters()),
        "seconds": round(seconds, 1),
        "loss": held_out_loss(decoder, data),
        "exact_match": share_read(model, str(folder / "test-*.tar")),
    }
    if routing is not None and routing.rule == "topk":
        # As in training, where the k best of a row are known: the loss without the need to predict.
        result["loss_looking_ahead"] = held_out_loss(decoder.train(), data)
    return result


@torch.no_grad()
def held_out_loss(decoder: Decoder, data: StoredRows) -> float:
    """Returns the mean loss over supervised tokens of the test pictures, in nats."""
    rows = [row.batch for row in data.stream("val").rows()]
    return sum(float(decoder.loss(row)) for row in rows) / sum(len(row.targets) for row in rows)
