"""A document: the content of one sample, as texts and images in order.

Every shard format becomes documents, and all later code handles documents only.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A run of text; `loss` says whether the model learns to write it, or only reads it (a prompt)."""

    text: str
    loss: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"the text of a Text is a {type(self.text).__name__}, not a str")
        if not isinstance(self.loss, bool):
            raise TypeError(f"the loss of a Text is a {type(self.loss).__name__}, not a bool")


@dataclass(frozen=True)
class Image:
    """One encoded image file (JPEG, PNG or WebP), not decoded yet."""

    data: bytes

    def __post_init__(self) -> None:
        if not isinstance(self.data, bytes):
            raise TypeError(f"the data of an Image is a {type(self.data).__name__}, not bytes")


Segment = Text | Image


@dataclass(frozen=True)
class Document:
    """An ordered list of segments, and the key of its sample."""

    key: str
    segments: tuple[Segment, ...]

    @property
    def texts(self) -> Iterable[str]:
        """The text of each text segment, in order."""
        return (segment.text for segment in self.segments if isinstance(segment, Text))

    @property
    def prompt(self) -> "Document":
        """The document up to its last supervised text, for a model to continue."""
        last = max(
            (i for i, segment in enumerate(self.segments) if isinstance(segment, Text) and segment.loss),
            default=len(self.segments),
        )
        return Document(self.key, self.segments[:last])

    @property
    def turns(self) -> tuple["Document", ...]:
        """The document up to each of its answers, the supervised texts that follow an unsupervised one.

        The `prompt` of each contains the true turns before it. A document without a question, such as a caption, is
        its own only turn.
        """
        stops = []
        asked, stop = False, 0
        for number, segment in enumerate(self.segments, 1):
            if isinstance(segment, Text) and not segment.loss:
                stops.append(stop)
                asked, stop = True, 0
            elif isinstance(segment, Text) and asked:
                stop = number
        stops = [stop for stop in (*stops, stop) if stop]
        return tuple(Document(self.key, self.segments[:stop]) for stop in stops) or (self,)

    @property
    def answer(self) -> str:
        """The last supervised text, with which a perfect model continues `prompt`; empty if there is none."""
        supervised = [segment.text for segment in self.segments if isinstance(segment, Text) and segment.loss]
        return supervised[-1] if supervised else ""
