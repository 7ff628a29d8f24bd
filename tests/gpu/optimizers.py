"""What a step of the trainer's optimizers takes: time, and memory beside weights, gradients and state."""

import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from fuyu_e2e.bench.decoders import new_decoder
from fuyu_e2e.bench.measure import Figures, environment
from fuyu_e2e.model.config import SizeName, named_size
from fuyu_e2e.training.optimizers import OptimizerConfig, build_optimizer

NAMES: tuple[Literal["adamw", "muon"], ...] = ("adamw", "muon")
ROUNDS = 5


def measure(size: SizeName, name: Literal["adamw", "muon"], device: str) -> dict[str, Any]:
    """Seconds of a step, and on a GPU bytes held before it and taken more by it."""
    decoder = new_decoder(named_size(size), device)
    optimizer = build_optimizer(decoder, OptimizerConfig(name=name))
    for weight in decoder.parameters():
        weight.grad = torch.randn_like(weight)
    for _ in range(2):
        optimizer.step()
    result: dict[str, Any] = {"size": size, "optimizer": name}
    if device == "cuda":
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    started_at = time.perf_counter()
    for _ in range(ROUNDS):
        optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
        result |= {"bytes_held": held, "bytes_more": torch.cuda.max_memory_allocated() - held}
    return result | {"seconds": round((time.perf_counter() - started_at) / ROUNDS, 6)}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=get_args(SizeName), default=["125m", "1b"])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures = Figures(options.out, environment(device))
    results: list[dict[str, Any]] = []
    for size in options.sizes:
        for name in NAMES:
            results.append(measure(size, name, device))
            torch.cuda.empty_cache()
            figures.keep(results=results)
    figures.end()


if __name__ == "__main__":
    main()
