"""Exact match: the fraction of prompts that a model continues with exactly the true text."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fuyu_e2e.checkpoint.loading import TrainedModel
from fuyu_e2e.data.document import Document
from fuyu_e2e.data.sequence import Prompt
from fuyu_e2e.eval.blind import with_images_of
from fuyu_e2e.inference.generation import continue_texts


@dataclass(frozen=True)
class Prediction:
    """One prompt with a model's continuation."""

    prompt: Prompt
    text: str

    @property
    def right(self) -> bool:
        """Whether the text is the truth."""
        return self.text == self.prompt.truth


def predict(
    model: TrainedModel, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int = 64
) -> list[Prediction]:
    """Returns a model's greedy continuation of each prompt."""
    predictions = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        texts = continue_texts(model.decoder, model.tokenizer, batch, max_new_tokens=max_new_tokens)
        predictions += [Prediction(prompt, text) for prompt, text in zip(batch, texts, strict=True)]
    return predictions


def exact_match(predictions: Sequence[Prediction]) -> float:
    """Returns the fraction of right readings."""
    return sum(prediction.right for prediction in predictions) / len(predictions)


def by_group(predictions: Sequence[Prediction], group: Callable[[Prediction], int]) -> dict[int, float]:
    """Returns the exact match for each value of `group`, in order."""
    groups: dict[int, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(group(prediction), []).append(prediction)
    return {value: exact_match(groups[value]) for value in sorted(groups)}


def exchange_images(documents: Sequence[Document]) -> Iterator[Document]:
    """Yields the same questions and truths, each with the images of the document before it.

    A model that doesn't look reads them as well as the originals.
    """
    for document, other in zip(documents, [documents[-1], *documents[:-1]], strict=True):
        yield with_images_of(document, other)


def chance_of_exchange(documents: Sequence[Document]) -> float:
    """Returns a perfect reader's exact match on exchanged images: how often two neighbours share their truth."""
    return sum(a.answer == b.answer for a, b in zip(documents, [documents[-1], *documents[:-1]], strict=True)) / len(
        documents
    )
