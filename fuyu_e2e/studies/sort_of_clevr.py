"""Accuracy over the steps of Sort-of-CLEVR runs: of each kept checkpoint, by kind and form of question.

An answer is right if the model would generate exactly its tokens. One forward pass over question and true answer
decides
that: greedy decoding gives the truth if and only if each of its tokens is the likeliest after those before it.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table

from fuyu_e2e.bench.measure import environment, write_json
from fuyu_e2e.bench.plots import draw_picture
from fuyu_e2e.checkpoint.lightning_io import read_checkpoint
from fuyu_e2e.checkpoint.loading import TrainedModel, load_model
from fuyu_e2e.checkpoint.metadata import SECTION
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.errors import UserError
from fuyu_e2e.eval.question import Question
from fuyu_e2e.eval.shard_questions import read_shards
from fuyu_e2e.tasks.sort_of_clevr import KINDS

GROUPS = {
    "kind": KINDS,
    "question": ("shape", "left", "top", "closest", "furthest", "count"),
}
"""The groups of accuracies."""
PUBLISHED = {"relational": 0.94, "non-relational": 0.94}
"""Accuracy that a relation network exceeds (Santoro et al. 2017); drawn as lines."""
BATCH = 64
"""Questions of one forward pass."""


def sort_of_clevr(args: Sequence[str]) -> None:
    """Scores every checkpoint of some runs on the same test questions; writes the curves as JSON and as a picture."""
    parser = ArgumentParser(prog="python -m fuyu_e2e.studies sort-of-clevr", description=sort_of_clevr.__doc__)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="Directories of runs.")
    parser.add_argument("--test", default="runs/sort-of-clevr/data/test-*.tar", help="Shards (default: %(default)s).")
    parser.add_argument("--images", type=int, default=200, help="Test pictures for each (default: %(default)s).")
    parser.add_argument(
        "--last-images", type=int, default=2_000, help="Test pictures for the last (default: %(default)s)."
    )
    parser.add_argument("--out", type=Path, default=Path("docs/bench/sort-of-clevr-cpu.json"))
    options = parser.parse_args(args)
    questions = read_questions(options.test, max(options.images, options.last_images))
    runs = [score_run(run, questions, options.images, options.last_images) for run in options.runs]
    write_json(options.out, {"environment": environment("cpu"), "published": PUBLISHED, "runs": runs})
    report(runs)
    draw_picture(options.out.with_suffix(".png"), 2, partial(_draw, runs))


def read_questions(pattern: str, images: int) -> list[Question]:
    """Returns the questions about the first `images` pictures.

    Raises:
        UserError: There is no shard, or a sample that isn't a question.
    """
    seen: set[str] = set()
    questions, stats = [], SampleStats()
    for question in read_shards(pattern, stats):
        seen.add(question.image)
        if len(seen) > images:
            break
        questions.append(question)
    if stats.skipped:
        raise UserError(f"{pattern} holds samples that are no questions: {stats.summary()}.")
    return questions


def score_run(run: Path, questions: Sequence[Question], images: int, last_images: int) -> dict[str, Any]:
    """Returns the settings of a run and its curve.

    Raises:
        UserError: The run kept no checkpoint.
    """
    checkpoints = {path for path in (run / "checkpoints").glob("*.ckpt") if not path.is_symlink()}
    if not checkpoints:
        raise UserError(f"{run} holds no checkpoint.")
    models = {path: load_model(path) for path in checkpoints}
    ordered = sorted(checkpoints, key=lambda path: models[path].step)
    curve = []
    for path in ordered:
        asked = last_images if path == ordered[-1] else images
        names = dict.fromkeys(question.image for question in questions)
        wanted = set(list(names)[:asked])
        scores = score(models[path], [question for question in questions if question.image in wanted])
        tokens = read_checkpoint(path)[SECTION]["tokens_seen"]
        curve.append({"step": models[path].step, "tokens": tokens, "images": len(wanted), **scores})
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    settings = {name: recipe[name] for name in ("seed_everything", "model", "data")}
    return {"name": run.name, "settings": settings, "curve": curve}


@torch.inference_mode()
def score(model: TrainedModel, questions: Sequence[Question]) -> dict[str, float]:
    """Returns the fraction of right answers in each group that occurs."""
    right: dict[str, list[bool]] = {}
    builder = model.builder
    for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        row = pack_row([builder.answered(builder.prompt(asked.document), asked.references[0]) for asked in part])
        wrong = model.decoder.logits(row).index_select(0, row.target_positions).argmax(dim=-1) != row.targets
        ends = np.cumsum(row.document_lengths)
        failed = set(np.searchsorted(ends, row.target_positions[wrong].numpy(), side="right").tolist())
        for place, question in enumerate(part):
            for group in GROUPS:
                right.setdefault(question.groups[group], []).append(place not in failed)
    return {group: float(np.mean(right[group])) for names in GROUPS.values() for group in names if group in right}


def report(runs: Sequence[dict[str, Any]]) -> None:
    """Prints the last figures of each run."""
    last = [run["curve"][-1] for run in runs]
    table = Table("", *(run["name"] for run in runs))
    table.add_row("steps", *(f"{point['step']:,}" for point in last))
    table.add_row("pictures", *(f"{point['images']:,}" for point in last))
    for name in (name for names in GROUPS.values() for name in names):
        table.add_row(name, *(f"{point[name]:.3f}" for point in last))
    Console(highlight=False).print(table)


def _draw(runs: Sequence[dict[str, Any]], axes: list[Any]) -> None:
    for axis, kind in zip(axes, GROUPS["kind"], strict=True):
        for run in runs:
            curve = run["curve"]
            axis.plot(
                [point["step"] for point in curve], [point[kind] for point in curve], marker=".", label=run["name"]
            )
        axis.axhline(PUBLISHED[kind], color="gray", linestyle=":", label="relation network, published")
        axis.set(xlabel="steps", ylabel="right answers", title=kind, ylim=(0, 1.02))
        axis.legend(fontsize=7)
