"""A document as the decoder reads it: token ids with image patches among them, and which tokens carry loss.

The layout is the released Fuyu's, whose processor gives the same ids for the same prompt:

    image        each row of patches as `|SPEAKER|` x columns, then `|NEWLINE|`; rows from the top
    text         `<s>` before the first text of a document, then the text's own tokens
    answer       a supervised text after an unsupervised one: `<0x04>` before it, `</s>` after it
    end          one `</s>` after the last token of a document

An image of 1 x 2 patches, the question "q" and the answer "7":

    token   |SPEAKER| |SPEAKER| |NEWLINE| <s>  q  <0x04>  7  </s>
    loss        -         -         -      -   -    -     x    x

Loss belongs to the token to be predicted: "7" is predicted at the position of `<0x04>`. Tokens of answers, captions
and their ends carry it; tokens of prompts, patches and newlines never do.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from fuyu_e2e.data.document import Document, Image, Segment
from fuyu_e2e.data.image import ImagePatches, load_views, to_pixels
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UnusableSampleError
from fuyu_e2e.model.image_layout import FUYU_LAYOUT, ImageLayout, ImagePolicy, ImageSpan


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """A document as `n` tokens with `P` patches; `N` of the tokens are image embeddings, and `L` image newlines."""

    key: str
    tokens: Int64[np.ndarray, " n"]
    loss: Bool[np.ndarray, " n"]
    """Whether the model learns to write the token."""
    patches: UInt8[np.ndarray, "P C"]
    """The patches of all views of all images, in their order."""
    images: tuple[ImageSpan, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def patch_positions(self) -> Int64[np.ndarray, " N"]:
        """The position of each image embedding."""
        return np.concatenate([np.empty(0, np.int64), *(span.patch_positions for span in self.images)])

    @property
    def newline_positions(self) -> Int64[np.ndarray, " L"]:
        """The position of each newline token."""
        return np.concatenate([np.empty(0, np.int64), *(span.newline_positions for span in self.images)])

    @property
    def pictures(self) -> list[UInt8[np.ndarray, "H W 3"]]:
        """The pixels of each view of each image as the model sees them, including padding to whole patches."""
        grids = [grid for span in self.images for grid in span.grids]
        ends = np.cumsum([rows * cols for rows, cols in grids])
        parts = np.split(self.patches, ends[:-1]) if grids else []
        return [to_pixels(ImagePatches(*grid, values)) for grid, values in zip(grids, parts, strict=True)]

    @property
    def paddings(self) -> list[tuple[int, int]]:
        """(rows, columns) of pixels that are padding in each picture."""
        return [padding for span in self.images for padding in span.paddings]

    @property
    def unpadded_pictures(self) -> list[UInt8[np.ndarray, "H W 3"]]:
        """The pixels of each view without its padding."""
        return [
            pixels[: len(pixels) - below, : pixels.shape[1] - beside]
            for (below, beside), pixels in zip(self.paddings, self.pictures, strict=True)
        ]

    def cut(self, budget: int) -> "TokenSequence | None":
        """Returns the longest valid beginning of at most `budget` tokens, or None if no token in it carries loss.

        A cut never splits an image: one that doesn't fit is removed whole, with everything after it. The beginning has
        no end-of-document token, since that is cut off.
        """
        if len(self) <= budget:
            return self
        stop = next((span.start for span in self.images if span.start < budget < span.stop), budget)
        if not self.loss[1:stop].any():
            return None
        images = tuple(span for span in self.images if span.stop <= stop)
        patches = sum(span.patches for span in images)
        return replace(
            self,
            tokens=self.tokens[:stop],
            loss=self.loss[:stop],
            patches=self.patches[:patches],
            images=images,
        )


@dataclass(frozen=True)
class Prompt:
    """A document up to its last supervised text, and that text."""

    document: Document
    sequence: TokenSequence
    """The sequence for a model to continue."""

    @property
    def truth(self) -> str:
        """The text with which a perfect model continues; empty if the document has none."""
        return self.document.answer


@dataclass(frozen=True)
class SequenceBuilder:
    """Turns documents into sequences, for training and for prompting."""

    tokenizer: Tokenizer
    images: ImagePolicy
    layout: ImageLayout = FUYU_LAYOUT
    """Views and tokens of an image, as the model's connector asks for."""

    def build(self, document: Document) -> TokenSequence:
        """Returns the sequence for a model to learn from.

        Raises:
            UnusableSampleError: An image can't be used (see `fuyu_e2e.data.image`), or no token carries loss
                (`nothing-to-learn`).
        """
        tokens = self._lay_out(document.segments)
        tokens.end_document()
        if not tokens.learns:
            raise UnusableSampleError("nothing-to-learn", document.key)
        return tokens.sequence(document.key)

    def prompt(self, document: Document) -> TokenSequence:
        """Returns the sequence for a model to continue: the document, plus the start of an answer if its last text
        asks.

        Raises:
            UnusableSampleError: An image can't be used.
        """
        tokens = self._lay_out(document.segments)
        tokens.begin_text(loss=True)
        return tokens.sequence(document.key)

    def answered(self, prompt: TokenSequence, answer: str) -> TokenSequence:
        """Returns a sequence from `prompt` with a supervised answer and the end of the document, as `build` lays it
        out."""
        written = [*self.tokenizer.encode(answer), self.tokenizer.eos_id]
        return replace(
            prompt,
            tokens=np.concatenate([prompt.tokens, np.array(written, np.int64)]),
            loss=np.concatenate([prompt.loss, np.ones(len(written), bool)]),
        )

    def prompts(self, documents: Iterable[Document], stats: SampleStats) -> Iterator[Prompt]:
        """Yields each document as a prompt; counts those with unusable images in `stats`."""
        for document in documents:
            try:
                yield Prompt(document, self.prompt(document.prompt))
                stats.used += 1
            except UnusableSampleError as error:
                stats.skip(error)

    def _lay_out(self, segments: Iterable[Segment]) -> "_Tokens":
        tokens = _Tokens(self.tokenizer, self.images, self.layout)
        for segment in segments:
            if isinstance(segment, Image):
                tokens.add_image(segment.data)
            else:
                tokens.begin_text(segment.loss)
                tokens.add_text(segment.text, segment.loss)
        return tokens


