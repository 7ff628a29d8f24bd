"""The blind check: the same questions without their images, and with images of others.

A model that never looks scores as well without: what a score owes to the image is what it loses blind.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np

from fuyu_e2e.data.document import Document, Image
from fuyu_e2e.eval.question import Question


def without_images(document: Document) -> Document:
    """Returns the document with its images left out."""
    return Document(document.key, tuple(part for part in document.segments if not isinstance(part, Image)))


def with_images_of(document: Document, other: Document) -> Document:
    """Returns the document with the images of another in the place of its own: in order, from the first again where it
    has fewer."""
    images = cycle([part for part in other.segments if isinstance(part, Image)])
    return Document(
        document.key, tuple(next(images) if isinstance(part, Image) else part for part in document.segments)
    )


def draw_partners(questions: Sequence[Question], rng: np.random.Generator) -> Mapping[str, Document]:
    """For each image a document with another one, drawn at random so that every image is given once.

    Empty where all questions are about one image, or about none.
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
    """Returns the share of a score that the image brought, (score - blind) / score; None where there is no score to
    share.

    It is below 0 where a metric that should be high is higher blind. Of one that should be low, it is below 0 where
    the image helps: -0.5 says that blind it is half as much again.
    """
    return (score - blind) / score if score else None
