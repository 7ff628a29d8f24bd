"""The processor: from texts and images to prompts, and from tokens back to text."""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image as Pillow

from fuyu_e2e.data.document import Document, Image, Segment, Text
from fuyu_e2e.data.image import load_views
from fuyu_e2e.data.sequence import SequenceBuilder, TokenSequence
from fuyu_e2e.errors import UnusableSampleError, UserError

Part = str | Path | bytes | Pillow.Image
"""A text, or an image as a path, as the bytes of a file, or as a Pillow image."""


@dataclass(frozen=True)
class Processor:
    """Makes prompts in the form that a model was trained on.

    model, processor = fuyu_e2e.load("runs/quickstart")
    prompt = processor(Path("a.png"), "Read the digits.")
    """

    builder: SequenceBuilder

    def __call__(self, *parts: Part) -> TokenSequence:
        """Returns the sequence for a model to continue, from any number of texts and images in order.

        Raises:
            UserError: An image can't be read or used; names the part.
        """
        segments = [self._segment(number, part) for number, part in enumerate(parts, 1)]
        try:
            return self.builder.prompt(Document("prompt", tuple(segments)))
        except UnusableSampleError:
            self._refuse_unusable(parts, segments)
            raise

    def decode(self, tokens: Iterable[int]) -> str:
        """Returns the text of tokens."""
        return self.builder.tokenizer.decode(tokens)

    @property
    def eos_id(self) -> int:
        """The token that ends a document."""
        return self.builder.tokenizer.eos_id

    def _refuse_unusable(self, parts: Iterable[Part], segments: Iterable[Segment]) -> None:
        """Raises a UserError that names the first unusable image."""
        for number, (part, segment) in enumerate(zip(parts, segments, strict=True), 1):
            if isinstance(segment, Image):
                try:
                    load_views(segment.data, self.builder.images, self.builder.layout)
                except UnusableSampleError as error:
                    name = part if isinstance(part, Path) else "an image"
                    raise UserError(f"Part {number} of the prompt, {name}, can't be used: {error}.") from error

    @staticmethod
    def _segment(number: int, part: Part) -> Segment:
        if isinstance(part, str):
            return Text(part, loss=False)
        if isinstance(part, Path):
            try:
                return Image(part.read_bytes())
            except OSError as error:
                raise UserError(f"Part {number} of the prompt, {part}, can't be read: {error.strerror}.") from error
        if isinstance(part, bytes):
            return Image(part)
        file = io.BytesIO()
        part.save(file, "PNG", exif=part.getexif())
        return Image(file.getvalue())
