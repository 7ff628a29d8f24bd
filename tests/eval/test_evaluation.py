"""Scores of all, of groups and blind are what the answers say, and everything that was lost has a number."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fuyu_e2e.checkpoint.loading import TrainedModel
from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.errors import UnusableSampleError
from fuyu_e2e.eval import evaluation as evaluation_module
from fuyu_e2e.eval.answering import Answer
from fuyu_e2e.eval.evaluation import Evaluation, Outcome, evaluate, picture_cell
from fuyu_e2e.eval.question import Question
from fuyu_e2e.eval.report import line, print_report, write_report
from fuyu_e2e.eval.scores import score
from fuyu_e2e.eval.task import Task

MakeQuestion = Callable[..., Question]
CHOOSE = Task(
    name="t", format="shards", data={"shards": "x"}, answer="choose", metrics=("accuracy",), groups=("parity",)
)
GENERATE = Task(
    name="t", format="shards", data={"shards": "x"}, metrics=("accuracy", "character_error_rate"), groups=("parity",)
)


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch, make_question: MakeQuestion) -> list[list[Document | None]]:
    """In place of a model, one that names the picture it sees, as questions about picture N have N for an answer.

    Without a picture it says 4. Gives what it was asked.
    """
    pictures = {make_question(number).document.segments[0]: str(number) for number in range(20)}
    asked: list[list[Document | None]] = []

    def answer_all(
        model: Any,
        task: Task,
        questions: Any,
        documents: Sequence[Document | None],
        stats: SampleStats,
        batch_tokens: int,
    ) -> list[Answer]:
        asked.append(list(documents))
        answers = []
        for document in documents:
            if document is None:
                answers.append(Answer(skipped="not-asked"))
            elif Image(b"bad") in document.segments:
                stats.skip(UnusableSampleError("image-unreadable", document.key))
                answers.append(Answer(skipped="image-unreadable"))
            else:
                stats.used += 1
                seen = [pictures[part] for part in document.segments if isinstance(part, Image)]
                answers.append(Answer(text=seen[0] if seen else "4"))
        return answers

    monkeypatch.setattr(evaluation_module, "answer_all", answer_all)
    return asked


def test_scores_groups_and_blind_shares(model: TrainedModel, make_question: MakeQuestion, looking: Any) -> None:
    """Ten pictures, of which it reads all but two: one whose answer is another, and one that is no picture."""
    asked = [make_question(number) for number in range(8)]
    asked += [make_question(8, references=("something else",)), make_question(9, picture=b"bad")]
    evaluation = evaluate(model, GENERATE, asked)
    found = score(evaluation)["accuracy"]
    assert found.all.value == 0.8
    assert (found.all.questions, found.all.images) == (10, 10)
    low, high = found.all.interval or (0, 0)
    assert 0.4 <= low < 0.8 < high <= 1
    assert {value: scored.value for value, scored in found.groups["parity"].items()} == {"even": 0.8, "odd": 0.8}
    assert found.blind["without_image"].value == 0.1, "only 4 is answered with 4"
    assert found.blind["other_image"].value == 0.0
    assert found.from_image == {"without_image": pytest.approx(7 / 8), "other_image": 1.0}
    assert [outcome.right for outcome in evaluation.outcomes] == [True] * 8 + [False] * 2
    assert dict(evaluation.all_stats["image"].skipped) == {"image-unreadable": 1}
    assert [cell.reading for cell in evaluation.wrong] == ["8"]
    errors = score(evaluation)["character_error_rate"]
    assert not errors.higher_is_better
    assert (errors.from_image["without_image"] or 0) < 0, "it makes more errors blind"


def test_only_the_runs_that_are_wanted_are_asked(
    model: TrainedModel, make_question: MakeQuestion, looking: list[list[Document | None]]
) -> None:
    asked = [make_question(number) for number in range(8)]
    scores = score(evaluate(model, GENERATE, asked, runs=("image",)))["accuracy"]
    assert scores.all.value == 1.0
    assert not scores.blind
    assert sum(document is not None for documents in looking for document in documents) == 8
    both = score(evaluate(model, GENERATE, asked, runs=("image", "other_image")))["accuracy"]
    assert {run: scored.value for run, scored in both.blind.items()} == {"other_image": 0.0}


def test_pictures_are_shown_without_their_padding(
    model: TrainedModel, make_question: MakeQuestion, make_png: Callable[..., bytes], looking: Any
) -> None:
    question = make_question(1, picture=make_png(13, 18, seed=1))
    [outcome] = evaluate(model, GENERATE, [make_question(1)]).outcomes
    assert picture_cell(model, question, outcome).pixels.shape == (13, 18, 3)


def test_turns_are_scored_apart(model: TrainedModel, make_question: MakeQuestion, looking: Any) -> None:
    """The first two turns about each picture are answered right, the tenth never."""
    questions = [
        make_question(number, turn=turn, references=("x",) if turn == 10 else (str(number),))
        for number in range(4)
        for turn in (1, 2, 10)
    ]
    evaluation = evaluate(model, GENERATE, questions)
    scores = score(evaluation)["accuracy"]
    assert scores.all.value == pytest.approx(8 / 12)
    assert [(turn, found.value, found.questions) for turn, found in scores.groups["turn"].items()] == [
        ("1", 1, 4), ("2", 1, 4), ("10", 0, 4)
    ]  # fmt: skip
    assert [line(outcome)["turn"] for outcome in evaluation.outcomes[:3]] == [1, 2, 10]
    assert "turn" not in score(evaluate(model, GENERATE, questions[::3]))["accuracy"].groups


def test_runs_differ_in_images_alone(model: TrainedModel, make_question: MakeQuestion, looking: Any) -> None:
    """A picture that can't be read is given to nobody, and its question is asked no more."""
    asked = [make_question(number, image=f"image{number // 2}") for number in range(8)]
    asked.append(make_question(9, picture=b"bad"))
    asked.append(make_question(10, document=Document("text", (Text("Why?", loss=False),)), references=("4",)))
    evaluation = evaluate(model, GENERATE, asked)
    _, without, other = looking
    for question, alone, exchanged in zip(asked[:8], without[:8], other[:8], strict=True):
        text = question.document.segments[1]
        assert alone.segments == (text,)
        assert exchanged.segments[1:] == (text,)
        assert exchanged.segments[0] not in (question.document.segments[0], Image(b"bad"))
    assert without[8:] == other[8:] == [None, None]
    blank = evaluation.outcomes[-1].answers
    assert blank["image"] == blank["without_image"] == blank["other_image"]
    assert evaluation.outcomes[-2].answers["without_image"].skipped == "image-unreadable"


