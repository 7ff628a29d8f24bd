"""The blind check: the same questions without their images, and with images of other questions.

A model that never looks scores as well blind: what a score owes to the image is what it loses blind.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np

from fuyu_e2e.data.document import Document, Image
from fuyu_e2e.eval.question import Question


def without_images(document: Document) -> Document:
    """Returns the document without its images."""
    return Document(document.key, tuple(part for part in document.segments if not isinstance(part, Image)))


def with_images_of(document: Document, other: Document) -> Document:
    """Returns the document with its images replaced by those of another in order, repeated if it has fewer."""
    images = cycle([part for part in other.segments if isinstance(part, Image)])
    return Document(
        document.key, tuple(next(images) if isinstance(part, Image) else part for part in document.segments)
    )


def draw_partners(questions: Sequence[Question], rng: np.random.Generator) -> Mapping[str, Document]:
    """Returns for each image a document with another image, drawn at random so that every image is used once.

    Empty if all questions are about one image, or about none.
    """
    documents = {
        question.image: question.document
        for question in questions
        if any(isinstance(part, Image) for part in question.document.segments)
    }
    if len(documents) < 2:
        return {}
    order = rng.permutation(list(documents)).tolist()
    return {image: documents[other] for image, other in zip(order, [*order[1:], order[0]], strict=True)}


def share_from_image(score: float, blind: float) -> float | None:
    """Returns the fraction of a score that is due to the image, (score - blind) / score; None for a score of 0.

    It is negative if a metric to be maximised is higher blind. For a metric to be minimised it is negative if the
    image
    helps: -0.5 means that the blind value is higher by half.
    """
    return (score - blind) / score if score else None
