"""The interface of attention inside the documents of a packed row, for all its tokens or a selection.

`RowAttention` is what blocks use, and `reference_attention` defines the result. Backends compute it at the cost of the
sum of squares of the document lengths instead of the square of the row length: `fuyu_e2e.model.attention.grouped` on
any device, `fuyu_e2e.model.attention.kernels` on GPUs.
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
"""The attention of a block: (queries "Q H K", keys "S G K", values "S G K") to outputs "Q H K".

Training and prefill attend within the row (`GroupedRow`), decoding attends to a cache; a block sees no difference.
"""


def attention_type(weight: Tensor) -> torch.dtype:
    """Returns the dtype of queries, keys and values: autocast's if that is on, else the weights'."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


@dataclass(frozen=True)
class Passing:
    """The tokens of a row that a block selects, in their order."""

    index: Int64[Tensor, " U"]
    """The index of each selected token in the row."""
    valid: Bool[Tensor, " U"]
    """False for tokens at the end that only fill the capacity: they skip the block, and their results are
    discarded."""

    def documents(self, document: Int64[Tensor, " T"], filling: int) -> Int64[Tensor, " U"]:
        """Returns the document id of each selected token; capacity filler gets the id `filling`.

        Args:
            document: The document id of each token of the row.
            filling: An id that no document has.
        """
        return torch.where(self.valid, document.index_select(0, self.index), filling)


class Places(NamedTuple):
    """What a mask depends on, for some tokens: int64 tensors on a device or numpy arrays on the host, of one shape."""

    document: Any
    """The document number of each token."""
    position: Any
    """The position of each token in its document."""
    image: Any
    """The number of each token's image in the row, -1 outside of images; None if no mask needs it."""

    @classmethod
    def of(cls, lengths: tuple[int, ...], images: tuple[tuple[int, int], ...]) -> "Places":
        """Returns the places of a row of documents laid end to end, on the host.

        Args:
            lengths: Tokens of each document.
            images: The (start, stop) indices of each image in the row.
        """
        counts = np.array(lengths, np.int64)
        document = np.repeat(np.arange(len(counts)), counts)
        image = np.full(len(document), -1, np.int64)
        for number, (start, stop) in enumerate(images):
            image[start:stop] = number
        return cls(document, np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts), image)

    @no_type_check  # part of flex's kernel, as `AttentionMask.sees` is
    def take(self, index: Any) -> "Places":
        """Returns the places of the tokens at some indices."""
        return Places(self.document[index], self.position[index], None if self.image is None else self.image[index])

    def on(self, device: torch.device) -> "Places":
        """Returns the places, which are on the host, on a device."""
        # One tensor at a time: torch.export can't store parts of a tensor.
        return Places(*(part if part is None else to_device(torch.from_numpy(part), device) for part in self))

    def numpy(self) -> "Places":
        """Returns the places, tensors on a CPU, as numpy arrays."""
        return Places(*(part if part is None else part.numpy() for part in self))


QUERIES, KEYS = (..., slice(None), None), (..., None, slice(None))
"""Indices that pair "*batch Q" queries with "*batch S" keys."""


@no_type_check
def seen_by(mask: AttentionMask, query: Places, key: Places) -> Any:
    """Returns whether each query sees the key that it is paired with, a bool tensor of their broadcast shape."""
    same_image = False
    if query.image is not None and mask.needs_image_ids:
        same_image = (query.image == key.image) & (query.image >= 0)
    return (query.document == key.document) & mask.sees(query.position, key.position, same_image)


class RowAttention(ABC):
    """Attention of all tokens of a row, and of selections of them."""

    @abstractmethod
    def __call__(
        self,
        queries: Float[Tensor, "T H K"],
        keys: Float[Tensor, "T G K"],
        values: Float[Tensor, "T G K"],
    ) -> Float[Tensor, "T H K"]:
        """Returns the attention of every token to the tokens that the block's mask shows it."""

    @abstractmethod
    def select(self, passing: Passing) -> Attend:
        """Returns attention among the selected tokens only: queries, keys and values are theirs."""

    @abstractmethod
    def cross(self, passing: Passing) -> Attend:
        """Returns attention of the selected tokens to all: queries are theirs, keys and values the whole row's."""


def reference_attention(
    queries: Float[Tensor, "T H K"],
    keys: Float[Tensor, "T G K"],
    values: Float[Tensor, "T G K"],
    document_lengths: tuple[int, ...],
    known: Bool[Tensor, " T"] | None = None,
    mask: AttentionMask = CAUSAL,
    images: tuple[tuple[int, int], ...] = (),
) -> Float[Tensor, "T H K"]:
    """Returns attention as one masked softmax over the whole row: the definition that every backend must match.

    If only some keys are `known`, outputs of tokens that see none of them are undefined. `images` are the (start,
    stop) indices of each image in the row.
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
