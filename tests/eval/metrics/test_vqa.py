"""VQA accuracy equals the official evaluation, written out here the slow way."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuyu_e2e.eval.metrics.vqa import CONTRACTIONS, PUNCTUATION, normalise, vqa_accuracy

pieces = st.sampled_from(
    [
        *PUNCTUATION,
        ".",
        "'",
        " ",
        " ",
        "\n",
        "\t",
        "1,000",
        "2.5",
        "the",
        "A",
        "an",
        "none",
        "Two",
        "ten",
        "dont",
        "Yes",
    ]
)
answers = st.lists(pieces, max_size=6).map("".join)
numbers = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
numbers |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}


def slow_normalise(answer: str) -> str:
    out = answer
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        if re.search(re.escape(mark) + " | " + re.escape(mark), answer) or re.search("[0-9],[0-9]", answer):
            out = "".join(letter for letter in out if letter != mark)
        else:
            out = "".join(" " if letter == mark else letter for letter in out)
    kept = ""
    for place, letter in enumerate(out):
        if letter != "." or out[place + 1 : place + 2].isdecimal():
            kept += letter
    words = []
    for word in kept.lower().split():
        digit = numbers.get(word, word)
        if digit not in ("a", "an", "the"):
            words.append(CONTRACTIONS.get(digit, digit))
    return " ".join(words)


def slow_accuracy(answer: str, references: list[str]) -> float:
    answer, *given = (re.sub("[\n\t]", " ", text).strip() for text in [answer, *references])
    if any(text != given[0] for text in given):
        answer, *given = (slow_normalise(text) for text in [answer, *given])
    accuracies = []
    for left_out in range(len(given)):
        others = given[:left_out] + given[left_out + 1 :]
        accuracies.append(min(1.0, sum(other == answer for other in others) / 3))
    return sum(accuracies) / len(accuracies)


@given(st.data())
def test_accuracy_is_the_official_one(data: st.DataObject) -> None:
    pool = data.draw(st.lists(answers, min_size=1, max_size=3))
    references = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=12))
    answer = data.draw(st.sampled_from(pool) | answers)
    assert vqa_accuracy(answer, references) == pytest.approx(slow_accuracy(answer, references), abs=1e-12)


@pytest.mark.parametrize(("agreeing", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)])
def test_of_ten_annotators_four_make_an_answer_right(agreeing: int, accuracy: float) -> None:
    assert vqa_accuracy("red", ["red"] * agreeing + ["blue"] * (10 - agreeing)) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("The two dogs.", "2 dogs"),
        ("None", "0"),
        ("1,000", "1000"),
        ("2.5", "2.5"),
        ("black/white", "black white"),
        ("yes, sir", "yes sir"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("shed", "shed"),
        ("dog's", "dog's"),
        ("  A   cat ", "cat"),
    ],
)
def test_answers_are_normalised_as_officially(answer: str, plain: str) -> None:
    assert normalise(answer) == plain


def test_where_all_annotators_agree_nothing_is_normalised() -> None:
    assert vqa_accuracy("yes\n", ["yes"] * 10) == 1.0
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0.0
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1.0


def test_one_annotator_agrees_with_nobody() -> None:
    assert vqa_accuracy("yes", ["yes"]) == 0.0
