"""Exact match: the fraction of prompts that a model continues with exactly the true text."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fuyu_e2e.checkpoint.loading import TrainedModel
from fuyu_e2e.data.document import Document, Image
from fuyu_e2e.data.sequence import Prompt
from fuyu_e2e.inference.generation import continue_texts


@dataclass(frozen=True)
class Reading:
    """One prompt with a model's continuation."""

    prompt: Prompt
    text: str

    @property
    def right(self) -> bool:
        """Whether the text is the truth."""
        return self.text == self.prompt.truth


def read(model: TrainedModel, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int = 64) -> list[Reading]:
    """Returns a model's greedy continuation of each prompt."""
    readings = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        texts = continue_texts(model.decoder, model.tokenizer, batch, max_new_tokens=max_new_tokens)
        readings += [Reading(prompt, text) for prompt, text in zip(batch, texts, strict=True)]
    return readings


def exact_match(readings: Sequence[Reading]) -> float:
    """Returns the fraction of right readings."""
    return sum(reading.right for reading in readings) / len(readings)


def by_group(readings: Sequence[Reading], group: Callable[[Reading], int]) -> dict[int, float]:
    """Returns the exact match for each value of `group`, in order."""
    groups: dict[int, list[Reading]] = {}
    for reading in readings:
        groups.setdefault(group(reading), []).append(reading)
    return {value: exact_match(groups[value]) for value in sorted(groups)}


def exchange_images(documents: Sequence[Document]) -> Iterator[Document]:
    """Yields the same questions and truths, each with the images of the document before it.

    A model that doesn't look reads them as well as the originals.
    """
    for document, other in zip(documents, [documents[-1], *documents[:-1]], strict=True):
        images = iter([segment for segment in other.segments if isinstance(segment, Image)])
        segments = tuple(next(images) if isinstance(segment, Image) else segment for segment in document.segments)
        yield Document(document.key, segments)


def chance_of_exchange(documents: Sequence[Document]) -> float:
    """Returns a perfect reader's exact match on exchanged images: how often two neighbours share their truth."""
    return sum(a.answer == b.answer for a, b in zip(documents, [documents[-1], *documents[:-1]], strict=True)) / len(
        documents
    )
