"""An evaluation, which by default asks every question three times: with its image, without it, and with another's."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, get_args

import numpy as np

from fuyu_e2e.checkpoint.loading import TrainedModel
from fuyu_e2e.data.document import Document, Image
from fuyu_e2e.data.image import decode_image
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.formats import PLACEHOLDER
from fuyu_e2e.errors import UnusableSampleError
from fuyu_e2e.eval.answering import Answer, answer_all
from fuyu_e2e.eval.blind import draw_partners, with_images_of, without_images
from fuyu_e2e.eval.contact_sheet import Cell
from fuyu_e2e.eval.metrics import METRICS
from fuyu_e2e.eval.question import Question
from fuyu_e2e.eval.task import BATCH_TOKENS, Task

Run = Literal["image", "without_image", "other_image"]
"""The image that a question is asked with."""
RUNS: tuple[Run, ...] = get_args(Run)
CHUNK = 512
"""Questions whose images are in memory at once (up to twice as many); images are exchanged among these."""
NO_OTHER_IMAGE = "no-other-image"
"""The reason why a question isn't asked with another's image: all questions are about one image."""
PICTURES = 48
"""Most pictures of right answers, and of wrong ones, that are kept for contact sheets."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One question with its answers; without its image, so that all of them fit in memory."""

    key: str
    image: str
    groups: Mapping[str, str]
    prompt: str
    """The prompt, with `<image>` in place of images."""
    references: tuple[str, ...]
    answers: Mapping[Run, Answer]
    right: bool
    """Whether the answer is a reference, by the metric `accuracy`."""
    turn: int = 1
    """Number of the answer in its conversation, from 1."""


@dataclass
class Evaluation:
    """All outcomes of a task, in order."""

    task: Task
    seed: int
    outcomes: list[Outcome] = field(default_factory=list)
    read: SampleStats = field(default_factory=SampleStats)
    """Counts of samples read, and of those that aren't questions, by reason; these have no score."""
    all_stats: dict[Run, SampleStats] = field(default_factory=lambda: {run: SampleStats() for run in RUNS})
    """For each run, counts of used questions, and by reason those that can't be used and count as wrong."""
    right: list[Cell] = field(default_factory=list)
    wrong: list[Cell] = field(default_factory=list)


def evaluate(
    model: TrainedModel,
    task: Task,
    questions: Iterable[Question],
    *,
    limit: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    runs: Collection[Run] = RUNS,
    read: SampleStats | None = None,
    tell: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Asks a model questions, by default with and without their images.

    Args:
        model: A decoder in evaluation mode, with its processing.
        task: How to answer.
        questions: The questions.
        limit: Most questions asked, from the first; None asks all.
        batch_tokens: Tokens that are read and written at once.
        seed: Seeds the exchange of images.
        runs: The runs of each question; `image`, which others are compared with, is always one.
        read: The stats in which the questions' reader counts.
        tell: Called from time to time with the number of completed questions.
    """
    evaluation = Evaluation(task, seed, read=read or SampleStats())
    rng = np.random.default_rng(seed)
    for chunk in _chunks(islice(questions, limit)):
        _ask(model, evaluation, chunk, batch_tokens, rng, runs)
        tell(len(evaluation.outcomes))
    return evaluation


def _chunks(questions: Iterable[Question]) -> Iterator[list[Question]]:
    """Yields lists of questions, each about two or more images as long as enough are left."""
    waiting: list[Question] = []
    for question in questions:
        waiting.append(question)
        if len(waiting) % CHUNK == 0:
            chunk, rest = waiting[:-CHUNK], waiting[-CHUNK:]
            if min(len({question.image for question in part}) for part in (chunk, rest)) > 1:
                yield chunk
                waiting = rest
    if waiting:
        yield waiting


def _ask(
    model: TrainedModel,
    evaluation: Evaluation,
    chunk: list[Question],
    batch_tokens: int,
    rng: np.random.Generator,
    runs: Collection[Run],
) -> None:
    task, all_stats = evaluation.task, evaluation.all_stats
    seen = answer_all(model, task, chunk, [question.document for question in chunk], all_stats["image"], batch_tokens)
    # A question that can't be used with its image counts as wrong in every run, and its image is given to no other
    # question: the runs differ only in images.
    usable = [question for question, answer in zip(chunk, seen, strict=True) if answer.skipped is None]
    partners = draw_partners(usable, rng)
    looks = [_has_image(question) and answer.skipped is None for question, answer in zip(chunk, seen, strict=True)]
    blind: dict[Run, list[Document | None]] = {"without_image": [], "other_image": []}
    for question, looking in zip(chunk, looks, strict=True):
        partner = partners.get(question.image)
        if looking and partner is None and "other_image" in runs:
            all_stats["other_image"].skip(UnusableSampleError(NO_OTHER_IMAGE, question.document.key))
        alone = looking and "without_image" in runs
        exchanged = looking and "other_image" in runs
        blind["without_image"].append(without_images(question.document) if alone else None)
        blind["other_image"].append(with_images_of(question.document, partner) if exchanged and partner else None)
    answers: dict[Run, list[Answer]] = {"image": seen}
    for run, documents in blind.items():
        asked = answer_all(model, task, chunk, documents, all_stats[run], batch_tokens)
        # Without an image to look at, the answer stays the same.
        answers[run] = [new if looking else old for new, old, looking in zip(asked, seen, looks, strict=True)]
    texts = [answer.text or "" for answer in seen]
    rows = METRICS["accuracy"].statistics(texts, [question.references for question in chunk])
    for number, (question, right) in enumerate(zip(chunk, METRICS["accuracy"].value(rows) == 1, strict=True)):
        outcome = Outcome(
            key=question.document.key,
            image=question.image,
            groups=question.groups,
            prompt=_shown(question.document),
            references=question.references,
            answers={run: answers[run][number] for run in RUNS},
            right=bool(right) and seen[number].text is not None,
            turn=question.turn,
        )
        evaluation.outcomes.append(outcome)
        kept = evaluation.right if outcome.right else evaluation.wrong
        if len(kept) < PICTURES and seen[number].text is not None and _has_image(question):
            kept.append(picture_cell(model, question, outcome))


def _has_image(question: Question) -> bool:
    return any(isinstance(part, Image) for part in question.document.segments)


def _shown(document: Document) -> str:
    return "".join(PLACEHOLDER if isinstance(part, Image) else part.text for part in document.segments)


def picture_cell(model: TrainedModel, question: Question, outcome: Outcome) -> Cell:
    """Returns a question's first picture, as the model is given it, with truth and answer."""
    image = next(part for part in question.document.segments if isinstance(part, Image))
    return Cell(
        decode_image(image.data, model.builder.images),
        truth=outcome.references[0],
        reading=outcome.answers["image"].text or "",
        question=outcome.prompt.replace(PLACEHOLDER, "").strip(),
        right=outcome.right,
    )
