"""Attention inside each document of a packed row, of all its tokens or of some of them.

What a block asks for stands here, with its definition (`reference_attention`). Several backends compute it, at the
cost of the sum of squares of the documents' lengths instead of the square of the row's:
`fuyu_e2e.model.attention.grouped` on any device, `fuyu_e2e.model.attention.kernels` on GPUs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, no_type_check

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fuyu_e2e.model.attention.mask import CAUSAL, AttentionMask
from fuyu_e2e.model.device_copy import to_device

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""How a block attends: (queries "T H K", keys "S G K", values "S G K") to outputs "T H K".

Training and prefill attend within the row (`GroupedRow`), decoding attends to a cache; a block can't tell.
"""


def attention_type(weight: Tensor) -> torch.dtype:
    """The type of queries, keys and values: autocast's where that is on, else that of the weights."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


@dataclass(frozen=True)
class Passing:
    """The tokens of a row that pass a block which selects some, gathered in their order."""

    index: Int64[Tensor, " C"]
    """Where each stands in the row."""
    valid: Bool[Tensor, " C"]
    """False for the tokens at the end that only fill the capacity: they skip the block, whatever is computed."""

    def documents(self, document: Int64[Tensor, " T"], filling: int) -> Int64[Tensor, " C"]:
        """The document of each, of those of the row's tokens; what only fills the capacity forms one of its own.

        Args:
            document: Of each token of the row, the number of its document.
            filling: A number that no document has.
        """
        return torch.where(self.valid, document.index_select(0, self.index), filling)


class Places(NamedTuple):
    """What a mask looks at of some tokens: int64 tensors of a device, or numpy's arrays of the host, of one shape."""

    document: Any
    """The number of each token's document."""
    position: Any
    """Its position in the document."""
    image: Any
    """The number of its image in the row, -1 outside of images; None where no mask asks."""

    @classmethod
    def of(cls, lengths: tuple[int, ...], images: tuple[tuple[int, int], ...]) -> "Places":
        """Those of a row of documents laid end to end, on the host.

        Args:
            lengths: Tokens of each document.
            images: Where in the row each image begins, and where it ends.
        """
        counts = np.array(lengths, np.int64)
        document = np.repeat(np.arange(len(counts)), counts)
        image = np.full(len(document), -1, np.int64)
        for number, (start, stop) in enumerate(images):
            image[start:stop] = number
        return cls(document, np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts), image)

    @no_type_check  # part of flex's kernel, as `AttentionMask.sees` is
    def take(self, index: Any) -> "Places":
        """Those of the tokens at some indices."""
        return Places(self.document[index], self.position[index], None if self.image is None else self.image[index])

    def on(self, device: torch.device) -> "Places":
        """The host's places on a device."""
        # One by one: torch.export stores no parts of a tensor.
        return Places(*(part if part is None else to_device(torch.from_numpy(part), device) for part in self))

    def numpy(self) -> "Places":
        """Those of tensors of a CPU, on the host."""
        return Places(*(part if part is None else part.numpy() for part in self))


QUERIES, KEYS = (..., slice(None), None), (..., None, slice(None))
"""What makes pairs of "*batch Q" queries and "*batch K" keys."""


@no_type_check
def seen_by(mask: AttentionMask, query: Places, key: Places) -> Any:
    """Returns whether each query sees the key that it is paired with; a bool tensor of the shape that they have."""
    same_image = False
    if query.image is not None and mask.reads_images:
        same_image = (query.image == key.image) & (query.image >= 0)
    return (query.document == key.document) & mask.sees(query.position, key.position, same_image)


class RowAttention(ABC):
    """Attention of all tokens of a row, which also serves a selection of them."""

    @abstractmethod
    def __call__(
        self,
        queries: Float[Tensor, "T H K"],
        keys: Float[Tensor, "T G K"],
        values: Float[Tensor, "T G K"],
    ) -> Float[Tensor, "T H K"]:
        """Attention of every token to those that the block's mask shows it."""

    @abstractmethod
    def select(self, passing: Passing) -> Attend:
        """The attention of passing tokens to passing tokens alone: queries, keys and values are theirs."""

    @abstractmethod
    def cross(self, passing: Passing) -> Attend:
        """The attention of passing tokens to all tokens: queries are theirs, keys and values the whole row's."""


def reference_attention(
    queries: Float[Tensor, "T H K"],
    keys: Float[Tensor, "T G K"],
    values: Float[Tensor, "T G K"],
    document_lengths: tuple[int, ...],
    known: Bool[Tensor, " T"] | None = None,
    mask: AttentionMask = CAUSAL,
    images: tuple[tuple[int, int], ...] = (),
) -> Float[Tensor, "T H K"]:
    """The same attention as one masked softmax over the whole row: the definition that every fast path must match.

    Where only some keys are `known`, the outputs of tokens that see none mean nothing. `images` are the bounds of each
    image in the row.
    """
    repeat = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(repeat, dim=1), values.repeat_interleave(repeat, dim=1)
    places = Places.of(document_lengths, images).on(queries.device)
    allowed = seen_by(mask, places.take(QUERIES), places.take(KEYS))
    if known is not None:
        allowed = allowed & known
    scores = torch.einsum("thk,shk->hts", queries, keys) / queries.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    return torch.einsum("hts,shk->thk", weights, values)
