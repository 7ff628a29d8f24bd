"""Counts of edits are the textbook's, and the rates made of them those of independent implementations."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.text import char_error_rate

from fuyu_e2e.eval.metrics import METRICS
from fuyu_e2e.eval.metrics.edits import anls, edit_distance

texts = st.text("abAB é日 \n", max_size=12)


def textbook_distance(a: str, b: str) -> int:
    """Wagner and Fischer 1974."""
    table = [[max(i, j) if 0 in (i, j) else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            exchanged = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, exchanged)
    return table[len(a)][len(b)]


@given(texts, texts)
def test_edit_distance_is_the_textbooks(a: str, b: str) -> None:
    assert edit_distance(a, b) == textbook_distance(a, b)


def test_texts_shifted_far_against_each_other_are_near() -> None:
    """Where torchmetrics' edit_distance, which stays near the diagonal, gives more."""
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("abcdefghij"), 200))
    assert edit_distance(text, text[60:] + text[:60]) == textbook_distance(text, text[60:] + text[:60])


@given(texts, st.lists(texts, min_size=1, max_size=4))
def test_anls_is_its_definition(answer: str, references: list[str]) -> None:
    scores = []
    for reference in references:
        a, b = (" ".join(text.lower().split()) for text in (answer, reference))
        distance = textbook_distance(a, b) / max(len(a), len(b)) if a or b else 0.0
        scores.append(1 - distance if distance <= 0.5 else 0.0)
    assert anls(answer, references) == max(scores)


@pytest.mark.parametrize(
    ("answer", "score"), [("The Coca", 0), ("CocaCola", 8 / 9), ("Coca cola", 1), ("Cola", 0), ("Cat", 0), ("", 0)]
)
def test_anls_scores_the_examples_of_the_challenge(answer: str, score: float) -> None:
    assert anls(answer, ["Coca Cola", "Coca Cola Company"]) == pytest.approx(score)


def test_an_answer_half_right_scores_a_half_and_padding_gains_nothing() -> None:
    assert anls("abxx", ["abcd"]) == 0.5
    assert anls("axxx" + " " * 100, ["abcd"]) == 0.0


@given(st.lists(st.tuples(texts, texts.filter(bool)), min_size=1, max_size=5))
def test_character_error_rate_is_torchmetrics(pairs: list[tuple[str, str]]) -> None:
    answers, references = zip(*pairs, strict=True)
    metric = METRICS["character_error_rate"]
    rate = metric.value(metric.statistics(answers, [[text] for text in references]).sum(axis=0))
    assert float(rate) == pytest.approx(float(char_error_rate(answers, references)), rel=1e-6)


def test_character_error_rate_counts_the_nearest_reference() -> None:
    metric = METRICS["character_error_rate"]
    statistics = metric.statistics(["abc", "", "x"], [["abcd", "xyz"], ["", "abc"], [""]])
    assert statistics.tolist() == [[1, 4], [0, 0], [1, 0]]
    assert float(metric.value(statistics[:2].sum(axis=0))) == 0.25
    assert math.isinf(float(metric.value(statistics[2])))
    assert math.isnan(float(metric.value(statistics[1])))
    assert not metric.higher_is_better
