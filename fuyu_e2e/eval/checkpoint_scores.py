"""`fuyu-e2e evaluate`: a checkpoint's scores on a task, and whether it looks at the images."""

import platform
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from fuyu_e2e.checkpoint.exported_model import is_exported
from fuyu_e2e.checkpoint.loading import build_model, read_model
from fuyu_e2e.data.progress_bar import ProgressBar
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.errors import UserError
from fuyu_e2e.eval.evaluation import evaluate as evaluate_task
from fuyu_e2e.eval.report import print_report, write_report
from fuyu_e2e.eval.scores import score
from fuyu_e2e.eval.task import load_task
from fuyu_e2e.inference.device import autocast, find_device, product_type
from fuyu_e2e.version import __version__


def score_checkpoint(options: Namespace) -> None:
    """Computes, writes and prints the scores for the options of `fuyu-e2e evaluate`.

    Raises:
        UserError: The task, its data or the checkpoint can't be read, or no question can be used.
    """
    device = find_device(options.device)
    task = load_task(options.task, dict(options.data))
    stored = read_model(options.checkpoint)
    model = build_model(stored, device)
    console = Console(highlight=False)
    started_at = time.perf_counter()
    read = SampleStats()
    with ProgressBar(f"Asking {task.name}", unit="questions") as progress, autocast(device):
        evaluation = evaluate_task(
            model,
            task,
            task.questions(read),
            limit=options.limit,
            batch_tokens=options.batch_tokens,
            seed=options.seed,
            read=read,
            tell=Told(progress),
        )
    if not evaluation.all_stats["image"].used:
        raise UserError(f"No question of {task.name} could be asked{_reasons(read, evaluation.all_stats['image'])}.")
    with ProgressBar(f"Scoring {task.name}"):
        scores = score(evaluation)
    folder = Path(options.out) if options.out else run_folder(stored.source) / "evaluate" / task.name
    about = {
        "task": task.name,
        "task_settings": asdict(task),
        "checkpoint": str(stored.source),
        "step": stored.provenance.step,
        "tokens_seen": stored.provenance.tokens_seen,
        "limit": options.limit,
        "seconds": round(time.perf_counter() - started_at, 1),
        "device": str(device),
        "products": str(product_type(device)).removeprefix("torch."),
        "versions": {
            "fuyu-e2e": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    write_report(evaluation, scores, about, folder)
    console.print(f"{task.name}, step {stored.provenance.step:,} of {stored.source}", soft_wrap=True)
    print_report(console, evaluation, scores)
    console.print(f"All figures, answers and pictures: {folder}", soft_wrap=True)


def _reasons(*all_stats: SampleStats) -> str:
    """Returns the counts of skipped samples by reason, each with its first sample."""
    found = [
        f"{count:,} {stats.examples[reason]}" for stats in all_stats for reason, count in stats.skipped.most_common()
    ]
    return f"; by reason, with the first of each: {'; '.join(found)}" if found else ": there are none"


class Told:
    """Reports an evaluation's progress."""

    def __init__(self, progress: ProgressBar) -> None:
        self.progress, self.done = progress, 0

    def __call__(self, done: int) -> None:
        """Reports the total number of completed questions."""
        self.progress.advance(float(done - self.done))
        self.done = done


def run_folder(source: Path) -> Path:
    """Returns the directory of a checkpoint's run; an exported folder itself."""
    if is_exported(source):
        return source
    return source.parent.parent if source.parent.name == "checkpoints" else source.parent
