"""A question to a model, as every task asks it, whatever file it came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fuyu_e2e.data.document import Document


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question and what counts as its answer."""

    document: Document
    """What the model reads: images and text without loss, in order; its key finds the question again."""
    references: tuple[str, ...]
    """Right answers, by the annotators who gave them (VQAv2 has ten), or all that count as right."""
    choices: tuple[str, ...] = ()
    """What a multiple-choice question lets a model choose from; one of them is the first reference."""
    image: str
    """Names the image. Questions about one image are not independent, so intervals resample images."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """What scores are also given apart by, `{"kind": "relational"}` say."""
    turn: int = 1
    """Which answer of its conversation is asked for, from 1."""
