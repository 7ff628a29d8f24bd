"""Answers many questions with a model, in batches by tokens, so that large images fit. There are three ways:

generate     greedy generation
choose       the choice with the highest likelihood after the prompt, including its end of document, and also the one
             with the highest likelihood per token (Brown et al. 2020, arXiv 2005.14165, section 2.4)
perplexity   no answer, only the loss of the document's supervised tokens followed by its first reference
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from fuyu_e2e.checkpoint.loading import TrainedModel
from fuyu_e2e.data.document import Document
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.sequence import TokenSequence
from fuyu_e2e.errors import UnusableSampleError
from fuyu_e2e.eval.question import Question
from fuyu_e2e.eval.task import BATCH_TOKENS, Task
from fuyu_e2e.inference.generation import generate

NOT_ASKED = "not-asked"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The result of one question."""

    text: str | None = None
    """The generated or chosen text; None without an answer."""
    text_per_token: str | None = None
    """The choice with the highest likelihood per token."""
    loss: float = 0.0
    """Sum over `tokens`, in nats."""
    tokens: int = 0
    cut: bool = False
    """Whether generation stopped at `max_new_tokens`, before the answer's end."""
    skipped: str | None = None
    """The reason if the question can't be used."""


def answer_all(
    model: TrainedModel,
    task: Task,
    questions: Sequence[Question],
    documents: Sequence[Document | None],
    stats: SampleStats,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Answer]:
    """Answers each question, given a document to read for it.

    Args:
        model: A decoder in evaluation mode, with its processing.
        task: How to answer.
        questions: The questions.
        documents: The document that the model reads for each question, its own or another; None skips the question.
        stats: Counts used questions, and unusable ones by reason: an image that can't be read, `longer-than-batch`,
            `no-choices`, `choices-lack-answer`.
        batch_tokens: Tokens that are read and written at once.

    Returns:
        An answer for each question, in order.
    """
    answers = [Answer(skipped=NOT_ASKED)] * len(questions)
    prompts: dict[int, TokenSequence] = {}
    for number, (question, document) in enumerate(zip(questions, documents, strict=True)):
        if document is None:
            continue
        try:
            prompts[number] = _prompt(model, task, question, document, batch_tokens)
            stats.used += 1
        except UnusableSampleError as error:
            stats.skip(error)
            answers[number] = Answer(skipped=error.reason)
    if task.answer == "generate":
        found = _generate(model, prompts, task.max_new_tokens, batch_tokens)
    elif task.answer == "choose":
        found = _choose(model, prompts, questions, batch_tokens)
    else:
        found = _score(model, prompts, questions, batch_tokens)
    for number, answer in found:
        answers[number] = answer
    return answers


def _prompt(
    model: TrainedModel, task: Task, question: Question, document: Document, batch_tokens: int
) -> TokenSequence:
    if task.answer == "choose":
        if not question.choices:
            raise UnusableSampleError(
                "no-choices", f'{document.key} needs "choices": [...] in its JSON, see docs/evaluation.md'
            )
        if question.references[0] not in question.choices:
            raise UnusableSampleError("choices-lack-answer", f"{document.key}: {question.references[0]!r}")
    prompt = model.builder.prompt(document)
    if task.answer == "generate":
        longest = len(prompt) + task.max_new_tokens
    else:
        texts = question.choices if task.answer == "choose" else question.references[:1]
        longest = max(len(model.builder.answered(prompt, text)) for text in texts)
    if longest > batch_tokens:
        raise UnusableSampleError("longer-than-batch", f"{document.key} takes {longest:,} tokens")
    return prompt


def _generate(
    model: TrainedModel, prompts: dict[int, TokenSequence], max_new_tokens: int, batch_tokens: int
) -> Iterator[tuple[int, Answer]]:
    # A cache has room for the longest sequence in every sequence, so those of similar length go together.
    waiting = sorted(prompts, key=lambda number: len(prompts[number]))
    while waiting:
        count = 1
        while count < len(waiting) and (count + 1) * (len(prompts[waiting[count]]) + max_new_tokens) <= batch_tokens:
            count += 1
        batch, waiting = waiting[:count], waiting[count:]
        written = generate(
            model.decoder,
            [prompts[number] for number in batch],
            max_new_tokens=max_new_tokens,
            eos_id=model.tokenizer.eos_id,
        )
        for number, ids in zip(batch, written, strict=True):
            yield number, Answer(text=model.tokenizer.decode(ids), cut=len(ids) == max_new_tokens)


def _choose(
    model: TrainedModel, prompts: dict[int, TokenSequence], questions: Sequence[Question], batch_tokens: int
) -> Iterator[tuple[int, Answer]]:
    asked = [(number, choice) for number in prompts for choice in questions[number].choices]
    sequences = (model.builder.answered(prompts[number], choice) for number, choice in asked)
    likelihoods: dict[int, list[tuple[float, int]]] = {number: [] for number in prompts}
    for (number, _), (sequence, losses) in zip(asked, token_losses(model, sequences, batch_tokens), strict=True):
        # Texts of the prompt may be supervised too; their losses come before the choice's.
        tokens = len(sequence) - len(prompts[number])
        likelihoods[number].append((-float(losses[-tokens:].sum(dtype=np.float64)), tokens))
    for number, likelihood in likelihoods.items():
        choices = questions[number].choices
        total, tokens = np.array(likelihood).T
        best, best_per_token = int(total.argmax()), int((total / tokens).argmax())
        yield number, Answer(text=choices[best], text_per_token=choices[best_per_token])


def _score(
    model: TrainedModel, prompts: dict[int, TokenSequence], questions: Sequence[Question], batch_tokens: int
) -> Iterator[tuple[int, Answer]]:
    sequences = (model.builder.answered(prompt, questions[number].references[0]) for number, prompt in prompts.items())
    for number, (_, losses) in zip(prompts, token_losses(model, sequences, batch_tokens), strict=True):
        yield number, Answer(loss=float(losses.sum(dtype=np.float64)), tokens=len(losses))


def token_losses(
    model: TrainedModel, sequences: Iterator[TokenSequence], batch_tokens: int
) -> Iterator[tuple[TokenSequence, Float32[np.ndarray, " Y"]]]:
    """Yields each sequence with the loss of its supervised tokens, in nats; none may be longer than a batch."""
    batch: list[TokenSequence] = []
    for sequence in sequences:
        if batch and sum(map(len, batch)) + len(sequence) > batch_tokens:
            yield from _losses_of_row(model, batch)
            batch = []
        batch.append(sequence)
    if batch:
        yield from _losses_of_row(model, batch)


def _losses_of_row(
    model: TrainedModel, sequences: list[TokenSequence]
) -> Iterator[tuple[TokenSequence, Float32[np.ndarray, " Y"]]]:
    row = pack_row(sequences).to(model.decoder.embed_tokens.weight.device)
    losses = model.decoder.score_tokens(row).losses.cpu().numpy()
    ends = np.cumsum([int(sequence.loss[1:].sum()) for sequence in sequences])
    yield from zip(sequences, np.split(losses, ends[:-1]), strict=True)
