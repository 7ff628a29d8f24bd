"""Measures how close training and generation come to the machine's limits, and Lightning's overhead.

The limits are measured in the same run: the product of two large matrices, and a copy. Operations are those of
`fuyu_e2e.model.cost`; bytes are the least that must move, each weight once for each use, without activations.
"""

import io
import os
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from fuyu_e2e.bench.decoders import new_decoder
from fuyu_e2e.bench.documents import Rows
from fuyu_e2e.bench.generate import NEVER, bytes_of_step, random_decoder, random_prompts, sized
from fuyu_e2e.bench.measure import Figures, alternate, environment
from fuyu_e2e.bench.plots import draw_picture
from fuyu_e2e.bench.profile_parts import profile_parts
from fuyu_e2e.bench.train import CASES, build
from fuyu_e2e.data.packing import PackedRow, pack_row
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.reading import read_documents
from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.data.tokenizer import train_tokenizer
from fuyu_e2e.inference.generation import generate
from fuyu_e2e.model.cost import batch_cost, decode_step_flops
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.tasks.digits import VOCAB_SIZE, write_shards
from fuyu_e2e.training.device_limits import copy_bandwidth, matmul_rate
from fuyu_e2e.training.optimizers import build_optimizer
from fuyu_e2e.training.settings.recipe import FuyuCLI

UPDATE_TOUCHES = 10
"""Times that a step moves all weights: weights in both passes, gradients written and read, AdamW's weights and two
averages read and written."""
WARM_UP = 5
"""Steps at the start of a run that are not timed."""
PROMPTS = (1, 8)
NEW_TOKENS = 32
PICTURES = 2_000
"""Pictures of digits to train on."""