class _Tokens:
    """A sequence under construction."""

    def __init__(self, tokenizer: Tokenizer, policy: ImagePolicy, layout: ImageLayout) -> None:
        self.tokenizer, self.policy, self.layout = tokenizer, policy, layout
        self.length = 0
        self.last = -1
        """The last token; -1 if there is none yet."""
        self.learns = self.last_loss = False
        """Whether any token carries loss, and whether the last one does."""
        self.ids: list[Int64[np.ndarray, " n"]] = []
        self.loss: list[Bool[np.ndarray, " n"]] = []
        self.patches: list[UInt8[np.ndarray, "P C"]] = []
        self.images: list[ImageSpan] = []
        self.opened = False
        self.state: Literal["none", "asked", "answering", "captioned"] = "none"

    def extend(self, ids: Int64[np.ndarray, " n"] | list[int], loss: bool) -> None:
        if len(ids):
            self.ids.append(np.asarray(ids, np.int64))
            self.loss.append(np.full(len(ids), loss))
            self.length += len(ids)
            self.last, self.last_loss = int(ids[-1]), loss
            self.learns |= loss

    def begin_text(self, loss: bool) -> None:
        if not self.opened:
            self.extend([self.tokenizer.bos_id], loss=False)
            self.opened = True
        if loss and self.state == "asked":
            self.extend([self.tokenizer.answer_id], loss=False)
            self.state = "answering"

    def add_text(self, text: str, loss: bool) -> None:
        self.extend(self.tokenizer.encode(text), loss)
        if self.state == "answering":
            self.extend([self.tokenizer.eos_id], loss=True)
        self.state = "captioned" if loss else "asked"

    def add_image(self, data: bytes) -> None:
        views = load_views(data, self.policy, self.layout)
        grids = tuple((view.rows, view.cols) for view in views)
        newlines = self.layout.tokens(grids)
        paddings = tuple(view.padding for view in views)
        self.images.append(ImageSpan(self.length, grids, newlines.tobytes(), paddings))
        self.patches.extend(view.values for view in views)
        self.extend(np.where(newlines, self.tokenizer.newline_id, self.tokenizer.patch_id), loss=False)

    def end_document(self) -> None:
        """Ends the document; the end token carries loss if it follows a supervised text."""
        if self.length and self.last != self.tokenizer.eos_id:
            self.extend([self.tokenizer.eos_id], loss=self.last_loss)

    def sequence(self, key: str) -> TokenSequence:
        no_patches = np.empty((0, self.policy.patch_size**2 * 3), np.uint8)
        return TokenSequence(
            key=key,
            tokens=np.concatenate([np.empty(0, np.int64), *self.ids]),
            loss=np.concatenate([np.empty(0, bool), *self.loss]),
            patches=self.patches[0] if len(self.patches) == 1 else np.concatenate([no_patches, *self.patches]),
            images=tuple(self.images),
        )
