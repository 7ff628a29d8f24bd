"""A few steps of the real trainer in each precision and under each strategy, beside those of a CPU in float32.

All begin with the same weights, those of a short run on the CPU, since a new model guesses alike in any precision, and
see the same rows. Losses tell of the forward pass, of the backward and of the update; gradient norms of the backward
pass alone.
"""

import csv
import math
import os
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fuyu_e2e.bench.limit import prepare
from fuyu_e2e.bench.measure import Figures, environment
from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.model.float8 import has_float8

STEPS = 4
WARM_UP = 20
"""Steps whose weights all begin with."""
TOLERANCES = {"32-true": 2e-3, "bf16-mixed": 2e-2, "fp8": 5e-2}
"""Of a loss; a gradient norm, which rounding moves more, has three times that."""
NORM = 3
DECODER = {"layers": 3, "width": 256, "heads": 4, "kv_heads": 2, "head_size": 64, "feed_forward": 512}
MIXED = {"trainer.precision": "bf16-mixed"}
COMPILED = {"model.compile": "true"}
MUON = {"model.optimizer.name": "muon"}
CASES: dict[str, dict[str, str]] = {
    "adamw, 32-true": {},
    "muon, 32-true": MUON,
    "adamw, bf16-mixed": MIXED,
    "muon, bf16-mixed": MIXED | MUON,
    "selective": MIXED | {"model.activation_checkpointing": "selective"},
    "full": MIXED | {"model.activation_checkpointing": "full"},
    "two micro-batches": {"trainer.accumulate_grad_batches": "2"},
    "ddp, 32-true": {"trainer.strategy": "ddp"},
    "fsdp2, 32-true": {"trainer.strategy": "fsdp2"},
    "fsdp2, muon, bf16-mixed": {"trainer.strategy": "fsdp2"} | MIXED | MUON,
    "ddp, muon, bf16-mixed": {"trainer.strategy": "ddp"} | MIXED | MUON,
    **{f"attention {name}": MIXED | {"model.attention": name} for name in ("documents", "varlen", "flex")},
    "compiled": MIXED | COMPILED,
    "compiled, selective": MIXED | COMPILED | {"model.activation_checkpointing": "selective"},
    "compiled, full": MIXED | COMPILED | {"model.activation_checkpointing": "full"},
    "compiled, fsdp2": MIXED | COMPILED | {"trainer.strategy": "fsdp2"},
    "compiled, fp8": MIXED | COMPILED | {"model.fp8": "true"},
}
ON_A_CPU = ("muon, bf16-mixed", "two micro-batches", "ddp, 32-true", "fsdp2, muon, bf16-mixed")
"""Enough to show that the script runs."""
FP8 = {"compiled, fp8"}


def fit(folder: Path, root: Path, device: str, settings: Mapping[str, Any]) -> dict[str, list[float]]:
    """Trains in a process of its own, and gives what it logged of each step.

    Raises:
        RuntimeError: It failed; with the end of what it said.
    """
    every = {
        "config": shipped("recipes/quickstart.yaml"),
        "trainer.max_steps": STEPS,
        "trainer.accelerator": "cpu" if device == "cpu" else "gpu",
        "trainer.log_every_n_steps": 1,
        "trainer.default_root_dir": root,
        "trainer.enable_progress_bar": "false",
        "trainer.logger": "lightning.pytorch.loggers.CSVLogger",
        "trainer.logger.save_dir": root / "csv",
        "data.train": folder / "train-*.tar",
        "data.tokenizer": folder / "tokenizer.model",
        "data.budget": 1_024,
        "model.optimizer.name": "adamw",
        "checkpoint.every_n_train_steps": WARM_UP,
        **{f"model.decoder.{name}": value for name, value in DECODER.items()},
        **settings,
    }
    done = subprocess.run(
        [sys.executable, "-m", "fuyu_e2e", "fit", *(f"--{name}={value}" for name, value in every.items())],
        # Several run at once.
        env=os.environ | {"OMP_NUM_THREADS": "2"} | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr).strip()[-1_500:])
    [metrics] = (root / "csv").rglob("metrics.csv")
    with metrics.open() as file:
        rows = list(csv.DictReader(file))
    return {
        name: [float(row[name]) for row in rows if row.get(name)] for name in ("train/loss", "train/gradient_norm")
    }


def compare(name: str, found: dict[str, list[float]], expected: dict[str, list[float]]) -> list[dict[str, Any]]:
    """How far losses and gradient norms are from the CPU's, relatively, at most over the steps."""
    rounding = "fp8" if name in FP8 else CASES[name].get("trainer.precision", "32-true")
    if MUON.items() <= CASES[name].items():
        rounding = "bf16-mixed"  # Muon's products are in bfloat16 on CUDA devices
    tolerance = TOLERANCES[rounding]
    checks = []
    for what, allowed in (("train/loss", tolerance), ("train/gradient_norm", NORM * tolerance)):
        pairs = zip(found[what], expected[what], strict=True)
        # torch's maximum, since Python's may pass over one that isn't a number.
        measured = float(torch.tensor([abs(mine - theirs) / theirs for mine, theirs in pairs]).max())
        checks.append(
            {
                "what": f"{name}: {what}'s distance from the CPU's in float32",
                "measured": round(measured, 6) if math.isfinite(measured) else str(measured),
                "expected": f"at most {allowed:g}",
                "holds": measured <= allowed,
            }
        )
    return checks


DECISIVE = ("model.optimizer.name", "trainer.accumulate_grad_batches")
"""Settings that change more than rounding: each of their values has a run of its own on the CPU to compare with."""


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    every = CASES if has_float8() else {name: case for name, case in CASES.items() if name not in FP8}
    cases = every if device == "cuda" else {name: CASES[name] for name in ON_A_CPU}
    figures = Figures(options.out, environment(device) | {"steps": STEPS})
    checks: list[dict[str, Any]] = []
    with TemporaryDirectory() as name, ThreadPoolExecutor(6 if device == "cuda" else 2) as pool:
        folder = Path(name)
        prepare(folder)
        fit(folder, folder / "warm-up", "cpu", {"trainer.max_steps": WARM_UP})

        def start(root: str, where: str, settings: dict[str, str]) -> Future[dict[str, list[float]]]:
            begun = {"model.weights": folder / "warm-up"} | settings
            return pool.submit(fit, folder, folder / root.replace(" ", "-"), where, begun)

        alike = {case: tuple(settings.get(name) for name in DECISIVE) for case, settings in cases.items()}
        references = {
            values: start(f"reference {number}", "cpu",
                          {name: value for name, value in zip(DECISIVE, values, strict=True) if value is not None})
            for number, values in enumerate(dict.fromkeys(alike.values()))
        }  # fmt: skip
        runs = {start(case, device, settings): case for case, settings in cases.items()}
        for run in as_completed(runs):
            case = runs[run]
            try:
                checks += compare(case, run.result(), references[alike[case]].result())
            except (RuntimeError, ValueError) as error:
                checks.append(
                    {"what": f"{case}: training", "measured": str(error), "expected": "its end", "holds": False}
                )
            figures.keep(checks=checks)
    figures.end(checks=checks)


if __name__ == "__main__":
    main()
