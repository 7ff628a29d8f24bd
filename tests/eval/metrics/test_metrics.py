"""What every metric promises: statistics that add up, and an error for a question without a reference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuyu_e2e.eval.metrics import METRICS
from fuyu_e2e.eval.metrics.equality import accuracy, exact_match

texts = st.sampled_from(["", "yes", "Yes ", "a red bus", "a red bus on the road", "two", "2"])
questions = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=4)), min_size=2, max_size=6)


@pytest.mark.parametrize("name", sorted(set(METRICS) - {"cider"}))
@given(asked=questions)
def test_the_value_of_a_sample_follows_from_its_sums(name: str, asked: list[tuple[str, list[str]]]) -> None:
    metric = METRICS[name]
    answers, references = zip(*asked, strict=True)
    statistics = metric.statistics(answers, references)
    times = np.arange(len(asked)) % 3
    repeated = np.repeat(np.arange(len(asked)), times)
    scored = metric.statistics([answers[i] for i in repeated], [references[i] for i in repeated])
    expected = metric.value(scored.sum(axis=0))
    values = metric.value(np.stack([times @ statistics, statistics.sum(axis=0)]))
    assert values.shape == (2,)
    np.testing.assert_allclose(values[0], expected)


@pytest.mark.parametrize("name", METRICS)
def test_of_no_question_the_value_is_nan(name: str) -> None:
    statistics = METRICS[name].statistics([], [])
    assert len(statistics) == 0
    assert np.isnan(METRICS[name].value(statistics.sum(axis=0)))


@pytest.mark.parametrize("name", METRICS)
def test_a_question_without_a_reference_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="question 1 has no reference"):
        METRICS[name].statistics(["yes", "no"], [["yes"], []])
    with pytest.raises(ValueError, match="longer"):
        METRICS[name].statistics(["yes"], [["yes"], ["no"]])


def test_a_right_answer_is_one_letter_for_letter_or_but_for_case_and_spaces() -> None:
    assert [exact_match(answer, ["Yes", "no"]) for answer in ("Yes", "no", "yes", "Yes ")] == [1, 1, 0, 0]
    assert [accuracy(answer, ["Yes", "STRASSE "]) for answer in ("yes", " YES\n", "straße", "ye s", "")] == [
        1,
        1,
        1,
        0,
        0,
    ]