def limit(args: Sequence[str]) -> None:
    """Measures the device's limits, the fractions that a training step and decoding reach, and Lightning's
    overhead."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = ArgumentParser(prog="python -m fuyu_e2e.bench limit", description=limit.__doc__)
    sizes = ["125m", "1b"] if device == "cuda" else ["small"]
    parser.add_argument(
        "--sizes", nargs="+", choices=list(CASES), default=sizes, help="Trained (default: %(default)s)"
    )
    parser.add_argument("--decoders", nargs="+", default=["125m", "1b"] if device == "cuda" else ["10m"])
    parser.add_argument("--steps", type=int, default=40, help="Of the trainer and of the bare loop, in each round.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="Leaves compiled decoding out.")
    parser.add_argument("--out", type=Path, default=Path("bench-limit.json"))
    options = parser.parse_args(args)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rate, bandwidth = matmul_rate(device, dtype), copy_bandwidth(device)
    console = Console(highlight=False)
    figures = Figures(options.out, environment(device))
    shares: list[dict[str, Any]] = []

    def keep(found: Sequence[dict[str, Any]]) -> None:
        shares.extend(found)
        for share in shares:
            share["of_matmul_rate"] = round(share["flops"] / share["seconds"] / rate, 4)
            share["of_bandwidth"] = round(share["least_bytes"] / share["seconds"] / bandwidth, 4)
        limits = {"matmul_flops_per_second": round(rate), "copy_bytes_per_second": round(bandwidth)}
        figures.keep(**limits, shares=shares)

    for size in options.sizes:
        keep([_training(size, device, options.rounds)])
    for size in options.decoders:
        keep(_decoding(size, device, options.rounds, compiled=not options.eager))
    rate, bandwidth = max(rate, matmul_rate(device, dtype)), max(bandwidth, copy_bandwidth(device))
    keep([])
    console.print(f"products {rate / 1e12:.4g} Tflop/s, copies {bandwidth / 1e9:.4g} GB/s")
    console.print(_table(shares))
    with TemporaryDirectory() as folder:
        prepare(Path(folder))
        parts = _profile(Path(folder), device, options.steps)
        figures.keep(milliseconds_by_part={name: round(value, 3) for name, value in parts.items()})
        overhead = _overhead(Path(folder), device, options.steps, options.rounds)
    whole = sum(parts.values())
    console.print("a step by part: " + ", ".join(f"{name} {value / whole:.1%}" for name, value in parts.items()))
    console.print(f"Lightning with all callbacks takes {overhead['overhead']:.1%} more than a bare loop")
    figures.end(lightning=overhead)
    draw_picture(options.out.with_suffix(".png"), 2, partial(_draw, shares, parts))


def _training(size: str, device: str, rounds: int) -> dict[str, Any]:
    """Returns the figures of an eager training step of `bench train`."""
    case = CASES[size]
    trainee = build(case, ["ours"], device)["ours"]
    seconds = alternate({"step": trainee.epoch}, rounds, warm_up=1)["step"] / case.rows
    rows = [pack_row(row, case.budget) for row in case.documents]
    costs = [batch_cost(case.config, row) for row in rows]
    return {
        "what": f"training step, {size}, row of {case.budget}",
        "seconds": round(seconds, 6),
        "flops": statistics.mean(row.training_flops for row in costs),
        "least_bytes": UPDATE_TOUCHES * 4 * costs[0].parameters,
    }


def _decoding(size: str, device: str, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """Returns the figures of a generation step, for each number of prompts: the time of many tokens less that of
    one."""
    decoder = random_decoder(sized(size), device)
    found = []
    for count in PROMPTS:
        prompts = random_prompts(decoder.config, count)
        for mode in (False, True) if compiled else (False,):
            write = partial(generate, decoder, prompts, eos_id=NEVER, compiled=mode)
            runs = {str(tokens): partial(write, max_new_tokens=tokens) for tokens in (1, NEW_TOKENS)}
            seconds = alternate(runs, rounds, warm_up=1)
            keys = [len(prompt) + NEW_TOKENS / 2 for prompt in prompts]
            found.append(
                {
                    "what": f"decoding, {size}, {count} prompts, {'compiled' if mode else 'eager'}",
                    "seconds": round((seconds[str(NEW_TOKENS)] - seconds["1"]) / (NEW_TOKENS - 1), 6),
                    "flops": decode_step_flops(decoder.config, keys),
                    "least_bytes": round(bytes_of_step(decoder, prompts, NEW_TOKENS)),
                }
            )
    return found


def prepare(folder: Path) -> None:
    """Writes the quickstart's shards and tokenizer."""
    train = write_shards(folder, split="train", count=PICTURES, seed=0, most_digits=4, processes=1)
    texts = (text for document in read_documents(train[0], SampleStats()) for text in document.texts)
    train_tokenizer(texts, VOCAB_SIZE).save(folder / "tokenizer.model")


def quickstart_run(folder: Path, device: str, steps: int, further: Sequence[str] = ()) -> FuyuCLI:
    """Returns the quickstart as the command line builds it, with all its callbacks; on a GPU with the shape of 125m.

    Args:
        folder: The folder of `prepare`.
        device: `cpu` or `cuda`.
        steps: Steps of the run.
        further: More options of the command line.
    """
    settings: dict[str, Any] = {
        "config": shipped("recipes/quickstart.yaml"),
        "trainer.max_steps": steps,
        "trainer.accelerator": device if device == "cpu" else "gpu",
        "trainer.default_root_dir": folder / "run",
        "data.train": folder / "train-*.tar",
        "data.tokenizer": folder / "tokenizer.model",
    }
    if device == "cuda":
        larger = {"layers": 12, "width": 768, "heads": 12, "kv_heads": 4, "head_size": 64, "feed_forward": 2_048}
        settings |= {f"model.decoder.{name}": value for name, value in larger.items()} | {"data.budget": 16_384}
    return FuyuCLI([*(f"--{name}={value}" for name, value in settings.items()), *further], run=False)


