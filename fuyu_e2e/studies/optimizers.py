"""How many steps does Muon save over a tuned AdamW? The quickstart's decoder on pictures of one digit.

Both get equally many tries, at one length and seed: first for the rate, then for one other setting of the best at a
time. The best of each then trains from scratch at every length, with other seeds. Each run has a complete warm-up and
decay, so that a shorter run is complete too: the comparison is between lengths of runs that end at the same held-out
loss.
"""

import json
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from fuyu_e2e.bench.measure import environment, write_json
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.studies.isoflop import DENSE, StoredRows, held_out_loss, prepare, stored_rows
from fuyu_e2e.studies.optimizers_report import compare, report
from fuyu_e2e.training.optimizers import OptimizerConfig, build_optimizer
from fuyu_e2e.training.schedule import Schedule

DECODER = replace(DENSE, layers=4)
"""The quickstart's decoder."""
SCHEDULE = Schedule(shape="wsd", decay=0.5)
"""The quickstart's schedule."""
ROW_TOKENS = 512
"""Tokens of a step: a quarter of the quickstart's, so that all runs finish within an hour on one core."""
MOST_DIGITS = 1
TUNING_SEED = 0
"""Seed of the runs that choose the settings; the compared runs have others."""
RATES: dict[str, tuple[dict[str, Any], ...]] = {
    "adamw": tuple({"lr": rate, "weight_decay": 0.0} for rate in (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)),
    "muon": tuple({"muon_lr": rate, "lr": 1e-3, "weight_decay": 0.0} for rate in (0.005, 0.01, 0.02, 0.04, 0.08)),
}
"""The settings tried first."""
OTHERS: dict[str, tuple[dict[str, Any], ...]] = {
    "adamw": ({"betas": (0.9, 0.99)}, {"weight_decay": 0.1}),
    "muon": ({"lr": 3e-3}, {"muon_weight_decay": 0.1}),
}
"""The settings tried next, each replacing one of the best first settings."""


def optimizers(args: Sequence[str]) -> None:
    """Trains the quickstart's decoder with AdamW and Muon, both tuned, to compare loss over the length of a run."""
    parser = ArgumentParser(prog="python -m fuyu_e2e.studies optimizers", description=optimizers.__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 150, 225, 340, 500], help="Steps of a run.")
    parser.add_argument("--tuned-at", type=int, default=340, help="Steps of the runs that choose the settings.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--pictures", type=int, default=20_000, help="Training pictures (default: %(default)s).")
    parser.add_argument("--test-pictures", type=int, default=500)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench-optimizers.json"),
        help="Beside it lies a .jsonl with a line for each run; what that holds already is not run again.",
    )
    options = parser.parse_args(args)
    with TemporaryDirectory() as folder:
        prepare(
            Path(folder),
            seed=TUNING_SEED,
            pictures=options.pictures,
            test_pictures=options.test_pictures,
            most_digits=MOST_DIGITS,
            row_tokens=ROW_TOKENS,
        )
        runs = Runs(Path(folder), options.out.with_suffix(".jsonl"), max(*options.lengths, options.tuned_at))
        best = {name: _tune(runs, name, options.tuned_at) for name in RATES}
        for seed in options.seeds:
            for steps in sorted(options.lengths, reverse=True):
                for name, settings in best.items():
                    runs.loss(name, settings, steps, seed)
    compared = [run for run in runs.done if run["seed"] != TUNING_SEED]
    result = {
        **environment("cpu"),
        "row_tokens": ROW_TOKENS,
        "tuned_at": options.tuned_at,
        "best": best,
        "steps_saved": compare(compared),
        "runs": runs.done,
    }
    write_json(options.out, result)
    report(compared, options.out.with_suffix(".png"))


def _tune(runs: "Runs", name: str, steps: int) -> dict[str, Any]:
    """Returns the settings whose run ends at the lowest loss."""
    rated = [(runs.loss(name, settings, steps, TUNING_SEED), settings) for settings in RATES[name]]
    best = min(rated, key=lambda run: run[0])[1]
    varied = [{**best, **other} for other in OTHERS[name]]
    rated += [(runs.loss(name, settings, steps, TUNING_SEED), settings) for settings in varied]
    return min(rated, key=lambda run: run[0])[1]


class Runs:
    """Runs on the same pictures, each recorded as it ends.

    Args:
        folder: The folder of the pictures and their tokenizer.
        results: The file with a line for each run; recorded runs are not repeated.
        longest: Steps of the longest run.
    """

    def __init__(self, folder: Path, results: Path, longest: int) -> None:
        results.parent.mkdir(parents=True, exist_ok=True)
        self.done: list[dict[str, Any]] = []
        """All completed runs, including recorded ones."""
        if results.exists():
            self.done = [json.loads(line) for line in results.read_text().splitlines()]
        self._folder, self._results, self._longest = folder, results, longest
        self._data: dict[int, StoredRows] = {}

    def loss(self, name: str, settings: Mapping[str, Any], steps: int, seed: int) -> float:
        """Returns the held-out loss at the end of a run; the seed determines weights and the order of pictures."""
        what = {"optimizer": name, "settings": json.loads(json.dumps(settings)), "steps": steps, "seed": seed}
        for run in self._matching(what):
            return float(run["loss"])
        started_at = time.process_time()
        run = {**what, "loss": self._train(OptimizerConfig(name=name, **settings), steps, seed)}  # type: ignore[arg-type]
        run["cpu_seconds"] = round(time.process_time() - started_at, 1)
        Console(highlight=False).print(f"{name} {settings}, {steps} steps, seed {seed}: {run['loss']:.4f}")
        self.done.append(run)
        with self._results.open("a") as file:
            file.write(json.dumps(run) + "\n")
        return float(run["loss"])

    def _matching(self, what: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        return (run for run in self.done if what.items() <= run.items())

    def _train(self, config: OptimizerConfig, steps: int, seed: int) -> float:
        if seed not in self._data:
            self._data = {seed: stored_rows(self._folder, seed, ROW_TOKENS)}  # one seed's rows at a time
            self._data[seed].store(self._longest)
        data = self._data[seed]
        torch.manual_seed(seed)
        decoder = Decoder(DECODER)
        optimizer = build_optimizer(decoder, config)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: SCHEDULE.factor(step, steps))
        for row in data.rows[:steps]:
            (decoder.loss(row.batch) / row.batch.targets.numel()).backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return held_out_loss(decoder.eval(), data)
