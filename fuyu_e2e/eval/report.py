"""The results of an evaluation: figures as JSON, every answer as a line, pictures, and a table."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fuyu_e2e.eval.contact_sheet import contact_sheet
from fuyu_e2e.eval.evaluation import RUNS, Evaluation, Outcome, Run
from fuyu_e2e.eval.scores import MetricScores, Scored

BLIND: dict[Run, str] = {"without_image": "blind: without image", "other_image": "blind: another's image"}


def write_report(
    evaluation: Evaluation, scores: Mapping[str, MetricScores], about: Mapping[str, Any], folder: Path
) -> None:
    """Writes `results.json`, `answers.jsonl` and, for tasks whose answers can be right, `pictures/`.

    Args:
        evaluation: All outcomes.
        scores: Their scores.
        about: Further entries of the results, as primitives.
        folder: The folder; created if needed.
    """
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    results = {**about, **counts(evaluation), "metrics": {name: asdict(found) for name, found in scores.items()}}
    (folder / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line(outcome), ensure_ascii=False) + "\n" for outcome in evaluation.outcomes)
    for name, cells in (("right", evaluation.right), ("wrong", evaluation.wrong)):
        sheet = pictures / f"{name}.png"
        sheet.unlink(missing_ok=True)
        if cells:
            contact_sheet(cells, sheet)


def counts(evaluation: Evaluation) -> dict[str, Any]:
    """Returns the counts of all questions, as primitives."""
    return {
        "seed": evaluation.seed,
        "questions": len(evaluation.outcomes),
        "images": len({outcome.image for outcome in evaluation.outcomes}),
        "no_question": {"skipped": dict(evaluation.read.skipped), "examples": evaluation.read.examples},
        "runs": {
            run: {
                "used": stats.used,
                "cut": sum(outcome.answers[run].cut for outcome in evaluation.outcomes),
                "scored_as_wrong": dict(stats.skipped),
                "examples": stats.examples,
            }
            for run, stats in evaluation.all_stats.items()
        },
    }


def line(outcome: Outcome) -> dict[str, Any]:
    """Returns one outcome as primitives."""
    answers = {run: answer for run, answer in outcome.answers.items() if run == "image" or answer.skipped is None}
    shown = {
        run: {name: value for name, value in asdict(found).items() if value not in (None, 0)}
        for run, found in answers.items()
    }
    seen = outcome.answers["image"]
    return {
        "key": outcome.key,
        "image": outcome.image,
        "groups": dict(outcome.groups),
        "turn": outcome.turn,
        "prompt": outcome.prompt,
        "references": list(outcome.references),
        "answer": seen.text,
        "right": outcome.right,
        "answers": shown,
    }


def print_report(console: Console, evaluation: Evaluation, scores: Mapping[str, MetricScores]) -> None:
    """Prints scores with intervals, also by group, the blind check, and what was left out."""
    table = Table("", "score", "95 % interval", "questions", "from the image")
    for name, found in scores.items():
        better = "" if found.higher_is_better else " (lower is better)"
        _add_row(table, f"{name.replace('_', ' ')}{better}", found.all)
        for group, values in found.groups.items():
            for value, scored in values.items():
                _add_row(table, f"  {group} {value}", scored)
        for run, scored in found.blind.items():
            _add_row(table, f"  {BLIND[run]}", scored, _share(found, run))
    console.print(table)
    known = {group for outcome in evaluation.outcomes for group in outcome.groups}
    for group in (group for group in evaluation.task.groups if group not in known):
        theirs = f"they have {', '.join(sorted(known))}" if known else "they have none"
        console.print(f"groups of the task names {group!r}, which no question has; {theirs}.", soft_wrap=True)
    if cut := sum(outcome.answers["image"].cut for outcome in evaluation.outcomes):
        console.print(
            f"{cut:,} of {len(evaluation.outcomes):,} answers were cut at max_new_tokens "
            f"{evaluation.task.max_new_tokens}: if right answers are longer, raise it in the task.",
            soft_wrap=True,
        )
    if evaluation.read.skipped:
        console.print(f"No questions, so without a score: {evaluation.read.summary()}", soft_wrap=True)
    for run in RUNS:
        skipped = evaluation.all_stats[run].skipped
        if skipped:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in skipped.most_common())
            console.print(f"Scored as wrong, {BLIND.get(run, 'with its image')}: {reasons}", soft_wrap=True)


def _add_row(table: Table, name: str, scored: Scored, share: str = "") -> None:
    between = "" if scored.interval is None else "{:.3f} to {:.3f}".format(*scored.interval)
    table.add_row(
        name, "none" if scored.value is None else f"{scored.value:.3f}", between, f"{scored.questions:,}", share
    )


def _share(found: MetricScores, run: Run) -> str:
    share = found.from_image[run]
    if share is None:
        return "none"
    if found.higher_is_better:
        return f"{share:.1%}"
    return f"{abs(share):.1%} {'higher' if share <= 0 else 'lower'} blind"