def test_one_picture_can_not_be_exchanged(model: TrainedModel, make_question: MakeQuestion, looking: Any) -> None:
    evaluation = evaluate(model, GENERATE, [make_question(number, image="image1") for number in range(3)])
    assert dict(evaluation.all_stats["other_image"].skipped) == {"no-other-image": 3}
    assert score(evaluation)["accuracy"].blind.keys() == {"without_image"}


def test_chunks_of_questions_are_exchanged_among_themselves(
    model: TrainedModel, make_question: MakeQuestion, looking: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk waits until it and what is left after it are about two pictures each."""
    monkeypatch.setattr(evaluation_module, "CHUNK", 4)
    images = [1] * 6 + [2] * 5 + [3, 3]
    evaluation = evaluate(model, GENERATE, [make_question(n, image=f"image{i}") for n, i in enumerate(images)])
    assert [outcome.key for outcome in evaluation.outcomes] == [f"q{n}" for n in range(len(images))]
    assert not evaluation.all_stats["other_image"].skipped
    assert evaluation.all_stats["other_image"].used == len(images)


def test_a_real_model_leaves_a_report(
    model: TrainedModel, make_question: MakeQuestion, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    asked = [make_question(number) for number in range(6)] + [make_question(6, picture=b"bad")]
    evaluation = evaluate(model, CHOOSE, iter(asked), limit=7)
    found = score(evaluation)
    assert found.keys() == {"accuracy", "accuracy_per_token"}
    write_report(evaluation, found, {"task": "t"}, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["questions"] == 7
    assert results["runs"]["image"]["scored_as_wrong"] == {"image-unreadable": 1}
    accuracy = results["metrics"]["accuracy"]
    assert accuracy["all"]["value"] == found["accuracy"].all.value
    assert {"without_image", "other_image"} == accuracy["blind"].keys() == accuracy["from_image"].keys()
    lines = [json.loads(entry) for entry in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [entry["key"] for entry in lines] == [f"q{n}" for n in range(7)]
    assert sum(entry["right"] for entry in lines) == round(accuracy["all"]["value"] * 7)
    assert lines[0]["prompt"] == "<image>What is it?"
    assert lines[0]["answer"] in asked[0].choices
    assert lines[6]["answer"] is None
    assert lines[6]["answers"] == {"image": {"skipped": "image-unreadable"}}
    shapes = [cell.pixels.shape for cell in (*evaluation.right, *evaluation.wrong)]
    assert sorted(shapes) == [(6 + number % 5, 9 + number % 7, 3) for number in (0, 5, 1, 2, 3, 4)], "without padding"
    for name, cells in (("right", evaluation.right), ("wrong", evaluation.wrong)):
        assert (tmp_path / "pictures" / f"{name}.png").exists() == bool(cells)
    print_report(Console(width=120), evaluation, found)
    printed = capsys.readouterr().out
    for words in ("accuracy per token", "parity even", "blind: without image", "image-unreadable 1"):
        assert words in printed


def test_cut_answers_and_groups_that_no_question_has_are_told(
    model: TrainedModel, make_question: MakeQuestion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random model does not end within two tokens."""
    task = replace(GENERATE, max_new_tokens=2, groups=("parity", "colour"))
    evaluation = evaluate(model, task, [make_question(number) for number in range(3)])
    scores = score(evaluation)
    write_report(evaluation, scores, {}, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["runs"]["image"]["cut"] == 3
    print_report(Console(width=120), evaluation, scores)
    printed = capsys.readouterr().out
    assert "3 of 3 answers were cut at max_new_tokens 2: if right answers are longer" in printed
    assert "groups of the task names 'colour', which no question has; they have parity." in printed


def test_an_empty_answer_is_an_answer() -> None:
    answers = {"image": Answer(text="7"), "without_image": Answer(text=""), "other_image": Answer(skipped="x")}
    outcome = Outcome(key="q", image="i", groups={}, prompt="", references=("7",), answers=answers, right=True)
    assert line(outcome)["answers"] == {"image": {"text": "7"}, "without_image": {"text": ""}}


def test_a_perplexity_is_scored_by_tokens(model: TrainedModel, make_question: MakeQuestion) -> None:
    task = Task(name="t", format="shards", data={"shards": "x"}, answer="perplexity")
    evaluation: Evaluation = evaluate(model, task, [make_question(number) for number in range(5)])
    answers = [outcome.answers["image"] for outcome in evaluation.outcomes]
    mean = sum(answer.loss for answer in answers) / sum(answer.tokens for answer in answers)
    found = score(evaluation)["perplexity"]
    assert found.all.value == pytest.approx(np.exp(mean))
    assert found.blind["other_image"].value is not None
