"""VQAv2: a file of questions, one of annotations with ten answers each, and COCO's images."""

import sys
from collections.abc import Iterator
from pathlib import Path

from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.errors import UserError
from fuyu_e2e.eval.formats.asking import QUESTION, Entry, ask, filled
from fuyu_e2e.eval.formats.json_file import Record, load
from fuyu_e2e.eval.question import Question

GROUPS = ("answer_type", "question_type")


def read_vqav2(
    questions: str | Path,
    annotations: str | Path,
    images: str | Path,
    *,
    stats: SampleStats,
    prompt: str = QUESTION,
) -> Iterator[Question]:
    """Returns the questions of VQAv2, or of another benchmark in its format, such as OK-VQA.

    Args:
        questions: `v2_OpenEnded_mscoco_val2014_questions.json`, or a part of it.
        annotations: `v2_mscoco_val2014_annotations.json`; may have more entries than questions.
        images: The folder with `COCO_val2014_000000000042.jpg` and the like; `data_subtype` of the questions is the
            middle part of the names.
        stats: Counts the questions that are read.
        prompt: The text after the image, with `{question}` in it.

    Returns:
        Questions with their ten answers, in groups `answer_type` and `question_type`.

    Raises:
        UserError: A file or an image is missing or violates the format; names the entry.
    """
    answers: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {}
    for record in load(annotations).records("annotations"):
        if (key := record.identity("question_id")) in answers:
            raise UserError(f"{record.where}: there is another annotation of question {key}.")
        answers[key] = _annotation(record)
    asked = load(questions)
    split = asked.text("data_subtype")
    entries = []
    for record in asked.records("questions"):
        key = record.identity("question_id")
        if key not in answers:
            raise UserError(f"{record.where}: {annotations} has no annotation of question {key}.")
        references, groups = answers[key]
        entries.append(
            Entry(
                key=key,
                image=f"COCO_{split}_{record.identity('image_id').zfill(12)}.jpg",
                prompt=filled(prompt, record.text("question")),
                references=references,
                groups=groups,
            )
        )
    return ask(entries, questions, images, stats)


def _annotation(record: Record) -> tuple[tuple[str, ...], dict[str, str]]:
    answers = tuple(sys.intern(answer.text("answer")) for answer in record.records("answers"))
    if not answers:
        raise record.error("answers", "a list with an answer in it")
    return answers, {group: sys.intern(record.text(group)) for group in GROUPS}