def _profile(folder: Path, device: str, steps: int) -> dict[str, float]:
    """Returns milliseconds by part of the quickstart's training, with rows read in the training process."""
    run = quickstart_run(folder, device, steps)
    decoder = new_decoder(run.model.config, device).train()
    optimizer = build_optimizer(decoder, run.model.optimizer_config)
    rows = (row.batch for row in run.datamodule.stream("train").rows())
    return profile_parts(decoder, rows, partial(_update, decoder, optimizer), steps, device)


def _update(decoder: Decoder, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _overhead(folder: Path, device: str, steps: int, rounds: int) -> dict[str, float]:
    """Returns the time of a real trainer's step and of a bare loop's, over the same rows, measured alternately."""
    stream = quickstart_run(folder, device, steps).datamodule.stream("train")
    rows = list(islice(stream.rows(), steps))
    trainer, bare = [], []
    for _ in range(rounds):
        bare.append(_bare_seconds(folder, device, rows))
        trainer.append(_trainer_seconds(folder, device, rows))
    # The fastest round of each: other load only slows rounds down, by more than the difference measured here.
    return {
        "trainer_seconds_per_step": round(min(trainer), 6),
        "bare_seconds_per_step": round(min(bare), 6),
        "overhead": round(min(trainer) / min(bare) - 1, 4),
    }


class _Clock(Callback):
    """Records when the first timed step began, and when the last ended."""

    def __init__(self) -> None:
        self.started_at = self.ended_at = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, number: int
    ) -> None:
        if number == WARM_UP:
            self.started_at = _now()

    def on_train_batch_end(self, *_: Any) -> None:
        self.ended_at = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if torch.cuda.is_available():
            self.ended_at = _now()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _trainer_seconds(folder: Path, device: str, rows: Sequence[PackedRow]) -> float:
    run = quickstart_run(folder, device, len(rows))
    clock = _Clock()
    run.trainer.callbacks.append(clock)  # type: ignore[attr-defined]
    run.datamodule.train_dataloader = partial(DataLoader, Rows(rows), batch_size=None)
    os.environ["FORCE_COLOR"] = "1"  # draws the progress bar as in a terminal
    try:
        with redirect_stdout(io.StringIO()):
            run.trainer.fit(run.model, datamodule=run.datamodule)
    finally:
        del os.environ["FORCE_COLOR"]
    return (clock.ended_at - clock.started_at) / (len(rows) - WARM_UP)


def _bare_seconds(folder: Path, device: str, rows: Sequence[PackedRow]) -> float:
    run = quickstart_run(folder, device, len(rows))
    decoder = new_decoder(run.model.config, device).train()
    optimizer = build_optimizer(decoder, run.model.optimizer_config)
    started_at = 0.0
    for number, row in enumerate(DataLoader(Rows(rows), batch_size=None)):
        if number == WARM_UP:
            started_at = _now()
        batch = row.batch.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = decoder.loss(batch) / batch.targets.numel()
        loss.backward()
        _update(decoder, optimizer)
    return (_now() - started_at) / (len(rows) - WARM_UP)


def _table(shares: Sequence[dict[str, Any]]) -> Table:
    table = Table("what", "seconds", "of matmul rate", "of bandwidth")
    for share in shares:
        table.add_row(*(str(share[key]) for key in ("what", "seconds", "of_matmul_rate", "of_bandwidth")))
    return table


def _draw(shares: Sequence[dict[str, Any]], parts: dict[str, float], axes: list[Any]) -> None:
    names = [share["what"] for share in shares][::-1]
    for key, shift in (("of_matmul_rate", 0.2), ("of_bandwidth", -0.2)):
        places = [place + shift for place in range(len(names))]
        axes[0].barh(places, [share[key] for share in shares][::-1], height=0.4, label=key.replace("_", " "))
    axes[0].set(yticks=range(len(names)), yticklabels=names, xlabel="share of the device's limit")
    axes[0].legend()
    axes[1].barh(list(parts)[::-1], list(parts.values())[::-1])
    axes[1].set(xlabel="milliseconds of a training step")
