"""TextVQA: questions about text in images, with ten answers each."""

from collections.abc import Iterator
from pathlib import Path

from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.eval.formats.asking import QUESTION, Entry, ask, filled
from fuyu_e2e.eval.formats.json_file import load
from fuyu_e2e.eval.question import Question


def read_textvqa(
    annotations: str | Path, images: str | Path, *, stats: SampleStats, prompt: str = QUESTION
) -> Iterator[Question]:
    """Returns the questions of TextVQA 0.5.1.

    Args:
        annotations: `TextVQA_0.5.1_val.json` or another file in its format.
        images: The folder with `{image_id}.jpg` (`train_images`, which also contains those of val).
        stats: Counts the questions that are read.
        prompt: The text after the image, with `{question}` in it.

    Raises:
        UserError: A file or an image is missing or violates the format; names the entry.
    """
    entries = [
        Entry(
            key=record.identity("question_id"),
            image=f"{record.identity('image_id')}.jpg",
            prompt=filled(prompt, record.text("question")),
            references=record.texts("answers"),
        )
        for record in load(annotations).records("data")
    ]
    return ask(entries, annotations, images, stats)
