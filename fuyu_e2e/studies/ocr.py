"""How small may letters be? A model's character error rate by the height of the text."""

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fuyu_e2e.bench.measure import environment, write_json
from fuyu_e2e.bench.plots import draw_picture
from fuyu_e2e.checkpoint.loading import load_model
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.eval.contact_sheet import contact_sheet
from fuyu_e2e.eval.evaluation import evaluate
from fuyu_e2e.eval.report import BLIND, counts
from fuyu_e2e.eval.scores import MetricScores, Scored, score
from fuyu_e2e.eval.task import load_task

SPLITS = {"test": "fonts never trained on", "test-known-fonts": "fonts of training"}
"""The tests, all with words never trained on."""
METRICS = {"character_error_rate": "CER", "exact_match": "words"}
"""The task's metrics, with their names in the table."""

Scores = Mapping[str, Mapping[str, MetricScores]]
"""Scores by split and metric."""


def ocr(args: Sequence[str]) -> None:
    """Evaluates a model of recipes/ocr.yaml on the shards of data/rendered_text.py, by the height of letters."""
    parser = ArgumentParser(prog="python -m fuyu_e2e.studies ocr", description=ocr.__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/ocr"), help="Default: %(default)s.")
    parser.add_argument("--data", type=Path, default=Path("runs/ocr/data"), help="Default: %(default)s.")
    parser.add_argument("--out", type=Path, default=Path("bench-ocr.json"), help="Default: %(default)s.")
    options = parser.parse_args(args)
    model = load_model(options.checkpoint)
    results: dict[str, Any] = {**environment("cpu"), "steps": model.step}
    scores = {}
    for split in SPLITS:
        task = load_task("ocr", {"shards": str(options.data / f"{split}-0*.tar")})
        read = SampleStats()
        evaluation = evaluate(model, task, task.questions(read), read=read)
        scores[split] = score(evaluation)
        metrics = {name: asdict(found) for name, found in scores[split].items()}
        results[split] = {**counts(evaluation), "metrics": metrics}
        for name, cells in (("right", evaluation.right), ("wrong", evaluation.wrong)):
            if cells:
                contact_sheet(cells, options.out.with_name(f"{options.out.stem}-{split}-{name}.png"))
    write_json(options.out, results)
    Console(highlight=False).print(_table(scores))
    draw_picture(options.out.with_suffix(".png"), 1, lambda axes: _draw(axes[0], scores))


def _heights(scores: Scores, split: str, metric: str) -> dict[str, Scored]:
    return scores[split][metric].groups["height"]


def _table(scores: Scores) -> Table:
    columns = [(split, metric) for split in SPLITS for metric in METRICS]
    table = Table("height of a capital", *(f"{METRICS[metric]}: {SPLITS[split]}" for split, metric in columns))
    rows = {
        height: [_heights(scores, *column)[height] for column in columns] for height in _heights(scores, *columns[0])
    }
    rows["all"] = [scores[split][metric].all for split, metric in columns]
    rows |= {name: [scores[split][metric].blind[run] for split, metric in columns] for run, name in BLIND.items()}
    for name, cells in rows.items():
        table.add_row(name, *(f"{cell.value:.3f}" for cell in cells))
    return table


def _draw(axis: Any, scores: Scores) -> None:
    for split, name in SPLITS.items():
        heights = _heights(scores, split, "character_error_rate")
        rates = [scored.value for scored in heights.values()]
        axis.plot(list(heights), rates, marker="o", label=name)
        low, high = zip(*(scored.interval or (scored.value,) * 2 for scored in heights.values()), strict=True)
        axis.fill_between(list(heights), low, high, alpha=0.2)
    axis.set(xlabel="height of a capital in pixels", ylabel="character error rate", ylim=(0, None))
    axis.legend(fontsize=8)
