"""The row: all that a block may know of the tokens that it is given, beside their states.

Whoever runs the decoder makes one for a packed row, a piece of it or a decoding step; blocks look up in it what they
need, and give a part of their tokens the row of that part.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from fuyu_e2e.model.attention.interface import Attend, Passing, RowAttention
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.device_copy import to_device
from fuyu_e2e.model.images.connector import ImageStates
from fuyu_e2e.model.rope import Rope


class TokenType(IntEnum):
    """What a token is."""

    TEXT = 0
    """Words that are read, and the marks around them."""
    ANSWER = 1
    """A position whose next token carries loss, or is being generated."""
    PATCH = 2
    NEWLINE = 3


@dataclass(frozen=True)
class TrainingProgress:
    """How far a training has come. A decoder that is not being trained is at its end."""

    step: int = 0
    """Optimizer steps done; seeds the step's random choices."""
    done: float = 1.0
    """The same as a part of all steps."""


@dataclass(frozen=True, kw_only=True)
class TokenInfo:
    """What is known of each token of a row beside its state and its position."""

    types: Int64[Tensor, " T"]
    """A `TokenType`."""
    valid: Bool[Tensor, " T"]
    """False for the padding after the last document."""
    seed: Int64[Tensor, " T"]
    """A number of the token's document and the training step; 0 outside training."""
    patch_positions: Int64[Tensor, " N"]
    """Of tokens that are embeddings of an image."""
    patch_image: Int64[Tensor, " N"]
    """The number of the image that each of them belongs to, of those that have any."""
    image_lengths: Int64[Tensor, " images"]
    """How many tokens each such image has: its patches, in Fuyu's layout."""
    image_lengths_host: tuple[int, ...]
    """The same on the host."""
    progress: TrainingProgress
    """Of the training; at its end outside of one."""
    done: Float64[Tensor, ""]
    """`progress.done` on the device."""
    blocks: Int64[Tensor, " blocks"]
    """The numbers of the decoder's blocks."""

    @classmethod
    def of(cls, batch: PackedBatch, blocks: int, progress: TrainingProgress, training: bool) -> "TokenInfo":
        """Of a packed row."""
        device, length = batch.tokens.device, batch.tokens.shape[0]
        types = torch.full((length,), int(TokenType.TEXT), device=device)
        for positions, which in (
            (batch.target_positions, TokenType.ANSWER),
            (batch.patch_positions, TokenType.PATCH),
            (batch.newline_positions, TokenType.NEWLINE),
        ):
            types.index_fill_(0, positions, int(which))
        seed = torch.zeros(length, dtype=torch.int64, device=device)
        if training and len(batch.document_ids) == len(batch.document_lengths):
            seeds = [*((number << 31) + progress.step for number in batch.document_ids), 0]
            counts = [*batch.document_lengths, batch.padding]
            documents = to_device(torch.tensor([seeds, counts], dtype=torch.int64), device)
            seed = documents[0].repeat_interleave(documents[1], output_size=length)
        lengths = tuple(span.places for span in batch.images if span.places)
        sizes = to_device(torch.tensor(lengths, dtype=torch.int64), device)
        images = torch.arange(len(sizes), device=device)
        progress = progress if training else TrainingProgress()
        return cls(
            types=types,
            valid=torch.arange(length, device=device) < length - batch.padding,
            seed=seed,
            patch_positions=batch.patch_positions,
            patch_image=images.repeat_interleave(sizes, output_size=sum(lengths)),
            image_lengths=sizes,
            image_lengths_host=lengths,
            progress=progress,
            done=torch.full((), progress.done, dtype=torch.float64, device=device),
            blocks=torch.arange(blocks, device=device),
        )

    @classmethod
    def of_new_tokens(cls, positions: Int64[Tensor, " B"], blocks: int) -> "TokenInfo":
        """Of the next token of each of several sequences."""
        nothing = positions[:0]
        return cls(
            types=torch.full_like(positions, int(TokenType.ANSWER)),
            valid=torch.ones_like(positions, dtype=torch.bool),
            seed=torch.zeros_like(positions),
            patch_positions=nothing,
            patch_image=nothing,
            image_lengths=nothing,
            image_lengths_host=(),
            progress=TrainingProgress(),
            done=torch.ones((), dtype=torch.float64, device=positions.device),
            blocks=torch.arange(blocks, device=positions.device),
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a block has to say of a row."""

    block: int
    """Its number."""
    auxiliary: Float[Tensor, ""] | None = None
    """A loss of its own, the mean over the tokens."""


class Reports:
    """What blocks have to say of a row, in order of depth.

    No list, whose length a compiled block would be compiled for.
    """

    def __init__(self) -> None:
        self._reports: list[Report] = []

    def add(self, report: Report) -> None:
        """Adds one."""
        self._reports.append(report)

    def __iter__(self) -> Iterator[Report]:
        return iter(self._reports)


@dataclass(kw_only=True)  # not frozen, as one is made for each block
class Row:
    """The tokens that a block is given."""

    positions: Int64[Tensor, " T"]
    """Of each token in its document."""
    rope: Rope
    """Of each token's position."""
    attends: Sequence[RowAttention]
    """How each block of the decoder attends."""
    reports: Reports
    """What blocks have to say of the row."""
    read_images: Int64[Tensor, " T"] | None = None
    """Of each token of the row the number of the image that it may read the features of, the last one that its
    document began before it, or -1; None where the connector gives no features."""
    images: ImageStates | None = None
    """What the connector made of the row's images, where it gives features."""
    attend: Attend | None = None
    """How that block attends which the row is given to; a `RowAttention` where it has all tokens."""
    queries: Int64[Tensor, " C"] | None = None
    """The tokens that attend, in the order in which their outputs are wanted; None for all."""
    tokens: TokenInfo | None = None
    """What else is known of the tokens, where a block of the decoder reads it."""
    number: Int64[Tensor, ""] | None = None
    """Of the block that the row is given to; on the device, or each would be compiled for its own."""
    selected: Passing | None = None
    """Which tokens of `tokens` these are; None for all."""

    def at(self, block: int) -> "Row":
        """The row as it is given to a block, by its number."""
        number = None if self.tokens is None else self.tokens.blocks[block]
        return self._with(self.attends[block], number=number)

    def select(self, passing: Passing) -> "Row":
        """The row of some of the tokens, which attend to each other alone."""
        cos, sin = self.rope
        return self._with(
            self._attention.select(passing),
            positions=self.positions.index_select(0, passing.index),
            rope=(cos.index_select(0, passing.index), sin.index_select(0, passing.index)),
            selected=passing,
        )

    def cross(self, passing: Passing) -> "Row":
        """The same row, of which some of the tokens attend, to all."""
        return self._with(self._attention.cross(passing), queries=passing.index)

    @property
    def auxiliary(self) -> Tensor | float:
        """The sum of the blocks' own losses."""
        return sum((report.auxiliary for report in self.reports if report.auxiliary is not None), 0.0)

    @property
    def features(self) -> tuple[Float[Tensor, "F W"], Bool[Tensor, "T F"]]:
        """The features of images, and whether each token may read each: those of the last image before it
        (Flamingo's, Alayrac et al. 2022, arXiv 2204.14198, section 3.1.3)."""
        assert self.images is not None
        assert self.images.features is not None
        assert self.images.feature_images is not None
        assert self.read_images is not None
        read = self.read_images if self.selected is None else self.read_images.index_select(0, self.selected.index)
        return self.images.features, read[:, None] == self.images.feature_images

    def reading(self, images: ImageStates) -> "Row":
        """The same row, with what the connector made of its images."""
        return self._with(self.attend, images=images)

    @property
    def info(self) -> TokenInfo:
        """What else is known of the tokens."""
        assert self.tokens is not None
        return self.tokens

    @property
    def types(self) -> Int64[Tensor, " T"]:
        """A `TokenType` for each token."""
        return self.info.types if self.selected is None else self.info.types.index_select(0, self.selected.index)

    @property
    def _attention(self) -> RowAttention:
        assert isinstance(self.attend, RowAttention)
        return self.attend

    def _with(
        self,
        attend: Attend | None,
        positions: Tensor | None = None,
        rope: Rope | None = None,
        queries: Tensor | None = None,
        selected: Passing | None = None,
        number: Tensor | None = None,
        images: ImageStates | None = None,
    ) -> "Row":
        # Not dataclasses.replace, which torch.compile doesn't follow.
        return Row(
            positions=self.positions if positions is None else positions,
            rope=self.rope if rope is None else rope,
            attends=self.attends,
            read_images=self.read_images,
            images=self.images if images is None else images,
            attend=attend,
            queries=queries,
            tokens=self.tokens,
            number=self.number if number is None else number,
            selected=selected,
            reports=self.reports,
        )
