"""Caption metrics equal torchmetrics, their definitions written out, and figures of the COCO evaluation."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.text import bleu_score

from fuyu_e2e.eval.metrics import METRICS
from fuyu_e2e.eval.metrics.captions import words

captions = st.lists(st.sampled_from(["a", "man", "dog", "on", "the", "red"]), max_size=7).map(" ".join)
corpora = st.lists(st.tuples(captions, st.lists(captions, min_size=1, max_size=4)), min_size=1, max_size=5)
Corpus = list[tuple[str, list[str]]]

FEW: Corpus = [
    ("a man rides a wave", ["a man riding a wave on a surfboard", "a surfer rides a wave", "man on a wave"]),
    ("a cat sits on a red table", ["a cat sits on a table", "the cat is on the red table"]),
    ("two dogs", ["two dogs play in the park with a ball", "dogs in a park"]),
    ("a clock", ["a large clock on a tower"]),
]
CIDER_OF_FEW = [2.9228888381563984, 4.508610420838166, 1.038929380851154, 1.1475578242647526]
ROUGE_OF_FEW = [0.8, 0.9360613810741688, 0.3609467455621302, 0.45864661654135336]
BLEU_OF_FEW = 0.4086646501314173


def scores(name: str, corpus: Corpus) -> tuple[np.ndarray, float]:
    metric = METRICS[name]
    statistics = metric.statistics([answer for answer, _ in corpus], [references for _, references in corpus])
    return statistics, float(metric.value(statistics.sum(axis=0)))


@given(corpora)
def test_bleu_is_torchmetrics(corpus: Corpus) -> None:
    # torchmetrics takes the first of two references as near in length; COCO, and this, the shorter.
    references = [sorted(right, key=lambda text: len(text.split())) for _, right in corpus]
    expected = float(bleu_score([answer for answer, _ in corpus], references))
    _, bleu = scores("bleu", corpus)
    if any(right[0] or right[-1] for right in references) and not math.isnan(bleu):
        assert bleu == pytest.approx(expected, rel=1e-5)
    else:
        assert math.isnan(bleu)


def naive_cider(corpus: Corpus) -> list[float]:
    """Equations 1 to 3 and CIDEr-D of the paper, n by n over the whole vocabulary."""

    def occurrences(text: str, ngram: tuple[str, ...]) -> int:
        tokens = text.split()
        return sum(tuple(tokens[i : i + len(ngram)]) == ngram for i in range(len(tokens)))

    result = []
    texts = [text for answer, right in corpus for text in [answer, *right]]
    for answer, right in corpus:
        total = 0.0
        for n in (1, 2, 3, 4):
            tokens = [text.split() for text in texts]
            vocabulary = sorted({tuple(t[i : i + n]) for t in tokens for i in range(len(t) - n + 1)})
            idf = np.array(
                [
                    math.log(len(corpus) / max(1, sum(any(occurrences(r, g) for r in rs) for _, rs in corpus)))
                    for g in vocabulary
                ]
            )
            vector = np.array([occurrences(answer, g) for g in vocabulary]) * idf
            for reference in right:
                other = np.array([occurrences(reference, g) for g in vocabulary]) * idf
                norm = np.linalg.norm(vector) * np.linalg.norm(other)
                gap = len(answer.split()) - len(reference.split())
                if norm:
                    total += float(np.minimum(vector, other) @ other / norm) * math.exp(-(gap**2) / 72) / len(right)
        result.append(10 * total / 4)
    return result


@given(corpora)
def test_cider_d_is_its_definition(corpus: Corpus) -> None:
    statistics, mean = scores("cider", corpus)
    expected = naive_cider(corpus)
    assert statistics[:, 0] == pytest.approx(expected, abs=1e-9)
    assert mean == pytest.approx(np.mean(expected), abs=1e-9)


def naive_rouge(answer: list[str], references: list[list[str]]) -> float:
    def common(a: list[str], b: list[str]) -> int:
        for size in range(len(a), 0, -1):
            for places in combinations(range(len(a)), size):
                rest = iter(b)
                if all(a[i] in rest for i in places):
                    return size
        return 0

    lengths = [common(answer, reference) for reference in references]
    precision = max(lengths) / len(answer) if answer else 0.0
    recall = max(n / len(r) if r else 0.0 for n, r in zip(lengths, references, strict=True))
    return (1 + 1.44) * precision * recall / (recall + 1.44 * precision) if precision else 0.0


@given(captions, st.lists(captions, min_size=1, max_size=3))
def test_rouge_l_is_its_definition(answer: str, references: list[str]) -> None:
    statistics, _ = scores("rouge_l", [(answer, references)])
    expected = naive_rouge(answer.split(), [reference.split() for reference in references])
    assert statistics[0, 0] == pytest.approx(expected, abs=1e-12)


def test_figures_are_those_of_the_coco_evaluation() -> None:
    """Figures of pycocoevalcap 1.2, whose wheel of 100 MB of Java is too heavy to test with."""
    assert scores("cider", FEW)[0][:, 0] == pytest.approx(CIDER_OF_FEW, abs=1e-9)
    assert scores("rouge_l", FEW)[0][:, 0] == pytest.approx(ROUGE_OF_FEW, abs=1e-9)
    assert scores("bleu", FEW)[1] == pytest.approx(BLEU_OF_FEW, abs=1e-6)


def test_a_caption_of_the_references_scores_most() -> None:
    corpus = [(right[0], [right[0]]) for _, right in FEW]
    assert scores("bleu", corpus)[1] == pytest.approx(1)
    assert scores("cider", corpus)[1] == pytest.approx(10)
    assert scores("rouge_l", corpus)[1] == pytest.approx(1)


def test_cider_of_a_part_keeps_the_idf_of_the_whole() -> None:
    whole, _ = scores("cider", FEW)
    part, _ = scores("cider", FEW[:2])
    assert not np.allclose(whole[:2], part)


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A woman's hand is holding a cell-phone, isn't it?", "a woman 's hand is holding a cell-phone is n't it"),
        ("Two dogs' bowls; they're empty!", "two dogs bowls they 're empty"),
        ("It's 10:30, says a 1950s bus.", "it 's 10:30 says a 1950s bus"),
        ('1,000 people & 2 dogs: "STOP" in red/white...', "1,000 people & 2 dogs stop in red/white"),
        ("The boys can't play -- it's 50% off", "the boys ca n't play it 's 50 % off"),
        ("a t-shirt that says I’d rather fish", "a t-shirt that says i 'd rather fish"),
    ],
)
def test_words_are_those_of_the_ptb_tokenizer(caption: str, tokens: str) -> None:
    """As Stanford CoreNLP 3.4.1 gives them, without the punctuation that the COCO evaluation drops."""
    assert words(caption) == tokens.split()
