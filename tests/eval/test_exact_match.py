"""Scores mean what they say, and the blind check exchanges images and nothing else."""

from collections.abc import Callable

import pytest

from fuyu_e2e.checkpoint.loading import TrainedModel
from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.sequence import Prompt, SequenceBuilder
from fuyu_e2e.eval.exact_match import Prediction, by_group, chance_of_exchange, exact_match, exchange_images, predict
from fuyu_e2e.model.decoder import Decoder


def documents(truths: list[str], make_png: Callable[..., bytes]) -> list[Document]:
    return [
        Document(str(i), (Image(make_png(8, 8, seed=i)), Text("Read.", loss=False), Text(truth)))
        for i, truth in enumerate(truths)
    ]


def prediction(builder: SequenceBuilder, document: Document, text: str) -> Prediction:
    return Prediction(Prompt(document, builder.prompt(document.prompt)), text)


def test_a_reading_is_right_letter_for_letter(builder: SequenceBuilder, make_png: Callable[..., bytes]) -> None:
    asked = documents(["1", "22", "33", "444"], make_png)
    predictions = [prediction(builder, *pair) for pair in zip(asked, ["1", "22", "34", "4444"], strict=True)]
    assert exact_match(predictions) == 0.5
    assert by_group(predictions, lambda r: len(r.prompt.truth)) == {1: 1.0, 2: 0.5, 3: 0.0}


def test_exchanged_images_are_all_others_and_all_else_stays(make_png: Callable[..., bytes]) -> None:
    asked = documents(["1", "2", "2", "3"], make_png)
    exchanged = list(exchange_images(asked))
    for before, behind in zip(asked, exchanged, strict=True):
        assert behind.segments[1:] == before.segments[1:]
        assert behind.segments[0] != before.segments[0]
    assert {document.segments[0] for document in exchanged} == {document.segments[0] for document in asked}
    assert chance_of_exchange(asked) == 0.25


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_reading_does_not_depend_on_the_batch(
    decoder: Decoder, builder: SequenceBuilder, make_png: Callable[..., bytes], batch_size: int
) -> None:
    model = TrainedModel(decoder, builder, step=0)
    prompts = list(builder.prompts(documents(["1", "2", "3", "4", "5"], make_png), SampleStats()))
    alone = [predict(model, [prompt], 4)[0].text for prompt in prompts]
    assert [r.text for r in predict(model, prompts, 4, batch_size)] == alone
