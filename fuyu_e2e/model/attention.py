"""Causal attention inside each document of a packed row, of all its tokens or of those that pass a routed block.

What a block asks for stands here, with its definition (`reference_attention`) and the rotary embedding. Several
backends compute it, at the cost of the sum of squares of the documents' lengths instead of the square of the row's:
`fuyu_e2e.model.attention_plans` on any device, `fuyu_e2e.model.attention_kernels` on GPUs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""How a block attends: (queries "T H K", keys "S G K", values "S G K") to outputs "T H K".

Training and prefill attend within the row (`AttentionPlan`), decoding attends to a cache; a block can't tell.
"""


def attention_type(weight: Tensor) -> torch.dtype:
    """The type of queries, keys and values: autocast's where that is on, else that of the weights."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


@dataclass(frozen=True)
class Passing:
    """The tokens of a row that pass a routed block, gathered in their order."""

    index: Int64[Tensor, " C"]
    """Where each stands in the row."""
    real: Bool[Tensor, " C"]
    """False for the tokens at the end that only fill the capacity: they skip the block, whatever is computed."""

    def documents(self, document: Int64[Tensor, " T"], filling: int) -> Int64[Tensor, " C"]:
        """The document of each, of those of the row's tokens; what only fills the capacity forms one of its own.

        Args:
            document: Of each token of the row, the number of its document.
            filling: A number that no document has.
        """
        return torch.where(self.real, document.index_select(0, self.index), filling)


class RowAttention(ABC):
    """Attention of all tokens of a row, which also serves those that pass a routed block."""

    @abstractmethod
    def __call__(
        self,
        queries: Float[Tensor, "T H K"],
        keys: Float[Tensor, "T G K"],
        values: Float[Tensor, "T G K"],
    ) -> Float[Tensor, "T H K"]:
        """Causal attention of every token to the tokens of its own document up to itself."""

    @abstractmethod
    def among(self, passing: Passing) -> Attend:
        """The attention of passing tokens to passing tokens alone: queries, keys and values are theirs."""

    @abstractmethod
    def asking(self, passing: Passing) -> Attend:
        """The attention of passing tokens to all tokens: queries are theirs, keys and values the whole row's."""


def reference_attention(
    queries: Float[Tensor, "T H K"],
    keys: Float[Tensor, "T G K"],
    values: Float[Tensor, "T G K"],
    document_lengths: tuple[int, ...],
    known: Bool[Tensor, " T"] | None = None,
) -> Float[Tensor, "T H K"]:
    """The same attention as one masked softmax over the whole row: the definition that every fast path must match.

    Where only some keys are `known`, the outputs of tokens that see none mean nothing.
    """
    repeat = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(repeat, dim=1), values.repeat_interleave(repeat, dim=1)
    document = torch.repeat_interleave(
        torch.arange(len(document_lengths), device=queries.device),
        torch.tensor(document_lengths, device=queries.device),
    )
    order = torch.arange(queries.shape[0], device=queries.device)
    allowed = (document[:, None] == document) & (order[:, None] >= order)
    if known is not None:
        allowed = allowed & known
    scores = torch.einsum("thk,shk->hts", queries, keys) / queries.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    return torch.einsum("hts,shk->thk", weights, values)


def rotary(
    positions: Int64[Tensor, " T"], size: int, theta: float
) -> tuple[Float[Tensor, "T 1 R"], Float[Tensor, "T 1 R"]]:
    """Cosines and sines of the rotary embedding (Su et al. 2021, arXiv 2104.09864) in the rotate-half layout.

    Always float32: bfloat16 can't tell neighbouring positions of a long document apart.
    """
    exponent = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
    angles = positions[:, None].float() * theta**-exponent
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "T heads K"], cos: Float[Tensor, "T 1 R"], sin: Float[Tensor, "T 1 R"]
) -> Float[Tensor, "T heads K"]:
    """Turns the pairs (r, r + R/2) of each head's first R values by its token's angles; the others stay."""
    if (size := cos.shape[-1]) < x.shape[-1]:
        return torch.cat((rotate(x[..., :size], cos, sin), x[..., size:]), dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
