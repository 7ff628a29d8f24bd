"""Measures how time and memory a token grow with the row, the image, the width and the number of processes.

The first three use a training step, forward, backward and AdamW, on documents of equal length, so that only one
quantity varies. The number of processes is measured with the real trainer and all its callbacks, on the quickstart's
data.
"""

import csv
import os
import statistics
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fuyu_e2e.bench.decoders import new_decoder
from fuyu_e2e.bench.documents import draw
from fuyu_e2e.bench.measure import Figures, alternate, environment
from fuyu_e2e.bench.own_process import peak_memory
from fuyu_e2e.bench.plots import draw_picture
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.reading import read_documents
from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.data.tokenizer import train_tokenizer
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.cost import batch_cost
from fuyu_e2e.tasks.digits import VOCAB_SIZE, write_shards

TINY = FuyuConfig(
    vocab_size=512, patch_size=8, layers=2, width=64, heads=2, kv_heads=2, head_size=32, feed_forward=192
)
"""A decoder small enough for rows of many lengths on a CPU."""
WORDS = 32
"""Tokens of text after each image, half of them supervised."""
PICTURES = 2_000
"""Pictures of digits for training with several processes."""
PARTS = ("rows", "images", "widths", "processes")


@dataclass(frozen=True)
class Point:
    """One configuration to measure."""

    config: FuyuConfig
    row: int
    """Approximate tokens of the row."""
    side: int
    """Patches along each side of the image in each document."""

    def batch(self) -> PackedBatch:
        """Returns a row of documents of equal length, each an image with a text."""
        rng = np.random.default_rng(0)
        one = self.side * (self.side + 1) + WORDS
        documents = [
            draw(
                rng,
                self.config,
                str(number),
                grid=(self.side, self.side),
                asked=WORDS // 2,
                supervised=WORDS - WORDS // 2 - 1,
            )
            for number in range(max(1, self.row // one))
        ]
        return pack_row(documents)


class Step:
    """A training step that can be run repeatedly."""

    def __init__(self, point: Point, device: str) -> None:
        self.device = device
        self.decoder = new_decoder(point.config, device).train()
        self.batch = point.batch().to(device)
        self.optimizer = torch.optim.AdamW(self.decoder.parameters(), lr=1e-5, fused=True)

    def __call__(self) -> None:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss = self.decoder.loss(self.batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def run_twice(point: Point, device: str) -> None:
    """Trains for two steps; to be run in a separate process."""
    step = Step(point, device)
    step()
    step()


def scale(args: Sequence[str]) -> None:
    """Measures time and memory a token over row length, image size, width and number of processes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = ArgumentParser(prog="python -m fuyu_e2e.bench scale", description=scale.__doc__)
    most = 128 if device == "cuda" else 64
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rows", type=int, nargs="+", default=[2**n * 1024 for n in range(8) if 2**n <= most],
                        help="Tokens of a row (default: %(default)s).")  # fmt: skip
    parser.add_argument("--sides", type=int, nargs="+", default=[4, 8, 16, 32, *([64] if device == "cuda" else [])],
                        help="Patches along the sides of an image (default: %(default)s).")  # fmt: skip
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512] if device == "cpu" else
                        [512, 1_024, 2_048, 4_096])  # fmt: skip
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2] if device == "cpu" else
                        sorted({1, torch.cuda.device_count()}))  # fmt: skip
    parser.add_argument("--steps", type=int, default=30, help="Of the real trainer, for each number of processes.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench-scale.json"))
    options = parser.parse_args(args)
    config = TINY if device == "cpu" else replace(TINY, width=1_024, heads=16, kv_heads=16, head_size=64, layers=8,
                                                  feed_forward=3_072, vocab_size=32_768)  # fmt: skip
    fixed = 8_192 if device == "cpu" else 32_768
    points = {
        "rows": {tokens: Point(config, tokens, 15) for tokens in options.rows},
        "images": {side: Point(config, min(fixed, options.rows[-1]), side) for side in options.sides},
        "widths": {width: Point(_wide(width), 2_048 if device == "cpu" else 8_192, 15) for width in options.widths},
    }
    console = Console(highlight=False)
    figures = Figures(options.out, {**environment(device), "rounds": options.rounds})
    found: dict[str, Any] = {}
    for part, varied in points.items():
        if part in options.parts:
            for known in _measure(varied, device, options.rounds):
                found[part] = known
                figures.keep(**found)
            console.print(_table(part, found[part]))
    if "processes" in options.parts:
        found["processes"] = _processes(options.processes, options.steps, device)
        figures.keep(**found)
        console.print(_table("processes", found["processes"]))
    figures.end()
    draw_picture(options.out.with_suffix(".png"), len(found), partial(_draw, found))


def _wide(width: int) -> FuyuConfig:
    return FuyuConfig(
        vocab_size=4_096,
        patch_size=16,
        layers=2,
        width=width,
        heads=width // 64,
        kv_heads=width // 64,
        head_size=64,
        feed_forward=3 * width,
    )


def _measure(varied: dict[int, Point], device: str, rounds: int) -> Iterator[list[dict[str, Any]]]:
    """Yields the figures so far of all points: first their memory, one more each time, and finally also their
    speed."""
    memory: dict[int, int] = {}
    least: dict[FuyuConfig, int] = {}
    for name, point in varied.items():
        memory[name] = peak_memory(run_twice, point, device)
        if point.config not in least:
            # With almost no row, the memory of the model itself.
            least[point.config] = peak_memory(run_twice, Point(point.config, 1, 1), device)
        yield [
            {"value": known, "bytes_per_token": _bytes_per_token(varied[known], memory[known], least)}
            for known in memory
        ]
    seconds = alternate({str(name): Step(point, device) for name, point in varied.items()}, rounds, warm_up=1)
    results = []
    for name, point in varied.items():
        batch = point.batch()
        tokens = len(batch.tokens)
        counted = batch_cost(point.config, batch)
        results.append(
            {
                "value": name,
                "tokens": tokens,
                "document": batch.document_lengths[0],
                "parameters": counted.parameters,
                "microseconds_per_token": round(seconds[str(name)] / tokens * 1e6, 3),
                "bytes_per_token": _bytes_per_token(point, memory[name], least),
                "training_flops_per_token": round(counted.training_flops_per_token),
                "flops_per_second": round(counted.training_flops / seconds[str(name)]),
            }
        )
    yield results


def _bytes_per_token(point: Point, memory: int, least: Mapping[FuyuConfig, int]) -> int:
    return round((memory - least[point.config]) / len(point.batch().tokens))


def _processes(counts: Sequence[int], steps: int, device: str) -> list[dict[str, Any]]:
    """Returns tokens a second of the real trainer under DDP, with one row a step for each process; runs alternate."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        train = write_shards(folder, split="train", count=PICTURES, seed=0, most_digits=4, processes=1)
        texts = (text for document in read_documents(train[0], SampleStats()) for text in document.texts)
        train_tokenizer(texts, VOCAB_SIZE).save(folder / "tokenizer.model")
        speeds: dict[int, list[float]] = {count: [] for count in counts}
        for round_ in range(2):
            for count in counts:
                speeds[count].append(_fit(folder, folder / f"{count}-{round_}", count, max(counts), steps, device))
    medians = {count: statistics.median(values) for count, values in speeds.items()}
    return [
        {
            "value": count,
            "tokens_per_second": round(medians[count], 1),
            "efficiency": round(medians[count] / (count / counts[0] * medians[counts[0]]), 3),
        }
        for count in counts
    ]


def _fit(folder: Path, root: Path, count: int, most: int, steps: int, device: str) -> float:
    """Trains the quickstart in separate processes, and returns the median of the tokens a second that it logged."""
    settings = {
        "config": shipped("recipes/quickstart.yaml"),
        "trainer.max_steps": steps,
        "trainer.devices": count,
        "trainer.accelerator": device if device == "cpu" else "gpu",
        "trainer.strategy": "ddp",
        "trainer.log_every_n_steps": max(1, steps // 6),
        "trainer.default_root_dir": root,
        "trainer.enable_progress_bar": "false",
        "trainer.logger": "lightning.pytorch.loggers.CSVLogger",
        "trainer.logger.save_dir": root / "csv",
        "data.train": folder / "train-*.tar",
        "data.tokenizer": folder / "tokenizer.model",
        "checkpoint.every_n_train_steps": 10 * steps,
    }
    script = folder / "fit.py"  # Lightning starts it again for each further process
    script.write_text("import sys\n\nfrom fuyu_e2e.cli import main\n\nsys.exit(main())\n")
    threads = str(max(1, torch.get_num_threads() // most))
    done = subprocess.run(
        [sys.executable, str(script), "fit", *(f"--{name}={value}" for name, value in settings.items())],
        env=os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"Training in {count} processes failed:\n{done.stdout}{done.stderr}")
    [metrics] = (root / "csv").rglob("metrics.csv")
    with metrics.open() as file:
        speeds = [float(row["tokens/s"]) for row in csv.DictReader(file) if row.get("tokens/s")]
    return statistics.median(speeds[1:])


def _table(part: str, results: Sequence[dict[str, Any]]) -> Table:
    table = Table(part, *list(results[0])[1:])
    for result in results:
        table.add_row(*map(str, result.values()))
    return table


def _draw(found: dict[str, Any], axes: list[Any]) -> None:
    labels = {"rows": "tokens of a row", "images": "patches along a side", "widths": "width",
              "processes": "processes"}  # fmt: skip
    for axis, (part, results) in zip(axes, found.items(), strict=True):
        key = "efficiency" if part == "processes" else "microseconds_per_token"
        axis.plot([result["value"] for result in results], [result[key] for result in results], marker="o")
        axis.set(xscale="log", xlabel=labels[part], ylabel=key.replace("_", " "))
        axis.set_ylim(bottom=0)
