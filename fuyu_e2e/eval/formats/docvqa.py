"""DocVQA: questions about scanned pages."""

from collections.abc import Iterator
from pathlib import Path

from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.eval.formats.asking import QUESTION, Entry, ask, filled
from fuyu_e2e.eval.formats.json_file import Record, load
from fuyu_e2e.eval.question import Question


def read_docvqa(
    annotations: str | Path, images: str | Path, *, stats: SampleStats, prompt: str = QUESTION
) -> Iterator[Question]:
    """Returns the questions of DocVQA (task 1, single pages).

    Args:
        annotations: `val_v1.0.json` or another file in its format.
        images: The folder that contains `documents/`.
        stats: Counts the questions that are read.
        prompt: The text after the image, with `{question}` in it.

    Returns:
        Questions with all their answers. A question may have several types, so each type is a separate group:
        `{"form": "yes", "layout": "yes"}`.

    Raises:
        UserError: A file or an image is missing or violates the format; names the entry.
    """
    entries = [
        Entry(
            key=record.identity("questionId"),
            image=record.text("image"),
            prompt=filled(prompt, record.text("question")),
            references=record.texts("answers"),
            groups=_types(record),
        )
        for record in load(annotations).records("data")
    ]
    return ask(entries, annotations, images, stats)


def _types(record: Record) -> dict[str, str]:
    """Returns the types of a question, which early versions of the file lack."""
    return dict.fromkeys(record.texts("question_types"), "yes") if record.fields.get("question_types") else {}
