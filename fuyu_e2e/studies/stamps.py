"""Does a decoder without an encoder name and find things in real pictures, new ones too? Runs of some seeds, scored.

Runs share their training pictures; seeds are of the weights and of the order of the pictures.
"""

import json
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from fuyu_e2e.bench.measure import environment, write_json
from fuyu_e2e.checkpoint.loading import load_model
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.eval.contact_sheet import contact_sheet
from fuyu_e2e.eval.evaluation import evaluate
from fuyu_e2e.eval.report import BLIND, counts
from fuyu_e2e.eval.scores import score
from fuyu_e2e.eval.task import load_task
from fuyu_e2e.studies.grid import write_data
from fuyu_e2e.training.settings.recipe import FuyuCLI

SPLITS = {
    "test": "known photographs",
    "test-new-combinations": "new combinations",
    "test-new-photographs": "new photographs",
}
"""The tests, with their names in the table."""

Metric = Mapping[str, Any]
"""The scores of a split by one metric, as primitives."""


def stamps(args: Sequence[str]) -> None:
    """Trains recipes/stamps.yaml with each seed, and scores every run on all tests of data/stamps.py.

    Pictures, runs and scores that are there already are kept.
    """
    parser = ArgumentParser(prog="python -m fuyu_e2e.studies stamps", description=stamps.__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/stamps"), help="Folder (default: %(default)s).")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Default: 0 to 2.")
    parser.add_argument(
        "--pictures",
        default="data/stamps.py",
        help="The script that writes the pictures into the folder's data, with its options (default: %(default)s).",
    )
    parser.add_argument("--max-steps", type=int, help="Training steps, instead of the recipe's.")
    parser.add_argument("--out", type=Path, default=Path("bench-stamps.json"), help="Default: %(default)s.")
    options = parser.parse_args(args)
    options.runs.mkdir(parents=True, exist_ok=True)
    data = write_data(options.pictures, options.runs / "data")
    for seed in options.seeds:
        run = options.runs / f"seed-{seed}"
        if not (run / "scores.json").exists():
            _train(run, data, seed, options.max_steps)
            write_json(run / "scores.json", {"seed": seed, **_score(run, data)})
    runs = [json.loads(path.read_text()) for path in sorted(options.runs.glob("seed-*/scores.json"))]
    write_json(options.out, {**environment("cpu"), "runs": runs})
    Console(highlight=False).print(_table(runs))


def _train(run: Path, data: Path, seed: int, max_steps: int | None) -> None:
    """Trains or resumes a run."""
    settings: dict[str, Any] = {
        "config": shipped("recipes/stamps.yaml"),
        "seed_everything": seed,
        "trainer.default_root_dir": run,
        "data.tokenizer": data / "tokenizer.model",
        "data.mixture.one.shards": data / "train-one-*.tar",
        "data.mixture.all.shards": data / "train-0*.tar",
        "data.val": data / "val-*.tar",
        "ckpt_path": "last",
    }
    if max_steps is not None:
        settings |= {"trainer.max_steps": max_steps, "trainer.val_check_interval": max_steps}
    FuyuCLI(["fit", *(f"--{name}={value}" for name, value in settings.items())])


def _score(run: Path, data: Path) -> dict[str, Any]:
    """Returns a run's scores on all tests, as primitives; draws what it answered, right and wrong, into its folder."""
    model = load_model(run)
    found: dict[str, Any] = {"steps": model.step}
    for split in SPLITS:
        task = load_task("stamps", {"shards": str(data / f"{split}-0*.tar")})
        read = SampleStats()
        evaluation = evaluate(model, task, task.questions(read), read=read)
        metrics = {name: asdict(scores) for name, scores in score(evaluation).items()}
        found[split] = {**counts(evaluation), "metrics": metrics}
        for name, cells in (("right", evaluation.right), ("wrong", evaluation.wrong)):
            if cells:
                contact_sheet(cells, run / f"{split}-{name}.png")
    return found


def _table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Returns a table of means over runs: names that are right to the letter, and overlaps of boxes."""
    table = Table("", *SPLITS.values())

    def add(name: str, metric: str, *path: str) -> None:
        table.add_row(name, *(_mean(_at(run[split]["metrics"][metric], path) for run in runs) for split in SPLITS))

    def add_groups(name: str, metric: str, group: str) -> None:
        known = {value for run in runs for split in SPLITS for value in run[split]["metrics"][metric]["groups"][group]}
        for value in sorted(known):
            add(name.format(value), metric, "groups", group, value)

    add("names in English", "exact_match", "groups", "question", "English")
    add("names in German", "exact_match", "groups", "question", "German")
    add_groups("names of {}", "exact_match", "named")
    add_groups("names, the smallest of {} pixels", "exact_match", "smallest")
    add("overlap of boxes", "box_iou", "all")
    add("boxes that overlap by half", "box_iou_50", "all")
    add_groups("overlap among {}", "box_iou", "among")
    add_groups("overlap, {} pixels", "box_iou", "size")
    add("all right answers", "exact_match", "all")
    for run_name, name in BLIND.items():
        add(f"all right answers, {name}", "exact_match", "blind", run_name)
        add(f"overlap of boxes, {name}", "box_iou", "blind", run_name)
    return table


def _at(scores: Metric, path: Iterable[str]) -> float | None:
    """Returns the value at a path of names, or None if that split has none."""
    found: Any = scores
    for name in path:
        found = found.get(name, {})
    return found.get("value")


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):.3f}" if known else ""
