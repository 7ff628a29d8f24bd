"""A likelihood is what a plain forward pass says, batches change no answer, and what can't be used is counted."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuyu_e2e.checkpoint.loading import TrainedModel
from fuyu_e2e.data.document import Document, Text
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.eval.answering import Answer, answer_all, token_losses
from fuyu_e2e.eval.question import Question
from fuyu_e2e.eval.task import Task
from fuyu_e2e.model.decoder import Decoder

MakeQuestion = Callable[..., Question]
CHOOSE = Task(name="t", format="shards", data={"shards": "x"}, answer="choose", metrics=("accuracy",))
GENERATE = Task(name="t", format="shards", data={"shards": "x"}, metrics=("accuracy",), max_new_tokens=6)
PERPLEXITY = Task(name="t", format="shards", data={"shards": "x"}, answer="perplexity")


def answers(model: TrainedModel, task: Task, asked: list[Question], batch_tokens: int = 16_384) -> list[Answer]:
    return answer_all(model, task, asked, [question.document for question in asked], SampleStats(), batch_tokens)


@pytest.fixture(scope="module")
def double(decoder: Decoder) -> Decoder:
    return copy.deepcopy(decoder).double()


def naive_likelihood(double: Decoder, model: TrainedModel, question: Question, choice: str) -> tuple[float, int]:
    """Of a choice and its end, token by token, from the logits of the whole document in float64."""
    segments = question.document.segments
    whole = model.builder.build(Document("naive", (*segments, Text(choice))))
    start = len(model.builder.prompt(question.document))
    with torch.no_grad():
        logits = double.logits(pack_row([whole]))
    total = 0.0
    for place in range(start, len(whole)):
        scores = logits[place - 1]
        total += float(scores[whole.tokens[place]] - scores.exp().sum().log())
    return total, len(whole) - start


@given(st.integers(0, 10_000), st.booleans())
def test_the_choice_is_that_of_a_plain_forward_pass(
    double: Decoder, model: TrainedModel, make_question: MakeQuestion, seed: int, chat: bool
) -> None:
    """Whatever turns the prompt has, their own supervised tokens don't count."""
    rng = np.random.default_rng(seed)
    choices = tuple(dict.fromkeys("".join(rng.choice(list("abc 12"), rng.integers(1, 9))) for _ in range(4)))
    question = make_question(seed, choices=choices, references=(choices[0],))
    if chat:
        turns = (*question.document.segments, Text("It is a", loss=True), Text("And now?", loss=False))
        question = make_question(seed, choices=choices, references=(choices[0],), document=Document("chat", turns))
    expected = np.array([naive_likelihood(double, model, question, choice) for choice in choices])
    [answer] = answers(model, CHOOSE, [question])
    assert answer.text == choices[int(expected[:, 0].argmax())]
    assert answer.text_per_token == choices[int((expected[:, 0] / expected[:, 1]).argmax())]


def test_losses_are_those_of_a_plain_forward_pass(
    double: Decoder, model: TrainedModel, make_question: MakeQuestion
) -> None:
    asked = [make_question(number) for number in range(6)]
    texts = ["a red square", "7", "19 8 3"] * 2
    sequences = [
        model.builder.answered(model.builder.prompt(question.document), text)
        for question, text in zip(asked, texts, strict=True)
    ]
    for batch_tokens in (1, 60, 10_000):
        found = [-float(losses.sum()) for _, losses in token_losses(model, iter(sequences), batch_tokens)]
        naive = [naive_likelihood(double, model, *pair)[0] for pair in zip(asked, texts, strict=True)]
        assert found == pytest.approx(naive, abs=1e-3)


def test_an_answered_prompt_is_the_document_that_training_builds(
    model: TrainedModel, random_document: Callable[[int], Document]
) -> None:
    for seed in range(10):
        document = random_document(seed)
        answered = model.builder.answered(model.builder.prompt(document.prompt), document.answer)
        built = model.builder.build(document)
        for name in ("tokens", "loss", "patches"):
            assert np.array_equal(getattr(answered, name), getattr(built, name)), name


@pytest.mark.parametrize("task", [GENERATE, CHOOSE, PERPLEXITY], ids=lambda task: task.answer)
def test_answers_do_not_depend_on_the_batch(model: TrainedModel, make_question: MakeQuestion, task: Task) -> None:
    asked = [make_question(number, image=f"image{number * 7 % 12}") for number in range(12)]
    alone = [answers(model, task, [question])[0] for question in asked]
    together = answers(model, task, asked)
    small = answers(model, task, asked, batch_tokens=80)
    for found in (together, small):
        assert [(a.text, a.text_per_token, a.tokens) for a in found] == [
            (a.text, a.text_per_token, a.tokens) for a in alone
        ]
        assert [a.loss for a in found] == pytest.approx([a.loss for a in alone], abs=1e-3)
    assert not any(answer.skipped for answer in small)


def test_perplexity_is_the_loss_of_validation(model: TrainedModel, random_document: Callable[[int], Document]) -> None:
    """All supervised tokens of a document count, those of earlier turns too."""
    documents = [random_document(seed) for seed in range(15)]
    asked = [
        Question(document=document.prompt, references=(document.answer,), image=document.key) for document in documents
    ]
    found = answers(model, PERPLEXITY, asked)
    row = pack_row([model.builder.build(document) for document in documents])
    assert sum(answer.tokens for answer in found) == row.targets.numel()
    assert sum(answer.loss for answer in found) == pytest.approx(model.decoder.loss(row).item(), rel=1e-5)


def test_what_can_not_be_used_is_counted_and_leaves_the_others_alone(
    model: TrainedModel, make_question: MakeQuestion
) -> None:
    good = make_question(3)
    odd: dict[str, Any] = {
        "image-unreadable": make_question(1, picture=b"no picture"),
        "no-choices": make_question(1, choices=()),
        "choices-lack-answer": make_question(1, references=("other",)),
        "longer-than-batch": make_question(1, document=Document("long", (Text("9" * 500, loss=False),))),
    }
    stats = SampleStats()
    asked = [*odd.values(), good]
    found = answer_all(model, CHOOSE, asked, [question.document for question in asked], stats, batch_tokens=400)
    assert [answer.skipped for answer in found] == [*odd, None]
    assert dict(stats.skipped) == dict.fromkeys(odd, 1)
    assert stats.used == 1
    assert found[-1] == answers(model, CHOOSE, [good])[0]
