"""The row: everything that a block knows about its tokens besides their states.

The caller of the decoder makes one for a packed row, a piece of a row or a decoding step. A block reads from it what
it needs; a block that selects tokens passes on the row of its selection.
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
    """The role of a token in the sequence."""

    TEXT = 0
    """Text that is read, and special tokens around it."""
    ANSWER = 1
    """A position whose next token carries loss or is being generated."""
    PATCH = 2
    NEWLINE = 3


@dataclass(frozen=True)
class TrainingProgress:
    """The progress of a training run; a decoder that is not training counts as finished."""

    step: int = 0
    """Completed optimizer steps; seeds the random choices of the step."""
    done: float = 1.0
    """The completed fraction of all steps, from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class TokenInfo:
    """Facts about each token of a row besides its state and position."""

    types: Int64[Tensor, " T"]
    """A `TokenType` for each token."""
    valid: Bool[Tensor, " T"]
    """False for the padding after the last document."""
    seed: Int64[Tensor, " T"]
    """A number derived from the token's document and the training step; 0 outside training."""
    patch_positions: Int64[Tensor, " N"]
    """Indices of the tokens that are image embeddings."""
    patch_image: Int64[Tensor, " N"]
    """For each of these tokens, the number of its image among the images that have any."""
    image_lengths: Int64[Tensor, " images"]
    """Tokens of each such image; in Fuyu's layout, its patches."""
    image_lengths_host: tuple[int, ...]
    """`image_lengths` on the host."""
    progress: TrainingProgress
    """The training's progress; the default outside training."""
    done: Float64[Tensor, ""]
    """`progress.done` on the device."""
    blocks: Int64[Tensor, " blocks"]
    """The block numbers of the decoder, 0 to `blocks - 1`."""

    @classmethod
    def of(cls, batch: PackedBatch, blocks: int, progress: TrainingProgress, training: bool) -> "TokenInfo":
        """Returns the facts about a packed row.

        Args:
            batch: The row.
            blocks: The number of blocks of the decoder.
            progress: The training's progress; ignored outside training.
            training: Whether the decoder is training.
        """
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
        """Returns the facts about the next token of each sequence of a batch."""
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
    """What a block reports about a row."""

    block: int
    """The number of the block."""
    auxiliary: Float[Tensor, ""] | None = None
    """The block's auxiliary loss, a mean over tokens."""


class Reports:
    """The reports of the blocks on one row, in order of depth.

    Not a list: torch.compile would specialise a compiled block on its length.
    """

    def __init__(self) -> None:
        self._reports: list[Report] = []

    def add(self, report: Report) -> None:
        """Adds the report of one block."""
        self._reports.append(report)

    def __iter__(self) -> Iterator[Report]:
        return iter(self._reports)


@dataclass(kw_only=True)  # not frozen, as one is made for each block
class Row:
    """The tokens that a block reads."""

    positions: Int64[Tensor, " T"]
    """The position of each token in its document."""
    rope: Rope
    """The rotary embedding of each token's position."""
    attends: Sequence[RowAttention]
    """The attention of each block of the decoder."""
    reports: Reports
    """The reports of the blocks that have run."""
    visible_image: Int64[Tensor, " T"] | None = None
    """For each token, the number of the image whose features it may read: the last one that began before it in its
    document, or -1 without one. None if the connector gives no features."""
    images: ImageStates | None = None
    """The connector's output for the row's images, if it gives features."""
    attend: Attend | None = None
    """The attention of the block that reads this row; a `RowAttention` if the row holds all tokens."""
    queries: Int64[Tensor, " U"] | None = None
    """Indices of the tokens that attend, in the order of the outputs; None for all."""
    tokens: TokenInfo | None = None
    """Further facts about the tokens; None if no block reads them."""
    number: Int64[Tensor, ""] | None = None
    """The number of the block that reads this row. A tensor, so that one compiled graph serves all blocks."""
    selected: Passing | None = None
    """The selection of `tokens` that this row holds; None for all."""

    def at(self, block: int) -> "Row":
        """Returns the row for block number `block`."""
        number = None if self.tokens is None else self.tokens.blocks[block]
        return self._with(self.attends[block], number=number)

    def select(self, passing: Passing) -> "Row":
        """Returns the row of the selected tokens, which attend only to each other."""
        cos, sin = self.rope
        return self._with(
            self._attention.select(passing),
            positions=self.positions.index_select(0, passing.index),
            rope=(cos.index_select(0, passing.index), sin.index_select(0, passing.index)),
            selected=passing,
        )

    def cross(self, passing: Passing) -> "Row":
        """Returns the same row with the selected tokens as its only queries; they attend to all tokens."""
        return self._with(self._attention.cross(passing), queries=passing.index)

    @property
    def auxiliary(self) -> Tensor | float:
        """The sum of the blocks' auxiliary losses."""
        return sum((report.auxiliary for report in self.reports if report.auxiliary is not None), 0.0)

    @property
    def features(self) -> tuple[Float[Tensor, "F W"], Bool[Tensor, "T F"]]:
        """The image features, and a mask of which token may read which: those of the last image before it (Flamingo,
        Alayrac et al. 2022, arXiv 2204.14198, section 3.1.3)."""
        assert self.images is not None
        assert self.images.features is not None
        assert self.images.feature_images is not None
        assert self.visible_image is not None
        read = self.visible_image if self.selected is None else self.visible_image.index_select(0, self.selected.index)
        return self.images.features, read[:, None] == self.images.feature_images

    def with_images(self, images: ImageStates) -> "Row":
        """Returns the same row with the connector's output for its images."""
        return self._with(self.attend, images=images)

    @property
    def info(self) -> TokenInfo:
        """Further facts about the tokens."""
        assert self.tokens is not None
        return self.tokens

    @property
    def types(self) -> Int64[Tensor, " T"]:
        """The `TokenType` of each token."""
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
        """Returns the row with these fields; `queries` and `selected` are reset, others that aren't given stay."""
        # Not dataclasses.replace: torch.compile can't trace it.
        return Row(
            positions=self.positions if positions is None else positions,
            rope=self.rope if rope is None else rope,
            attends=self.attends,
            visible_image=self.visible_image,
            images=self.images if images is None else images,
            attend=attend,
            queries=queries,
            tokens=self.tokens,
            number=self.number if number is None else number,
            selected=selected,
            reports=self.reports,
        )
