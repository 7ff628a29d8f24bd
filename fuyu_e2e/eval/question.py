"""A question to a model, in the form that all tasks use."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fuyu_e2e.data.document import Document


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question and its right answers."""

    document: Document
    """What the model reads: images and text without loss, in order; its key identifies the question."""
    references: tuple[str, ...]
    """Right answers: one from each annotator (VQAv2 has ten), or all that count as right."""
    choices: tuple[str, ...] = ()
    """The choices of a multiple-choice question; one of them is the first reference."""
    image: str
    """Identifies the image. Questions about one image are not independent, so intervals resample images."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Groups that scores are also reported for, such as `{"kind": "relational"}`."""
    turn: int = 1
    """Number of the answer in its conversation, from 1."""
